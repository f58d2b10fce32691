"""Numbers as text, and the paragraphs that say in plain words what was measured, no more than the intervals allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from robot_forgetting.metrics.resampling import LEAST_RUNS
from robot_forgetting.metrics.statistics import minimum_detectable_difference, wilson
from robot_forgetting.records.summary import DECODES
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
    curves: Sequence[dict] = (),
) -> list[str]:
    """Paragraphs about one setting, from its rows: the base, each method, what can be compared.

    Rates are those of the sampled decode; whatever was lost at either decode, or in training, is named.
    """
    decode = next((name for name in DECODES if any(row["decode"] == name for row in success)), DECODES[0])
    sampled = [row for row in success if row["decode"] == decode]
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
        told = [
            row
            for row in forgetting
            if (row["variant"], row["decode"]) == (variant, decode) and row["task"] in {one["task"] for one in prior}
        ]
        mine = [row for row in forgetting if row["variant"] == variant]
        lines = [*map(_lost, told), _more_lost(mine, told), _fell([row for row in curves if row["variant"] == variant])]
        paragraphs.append(" ".join([f"{who} solved {' and '.join(parts)}.", *filter(None, lines)]))
    if many:
        paragraphs += _ranges(sampled, forgetting, decode, curves)
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


def _ranges(sampled: Sequence[dict], forgetting: Sequence[dict], decode: str, curves: Sequence[dict]) -> list[str]:
    """A sentence per method on a sweep whose settings are too many to be told one by one."""
    sentences = []
    for method in dict.fromkeys(row["method"] for row in sampled if row["method"] != BASE):
        new = [row["rate"] for row in sampled if (row["method"], row["role"]) == (method, "new")]
        lost = [
            row["forgetting"] for row in forgetting
            if (row["method"], row["decode"], row["task"]) == (method, decode, PRIOR_MEAN)
        ]  # fmt: skip
        if not new:
            continue
        text = f"After {method} ({plural(len(new), 'setting')}) it solved the new task in {_between(new)}{SPACE}%"
        if lost:
            text += f" and had forgotten {_between(lost)} points of the prior tasks' mean"
        mine = [row for row in forgetting if row["method"] == method]
        fell = _fell([row for row in curves if row["method"] == method])
        sentences.append(" ".join(filter(None, [f"{text}.", _more_lost(mine), fell])))
    return sentences


def _more_lost(rows: Sequence[dict], told: Sequence[dict] | None = None) -> str:
    """What was lost besides ``told``: single tasks, the other decode; "" where no interval excludes zero.

    So many comparisons are looked at that some exclude zero by chance: it says how many.
    """

    def which(row: dict) -> tuple:  # a benchmark's own protocol stands in for either decode
        return row["variant"], row["task"], None if row.get("scored") else row["decode"]

    named, past = told is not None, set(map(which, told or ()))
    known = {which(row): row for row in rows if not row.get("at_chance") and which(row) not in past}
    found = sorted((row for row in known.values() if row["low"] > 0), key=lambda row: -row["forgetting"])
    if not found:
        return ""
    shown = [f"{row['task']} ({row['decode']}) {number(row['forgetting'])} points {_span(row)}" for row in found[:3]]
    more = [f"{len(found) - 3} more"] * (len(found) > 3)
    names = f": {', '.join([*shown, *more])}" if named else ""
    what = plural(len(known), "further comparison" if named else "comparison")
    return (
        f"Of {what} (tasks, their mean, decodes) {len(found)} "
        f"show{'s' if len(found) == 1 else ''} forgetting{names}; by chance one in 40 would."
    )


def _fell(curves: Sequence[dict]) -> str:
    """Runs whose training went down: rollout success in the last quarter of iterations below that in the first."""
    runs: dict[str, list[dict]] = {}
    for row in curves:
        if row.get("success") is not None:
            runs.setdefault(row["run"], []).append(row)
    falls = []
    for rows in runs.values():
        quarter = max(1, len(rows) // 4)
        first, last = (_pooled(part) for part in (rows[:quarter], rows[-quarter:]))
        # Independent episodes: Newcombe's interval of the difference of two proportions.
        if len(rows) > 1 and first[0] - last[0] > math.hypot(first[0] - first[1], last[2] - last[0]):
            falls.append((first[0], last[0]))
    if not falls:
        return ""
    first, last = (sum(values) / len(falls) for values in zip(*falls, strict=True))
    where = f"In {len(falls)} of {len(runs)} runs rollout success" if len(runs) > 1 else "Rollout success"
    return f"{where} fell during training, from {percent(first)} in the first quarter to {percent(last)} in the last."


def _pooled(rows: Sequence[dict]) -> tuple[float, float, float]:
    """Success of all rollouts of some iterations with its Wilson interval; an iteration has 100 where none says."""
    counts = [max(1, row.get("episodes") or 100) for row in rows]
    total = sum(counts)
    rate = sum(count * min(max(row["success"], 0.0), 1.0) for count, row in zip(counts, rows, strict=True)) / total
    return rate, *wilson(rate * total, total)


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
