"""What predicts forgetting: the fit of forgetting on each distance, and how it holds for a method it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.measure import BASE, DEMONSTRATIONS, FINE_TUNED, Quantity
from robot_forgetting.metrics import law
from robot_forgetting.metrics.pareto import quadratic_fit
from robot_forgetting.report import words
from robot_forgetting.report.comparison import by_setting
from robot_forgetting.report.figures import FAINT, INK, Colours, canvas, crosses, points_axis
from robot_forgetting.report.markup import Cell, Content, columns, join, note, pictured, table, wrapped
from robot_forgetting.report.section import GroupedRuns, Part, Section

STATES = (BASE, DEMONSTRATIONS, FINE_TUNED)  # in order of preference for the plot
MAIN = [Quantity("forward_kl", "nats/token", "new", states) for states in STATES]
WHOSE = {BASE: "the base policy's episodes", FINE_TUNED: "the fine-tuned policy's own episodes"}
HEAD = ["R²", ("bias", "points"), ("error", "root mean square, points"), "out of range", "checkpoints (runs)"]


class Predictors(Section):
    name, title, trained = "predictors", "What predicts forgetting", True
    alt = "Scatter of forgetting against divergence from the base policy"

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        points = runs.checkpoints
        return {"predictors": predictor_rows(points), "leave_one_method_out": left_out_rows(points)}

    def figure(self, part: Part):
        points, quantity = part.rows("checkpoints"), plotted(part.rows("checkpoints"))
        learned = any(row["stage"] > 0 for row in points)
        return kl_against_forgetting(points, quantity, part.colours) if quantity and learned else None

    def html(self, part: Part, figure: Markup) -> Content:
        quantity, every = plotted(part.rows("checkpoints")), part.rows("predictors")
        whose = WHOSE.get(quantity.states, "demonstrations") if quantity else ""
        shown = pictured(
            figure,
            "Forgetting (base minus fine-tuned success on paired initial states, mean of the prior tasks) of every "
            f"checkpoint against forward KL on new-task inputs, at states of {whose}. Checkpoints of one run depend on "
            "each other. Bars: 95 % over initial states.",
        )
        fitted = [row for row in every if row["r2"] is not None]
        if not fitted:
            why = f"No law of forgetting over distance: {no_law(every)}."
            return shown + note(why) if part.rows("divergence") else shown
        layers = " (CKNNA, CKA and change of states: mean over blocks)" * bool(part.rows("layers"))
        caption = (
            "How much of the variation in prior-task forgetting a quadratic function of each distance accounts for"
            f"{layers}; 95 % percentile bootstrap over runs where there are 3 or more. “Unseen method”: the same when "
            "each method is predicted by the fit to the others (below 0: worse than a mean). Distances recorded at "
            "fewer than 4 checkpoints are left out."
        )
        unseen = (
            "Does the law of the other methods predict a method that it has not seen? The quadratic of forward KL on "
            "new-task inputs, fitted without the method and asked for its forgetting; 95 % bootstrap over runs where "
            "there are 3 or more."
        )
        head_unseen = ["left out", "states of", *HEAD]
        lines = [
            [row["held_out"], words.states_name(row["states"]), *transfer_cells(row)]
            for row in part.rows("leave_one_method_out")
        ]
        return join(
            [
                shown,
                columns(
                    caption,
                    fitted,
                    {
                        "distance": lambda row: part.measure_name(row["predictor"]),
                        "inputs": lambda row: words.role_name(row["inputs"]),
                        "states of": lambda row: words.states_name(row["states"]),
                        "R²": lambda row: words.r2(row) + wrapped(row["note"]),
                        "unseen method": lambda row: words.r2(row, "left_out_r2", "left_out_low", "left_out_high"),
                        "checkpoints (runs)": lambda row: f"{row['n']} ({row['runs']})",
                    },
                ),
                note(words.too_few(fitted)),
                table(unseen, head_unseen, lines),
            ]
        )


def transfer_cells(row: dict) -> list:
    """Cells below ``HEAD`` of a row of ``law.transfer``."""
    count = f"{row['n']} ({row['runs']})"
    if row["root_mean_square"] is None:
        return [Cell(row["note"], "wrap", span=4), count]
    fit = words.r2(row) + wrapped(row["note"])
    error, outside = 100 * row["root_mean_square"], 100 * row["outside"]
    return [fit, words.number(row["bias"], True), f"{error:.1f}", f"{outside:.0f} %", count]


def plotted(points: Sequence[dict]) -> Quantity | None:
    """The forward KL on new-task inputs, on the first kind of states there is."""
    keys = {key for row in points for key in row["divergence"]}
    return next((quantity for quantity in MAIN if str(quantity) in keys), None)


def no_law(predictors: Sequence[dict]) -> str:
    """Why there is no fit of forgetting on any divergence."""
    notes = (row["note"] for row in predictors if row["note"])
    return next(notes, "no checkpoint has both a divergence and a forgetting")


def predictor_rows(points: Sequence[dict]) -> list[dict]:
    """How well a quadratic of each divergence explains forgetting, over all methods: ``law.predictor_rows``.

    Per token only: with a fixed number of tokens per decision the other unit is the same number times a constant.
    Without a checkpoint whose forgetting is known there are no rows; else a row without a fit says why in its note.
    """
    rows = []
    for setting, quantity, known in _measured(points):
        if quantity.unit != "nats/decision":
            (found,) = law.predictor_rows(known, [str(quantity)])
            rows.append({**setting, **found, **quantity.as_predictor()})
    return sorted(rows, key=_place)


def left_out_rows(points: Sequence[dict]) -> list[dict]:
    """Does the law of the other methods predict a method? ``law.leave_one_method_out`` of the forward KL per token.

    On new-task inputs, at the states of each kind; no rows for one method, or where forgetting is not known.
    """
    return [
        {**setting, **row, **quantity.as_predictor()}
        for setting, quantity, known in _measured(points)
        if quantity == Quantity("forward_kl", "nats/token", "new", quantity.states) and len(set(known.run_methods)) > 1
        for row in law.leave_one_method_out(known, str(quantity))
    ]


def _measured(points: Sequence[dict]) -> Iterator[tuple[dict, Quantity, law.Points]]:
    """(setting, what was measured, the checkpoints that have it and a forgetting) of each setting and quantity."""
    for setting, rows in by_setting(row for row in points if row["forgetting"] is not None):
        for quantity in dict.fromkeys(quantity for row in rows for quantity in row["divergence"]):
            used = [row for row in rows if quantity in row["divergence"]]
            used = [{**row, "predictors": {str(quantity): row["divergence"][quantity]}} for row in used]
            yield setting, quantity, law.Points.from_rows(used)


def _place(row: dict) -> tuple:
    inputs = ("new", "prior", "held_out")
    return row["shipped"] is not None, row["r2"] is None, inputs.index(row["inputs"]) if row["inputs"] in inputs else 3


def kl_against_forgetting(points: Sequence[dict], quantity: Quantity, colours: Colours):
    """Forgetting over a divergence, all checkpoints, with the quadratic fit where there are enough points."""
    key = str(quantity)
    used = [row for row in points if key in row["divergence"] and row["forgetting"] is not None]
    figure, (axes,) = canvas((6.6, 4.2))
    axes.axhline(0, color=FAINT, linewidth=0.8, alpha=0.5)
    x = np.array([row["divergence"][key] for row in used])
    fit = quadratic_fit(x, [row["forgetting"] for row in used])
    if fit.r2 is not None:
        grid = np.linspace(0, x.max(), 100)
        label = f"quadratic fit, R² = {fit.r2:.2f}, n = {fit.n} checkpoints"
        axes.plot(grid, fit(grid), color=INK, linestyle="--", linewidth=1, alpha=0.7, label=label)
    else:
        axes.plot([], [], linestyle="none", label=f"no fit: {fit.note}")
    for method in dict.fromkeys(row["method"] for row in used):
        mine = [row for row in used if row["method"] == method]
        style = {"color": colours.colour(method), "marker": colours.marker(method), "linestyle": "none"}
        passing = [row for row in mine if not row["final"]]
        xy = [row["divergence"][key] for row in passing], [row["forgetting"] for row in passing]
        axes.plot(*xy, markersize=4, alpha=0.65, **style)
        final = [{**row, "x": row["divergence"][key], "x_low": None} for row in mine if row["final"]]
        crosses(axes, final, ("x", "forgetting"), style)
        axes.plot([], [], markersize=8, label=method, **style)
    axes.set(xlabel=f"{quantity.measure.replace('_', ' ').replace('kl', 'KL')}, {quantity.unit}", xlim=(0, None))
    axes.set_ylabel("forgetting on the prior tasks, points")
    points_axis(axes.yaxis)
    axes.legend(loc="best")
    return figure
