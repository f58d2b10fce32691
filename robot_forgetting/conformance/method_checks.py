"""Conformance checks of a method and a penalty, on a tiny policy: an iteration, its loss, a restart."""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.conformance.check_table import Table, Wrong, expect
from robot_forgetting.conformance.toy_task import ToyTask, observations, perturb, tiny_policy
from robot_forgetting.contracts import checked_batches, checked_hooks, checked_kind, checked_loss
from robot_forgetting.engine.preflight import check_method as checked_method
from robot_forgetting.method import Batch, Method, Penalty, Staged
from robot_forgetting.policy import Policy
from robot_forgetting.records.checkpoints import trainable
from robot_forgetting.task import Task

ROWS = 48  # of a batch, for the loss; a multiple of 3
# Columns of train.jsonl that the optimiser loop writes itself.
TAKEN = {"stage", "iteration", "step", "loss", "penalty", "grad_norm", "learning_rate", "seconds", "collect_seconds"}


def check_method(table: Table, method: Method, task: Task | None = None, policy: Policy | None = None) -> None:
    table.section(f"method {type(method).__name__}")
    task, policy = _tried_on(table, task, policy)
    fresh = copy.deepcopy(method)  # as a restarted program would construct it
    if not table.check("constructor", lambda: _constructor(method)):
        return
    weights = _copy(policy)
    if not table.check("begin", lambda: _unchanged(policy, weights, lambda: _begin(method, policy, task))):
        return
    batches: list[Batch] = []
    collected = table.check("collect", lambda: _collect(policy, task, method, batches))
    table.check("collect changes no weight", lambda: _unchanged(policy, weights, lambda: None))
    if not collected:
        return
    if table.check("batch columns", lambda: _columns(batches)):
        batch = batches[0][: min(ROWS, len(batches[0]))]
        if table.check("loss and gradient", lambda: _gradient(policy, method, "loss", batch)):
            table.check("loss is a mean over rows", lambda: _row_mean(policy, method, batch))
        table.check("collect is repeatable", lambda: _repeatable(policy, task, method))
    table.check("metrics", lambda: _metrics(method))
    if table.check("state_dict", lambda: _state(method)):
        table.check("restart from a checkpoint", lambda: _restart(policy, task, method, fresh))
    table.check("end", lambda: method.end(policy, task))


def _tried_on(table: Table, task: Task | None, policy: Policy | None) -> tuple[Task, Policy]:
    """The toy task and the tiny policy where none is given; a given policy keeps its weights."""
    size = None if policy is None else policy.convention().image_size
    task = task or ToyTask(image_size=size or 32)
    whom = "an untrained policy of a few thousand weights" if policy is None else f"a copy of policy '{policy.name}'"
    table.note(f"on the task {task.name}, with {whom}")
    return task, (tiny_policy(task) if policy is None else policy.copied()).eval()


def check_penalty(table: Table, penalty: Penalty, task: Task | None = None, policy: Policy | None = None) -> None:
    table.section(f"penalty {type(penalty).__name__}")
    if not table.check("description", lambda: checked_kind("penalty", penalty, Penalty)):
        return
    task, policy = _tried_on(table, task, policy)
    fresh = copy.deepcopy(penalty)
    batch = _toy_batch(policy, task)
    with policy.base():
        pass  # the frozen copy is taken before the weights move
    if not table.check("begin", lambda: penalty.begin(policy, task, [])):
        return

    def at_base() -> str:
        value = _value(policy, penalty, "__call__", batch, learns=False)
        return f"{value.item():.4g} at the base policy"

    def moved() -> str:
        perturb(policy)
        return _gradient(policy, penalty, "__call__", batch)

    if table.check("value at the base", at_base):
        table.check("value and gradient", moved)
    if table.check("end", lambda: penalty.end(policy, task)) and table.check("state_dict", lambda: _state(penalty)):
        table.check("restart after a stage", lambda: _reloaded(policy, task, penalty, fresh))


# ---- single checks


def _constructor(method: Method) -> str:
    checked_method(method)
    return f"{method.iterations} iterations, learning rate {method.optimiser.learning_rate:g}"


def _begin(method: Method, policy: Policy, task: Task) -> None:
    checked_hooks(policy, method.calls, type(method).__name__)
    method.check(policy, task)
    method.begin(policy, task, [])


def _collect(policy: Policy, task: Task, method: Method, found: list[Batch]) -> str:
    for iteration in range(3):
        made = checked_batches(method, _collected(policy, task, method, iteration))
        if made:
            found.extend(made)
            return f"{len(made)} batch(es), {sum(map(len, made))} rows"
    raise Wrong(f"no batch in three iterations on {task.name}; sample more episodes")


def _columns(batches: Sequence[Batch]) -> str:
    for batch in batches:
        for name, value in (("advantage", batch.advantage), ("action.log_prob", batch.action.log_prob)):
            expect(value is None or torch.isfinite(value).all(), f"{name} is not finite; look for a division by zero")
            expect(value is None or not value.requires_grad, f"{name} carries gradients; detach it in collect()")
    return ""


def _gradient(policy: Policy, source: Method | Penalty, hook: str, batch: Batch) -> str:
    policy.zero_grad(set_to_none=True)
    value = _value(policy, source, hook, batch)
    value.backward()
    gradients = [p.grad for p in trainable(policy).values() if p.grad is not None]
    policy.zero_grad(set_to_none=True)
    expect(gradients, "the loss reaches none of the policy's trainable weights; use the policy it is given")
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    expect(math.isfinite(norm), "the gradient is not finite; look for log(0), 0/0 or exp of large numbers")
    expect(norm > 0, "the gradient is zero everywhere; nothing would be learned from this batch")
    return f"{value.item():.4g}, gradient norm {norm:.3g}"


def _value(policy: Policy, source: Method | Penalty, hook: str, batch: Batch, *, learns: bool = True) -> Tensor:
    value = checked_loss(source, hook, getattr(source, hook)(policy, batch), learns=learns)
    expect(torch.isfinite(value), f"{hook}() gives {value.item()}; look for log(0), 0/0 or exp of large numbers")
    return value


@torch.no_grad()
def _row_mean(policy: Policy, method: Method, batch: Batch) -> str:
    """The optimiser loop splits a batch to save memory and weighs the parts by their rows."""
    third = len(batch) // 3
    if third == 0:
        return "one row only"
    whole = method.loss(policy, batch).item()
    parts = [batch[: 2 * third], batch[2 * third :]]
    split = sum(method.loss(policy, part).item() * len(part) for part in parts) / len(batch)
    expect(
        abs(whole - split) <= 1e-4 + 1e-3 * abs(whole),
        f"it is {whole:.5g} on {len(batch)} rows, but {split:.5g} as the weighted mean over two parts of them; large "
        "batches are split to save memory: divide by the number of rows (or tokens), and let no row depend on another",
    )
    return ""


def _repeatable(policy: Policy, task: Task, method: Method) -> None:
    # The state at this point belongs to iterations 0 .. k: what must repeat is a call from equal state.
    first_copy, second_copy = copy.deepcopy(method), copy.deepcopy(method)
    first, again = (_collected(policy, task, one, 1) for one in (first_copy, second_copy))
    difference = _difference(first, again)
    expect(
        difference is None,
        f"iteration 1 twice gives different batches ({difference}); draw random numbers from [seed, iteration], so "
        "that a run that was interrupted continues as if it had not been",
    )


def _metrics(method: Method) -> str:
    numbers = method.metrics()
    expect(isinstance(numbers, dict), f"metrics() gives a {type(numbers).__name__}; return a dict")
    for key, value in numbers.items():
        expect(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"metrics()['{key}'] is a {type(value).__name__}; give a plain number (tensor.item())",
        )
        json.dumps({key: value}, allow_nan=False)
    overlap = sorted(TAKEN & numbers.keys())
    expect(not overlap, f"metrics() uses {', '.join(overlap)}, which the optimiser loop writes; choose other names")
    return ", ".join(numbers)


def _state(part: Staged) -> str:
    state = part.state_dict()
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    expect(not wrong, f"state_dict() holds {', '.join(wrong)} of other types; give tensors, they become safetensors")
    return f"{len(state)} tensor(s)" if state else "empty"


def _reloaded(policy: Policy, task: Task, part: Staged, fresh: Staged) -> None:
    """State through a file into a new object."""
    from safetensors.torch import load_file, save_file

    state = {name: value.detach().contiguous() for name, value in part.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "state.safetensors")
        loaded = load_file(Path(folder) / "state.safetensors")
    fresh.begin(policy, task, [])
    fresh.load_state_dict(loaded)
    again = fresh.state_dict()
    expect(again.keys() == state.keys(), f"state_dict() holds {sorted(again)} after loading, not {sorted(state)}")
    changed = [name for name in state if not torch.equal(again[name], state[name])]
    expect(not changed, f"{', '.join(changed)} changed by saving and loading; load what state_dict() gave")


def _restart(policy: Policy, task: Task, method: Method, fresh: Method) -> str:
    """A reloaded method's next iteration and the method's own."""
    _reloaded(policy, task, method, fresh)
    both = [_collected(policy, task, one, 2) for one in (copy.deepcopy(method), fresh)]
    difference = _difference(*both)
    expect(
        difference is None,
        f"after a restart, iteration 2 differs ({difference}); put whatever survives an iteration into state_dict()",
    )
    return "the next iteration is the same"


# ---- help


def _collected(policy: Policy, task: Task, method: Method, iteration: int):
    torch.manual_seed(iteration)  # as the optimiser loop does
    return method.collect(policy, task, iteration)


def _difference(first: Sequence[Batch], second: Sequence[Batch]) -> str | None:
    """Where two lists of batches differ, or None."""
    if [len(batch) for batch in first] != [len(batch) for batch in second]:
        return f"{[len(b) for b in first]} rows against {[len(b) for b in second]}"
    for a, b in zip(first, second, strict=True):
        pairs = {"tokens": (a.action.tokens, b.action.tokens), "values": (a.action.values, b.action.values)}
        pairs |= {"advantage": (a.advantage, b.advantage)}
        pairs |= {"log_prob": (a.action.log_prob, b.action.log_prob)}
        pairs |= {f"extra '{key}'": (value, (b.extra or {}).get(key)) for key, value in (a.extra or {}).items()}
        for name, (x, y) in pairs.items():
            if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
                return name
        for key, column in a.obs.items():
            if not np.array_equal(np.asarray(column), np.asarray(b.obs[key])):
                return f"obs '{key}'"
    return None


def _copy(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def _unchanged(policy: Policy, weights: dict[str, Tensor], action) -> None:
    action()
    moved = [name for name, p in policy.named_parameters() if not torch.equal(p, weights[name])]
    expect(not moved, f"{len(moved)} of the policy's weights changed ({moved[:1]}); only the optimiser may do that")


def _toy_batch(policy: Policy, task: Task) -> Batch:
    obs = observations(task.convention().image_size, list(task.sentences))
    noise = torch.rand(len(obs["image"]), policy.noise_width, generator=_generator())
    action = policy.act(obs, temperature=1.0, noise=noise)
    return Batch(obs, action, torch.ones(len(action)))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
