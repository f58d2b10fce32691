"""The sections of the controlled study's page: each its tables, its figure, and what stands below the heading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from robot_forgetting.metrics import published
from robot_forgetting.report import words
from robot_forgetting.report.markup import (
    Cell,
    Content,
    bullets,
    columns,
    folded,
    join,
    note,
    of,
    one,
    paragraph,
    pictured,
    strong,
    table,
    wrapped,
)
from robot_forgetting.report.predictor_section import HEAD, transfer_cells
from robot_forgetting.report.section import Part, Section
from robot_forgetting.studies.digits import study_figures as pictures
from robot_forgetting.studies.digits import study_tables, study_words
from robot_forgetting.studies.digits.study_law import MAIN, Law
from robot_forgetting.studies.digits.study_runs import Study, label
from robot_forgetting.studies.digits.study_words import percent, span

NO_RUN = "no finished run of the sweep"


@dataclass
class StudyPart(Part):
    """The whole study."""

    study: Study | None = None
    trained = True

    def method(self, method: str) -> Markup:
        """A method's name behind its colour."""
        return self.who({"method": method, "variant": label(method)})

    @property
    def seeds(self) -> str:
        return words.plural(len(self.study.seeds), "seed")


class StudySection(Section):
    """A section with a figure that is a file, too; ``missing``: what stands there without numbers."""

    wide = True
    missing = ""

    def html(self, part: StudyPart, figure: Markup) -> Content:
        return self.content(part, self.pictured(part, figure)) or note(self.missing)

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        """HTML with the figure; empty where there are no numbers."""
        raise NotImplementedError

    def pictured(self, part: StudyPart, figure: Markup) -> Markup:
        if not figure:
            return Markup()
        file = Markup(' <span class="path">figures/{}.svg, .pdf</span>').format(self.name)
        return pictured(figure, Markup.escape(self.caption(part)) + file, self.wide)


class Accuracies(StudySection):
    name, title, missing = "base", "Accuracies", "No checkpoint with both accuracies."

    def rows(self, study: Study) -> dict:
        base = study_tables.base_rows(study) if study.points else []
        return {"base": base, "success": study_tables.success_rows(study)}

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        def seeds(row: dict) -> Markup:
            return of(", ".join(f"seed {seed['seed']}: {percent(seed['rate'])}" for seed in row["per_seed"]))

        bases = columns(
            "Base policies, test images, most likely class.",
            part.rows("base"),
            {
                "task": lambda row: row["task"] + of(words.role_name(row["role"])),
                "here": lambda row: strong(percent(row["mean"]), seeds(row)),
                "replication": lambda row: percent(row["replication"], 0),
                "paper": lambda row: "not reported",
            },
        )
        caption = (
            "Per method, the run that ended with the best accuracy on the new task (picked on the test images, so a "
            "little too high)."
        )
        shown = {
            "method": lambda row: part.method(row["method"]),
            "new task": lambda row: strong(percent(row["new"])),
            "prior task": lambda row: percent(row["prior"]),
            ("forgetting", "points"): lambda row: words.number(row["forgetting"]),
            ("forward KL", "nats"): lambda row: words.small(row["forward_kl"]),
            "runs (seeds)": lambda row: f"{row['runs']} ({row['seeds']})",
            "checkpoints": lambda row: row["checkpoints"],
        }
        return bases and bases + columns(caption, part.rows("success"), shown)


class StudyFronts(StudySection):
    name, title, alt = "fronts", "New task against prior task", "New-task against prior-task accuracy"

    def rows(self, study: Study) -> dict:
        reached = [method for method in study.methods if study.of(method)]
        return {"fronts": study_tables.front_rows(study), "levels": study_tables.level_rows(study, reached)}

    def figure(self, part: StudyPart):
        return pictures.fronts(part.study, part.rows("fronts")) if part.study.points else None

    def caption(self, part: StudyPart) -> str:
        drawn = "seeds and runs" if len(part.study.seeds) > 1 else "runs"
        return (
            "Accuracy on the new task against the prior task. Faint: every checkpoint; strong: those within 2 points "
            "of their method's front; lines: an exponential through those, with 95 % bands from drawing "
            f"{drawn} where there are 3 runs. n = {words.plural(len(part.study.points), 'checkpoint')} of "
            f"{words.plural(len(part.study.sweep), 'run')}, {part.seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        levels = list(dict.fromkeys(row["level"] for row in part.rows("levels")))
        cells: dict[str, dict] = {}
        for row in part.rows("levels"):
            cell = strong(percent(row["prior"]), of(span(row["low"], row["high"])))
            cells.setdefault(row["method"], {})[row["level"]] = cell
        caption = (
            "Prior-task accuracy on each method's front at levels of new-task accuracy (columns), with 95 % intervals "
            "where 3 runs reach the level (drawn runs never have a higher front than all of them, so these reach down "
            "only); “n/a”: never reached."
        )
        head = ["method", *(f"at {percent(level, 0)}" for level in levels)]
        lines = [[part.method(m), *(of_level.get(x, of("n/a")) for x in levels)] for m, of_level in cells.items()]
        notes = [f"{label(row['method'])}: {row['note']}." for row in part.rows("fronts") if row["note"]]
        source = {published.REPLICATION: "replication"}
        claims = [
            Markup('{} <span class="sub">({})</span>').format(row["claim"], source.get(row["source"], "paper"))
            for row in published.FRONTS
        ]
        about = paragraph("What has been published about these fronts, to hold the figure against:")
        return figure + join(map(note, notes)) + table(caption, head, lines) + about + bullets(claims)


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
        law = self.law(part)
        known = law is not None and law.points is not None and MAIN in law.points.predictors
        return pictures.forgetting_law(part.study, law) if known else None

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
        fitted = any(row["r2"] is not None for row in part.rows(self.name))
        return pictures.predictors(part.study.law) if fitted else None

    def caption(self, part: StudyPart) -> str:
        return (
            "How much of the variation in forgetting a quadratic of each predictor explains: here with 95 % intervals, "
            f"and as published. n = {max(row['n'] for row in part.rows(self.name))} checkpoints, "
            f"{part.seeds}."
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
