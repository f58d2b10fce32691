"""New task against prior tasks: every checkpoint, each method's front, and methods at the same new-task success."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.metrics.pareto import at_level, front, near_front
from robot_forgetting.report import words
from robot_forgetting.report.comparison import by_setting
from robot_forgetting.report.figures import INK, Colours, canvas, crosses, percent
from robot_forgetting.report.markup import Cell, Content, note, of, pictured, strong, table
from robot_forgetting.report.runs import BASE, Group, Run
from robot_forgetting.report.section import GroupedRuns, Part, Section

RESAMPLES = 200
MOST_COMPARED = 8  # settings of methods in pairs; what a larger sweep has to say is in its methods' fronts
LEVELS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Fronts(Section):
    name, title, trained = "fronts", "New task against prior tasks", True
    alt = "Scatter of success on the new task against mean success on the prior tasks"

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        points = runs.checkpoints
        return {"checkpoints": points, "fronts": front_rows(points), "matched": matched_rows(runs.groups)}

    def figure(self, part: Part):
        points = part.rows("checkpoints")
        learned = any(row["stage"] > 0 for row in points)
        return scatter(points, part.rows("fronts"), part.colours) if learned else None

    def html(self, part: Part, figure: Markup) -> Content:
        shown = pictured(
            figure,
            "Every evaluated checkpoint of every run; large marks are final policies with 95 % intervals over their "
            "episodes. A line joins the checkpoints of a method that no other of its checkpoints beats on both axes. "
            "Fronts are picked from noisy points and so lie a little too high.",
        )
        caption = (
            "Prior-task success at the same new-task success, per run read off its own front (linear between "
            "checkpoints, from the base policy on) and averaged. Difference in points with a 95 % bootstrap interval "
            "over what the last column says; the noise of the success level itself is not in it, and over three runs "
            "such an interval is rather too narrow."
        )
        head = ["first", "second", "new-task success", "prior, first", "prior, second", "difference", "runs"]
        lines = [_matched_line(row) for row in part.rows("matched")]
        shown = shown or note("No checkpoint was tried on both the new and the prior tasks.")
        return shown + table(caption, [*head, "interval over"], lines)


def _matched_line(row: dict) -> list:
    pair = [row["first"], row["second"]]
    if row["level"] is None:
        return [*pair, Cell(row["note"], span=6)]
    return [
        *pair,
        words.percent(row["level"]) + of(row["note"]),
        words.percent(row["first_prior"]),
        words.percent(row["second_prior"]),
        strong(words.number(row["difference"], True), " ", words.interval(row["low"], row["high"])),
        f"{row['first_runs']} / {row['second_runs']}",
        row["over"],
    ]


def front_rows(points: Sequence[dict]) -> list[dict]:
    """Per method, over all its checkpoints, seeds and settings: the front of (new, prior), and what is close to it."""
    rows = []
    for setting, members in by_setting(points):
        for method in dict.fromkeys(row["method"] for row in members):
            mine = [row for row in members if row["method"] == method and row["stage"] > 0]
            pairs = [(row["new"], row["prior"]) for row in mine]
            row = {**setting, "method": method, "checkpoints": len(mine)}
            row["front"] = [_short(mine[i]) for i in front(pairs)]
            rows.append(row | {"within_2_points": [_short(mine[i]) for i in near_front(pairs)]})
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
        why = f"no overlap above the base policy's {base:.2f}: a run never did better than it on the new task"
        return [{**head, **empty, **counts, "note": why}]
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


def scatter(points: Sequence[dict], fronts: Sequence[dict], colours: Colours):
    """New-task against prior-task success: small marks are checkpoints, large ones final policies, lines the fronts."""
    figure, (axes,) = canvas((6.6, 4.6))
    for row in fronts:
        edge = [(point["new"], point["prior"]) for point in row["front"]]
        colour = colours.colour(row["method"])
        if len(edge) > 1:
            axes.plot(*zip(*edge, strict=True), color=colour, alpha=0.55, linewidth=1.2, zorder=1)
    for method in dict.fromkeys(row["method"] for row in points):
        mine = [row for row in points if row["method"] == method and row["stage"] > 0]
        style = {"color": colours.colour(method), "marker": colours.marker(method), "linestyle": "none"}
        passing = [row for row in mine if not row["final"]]
        axes.plot([r["new"] for r in passing], [r["prior"] for r in passing], markersize=4, alpha=0.65, **style)
        final = [row for row in mine if row["final"]]
        crosses(axes, final, ("new", "prior"), style)
        axes.plot([], [], markersize=8, label=f"{method}, final policy", **style)
    base = [row for row in points if row["stage"] == 0][:1]
    style = {"color": INK, "marker": "*", "linestyle": "none", "markersize": 13}
    crosses(axes, base, ("new", "prior"), style)
    axes.plot([], [], label="base policy", **style)
    axes.plot([], [], color=INK, marker=".", linestyle="none", alpha=0.5, label="checkpoint during training")
    axes.plot([], [], color=INK, alpha=0.55, linewidth=1.2, label="front of a method")
    axes.set(xlabel="success on the new task", ylabel="mean success on the prior tasks", xlim=(-0.02, 1.02))
    bottom = min([row["prior_low"] for row in points], default=0)
    axes.set_ylim(min(0.5, bottom - 0.05) if bottom < 0.5 else 0.4, 1.02)
    percent(axes, x=True, y=True)
    axes.legend(loc="lower left")
    return figure
