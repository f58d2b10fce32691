"""Checkpoints of a training: weights, AdamW's moments, the state of method and penalties; safetensors and json, the
latest of each stage only."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.finite import check_finite
from robot_forgetting.machine.files import disk, follow_umask, read_json, write_json
from robot_forgetting.method import Method, Penalty
from robot_forgetting.policy import Policy
from robot_forgetting.records import schema
from robot_forgetting.records.run_folder import RunFolder

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


def trainable(policy: Policy) -> dict[str, Tensor]:
    """The parameters a method changes, by name (LoRA: the adapters)."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def stage_store(run: RunFolder, stage: int) -> Path:
    """Where a sequence keeps the checkpoint of a stage, the end of earlier ones beside that of the present one. A run
    of one stage keeps its own in ``checkpoints`` itself."""
    return run.checkpoints / f"stage_{stage:02d}"


def stage_of(checkpoint: Path) -> int:
    """The stage whose weights a checkpoint's folder holds."""
    found = re.fullmatch(r"stage_(\d{2,9})", checkpoint.parent.name)
    return int(found[1]) if found else 1


def drop_moments(store: Path) -> None:
    """Removes AdamW's moments from the checkpoint of a stage that is over: the next one begins with none."""
    folder = newest(store)
    if folder is not None:
        (folder / "optimizer.safetensors").unlink(missing_ok=True)


def drop_stages(run: RunFolder) -> None:
    """Removes the checkpoints of all stages of a sequence but the last."""
    for store in _stores(run)[:-1]:
        shutil.rmtree(store, ignore_errors=True)


def save_checkpoint(
    store: Path, policy: Policy, adam, method: Method, penalties: Sequence[Penalty] = (), *, iteration: int, step: int
) -> None:
    """Writes STORE/iteration_NNNNNN beside the old one, then removes the old one."""
    folder = store / f"iteration_{iteration:06d}"
    part = folder.with_name(folder.name + ".part")
    with disk(store):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write({name: p.detach() for name, p in trainable(policy).items()}, part / "policy.safetensors")
        files = {"optimizer": _adam_tensors(policy, adam), "method": method.state_dict()}
        of_penalties = _numbered(one.state_dict() for one in penalties)
        files |= {"penalty": of_penalties} if of_penalties else {}
        for name, tensors in files.items():
            _write(tensors, part / f"{name}.safetensors")
        layout = {name: _layout(tensors) for name, tensors in files.items()}
        write_json(part / "state.json", {"iteration": iteration, "step": step, "layout": layout})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    for old in store.glob("iteration_*"):
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(store: Path, policy: Policy, adam, method: Method, penalties: Sequence[Penalty] = ()) -> dict:
    """Restores the newest complete checkpoint; {"iteration": 0, "step": 0} where there is none.

    adam: None where the training is over and only what it left behind counts
    """
    folder = newest(store)
    if folder is None:
        return {"iteration": 0, "step": 0}
    state = read_state(folder)
    load_weights(policy, folder)
    moments = {} if adam is None else _moments(folder / "optimizer.safetensors", policy, state)
    for name, parameter in trainable(policy).items():
        if f"{name}.exp_avg" in moments:
            adam.state[parameter] = {
                # The step too is where fused AdamW reads it; moments may have been saved in bfloat16.
                key: moments[f"{name}.{key}"].to(parameter.device, None if key == "step" else parameter.dtype)
                for key in MOMENTS
            }
    _remember(folder / "method.safetensors", state, lambda tensors: method.load_state_dict(tensors))
    if (folder / "penalty.safetensors").exists() or "penalty" in (state.get("layout") or {}):
        _remember(folder / "penalty.safetensors", state, lambda tensors: _distribute(tensors, penalties))
    return state


def _remember(file: Path, state: dict, load: Callable[[dict[str, Tensor]], None]) -> None:
    """Gives a method or the penalties the state that a checkpoint holds."""
    remembered = _read(file)
    _check_layout(file, remembered, state)
    try:
        load(remembered)
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:  # as a method of the user's may raise
        raise _damaged(file, error) from error


def _numbered(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The states of several penalties in one: "0.fisher" is the first one's "fisher"."""
    return {f"{number}.{name}": tensor for number, state in enumerate(states) for name, tensor in state.items()}


def _distribute(tensors: dict[str, Tensor], penalties: Sequence[Penalty]) -> None:
    for number, penalty in enumerate(penalties):
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(f"{number}.")}
        penalty.load_state_dict({name.partition(".")[2]: tensor for name, tensor in mine.items()})


def read_state(checkpoint: Path) -> dict:
    """{"iteration", "step"} of a checkpoint's folder."""
    file = checkpoint / "state.json"
    try:
        return schema.checked(read_json(file), schema.STATE, "state", "restore it")
    except (UserError, OSError) as error:
        raise _damaged(file, error) from error


def _moments(file: Path, policy: Policy, state: dict) -> dict[str, Tensor]:
    """AdamW's state; every parameter has all of its moments, in its shape, or (never trained) none."""
    moments = _read(file)
    _check_layout(file, moments, state)
    shapes = {
        f"{name}.{key}": [] if key == "step" else list(parameter.shape)
        for name, parameter in trainable(policy).items()
        for key in MOMENTS
    }
    for name, tensor in moments.items():
        if shapes.get(name) != list(tensor.shape):
            expected = f"instead of {shapes[name]}" if name in shapes else "and no parameter has it"
            raise _damaged(file, f"{name} has shape {list(tensor.shape)} {expected}")
        lacking = [key for key in MOMENTS if f"{name.rpartition('.')[0]}.{key}" not in moments]
        if lacking:
            raise _damaged(file, f"{name.rpartition('.')[0]} has no {lacking[0]}")
    if state["step"] and not moments:
        raise _damaged(file, f"it is empty after {state['step']} steps")
    check_finite(moments, str(file), "delete its folder to train from the start")
    return moments


def _layout(tensors: dict[str, Tensor]) -> str:
    """Identifies the names and shapes in a file of a checkpoint, which nothing else can foretell."""
    said = sorted(f"{name} {list(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items())
    return hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _check_layout(file: Path, tensors: dict[str, Tensor], state: dict) -> None:
    kept = state.get("layout") or {}  # earlier checkpoints have none
    if kept.get(file.stem, _layout(tensors)) != _layout(tensors):
        raise _damaged(file, "it does not hold the tensors that were saved")


def load_weights(policy: Policy, folder: Path) -> None:
    """Copies a checkpoint's policy tensors into the policy."""
    tensors, parameters = _read(folder / "policy.safetensors"), trainable(policy)
    # Shapes too: ``copy_`` would broadcast.
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise UserError(
            f"{folder} does not belong to this policy; start in a new run_dir, or (checkpoint=RUN) leave the policy's "
            "settings to the run's records"
        )
    check_finite(tensors, str(folder / "policy.safetensors"), "take an earlier run's, or train again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def trained_checkpoint(run: RunFolder, stage: int | None = None) -> Path:
    """The folder of a run's fine-tuned weights, for ``load_weights``; of a stage that was kept, or the last ones."""
    checkpoint = latest_checkpoint(run) if stage is None else newest(stage_store(run, stage))
    if checkpoint is None and stage is not None:
        raise UserError(f"{run.path} keeps no weights of stage {stage}; run it with keep_stages=true")
    if checkpoint is None:
        raise UserError(f"{run.path} holds no checkpoint; finish `robot-forgetting run` there first")
    return checkpoint


def latest_checkpoint(run: RunFolder) -> Path | None:
    """The newest checkpoint of a run, in a sequence that of the last stage that has one."""
    stores = [run.checkpoints, *_stores(run)]
    return next((found for found in map(newest, reversed(stores)) if found is not None), None)


def _stores(run: RunFolder) -> list[Path]:
    """Where the stages of a sequence keep theirs, in their order."""
    return sorted(run.checkpoints.glob("stage_*"), key=lambda store: (len(store.name), store.name))


def newest(store: Path) -> Path | None:
    """The newest complete checkpoint of a stage."""
    complete = sorted(path for path in store.glob("iteration_*") if not path.name.endswith(".part"))
    return complete[-1] if complete else None


def _adam_tensors(policy: Policy, adam) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.detach()
        for name, parameter in trainable(policy).items()
        for key, value in adam.state.get(parameter, {}).items()
    }


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)
        follow_umask(file)
    except SafetensorError as error:  # the system's error is in its text only: "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception | str) -> UserError:
    return UserError(f"{file} is damaged ({error}); delete its folder to train from the start")
