"""Speed of rollouts: policy in the loop against bare environments, low_poly against stock, our step and ManiSkill's.

    python tests/benchmarks/bench_rollout.py [task]

Each ratio is measured in one run with the variants taking turns, so that it holds on a busy machine too. The task is
the name of a file in configs/task (default: stack_cube). Two minutes.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import numpy as np
import torch

from robot_forgetting import configs
from robot_forgetting.machine.doctor import SHIPPED
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy, new_nano
from robot_forgetting.rollout import Episode, EpisodeKey, rollout
from robot_forgetting.task import VectorEnv
from robot_forgetting.tasks.simulator.maniskill_task import ManiSkillTask
from robot_forgetting.tasks.simulator.simulation import Simulation
from robot_forgetting.tasks.simulator.workers import POOL

ENVIRONMENTS, PROCESSES, ROUNDS = 16, 2, 3


def load_task(name: str) -> ManiSkillTask:
    with hydra.initialize_config_dir(str(Path(configs.__file__).parent), version_base="1.3"):
        config = hydra.compose("config", overrides=[f"task={name}", f"processes={PROCESSES}"])
    return hydra.utils.instantiate(config.task, _convert_="all")


def load_policy(task: ManiSkillTask) -> OpenVLAPolicy:
    """The shipped nano policy; one of random weights where there is none (just as fast)."""
    if (SHIPPED / "openvla-nano" / "config.json").is_file():
        return OpenVLAPolicy("openvla-nano", name="openvla-nano", check_images=False)
    return new_nano(instructions=[task.instruction], check_images=False)


def bare(env: VectorEnv, episodes: Sequence[Episode]) -> None:
    """The same episodes in the same slots, from their recorded commands."""
    count = len(env.groups)
    queues = [list(episodes[group::count])[::-1] for group in range(count)]
    left: dict[int, list] = {}

    def ask(group: int, members: Sequence[int], fresh: Sequence[int]) -> bool:
        resets = {}
        for slot in fresh:
            left.pop(slot, None)
            if queues[group]:
                episode = queues[group].pop()
                resets[slot], left[slot] = episode.key.seed, list(episode.commands)
        commands = {slot: left[slot].pop(0) for slot in members if slot in left and slot not in resets}
        if resets or commands:
            env.request(group, resets, commands)
        return bool(resets or commands)

    running = sum(ask(group, members, members) for group, members in enumerate(env.groups))
    while running:
        group, transitions = env.wait()
        ended = [transition.slot for transition in transitions if transition.done]
        running += ask(group, env.groups[group], ended) - 1


def turns(variants: dict[str, Callable[[], int]]) -> dict[str, float]:
    """Median steps per second of each variant over the rounds; a variant returns how many steps it took."""
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()  # shaders, caches
    for _ in range(ROUNDS):
        for name, run in variants.items():
            started = time.perf_counter()
            steps = run()
            rates[name].append(steps / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def report(title: str, rates: dict[str, float]) -> None:
    """The ratio is that of the first variant to the second."""
    print(title)
    for name, rate in rates.items():
        print(f"  {name:34} {rate:8.1f} control-steps/s")
    first, second = rates.values()
    print(f"  ratio {first / second:.2f}", flush=True)


def policy_in_the_loop(task: ManiSkillTask) -> None:
    policy = load_policy(task).eval()
    keys = [EpisodeKey(seed) for seed in range(2 * ENVIRONMENTS)]
    with task.make_env(ENVIRONMENTS) as env:

        def with_policy() -> int:
            nonlocal episodes
            found = {e.key: e for e in rollout(policy, task, keys, num_envs=ENVIRONMENTS, env=env)}
            episodes = [found[key] for key in keys]
            return sum(episode.steps for episode in episodes)

        def without() -> int:
            bare(env, episodes)
            return sum(episode.steps for episode in episodes)

        episodes: list[Episode] = []
        rates = turns({"policy in the loop": with_policy, "bare, the same commands": without})
    report(f"{task.name}, {ENVIRONMENTS} environments over {PROCESSES} processes", rates)


def renderings(task: ManiSkillTask) -> None:
    """One worker each, used in turn: one process draws with one option."""
    workers = {}
    for index, render in enumerate(("low_poly", "stock")):
        workers[render] = POOL.prepare(index, dataclasses.replace(task.spec, render=render), 1)
        workers[render].receive()

    def steps(render: str, count: int = 20) -> int:
        worker, rng = workers[render], np.random.default_rng(0)
        for step in range(count):
            command = rng.uniform(-0.3, 0.3, 7)
            worker.call("advance", {0: 1} if step == 0 else {}, {} if step == 0 else {0: command})
            worker.receive()
        return count

    size = task.spec.image_size
    rates = turns({render: lambda render=render: steps(render) for render in workers})
    report(f"rendering at {size} px, one environment in one process", rates)


def step_functions(task: ManiSkillTask) -> None:
    simulation = Simulation(task.spec)

    def steps(step: Callable, count: int = 60) -> int:
        rng = np.random.default_rng(0)
        simulation.reset(1)
        for _ in range(count):
            step(rng.uniform(-0.3, 0.3, 7))
        return count

    def maniskills(command: np.ndarray) -> None:
        simulation.env.step(torch.from_numpy(command).float())

    rates = turns({"our step": lambda: steps(simulation.step), "ManiSkill's env.step": lambda: steps(maniskills)})
    report("one environment in this process, low_poly, picture included", rates)
    simulation.close()


def main() -> None:
    torch.set_num_threads(1)
    task = load_task(sys.argv[1] if len(sys.argv) > 1 else "stack_cube")
    policy_in_the_loop(task)
    renderings(task)
    step_functions(task)
    POOL.close()


if __name__ == "__main__":
    main()
