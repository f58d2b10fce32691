"""`check`'s cheap tests, made by `run` before it measures anything: what a plug-in gets wrong at once must not cost an
evaluation of the base policy first.

Kinds and descriptions of all parts; one reset and one step of the new task's environment, which the evaluation then
uses; of a method, penalty or policy of the user's own, one loss at the observation after that reset, or at two
questions. ``collect`` is not tried: on a robot it takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from robot_forgetting.contracts import (
    checked_action,
    checked_columns,
    checked_commands,
    checked_hooks,
    checked_kind,
    checked_loss,
    checked_pictures,
    checked_policy,
    checked_rewards,
    checked_settings,
    checked_task,
    checked_transition,
    wrong_attribute,
)
from robot_forgetting.errors import UserError, is_plugin
from robot_forgetting.method import Batch, Method, Optimiser, Penalty
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policy import Policy
from robot_forgetting.rollout import columns
from robot_forgetting.task import Task, Transition, VectorEnv

ROWS = 2
TRIED_SEED = 300_000  # and the next ones, of the training split: neither trained on by default nor tested
TRIES = 3  # initial states: a single one that cannot be built is an episode that failed, no broken task


def check_parts(policy: Policy, task: Task, method: Method, penalty: Penalty | None) -> None:
    """``UserError`` where a part is none, or lacks what the others need of it."""
    checked_policy(policy)
    checked_task(task)
    check_method(method)
    if penalty is not None:
        checked_kind("penalty", penalty, Penalty)
    for part in (method, *([] if penalty is None else [penalty])):
        checked_settings(part)
        checked_hooks(policy, part.calls, type(part).__name__)
    if not any(parameter.requires_grad for parameter in policy.parameters()):
        raise UserError(f"policy '{policy.name}' has no trainable parameters; give it lora or unfreeze some")
    if getattr(method, "demonstrations", 0) and not task.one_step:
        checked_hooks(policy, ["encode"], f"{type(method).__name__} (it clones demonstrations)")


def try_parts(policy: Policy, task: Task, method: Method, penalty: Penalty | None, num_envs: int) -> None:
    """``UserError`` for what is wrong with the new task's environment, or at once with a plug-in's loss."""
    if task.one_step:
        if is_plugin(type(task)):
            try_questions(task)
        if is_own(method, penalty) and policy.can("encode"):
            try_hooks(policy, answered_questions(policy, task), method, penalty)
    else:
        row = try_environment(task, num_envs)
        if is_own(policy, method, penalty):
            try_hooks(policy, decided(policy, task, row), method, penalty)


def is_own(*things: object) -> bool:
    """Whether any of these objects' classes is a user's own."""
    return any(is_plugin(type(thing)) for thing in things if thing is not None)


def check_method(method: Method) -> None:
    """What the optimiser loop reads of a method before the first iteration."""
    checked_kind("method", method, Method)
    iterations, optimiser = getattr(method, "iterations", None), getattr(method, "optimiser", None)
    if type(iterations) is not int or iterations < 1:
        raise wrong_attribute(method, "iterations", iterations, "set self.iterations to a whole number above 0")
    if not isinstance(optimiser, Optimiser):
        fix = "take `optimiser` as an argument, keep it, and give the yaml a block `optimiser: {_target_: "
        fix += "robot_forgetting.method.Optimiser, learning_rate: 1.0e-4}`"
        raise wrong_attribute(method, "optimiser", optimiser, fix)


# ---- tasks


def try_environment(task: Task, num_envs: int) -> dict:
    """One reset, whose observation it returns, and one step; a crash of ``TRIES`` initial states in a row is the task's
    fault."""
    seeds, crashes = task.seeds("train"), []
    with task.make_env(num_envs) as env:
        group, slot = next((group, members[0]) for group, members in enumerate(env.groups) if len(members))
        for attempt in range(TRIES):
            seed = seeds[(TRIED_SEED + attempt) % len(seeds)]
            begun = _ask(env, task, group, {slot: seed}, {})
            error = begun.error or _ask(env, task, group, {}, {slot: still(task)}).error
            if error is None:
                return begun.observation
            crashes.append(f"seed {seed}: {error}")
    raise UserError(f"task '{task.name}': the environment crashes at every start ({crashes[0]}); correct it first")


def still(task: Task) -> np.ndarray:
    """No motion, gripper open."""
    command = np.zeros(task.convention().action_dimensions or 7, np.float32)
    command[-1] = 1.0
    return command


def _ask(env: VectorEnv, task: Task, group: int, resets: dict, commands: dict) -> Transition:
    """One request and its answer."""
    env.request(group, resets, commands)
    _, (transition,) = env.wait()
    checked_transition(env, transition)
    if transition.error is None and task.convention().image_size:
        checked_pictures(task, env, transition.observation)
    return transition


def try_questions(task: OneStepTask) -> None:
    """Two items of each split, and what the task makes of an answer."""
    for split in ("train", "test"):
        seeds = task.seeds(split).start + np.arange(min(ROWS, task.size(split)))
        checked_columns(task, task.observations(seeds), len(seeds))
        answers = [0 if task.choices else ""] * len(seeds)
        checked_rewards(task, task.rewards(seeds, answers), len(seeds))


# ---- policies, methods, penalties


def answered_questions(policy: Policy, task: OneStepTask) -> Batch:
    """``ROWS`` training items with an answer that is not sampled, which takes a large language model minutes."""
    seeds = task.seeds("train").start + np.arange(min(ROWS, task.size("train")))
    action = policy.encode(np.zeros(len(seeds), np.int64) if task.choices else ["0"] * len(seeds))
    return Batch(task.observations(seeds), action, torch.ones(len(seeds)), extra={})


def decided(policy: Policy, task: Task, row: dict) -> Batch:
    """``ROWS`` decisions at one observation."""
    obs = columns([row] * ROWS)
    noise = torch.rand(ROWS, policy.noise_width, generator=torch.Generator().manual_seed(0))
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        policy.eval()
        action = checked_action(policy, policy.act(obs, temperature=1.0, noise=noise), ROWS).to("cpu")
        checked_commands(policy, policy.decode(action, statistics=task.statistics), ROWS)
    return Batch(obs, action, torch.ones(ROWS), extra={})


def try_hooks(policy: Policy, batch: Batch, method: Method, penalty: Penalty | None) -> None:
    """The loss and the penalty on a batch, where they are the user's own; nothing random is used up by them."""
    batch = batch.to(policy.device)
    with torch.random.fork_rng(devices=[policy.device] if policy.device.type == "cuda" else []):
        policy.train()
        try:
            for source, hook in ((method, "loss"), (penalty, "__call__")):
                if source is not None and is_own(source):
                    value = _attempted(source, lambda source=source, hook=hook: getattr(source, hook)(policy, batch))
                    if value is not _UNKNOWN:
                        checked_loss(source, hook, value, learns=hook == "loss")
        finally:
            policy.eval()


_UNKNOWN = object()


def _attempted(source: object, compute: Callable[[], object]) -> object:
    """What ``compute`` gives; ``_UNKNOWN`` where it fails in a way that the real batch may not.

    ``begin`` and ``collect`` have not run, so an attribute of the method may not be there yet, and its batches may have
    columns in ``extra`` that these lack. What can be nothing but a mistake: a name that exists nowhere, and an
    attribute that the policy, a batch or a module lacks.
    """
    try:
        return compute()
    except UserError:  # the policy lacks what the loss calls
        raise
    except (NameError, ImportError, AttributeError) as error:
        missing = isinstance(error, AttributeError) and (error.obj is None or error.obj is source)
        if missing:
            return _UNKNOWN
        raise
    except Exception:
        return _UNKNOWN
