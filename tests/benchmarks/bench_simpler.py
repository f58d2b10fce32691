"""SimplerEnv's WidowX tasks: control-steps per second at several picture sizes, and the expert on all configurations.

    MS_ASSET_DIR=FOLDER python tests/benchmarks/bench_simpler.py speed [task] [processes]
    MS_ASSET_DIR=FOLDER python tests/benchmarks/bench_simpler.py experts

Speed is that of bare environments under the expert's first commands. Three minutes each on an idle core.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bridge_tasks import RUNNABLE  # noqa: E402
from robot_tasks import configured  # noqa: E402

from robot_forgetting.tasks.simulator.simulation import Simulation  # noqa: E402
from robot_forgetting.tasks.simulator.workers import POOL  # noqa: E402

SIZES = (64, 112, 224)
STEPS = 60
PER_PROCESS = 4  # environments


def speed(name: str, processes: int) -> None:
    print(f"{name}, {processes} process(es) of {PER_PROCESS} environments")
    for size in SIZES:
        for full in (False, True):
            task = configured(
                name, f"image_size={size}", f"processes={processes}", f"task.full_pictures={str(full).lower()}"
            )
            with task.make_env(processes * PER_PROCESS) as env:
                rate = control_steps_per_second(env)
            how = "640 x 480 averaged" if full else "drawn at that size"
            print(f"  {size:3} px, {how:18} {rate:7.1f} control-steps/s", flush=True)


def control_steps_per_second(env) -> float:
    rng = np.random.default_rng(0)

    def everyone(resets: dict, commands: dict) -> None:
        for group, members in enumerate(env.groups):
            env.request(
                group,
                {slot: resets[slot] for slot in members if slot in resets},
                {slot: commands[slot] for slot in members if slot in commands},
            )
        for _ in env.groups:
            env.wait()

    slots = [slot for group in env.groups for slot in group]
    everyone({slot: 1_000_000 + slot for slot in slots}, {})
    started = time.perf_counter()
    for _ in range(STEPS):
        step = [*rng.uniform(-0.01, 0.01, 3), 0, 0, rng.uniform(-0.05, 0.05), 1]
        everyone({}, {slot: np.array(step) for slot in slots})
    return STEPS * len(slots) / (time.perf_counter() - started)


def experts() -> None:
    Simulation.observe = lambda self: {}  # success needs no pictures
    for name in RUNNABLE:
        simulation, won, first = Simulation(configured(name).spec), [], []
        for configuration in range(24):
            simulation.reset(1_000_000 + configuration)
            success, done = [], False
            while not done:
                _, _, flag, done, _ = simulation.step(simulation.expert_command())
                success.append(flag)
            won.append(success[-1])
            first.append(success.index(True) + 1 if True in success else len(success))
        lost = [index for index, flag in enumerate(won) if not flag]
        print(f"{name}: {sum(won)} of 24 at the time limit, first success after step {np.mean(first):.1f}; lost {lost}")
        simulation.close()


def main() -> None:
    torch.set_num_threads(1)
    verb = sys.argv[1] if len(sys.argv) > 1 else "speed"
    if verb == "experts":
        experts()
    else:
        speed(sys.argv[2] if len(sys.argv) > 2 else RUNNABLE[0], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    POOL.close()


if __name__ == "__main__":
    main()
