"""Methods at the same new-task accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.metrics import published
from robot_forgetting.metrics.pareto import at_level, front
from robot_forgetting.metrics.resampling import LEAST_RUNS, percentiles, run_weights
from robot_forgetting.metrics.statistics import clustered_mean
from robot_forgetting.report import words
from robot_forgetting.report.figures import FAINT, INK, canvas
from robot_forgetting.report.figures import percent as percent_axis
from robot_forgetting.report.markup import Cell, join, note, of, one, strong, table, wrapped
from robot_forgetting.studies.digits.study_figures import NEW, PRIOR, bases, curve, limits, style
from robot_forgetting.studies.digits.study_law import MAIN, RESAMPLES
from robot_forgetting.studies.digits.study_runs import FIVE, Study, label, points_of
from robot_forgetting.studies.digits.study_sections import StudyPart, StudySection
from robot_forgetting.studies.digits.study_words import percent, span

TWO_BY_TWO = ("grpo", "reinforce_1_0", "simpo", "sft_1")
SIMILARITY = ("cka|prior", "cknna_intersection|prior", "cknna_union|prior", "cka|new", "cknna_intersection|new")
LEVELS = (0.85, 0.9, 0.93, 0.95, 0.96, 0.97, 0.98)
WINDOW = 0.01  # new-task accuracy around the level at which similarities are averaged


class TwoByTwo(StudySection):
    name, title, alt = "two_by_two", "On-policy data or negative examples?", "On-policy data and negative examples"

    def rows(self, study: Study) -> dict:
        four = [method for method in TWO_BY_TWO if study.of(method)]
        level = common_level(study, four) if len(four) == len(TWO_BY_TWO) else None
        return {"two_by_two": matched_rows(study, four, level) if level else []}

    def figure(self, part: StudyPart):
        """On-policy data (blue) or not (orange), with negative examples (filled, solid) or without (hollow, dashed)."""
        study, rows = part.study, part.rows("fronts")
        if not part.rows(self.name):
            return None
        ours = {row["method"]: row for row in rows}
        looks = dict(
            zip(
                TWO_BY_TWO,
                (("#0072B2", 1, "o"), ("#0072B2", 0, "v"), ("#D55E00", 1, "s"), ("#D55E00", 0, "^")),
                strict=True,
            )
        )
        figure, (left, right) = canvas((9.6, 4.9), 2, sharex=True)
        for method in TWO_BY_TWO:
            if method not in ours:
                continue
            colour, filled, marker = looks[method]
            options = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 4, "alpha": 0.45}
            options["markerfacecolor"] = colour if filled else "none"
            mine = study.of(method)
            left.plot([p["new"] for p in mine], [p["prior"] for p in mine], **options)
            known = [p for p in mine if p["predictors"].get(MAIN) is not None]
            right.plot([p["new"] for p in known], [p["predictors"][MAIN] for p in known], **options)
            line = {"color": colour, "linestyle": "-" if filled else "--"}
            curve(left, ours[method]["curve"], **line)
            what = f"{'on-policy' if colour == '#0072B2' else 'offline'}, {'' if filled else 'no '}negatives"
            face = options["markerfacecolor"]
            left.plot([], [], marker=marker, markerfacecolor=face, label=f"{label(method)} ({what})", **line)
        bases(left, study)
        for axis in (left, right):
            axis.set(xlabel=NEW)
            percent_axis(axis, x=True)
        limits(left, [p for p in study.points if p["method"] in ours and p["method"] in TWO_BY_TWO], study)
        percent_axis(left, y=True)
        left.set(title="What is kept", ylabel=PRIOR)
        right.set(title="How far it moves", ylabel="forward KL on new-task inputs, nats", ylim=(0, None))
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    def caption(self, part: StudyPart) -> str:
        n = sum(len(part.study.of(row["method"])) for row in part.rows(self.name))
        return (
            "On-policy data (blue) or not (orange), with negative examples (filled) or without (hollow). Lines: "
            f"exponentials through the points near each front. n = {n} checkpoints, {part.seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        rows = {row["method"]: row for row in part.rows(self.name)}
        missing = [label(method) for method in TWO_BY_TWO if method not in part.study.methods]
        if not rows and missing:
            return note(f"Needs runs of {', '.join(missing)}; name them in reproduce.methods.")
        if not rows:
            return note("The four methods have no new-task accuracy above the base policy's in common.")
        caption = (
            f"At {percent(next(iter(rows.values()))['level'], 0)} on the new task, the largest whole percent that all "
            "four reach: prior-task accuracy on the front, and the least forward KL with which the accuracy is "
            "reached. 95 % intervals."
        )

        def cell(row: dict) -> Markup:
            about = f"KL {kl_text(row)} nats; {words.plural(row['runs'], 'run')}, {words.plural(row['seeds'], 'seed')}"
            value = strong(percent(row["prior"]), span(row["low"], row["high"]))
            return join([part.method(row["method"]), ": ", value, of(about), of(row["note"])])

        grid = (("on-policy", "grpo", "reinforce_1_0"), ("offline", "simpo", "sft_1"))
        lines = [[name, *(cell(rows[method]) for method in pair)] for name, *pair in grid]
        return figure + table(caption, ["", "with negatives", "without"], lines)


class Similarity(StudySection):
    name, title = "similarity", "At equal new-task accuracy"
    alt = "Similarity to the base policy at matched accuracy"
    missing = "The methods have no new-task accuracy above the base policy's in common."

    def rows(self, study: Study) -> dict:
        reached = [method for method in study.methods if study.of(method)]
        level = common_level(study, [m for m in reached if m in FIVE] or reached)
        return {"matched": matched_rows(study, reached, level) if level else []}

    def figure(self, part: StudyPart):
        """CKA and CKNNA to the base policy at the same new-task accuracy, prior-task inputs, one standard error."""
        rows, methods = part.rows("matched"), part.study.methods
        if not any(row["similarity"].get("cka|prior") for row in rows):
            return None
        names = (("cka|prior", "CKA"), ("cknna_intersection|prior", "CKNNA"))
        rows = [row for row in rows if any(row["similarity"].get(name) for name, _ in names)][::-1]
        figure, axes = canvas((9.6, 1.3 + 0.3 * len(rows)), 2, sharey=True)
        for axis, (name, title) in zip(axes, names, strict=True):
            for place, row in enumerate(rows):
                value = row["similarity"].get(name)
                if value is not None:
                    colour, marker, _ = style(row["method"], methods)
                    error = value["standard_error"]
                    axis.errorbar(
                        value["mean"], place, xerr=error, color=colour, marker=marker, markersize=6, capsize=2
                    )
            axis.set(
                title=title, xlabel="similarity to the base policy (1: the same)", xlim=(None, 1.0), ylim=(-0.6, None)
            )
            axis.grid(axis="y", color=FAINT, alpha=0.15)
        axes[0].set_yticks(range(len(rows)), [label(row["method"]) for row in rows])
        return figure

    def caption(self, part: StudyPart) -> str:
        rows = part.rows("matched")
        return (
            "Similarity of the hidden layer to the base policy's on prior-task inputs, mean of the checkpoints within "
            f"1 point of {percent(rows[0]['level'], 0)} new-task accuracy (at least "
            f"{min(row['near'] for row in rows if row['near'])} per method), ± one standard error over runs; "
            f"{part.seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        rows = part.rows("matched")
        if not rows:
            return Markup()
        caption = (
            f"At {percent(rows[0]['level'], 0)} on the new task, the largest whole percent that all of the paper's "
            "methods here reach. Prior-task accuracy is read off the front of all runs of a method, the least forward "
            "KL likewise; 95 % intervals (towards the worse only, since drawn runs never have a better front than all "
            f"of them) over {'seeds and runs' if rows[0]['seeds'] > 1 else 'runs'}. Similarities to the base policy: "
            "mean ± one standard error over the checkpoints within 1 point of that accuracy."
        )
        names = {
            "cka|prior": ("CKA", "prior-task inputs"),
            "cknna_intersection|prior": ("CKNNA", "as published"),
            "cka|new": ("CKA", "new-task inputs"),
        }
        head = ["method", "prior task", ("least forward KL", "nats"), *names.values()]
        lines = []
        for row in rows:
            cells = [Cell(row["note"], span=5)]
            if row["prior"] is not None:
                value = one(strong(percent(row["prior"]), span(row["low"], row["high"])))
                similar = [one(similarity_text(row["similarity"][name])) for name in names]
                cells = [value + wrapped(row["note"]), one(kl_text(row)), *similar]
            lines.append([part.method(row["method"]), *cells, str(row["near"]) + of(f"{row['runs']} ({row['seeds']})")])
        theirs = ", ".join(
            f"{'SFT' if row['method'] == 'sft' else label(row['method'])} {row['value']}" for row in published.CKNNA
        )
        about = f"The paper's CKNNA is of a language model on Wikipedia paragraphs at equal new-task success: {theirs}."
        shown = table(caption, [*head, ("checkpoints near", "runs (seeds)")], lines)
        return shown + figure + note(f"{about} Only the order can be compared.")


class Teacher(StudySection):
    name, title, wide = "teacher", "SFT on an RL teacher", False
    alt = "SFT on the samples of an RL-trained teacher"

    def figure(self, part: StudyPart):
        """Students that clone an RL-trained teacher's samples, the teacher's own way, and its method's runs."""
        study, rows = part.study, part.rows("fronts")
        if not {"sft_teacher", "grpo"} <= set(study.methods):
            return None
        taught = [point for run in study.teacher for point in points_of(run, [])]
        figure, (axis,) = canvas((6.8, 4.9))
        own = taught[0]["method"] if taught else "grpo"
        for method in dict.fromkeys((own, "sft_teacher")):
            colour, marker, dash = style(method, study.methods)
            mine = study.of(method)
            name = f"{label(method)}, all runs" if method == own else "its students, all runs"
            options = {"linestyle": "none", "marker": marker, "color": colour, "markersize": 4, "alpha": 0.4}
            axis.plot([p["new"] for p in mine], [p["prior"] for p in mine], **options)
            fitted = next((row["curve"] for row in rows if row["method"] == method), [])
            curve(axis, fitted, color=colour, linestyle=dash)
            axis.plot([], [], color=colour, marker=marker, linestyle=dash, label=name)
        for seed in dict.fromkeys(point["seed"] for point in taught):
            mine = [point for point in taught if point["seed"] == seed]
            x, y = [p["new"] for p in mine], [p["prior"] for p in mine]
            axis.plot(x, y, color=INK, linewidth=1, marker="o", markersize=3.5, alpha=0.9)
            axis.plot(x[-1], y[-1], color=INK, marker="*", markersize=12, linestyle="none")
        if taught:
            axis.plot([], [], color=INK, marker="*", linewidth=1, markersize=9, label="the teacher, over its training")
        limits(axis, [p for p in study.points if p["method"] in (own, "sft_teacher")] + list(taught), study)
        axis.set(xlabel=NEW, ylabel=PRIOR)
        percent_axis(axis, x=True, y=True)
        figure.legend(loc="outside lower center", ncols=3)
        return figure

    def caption(self, part: StudyPart) -> str:
        return (
            "SFT on labels sampled from a policy that was trained by RL, beside that teacher and its method. n = "
            f"{len(part.study.of('sft_teacher'))} checkpoints of students, {part.seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        said = "The paper: SFT on samples of an RL-trained teacher has the teacher's trade-off (Figure 9)."
        return figure and figure + note(said)


def common_level(study: Study, methods: Sequence[str]) -> float | None:
    """The largest whole percent of new-task accuracy that all the methods reach, above every base; None without one."""
    tops = [max((point["new"] for point in study.of(method)), default=0.0) for method in methods]
    if not tops or not all(tops):
        return None
    level = int(min(tops) * 100 + 1e-9) / 100
    base = max(point["base_new"] for method in methods for point in study.of(method))
    return level if level > base else None


def matched_rows(study: Study, methods: Sequence[str], level: float) -> list[dict]:
    """Per method at one new-task accuracy: prior-task accuracy on its front, least forward KL, similarities to base.

    The front is read by ``pareto.at_level``, over all runs of the method; the least KL is the front of (accuracy, -KL).
    Similarities are means over the checkpoints within 1 point of the level. Intervals: seeds and runs drawn, 95 %.
    """
    rows = []
    for method in methods:
        mine = study.of(method)
        prior = _at(mine, lambda p: p["prior"], level)
        nearest = _at(mine, lambda p: _minus(p["predictors"].get(MAIN)), level)
        near = [point for point in mine if abs(point["new"] - level) <= WINDOW + 1e-9]
        row = {"method": method, "level": level, "runs": len({point["run"] for point in mine})}
        row |= {"seeds": len({point["seed"] for point in mine}), "prior": prior[0], "low": prior[1], "high": prior[2]}
        row |= {"forward_kl": _minus(nearest[0]), "kl_low": _minus(nearest[2]), "kl_high": _minus(nearest[1])}
        row["near"] = len(near)
        row["similarity"] = {name: _clustered(near, name) for name in SIMILARITY}
        top = max((point["new"] for point in mine), default=None)
        row["note"] = ""
        if prior[0] is None:
            row["note"] = "no checkpoint" if top is None else f"reaches {100 * top:.1f} % only"
        elif prior[1] is None:
            row["note"] = f"no interval: needs {LEAST_RUNS} runs that reach the level"
        rows.append(row)
    return rows


def level_rows(study: Study, methods: Sequence[str]) -> list[dict]:
    """Prior-task accuracy on each method's front at round levels of new-task accuracy that two methods reach."""
    base = max((point["base_new"] for point in study.points), default=1.0)
    found = []
    for level in LEVELS:
        able = [m for m in methods if max(point["new"] for point in study.of(m)) >= level > base]
        for method in able if len(able) > 1 else ():
            value, low, high = _at(study.of(method), lambda p: p["prior"], level)
            found.append({"method": method, "level": level, "prior": value, "low": low, "high": high})
    return found


def _at(points: list[dict], value: Callable[[dict], float | None], level: float):
    """(value on the front at the level, low, high); None where there is none."""
    of_run: dict[tuple, list[tuple[float, float]]] = {}
    for point in points:
        if (y := value(point)) is not None:
            of_run.setdefault((point["run"], point["seed"]), []).append((point["new"], y))
    found = _reading([pair for pairs in of_run.values() for pair in pairs], level)
    reach = [key for key, pairs in of_run.items() if max(x for x, _ in pairs) >= level]
    if found is None or len(reach) < LEAST_RUNS:
        return found, None, None
    # A point that its own run beats is on no front.
    of_run = {key: [pairs[i] for i in front(pairs)] for key, pairs in of_run.items()}
    generator = np.random.default_rng(0)
    weights = run_weights([seed for _, seed in of_run], resamples=RESAMPLES, generator=generator)
    values = []
    for row in weights:
        drawn = [pair for pairs, w in zip(of_run.values(), row, strict=True) if w for pair in pairs]
        read = _reading(drawn, level)
        values.append(np.nan if read is None else read)
    low, high = percentiles(np.array(values), 0.95) or (None, None)
    return found, low, high


def _reading(pairs: Sequence[tuple[float, float]], level: float) -> float | None:
    """``at_level``; a method all of whose checkpoints are further on is read at its leftmost."""
    if not pairs:
        return None
    return at_level(pairs, max(level, min(x for x, _ in pairs)))


def _clustered(points: list[dict], name: str) -> dict | None:
    used = [point for point in points if point["predictors"].get(name) is not None]
    if not used:
        return None
    mean, error = clustered_mean([p["predictors"][name] for p in used], [p["run"] for p in used])
    return {"mean": mean, "standard_error": error, "n": len(used)}


def _minus(value: float | None) -> float | None:
    return None if value is None else -value


def similarity_text(value: dict | None) -> str:
    if value is None:
        return "n/a"
    error = "" if value["standard_error"] is None else f" ± {value['standard_error']:.2f}"
    return f"{value['mean']:.2f}{error}"


def kl_text(row: dict) -> str:
    if row["forward_kl"] is None:
        return "n/a"
    where = f" [{words.small(row['kl_low'], 2)}, {words.small(row['kl_high'], 2)}]" if row["kl_low"] is not None else ""
    return words.small(row["forward_kl"]) + where
