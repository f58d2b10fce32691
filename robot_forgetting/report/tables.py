"""What the tables of success, forgetting and divergence have in common: their columns, their means over runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robot_forgetting.metrics.statistics import crossed_mean, mean_of_intervals, paired_difference, wilson
from robot_forgetting.records.summary import DECODES, latest
from robot_forgetting.report.runs import BASE, Group, Run

PRIOR_MEAN = "prior mean"
# One run's number for one task: value, low, high, and {initial state: its part of the value}.
Single = tuple[float, float, float, Mapping[int, float]]


def columns(runs: Iterable[Run]) -> list[tuple[str, str]]:
    """(task, role) in the order of the tables: new, prior tasks, their mean, held-out."""
    runs = list(runs)
    found: dict[str, list[str]] = {"new": [], "prior": [], "held_out": []}
    for run in runs:
        for role, tasks in run.tasks.items():
            found[role] += [task for task in tasks if task not in found[role]]
    counted = set(found["prior"]) - silent(runs).keys()
    mean = [(PRIOR_MEAN, "prior")] if len(found["prior"]) > 1 and counted else []
    return [
        *((task, "new") for task in found["new"]),
        *((task, "prior") for task in found["prior"]),
        *mean,
        *((task, "held_out") for task in found["held_out"]),
    ]


def silent(runs: Iterable[Run]) -> dict[str, dict]:
    """Prior tasks on which the base policy cannot be told from guessing in some run, see ``Run.silent``."""
    return {task: row for run in runs for task, row in run.silent.items()}


def members(task: str, cols: Sequence[tuple[str, str]], without: Iterable[str] = ()) -> list[str]:
    """The tasks a column stands for: the mean for all prior tasks that carry a signal."""
    if task != PRIOR_MEAN:
        return [task]
    return [name for name, role in cols if role == "prior" and name != PRIOR_MEAN and name not in without]


def aggregate(per_run: Sequence[Sequence[Single]]) -> tuple[float, float, float]:
    """Mean over tasks, then over runs, with its interval; ``per_run[run][task]``."""
    singles = [mean_of_intervals([single[:3] for single in tasks]) for tasks in per_run]
    matrices = []
    for task in zip(*per_run, strict=True):
        common = sorted(set.intersection(*(set(single[3]) for single in task)))
        if common:
            matrices.append(np.array([[single[3][seed] for seed in common] for single in task], dtype=float))
    return crossed_mean(matrices, singles)


@dataclass(frozen=True)
class Collected:
    """The numbers of a group's runs for one column of a table at one decode; ``per_run[run][task]``."""

    decode: str
    tasks: Sequence[str]
    runs: Sequence[Run]
    per_run: Sequence[Sequence[Single]]
    head: dict  # of the row: {**group.keys, "task", "role", "decode", "at_chance", "runs", "n"}

    def mean(self) -> tuple[float, float, float]:
        """Value, low, high over the runs."""
        return aggregate(self.per_run)

    def per_run_rows(self, name: str) -> list[dict]:
        """A dict per run: its id and seed, and under ``name`` its mean over the tasks."""
        return [
            {"run": run.id, "seed": run.state.get("seed"), name: float(np.mean([one[0] for one in tasks]))}
            for run, tasks in zip(self.runs, self.per_run, strict=True)
        ]


def collected(
    group: Group, single: Callable[[Run, str, str], Single | None], roles: Sequence[str] = ("new", "prior", "held_out")
) -> Iterator[Collected]:
    """A ``Collected`` for each decode and column that some run has numbers for; single: of (run, task, decode)."""
    cols, at_chance = columns(group.runs), silent(group.runs)
    met = {decode for run in group.runs for *_, decode in run.outcomes}
    for decode in [decode for decode in DECODES if decode in met] or DECODES[:1]:  # benchmarks alone: the first
        for task, role in (column for column in cols if column[1] in roles):
            tasks, used, per_run = members(task, cols, at_chance), [], []
            for run in group.runs:
                found = [single(run, name, decode) for name in tasks]
                if None not in found:
                    used.append(run)
                    per_run.append(found)
                if group.method == BASE and used:
                    break  # the base policy's episodes are pooled
            if used:
                head = {**group.keys, "task": task, "role": role, "decode": decode, "at_chance": task in at_chance}
                head |= {"runs": len(used), "n": sum(len(one[3]) for found in per_run for one in found)}
                yield Collected(decode, tasks, used, per_run, head)


def with_base(groups: Iterable[Group]) -> list[Group]:
    """A base row for each policy, new task and origin (measured, shipped) with base episodes, before its methods.

    Weights or tasks that differ under the same names (another fingerprint, as with another render option) get rows of
    their own.
    """
    groups, result, seen = list(groups), [], set()
    for group in groups:
        key = (group.policy, group.new_task, group.shipped)
        if key not in seen:
            seen.add(key)
            runs = [
                run for other in groups if (other.policy, other.new_task, other.shipped) == key for run in other.runs
            ]
            bases: dict[str | None, list[Run]] = {}
            for run in runs:
                if any(stage == 0 for stage, *_ in run.outcomes):
                    bases.setdefault(run.state.get("fingerprint"), []).append(run)
            for mark, same in bases.items():
                label = BASE if len(bases) == 1 else f"{BASE} (fingerprint {str(mark or 'unknown')[:8]})"
                result.append(Group(*key[:2], BASE, label, key[2], tuple(same)))
        if group.method != BASE:
            result.append(group)
    return result


def rate(seeds: Mapping[int, bool]) -> Single:
    """Share of successes with Wilson's interval."""
    successes, n = sum(seeds.values()), len(seeds)
    return successes / n, *wilson(successes, n), {seed: float(success) for seed, success in seeds.items()}


def paired(run: Run, checkpoint: tuple[int, int], task: str, decode: str = "sampled") -> Single | None:
    """Base minus fine-tuned success on the initial states that both were tried on."""
    base, tuned = run.tried((0, 0), task, decode), run.tried(checkpoint, task, decode)
    common = sorted(set(base) & set(tuned))
    if not common:
        return None
    pair = paired_difference([base[seed] for seed in common], [tuned[seed] for seed in common])
    return pair.difference, pair.low, pair.high, {seed: float(base[seed]) - float(tuned[seed]) for seed in common}


def final_divergence(run: Run) -> list[dict]:
    """A run's divergence rows at the last checkpoint that has any; of repeated rows the later counts."""
    rows = [row for row in run.divergence if row["stage"] > 0]
    last = max(((row["stage"], row["iteration"]) for row in rows), default=None)
    rows = [row for row in rows if (row["stage"], row["iteration"]) == last]
    return latest(rows, ("task", "states", "measure", "unit", "layer"))
