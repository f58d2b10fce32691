"""``simulation=gpu``: control-steps per second of one batch at several picture sizes, against processes on all cores.

    python tests/benchmarks/bench_gpu.py [task]

Bare environments under small random commands, and the time in which all environments of a batch start. Needs an NVIDIA
GPU.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_simpler import SIZES, control_steps_per_second  # noqa: E402
from robot_tasks import configured  # noqa: E402

from robot_forgetting.errors import UserError  # noqa: E402
from robot_forgetting.tasks.simulator.batched import require  # noqa: E402
from robot_forgetting.tasks.simulator.workers import POOL, BatchedVectorEnv, ManiSkillVectorEnv  # noqa: E402

BATCHES = (16, 64, 256)
PER_PROCESS = 4  # environments


def measure(name: str) -> None:
    cores = os.cpu_count() or 1
    print(f"{name}, {torch.cuda.get_device_name()}, {cores} cores")
    for size in SIZES:
        spec = configured(name, f"image_size={size}").spec
        with ManiSkillVectorEnv(spec, cores * PER_PROCESS, cores) as env:
            rate = control_steps_per_second(env)
        print(f"  {size:3} px, {cores} processes            {rate:9.1f} control-steps/s", flush=True)
        for count in BATCHES:
            with BatchedVectorEnv(spec, count, cores) as env:
                rate = control_steps_per_second(env)
                started = time.perf_counter()
                env.request(0, {slot: slot for slot in range(count)}, {})
                env.wait()
                seconds = time.perf_counter() - started
            print(
                f"  {size:3} px, batch of {count:4} {rate:18.1f} control-steps/s, starts in {seconds:.2f} s", flush=True
            )


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "stack_cube"
    torch.set_num_threads(1)
    try:
        require(name, configured(name).spec)
    except UserError as error:
        print(f"not measured: {error}")
        return
    measure(name)
    POOL.close()


if __name__ == "__main__":
    main()
