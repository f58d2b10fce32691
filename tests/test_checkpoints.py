"""Checkpoints: an interrupted training ends bitwise as an undisturbed one; a damaged one is one clear line."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from toy import ToyPolicy, ToyTask
from toy_training import ITERATIONS, OPTIMISER, die, killed, make, same, start, stop_at

from robot_forgetting.engine import train as training
from robot_forgetting.engine.train import train
from robot_forgetting.errors import UserError
from robot_forgetting.method import Method
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.records import checkpoints
from robot_forgetting.records.checkpoints import latest_checkpoint, load_weights
from robot_forgetting.records.run_folder import RunFolder

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


def in_collect():
    collect = GRPO.collect

    def dying(self, policy, task, iteration):
        batches = collect(self, policy, task, iteration)
        return die() if iteration == 2 else batches

    GRPO.collect = dying


def in_the_second_step():
    step, calls = training._step, []

    def dying(*arguments):
        calls.append(1)
        return die() if len(calls) == 5 else step(*arguments)

    training._step = dying


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
    write, calls = checkpoints.save_file, []

    def dying(tensors, path):
        write(tensors, path)
        calls.append(path)
        if len(calls) == 8:  # the second of three files of the third checkpoint
            die()

    checkpoints.save_file = dying


def before_the_old_checkpoint_goes():
    remove = shutil.rmtree

    def dying(path, **options):
        if Path(path).name == "iteration_000002":
            die()
        remove(path, **options)

    checkpoints.shutil.rmtree = dying


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


# ---- damaged, foreign, unwritable


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


class Counting(KL):
    """A penalty with a state of its own."""

    def state_dict(self):
        return {"count": torch.ones(1)}

    def load_state_dict(self, state):
        assert state["count"] == 1


@pytest.mark.parametrize("content", [b"", None], ids=["truncated", "missing"])
def test_a_damaged_state_of_a_penalty(tmp_path, content):
    penalties = [KL(coefficient=0.1), Counting(coefficient=0.1)]
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, penalties=penalties, progress=stop_at(2))
    assert load_file(latest_checkpoint(RunFolder(tmp_path)) / "penalty.safetensors").keys() == {"1.count"}
    damage("penalty.safetensors", content)(latest_checkpoint(RunFolder(tmp_path)))
    with pytest.raises(UserError, match="penalty.safetensors is damaged .* delete its folder"):
        start(tmp_path, penalties=penalties)


def test_files_have_the_mode_of_any_other_file(tmp_path):
    start(tmp_path)
    usual = (tmp_path / "run.json").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in latest_checkpoint(RunFolder(tmp_path)).iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {usual}, modes


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
    write, calls = checkpoints.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 8:
            if library == "python":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
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


# ---- contents that are not what was saved


def changed(change: Callable[[dict], None], name: str) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / name)
        change(tensors)
        save_file(tensors, checkpoint / name)

    return apply


def renamed(old: str, new: str):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


ADAM, METHOD, POLICY = "optimizer.safetensors", "method.safetensors", "policy.safetensors"


@pytest.mark.parametrize("known", [True, False], ids=["layout", "earlier"])
@pytest.mark.parametrize(
    "name, change, words, earlier",
    [
        (ADAM, lambda t: t.update({"bias.exp_avg": torch.zeros(1)}), "bias.exp_avg has shape", True),
        (ADAM, lambda t: t.update({"bias.step": torch.zeros(3)}), "bias.step has shape", True),
        (ADAM, lambda t: t.pop("bias.exp_avg_sq"), "bias has no exp_avg_sq", True),
        (ADAM, lambda t: [t.pop(f"bias.{key}") for key in checkpoints.MOMENTS], "", False),
        (ADAM, dict.clear, "empty after", True),
        (ADAM, lambda t: t.update({"other.exp_avg": torch.zeros(2)}), "no parameter has it", True),
        (ADAM, renamed("bias.exp_avg", "bias.other"), "bias", True),
        (ADAM, lambda t: t["table.exp_avg"].fill_(torch.nan), "numbers that are none", True),
        (POLICY, lambda t: t["bias"].fill_(torch.inf), "numbers that are none", True),
        (METHOD, lambda t: t.update({"mean": torch.zeros(7)}), "", False),
        (METHOD, lambda t: t.update({"more": torch.zeros(1)}), "", False),
        (METHOD, dict.clear, "'mean'", True),
    ],
)  # fmt: skip
def test_a_checkpoint_that_holds_something_else(tmp_path, name, change, words, earlier, known):
    """earlier: whether it is found without the layout, which checkpoints of earlier versions do not tell."""
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, "remembering", progress=stop_at(2))
    checkpoint = latest_checkpoint(RunFolder(tmp_path))
    changed(change, name)(checkpoint)
    if not known:
        state = json.loads((checkpoint / "state.json").read_text())
        del state["layout"]
        (checkpoint / "state.json").write_text(json.dumps(state))
        if not earlier:
            return
    with pytest.raises(UserError) as caught:
        start(tmp_path, "remembering")
    said = str(caught.value)
    assert str(checkpoint / name) in said and "\n" not in said
    assert words in said or (known and "does not hold the tensors that were saved" in said)


@pytest.mark.parametrize("content", ["{}", '{"iteration": "2", "step": 3}', '{"iteration": 2, "step": -1}'])
def test_a_state_that_counts_nothing(tmp_path, content):
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, progress=stop_at(2))
    (latest_checkpoint(RunFolder(tmp_path)) / "state.json").write_text(content)
    with pytest.raises(UserError, match="state.json is damaged"):
        start(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_continued(tmp_path):
    whole = start(tmp_path / "whole", "remembering")
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "parts", "remembering", progress=stop_at(2))
    file = latest_checkpoint(RunFolder(tmp_path / "parts")) / "state.json"
    state = json.loads(file.read_text())
    assert state.pop("layout").keys() == {"optimizer", "method"}
    file.write_text(json.dumps(state))
    same(start(tmp_path / "parts", "remembering"), whole)
