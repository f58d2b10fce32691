"""The page's lead: what was measured in plain words, no more than the intervals allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from robot_forgetting.metrics.statistics import wilson
from robot_forgetting.records.summary import DECODES
from robot_forgetting.report.front_section import MOST_COMPARED
from robot_forgetting.report.runs import BASE
from robot_forgetting.report.tables import PRIOR_MEAN
from robot_forgetting.report.words import SPACE, SQUARED, enough, interval, number, percent, plural


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
    variants = list(dict.fromkeys(row["variant"] for row in sampled))
    many = len(variants) > MOST_COMPARED + 1  # and the base
    told = [name for name in variants if not many or name.startswith(BASE)]
    paragraphs = [_solved(policy, name, sampled, forgetting, curves) for name in told]
    paragraphs = [text for text in paragraphs if text]
    if many:
        paragraphs += _ranges(sampled, forgetting, decode, curves)
    if paragraphs:
        paragraphs[0] += " Brackets hold 95 % intervals."
    paragraphs += [_matched(row) for row in matched if row["level"] is None or row["note"]]
    if fit is not None and fit["r2"] is not None and enough(fit):
        where = f" [{fit['low']:.2f}, {fit['high']:.2f}]" if fit["low"] is not None else ""
        paragraphs.append(
            f"Over {fit['n']} checkpoints of {plural(fit['runs'], 'run')}, a quadratic function of the forward KL on "
            f"new-task inputs accounts for R{SQUARED} = {fit['r2']:.2f}{where} of the variation in forgetting."
        )
    return paragraphs or [f"Nothing was evaluated yet on {new_task}."]


def _solved(
    policy: str, variant: str, sampled: Sequence[dict], forgetting: Sequence[dict], curves: Sequence[dict]
) -> str:
    """What one policy solved at one decode, and what it lost; "" where nothing was tried."""
    mine = [row for row in sampled if row["variant"] == variant]
    base, decode = mine[0]["method"] == BASE, mine[0]["decode"]
    new = [row for row in mine if row["role"] == "new"]
    prior = [row for row in mine if row["task"] == PRIOR_MEAN] or [
        row for row in mine if row["role"] == "prior" and not row.get("at_chance")
    ]
    if base:
        parts = [f"{'the new task ' * bool(prior)}{row['task']} in {_rate(row)}" for row in new]
    else:
        parts = [f"{row['task'] if len(new) > 1 else 'the new task'} in {_rate(row)}" for row in new]
    for row in prior:
        which = "the prior tasks on average" if row["task"] == PRIOR_MEAN else f"the prior task {row['task']}"
        parts.append(f"{which} in {_rate(row)}")
    if not parts:
        return ""
    who = f"After {variant} ({plural(max(row['runs'] for row in mine), 'run')}) it"
    if base:
        trained = any(row["method"] != BASE for row in sampled)
        who = f"Before fine-tuning, the base policy {policy}" if trained else f"The policy {policy}"
        who += variant.removeprefix(BASE)
    lost = [row for row in forgetting if row["variant"] == variant]
    told = [row for row in lost if row["decode"] == decode and row["task"] in {one["task"] for one in prior}]
    fell = _fell([row for row in curves if row["variant"] == variant])
    lines = [*map(_lost, told), _more_lost(lost, told), fell]
    return " ".join([f"{who} solved {' and '.join(parts)}.", *filter(None, lines)])


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
    runs: dict[tuple, list[dict]] = {}
    for row in curves:
        if row.get("success") is not None:
            runs.setdefault((row["run"], row.get("stage")), []).append(row)
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
    if row["level"] is None:
        return f"{row['first']} and {row['second']} cannot be compared at equal new-task success: {row['note']}."
    text = (
        f"At the same new-task success of {percent(row['level'])}, prior-task success was "
        f"{percent(row['first_prior'])} with {row['first']} and {percent(row['second_prior'])} with {row['second']}"
    )
    difference = f"{number(row['difference'], True)} points {_span(row)}"
    verdict = "which excludes zero" if row["low"] > 0 or row["high"] < 0 else "not told apart"
    runs = "; the interval does not cover other training seeds" if row["over"] == "initial states only" else ""
    return f"{text}: {difference}, {verdict}{runs}."
