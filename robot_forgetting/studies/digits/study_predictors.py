"""The forgetting law, and what else predicts forgetting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.metrics import law, published
from robot_forgetting.report import words
from robot_forgetting.report.figures import FAINT, INK, canvas, points_axis
from robot_forgetting.report.markup import (
    Cell,
    Content,
    bullets,
    folded,
    join,
    note,
    of,
    one,
    paragraph,
    strong,
    table,
    wrapped,
)
from robot_forgetting.report.predictor_section import HEAD, transfer_cells
from robot_forgetting.studies.digits import study_words
from robot_forgetting.studies.digits.study_figures import style
from robot_forgetting.studies.digits.study_law import MAIN, Law
from robot_forgetting.studies.digits.study_runs import Study, label
from robot_forgetting.studies.digits.study_sections import StudyPart, StudySection

NO_RUN = "no finished run of the sweep"


class LawSection(StudySection):
    name, title, alt, which = "law", "Forgetting over forward KL", "Forgetting over forward KL", "main"

    def rows(self, study: Study) -> dict:
        main = study.law
        return {
            "residuals": main.residual_rows() if main else [],
            "leave_one_method_out": main.left_out_rows() if main else [],
            "transfer": main.transfer_rows() if main else [],
        }

    def law(self, part: StudyPart) -> Law | None:
        return part.study.law

    def figure(self, part: StudyPart):
        """Left: forgetting over forward KL with the quadratic and its band. Right: what is left over."""
        study, found = part.study, self.law(part)
        if found is None or found.points is None or MAIN not in found.points.predictors:
            return None
        figure, (left, right) = canvas((9.6, 4.9), 2)
        x, y = found.points.column(MAIN), found.points.forgetting
        rest = law.residuals(found.points, MAIN) if found.has_fit else np.full(len(y), np.nan)
        method = found.points.method
        for name in found.methods:
            colour, marker, _ = style(name, study.methods)
            mine = (method == name) & np.isfinite(x) & np.isfinite(y)
            options = {"linestyle": "none", "marker": marker, "color": colour, "markersize": 3.6, "alpha": 0.5}
            left.plot(x[mine], y[mine], markeredgewidth=0, **options)
            right.plot(x[mine], rest[mine], markeredgewidth=0, **options)
            left.plot([], [], label=label(name), **{**options, "markersize": 5, "alpha": 1})
        for axis in (left, right):
            axis.axhline(0, color=FAINT, linewidth=0.8, alpha=0.6, zorder=0)
            axis.set(xlabel="forward KL on new-task inputs, nats", xlim=(0, None))
            points_axis(axis.yaxis)
        if found.has_fit:
            grid = np.linspace(0, float(np.nanmax(x)), 120)
            fit = law.fit(found.points, MAIN)
            left.plot(grid, fit(grid), color=INK, linewidth=1.6, label="quadratic fit")
            band = law.band(found.points, MAIN, grid)
            if band is not None:
                left.fill_between(grid, *band, color=INK, alpha=0.15, linewidth=0)
            ours, paper, replication = map(words.r2, (found.main, found.main["paper"], found.main["replication"]))
            title = f"R² = {ours} (paper {paper}, replication {replication})"
        else:
            title = "no fit, see above"
        fine = y[np.isfinite(x) & np.isfinite(y)]
        pad = 0.05 * (np.ptp(fine) if len(fine) else 1) + 0.005
        left.set_ylim(
            min(0, fine.min(initial=0)) - 2.2 * pad, fine.max(initial=0) + pad
        )  # a band may leave the picture
        left.set(title=title, ylabel="forgetting on FashionMNIST, points")
        right.set(title="Residuals of the fit", ylabel="forgetting minus its fit, points")
        figure.legend(loc="outside lower center", ncols=4)
        return figure

    def caption(self, part: StudyPart) -> str:
        law = self.law(part)
        which = "the paper's methods" if law is part.study.laws.get("paper") else "all methods"
        runs = words.plural(len(law.points.run_names), "run")
        seeds, n = words.plural(len(set(law.points.run_seeds)), "seed"), (law.main or {}).get("n", 0)
        return (
            f"Forgetting over forward KL(base || fine-tuned) on new-task inputs, pooled over {which}, with a quadratic "
            f"fit and its 95 % band; right: what it leaves. n = {n} checkpoints of {runs}, {seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        why = part.study.law.missing if part.study.law else NO_RUN
        caption = (
            "Left: what the common curve leaves of each method, in points of forgetting (standard errors clustered by "
            "run): a mean far from 0 is off the curve. Right: R² on a method that the fit has not seen, and the share "
            "of its points beyond the range of KL that the fit has seen."
        )
        unseen = {row["held_out"]: row for row in part.rows("leave_one_method_out")}
        head = ["mean residual", "root mean square", "R² when unseen", *HEAD[1:-1], "n (runs)"]
        lines = []
        for row in part.rows("residuals"):
            error = row["standard_error"]
            mean = words.number(row["mean"], True) + ("" if error is None else f" ± {100 * error:.1f}")
            held = unseen.get(row["method"])
            cells = [Cell("one method only", span=4)] if held is None else transfer_cells(held)[:-1]
            count = f"{row['n']} ({row['runs']})"
            lines.append([part.method(row["method"]), mean, f"{100 * row['root_mean_square']:.1f}", *cells, count])
        shown = paragraph(why and f"No fit: {why}.", "alert") + figure + table(caption, ["method", *head], lines)
        lines = [
            [
                row["from"] + of(_names(row["trained_on"])),
                row["to"] + of(_names(row["tested_on"])),
                *transfer_cells(row),
            ]
            for row in part.rows("transfer")
        ]
        asked = "Does the law of one family predict the other?"
        return shown + table(asked, ["fitted on", "asked of", *HEAD[:-1], "n (runs)"], lines)


class LawOfAll(LawSection):
    """The law over all methods where the page's is over the paper's."""

    name = "law_all"

    def rows(self, study: Study) -> dict:
        return {}

    def law(self, part: StudyPart) -> Law | None:
        return part.study.law_of_all

    def heading(self, part: StudyPart) -> str:
        return ""

    def html(self, part: StudyPart, figure: Markup) -> Content:
        return folded("The same over all methods", self.pictured(part, figure))


def _names(methods: Sequence[str]) -> str:
    return ", ".join(map(label, methods))


class StudyPredictors(StudySection):
    name, title, alt = "predictors", "What else predicts forgetting", "R squared of every predictor"

    def rows(self, study: Study) -> dict:
        main, other = study.law, study.law_of_all
        return {
            "predictors": main.rows if main else [],
            "predictors_methods": main.methods if main else [],
            "predictors_all": other.rows if other else [],
        }

    def figure(self, part: StudyPart):
        """R^2 of every predictor, ours with its interval beside the published values."""
        found = part.study.law
        if not any(row["r2"] is not None for row in part.rows(self.name)):
            return None
        sides = [("on new-task inputs, or of the weights alone", ("new", "")), ("on prior-task inputs", ("prior",))]
        sides = [
            (title, [r for r in found.rows if r["inputs"] in inputs and (r["r2"] is not None or r["paper"])])
            for title, inputs in sides
        ]
        sides = [side for side in sides if side[1]]
        height = 1.2 + 0.27 * max(len(rows) for _, rows in sides)
        figure, axes = canvas((9.6, height), len(sides), sharex=True)
        marks = (("paper", "Table 1 of the paper", "D", "#D55E00"), ("replication", "replication", "s", "#009E73"))
        for axis, (title, rows) in zip(axes, sides, strict=True):
            for place, row in enumerate(reversed(rows)):
                if row["low"] is not None:
                    axis.plot([row["low"], row["high"]], [place, place], color="#0072B2", linewidth=3.5, alpha=0.4)
                if row["r2"] is not None:
                    axis.plot(row["r2"], place, marker="o", color="#0072B2", markersize=5.5)
                for key, _, marker, colour in marks:
                    if row[key] and row[key]["r2"] is not None:
                        axis.plot(
                            row[key]["r2"], place, marker=marker, markerfacecolor="none", color=colour, markersize=7
                        )
            axis.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="y", color=FAINT, alpha=0.15)
            axis.set(title=title, xlabel="R² of a quadratic fit of forgetting", xlim=(-0.03, 1.03), ylim=(-0.7, None))
        axes[0].plot([], [], color="#0072B2", marker="o", linewidth=3.5, label="here, with 95 % interval")
        for _, name, marker, colour in marks:
            axes[0].plot([], [], marker=marker, color=colour, markerfacecolor="none", linestyle="none", label=name)
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    def caption(self, part: StudyPart) -> str:
        return (
            "How much of the variation in forgetting a quadratic of each predictor explains: here with 95 % intervals, "
            f"and as published. n = {max(row['n'] for row in part.rows(self.name))} checkpoints, {part.seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        rows, law = part.rows(self.name), part.study.law
        if not rows:
            return note(f"No table: {(law.missing if law else NO_RUN) or 'no predictor was recorded'}.")
        others = part.rows("predictors_all")
        differ = study_words.disagreements(law) if law.has_fit else []
        return join(
            [
                figure,
                Markup("<h3>Where we disagree</h3>\n{}").format(bullets(differ)) if differ else "",
                Markup("<h3>Over {}</h3>\n{}").format(_names(law.methods), _predictors(rows)),
                folded("Over all methods, also those that the paper does not pool", _predictors(others)),
                note(
                    f"paper: {published.PAPER}, Table 1; ± as printed. replication: {published.REPLICATION}; one seed, "
                    "no error given."
                ),
            ]
        )


def _predictors(rows: Sequence[dict]) -> Markup:
    over = (rows[0]["over"] if rows else None) or "none: too few runs"
    caption = (
        f"R² of a quadratic fit of forgetting, with 95 % bootstrap intervals ({over} drawn; all checkpoints of a run "
        "together). n: checkpoints (runs). “Unseen method”: each method predicted by the fit to all others; below 0 "
        "its own mean would predict better."
    )
    head = ["predictor", "inputs", "paper", "replication", "here", "unseen method", ("n", "(runs)"), "against theirs"]
    lines = []
    for row in rows:
        cells = [Cell(row["note"], "wrap", 2)]
        if row["r2"] is not None:
            left_out = words.r2(row, "left_out_r2", "left_out_low", "left_out_high")
            cells = [one(strong(words.r2(row))) + wrapped(row["note"]), one(left_out)]
        theirs = [one(study_words.published_text(row, name)) for name in ("paper", "replication")]
        count, verdict = f"{row['n']} ({row['runs']})", Cell(study_words.verdict_text(row), "wrap")
        lines.append([row["label"], row["inputs"] or "none", *theirs, *cells, count, verdict])
    return table(caption, head, lines)
