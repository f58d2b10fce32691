"""What a plug-in's methods must give, looked at where the core receives it; `robot-forgetting check` asks for more.

Each function returns what it was given, or raises ``errors.fault``: one line with the plug-in's file and line. They
look at kinds, shapes and lengths, which costs microseconds, and never at numbers on a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.errors import UserError, fault, place
from robot_forgetting.method import Batch, Method, Penalty
from robot_forgetting.policy import Action, ConventionSpec, Policy
from robot_forgetting.ranges import problem
from robot_forgetting.task import Demonstration, Task, Transition


def kind_of(thing: object) -> str:
    """'a float', 'None', 'float32 [3, 2]'."""
    if thing is None:
        return "None"
    if isinstance(thing, np.ndarray | Tensor):
        return f"{str(thing.dtype).removeprefix('torch.')} {list(thing.shape)}"
    name = type(thing).__name__
    if isinstance(thing, np.generic):  # numpy's bool is called bool too
        name = f"numpy {name}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


# ---- kinds and descriptions


def checked_kind(group: str, built: object, kind: type) -> None:
    """``UserError`` where `method=`, `task=` ... names something else than a method, a task ..., or one whose methods
    do not take the arguments that the interface's do."""
    if not isinstance(built, kind):
        own = type(built)
        said = f"{group}= gives {own.__name__} ({place(own)}), which is no {kind.__module__}.{kind.__qualname__}"
        raise UserError(f"{said}; derive its class from that")
    for name, promised in vars(kind).items():
        given = getattr(type(built), name, None)
        if not inspect.isfunction(promised) or not inspect.isfunction(given) or given is promised:
            continue
        if name.startswith("_") and name != "__call__":
            continue
        wanted = inspect.signature(promised)
        named = [p.name for p in wanted.parameters.values() if p.kind is p.KEYWORD_ONLY]
        try:
            inspect.signature(given).bind(*[None] * (len(wanted.parameters) - len(named)), **dict.fromkeys(named))
        except TypeError:
            shown = f"{name}({', '.join(wanted.parameters)})"
            raise fault(built, name, f"takes {inspect.signature(given)}; it is called as {shown}") from None


def checked_settings(plugin: object) -> None:
    """``UserError`` where a number that a constructor took, and keeps under its name, is outside its declared range: an
    object made in Python has met no other check."""
    try:
        taken = inspect.signature(type(plugin).__init__, eval_str=True).parameters
    except (TypeError, ValueError, NameError):  # annotations that cannot be evaluated
        return
    for name, parameter in taken.items():
        value = getattr(plugin, name, None)
        if isinstance(value, int | float) and (said := problem(name, value, parameter.annotation)):
            raise UserError(f"{type(plugin).__name__}: {said}")


def checked_task(task: Task) -> None:
    """What a task says of itself, as far as its records and the policy need it."""
    checked_kind("task", task, Task)
    name, told = getattr(task, "name", None), [*getattr(task, "instructions", ()), getattr(task, "instruction", None)]
    if not isinstance(name, str) or not name:
        raise wrong_attribute(task, "name", name, "give the task a name of letters, digits and underscores")
    for text in told:
        if not isinstance(text, str):
            raise wrong_attribute(task, "instruction", text, "tell the policy what to do, in a text")
    if type(steps := getattr(task, "max_steps", None)) is not int or steps < 1:
        raise wrong_attribute(task, "max_steps", steps, "give the time limit as a whole number of control steps")
    if not isinstance(spec := task.convention(), ConventionSpec):
        raise fault(task, "convention", f"gives {kind_of(spec)}; return a ConventionSpec")


def checked_policy(policy: Policy) -> None:
    checked_kind("policy", policy, Policy)
    if not isinstance(spec := policy.convention(), ConventionSpec):
        raise fault(policy, "convention", f"gives {kind_of(spec)}; return a ConventionSpec")


def wrong_attribute(plugin: object, name: str, value: object, fix: str) -> UserError:
    kind = type(plugin)
    return UserError(f"{place(kind)}: {kind.__name__}.{name} is {value!r}; {fix}")


def checked_hooks(policy: Policy, hooks: Sequence[str], who: str) -> None:
    """``UserError`` unless a policy has those optional methods of the interface that ``who`` calls."""
    kind = type(policy)
    # ``compared`` comes with logits: that is what such a policy would have to add.
    if lacking := [f"`{'logits' if hook == 'compared' else hook}`" for hook in hooks if not policy.can(hook)]:
        raise UserError(f"{place(kind)}: {kind.__name__} lacks {' and '.join(lacking)}, which {who} needs; see Policy")


# ---- methods and penalties


def checked_batches(method: Method, made: object) -> Sequence[Batch]:
    """What ``collect`` gave: a sequence of batches whose columns are equally long."""
    if not isinstance(made, Sequence) or isinstance(made, str):
        raise fault(method, "collect", f"gives {kind_of(made)}; return a list of Batch (one optimiser step each)")
    for batch in made:
        if not isinstance(batch, Batch):
            raise fault(method, "collect", f"lists {kind_of(batch)}; list Batch objects")
        if not isinstance(action := batch.action, Action):
            raise fault(method, "collect", f"gives a batch whose action is {kind_of(action)}; give an Action")
        if not len(batch):
            raise fault(method, "collect", "lists an empty batch; leave it out")
        lengths = {f"obs['{key}']": len(column) for key, column in batch.obs.items()}
        tensors = {"action.tokens": action.tokens, "action.log_prob": action.log_prob, "advantage": batch.advantage}
        tensors |= {"action.values": action.values}
        tensors |= {f"extra['{key}']": value for key, value in (batch.extra or {}).items()}
        lengths |= {name: len(value) for name, value in tensors.items() if value is not None}
        if wrong := [f"{name} {length}" for name, length in lengths.items() if length != len(batch)]:
            raise fault(
                method, "collect",
                f"gives a batch of {len(batch)} tokens rows, but {', '.join(wrong)}; all columns need equal lengths",
            )  # fmt: skip
        _check_action(method, "collect", action, len(batch))
    return made


def checked_loss(source: Method | Penalty, hook: str, value: object, *, learns: bool = True) -> Tensor:
    """What ``loss`` (or a penalty) gave: a scalar.

    learns: whether it must depend on the policy's weights
    """
    if not isinstance(value, Tensor):
        raise fault(source, hook, f"gives {kind_of(value)}; return a torch scalar, the mean over rows")
    if value.dim():
        shape = list(value.shape)
        raise fault(source, hook, f"gives a tensor of shape {shape}; reduce it to a scalar, the mean over rows")
    if not value.is_floating_point():
        raise fault(source, hook, f"gives {kind_of(value)}; return a float tensor")
    if learns and not value.requires_grad:
        fix = "compute it from policy.logits or policy.log_prob, without .detach(), .item() or torch.no_grad()"
        raise fault(source, hook, f"gives a tensor that carries no gradient; {fix}")
    return value


# ---- policies


def checked_action(policy: Policy, action: object, rows: int) -> Action:
    """What ``act`` gave for ``rows`` observations."""
    if not isinstance(action, Action):
        raise fault(policy, "act", f"gives {kind_of(action)}; return an Action")
    _check_action(policy, "act", action, rows)
    shape, log_prob = action.mask.shape, action.log_prob
    if policy.can("log_prob") if log_prob is None else log_prob.shape != shape:
        raise fault(policy, "act", f"gives log_prob {kind_of(log_prob)}; give {list(shape)}, one number per token")
    return action


def _check_action(source: object, hook: str, action: Action, rows: int) -> None:
    name, given, mask = "tokens", action.tokens, action.mask
    right = isinstance(given, Tensor) and given.dtype == torch.int64
    if action.values is not None:
        name, given = "values", action.values
        right = isinstance(given, Tensor) and given.is_floating_point() and action.tokens is None
    if not (right and given.dim() == 2 and len(given) == rows):
        kind = "int64" if name == "tokens" else "float, and no tokens,"
        raise fault(source, hook, f"gives {name} {kind_of(given)}; give {kind} [{rows}, T]")
    if not (isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == given.shape):
        raise fault(source, hook, f"gives a mask {kind_of(mask)}; give bool {list(given.shape)}")


def checked_commands(policy: Policy, commands: object, rows: int) -> Sequence:
    """What ``decode`` gave for ``rows`` decisions."""
    if not hasattr(commands, "__len__") or isinstance(commands, str) or len(commands) != rows:
        raise fault(policy, "decode", f"gives {kind_of(commands)}; give {rows} commands or answers, one per decision")
    return commands


# ---- tasks


def checked_transition(source: object, transition: object) -> Transition:
    """What an environment's ``wait`` lists; ``source``: the environment."""
    if not isinstance(transition, Transition):
        raise fault(source, "wait", f"lists {kind_of(transition)}; list Transition objects")
    row = transition.observation
    if not isinstance(row, dict) or not row:
        raise fault(source, "wait", f"gives an observation that is {kind_of(row)}; give a dict of the policy's columns")
    if not isinstance(transition.reward, Real):
        raise fault(source, "wait", f"gives a reward that is {kind_of(transition.reward)}; give a plain number")
    for name in ("success", "done"):
        if type(value := getattr(transition, name)) is not bool:
            raise fault(source, "wait", f"gives a `{name}` that is {kind_of(value)}; give a bool")
    return transition


def checked_pictures(task: Task, source: object, row: dict) -> None:
    """The columns that a robot task's convention promises."""
    size = task.convention().image_size
    for key in ("image", "instruction"):
        if key not in row:
            have = ", ".join(sorted(row))
            raise fault(source, "wait", f"gives observations without '{key}', only {have}; robot policies read it")
    image, told = row["image"], row["instruction"]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape != (size, size, 3):
        raise fault(
            source, "wait", f"gives an image that is {kind_of(image)}; convention() promises uint8 [{size}, {size}, 3]"
        )
    if not isinstance(told, str):
        raise fault(source, "wait", f"gives an instruction that is {kind_of(told)}; give a text")


def checked_rewards(task: Task, rewards: object, count: int) -> np.ndarray:
    """What a one-step task's ``rewards`` gave for ``count`` answers, as [count] float32."""
    try:
        found = np.asarray(rewards, np.float32)
    except (TypeError, ValueError):
        raise fault(task, "rewards", f"gives {kind_of(rewards)}, which are no numbers; give [{count}] floats") from None
    if found.shape != (count,):
        raise fault(task, "rewards", f"gives {list(found.shape)} numbers for {count} answers; give one each")
    return found


def checked_columns(task: Task, columns: object, rows: int, hook: str = "observations", each: str = "seeds") -> dict:
    """The policy's columns that a task's ``hook`` gave for so many seeds (or commands)."""
    if not isinstance(columns, dict) or not columns:
        raise fault(task, hook, f"gives {kind_of(columns)}; give a dict of the policy's columns")
    for key, column in columns.items():
        if not hasattr(column, "__len__") or len(column) != rows:
            length = f"{len(column)} rows" if hasattr(column, "__len__") else "no rows"
            raise fault(task, hook, f"gives a column '{key}' with {length} for {rows} {each}; give one each")
    return columns


def checked_demonstrations(task: Task, episodes: Sequence) -> Sequence[Demonstration]:
    """What ``demonstrations`` gave: episodes with the same columns, a row for each command."""
    names = None
    for episode in episodes:
        if not isinstance(episode, Demonstration):
            raise fault(task, "demonstrations", f"gives {kind_of(episode)}; give Demonstration objects")
        columns = checked_columns(task, episode.observations, len(episode.commands), "demonstrations", "commands")
        names = names or columns.keys()
        if columns.keys() != names:
            both = f"{', '.join(names)} in one episode, and {', '.join(columns)} in another"
            raise fault(task, "demonstrations", f"gives columns {both}; give all the same")
    return episodes
