"""The one optimiser loop: every method and penalty, checkpointed between iterations."""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.files import disk, read_json, write_json
from robot_forgetting.method import Batch, Method, Penalty
from robot_forgetting.policy import Policy
from robot_forgetting.records import RunFolder
from robot_forgetting.replica import Replicas
from robot_forgetting.task import Task


@dataclass(frozen=True)
class Optimiser:
    """AdamW and its schedule.

    schedule: "constant" or "cosine" (to zero), after a linear warm-up over ``warmup_steps``
    micro_batch: rows per forward pass; a larger batch is accumulated over several (same gradient, less memory)
    """

    learning_rate: float
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"
    max_grad_norm: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    micro_batch: int = 256

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"unknown schedule '{self.schedule}'; choose one of: constant, cosine")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be above 0, not {self.learning_rate}")

    def rate(self, step: int, fraction: float) -> float:
        """Learning rate of optimiser step ``step`` when ``fraction`` of the iterations is done."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if self.schedule == "cosine" else 1.0
        return self.learning_rate * warm * decay


def trainable(policy: Policy) -> dict[str, Tensor]:
    """The parameters a method changes, by name (LoRA: the adapters)."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def train(
    policy: Policy,
    task: Task,
    method: Method,
    *,
    optimiser: Optimiser,
    run: RunFolder,
    seed: int,
    penalties: Sequence[Penalty] = (),
    past: Sequence[Task] = (),
    processes: int = 1,
    after_iteration: Callable[[int], None] = lambda iteration: None,
    progress: Callable[[int, dict], None] = lambda iteration, row: None,
) -> int:
    """Runs the method's remaining iterations; returns the number of iterations done in all.

    Continues from the run folder's checkpoint if it has one. ``after_iteration(i)`` is called once i iterations are
    done and saved (also after a restart, so that work it left unfinished is completed). On a CPU, ``processes`` share
    the work of every optimiser step.
    """
    parameters = trainable(policy)
    if not parameters:
        raise UserError(f"policy '{policy.name}' has no trainable parameters; give it lora or unfreeze some")
    # Matrices decay, vectors (norms, biases) do not.
    groups = [
        {"params": [p for p in parameters.values() if p.dim() >= 2], "weight_decay": optimiser.weight_decay},
        {"params": [p for p in parameters.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=optimiser.learning_rate, betas=optimiser.betas, fused=True)
    # The first iteration after a restart must see the base policy the penalties and the method saw at the beginning.
    method.begin(policy, task, past)
    for penalty in penalties:
        penalty.begin(policy, task, past)
    state = load_checkpoint(run, policy, adam, method)
    done, step = state["iteration"], state["step"]
    run.keep("train", lambda row: row["iteration"] <= done)
    after_iteration(done)

    def backward(part: Batch, share: float) -> tuple[float, float]:
        return _backward(policy, method, penalties, part, share, optimiser.micro_batch)

    on_cpu = policy.device.type == "cpu"
    gradient = Replicas(list(parameters.values()), backward, processes - 1 if on_cpu else 0)
    try:
        while done < method.iterations:
            torch.manual_seed(seed * 1_000_003 + done)
            started = time.perf_counter()
            batches = method.collect(policy, task, done)
            collected = time.perf_counter()
            rows = []
            for batch in batches:
                rate = optimiser.rate(step, done / method.iterations)
                for group in adam.param_groups:
                    group["lr"] = rate
                row = _optimiser_step(policy, gradient, batch, adam, parameters, optimiser)
                step += 1
                rows.append({"iteration": done + 1, "step": step, "learning_rate": rate, **row})
            done += 1
            seconds = {"seconds": time.perf_counter() - started, "collect_seconds": collected - started}
            if not rows:  # no signal (every group equally successful): an iteration all the same
                nothing = dict.fromkeys(("loss", "penalty", "grad_norm"))
                rows = [{"iteration": done, "step": step, "learning_rate": 0.0, **nothing}]
            rows[-1] |= {**seconds, **method.metrics()}
            # Rows first: a restart drops those beyond its checkpoint, but could not make up for missing ones.
            run.append("train", *rows)
            save_checkpoint(run, policy, adam, method, iteration=done, step=step)
            progress(done, rows[-1])
            after_iteration(done)
    finally:
        gradient.close()
    method.end(policy, task)
    return done


def _backward(policy, method, penalties, part: Batch, share: float, micro_batch: int) -> tuple[float, float]:
    """Back-propagates ``share`` of the part's mean loss, in micro-batches; returns its shares of loss and penalty."""
    policy.train()
    loss_sum = penalty_sum = 0.0
    for start in range(0, len(part), micro_batch):
        rows = part[start : start + micro_batch]
        weight = share * len(rows) / len(part)
        loss = method.loss(policy, rows)
        penalty = sum((rider(policy, rows) for rider in penalties), start=loss.new_zeros(()))
        ((loss + penalty) * weight).backward()
        loss_sum += loss.item() * weight
        penalty_sum += penalty.item() * weight
    return loss_sum, penalty_sum


def _optimiser_step(policy, gradient: Replicas, batch: Batch, adam, parameters, optimiser: Optimiser) -> dict:
    """One AdamW step on a batch; returns the numbers of train.jsonl."""
    adam.zero_grad(set_to_none=True)
    loss, penalty = gradient(batch)
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), optimiser.max_grad_norm).item()
    if not (math.isfinite(loss) and math.isfinite(penalty) and math.isfinite(norm)):
        raise UserError(
            f"the loss is not finite (loss {loss}, penalty {penalty}, gradient norm {norm}); the last "
            "checkpoint is kept: lower method.optimiser.learning_rate, or look at the demonstrations"
        )
    adam.step()
    policy.eval()
    return {"loss": loss, "penalty": penalty, "grad_norm": norm}


# ---- checkpoints: safetensors and json; the latest only


def save_checkpoint(run: RunFolder, policy: Policy, adam, method: Method, *, iteration: int, step: int) -> None:
    """Writes checkpoints/iteration_NNNNNN beside the old one, then removes the old one."""
    folder = run.checkpoints / f"iteration_{iteration:06d}"
    part = folder.with_name(folder.name + ".part")
    with disk(run.path):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        _write({name: p.detach().contiguous() for name, p in trainable(policy).items()}, part / "policy.safetensors")
        _write(_adam_tensors(policy, adam), part / "optimizer.safetensors")
        _write({name: t.contiguous() for name, t in method.state_dict().items()}, part / "method.safetensors")
        write_json(part / "state.json", {"iteration": iteration, "step": step})
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    for old in run.checkpoints.iterdir():
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: RunFolder, policy: Policy, adam, method: Method) -> dict:
    """Restores the newest complete checkpoint; {"iteration": 0, "step": 0} where there is none."""
    folder = latest_checkpoint(run)
    if folder is None:
        return {"iteration": 0, "step": 0}
    load_weights(policy, folder)
    moments = _read(folder / "optimizer.safetensors")
    by_name = {id(p): name for name, p in trainable(policy).items()}
    for group in adam.param_groups:
        for parameter in group["params"]:
            name = by_name[id(parameter)]
            if f"{name}.exp_avg" in moments:
                adam.state[parameter] = {
                    key: moments[f"{name}.{key}"].to(parameter.device if key != "step" else "cpu")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }
    method.load_state_dict(_read(folder / "method.safetensors"))
    try:
        return read_json(folder / "state.json")
    except (UserError, OSError) as error:
        raise _damaged(folder / "state.json", error) from error


def load_weights(policy: Policy, folder: Path) -> None:
    """Copies a checkpoint's policy tensors into the policy."""
    tensors, parameters = _read(folder / "policy.safetensors"), trainable(policy)
    # Shapes too: ``copy_`` would broadcast.
    if {name: t.shape for name, t in tensors.items()} != {name: p.shape for name, p in parameters.items()}:
        raise UserError(f"{folder} does not belong to this policy; start in a new run_dir")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def latest_checkpoint(run: RunFolder) -> Path | None:
    complete = sorted(path for path in run.checkpoints.glob("iteration_*") if not path.name.endswith(".part"))
    return complete[-1] if complete else None


def _adam_tensors(policy: Policy, adam) -> dict[str, Tensor]:
    by_name = {id(parameter): name for name, parameter in trainable(policy).items()}
    return {
        f"{by_name[id(parameter)]}.{key}": value.detach().contiguous()
        for parameter, state in adam.state.items()
        for key, value in state.items()
    }


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # the system's error is in its text only: "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code)) from error


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{file} is damaged ({error}); delete its folder to train from the start")
