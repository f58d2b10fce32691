"""The optimiser loop: an interrupted training ends bitwise as an undisturbed one; what breaks it is one clear line."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from toy import ToyPolicy, ToyTask

from robot_forgetting import train as training
from robot_forgetting.errors import UserError
from robot_forgetting.method import Method
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.on_policy import sample_rollouts
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.sft import SFT
from robot_forgetting.records import RunFolder
from robot_forgetting.train import Optimiser, latest_checkpoint, load_weights, train

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


# ---- restarts


@pytest.mark.parametrize("where", ["progress", "after_iteration"])
@pytest.mark.parametrize("kind", ["sft", "grpo", "reinforce", "remembering"])
def test_interrupted_at_every_iteration(tmp_path, kind, where):
    undisturbed = start(tmp_path / "whole", kind)
    for iteration in range(1, ITERATIONS + 1):
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "parts", kind, **{where: stop_at(iteration)})
        folder = RunFolder(tmp_path / "parts")
        assert folder.status == "interrupted"
        assert latest_checkpoint(folder).name == f"iteration_{iteration:06d}"
    same(start(tmp_path / "parts", kind), undisturbed)
    same(start(tmp_path / "parts", kind), undisturbed)  # nothing is left to do
    assert [path.name for path in (tmp_path / "parts" / "checkpoints").iterdir()] == [f"iteration_{ITERATIONS:06d}"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(action: Callable[[], None]) -> int:
    """Runs ``action`` in a forked process and returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(timeout=60)
    return process.exitcode


def in_collect():
    collect = GRPO.collect

    def dying(self, policy, task, iteration):
        batches = collect(self, policy, task, iteration)
        return die() if iteration == 2 else batches

    GRPO.collect = dying


def in_the_second_step():
    step, calls = training._optimiser_step, []

    def dying(*arguments):
        calls.append(1)
        return die() if len(calls) == 5 else step(*arguments)

    training._optimiser_step = dying


def between_rows_and_checkpoint():
    """Whichever is written first: the other one is missing."""
    append = RunFolder.append

    def dying(self, table, *rows):
        append(self, table, *rows)
        if rows[0]["iteration"] == 3:
            die()

    RunFolder.append = dying


def before_rows():
    append = RunFolder.append

    def dying(self, table, *rows):
        return die() if rows[0]["iteration"] == 3 else append(self, table, *rows)

    RunFolder.append = dying


def amid_the_checkpoint():
    write, calls = training.save_file, []

    def dying(tensors, path):
        write(tensors, path)
        calls.append(path)
        if len(calls) == 8:  # the second of three files of the third checkpoint
            die()

    training.save_file = dying


def before_the_old_checkpoint_goes():
    remove = shutil.rmtree

    def dying(path, **options):
        if Path(path).name == "iteration_000002":
            die()
        remove(path, **options)

    training.shutil.rmtree = dying


@pytest.mark.parametrize(
    "sabotage",
    [in_collect, in_the_second_step, between_rows_and_checkpoint, before_rows, amid_the_checkpoint,
     before_the_old_checkpoint_goes],
)  # fmt: skip
def test_killed_anywhere(tmp_path, sabotage):
    """SIGKILL, so that nothing is tidied up. At most the current iteration is lost, and the end is the same."""
    undisturbed = start(tmp_path / "whole")

    def doomed():
        sabotage()
        start(tmp_path / "killed")

    assert killed(doomed) == -signal.SIGKILL
    folder = RunFolder(tmp_path / "killed")
    assert folder.status == "interrupted" and not folder.finished
    assert int(latest_checkpoint(folder).name.removeprefix("iteration_")) >= 1
    same(start(tmp_path / "killed"), undisturbed)


def test_a_restart_begins_with_the_base_it_began_with(tmp_path):
    """`begin` of method and penalties sees the base weights also after a restart (EWC and the like anchor there)."""
    seen = []

    class Anchored(KL):
        def begin(self, policy, task, past):
            seen.append(policy.table.detach().clone())

    penalties = [Anchored(coefficient=0.2)]
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, penalties=penalties, progress=stop_at(2))
    start(tmp_path, penalties=penalties)
    assert len(seen) == 2 and torch.equal(*seen)


def test_after_iteration_is_called_for_the_last_saved_one_again(tmp_path):
    seen = []

    def note(iteration):
        seen.append(iteration)
        if seen == [0, 1, 2]:
            raise KeyboardInterrupt  # in the midst of an interim evaluation

    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, after_iteration=note)
    start(tmp_path, after_iteration=note)
    assert seen == [0, 1, 2, 2, 3, 4]


def test_an_iteration_without_signal_counts(tmp_path):
    class Nothing(Method):
        iterations = 2

        def collect(self, policy, task, iteration):
            return []

        def loss(self, policy, batch): ...

    weights, rows = start(tmp_path, method=Nothing())
    assert [row["iteration"] for row in rows] == [1, 2] and rows[0]["loss"] is None
    assert torch.equal(weights["table"], ToyPolicy(seed=1).table)


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

    with pytest.raises(RuntimeError, match="ValueError in a training process: the shapes do not fit"):
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
    [({"schedule": "step"}, "unknown schedule 'step'"), ({"learning_rate": 0}, "must be above 0"),
     ({"learning_rate": math.nan}, "must be above 0")],
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
    with pytest.raises(UserError, match="the loss is not finite .* the last checkpoint is kept: lower .*learning_rate"):
        start(tmp_path, method=Exploding(value, at=2), processes=processes)
    folder = RunFolder(tmp_path)
    assert folder.status == "failed" and "not finite" in folder.run["error"]
    kept = latest_checkpoint(folder)
    assert kept.name == "iteration_000002"
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept / "policy.safetensors").values())
    with pytest.raises(UserError, match="not finite"):  # again, from there
        start(tmp_path, method=Exploding(value, at=2))


def damage(name: str, content: bytes | None) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        file = checkpoint / name
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content if content else file.read_bytes()[:-20])

    return apply


@pytest.mark.parametrize("name", ["policy.safetensors", "optimizer.safetensors", "method.safetensors", "state.json"])
@pytest.mark.parametrize("content", [b"", b"\x80\x04\x95 a pickle", None], ids=["truncated", "pickle", "missing"])
def test_a_damaged_checkpoint(tmp_path, name, content):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, "remembering", progress=stop_at(2))
    damage(name, content)(latest_checkpoint(RunFolder(tmp_path)))
    with pytest.raises(UserError) as caught:
        start(tmp_path, "remembering")
    assert name in str(caught.value) and "delete" in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_another_policy(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, progress=stop_at(1))
    checkpoint = latest_checkpoint(RunFolder(tmp_path))
    tensors = load_file(checkpoint / "policy.safetensors")
    for wrong in ({**tensors, "more": torch.zeros(1)}, {**tensors, "bias": torch.zeros(1)}):  # [1] would be broadcast
        save_file(wrong, checkpoint / "policy.safetensors")
        with pytest.raises(UserError, match="does not belong to this policy"):
            load_weights(ToyPolicy(), checkpoint)


@pytest.mark.parametrize("library", ["safetensors", "python"])
def test_a_full_disk(tmp_path, monkeypatch, library):
    """safetensors reports a full disk as an error of its own, with the system's number in the text."""
    undisturbed = start(tmp_path / "whole")
    write, calls = training.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 8:
            if library == "python":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path)

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(UserError, match="the disk is full: .* free some space and run the same command again"):
        start(tmp_path / "run")
    monkeypatch.undo()
    assert latest_checkpoint(RunFolder(tmp_path / "run")).name == "iteration_000002"
    same(start(tmp_path / "run"), undisturbed)


def test_a_folder_that_cannot_be_written(tmp_path):
    with RunFolder.create(tmp_path, config={}) as folder:
        (tmp_path / "checkpoints").write_text("a file where a folder should be")
        with pytest.raises(UserError, match="cannot be written"):
            train(ToyPolicy(), ToyTask(), make("sft"), optimiser=OPTIMISER, run=folder, seed=0)
