"""R of a sequence: success on every task after every stage, and the metrics that are computed from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean

from robot_forgetting.metrics.sequence import sequence_metrics

KEPT = ("n", "successes", "rate", "low", "high")


def matrix(success: Iterable[Mapping], roles: Mapping[str, Sequence[str]], stages: int) -> dict[str, dict]:
    """{"sequence", "prior", "held_out"} -> {"tasks": names, decode: R}.

    success: rows of ``summary.success_table``; roles: those of the whole run
    R: [stages + 1][tasks], rows from the base policy (0) on; {"n", "successes", "rate", "low", "high"} at its end,
    with Wilson's interval, or None where nothing was measured
    """
    rows = list(success)
    last: dict[int, int] = {}
    for row in rows:
        last[row["stage"]] = max(last.get(row["stage"], 0), row["iteration"])
    cells: dict[str, dict[tuple, dict]] = {}
    for row in rows:
        if row["iteration"] == last[row["stage"]]:
            cells.setdefault(row["decode"], {})[row["stage"], row["task"]] = {key: row[key] for key in KEPT}
    found = {}
    for role, tasks in roles.items():
        met = {
            decode: [[known.get((stage, task)) for task in tasks] for stage in range(stages + 1)]
            for decode, known in cells.items()
            if any(task in tasks for _, task in known)
        }
        found["sequence" if role == "new" else role] = {"tasks": list(tasks), **met}
    return found


def metrics_of(R: Mapping[str, dict]) -> dict[str, dict]:
    """Decode -> metrics, each under the name of its definition (``metrics.sequence``), where every task was measured.

    zs, zs_change: mean success on the held-out tasks after the last stage, and its difference to the base's
    """
    found = {}
    for decode in (decode for decode in R["sequence"] if decode != "tasks"):
        rates = _rates(R["sequence"][decode])
        if rates is None:
            continue
        found[decode] = sequence_metrics(rates[0], rates[1:])
        held_out = _rates(R.get("held_out", {}).get(decode, [[None]]))
        if held_out is not None:
            first, end = mean(held_out[0]), mean(held_out[-1])
            found[decode] |= {"zs": end, "zs_change": end - first}
    return found


def _rates(rows: Sequence[Sequence[Mapping | None]]) -> list[list[float]] | None:
    if any(cell is None for row in rows for cell in row):
        return None
    return [[cell["rate"] for cell in row] for row in rows]
