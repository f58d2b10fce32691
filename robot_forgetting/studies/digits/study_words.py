"""A controlled study in plain sentences: what was found, where it disagrees with the paper, how to do it again."""

from __future__ import annotations

from collections.abc import Sequence

from robot_forgetting.report import words
from robot_forgetting.report.words import plural, r2, two
from robot_forgetting.studies.digits.study_figures import process_name
from robot_forgetting.studies.digits.study_law import Law
from robot_forgetting.studies.digits.study_runs import Study, label


def percent(value: float | None, digits: int = 1) -> str:
    """An accuracy: 83.1 %."""
    return words.percent(value, digits)


def scope(study: Study) -> str:
    parts = (("run", study.sweep), ("method", study.methods), ("seed", study.seeds), ("checkpoint", study.points))
    runs, *others = (plural(len(found), name) for name, found in parts)
    return f"{runs} of {', '.join(others)}"


def headline(tables: dict, study: Study) -> list[str]:
    """The findings, each only where its numbers are there."""
    sentences = [_base(tables["base"])] if tables["base"] and tables["base"][0]["mean"] is not None else []
    if study.law is not None:
        sentences += _law(study.law)
    if tables["matched"]:
        sentences.append(_matched(tables["matched"]))
    sentences += _two_bytwo(tables["two_by_two"])
    if tables["theorem"]:
        sentences.append(_theorem(tables["theorem"]))
    if len(study.seeds) == 1 and study.points:
        sentences.append(
            "One seed: the intervals cover learning rates and checkpoints, not another base policy or data order."
        )
    return sentences


def _base(rows: Sequence[dict]) -> str:
    new, prior = rows
    seeds = plural(len(new["per_seed"]), "seed")
    text = f"Before fine-tuning the network gets {percent(new['mean'])} of parities and {percent(prior['mean'])} of "
    text += f"garments right (mean of {seeds}); "
    if new["replication"] and prior["replication"]:
        text += f"the replication's had {percent(new['replication'], 0)} and {percent(prior['replication'], 0)}, "
    return text + "the paper does not say."


def _law(main: Law) -> list[str]:
    row = main.main
    if row is None or row["r2"] is None:
        why = main.note or (row or {}).get("note") or "forward KL was not recorded"
        return [f"There is no fit of forgetting on forward KL: {why}."]
    who = "the paper's methods" if set(main.methods) >= {"grpo", "sft_1"} else "the methods"
    text = (
        f"Over {row['n']} checkpoints of {plural(row['runs'], 'run')} ({plural(row['seeds'], 'seed')}), a quadratic of "
        f"forward KL on new-task inputs, pooled over {who}, explains R² = {r2(row)} of the variation in forgetting"
    )
    paper, replication = row["paper"], row["replication"]
    if paper and replication:
        text += f"; the paper reports {two(paper['r2'])} and the replication {two(replication['r2'])}"
        if row["low"] is None:
            text += f" ({row['note']})"
        else:
            text += f", which is {_excluded(row)}"
    sentences = [text + "."]
    ahead = [r for r in main.rows if r["r2"] is not None and r["r2"] > row["r2"]]
    if ahead:
        best = ahead[0]
        more = f", and {plural(len(ahead) - 1, 'other')} too" if len(ahead) > 1 else ""
        sentences.append(f"{_where(best, first=True)} explains more, {r2(best)}{more}.")
    else:
        sentences.append("No other predictor explains more.")
    if row["left_out_r2"] is not None:
        left = r2(row, "left_out_r2", "left_out_low", "left_out_high")
        sentences.append(f"On methods that the fit has not seen, its R² is {left}.")
    return sentences


def _excluded(row: dict) -> str:
    out = [name for name in ("paper", "replication") if row[f"{name}_verdict"] in ("higher", "lower")]
    if not out:
        return "inside our interval"
    if len(out) == 2:
        return "outside our interval in both cases"
    return f"outside our interval in the case of the {out[0]}"


def _where(row: dict, first: bool = False) -> str:
    name = row["label"]
    name = name[0].upper() + name[1:] if first else name
    return name + {"new": " on new-task inputs", "prior": " on prior-task inputs"}.get(row["inputs"], "")


def _matched(rows: Sequence[dict]) -> str:
    there = sorted((row for row in rows if row["prior"] is not None), key=lambda row: -row["prior"])
    if not there:
        return "No method reaches the others' accuracy."
    parts = [f"{label(row['method'])} {percent(row['prior'])}{span(row['low'], row['high'])}" for row in there]
    text = f"At {percent(rows[0]['level'], 0)} on the new task, accuracy on the prior task is {', '.join(parts)}"
    return f"{text}."


def span(low: float | None, high: float | None) -> str:
    return "" if low is None else f" {words.interval(low, high, 1)}"


def _two_bytwo(rows: Sequence[dict]) -> list[str]:
    cells = {row["method"]: row for row in rows}
    names = ("grpo", "reinforce_1_0", "simpo", "sft_1")
    if not all(name in cells and cells[name]["prior"] is not None for name in names):
        return []
    a, b, c, d = (cells[name] for name in names)
    data = (a["prior"] + b["prior"] - c["prior"] - d["prior"]) / 2
    negatives = (a["prior"] + c["prior"] - b["prior"] - d["prior"]) / 2
    data, negatives = words.number(data, True, 1), words.number(negatives, True, 1)
    return [
        f"At {percent(a['level'], 0)} on the new task, on-policy data goes with {data} points of prior-task accuracy "
        f"(mean of the two columns of the 2 x 2), negative examples with {negatives}."
    ]


def _theorem(rows: Sequence[dict]) -> str:
    def named(wanted: bool) -> str:
        names = [row["process"] for row in rows if row["arrives"] is wanted]
        return ", ".join(map(process_name, names))

    text = (
        f"On a finite problem, {named(True) or 'no process'} came within 1e-6 of argmin KL(π ‖ π₀) among the policies "
    )
    text += "that are always right"
    return text + (f"; {named(False)} did not." if named(False) else ".")


def disagreements(main: Law) -> list[str]:
    """Where our interval excludes the published value, the paper's first; and where nothing can be said."""
    lines = []
    for row in main.rows:
        out = [name for name in ("paper", "replication") if row[f"{name}_verdict"] in ("higher", "lower")]
        if out:
            theirs = ", ".join(
                f"{two(row[name]['r2'])} in the {name}" for name in ("paper", "replication") if has(row, name)
            )
            who = " and ".join(out)
            lines.append(
                f"{_where(row, first=True)}: {r2(row)} here, {theirs}; our interval excludes that of the {who}."
            )
    if not lines and any(row[f"{name}_verdict"] == "open" for row in main.rows for name in ("paper", "replication")):
        return ["Nothing can be said about agreement: there are too few runs for intervals."]
    return lines or ["Nowhere does our interval exclude a published value."]


def has(row: dict, name: str) -> bool:
    return bool(row.get(name)) and row[name]["r2"] is not None


def published_text(row: dict, name: str) -> str:
    theirs = row.get(name)
    if theirs is None:
        return ""
    if theirs["r2"] is None:
        return "N/A"
    return two(theirs["r2"]) + (f" ± {two(theirs['error'])}" if theirs["error"] is not None else "")


def verdict_text(row: dict) -> str:
    said = []
    for name in ("paper", "replication"):
        if row[f"{name}_verdict"]:
            word = {"higher": "ours higher", "lower": "ours lower", "agrees": "agrees", "open": "open"}
            said.append(f"{name}: {word[row[f'{name}_verdict']]}")
    return "; ".join(said)
