"""Numbers, names and short remarks as text."""

from __future__ import annotations

from collections.abc import Sequence

from robot_forgetting.metrics.resampling import LEAST_RUNS
from robot_forgetting.metrics.statistics import minimum_detectable_difference
from robot_forgetting.report.tables import PRIOR_MEAN

MINUS = "\N{MINUS SIGN}"
SQUARED = "\N{SUPERSCRIPT TWO}"
SPACE = "\N{NO-BREAK SPACE}"
ENOUGH_CHECKPOINTS = 10  # for a law of forgetting
# Titles of what was measured before runs declared them.
MEASURES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "total_variation": "total variation",
    "l2": "L2",
    "cknna_intersection": "CKNNA (mask as published)",
    "cknna_union": "CKNNA (mask as replicated)",
    "cka_debiased": "CKA (linear, debiased)",
    "activation_l2_relative": "change of states",
    "weight_l2_relative": "change of weights",
}
ROLES = {"new": "new task", "prior": "prior task", "text": "held-out text"}


def measure_name(measure: str) -> str:
    return MEASURES.get(measure, measure)


def role_name(role: str) -> str:
    return ROLES.get(role, role.replace("_", "-"))


def states_name(states: str) -> str:
    return "" if states == "text" else states.replace("_", "-")


def some(ids: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def plain(value) -> str:
    """A value of a row as it is, numbers to four digits."""
    if value is None or isinstance(value, (str, bool, int)):
        return "n/a" if value is None else str(value)
    return small(value, 4) if isinstance(value, float) else f"{len(value)} values"


def percent(value: float | None, digits: int = 0) -> str:
    return "n/a" if value is None else f"{100 * value:.{digits}f}{SPACE}%"


def number(value: float | None, signed: bool = False, digits: int = 0) -> str:
    """A rate or a difference in points, without unit: 29, -3, +4."""
    if value is None:
        return "n/a"
    text = f"{100 * value:{'+' * signed}.{digits}f}"
    text = {"-0": "0", "+0": "0"}.get(text, text)
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None, digits: int = 0) -> str:
    if low is None and high is None:
        return ""
    low, high = ("" if end is None else number(end, digits=digits) for end in (low, high))
    return f"[{low}, {high}]"


def small(value: float | None, digits: int = 3) -> str:
    """Significant digits: 0.0123, 1.20, 456."""
    if value is None:
        return "n/a"
    if value != 0 and abs(value) < 1e-4:
        return f"{value:.1e}"
    return f"{value:#.{digits}g}".rstrip(".") if value else "0"


def two(value: float) -> str:
    """Two decimals; how far below -1 an R^2 lies says nothing but that the fit is useless there."""
    if value < -1:
        return f"< {MINUS}1"
    return f"{value:.2f}".replace("-", MINUS)


def r2(row: dict, name: str = "r2", low: str = "low", high: str = "high") -> str:
    if row.get(name) is None:
        return "n/a"
    where = f" [{two(row[low])}, {two(row[high])}]" if row.get(low) is not None else ""
    return two(row[name]) + where


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def enough(fit: dict) -> bool:
    """Fewer points fit a curve of three coefficients too well, whatever they are."""
    return fit["n"] >= ENOUGH_CHECKPOINTS and fit["runs"] >= LEAST_RUNS


def too_few(fits: Sequence[dict]) -> str:
    """What a table of fits says of itself where none is over enough; "" where one is."""
    if not fits or any(map(enough, fits)):
        return ""
    most = max(fits, key=lambda fit: (fit["n"], fit["runs"]))
    return (
        f"Too few for a law: {most['n']} checkpoints of {plural(most['runs'], 'run')} at most, where "
        f"{ENOUGH_CHECKPOINTS} of {LEAST_RUNS} are the least; a curve of three coefficients fits few points too well, "
        "whatever they are."
    )


def detectable(rows: Sequence[dict]) -> str:
    """The smallest single-task difference that one run's episodes can show."""
    rows = [row for row in rows if (row["decode"], row["role"]) == ("sampled", "prior") and row["task"] != PRIOR_MEAN]
    rows = [row for row in rows if not row.get("at_chance")]
    if not rows:
        return ""
    row = min(rows, key=lambda row: row["n"] / row["runs"])
    n, rate = round(row["n"] / row["runs"]), min(max(row["base"], 0.05), 0.95)
    points = minimum_detectable_difference(n, rate)
    return (
        f"With {n} episodes per task and run, and the outcomes of base and fine-tuned policy taken for independent, a "
        f"change of less than {number(points)} points on one task would be missed in more than one of five repetitions."
    )


def no_signal(rows: Sequence[dict]) -> str:
    """What the greyed-out columns are; "" where there are none."""
    if not rows:
        return ""
    guessed = ", ".join(
        f"{row['task']} ({percent(row['rate'])} of {row['n']} items {interval(row['low'], row['high'])}, "
        f"guessing {percent(row['chance'])})"
        for row in rows
        if "chance" in row
    )
    cut = ", ".join(f"{row['task']} ({row['prompts_cut']} of {row['n']})" for row in rows if "prompts_cut" in row)
    said = [f"on {guessed} the base policy cannot be told from guessing"] if guessed else []
    said += [f"prompts of {cut} are longer than what the policy reads, their beginnings were cut off"] if cut else []
    return (
        f"Greyed out: {'; '.join(said)}. What such a benchmark shows is no forgetting and no retention; it is part of "
        "no mean."
    )
