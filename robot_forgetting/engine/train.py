"""The one optimiser loop: every method and penalty, checkpointed between iterations."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    optimiser: Optimiser | Sequence[Optimiser],
    run: RunFolder | Sequence[RunFolder],
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
    diverged: Callable[[int, str], None] | None = None,
) -> int:
    """Runs the remaining iterations of one stage; returns the number of its iterations done in all.

    Continues from the checkpoint in ``store`` (None: the run folder's ``checkpoints``) if it has one. The last one is
    made after ``end`` of method and penalties: a restart repeats neither that nor what it did to the policy. Noise is a
    function of (seed, stage, iteration): the iterations of all stages are counted through.
    ``after_iteration(i)`` is called once i iterations are done and saved (also after a restart, so that work it left
    unfinished is completed). On a CPU, ``processes`` share the work of every optimiser step.

    A policy that stacks R networks trains R runs at once: ``optimiser`` and ``run`` are then R optimisers (that may
    differ in learning rate and schedule) and R folders; gradients are clipped and losses recorded for each.
    checkpoints: False saves none; an interrupted training begins again (for runs of seconds).
    log_every: steps between rows of train.jsonl
    diverged(network, message): told once when a network's loss is not finite; it is left as it is then, the others go
        on. None: that ends the training with a ``UserError``.
    """
    optimisers = [optimiser] * policy.runs if isinstance(optimiser, Optimiser) else list(optimiser)
    folders = [run] if isinstance(run, RunFolder) else list(run)
    if not len(optimisers) == len(folders) == policy.runs:
        raise ValueError(f"{policy.runs} networks need as many optimisers and run folders")
    optimiser = optimisers[0]
    shared = [replace(one, learning_rate=1.0, schedule="constant", warmup_steps=0) for one in optimisers]
    if any(one != shared[0] for one in shared):
        raise ValueError("stacked runs may differ in learning rate, schedule and warm-up, in nothing else")
    parameters = trainable(policy)
    if not parameters:
        raise UserError(f"policy '{policy.name}' has no trainable parameters; give it lora or unfreeze some")
    networks = [[p for p in network if p.requires_grad] for network in policy.run_parameters()]
    # One for each network: it steps while the gradient that was just measured and clipped is still in the cache.
    adams = [
        torch.optim.AdamW(_groups(network, optimiser), lr=optimiser.learning_rate, betas=optimiser.betas, fused=True)
        for network in networks
    ]
    micro_batch = optimiser.micro_batch or policy.rows_at_once(gradients=1 + len(penalties))
    # The first iteration after a restart must see the base policy the penalties and the method saw at the beginning.
    method.check(policy, task)
    for one in (method, *penalties):
        one.begin(policy, task, past)
    store, before = store or folders[0].checkpoints, (stage - 1) * method.iterations
    nothing_done = {"iteration": 0, "step": 0}
    state = load_checkpoint(store, policy, adams, method, penalties) if checkpoints else nothing_done
    done, step = state["iteration"], state["step"]
    for folder in folders:
        folder.keep("train", lambda row: (row["stage"], row["iteration"]) <= (stage, done))
    after_iteration(done)

    def backward(part: Batch, share: float) -> tuple[float, float]:
        return _backward(policy, method, penalties, part, share, micro_batch)

    alone = policy.device.type != "cpu" or not policy.splits_batches
    gradient = Replicas(list(parameters.values()), backward, 0 if alone else processes - 1)
    stepper = _Stepper(policy, networks, adams, gradient, optimiser.max_grad_norm, diverged)
    saved, saving = time.perf_counter(), 0.0
    try:
        while done < method.iterations and not all(stepper.dead):
            torch.manual_seed(seed * 1_000_003 + before + done)
            started = time.perf_counter()
            batches = checked_batches(method, method.collect(policy, task, before + done))
            collected = time.perf_counter()
            rows: list[list[dict]] = []  # logged step -> network -> row
            for batch in batches:
                rates = [one.rate(step, done / method.iterations) for one in optimisers]
                numbers = stepper.step(batch, rates)
                step += 1
                last = done + 1 == method.iterations and batch is batches[-1]
                if step % log_every == 0 or last:
                    where = {"stage": stage, "iteration": done + 1, "step": step}
                    rows.append([{**where, "learning_rate": rate, **n} for rate, n in zip(rates, numbers, strict=True)])
            done += 1
            seconds = {"seconds": time.perf_counter() - started, "collect_seconds": collected - started}
            if not batches:  # no signal (every group equally successful): an iteration all the same
                nothing = dict.fromkeys(("loss", "penalty", "grad_norm"))
                where = {"stage": stage, "iteration": done, "step": step}
                rows = [[{**where, "learning_rate": 0.0, **nothing} for _ in folders]]
            if rows:
                # Rows first: a restart drops those beyond its checkpoint, but could not make up for missing ones.
                _record(folders, rows, seconds, {**method.metrics(), **policy.metrics()}, stepper.dead)
            last = done == method.iterations or all(stepper.dead)
            if last:
                for one in (method, *penalties):
                    one.end(policy, task)
            if checkpoints and (last or time.perf_counter() - saved >= PATIENCE * saving):
                saved = time.perf_counter()
                save_checkpoint(store, policy, adams, method, penalties, iteration=done, step=step)
                saving = max(0.0, time.perf_counter() - saved - QUICK)
            if rows:
                progress(done, rows[-1][0])
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
    load_checkpoint(store, policy, [], method, penalties)


def _end(store: Path) -> Path:
    folder = newest(store)
    if folder is None:
        raise UserError(f"{store} holds no checkpoint to go on from; delete the run folder to begin again")
    return folder


def _groups(network: list[Tensor], optimiser: Optimiser) -> list[dict]:
    """A network's parameter groups: matrices decay, vectors (norms, biases) do not."""
    decaying = [p for p in network if p.dim() >= 2 or not optimiser.weight_decay]
    rest = [p for p in network if p.dim() < 2 and optimiser.weight_decay]
    groups = [{"params": decaying, "weight_decay": optimiser.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _record(folders: Sequence[RunFolder], rows, seconds: dict, metrics: dict, dead: list[bool]) -> None:
    """Appends each network's rows to its folder; a metric may be one number for all or one per network."""
    for index, folder in enumerate(folders):
        if dead[index]:
            continue
        mine = [row[index] for row in rows]
        mine[-1] |= {**seconds, **{k: v[index] if isinstance(v, list) else v for k, v in metrics.items()}}
        folder.append("train", *mine)


def _backward(policy, method, penalties, part: Batch, share: float, micro_batch: int) -> tuple:
    """Back-propagates ``share`` of the part's mean loss, in micro-batches; returns its shares of loss and penalty.

    Numbers, or [R] of a stack's networks: the sum of their losses has the gradient that each alone would have.
    """
    policy.train()
    loss_sum = penalty_sum = 0.0
    for start in range(0, len(part), micro_batch * policy.runs):
        rows = part[start : start + micro_batch * policy.runs].to(policy.device)
        weight = share * len(rows) / len(part)
        loss = checked_loss(method, "loss", method.loss(policy, rows), policy.runs)
        riders = [checked_loss(one, "__call__", one(policy, rows), policy.runs, learns=False) for one in penalties]
        penalty = sum(riders, start=torch.zeros_like(loss))
        ((loss + penalty) * weight).sum().backward()
        loss_sum += _summand(loss) * weight
        penalty_sum += _summand(penalty) * weight
    return tuple(value if value.dim() else value.item() for value in (loss_sum, penalty_sum))


def _summand(value: Tensor) -> Tensor:
    """Stays where it is: to read it after every micro-batch is to wait for the GPU. As precise as Python's numbers."""
    return value.detach() if value.dim() else value.detach().double()


class _Stepper:
    """AdamW steps of all networks; ``dead`` are those whose loss, gradient or weights were not finite."""

    def __init__(self, policy: Policy, networks, adams, gradient: Replicas, max_grad_norm: float | None, diverged):
        self.policy, self.networks, self.adams, self.gradient = policy, networks, adams, gradient
        self.max_grad_norm, self.diverged = max_grad_norm, diverged
        self.dead = [False] * len(networks)

    def step(self, batch: Batch, rates: list[float]) -> list[dict]:
        """One step; returns each network's numbers for train.jsonl."""
        for adam in self.adams:
            adam.zero_grad(set_to_none=True)
        losses, penalties = (_list(value, len(rates)) for value in self.gradient(batch))
        rows = []
        for index, (network, loss, penalty) in enumerate(zip(self.networks, losses, penalties, strict=True)):
            norm = self.clip(network)
            if not self.dead[index] and not all(map(math.isfinite, (loss, penalty, norm))):
                self.stop(index, f"the loss is not finite (loss {loss}, penalty {penalty}, gradient norm {norm})")
            if self.dead[index]:
                for parameter in network:
                    parameter.grad = None  # the optimiser passes over it
            rows.append({"loss": loss, "penalty": penalty, "grad_norm": norm})
            for group in self.adams[index].param_groups:
                group["lr"] = rates[index]
            self.adams[index].step()
            if not self.dead[index] and not are_finite(network):
                self.stop(index, "the weights are not finite after the optimiser's step")
        self.policy.eval()
        return rows

    def clip(self, network) -> float:
        """The network's gradient norm before it is shortened."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in network if p.grad is not None])
        value = norm.item()
        if self.max_grad_norm is not None and value > self.max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(network, self.max_grad_norm, norm)
        return value

    def stop(self, index: int, what: str) -> None:
        if self.diverged is None:
            raise Diverged(
                f"{what}; no checkpoint is made of that: lower method.optimiser.learning_rate (in a new run_dir), or "
                "look at the demonstrations"
            )
        self.dead[index] = True
        self.diverged(index, f"{what}; lower its learning rate")


def _list(value, count: int) -> list[float]:
    return value.tolist() if isinstance(value, Tensor) else [value] * count
