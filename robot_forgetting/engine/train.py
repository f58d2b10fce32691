"""The one optimiser loop: every method and penalty, checkpointed between iterations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from robot_forgetting.contracts import checked_batches, checked_loss
from robot_forgetting.engine.replica import Replicas
from robot_forgetting.errors import Diverged, UserError
from robot_forgetting.finite import are_finite
from robot_forgetting.method import Batch, Method, Optimiser, Penalty
from robot_forgetting.policy import Policy
from robot_forgetting.records.checkpoints import load_checkpoint, load_weights, newest, save_checkpoint, trainable
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.stage import Stage
from robot_forgetting.task import Task

# Every iteration is saved, unless that takes more than QUICK seconds (all weights and moments of a 3B model are 36 GB):
# then the next one waits PATIENCE times as long.
QUICK, PATIENCE = 1.0, 20


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
    stage: int = 1,
    store: Path | None = None,
    processes: int = 1,
    checkpoints: bool = True,
    log_every: int = 1,
    after_iteration: Callable[[int], None] = lambda iteration: None,
    progress: Callable[[int, dict], None] = lambda iteration, row: None,
) -> int:
    """Runs the remaining iterations of one stage; returns the number of its iterations done in all.

    Continues from the checkpoint in ``store`` (None: the run folder's ``checkpoints``) if it has one. The last one is
    made after ``end`` of method and penalties: a restart repeats neither that nor what it did to the policy. Noise is a
    function of (seed, stage, iteration): the iterations of all stages are counted through.
    ``after_iteration(i)`` is called once i iterations are done and saved (also after a restart, so that work it left
    unfinished is completed). On a CPU, ``processes`` share the work of every optimiser step. ``Diverged`` where the
    loss, its gradient or the weights are not finite.

    checkpoints: False saves none; an interrupted training begins again (for runs of seconds).
    log_every: steps between rows of train.jsonl
    """
    parameters = list(trainable(policy).values())
    if not parameters:
        raise UserError(f"policy '{policy.name}' has no trainable parameters; give it lora or unfreeze some")
    groups = _groups(parameters, optimiser)
    adam = torch.optim.AdamW(groups, lr=optimiser.learning_rate, betas=optimiser.betas, fused=True)
    micro_batch = optimiser.micro_batch or policy.rows_at_once(gradients=1 + len(penalties))
    # The first iteration after a restart must see the base policy the penalties and the method saw at the beginning.
    method.check(policy, task)
    for one in (method, *penalties):
        one.begin(policy, task, past)
    store, before = store or run.checkpoints, (stage - 1) * method.iterations
    nothing_done = {"iteration": 0, "step": 0}
    state = load_checkpoint(store, policy, adam, method, penalties) if checkpoints else nothing_done
    done, step = state["iteration"], state["step"]
    run.keep("train", lambda row: (row["stage"], row["iteration"]) <= (stage, done))
    after_iteration(done)

    def backward(part: Batch, share: float) -> tuple[float, float]:
        return _backward(policy, method, penalties, part, share, micro_batch)

    alone = policy.device.type != "cpu" or not policy.splits_batches
    gradient = Replicas(parameters, backward, 0 if alone else processes - 1)
    saved, saving = time.perf_counter(), 0.0
    try:
        while done < method.iterations:
            _seed(policy.device, seed * 1_000_003 + before + done)
            started = time.perf_counter()
            batches = checked_batches(method, method.collect(policy, task, before + done))
            collected = time.perf_counter()
            rows: list[dict] = []
            for batch in batches:
                rate = optimiser.rate(step, done / method.iterations)
                numbers = _step(policy, parameters, adam, gradient, batch, rate, optimiser.max_grad_norm)
                step += 1
                last = done + 1 == method.iterations and batch is batches[-1]
                if step % log_every == 0 or last:
                    where = {"stage": stage, "iteration": done + 1, "step": step}
                    rows.append({**where, "learning_rate": rate, **numbers})
            done += 1
            seconds = {"seconds": time.perf_counter() - started, "collect_seconds": collected - started}
            if not batches:  # no signal (every group equally successful): an iteration all the same
                nothing = dict.fromkeys(("loss", "penalty", "grad_norm"))
                rows = [{"stage": stage, "iteration": done, "step": step, "learning_rate": 0.0, **nothing}]
            if rows:
                # Rows first: a restart drops those beyond its checkpoint, but could not make up for missing ones.
                rows[-1] |= {**seconds, **method.metrics(), **policy.metrics()}
                run.append("train", *rows)
            last = done == method.iterations
            if last:
                for one in (method, *penalties):
                    one.end(policy, task)
            if checkpoints and (last or time.perf_counter() - saved >= PATIENCE * saving):
                saved = time.perf_counter()
                save_checkpoint(store, policy, adam, method, penalties, iteration=done, step=step)
                saving = max(0.0, time.perf_counter() - saved - QUICK)
            if rows:
                progress(done, rows[-1])
            after_iteration(done)
    finally:
        gradient.close()
    return done


def restore(
    policy: Policy, stage: Stage, method: Method, penalties: Sequence[Penalty], *, start: Path | None, store: Path
) -> None:
    """Policy, method and penalties as they were at the end of a stage that is over.

    start: where the end of the stage before it is kept, None for the first; store: where its own is
    """
    if start is not None:
        load_weights(policy, _end(start))
    for one in (method, *penalties):
        one.begin(policy, stage.task, stage.past)
    _end(store)
    load_checkpoint(store, policy, None, method, penalties)


def _end(store: Path) -> Path:
    folder = newest(store)
    if folder is None:
        raise UserError(f"{store} holds no checkpoint to go on from; delete the run folder to begin again")
    return folder


def _seed(device: torch.device, number: int) -> None:
    """``torch.manual_seed`` of the generators that are in use: for accelerators that are not, it formats a stack trace
    each time and keeps it (0.4 ms, an eighth of a small network's step)."""
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.manual_seed_all(number)


def _groups(parameters: list[Tensor], optimiser: Optimiser) -> list[dict]:
    """AdamW's parameter groups: matrices decay, vectors (norms, biases) do not."""
    decaying = [p for p in parameters if p.dim() >= 2 or not optimiser.weight_decay]
    rest = [p for p in parameters if p.dim() < 2 and optimiser.weight_decay]
    groups = [{"params": decaying, "weight_decay": optimiser.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _backward(policy, method, penalties, part: Batch, share: float, micro_batch: int) -> tuple[float, float]:
    """Back-propagates ``share`` of the part's mean loss, in micro-batches; returns its shares of loss and penalty."""
    policy.train()
    loss_sum = penalty_sum = 0.0
    for start in range(0, len(part), micro_batch):
        rows = part[start : start + micro_batch].to(policy.device)
        weight = share * len(rows) / len(part)
        loss = checked_loss(method, "loss", method.loss(policy, rows))
        riders = [checked_loss(one, "__call__", one(policy, rows), learns=False) for one in penalties]
        penalty = sum(riders, start=torch.zeros_like(loss))
        ((loss + penalty) * weight).backward()
        # They stay where they are: to read them after every micro-batch is to wait for the GPU. As precise as Python's.
        loss_sum += loss.detach().double() * weight
        penalty_sum += penalty.detach().double() * weight
    return loss_sum.item(), penalty_sum.item()


def _step(policy, parameters, adam, gradient: Replicas, batch: Batch, rate: float, max_grad_norm) -> dict:
    """One step of AdamW; returns its numbers for train.jsonl, with the gradient's norm before it is shortened."""
    adam.zero_grad(set_to_none=True)
    loss, penalty = gradient(batch)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    numbers = {"loss": loss, "penalty": penalty, "grad_norm": norm.item()}
    if not all(map(math.isfinite, numbers.values())):
        raise _diverged(f"the loss is not finite (loss {loss}, penalty {penalty}, gradient norm {norm.item()})")
    if max_grad_norm is not None and numbers["grad_norm"] > max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
    if not are_finite(parameters):
        raise _diverged("the weights are not finite after the optimiser's step")
    policy.eval()
    return numbers


def _diverged(what: str) -> Diverged:
    return Diverged(
        f"{what}; no checkpoint is made of that: lower method.optimiser.learning_rate (in a new run_dir), or look at "
        "the demonstrations"
    )
