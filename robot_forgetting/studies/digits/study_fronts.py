"""New-task against prior-task accuracy: every method's front."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from robot_forgetting.metrics import published
from robot_forgetting.metrics.pareto import front_curve
from robot_forgetting.report import words
from robot_forgetting.report.figures import canvas
from robot_forgetting.report.figures import percent as percent_axis
from robot_forgetting.report.markup import bullets, join, note, of, paragraph, strong, table
from robot_forgetting.studies.digits.study_figures import NEW, PRIOR, bases, curve, limits, style
from robot_forgetting.studies.digits.study_matched import level_rows
from robot_forgetting.studies.digits.study_runs import FIVE, Study, label
from robot_forgetting.studies.digits.study_sections import StudyPart, StudySection
from robot_forgetting.studies.digits.study_words import percent, span

PANELS = (
    ("The paper's methods", FIVE),
    ("Own samples, negative examples", ("reinforce_1_0", "simpo", "self_sft", "iterative_sft")),
    ("Other labels, penalties", ("sft_oracle_soft", "sft_teacher", "sft_kl")),
)


class StudyFronts(StudySection):
    name, title, alt = "fronts", "New task against prior task", "New-task against prior-task accuracy"

    def rows(self, study: Study) -> dict:
        reached = [method for method in study.methods if study.of(method)]
        return {"fronts": front_rows(study), "levels": level_rows(study, reached)}

    def figure(self, part: StudyPart):
        """Faint all checkpoints, strong those near their front, curves with bands."""
        study, rows = part.study, part.rows(self.name)
        if not study.points:
            return None
        ours = {row["method"]: row for row in rows}
        panels = _panels(study)
        lines = -(-len(panels) // 2)
        size = (6.6, 5.2) if len(panels) == 1 else (9.6, 0.7 + 4.2 * lines)
        figure, cells = canvas(size, min(len(panels), 2), lines, sharey=True)
        axes, legend = cells[: len(panels)], {}
        for axis, (title, methods) in zip(axes, panels, strict=True):
            for method in methods:
                colour, marker, dash = style(method, study.methods)
                _front(axis, study.of(method), ours[method], colour, marker, dash)
                line = axis.plot([], [], color=colour, marker=marker, linestyle=dash, markersize=5)[0]
                legend.setdefault(label(method), line)
            legend["base policy"] = bases(axis, study)
            axis.set(title=title, xlabel=NEW)
            limits(axis, study.points, study)
            percent_axis(axis, x=True, y=True)
        named = {"handles": list(legend.values()), "labels": list(legend), "handlelength": 2.8}
        for axis in cells[len(panels) :]:  # an empty last cell holds the legend
            axis.set_axis_off()
            axis.legend(loc="center", ncols=2, **named)
        if len(cells) == len(panels):
            figure.legend(loc="outside lower center", ncols=4, **named)
        for axis in axes[::2]:
            axis.set_ylabel(PRIOR)
        return figure

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


def front_rows(study: Study) -> list[dict]:
    """Per method the points within 2 points of its front, and the exponential through them with its band."""
    rows = []
    for method in study.methods:
        mine = study.of(method)
        pairs = [(point["new"], point["prior"]) for point in mine]
        curve = front_curve(pairs, [p["run"] for p in mine], [p["seed"] for p in mine])
        keys = ("run", "iteration", "new", "prior")
        rows.append(
            {
                "method": method,
                "checkpoints": len(mine),
                "runs": len({point["run"] for point in mine}),
                "kept": [{key: mine[i][key] for key in keys} for i in curve.kept],
                **{
                    key: getattr(curve, key) for key in ("n", "level", "drop", "rate", "right", "width", "over", "note")
                },
                "curve": [
                    {"new": x, "prior": y, "low": low, "high": high}
                    for x, y, low, high in zip(curve.x, curve.y, curve.low, curve.high, strict=True)
                ],
            }
        )
    return rows


def _panels(study: Study) -> list[tuple[str, list[str]]]:
    """(title, methods) of those panels that have any; the paper's two best known stand for comparison in the others."""
    panels = [(title, [m for m in study.methods if m in members]) for title, members in PANELS]
    placed = {method for _, members in PANELS for method in members}
    panels.append(("Other methods", [method for method in study.methods if method not in placed]))
    known = [method for method in ("grpo", "sft_1") if method in study.methods]
    return [(title, m if title == PANELS[0][0] else known + m) for title, m in panels if m]


def _front(axis, points: Sequence[dict], row: dict, colour: str, marker: str, dash) -> None:
    kept = {(point["run"], point["iteration"]) for point in row["kept"]}
    for near, size, alpha in ((False, 3, 0.16), (True, 4.5, 0.8)):
        mine = [p for p in points if ((p["run"], p["iteration"]) in kept) == near]
        options = {"linestyle": "none", "markeredgewidth": 0, "marker": marker, "color": colour, "zorder": 1 + near}
        axis.plot([p["new"] for p in mine], [p["prior"] for p in mine], markersize=size, alpha=alpha, **options)
    if row["curve"]:
        curve(axis, row["curve"], color=colour, linestyle=dash, zorder=3)
        band = [point for point in row["curve"] if point["low"] is not None]
        edges = ([point[key] for point in band] for key in ("new", "low", "high"))
        axis.fill_between(*edges, color=colour, alpha=0.15, linewidth=0)
