"""A training of the toy policy, as the tests of the optimiser loop and of its checkpoints run it."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from toy import ToyPolicy, ToyTask

from robot_forgetting.engine.train import train
from robot_forgetting.method import Method, Optimiser
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.on_policy import sample_rollouts
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.sft import SFT
from robot_forgetting.records.run_folder import RunFolder

OPTIMISER = Optimiser(learning_rate=0.05, weight_decay=0.1, warmup_steps=3, schedule="cosine")
ITERATIONS = 4


class Remembering(Method):
    """REINFORCE against a running mean of the reward: a method with a state of its own to be checkpointed."""

    def __init__(self, **arguments):
        self.inner = Reinforce(**arguments)
        self.iterations, self.mean = self.inner.iterations, torch.zeros(1)

    def collect(self, policy, task, iteration):
        rollouts = sample_rollouts(policy, task, self.inner.plan, iteration)
        self.mean = 0.5 * self.mean + 0.5 * rollouts.rewards.mean()
        return [rollouts.batch(rollouts.rewards - self.mean)]

    def loss(self, policy, batch):
        # torch's generator is part of what a restart has to repeat
        return self.inner.loss(policy, batch) * (1 + 0.1 * torch.rand(()))

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


def make(kind: str) -> Method:
    if kind == "sft":
        return SFT(iterations=ITERATIONS, steps_per_iteration=3, batch_size=6, demonstrations=5, optimiser=None)
    arguments = {"iterations": ITERATIONS, "groups": 6, "group_size": 4, "optimiser": None, "minibatch_size": 40}
    if kind == "grpo":
        return GRPO(**arguments, epochs=2)
    return Remembering(**arguments) if kind == "remembering" else Reinforce(**arguments)


def start(path: Path, kind: str = "grpo", **options) -> tuple[dict, list[dict]]:
    """Runs (or continues) a training; returns the final weights and the rows of train.jsonl without their times."""
    policy = options.pop("policy", None) or ToyPolicy(seed=1)
    arguments = {"optimiser": OPTIMISER, "seed": 3, "penalties": [KL(coefficient=0.2)]} | options
    method = arguments.pop("method", None) or make(kind)
    with RunFolder.create(path, config={}) as folder:
        assert train(policy, ToyTask(), method, run=folder, **arguments) == method.iterations
        rows = [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in folder.rows("train")]
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}, rows


def same(one: tuple[dict, list], other: tuple[dict, list]) -> None:
    assert one[1] == other[1]
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def close(one: tuple[dict, list], other: tuple[dict, list]) -> None:
    assert all(torch.allclose(one[0][name], other[0][name], atol=1e-5) for name in one[0])
    for a, b in zip(one[1], other[1], strict=True):
        for key in a.keys() | b.keys():
            assert a[key] == (None if b[key] is None else pytest.approx(b[key], rel=1e-4, abs=1e-6)), key


def stop_at(iteration: int) -> Callable:
    def interrupt(now, *row):
        if now == iteration:
            raise KeyboardInterrupt

    return interrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action: Callable[[], None]) -> int:
    """Runs ``action`` in a forked process and returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(timeout=60)
    return process.exitcode
