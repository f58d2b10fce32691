"""Numbers as text, and the paragraphs that say in plain words what was measured, no more than the intervals allow."""

from __future__ import annotations

from collections.abc import Sequence

from robot_forgetting.metrics.resampling import LEAST_RUNS
from robot_forgetting.metrics.statistics import minimum_detectable_difference
from robot_forgetting.report.comparison import MOST_COMPARED
from robot_forgetting.report.runs import BASE
from robot_forgetting.report.tables import PRIOR_MEAN

MINUS = "\N{MINUS SIGN}"
SQUARED = "\N{SUPERSCRIPT TWO}"
SPACE = "\N{NO-BREAK SPACE}"
ENOUGH_CHECKPOINTS = 10  # for a law of forgetting


def percent(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.0f}{SPACE}%"


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


def reading(
    policy: str,
    new_task: str,
    success: Sequence[dict],
    forgetting: Sequence[dict],
    matched: Sequence[dict],
    fit: dict | None,
) -> list[str]:
    """Paragraphs about one setting, from its rows (sampled decode): the base, each method, what can be compared."""
    sampled = [row for row in success if row["decode"] == "sampled"]
    paragraphs = []
    variants = dict.fromkeys(row["variant"] for row in sampled)
    many = len(variants) > MOST_COMPARED + 1  # and the base
    for variant in variants:
        if many and not variant.startswith(BASE):
            continue
        mine = [row for row in sampled if row["variant"] == variant]
        is_base = mine[0]["method"] == BASE
        new = [row for row in mine if row["role"] == "new"]
        prior = [row for row in mine if row["task"] == PRIOR_MEAN] or [
            row for row in mine if row["role"] == "prior" and not row.get("at_chance")
        ]
        parts = [f"{'the new task ' * bool(prior)}{row['task']} in {_rate(row)}" for row in new] if is_base else []
        parts += [f"{row['task'] if len(new) > 1 else 'the new task'} in {_rate(row)}" for row in new if not parts]
        for row in prior:
            which = "the prior tasks on average" if row["task"] == PRIOR_MEAN else f"the prior task {row['task']}"
            parts.append(f"{which} in {_rate(row)}")
        if not parts:
            continue
        if is_base:
            trained = any(row["method"] != BASE for row in sampled)
            who = f"Before fine-tuning, the base policy {policy}" if trained else f"The policy {policy}"
            who += variant.removeprefix(BASE)
        else:
            who = f"After {variant} ({plural(max(row['runs'] for row in mine), 'run')}) it"
        lost = [
            _lost(row)
            for row in forgetting
            if (row["variant"], row["decode"]) == (variant, "sampled") and row["task"] in {one["task"] for one in prior}
        ]
        paragraphs.append(" ".join([f"{who} solved {' and '.join(parts)}.", *lost]))
    if many:
        paragraphs += _ranges(sampled, forgetting)
    if paragraphs:
        paragraphs[0] += " Brackets hold 95 % intervals."
    for row in matched:
        if row["level"] is None:
            pair = f"{row['first']} and {row['second']}"
            paragraphs.append(f"{pair} cannot be compared at equal new-task success: {row['note']}.")
        elif row["note"]:
            paragraphs.append(_matched(row))
    if fit is not None and fit["r2"] is not None and enough(fit):
        where = f" [{fit['low']:.2f}, {fit['high']:.2f}]" if fit["low"] is not None else ""
        paragraphs.append(
            f"Over {fit['n']} checkpoints of {plural(fit['runs'], 'run')}, a quadratic function of the forward KL on "
            f"new-task inputs accounts for R{SQUARED} = {fit['r2']:.2f}{where} of the variation in forgetting."
        )
    return paragraphs or [f"Nothing was evaluated yet on {new_task}."]


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


def detectable(rows: Sequence[dict]) -> str | None:
    """The smallest single-task difference that one run's episodes can show."""
    rows = [row for row in rows if (row["decode"], row["role"]) == ("sampled", "prior") and row["task"] != PRIOR_MEAN]
    rows = [row for row in rows if not row.get("at_chance")]
    if not rows:
        return None
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


def _ranges(sampled: Sequence[dict], forgetting: Sequence[dict]) -> list[str]:
    """A sentence per method on a sweep whose settings are too many to be told one by one."""
    sentences = []
    for method in dict.fromkeys(row["method"] for row in sampled if row["method"] != BASE):
        new = [row["rate"] for row in sampled if (row["method"], row["role"]) == (method, "new")]
        lost = [
            row["forgetting"] for row in forgetting
            if (row["method"], row["decode"], row["task"]) == (method, "sampled", PRIOR_MEAN)
        ]  # fmt: skip
        if not new:
            continue
        text = f"After {method} ({plural(len(new), 'setting')}) it solved the new task in {_between(new)}{SPACE}%"
        if lost:
            text += f" and had forgotten {_between(lost)} points of the prior tasks' mean"
        sentences.append(f"{text}.")
    return sentences


def _between(values: Sequence[float]) -> str:
    """'29' or '29 to 93', in percent or points."""
    return " to ".join(dict.fromkeys((number(min(values)), number(max(values)))))


def _rate(row: dict) -> str:
    return f"{percent(row['rate'])} of {row['n']} episodes {interval(row['low'], row['high'])}"


def _span(row: dict) -> str:
    return f"[{number(row['low'], True)}, {number(row['high'], True)}]"


def _lost(row: dict) -> str:
    which = "prior-task success" if row["task"] == PRIOR_MEAN else f"success on {row['task']}"
    if row["low"] > 0:
        return f"It forgot {number(row['forgetting'])} points of {which} on paired initial states {_span(row)}."
    if row["high"] < 0:
        gained = number(-row["forgetting"])
        return f"Its {which} rose by {gained} points on paired initial states (forgetting {_span(row)})."
    return (
        f"Its forgetting of {which}, {number(row['forgetting'], True)} points {_span(row)}, cannot be told from none."
    )


def _matched(row: dict) -> str:
    text = (
        f"At the same new-task success of {percent(row['level'])}, prior-task success was "
        f"{percent(row['first_prior'])} with {row['first']} and {percent(row['second_prior'])} with {row['second']}"
    )
    difference = f"{number(row['difference'], True)} points {_span(row)}"
    verdict = "which excludes zero" if row["low"] > 0 or row["high"] < 0 else "not told apart"
    runs = "; the interval does not cover other training seeds" if row["over"] == "initial states only" else ""
    return f"{text}: {difference}, {verdict}{runs}."
