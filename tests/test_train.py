"""The optimiser loop: the same gradient however it is computed; what breaks it is one clear line."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import ToyPolicy, ToyTask
from toy_training import OPTIMISER, close, die, killed, make, same, start, stop_at

from robot_forgetting.conformance import toy_task as toy
from robot_forgetting.engine.evaluate import evaluate
from robot_forgetting.errors import UserError
from robot_forgetting.finite import are_finite
from robot_forgetting.method import Method, Optimiser
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.sft import SFT
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.records.checkpoints import latest_checkpoint
from robot_forgetting.records.run_folder import RunFolder

# ---- the same gradient, however it is computed


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_micro_batches_equal_the_full_batch(tmp_path, kind):
    whole = start(tmp_path / "whole", kind)
    options = {**OPTIMISER.__dict__, "micro_batch": 5}
    close(start(tmp_path / "micro", kind, optimiser=Optimiser(**options)), whole)


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_processes_share_the_work(tmp_path, kind, processes):
    close(start(tmp_path / "shared", kind, processes=processes), start(tmp_path / "alone", kind))


def test_processes_and_a_restart(tmp_path):
    whole = start(tmp_path / "whole", processes=2)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "parts", processes=2, progress=stop_at(2))
    same(start(tmp_path / "parts", processes=2), whole)
    assert multiprocessing.active_children() == []


def test_more_processes_than_rows(tmp_path):
    def small():
        return SFT(iterations=2, steps_per_iteration=2, batch_size=1, demonstrations=3, optimiser=None)

    close(start(tmp_path / "three", method=small(), processes=3), start(tmp_path / "one", method=small()))


class Fragile(Reinforce):
    """Fails in every process but the trainer."""

    failure: Callable[[], None]

    def __init__(self, failure, **arguments):
        super().__init__(iterations=2, groups=6, group_size=4, optimiser=None, **arguments)
        self.failure, self.trainer = failure, os.getpid()

    def loss(self, policy, batch):
        if os.getpid() != self.trainer:
            self.failure()
        return super().loss(policy, batch)


@pytest.mark.parametrize("failure, code", [(lambda: os._exit(7), 7), (die, -9)])
def test_a_training_process_that_dies_is_one_clear_line(tmp_path, failure, code):
    words = rf"a training process died \(exit code {code}\).*same command continues; processes=1 needs less memory"
    with pytest.raises(UserError, match=words):
        start(tmp_path, method=Fragile(failure), processes=2)
    assert multiprocessing.active_children() == []


def test_an_error_in_a_training_process_is_told(tmp_path):
    def fail():
        raise ValueError("the shapes do not fit")

    with pytest.raises(UserError, match=r"test_train.py, line \d+, in fail: ValueError: the shapes do not fit"):
        start(tmp_path, method=Fragile(fail), processes=2)


def test_training_processes_do_not_outlive_a_killed_trainer(tmp_path):
    def doomed():
        def report(iteration, row):
            children = [child.pid for child in multiprocessing.active_children()]
            (tmp_path / "pids.json").write_text(json.dumps(children))
            die()

        start(tmp_path / "run", processes=3, progress=report)

    assert killed(doomed) == -signal.SIGKILL
    pids = json.loads((tmp_path / "pids.json").read_text())
    assert len(pids) == 2
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- the optimiser


def test_learning_rate():
    constant = Optimiser(learning_rate=2.0, warmup_steps=4)
    assert [constant.rate(step, 0.5) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    cosine = Optimiser(learning_rate=2.0, schedule="cosine")
    assert [cosine.rate(9, f) for f in (0, 0.5, 1)] == pytest.approx([2, 1, 0])


@pytest.mark.parametrize(
    "arguments, words",
    [({"schedule": "step"}, "unknown schedule 'step'"), ({"learning_rate": 0}, "is not a number above 0"),
     ({"learning_rate": math.nan}, "is not a number above 0")],
)  # fmt: skip
def test_bad_settings(arguments, words):
    with pytest.raises(UserError, match=words):
        Optimiser(**{"learning_rate": 1.0} | arguments)


def test_one_step_by_hand(tmp_path):
    """AdamW's first step moves by rate * sign(gradient) and decays matrices, not vectors."""

    class Constant(Method):
        iterations = 1

        def collect(self, policy, task, iteration):
            sft = make("sft")
            sft.begin(policy, task, [])
            return [sft._data[:5]]

        def loss(self, policy, batch):
            return 3.0 * policy.bias[0] - 4.0 * policy.coupling[0, 0]

    before = ToyPolicy(seed=1)
    optimiser = Optimiser(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1.0)
    after, rows = start(tmp_path, method=Constant(), penalties=[], optimiser=optimiser)
    assert rows[0]["grad_norm"] == pytest.approx(5.0)
    assert rows[0]["learning_rate"] == 0.1 and rows[0]["penalty"] == 0.0
    assert after["bias"][0].item() == pytest.approx(before.bias[0].item() - 0.1, abs=1e-5)
    assert after["coupling"][0, 0].item() == pytest.approx(before.coupling[0, 0].item() * 0.95 + 0.1, abs=1e-5)
    assert torch.equal(after["bias"][1:], before.bias[1:])


def test_a_policy_with_nothing_to_train(tmp_path):
    policy = ToyPolicy()
    policy.requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameters"):
        start(tmp_path, policy=policy)


# ---- what can go wrong


class Exploding(Reinforce):
    def __init__(self, value: float, at: int):
        super().__init__(iterations=4, groups=6, group_size=4, optimiser=None)
        self.value, self.at, self.now = value, at, 0

    def collect(self, policy, task, iteration):
        self.now = iteration
        return super().collect(policy, task, iteration)

    def loss(self, policy, batch):
        return super().loss(policy, batch) * (self.value if self.now == self.at else 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_that_is_not_finite(tmp_path, value, processes):
    with pytest.raises(UserError, match="loss is not finite .* no checkpoint is made of that: lower .*learning_rate"):
        start(tmp_path, method=Exploding(value, at=2), processes=processes)
    folder = RunFolder(tmp_path)
    assert folder.status == "failed" and "not finite" in folder.run["error"]
    kept = latest_checkpoint(folder)
    assert kept.name == "iteration_000002"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept / "policy.safetensors").values())
    with pytest.raises(UserError, match="not finite"):  # again, from there
        start(tmp_path, method=Exploding(value, at=2))


# ---- weights that are no numbers


class Leaping(Method):
    """Its gradient is finite; a huge learning rate makes the step that is not. ``at``: the iteration that leaps."""

    iterations = 2

    def __init__(self, at: int):
        self.at = at

    def collect(self, policy, task, iteration):
        self.factor = float(iteration == self.at)
        sft = make("sft")
        sft.begin(policy, task, [])
        return [sft._data[:5]]

    def loss(self, policy, batch):
        return self.factor * policy.bias[0]


@pytest.mark.parametrize("at", [0, 1], ids=["first step", "last step"])
def test_a_step_to_weights_that_are_not_finite(tmp_path, at):
    policy = ToyPolicy(seed=1)
    with torch.no_grad():
        policy.bias[0] = -3e38
    options = {"method": Leaping(at), "penalties": [], "optimiser": Optimiser(learning_rate=1e38)}
    with pytest.raises(UserError, match="weights are not finite after the optimiser's step; no checkpoint is made of"):
        start(tmp_path, policy=policy, **options)
    kept = latest_checkpoint(RunFolder(tmp_path))
    assert kept is None or all(torch.isfinite(t).all() for t in load_file(kept / "policy.safetensors").values())


def broken(value: float, name: str = "table") -> ToyPolicy:
    policy = ToyPolicy(seed=1)
    with torch.no_grad():
        policy.get_parameter(name).view(-1)[2] = value
    return policy


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["table", "bias"])
def test_weights_that_are_no_numbers_are_not_measured(value, name):
    with pytest.raises(UserError, match=f"policy 'toy' holds numbers that are none .nan or inf in {name}"):
        list(evaluate(broken(value, name), ToyTask(), [1], temperature=1.0, num_envs=1))


def test_weights_too_large_to_compute_with_are_not_measured():
    class Overflowing(ToyPolicy):
        def _token_logits(self, obs, tokens, position):
            return super()._token_logits(obs, tokens, position) * 1e38 * 1e38

    with pytest.raises(UserError, match="policy 'toy' computes probabilities that are no numbers"):
        list(evaluate(Overflowing(seed=1), ToyTask(), [1], temperature=1.0, num_envs=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_finite(dtype):
    """Whatever the precision, and however many: a large model's sum does not overflow."""
    many = torch.full((1000, 1000), 100.0, dtype=dtype)
    assert are_finite([many, many.long()]) and are_finite([])
    for value in (math.nan, math.inf, -math.inf):
        assert not are_finite([many, torch.tensor([1.0, value], dtype=dtype)])


def test_adapters_that_are_no_numbers_are_not_loaded(tmp_path):
    parent = toy.tiny_policy(toy.ToyTask())
    parent.save(tmp_path / "parent")
    options = {"check_images": False, "device": "cpu"}
    policy = OpenVLAPolicy(str(tmp_path / "parent"), lora={"rank": 2}, **options)
    with torch.no_grad():
        policy.trainable_parameters()[0].fill_(math.nan)
    policy.save(tmp_path / "adapter")
    with pytest.raises(UserError, match="the adapter in .*adapter holds numbers that are none"):
        OpenVLAPolicy(str(tmp_path / "parent"), lora={"rank": 2, "adapter": str(tmp_path / "adapter")}, **options)
