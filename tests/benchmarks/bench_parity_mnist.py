"""Speed of the controlled study's sweep: a stack of networks against its arithmetic, and against one run at a time.

    ROBOT_FORGETTING_DATA=FOLDER python tests/benchmarks/bench_parity_mnist.py [stack] [rounds]

Three things take turns in one process of one thread, so that their ratios hold on a busy machine too; times are the
process's own (CPU seconds), medians over rounds:
  floor: the products of a step at their shapes (layer 1 forward and weight gradient, layer 2 forward, weight and input
         gradient; layer 3 is 0.6 % of them), each into memory that is there already
  stack: steps of ``train`` as the sweep runs it, SFT and GRPO
  loop: the usual loop, one network, nn.Linear layers, autograd, AdamW and a DataLoader over tensors
Aims: stack within 1.6 times the floor, and at least 3 times faster than the loop.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn

from robot_forgetting.engine.train import train
from robot_forgetting.method import Method, Optimiser
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.studies.digits.study_methods import Details, build
from robot_forgetting.tasks.digits.parity_mnist import ParityMNIST

BATCH, STEPS = 64, 12
SIZES = (785, 512, 256, 10)


class Floor:
    """The products of one step of ``runs`` networks."""

    def __init__(self, runs: int):
        a, b, c, _ = SIZES
        x, h, g = torch.rand(1, BATCH, a).expand(runs, -1, -1), torch.rand(runs, BATCH, b), torch.rand(runs, BATCH, c)
        w1, w2 = torch.rand(runs, a, b), torch.rand(runs, b, c)
        o1, o2, o3 = torch.empty(runs, BATCH, b), torch.empty(runs, BATCH, c), torch.empty(runs, BATCH, b)
        d1, d2 = torch.empty(runs, a, b), torch.empty(runs, b, c)
        self.products = {
            "layer 1 forward": (lambda: torch.bmm(x, w1, out=o1), a * b),
            "layer 1 weight gradient": (lambda: torch.bmm(x.transpose(1, 2), h, out=d1), a * b),
            "layer 2 forward": (lambda: torch.bmm(h, w2, out=o2), b * c),
            "layer 2 weight gradient": (lambda: torch.bmm(h.transpose(1, 2), g, out=d2), b * c),
            "layer 2 input gradient": (lambda: torch.bmm(g, w2.transpose(1, 2), out=o3), b * c),
        }
        self.flops = {name: 2 * BATCH * size * runs for name, (_, size) in self.products.items()}
        self.seconds: dict[str, list[float]] = {name: [] for name in self.products}

    def __call__(self) -> float:
        total = 0.0
        for name, (product, _) in self.products.items():
            start = time.process_time()
            for _ in range(STEPS):
                product()
            self.seconds[name].append((time.process_time() - start) / STEPS)
            total += self.seconds[name][-1]
        return total


class Stack:
    """``train`` as it stands, stopped and continued between iterations."""

    def __init__(self, name: str, runs: int, folder: str):
        self.task, self.runs = ParityMNIST(), runs
        self.policy = MLPPolicy(sizes=SIZES, runs=runs)
        recipe = build(
            name,
            epochs=1,
            steps_per_epoch=STEPS + 1,
            details=Details(BATCH, 8, {"coefficient": 0.1, "direction": "reverse"}),
            seed=0,
        )
        self.method: Method = recipe.method
        self.penalties, self.folder, self.count = recipe.penalties, folder, 0

    def __call__(self) -> float:
        marks: list[float] = []
        self.count += 1
        optimisers = [Optimiser(learning_rate=1e-4, micro_batch=1_000_000) for _ in range(self.runs)]
        with ExitStack() as stack:
            folders = [
                stack.enter_context(RunFolder.create(f"{self.folder}/{id(self)}-{self.count}-{r}", config={}))
                for r in range(self.runs)
            ]
            train(
                self.policy,
                self.task,
                self.method,
                optimiser=optimisers,
                run=folders,
                seed=0,
                penalties=self.penalties,
                checkpoints=False,
                log_every=100,
                after_iteration=lambda iteration: marks.append(time.process_time()),
            )
        return (marks[STEPS] - marks[0]) / STEPS  # the last step, after it, writes rows


class Loop:
    """What one would write for a single run."""

    def __init__(self):
        task = ParityMNIST()
        seeds = task.seeds("train").start + np.arange(BATCH * STEPS)
        features = torch.from_numpy(task.observations(seeds)["features"])
        data = torch.utils.data.TensorDataset(features, torch.from_numpy(task.classes(seeds) % 2))
        self.loader = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)
        a, b, c, d = SIZES
        self.network = nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, c), nn.ReLU(), nn.Linear(c, d))
        self.adam = torch.optim.AdamW(self.network.parameters(), lr=1e-4, weight_decay=0.0)

    def __call__(self) -> float:
        start = time.process_time()
        for inputs, labels in self.loader:
            self.adam.zero_grad()
            nn.functional.cross_entropy(self.network(inputs), labels).backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.adam.step()
        return (time.process_time() - start) / STEPS


def main() -> None:
    torch.set_num_threads(1)
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    with tempfile.TemporaryDirectory() as folder:
        floor, loop = Floor(runs), Loop()
        stacks = {name: Stack(name, runs, folder) for name in ("sft_1", "grpo", "grpo_kl")}
        seconds: dict[str, list[float]] = {name: [] for name in ("floor", "loop", *stacks)}
        for turn in range(rounds + 1):
            found = {"floor": floor() / runs, "loop": loop()}
            found |= {name: stack() / runs for name, stack in stacks.items()}
            if turn:  # the first warms up
                for name, value in found.items():
                    seconds[name].append(value)
    print(f"stack of {runs} networks, batch {BATCH}, one thread, medians of {rounds} rounds (CPU time)")
    for name, flops in floor.flops.items():
        print(f"  {name:26s} {flops / np.median(floor.seconds[name]) / 1e9:7.1f} GFLOP/s")
    base = np.median(seconds["floor"])
    print(f"{'floor':10s} {base * 1e3:7.2f} ms per step and run")
    for name, values in seconds.items():
        if name != "floor":
            # Ratios within a round: what slows one down on a busy machine slows its neighbours too.
            over = np.median(np.array(values) / np.array(seconds["floor"]))
            against = np.median(np.array(seconds["loop"]) / np.array(values))
            text = f"{over:5.2f} x floor, {against:5.2f} x faster than the loop"
            print(f"{name:10s} {np.median(values) * 1e3:7.2f} ms per step and run, {text}")


if __name__ == "__main__":
    main()
