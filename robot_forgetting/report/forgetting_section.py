"""Forgetting and retention of each method's final policy, on paired initial states."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup

from robot_forgetting.metrics.statistics import ratio_interval
from robot_forgetting.report import words
from robot_forgetting.report.markup import Content, note, of, strong
from robot_forgetting.report.runs import Group, Run
from robot_forgetting.report.section import GroupedRuns, Part, Section
from robot_forgetting.report.success_section import wide
from robot_forgetting.report.tables import Collected, Single, aggregate, collected, paired, rate


class Forgetting(Section):
    name, title, trained = "forgetting", "Forgetting and retention", True

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        return {"forgetting": forgetting_rows(runs.groups)}

    def html(self, part: Part, figure: Markup) -> Content:
        def cell(row: dict) -> Content:
            change = f"{words.percent(row['base'])} to {words.percent(row['fine_tuned'])}, n = {row['n']}"
            kept = words.interval(row["retention_low"], row["retention_high"])
            kept = f"retention {words.percent(row['retention'])} {kept}"
            where = words.interval(row["low"], row["high"])
            return strong(words.number(row["forgetting"], True), " ", where, of(change), of(kept))

        what = "Forgetting in points: base minus fine-tuned success on the same initial states, with 95 % intervals"
        none = note("No fine-tuned policy was evaluated on the base policy's initial states.")
        return (wide(part, self.name, what, cell, "not paired") or none) + note(words.detectable(part.rows(self.name)))


def forgetting_rows(groups: Iterable[Group]) -> list[dict]:
    """A row per method, decode, and prior or held-out task."""

    def single(run: Run, task: str, decode: str) -> Single | None:
        return paired(run, run.final, task, decode) if run.final else None

    rows = []
    for found in (found for group in groups for found in collected(group, single, ("prior", "held_out"))):
        value, low, high = found.mean()
        base, tuned = _paired_rates(found, True), _paired_rates(found, False)
        retention = ratio_interval(tuned, base)
        rows.append(
            {
                **found.head,
                "scored": all(run.scored.issuperset(found.tasks) for run in found.runs),
                "base": base[0],
                "fine_tuned": tuned[0],
                "forgetting": value,
                "low": max(low, -1.0),
                "high": min(high, 1.0),
                "retention": tuned[0] / base[0] if base[0] else None,
                "retention_low": retention[0],
                "retention_high": retention[1],
                "per_run": found.per_run_rows("forgetting"),
            }
        )
    return rows


def _paired_rates(found: Collected, base: bool) -> tuple[float, float, float]:
    """Success with its interval on exactly the paired initial states."""
    rates = []
    for run, singles in zip(found.runs, found.per_run, strict=True):
        tried = [run.tried((0, 0) if base else run.final, task, found.decode) for task in found.tasks]
        rates.append([rate({seed: seeds[seed] for seed in one[3]}) for seeds, one in zip(tried, singles, strict=True)])
    value, low, high = aggregate(rates)
    return value, max(low, 0.0), min(high, 1.0)
