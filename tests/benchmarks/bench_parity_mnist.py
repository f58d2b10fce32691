"""Speed of the controlled study's sweep: a run's step against its arithmetic, and against the usual loop.

    ROBOT_FORGETTING_DATA=FOLDER python tests/benchmarks/bench_parity_mnist.py [rounds]

Three things take turns in one process of one thread, so that their ratios hold on a busy machine too; times are the
process's own (CPU seconds), medians over rounds:
  floor: the products of a step at their shapes (layer 1 forward and weight gradient, layer 2 forward, weight and input
         gradient; layer 3 is 0.6 % of them), each into memory that is there already
  run: steps of ``train`` as the sweep runs it, SFT and GRPO
  loop: the usual loop, nn.Linear layers, autograd, AdamW and a DataLoader over tensors
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn

from robot_forgetting.engine.train import train
from robot_forgetting.method import Optimiser
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.studies.digits.study_methods import Details, build
from robot_forgetting.tasks.digits.parity_mnist import ParityMNIST

BATCH, STEPS = 64, 60
SIZES = (785, 512, 256, 10)


class Floor:
    """The products of one step."""

    def __init__(self):
        a, b, c, _ = SIZES
        x, h, g = torch.rand(BATCH, a), torch.rand(BATCH, b), torch.rand(BATCH, c)
        w1, w2 = torch.rand(a, b), torch.rand(b, c)
        o1, o2, o3 = torch.empty(BATCH, b), torch.empty(BATCH, c), torch.empty(BATCH, b)
        d1, d2 = torch.empty(a, b), torch.empty(b, c)
        self.products = {
            "layer 1 forward": (lambda: torch.mm(x, w1, out=o1), a * b),
            "layer 1 weight gradient": (lambda: torch.mm(x.t(), h, out=d1), a * b),
            "layer 2 forward": (lambda: torch.mm(h, w2, out=o2), b * c),
            "layer 2 weight gradient": (lambda: torch.mm(h.t(), g, out=d2), b * c),
            "layer 2 input gradient": (lambda: torch.mm(g, w2.t(), out=o3), b * c),
        }
        self.flops = {name: 2 * BATCH * size for name, (_, size) in self.products.items()}
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


class Run:
    """``train`` as it stands, stopped and continued between iterations."""

    def __init__(self, name: str, folder: str):
        self.task, self.policy = ParityMNIST(), MLPPolicy(sizes=SIZES)
        details = Details(BATCH, 8, {"coefficient": 0.1, "direction": "reverse"})
        self.recipe = build(name, epochs=1, steps_per_epoch=STEPS + 1, details=details, seed=0)
        self.folder, self.count = folder, 0

    def __call__(self) -> float:
        marks: list[float] = []
        self.count += 1
        with RunFolder.create(f"{self.folder}/{id(self)}-{self.count}", config={}) as run:
            train(
                self.policy,
                self.task,
                self.recipe.method,
                optimiser=Optimiser(learning_rate=1e-4, micro_batch=1_000_000),
                run=run,
                seed=0,
                penalties=self.recipe.penalties,
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
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    with tempfile.TemporaryDirectory() as folder:
        floor = Floor()
        parts = {"floor": floor, "loop": Loop()} | {n: Run(n, folder) for n in ("sft_1", "grpo", "grpo_kl")}
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for turn in range(rounds + 1):
            for name, part in parts.items():
                value = part()
                if turn:  # the first warms up
                    seconds[name].append(value)
    print(f"batch {BATCH}, one thread, medians of {rounds} rounds (CPU time)")
    for name, flops in floor.flops.items():
        print(f"  {name:26s} {flops / np.median(floor.seconds[name]) / 1e9:7.1f} GFLOP/s")
    for name, values in seconds.items():
        # Ratios within a round: what slows one down on a busy machine slows its neighbours too.
        over = np.median(np.array(values) / np.array(seconds["floor"]))
        print(f"{name:10s} {np.median(values) * 1e3:7.2f} ms per step, {over:5.2f} x floor")


if __name__ == "__main__":
    main()
