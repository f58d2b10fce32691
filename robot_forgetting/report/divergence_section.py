"""Distances between base and final policy on named states; no law here, see ``predictor_section``."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from markupsafe import Markup

from robot_forgetting.report import words
from robot_forgetting.report.markup import Content, bullets, folded, join, note, of, table
from robot_forgetting.report.predictor_section import STATES
from robot_forgetting.report.runs import Group
from robot_forgetting.report.section import GroupedRuns, Part, Section
from robot_forgetting.report.tables import columns, final_divergence, with_base


class Divergence(Section):
    name, title, trained = "divergence", "Distance from the base policy", True

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        return {"divergence": divergence_rows(runs.groups), "undefined": undefined_rows(runs.groups)}

    def html(self, part: Part, figure: Markup) -> Content:
        rows, shown = part.rows(self.name), []
        for states in sorted({row["states"] for row in rows}, key=lambda s: STATES.index(s) if s in STATES else 9):
            mine, name = [row for row in rows if row["states"] == states], states.replace("_", "-")
            measures = list(dict.fromkeys((row["measure"], row["unit"]) for row in mine))
            lines = []
            for variant in dict.fromkeys(group.variant for group in with_base(part.groups)):
                for task, role in columns(part.runs):
                    cells = {(r["measure"], r["unit"]): r for r in mine if (r["variant"], r["task"]) == (variant, task)}
                    if cells:
                        first = next(iter(cells.values()))
                        where = task + of(words.role_name(role))
                        values = [_value(cells.get(key)) for key in measures]
                        lines.append([part.who(first), where, *values, f"{first['n']} ({first['episodes']})"])
            caption = "Distance between the action distributions of base and final policy, at states of: "
            named = [(part.measure_name(measure), unit.replace("1/", "per ")) for measure, unit in measures]
            head = ["policy", "task", *named, ("n", "states (episodes)")]
            made = table(f"{caption}{name}. Mean ± one standard error.", head, lines)
            shown.append(folded(f"The same at states of: {name}", made) if shown else made)
        said: dict[tuple[str, str], list[str]] = {}
        for row in part.rows("undefined"):
            said.setdefault((row["variant"], row["reason"]), []).append(part.measure_name(row["measure"]))
        lines = [f"{who}: {', '.join(names)}: not defined ({reason})" for (who, reason), names in said.items()]
        return join([*shown, bullets(lines) if lines else ""]) or note("No divergence was recorded.")


def undefined_rows(groups: Iterable[Group]) -> list[dict]:
    """Which measures say nothing about a policy, and why."""
    found = {}
    for group in groups:
        for run in group.runs:
            for measure, reason in (run.state.get("undefined") or {}).items():
                row = {**group.keys, "measure": measure, "reason": reason}
                found[tuple(row.values())] = row
    return list(found.values())


def _value(row: dict | None) -> Content:
    if row is None:
        return ""
    error = row["standard_error"]
    return join([words.small(row["value"]), of("" if error is None else f"± {words.small(error, 2)}")], " ")


def divergence_rows(groups: Iterable[Group]) -> list[dict]:
    """Distances between base and fine-tuned policy, of each method's final policy, on named states.

    One run: its own standard error. Several: that of their mean, sqrt(s^2 / k), and at least what their own errors say.
    """
    rows = []
    for group in groups:
        found: dict[tuple, list[dict]] = {}
        for row in (row for run in group.runs for row in final_divergence(run)):
            if "layer" not in row and row.get("states") is not None:  # by layer: ``layer_section``; None: of weights
                key = tuple(row.get(name) for name in ("task", "role", "states", "measure", "unit"))
                found.setdefault(key, []).append(row)
        for key, members in found.items():
            values = np.array([row["value"] for row in members if row.get("value") is not None], dtype=float)
            if not len(values):
                continue
            own = [row["standard_error"] for row in members if row.get("standard_error") is not None]
            floor = math.sqrt(float(np.mean(np.square(own))) / len(values)) if own else None
            spread = math.sqrt(float(values.var(ddof=1)) / len(values)) if len(values) > 1 else None
            rows.append(
                {
                    **group.keys,
                    **dict(zip(("task", "role", "states", "measure", "unit"), key, strict=True)),
                    "value": float(values.mean()),
                    "standard_error": max((error for error in (floor, spread) if error is not None), default=None),
                    "n": sum(row.get("n") or 0 for row in members),
                    "episodes": sum(row.get("episodes") or 0 for row in members),
                    "runs": len(values),
                }
            )
    return rows
