"""A sequence of tasks: success on every task after every stage, and the metrics that are made of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.records.summary import DECODES
from robot_forgetting.report import words
from robot_forgetting.report.figures import PALETTE, canvas, percent
from robot_forgetting.report.markup import Cell, Content, folded, join, of, pictured, strong, table
from robot_forgetting.report.runs import BASE, Group
from robot_forgetting.report.section import GroupedRuns, Part, Section
from robot_forgetting.report.tables import aggregate, rate

DASHES = {"new": "-", "prior": "--", "held_out": ":"}
MEANINGS = {  # see ``metrics.sequence``, with R[i,j] the success on task j after stage i, and T tasks
    "acc": "mean of R[T,j]",
    "bwt": "mean of R[T,j] - R[j,j], j < T (GEM)",
    "bwt_trace": "the same sum over T (TRACE)",
    "nbt_hu": "minus bwt",
    "nbt_libero": "what later stages took, sum over T (LIBERO)",
    "fwt_zero_shot": "mean of R[j-1,j] - R[0,j], j > 1",
    "forgetting_cw": "mean of R[j,j] - R[T,j] (Continual World)",
    "forgetting_mammoth": "mean of the best - R[T,j], j < T (mammoth)",
    "forgetting_cora": "share of the best lost, over later stages (CORA)",
    "transfer_cora": "share of the best gained, before its stage (CORA)",
    "zs": "held-out tasks after the last stage",
    "zs_change": "the same minus the base's",
}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


class Matrix(Section):
    name, title, trained = "matrix", "After every stage", True
    alt = "Success on every task over the stages of the sequence"

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        return {"matrix": matrix_rows(runs.groups), "sequence": metric_rows(runs.groups)}

    def figure(self, part: Part):
        rows = part.rows(self.name)
        decode = next((name for name in DECODES if any(row["decode"] == name for row in rows)), None)
        return over_stages([row for row in rows if row["decode"] == decode]) if decode else None

    def html(self, part: Part, figure: Markup) -> Content:
        rows = part.rows(self.name)
        if not rows:
            return ""
        shown = pictured(
            figure,
            "Success on each task after each stage (0: the base policy), with 95 % intervals; solid: tasks of the "
            "sequence, dashed: prior, dotted: held-out ones. A tick at the bottom: the stage in which it was learned.",
            wide=True,
        )
        for decode in DECODES:
            mine = [row for row in rows if row["decode"] == decode]
            variants = dict.fromkeys(row["variant"] for row in mine)
            tables = join(_heat(part, [row for row in mine if row["variant"] == variant]) for variant in variants)
            shown += tables if decode == DECODES[0] else folded(f"The same, {decode}", tables)
        return shown + _metrics(part)


def _heat(part: Part, rows: Sequence[dict]) -> Markup:
    """R of one method as a table: a line per stage, a column per task, the darker the better."""
    first, cells = rows[0], {(row["stage"], row["task"]): row for row in rows}
    tasks = {row["task"]: row["role"] for row in rows}
    lines = []
    for stage in sorted({row["stage"] for row in rows}):
        learned = next(row["learned"] for row in rows if row["stage"] == stage)
        line = ["base policy" if stage == 0 else f"{stage}: {learned}"]
        for task in tasks:
            row = cells.get((stage, task))
            if row is None:
                line.append(Cell(of("not tried"), "heat"))
                continue
            where = of(words.interval(row["low"], row["high"])) + of(f"n = {row['n']}")
            css = "heat" + " own" * (task == learned)
            line.append(Cell(strong(words.percent(row["rate"]), where), css, shade=row["rate"]))
        lines.append(line)
    head = ["after stage", *((task, words.role_name(role)) for task, role in tasks.items())]
    runs = words.plural(first["runs"], "run")
    about = f", {runs}: success after every stage, {first['decode']}; framed: just learned."
    return table(part.who(first) + about, head, lines)


def _metrics(part: Part) -> Markup:
    rows = [row for row in part.rows("sequence") if row["decode"] == part.rows("sequence")[0]["decode"]]
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = {(row["metric"], row["variant"]): row for row in rows}
    lines = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        line = [metric + of(MEANINGS.get(metric))]
        for row in (cells.get((metric, variant)) for variant in variants):
            spread = words.interval(row["least"], row["largest"], 1) if row and row["runs"] > 1 else ""
            line.append(words.number(row["value"], digits=1) + of(spread) if row else "")
        lines.append(line)
    decode = rows[0]["decode"] if rows else ""
    caption = (
        f"Metrics of the sequence in points, {decode}: one name, one definition. Mean of the runs; in brackets the "
        "least and the largest."
    )
    return table(caption, ["metric", *variants], lines)


def matrix_rows(groups: Iterable[Group]) -> list[dict]:
    """A row per method, decode, stage 0 .. T and task; none of runs of a single task.

    learned: the stage's task; role: "new" of the sequence's tasks. Intervals as in ``success``.
    """
    rows = []
    for group in groups:
        runs = [run for run in group.runs if len(run.sequence) > 1 and group.method != BASE]
        for decode in DECODES if runs else ():
            for stage in range(len(runs[0].sequence) + 1):
                for role, task in ((role, task) for role, tasks in runs[0].tasks.items() for task in tasks):
                    tried = [run.tried(run.ends[stage], task, decode) for run in runs if stage in run.ends]
                    tried = [rate(seeds) for seeds in tried if seeds]
                    if not tried:
                        continue
                    value, low, high = aggregate([[one] for one in tried])
                    row = {"decode": decode, "stage": stage, "task": task, "role": role}
                    row["learned"] = runs[0].sequence[stage - 1] if stage else None
                    row |= {"rate": value, "low": max(low, 0.0), "high": min(high, 1.0), "runs": len(tried)}
                    rows.append({**group.keys, **row, "n": sum(len(one[3]) for one in tried)})
    return rows


def metric_rows(groups: Iterable[Group]) -> list[dict]:
    """A row per method, decode and metric of ``sequence`` in summary.json: mean, least and largest of the runs."""
    rows = []
    for group in groups:
        found: dict[tuple, list[float]] = {}
        for run in group.runs:
            for decode, metrics in ((run.folder.summary() or {}).get("sequence") or {}).items():
                for name, value in metrics.items():
                    if isinstance(value, float):
                        found.setdefault((decode, name), []).append(value)
        for (decode, name), values in found.items():
            row = {**group.keys, "decode": decode, "metric": name, "value": float(np.mean(values)), "runs": len(values)}
            rows.append(row | {"least": min(values), "largest": max(values)})
    return rows


def over_stages(rows: Sequence[dict]):
    """A panel per method: success on each task over the stages, with intervals."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = min(len(variants), 2)
    lines = -(-len(variants) // columns)
    size = 9.4 if columns > 1 else 6.2, 0.5 + 3.2 * lines
    figure, cells = canvas(size, columns, lines, sharey=True)
    for axis, variant in zip(cells, variants, strict=False):
        for number, task in enumerate(tasks):
            mine = [row for row in rows if (row["variant"], row["task"]) == (variant, task)]
            if not mine:
                continue
            x, colour = [row["stage"] for row in mine], PALETTE[number % len(PALETTE)]
            y, low, high = ([row[key] for row in mine] for key in ("rate", "low", "high"))
            style = {"color": colour, "marker": MARKERS[number % len(MARKERS)], "linestyle": DASHES[mine[0]["role"]]}
            axis.plot(x, y, markersize=5, label=task, **style)
            axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
            own = [row["stage"] for row in mine if row["learned"] == task]
            axis.plot(own, [0.0] * len(own), "|", color=colour, markersize=14)
        axis.set(title=variant, xlabel="stage", ylim=(-0.03, 1.03))
        axis.xaxis.get_major_locator().set_params(integer=True)
        percent(axis, y=True)
    for axis in cells[len(variants) :]:
        axis.set_axis_off()
    figure.legend(*cells[0].get_legend_handles_labels(), loc="outside right upper")
    return figure
