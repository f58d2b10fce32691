"""Success of the base policy and of each method's final policy, per task and decode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from robot_forgetting.records.summary import DECODES
from robot_forgetting.report import words
from robot_forgetting.report.figures import INK
from robot_forgetting.report.markup import Cell, Content, join, note, of, strong, table
from robot_forgetting.report.runs import BASE, Group, Run
from robot_forgetting.report.section import GroupedRuns, Part, Section
from robot_forgetting.report.tables import PRIOR_MEAN, Single, collected, columns, rate, silent, with_base


class Success(Section):
    name, title = "success", "Success"

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        return {"success": success_rows(runs.groups)}

    def html(self, part: Part, figure: Markup) -> Content:
        def cell(row: dict) -> Content:
            colour = part.colours.colour(row["method"])
            strip = strip_of([run["rate"] for run in row["per_run"]], row["low"], row["high"], colour)
            where = words.interval(row["low"], row["high"])
            return strong(words.percent(row["rate"]), strip, of(where), of(f"n = {row['n']}"))

        def line_note(row: dict) -> str:
            return "" if row["method"] == BASE else words.plural(row["runs"], "run")

        what = "Share of episodes that succeed"
        tables = wide(part, self.name, what, cell, "not tried", line_note, "; dots are runs, the bar the interval")
        return tables + note(words.no_signal(list(silent(part.runs).values()))) or note("No evaluated episodes yet.")


def success_rows(groups: Iterable[Group]) -> list[dict]:
    """A row per policy, decode and task; the base policy's episodes of all runs of a setting are pooled."""
    rows = []
    for group in with_base(groups):

        def single(run: Run, task: str, decode: str, group: Group = group) -> Single | None:
            seeds = _outcomes(group, run, task, decode)
            return rate(seeds) if seeds else None

        for found in collected(group, single):
            value, low, high = found.mean()
            counts = [sum(len(one[3]) for one in tasks) for tasks in found.per_run]
            rows.append(
                {
                    **found.head,
                    "rate": value,
                    "low": max(low, 0.0),
                    "high": min(high, 1.0),
                    "interval": _interval_name(len(found.runs), len(found.tasks)),
                    "per_run": [row | {"n": n} for row, n in zip(found.per_run_rows("rate"), counts, strict=True)],
                }
            )
    return rows


def _outcomes(group: Group, run: Run, task: str, decode: str) -> dict[int, bool]:
    if group.method != BASE:
        return run.tried(run.final, task, decode) if run.final else {}
    pooled: dict[int, bool] = {}
    for other in group.runs:  # every run holds a copy of the base policy's episodes, or a part of them
        pooled = {**other.tried((0, 0), task, decode), **pooled}
    return pooled


def _interval_name(runs: int, tasks: int) -> str:
    if runs > 1:
        return "t over runs and initial states"
    return "Wilson" if tasks == 1 else "Wilson limits of each task, squared and added (MOVER)"


def wide(
    part: Part,
    name: str,
    what: str,
    cell: Callable[[dict], Content],
    without: str,
    line_note: Callable[[dict], str] = lambda row: "",
    more: str = "",
) -> Markup:
    """Rows of a table as one HTML table per decode: a line per policy, a cell per task; ``without``: of no row."""
    rows, tables = part.rows(name), []
    cols = [(task, role) for task, role in columns(part.runs) if name == "success" or role != "new"]
    head = ["policy", *(_column(task, role) for task, role in cols)]
    for decode in DECODES:
        lines = []
        for variant in dict.fromkeys(group.variant for group in with_base(part.groups)):
            cells = {row["task"]: row for row in rows if (row["decode"], row["variant"]) == (decode, variant)}
            if cells:
                first = next(iter(cells.values()))
                shown = [_cell(cells.get(task), task, cell, without) for task, _ in cols]
                lines.append([part.who(first) + of(line_note(first)), *shown])
        tables.append(table(f"{what}. Decode: {decode} ({_how(part.runs, decode)}){more}.", head, lines))
    return join(tables)


def _column(task: str, role: str) -> Cell:
    name = join(task.split("_"), Markup("_<wbr>"))
    role = Markup('<span class="role">{}</span>').format("" if task == PRIOR_MEAN else words.role_name(role))
    return Cell(name + role, "mean" * (task == PRIOR_MEAN))


def _cell(row: dict | None, task: str, cell: Callable[[dict], Content], without: str) -> Cell:
    if row is None:
        return Cell(of(without), "mean" * (task == PRIOR_MEAN))
    return Cell(cell(row), "mean" if task == PRIOR_MEAN else "silent" * row["at_chance"])


def _how(runs: Sequence[Run], decode: str) -> str:
    """At which temperature."""
    how = "temperature 0"
    if decode == "sampled":
        temperatures = sorted({float((run.state.get("decode") or {}).get("temperature", 1.0)) for run in runs})
        how = f"temperature {' or '.join(map(str, temperatures))}" + ", as in rollouts" * (temperatures == [1.0])
    return how + "; benchmarks by their own protocol" * any(run.state.get("protocols") for run in runs)


def strip_of(values: Sequence[float], low: float | None, high: float | None, colour: str) -> Markup:
    """A 92 x 12 px mark for a table cell: interval as a line, one dot per run, on a scale from 0 to 1."""

    def x(value: float) -> float:
        return 4 + 84 * min(max(value, 0.0), 1.0)

    parts = ['<line x1="4" x2="88" y1="6" y2="6" class="scale"/>']
    if low is not None and high is not None:
        ends = f'x1="{x(low):.1f}" x2="{x(high):.1f}" y1="6" y2="6"'
        parts.append(f'<line {ends} stroke="{colour}" stroke-width="3" opacity=".45"/>')
    parts += [f'<circle cx="{x(value):.1f}" cy="6" r="2.6" fill="{colour}"/>' for value in values]
    head = '<svg class="strip" viewBox="0 0 92 12" width="92" height="12" aria-hidden="true">'
    return Markup((head + "".join(parts) + "</svg>").replace(INK, "currentColor"))
