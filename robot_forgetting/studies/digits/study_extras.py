"""What the study measures besides the sweep: dynamics, precision of training, the theorem."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.metrics.statistics import bootstrap
from robot_forgetting.report import words
from robot_forgetting.report.figures import FAINT, INK, canvas
from robot_forgetting.report.figures import percent as percent_axis
from robot_forgetting.report.markup import columns, note, paragraph
from robot_forgetting.studies.digits.study_figures import PROCESSES, process_name, style
from robot_forgetting.studies.digits.study_law import OTHER_RULES, RESAMPLES
from robot_forgetting.studies.digits.study_runs import Study, label, points_of
from robot_forgetting.studies.digits.study_sections import StudyPart, StudySection
from robot_forgetting.studies.digits.study_words import percent

ARRIVED = 1e-6


class Dynamics(StudySection):
    name, title, alt = "dynamics", "Dynamics", "Cosine of steps and loss gradients over their KL change"
    missing = "No dynamics were measured (reproduce.extras.dynamics)."

    def rows(self, study: Study) -> dict:
        return {"dynamics": dynamics_rows(study) if study.dynamics else []}

    def figure(self, part: StudyPart):
        """Cosine of each measured step with the two tasks' loss gradients over the size of its KL change."""
        study, found = part.study, part.rows(self.name)
        if not found or not found[0]["n"]:
            return None
        figure, axes = canvas((9.6, 4.9), 2, sharex=True, sharey=True)
        for axis, role, title in zip(
            axes, ("prior", "new"), ("with FashionMNIST's loss", "with ParityMNIST's loss"), strict=True
        ):
            for method in dict.fromkeys(run.method for run in study.dynamics):
                colour, marker, _ = style(method, [run.method for run in study.dynamics])
                steps = [row for run in study.dynamics if run.method == method for row in run.dynamics]
                steps = [row for row in steps if row.get("kl_change") and row.get(f"cosine_{role}") is not None]
                options = {"linestyle": "none", "marker": marker, "color": colour, "markeredgewidth": 0}
                x, y = [abs(row["kl_change"]) for row in steps], [row[f"cosine_{role}"] for row in steps]
                axis.plot(x, y, markersize=4, alpha=0.55, **options)
                if role == "prior":
                    axis.plot([], [], label=label(method), markersize=5, **options)
            axis.axhline(0, color=FAINT, linewidth=0.8, alpha=0.6, zorder=0)
            axis.set(xscale="log", title=title, xlabel="size of the step's change of forward KL, nats")
        axes[0].set_ylabel("cosine of step and loss gradient (+1: uphill)")
        figure.legend(loc="outside lower center", ncols=4)
        return figure

    def caption(self, part: StudyPart) -> str:
        first, runs = part.rows(self.name)[0], part.study.dynamics
        return (
            f"One point per measured step (each {runs[0].config.get('every')}th in one epoch): the size of the change "
            "of forward KL that it made, and the cosine of the step with the gradient of each task's loss; above 0 it "
            f"goes up that loss. n = {first['n']} steps of {words.plural(first['runs'], 'run')}, "
            f"{words.plural(len({run.seed for run in runs}), 'seed')}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        caption = (
            "Rank correlation (Spearman) of the size of a step's KL change with its cosine; 95 % bootstrap over runs "
            "where there are 3 or more. The paper: larger KL steps go more towards forgetting (positive, left), the "
            "opposite for the new task."
        )

        def correlation(row: dict, role: str) -> str:
            names = [f"{role}_{name}" for name in ("correlation", "low", "high")]
            return "too few steps" if row[names[0]] is None else words.r2(row, *names)

        shown = {
            "method": lambda row: "all" if row["method"] == "all" else part.method(row["method"]),
            "prior task's loss": lambda row: correlation(row, "prior"),
            "new task's loss": lambda row: correlation(row, "new"),
            "steps (runs)": lambda row: f"{row['n']} ({row['runs']})",
        }
        return figure + columns(caption, part.rows(self.name), shown)


def dynamics_rows(study: Study) -> list[dict]:
    """Per method, or pooled: correlation over measured steps of |KL change| with each cosine.

    Spearman's rank correlation; its interval draws runs (at least 3).
    """
    runs = {run.id: _steps(run) for run in study.dynamics}
    groups = {"all": [steps for steps in runs.values() if steps]}
    for method in dict.fromkeys(run.method for run in study.dynamics):
        groups[method] = [runs[run.id] for run in study.dynamics if run.method == method and runs[run.id]]
    rows = []
    for name, members in groups.items():
        row = {"method": name, "runs": len(members), "n": sum(map(len, members))}
        for role in ("prior", "new"):
            value = _correlation(members, role)
            low, high = bootstrap(
                members, lambda drawn, role=role: _nan(_correlation(drawn, role)), resamples=RESAMPLES
            )
            row |= {f"{role}_correlation": value, f"{role}_low": low, f"{role}_high": high}
            if value is None:
                row[f"{role}_low"] = row[f"{role}_high"] = None
        rows.append(row)
    return rows


def _steps(run) -> list[dict]:
    keys = ("kl_change", "cosine_prior", "cosine_new")
    return [row for row in run.dynamics if all(row.get(key) is not None for key in keys)]


def _correlation(members: Sequence[Sequence[dict]], role: str) -> float | None:
    x, y = (np.array([row[key] for steps in members for row in steps]) for key in ("kl_change", f"cosine_{role}"))
    if len(x) < 3 or np.ptp(np.abs(x)) == 0 or np.ptp(y) == 0:
        return None
    from scipy.stats import spearmanr  # imported here: it takes a second

    return float(spearmanr(np.abs(x), y).statistic)


def _nan(value: float | None) -> float:
    return np.nan if value is None else value


class Precision(StudySection):
    name, title = "precision", "Sparsity, rank and the precision of training"
    alt = "Unchanged weights and rank of the change by precision"
    missing = "No runs in two precisions (reproduce.extras.precision)."

    def rows(self, study: Study) -> dict:
        return {"precision": precision_rows(study)}

    def figure(self, part: StudyPart):
        """Unchanged weights and rank of the change, by method and precision of the training."""
        rows = part.rows(self.name)
        if not any(row["weight_sparsity_exact"] is not None for row in rows):
            return None
        names = list(dict.fromkeys(row["method"] for row in rows))
        types = list(dict.fromkeys(row["dtype"] for row in rows))
        figure, axes = canvas((9.6, 3.9), 2)
        looks = {"float32": ("#0072B2", ""), "bfloat16": ("#E69F00", "///")}
        titles = (("weight_sparsity_exact", "Weights that did not change"), ("weight_rank", "Rank of the change"))
        for axis, (key, title) in zip(axes, titles, strict=True):
            for index, dtype in enumerate(types):
                colour, hatch = looks.get(dtype, ("#009E73", ".."))
                for place, method in enumerate(names):
                    row = next((r for r in rows if (r["method"], r["dtype"]) == (method, dtype)), None)
                    if row is None or row[key] is None:
                        continue
                    x = place + (index - (len(types) - 1) / 2) * 0.36
                    axis.bar(x, row[key], 0.33, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
                    axis.text(x, row[key] + 0.01, f"{100 * row[key]:.0f} %", ha="center", va="bottom", fontsize=9)
                if axis is axes[0]:
                    axis.bar(
                        0, 0, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=f"trained in {dtype}"
                    )
            axis.set_xticks(range(len(names)), [label(name) for name in names])
            axis.set(title=title, ylim=(0, 1.12), xlim=(-0.6, len(names) - 0.4))
            percent_axis(axis, y=True)
            axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
        axes[0].set_ylabel("share of all weights")
        axes[1].set_ylabel("share of the full rank, mean of matrices")
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    def caption(self, part: StudyPart) -> str:
        rows = part.rows(self.name)
        return (
            "Left: weights equal to the base policy's bit for bit after training in float32 and in bfloat16 (pixels "
            "that are blank in every image keep theirs in both). Right: numerical rank of the change. n = "
            f"{words.plural(len(rows), 'run')}, {words.plural(len({row['seed'] for row in rows}), 'seed')}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        named = {
            "weight_sparsity_exact": ("unchanged", "bit for bit"),
            "weight_sparsity": ("unchanged", "within 1e-5"),
            "weight_sparsity_bfloat16": ("unchanged", "rounded to bfloat16"),
            "weight_rank": ("rank", "numerical"),
            "weight_effective_rank": ("rank", "effective"),
            "new": "new task",
            "prior": "prior task",
        }
        caption = (
            "Share of weights that training left as they were, by three rules, and rank of the change (share of the "
            "full rank, mean of matrices; effective: exp of the entropy of the singular values)."
        )
        head = {"method": lambda row: part.method(row["method"]), "trained in": lambda row: row["dtype"]}
        values = {title: (lambda row, name=name: percent(row[name])) for name, title in named.items()}
        shown = columns(caption, part.rows(self.name), head | values)
        said = "The paper: sparse updates are an artefact of bfloat16; every method's update has full rank."
        return shown and figure + shown + note(said)


def precision_rows(study: Study) -> list[dict]:
    """Per method and weight precision, at the end of training: unchanged weights by three rules, rank, accuracies."""
    rows = []
    for run in study.precision:
        points = points_at_end(run)
        if points is None:
            continue
        values = points["predictors"]
        row = {"method": run.method, "dtype": run.config.get("dtype") or "float32", "seed": run.seed}
        row |= {name: values.get(f"{name}|") for name in ("weight_sparsity", "weight_rank", *OTHER_RULES)}
        rows.append(row | {"new": points["new"], "prior": points["prior"]})
    return sorted(rows, key=lambda row: (row["method"], row["dtype"] != "float32"))


def points_at_end(run) -> dict | None:
    found = points_of(run, [])
    return found[-1] if found else None


class Theorem(StudySection):
    name, title, wide = "theorem", "The theorem on a finite problem", False
    alt = "Distance to the KL-minimal optimal policy"
    missing = "The theorem was not checked (reproduce.extras.theorem)."

    def rows(self, study: Study) -> dict:
        return {"theorem": theorem_rows(study)}

    def figure(self, part: StudyPart):
        """Largest difference of a probability from argmin KL(pi || pi_0) among correct policies."""
        rows = part.study.theorem
        if not rows:
            return None
        figure, (axis,) = canvas((6.8, 4.6))
        spare = iter(("#56B4E9", "#CC79A7", "#E69F00", "#D55E00"))
        for process in dict.fromkeys(row["process"] for row in rows):
            mine = [row for row in rows if row["process"] == process and row.get("distance") is not None]
            name, colour, dash = PROCESSES.get(process) or (process.replace("_", " "), next(spare, INK), "-")
            y = [max(row["distance"], 1e-16) for row in mine]
            axis.plot([row["iteration"] for row in mine], y, color=colour, linestyle=dash, linewidth=1.8, label=name)
        axis.axhline(ARRIVED, color=FAINT, linewidth=0.8)
        axis.text(
            1.0, ARRIVED * 1.6, "10⁻⁶", transform=axis.get_yaxis_transform(), ha="right", va="bottom", color=FAINT
        )
        axis.set(yscale="log", xlabel="iteration", ylabel="largest difference of a probability\nfrom argmin KL(π ‖ π₀)")
        axis.set_ylim(5e-17, 3)
        axis.set_xlim(0, None)
        figure.legend(loc="outside lower center", ncols=2)
        return figure

    def caption(self, part: StudyPart) -> str:
        return (
            "How near each process comes to argmin KL(π ‖ π₀) among the policies that are always right, on one finite "
            "problem, computed exactly (n = 1, no seeds). Values below 1e-16 are drawn there."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        rows = part.rows(self.name)
        head = {
            "process": lambda row: process_name(row["process"]),
            "iterations": lambda row: row["iteration"],
            ("distance", "largest difference of a probability"): lambda row: words.small(row["distance"]),
            "success": lambda row: percent(row["success"], 2),
            ("KL(π ‖ π₀)", "nats"): lambda row: words.small(row["kl"], 5),
            "within 1e-6": lambda row: "yes" if row["arrives"] else "no",
        }
        caption = (
            "At the end of each process. The least KL(π ‖ π₀) of a policy that is always right is the one of those "
            "that arrive."
        )
        why = (
            "Projections and the natural gradient multiply the probabilities of all right answers by one factor, so "
            "these keep the base policy's proportions: they end at argmin KL(π ‖ π₀). The plain gradient of a softmax "
            "does not, however small its steps: of two right answers the likelier one gains. SFT ends where its "
            "labels are, whatever the base policy was."
        )
        shown = figure + columns(caption, rows, head)
        return shown and shown + paragraph(why)


def theorem_rows(study: Study) -> list[dict]:
    """Per process: largest difference of a probability from argmin KL(pi || pi_0) at its end, and the KL there."""
    keys = ("process", "iteration", "distance", "success", "kl")
    last = {row["process"]: {key: row.get(key) for key in keys} for row in study.theorem}
    return [row | {"arrives": row["distance"] is not None and row["distance"] < ARRIVED} for row in last.values()]
