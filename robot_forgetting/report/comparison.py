"""Checkpoints, fronts, methods at matched new-task success, predictors of forgetting: rows of report.json."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from robot_forgetting.measure import WEIGHTS, Quantity
from robot_forgetting.metrics import law
from robot_forgetting.metrics.pareto import at_level, front, near_front
from robot_forgetting.metrics.statistics import mean_of_intervals, wilson
from robot_forgetting.report.runs import BASE, Group, Run
from robot_forgetting.report.tables import paired

RESAMPLES = 200
MOST_COMPARED = 8  # settings of methods in pairs; what a larger sweep has to say is in its methods' fronts
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


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
        rates = [(sum(s.values()) / len(s), *wilson(sum(s.values()), len(s))) for s in tried]
        row[role], row[f"{role}_low"], row[f"{role}_high"] = mean_of_intervals(rates)
        row[f"n_{role}"] = sum(map(len, tried))
    pairs = [paired(run, checkpoint, task) for task in run.counted("prior")] if checkpoint[0] else []
    row |= {"forgetting": None, "forgetting_low": None, "forgetting_high": None}
    if pairs and None not in pairs:
        row["forgetting"], row["forgetting_low"], row["forgetting_high"] = mean_of_intervals(
            [pair[:3] for pair in pairs]
        )
    row["seconds"] = run.progress.get(checkpoint[1], {}).get("seconds") if checkpoint[0] else 0.0
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


def settings(rows: Iterable[dict]) -> list[tuple]:
    """(policy, new_task, shipped) in the order met."""
    return list(dict.fromkeys((row["policy"], row["new_task"], row["shipped"]) for row in rows))


def of(rows: Iterable[dict], setting: tuple) -> list[dict]:
    return [row for row in rows if (row["policy"], row["new_task"], row["shipped"]) == setting]


def front_rows(points: Sequence[dict]) -> list[dict]:
    """Per method, over all its checkpoints, seeds and settings: the front of (new, prior), and what is close to it."""
    rows = []
    for setting in settings(points):
        for method in dict.fromkeys(row["method"] for row in of(points, setting)):
            mine = [row for row in of(points, setting) if row["method"] == method and row["stage"] > 0]
            pairs = [(row["new"], row["prior"]) for row in mine]
            edge, near = front(pairs), near_front(pairs)
            rows.append(
                {
                    **dict(zip(("policy", "new_task", "shipped"), setting, strict=True)),
                    "method": method,
                    "checkpoints": len(mine),
                    "front": [_short(mine[i]) for i in edge],
                    "within_2_points": [_short(mine[i]) for i in near],
                }
            )
    return rows


def _short(row: dict) -> dict:
    return {key: row[key] for key in ("run", "stage", "iteration", "new", "prior")}


def matched_rows(groups: Sequence[Group]) -> list[dict]:
    """Every two methods at the same new-task success: the largest that all their runs reach, and round levels below it.

    Per run, prior-task success is read off its own front (linear between checkpoints, the base policy included), then
    averaged over runs. Interval of the difference: bootstrap over initial states (the same for both methods) and, where
    both have 3 runs or more, over runs; 95 %, percentile. No rows for a sweep of many settings.
    """
    rows = []
    compared = [group for group in groups if group.method != BASE]
    if len(compared) > MOST_COMPARED:
        return rows
    for i, first in enumerate(compared):
        for second in compared[i + 1 :]:
            if (first.policy, first.new_task, first.shipped) == (second.policy, second.new_task, second.shipped):
                rows += _match(first, second)
    return rows


def _match(first: Group, second: Group) -> list[dict]:
    head = {key: first.keys[key] for key in ("policy", "new_task", "shipped")}
    head |= {"first": first.variant, "second": second.variant}
    empty = {"level": None, "first_prior": None, "second_prior": None, "difference": None, "low": None, "high": None}
    curves = [[curve for run in group.runs if (curve := _Curve.of(run)) is not None] for group in (first, second)]
    if not all(curves):
        missing = [group.variant for group, found in zip((first, second), curves, strict=True) if not found]
        return [{**head, **empty, "note": f"no checkpoint of {' and '.join(missing)} was tried on every task"}]
    counts = {"first_runs": len(curves[0]), "second_runs": len(curves[1])}
    points = [[curve.points() for curve in found] for found in curves]
    base = max(run[0][0] for found in points for run in found)  # every run's points reach down to it
    top = min(max(x for x, _ in run) for found in points for run in found)
    if top <= base + 1e-9:
        note = f"no overlap above the base policy's {base:.2f}: a run never did better than it on the new task"
        return [{**head, **empty, **counts, "note": note}]
    rows = []
    draws = _resample(curves)
    for level in [top, *(level for level in reversed(LEVELS) if base < level < top - 0.02)]:
        values = [float(np.mean([at_level(run, level) for run in found])) for found in points]
        differences = [_clamped(draw[0], level) - _clamped(draw[1], level) for draw in draws]
        low, high = np.quantile(differences, [0.025, 0.975])
        rows.append(
            {
                **head,
                "level": level,
                "first_prior": values[0],
                "second_prior": values[1],
                "difference": values[0] - values[1],
                "low": float(low),
                "high": float(high),
                **counts,
                "over": "initial states and runs" if min(counts.values()) >= 3 else "initial states only",
                "note": "largest new-task success that all runs of both reach" if level == top else "",
            }
        )
    return rows


class _Curve:
    """A run's outcomes as [checkpoint][role][task] -> (seeds, outcomes), so that initial states can be weighted."""

    def __init__(self, cells: list[dict[str, list[tuple[list[int], np.ndarray]]]]):
        self.cells = cells

    @classmethod
    def of(cls, run: Run) -> _Curve | None:
        cells = []
        for checkpoint in [(0, 0), *run.checkpoints]:
            roles = {}
            for role in ("new", "prior"):
                tried = [run.tried(checkpoint, task) for task in run.counted(role)]
                if tried and all(tried):
                    roles[role] = [(list(seeds), np.array(list(seeds.values()), dtype=float)) for seeds in tried]
            if len(roles) == 2:
                cells.append(roles)
            elif checkpoint == (0, 0):
                return None  # without the base policy's point there is no common start
        return cls(cells) if len(cells) > 1 else None

    def points(self, weights=None) -> list[tuple[float, float]]:
        return [tuple(self._rate(cell[role], role, weights) for role in ("new", "prior")) for cell in self.cells]

    @staticmethod
    def _rate(tasks, role, weights) -> float:
        rates = []
        for index, (seeds, values) in enumerate(tasks):
            if weights is None:
                rates.append(values.mean())
            else:
                w = np.array([weights[role, index].get(seed, 0.0) for seed in seeds])
                rates.append((w @ values) / w.sum() if w.sum() else values.mean())
        return float(np.mean(rates))


def _resample(curves: list[list[_Curve]], resamples: int = RESAMPLES) -> list[list[list[list[tuple[float, float]]]]]:
    """Bootstrap draws [draw][method][run] -> points, with the same initial states for everyone."""
    generator = np.random.default_rng(0)
    pools: dict[tuple[str, int], list[int]] = {}
    for curve in (curve for found in curves for curve in found):
        for cell in curve.cells:
            for role, tasks in cell.items():
                for index, (seeds, _) in enumerate(tasks):
                    pools[role, index] = sorted({*pools.get((role, index), []), *seeds})
    over_runs = min(map(len, curves)) >= 3
    draws = []
    for _ in range(resamples):
        weights = {}
        for key, pool in pools.items():
            counts = generator.multinomial(len(pool), np.full(len(pool), 1 / len(pool)))
            weights[key] = dict(zip(pool, counts.astype(float), strict=True))
        draw = []
        for found in curves:
            chosen = generator.integers(len(found), size=len(found)) if over_runs else range(len(found))
            draw.append([found[i].points(weights) for i in chosen])
        draws.append(draw)
    return draws


def _clamped(runs: Sequence[Sequence[tuple[float, float]]], level: float) -> float:
    """Mean over runs of prior success at a level; a resampled run that misses it counts with its nearest point."""
    values = []
    for points in runs:
        edge = [points[i] for i in front(points)]
        values.append(np.interp(level, [x for x, _ in edge], [y for _, y in edge]))
    return float(np.mean(values))


def predictor_rows(points: Sequence[dict]) -> list[dict]:
    """How well a quadratic of each divergence explains forgetting, over all methods: ``law.predictor_rows``.

    Per token only: with a fixed number of tokens per decision the other unit is the same number times a constant.
    Without a checkpoint whose forgetting is known there are no rows; else a row without a fit says why in its note.
    """
    rows = []
    for setting in settings(points):
        mine = [row for row in of(points, setting) if row["forgetting"] is not None]
        for quantity in _quantities(mine):
            if quantity.unit == "nats/decision":
                continue
            (found,) = law.predictor_rows(_points(mine, quantity), [str(quantity)])
            head = dict(zip(("policy", "new_task", "shipped"), setting, strict=True))
            rows.append({**head, **found, **quantity.as_predictor()})
    return sorted(rows, key=_place)


def left_out_rows(points: Sequence[dict]) -> list[dict]:
    """Does the law of the other methods predict a method? ``law.leave_one_method_out`` of the forward KL per token.

    On new-task inputs, at the states of each kind; no rows for one method, or where forgetting is not known.
    """
    rows = []
    for setting in settings(points):
        mine = [row for row in of(points, setting) if row["forgetting"] is not None]
        for quantity in _quantities(mine):
            if quantity != Quantity("forward_kl", "nats/token", "new", quantity.states):
                continue
            known = _points(mine, quantity)
            if len(set(known.run_methods)) < 2:
                continue
            head = dict(zip(("policy", "new_task", "shipped"), setting, strict=True))
            for row in law.leave_one_method_out(known, str(quantity)):
                rows.append({**head, **row, **quantity.as_predictor()})
    return rows


def _quantities(rows: Sequence[dict]) -> list[Quantity]:
    """All that was measured at some checkpoint, in the order met."""
    return list(dict.fromkeys(quantity for row in rows for quantity in row["divergence"]))


def _points(rows: Sequence[dict], quantity: Quantity) -> law.Points:
    """The checkpoints at which it was measured."""
    used = [row for row in rows if quantity in row["divergence"]]
    return law.Points.from_rows([{**row, "predictors": {str(quantity): row["divergence"][quantity]}} for row in used])


def _place(row: dict) -> tuple:
    inputs = ("new", "prior", "held_out")
    return row["shipped"] is not None, row["r2"] is None, inputs.index(row["inputs"]) if row["inputs"] in inputs else 3


def curve_rows(groups: Sequence[Group]) -> list[dict]:
    """Per run: success of training rollouts by iteration with cumulative environment steps and seconds."""
    return [
        {**group.keys, "run": run.id, "seed": run.state.get("seed"), "iteration": iteration, **entry}
        for group in groups
        if group.method != BASE
        for run in group.runs
        for iteration, entry in sorted(run.progress.items())
    ]
