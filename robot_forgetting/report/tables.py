"""Success, forgetting and divergence per method: rows of report.json."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from robot_forgetting.measure import TEXT, WEIGHTS
from robot_forgetting.metrics.statistics import (
    crossed_mean,
    mean_of_intervals,
    paired_difference,
    ratio_interval,
    wilson,
)
from robot_forgetting.records.summary import DECODES, latest
from robot_forgetting.report.runs import BASE, Group, Run

PRIOR_MEAN = "prior mean"
# One run's number for one task: value, low, high, and {initial state: its part of the value}.
Single = tuple[float, float, float, Mapping[int, float]]


def columns(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(task, role) in the order of the tables: new, prior tasks, their mean, held-out."""
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


def success_rows(groups: Sequence[Group]) -> list[dict]:
    """Success of the base policy and of each method's final policy, per task and decode."""
    rows = []
    for group in with_base(groups):
        cols, at_chance = columns(group.runs), silent(group.runs)
        for decode in _decodes(group.runs):
            for task, role in cols:
                tasks, used, per_run = members(task, cols, at_chance), [], []
                for run in group.runs:
                    tried = [_outcomes(group, run, name, decode) for name in tasks]
                    if all(tried):
                        used.append(run)
                        per_run.append([_rate(seeds) for seeds in tried])
                    if group.method == BASE and used:
                        break  # the base policy's episodes are pooled, see _outcomes
                if not used:
                    continue
                value, low, high = aggregate(per_run)
                rows.append(
                    {
                        **group.keys,
                        "task": task,
                        "role": role,
                        "decode": decode,
                        "at_chance": task in at_chance,
                        "runs": len(used),
                        "n": sum(len(single[3]) for tasks in per_run for single in tasks),
                        "rate": value,
                        "low": max(low, 0.0),
                        "high": min(high, 1.0),
                        "interval": _interval_name(len(used), len(tasks)),
                        "per_run": [
                            {
                                "run": run.id,
                                "seed": run.state.get("seed"),
                                "rate": float(np.mean([single[0] for single in tasks])),
                                "n": sum(len(single[3]) for single in tasks),
                            }
                            for run, tasks in zip(used, per_run, strict=True)
                        ],
                    }
                )
    return rows


def _decodes(runs: Sequence[Run]) -> list[str]:
    """Those that some episode has; benchmarks alone stand in the first."""
    met = {decode for run in runs for *_, decode in run.outcomes}
    return [decode for decode in DECODES if decode in met] or list(DECODES[:1])


def with_base(groups: Sequence[Group]) -> list[Group]:
    """A base row for each policy, new task and origin (measured, shipped) with base episodes, before its methods.

    Weights or tasks that differ under the same names (another fingerprint, as with another render option) get rows of
    their own.
    """
    result: list[Group] = []
    seen = set()
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


def _interval_name(runs: int, tasks: int) -> str:
    if runs > 1:
        return "t over runs and initial states"
    return "Wilson" if tasks == 1 else "Wilson limits of each task, squared and added (MOVER)"


def _outcomes(group: Group, run: Run, task: str, decode: str) -> dict[int, bool]:
    if group.method != BASE:
        return run.tried(run.final, task, decode) if run.final else {}
    pooled: dict[int, bool] = {}
    for other in group.runs:  # every run holds a copy of the base policy's episodes, or a part of them
        pooled = {**other.tried((0, 0), task, decode), **pooled}
    return pooled


def _rate(seeds: Mapping[int, bool]) -> Single:
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


def forgetting_rows(groups: Sequence[Group]) -> list[dict]:
    """Forgetting and retention of each method's final policy per prior and held-out task, on paired initial states."""
    rows = []
    for group in groups:
        cols, at_chance = columns(group.runs), silent(group.runs)
        for decode in _decodes(group.runs):
            for task, role in cols:
                if role == "new":
                    continue
                tasks, used, per_run = members(task, cols, at_chance), [], []
                for run in group.runs:
                    found = [paired(run, run.final, name, decode) if run.final else None for name in tasks]
                    if None not in found:
                        used.append(run)
                        per_run.append(found)
                if not used:
                    continue
                value, low, high = aggregate(per_run)
                base, tuned = (_paired_rates(used, per_run, tasks, decode, which) for which in ("base", "final"))
                retention = ratio_interval(tuned, base)
                rows.append(
                    {
                        **group.keys,
                        "task": task,
                        "role": role,
                        "decode": decode,
                        "scored": all(run.scored.issuperset(tasks) for run in used),
                        "at_chance": task in at_chance,
                        "runs": len(used),
                        "n": sum(len(single[3]) for tasks in per_run for single in tasks),
                        "base": base[0],
                        "fine_tuned": tuned[0],
                        "forgetting": value,
                        "low": max(low, -1.0),
                        "high": min(high, 1.0),
                        "retention": tuned[0] / base[0] if base[0] else None,
                        "retention_low": retention[0],
                        "retention_high": retention[1],
                        "per_run": [
                            {
                                "run": run.id,
                                "seed": run.state.get("seed"),
                                "forgetting": float(np.mean([single[0] for single in tasks])),
                            }
                            for run, tasks in zip(used, per_run, strict=True)
                        ],
                    }
                )
    return rows


def _paired_rates(runs, per_run, tasks, decode, which) -> tuple[float, float, float]:
    """Success with its interval on exactly the paired initial states."""
    found = []
    for run, singles in zip(runs, per_run, strict=True):
        checkpoint = (0, 0) if which == "base" else run.final
        rates = []
        for task, single in zip(tasks, singles, strict=True):
            tried = run.tried(checkpoint, task, decode)
            rates.append(_rate({seed: tried[seed] for seed in single[3]}))
        found.append(rates)
    value, low, high = aggregate(found)
    return value, max(low, 0.0), min(high, 1.0)


def divergence_rows(groups: Sequence[Group]) -> list[dict]:
    """Distances between base and fine-tuned policy, of each method's final policy, on named states.

    One run: its own standard error. Several: that of their mean, sqrt(s^2 / k), and at least what their own errors say.
    """
    rows = []
    for group in groups:
        found: dict[tuple, list[dict]] = {}
        for run in group.runs:
            for row in final_divergence(run):
                if row.get("states") in (TEXT, WEIGHTS, None):
                    continue  # by layer, see ``report.layers``; None: of weights, in a study
                key = tuple(row.get(name) for name in ("task", "role", "states", "measure", "unit"))
                found.setdefault(key, []).append(row)
        for (task, role, states, measure, unit), members in found.items():
            values = np.array([row["value"] for row in members if row.get("value") is not None], dtype=float)
            if not len(values):
                continue
            own = [row["standard_error"] for row in members if row.get("standard_error") is not None]
            floor = math.sqrt(float(np.mean(np.square(own))) / len(values)) if own else None
            spread = math.sqrt(float(values.var(ddof=1)) / len(values)) if len(values) > 1 else None
            errors = [error for error in (floor, spread) if error is not None]
            rows.append(
                {
                    **group.keys,
                    "task": task,
                    "role": role,
                    "states": states,
                    "measure": measure,
                    "unit": unit,
                    "value": float(values.mean()),
                    "standard_error": max(errors) if errors else None,
                    "n": sum(row.get("n") or 0 for row in members),
                    "episodes": sum(row.get("episodes") or 0 for row in members),
                    "runs": len(values),
                }
            )
    return rows


def final_divergence(run: Run) -> list[dict]:
    """A run's divergence rows at the last checkpoint that has any; of repeated rows the later counts."""
    rows = [row for row in run.divergence if row["stage"] > 0]
    last = max(((row["stage"], row["iteration"]) for row in rows), default=None)
    rows = [row for row in rows if (row["stage"], row["iteration"]) == last]
    return latest(rows, ("task", "states", "measure", "unit", "layer"))
