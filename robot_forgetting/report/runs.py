"""What the report needs of each run folder, and which runs belong in one row of a table."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files

import yaml

from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.records.summary import SCORED, mostly_cut, no_signal, outcomes

BASE = "base"
# Keys in which the configurations of two seeds of one experiment may differ.
SEED_KEYS = {"seed", "seeds", "run_dir", "hydra", "name", "sweep", "output", "debug", "processes", "num_envs", "device"}
SEED_KEYS |= {"measures", "measures_objects"}  # what is looked at, not what is done

Key = tuple[int, int, str, str, str]  # stage, iteration, task, role, decode


@dataclass
class Run:
    """A run folder, read once. ``outcomes``: (stage, iteration, task, role, decode) -> {seed: success}."""

    folder: RunFolder
    state: dict
    status: str
    episodes: list[dict]
    train: list[dict]
    divergence: list[dict]
    variant: str = ""
    outcomes: dict[Key, dict[int, bool]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return self.folder.id

    @property
    def policy(self) -> str:
        """The base policy's name, and its temperature where that is not the usual one: no table mixes the two.

        What `evaluate` or `pretrain` measured stands for itself: it may be another policy of that name.
        """
        name = name_of(self.state.get("policy")) or "policy"
        temperature = (self.state.get("decode") or {}).get("temperature", 1.0)
        name += "" if temperature == 1.0 else f" at temperature {temperature:g}"
        return name if self.state.get("verb", "run") == "run" else f"{name} in {self.id}"

    @property
    def method(self) -> str:
        """Method and penalty, such as "sft + kl_forward"; "base" where nothing was trained."""
        method, penalty = name_of(self.state.get("method")), name_of(self.state.get("penalty"))
        if method is None or (self.state.get("verb", "run") != "run" and not self.checkpoints):
            return BASE
        return method if penalty in (None, "none") else f"{method} + {penalty}"

    @property
    def shipped(self) -> str | None:
        return self.state.get("shipped") or None

    @cached_property
    def tasks(self) -> dict[str, list[str]]:
        """Role -> tasks, in the order of the run's configuration, then as met in its episodes."""
        roles = {role: [name_of(task) for task in tasks] for role, tasks in (self.state.get("roles") or {}).items()}
        for _, _, task, role, _ in self.outcomes:
            if not any(task in tasks for tasks in roles.values()):  # a sequence's task is a prior one in later stages
                roles.setdefault(role, []).append(task)
        return {role: roles.get(role, []) for role in ("new", "prior", "held_out")}

    @property
    def sequence(self) -> list[str]:
        """The new tasks in the order of their stages, 1 .. T."""
        return [str(task) for task in self.state.get("sequence") or self.tasks["new"]]

    @cached_property
    def ends(self) -> dict[int, tuple[int, int]]:
        """Stage -> the checkpoint at its end; without a stage that a run which is not finished is in. (0, 0): base."""
        last = {stage: (stage, iteration) for stage, iteration in self.checkpoints}
        if self.status != "finished":
            last.pop(self.state.get("stage") or 1, None)
        return {0: (0, 0), **last}

    @property
    def new_task(self) -> str:
        return " + ".join(self.tasks["new"]) or name_of(self.state.get("task")) or "task"

    @cached_property
    def checkpoints(self) -> list[tuple[int, int]]:
        """(stage, iteration) of the evaluated fine-tuned policies, in the order of training."""
        return sorted({(stage, iteration) for stage, iteration, *_ in self.outcomes if stage > 0})

    @property
    def final(self) -> tuple[int, int] | None:
        return self.checkpoints[-1] if self.checkpoints else None

    def tried(self, checkpoint: tuple[int, int], task: str, decode: str = "sampled") -> dict[int, bool]:
        """{seed: success} of a task at a checkpoint ((0, 0) is the base policy), whatever the task's role.

        A benchmark's own protocol stands in for either decode.
        """
        found = {
            mode: seeds
            for (stage, iteration, name, _, mode), seeds in self.outcomes.items()
            if (stage, iteration, name) == (*checkpoint, task)
        }
        return found.get(decode) or found.get(SCORED, {})

    @cached_property
    def scored(self) -> set[str]:
        """Tasks whose own protocol stands in for either decode."""
        return {task for _, _, task, _, decode in self.outcomes if decode == SCORED}

    @cached_property
    def silent(self) -> dict[str, dict]:
        """Prior task -> its row of ``summary.no_signal`` or ``summary.mostly_cut``: its rates say nothing."""
        rows = no_signal(self.outcomes, self.state.get("chance") or {}) + mostly_cut(self.episodes)
        return {row["task"]: row for row in rows if row["role"] == "prior"}

    def counted(self, role: str) -> list[str]:
        """The role's tasks that means are taken over: all but the silent ones."""
        return [task for task in self.tasks[role] if task not in self.silent]

    @cached_property
    def progress(self) -> dict[tuple[int, int], dict]:
        """(stage, iteration) -> {"seconds", "env_steps", "success", "episodes"}: cumulative training time and steps,
        success and number of rollouts."""
        result: dict[tuple[int, int], dict] = {}
        seconds = steps = 0.0
        for row in self.train:
            seconds += row.get("seconds") or 0.0
            steps += row.get("env_steps") or 0
            place = row.get("stage") or 1, row["iteration"]
            entry = result.setdefault(place, {"success": None, "episodes": None})
            entry |= {"seconds": seconds, "env_steps": steps}
            if row.get("rollout_success") is not None:
                entry |= {"success": row["rollout_success"], "episodes": row.get("episodes")}
        return result


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed: one row of a table."""

    policy: str
    new_task: str
    method: str  # method and penalty
    variant: str  # the same, with the settings that tell it from others of this method
    shipped: str | None
    runs: tuple[Run, ...]

    @property
    def setting(self) -> tuple[str, str, str | None]:
        return self.policy, self.new_task, self.shipped

    @property
    def keys(self) -> dict:
        names = ("policy", "new_task", "method", "variant", "shipped")
        return {name: getattr(self, name) for name in names}


def load(folder: RunFolder) -> Run:
    episodes = folder.episodes()
    run = Run(folder, folder.run, folder.status, episodes, folder.rows("train"), folder.rows("divergence"))
    run.outcomes = outcomes(episodes)
    return run


def group(runs: Sequence[Run]) -> list[Group]:
    """Runs by policy, new task, method with its settings, and whether they were measured here or shipped."""
    families: dict[tuple, list[Run]] = {}
    for run in runs:
        families.setdefault((run.policy, run.new_task, run.method, run.shipped), []).append(run)
    groups = []
    for (policy, new_task, method, shipped), family in families.items():
        variants: dict[str, list[Run]] = {}
        for run, variant in zip(family, _variants(method, family), strict=True):
            run.variant = variant
            variants.setdefault(variant, []).append(run)
        groups += [
            Group(policy, new_task, method, variant, shipped, tuple(members)) for variant, members in variants.items()
        ]
    # Measured before shipped, otherwise as given.
    return sorted(groups, key=lambda group: (group.policy, group.new_task, group.shipped is not None))


def _variants(method: str, runs: Sequence[Run]) -> list[str]:
    """The method's name, followed by the settings in which its runs differ apart from their seed.

    Equal exactly where all settings are: what three settings do not tell apart gets a number.
    """
    if method == BASE:
        return [BASE] * len(runs)
    flat = [_flatten(with_defaults(run.folder.config())) for run in runs]
    keys = sorted({key for config in flat for key in config})
    # A task's own key may be as new as the one it takes its value from (`simulation: ${simulation}`).
    values = [{key: config.get(key, config.get(key.removeprefix("task."))) for key in keys} for config in flat]
    differing = [key for key in keys if len({config[key] for config in values}) > 1]
    settings = [tuple(config[key] for key in differing) for config in values]
    # What a budget says is not said again where a method took it: budget.sft_iterations and iterations, say.
    column = {key: [config[key] for config in values] for key in differing}
    taken = [column[key] for key in differing if not key.startswith("budget.")]
    told = [key for key in differing if not key.startswith("budget.") or column[key] not in taken]
    labels: dict[tuple, str] = {}
    same: dict[str, int] = {}
    for setting in dict.fromkeys(settings):
        shown = [
            f"{key.removeprefix('method.')}={'none' if value is None else value}"
            for key, value in zip(differing, setting, strict=True)
            if key in told
        ]
        label = method + (f" ({', '.join(shown[:3])}{', ...' if len(shown) > 3 else ''})" if shown else "")
        same[label] = same.get(label, 0) + 1
        labels[setting] = label if same[label] == 1 else f"{label} #{same[label]}"
    return [labels[setting] for setting in settings]


def with_defaults(config: dict) -> dict:
    """A run's configuration as this version would have written it: a key that did not exist then has its default,
    which does what was done before there was a choice."""
    return {**_defaults(), **config}


@cache
def _defaults() -> dict:
    """The plain keys of the package's ``config.yaml``."""
    values = yaml.safe_load((files("robot_forgetting.configs") / "config.yaml").read_text())
    plain = {key: value for key, value in values.items() if not isinstance(value, dict | list)}
    return {key: value for key, value in plain.items() if "${" not in str(value)}


def _flatten(value, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        parts = (_flatten(item, f"{prefix}{key}.") for key, item in value.items() if key not in SEED_KEYS)
        return {key: item for part in parts for key, item in part.items()}
    text = value if isinstance(value, str) else json.dumps(value)
    return {prefix[:-1]: re.sub(r"seed_?\d+", "seed", text)}


def name_of(value) -> str | None:
    """The name in what run.json says of a policy, task, method or penalty: a string, or {"name": ...}."""
    if isinstance(value, dict):
        value = value.get("name") or str(value.get("_target_", "")).rpartition(".")[2] or None
    return None if value is None else str(value)
