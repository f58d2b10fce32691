"""Numbers as text, and the paragraph that says in plain words what was measured, never more than the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence

from robot_forgetting.metrics.statistics import minimum_detectable_difference
from robot_forgetting.report.runs import BASE
from robot_forgetting.report.tables import PRIOR_MEAN

MINUS = "\N{MINUS SIGN}"


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f} %"


def number(value: float | None, signed: bool = False) -> str:
    """A rate or a difference in points, without unit: 29, -3, +4."""
    if value is None:
        return "n/a"
    text = f"{100 * value:+.0f}" if signed else f"{100 * value:.0f}"
    text = {"-0": "0", "+0": "0"}.get(text, text)
    return text.replace("-", MINUS)


def interval(low: float | None, high: float | None) -> str:
    if low is None and high is None:
        return ""
    return f"[{'' if low is None else number(low)}, {'' if high is None else number(high)}]"


def small(value: float | None) -> str:
    """Three significant digits: 0.0123, 1.23, 45.6."""
    if value is None:
        return "n/a"
    return f"{value:.3g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.1e}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def reading(
    policy: str,
    new_task: str,
    success: Sequence[dict],
    forgetting: Sequence[dict],
    matched: Sequence[dict],
    fit: dict | None,
) -> list[str]:
    """Sentences about one setting, from its rows (sampled decode)."""
    sampled = [row for row in success if row["decode"] == "sampled"]
    prior = PRIOR_MEAN if any(row["task"] == PRIOR_MEAN for row in sampled) else None
    variants = list(dict.fromkeys(row["variant"] for row in sampled))
    sentences = []
    for variant in variants:
        mine = [row for row in sampled if row["variant"] == variant]
        new = next((row for row in mine if row["role"] == "new"), None)
        rest = next((row for row in mine if row["task"] == prior or (prior is None and row["role"] == "prior")), None)
        parts = []
        if new:
            parts.append(f"the new task {new['task']} in {percent(new['rate'])} of {new['n']} episodes {_between(new)}")
        if rest:
            which = "the prior tasks, on average," if prior else f"the prior task {rest['task']}"
            parts.append(f"{which} in {percent(rest['rate'])} of {rest['n']} {_between(rest)}")
        if not parts:
            continue
        if variant == BASE:
            who = f"Before any fine-tuning the base policy {policy}"
        else:
            who = f"After fine-tuning with {variant} ({plural((new or rest)['runs'], 'run')}) it"
        sentences.append(f"{who} solved {' and '.join(parts)}.")
        lost = next((row for row in forgetting if _is(row, variant, rest)), None)
        if lost:
            sentences.append(_lost(lost))
    for row in matched:
        if row["level"] is not None and row["note"]:
            sentences.append(_matched(row))
        elif row["level"] is None:
            sentences.append(
                f"{row['first']} and {row['second']} cannot be compared at equal new-task success: {row['note']}."
            )
    if fit is not None and fit["r2"] is not None:
        where = f" (bootstrap over runs {fit['low']:.2f} to {fit['high']:.2f})" if fit["low"] is not None else ""
        sentences.append(
            f"Over {fit['n']} checkpoints of {plural(fit['runs'], 'run')}, a quadratic function of the forward KL on new-task "
            f"inputs accounts for R\N{SUPERSCRIPT TWO} = {fit['r2']:.2f}{where} of the variation in prior-task forgetting."
        )
    return sentences or [f"Nothing was evaluated yet on {new_task}."]


def detectable(rows: Sequence[dict]) -> str | None:
    """The smallest single-task difference that one run's episodes can show."""
    singles = [
        row for row in rows if row["task"] != PRIOR_MEAN and row["decode"] == "sampled" and row["role"] == "prior"
    ]
    if not singles:
        return None
    row = min(singles, key=lambda row: row["n"] / row["runs"])
    n, rate = round(row["n"] / row["runs"]), min(max(row["base"], 0.05), 0.95)
    points = minimum_detectable_difference(n, rate)
    return (
        f"With {n} episodes per task and run, and outcomes of base and fine-tuned policy taken as independent, a change of "
        f"less than {number(points)} points on one task would be missed in more than one of five repetitions."
    )


def _between(row: dict) -> str:
    return f"(95 % interval {number(row['low'])} to {number(row['high'])} %)"


def _is(row: dict, variant: str, rest: dict | None) -> bool:
    return rest is not None and (row["variant"], row["task"], row["decode"]) == (variant, rest["task"], "sampled")


def _lost(row: dict) -> str:
    span = f"[{number(row['low'], True)}, {number(row['high'], True)}]"
    if row["low"] > 0:
        return f"It forgot {number(row['forgetting'])} points of prior-task success on paired initial states {span}."
    if row["high"] < 0:
        return f"Prior-task success rose by {number(-row['forgetting'])} points on paired initial states (forgetting {span})."
    return f"Its forgetting, {number(row['forgetting'], True)} points {span}, cannot be told from none."


def _matched(row: dict) -> str:
    text = (
        f"At the same new-task success of {percent(row['level'])}, prior-task success was {percent(row['first_prior'])} with "
        f"{row['first']} and {percent(row['second_prior'])} with {row['second']}"
    )
    span = f"{number(row['difference'], True)} points [{number(row['low'], True)}, {number(row['high'], True)}]"
    verdict = "an interval that excludes zero" if row["low"] > 0 or row["high"] < 0 else "not told apart"
    runs = "" if row["over"] != "initial states only" else "; it does not cover other training seeds"
    return f"{text}: {span}, {verdict}{runs}."
