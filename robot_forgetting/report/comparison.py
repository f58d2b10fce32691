"""Checkpoints as points, by setting: what fronts and laws are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from robot_forgetting.measure import WEIGHTS, Quantity
from robot_forgetting.metrics.statistics import mean_of_intervals
from robot_forgetting.report.runs import BASE, Group, Run
from robot_forgetting.report.tables import paired, rate

SETTING = ("policy", "new_task", "shipped")  # rows that agree in these stand in one part of the page


def checkpoint_points(groups: Sequence[Group]) -> list[dict]:
    """Mean success on new and prior tasks per run and evaluated checkpoint, the base policy (iteration 0) first.

    Only checkpoints at which every new and prior task was tried. forgetting: paired with the base; divergence:
    {Quantity: mean over tasks}.
    """
    rows = []
    for group in groups:
        for run in group.runs:
            if group.method == BASE or not run.tasks["new"] or not run.counted("prior"):
                continue
            for checkpoint in [(0, 0), *run.checkpoints]:
                row = _point(run, checkpoint)
                if row is not None:
                    rows.append({**group.keys, "run": run.id, "seed": run.state.get("seed"), **row})
    return rows


def _point(run: Run, checkpoint: tuple[int, int]) -> dict | None:
    row: dict = {"stage": checkpoint[0], "iteration": checkpoint[1], "final": checkpoint == run.final}
    for role in ("new", "prior"):
        tried = [run.tried(checkpoint, task) for task in run.counted(role)]
        if not all(tried):
            return None
        row[role], row[f"{role}_low"], row[f"{role}_high"] = mean_of_intervals([rate(seeds)[:3] for seeds in tried])
        row[f"n_{role}"] = sum(map(len, tried))
    pairs = [paired(run, checkpoint, task) for task in run.counted("prior")] if checkpoint[0] else []
    row |= {"forgetting": None, "forgetting_low": None, "forgetting_high": None}
    if pairs and None not in pairs:
        row["forgetting"], row["forgetting_low"], row["forgetting_high"] = mean_of_intervals(
            [pair[:3] for pair in pairs]
        )
    row["seconds"] = run.progress.get(checkpoint, {}).get("seconds") if checkpoint[0] else 0.0
    row["divergence"] = _divergence(run, checkpoint)
    return row


def _divergence(run: Run, checkpoint: tuple[int, int]) -> dict[Quantity, float]:
    """Means over tasks; of what is known by layer the mean over blocks, of weights the change of all of them."""
    found: dict[Quantity, dict[tuple, float]] = {}
    for row in run.divergence:
        layer = row.get("layer")
        if layer == 0 or (layer is not None and row.get("states") == WEIGHTS):
            continue
        if (row["stage"], row["iteration"]) == checkpoint and row.get("value") is not None:
            found.setdefault(Quantity.of(row), {})[row.get("task"), layer] = row["value"]
    return {quantity: float(np.mean(list(tasks.values()))) for quantity, tasks in found.items()}


def by_setting(rows: Iterable[dict]) -> Iterator[tuple[dict, list[dict]]]:
    """(policy, new task and shipped as a dict, the rows of these), in the order met."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in SETTING), []).append(row)
    for setting, mine in found.items():
        yield dict(zip(SETTING, setting, strict=True)), mine
