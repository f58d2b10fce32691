"""Figures of a controlled study: colours that colour-blind eyes tell apart, markers and dashes for a grey print."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from robot_forgetting.metrics import law
from robot_forgetting.report.figures import FAINT, INK, Colours, canvas, percent, points_axis
from robot_forgetting.report.words import r2
from robot_forgetting.studies.digits.study_law import MAIN, Law
from robot_forgetting.studies.digits.study_runs import FIVE, Study, label
from robot_forgetting.studies.digits.study_tables import TWO_BY_TWO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette. A method has its colour, marker and dash in every figure; no two share all three.
STYLES = {
    "grpo": ("#0072B2", "o", "-"),
    "grpo_kl": ("#56B4E9", "P", "--"),
    "sft_1": ("#D55E00", "s", "-."),
    "sft_2": ("#E69F00", "^", ":"),
    "sft_oracle": ("#009E73", "D", (0, (6, 2))),
    "sft_oracle_soft": ("#009E73", "d", (0, (1, 1))),
    "reinforce_1_0": ("#CC79A7", "v", "--"),
    "simpo": (INK, "X", ":"),
    "sft_teacher": ("#CC79A7", "<", "-"),
    "sft_kl": ("#E69F00", "p", (0, (1, 1))),
    "self_sft": ("#E69F00", ">", "--"),
    "iterative_sft": ("#009E73", "h", "-."),
}
OTHERS = [("#CC79A7", "*", "-"), (INK, "1", "--"), ("#56B4E9", "2", "-."), ("#009E73", "3", ":")]
PROCESSES = {
    "expectation_maximisation": ("EM (alternating projections)", "#0072B2", "-"),
    "natural_policy_gradient": ("natural policy gradient", "#009E73", "--"),
    "policy_gradient_plain": ("plain softmax policy gradient", "#D55E00", "-."),
    "sft_oracle": ("SFT, oracle's labels", INK, ":"),
    "sft_one_label": ("SFT, one label", "#CC79A7", (0, (6, 2))),
    "sft_three_labels": ("SFT, three labels", "#E69F00", (0, (1, 1))),
}
ARRIVED = 1e-6
NEW, PRIOR = "accuracy on ParityMNIST (new task)", "accuracy on FashionMNIST (prior task)"
PANELS = (
    ("The paper's methods", FIVE),
    ("Own samples, negative examples", ("reinforce_1_0", "simpo", "self_sft", "iterative_sft")),
    ("Other labels, penalties", ("sft_oracle_soft", "sft_teacher", "sft_kl")),
)


def style(method: str, known: Sequence[str] = ()) -> tuple:
    """(colour, marker, dash)."""
    if method in STYLES:
        return STYLES[method]
    unknown = [name for name in known if name not in STYLES]
    return OTHERS[unknown.index(method) % len(OTHERS)] if method in unknown else OTHERS[0]


class Styles(Colours):
    """Colours and markers of the page's methods, as in its figures."""

    def colour(self, method: str) -> str:
        return style(method, self.methods)[0]

    def marker(self, method: str) -> str:
        return style(method, self.methods)[1]


def process_name(process: str) -> str:
    return PROCESSES[process][0] if process in PROCESSES else process.replace("_", " ")


def fronts(study: Study, rows: Sequence[dict]) -> Figure:
    """New-task against prior-task accuracy: faint all checkpoints, strong those near their front, curves with bands."""
    ours = {row["method"]: row for row in rows}
    panels = _panels(study)
    lines = -(-len(panels) // 2)
    size = (6.6, 5.2) if len(panels) == 1 else (9.6, 0.7 + 4.2 * lines)
    figure, cells = canvas(size, min(len(panels), 2), lines, sharey=True)
    axes, legend = cells[: len(panels)], {}
    for axis, (title, methods) in zip(axes, panels, strict=True):
        for method in methods:
            colour, marker, dash = style(method, study.methods)
            _front(axis, study.of(method), ours[method], colour, marker, dash)
            line = axis.plot([], [], color=colour, marker=marker, linestyle=dash, markersize=5)[0]
            legend.setdefault(label(method), line)
        legend["base policy"] = _base(axis, study)
        axis.set(title=title, xlabel=NEW)
        _limits(axis, study.points, study)
        percent(axis, x=True, y=True)
    named = {"handles": list(legend.values()), "labels": list(legend), "handlelength": 2.8}
    for axis in cells[len(panels) :]:  # an empty last cell holds the legend
        axis.set_axis_off()
        axis.legend(loc="center", ncols=2, **named)
    if len(cells) == len(panels):
        figure.legend(loc="outside lower center", ncols=4, **named)
    for axis in axes[::2]:
        axis.set_ylabel(PRIOR)
    return figure


def _panels(study: Study) -> list[tuple[str, list[str]]]:
    """(title, methods) of those panels that have any; the paper's two best known stand for comparison in the others."""
    panels = [(title, [m for m in study.methods if m in members]) for title, members in PANELS]
    placed = {method for _, members in PANELS for method in members}
    panels.append(("Other methods", [method for method in study.methods if method not in placed]))
    known = [method for method in ("grpo", "sft_1") if method in study.methods]
    return [(title, m if title == PANELS[0][0] else known + m) for title, m in panels if m]


def _front(axis, points: Sequence[dict], row: dict, colour: str, marker: str, dash) -> None:
    kept = {(point["run"], point["iteration"]) for point in row["kept"]}
    for strong, size, alpha in ((False, 3, 0.16), (True, 4.5, 0.8)):
        mine = [p for p in points if ((p["run"], p["iteration"]) in kept) == strong]
        options = {"linestyle": "none", "markeredgewidth": 0, "marker": marker, "color": colour, "zorder": 1 + strong}
        axis.plot([p["new"] for p in mine], [p["prior"] for p in mine], markersize=size, alpha=alpha, **options)
    if row["curve"]:
        _curve(axis, row["curve"], color=colour, linestyle=dash, zorder=3)
        band = [point for point in row["curve"] if point["low"] is not None]
        edges = ([point[key] for point in band] for key in ("new", "low", "high"))
        axis.fill_between(*edges, color=colour, alpha=0.15, linewidth=0)


def _curve(axis, curve: Sequence[dict], **options) -> None:
    axis.plot([row["new"] for row in curve], [row["prior"] for row in curve], linewidth=1.8, **options)


def forgetting_law(study: Study, found: Law) -> Figure:
    """Left: forgetting over forward KL with the quadratic and its band. Right: what is left over."""
    figure, (left, right) = canvas((9.6, 4.9), 2)
    x, y = found.points.column(MAIN), found.points.forgetting
    rest = law.residuals(found.points, MAIN) if found.has_fit else np.full(len(y), np.nan)
    method = found.points.method
    for name in found.methods:
        colour, marker, _ = style(name, study.methods)
        mine = (method == name) & np.isfinite(x) & np.isfinite(y)
        options = {"linestyle": "none", "marker": marker, "color": colour, "markersize": 3.6, "alpha": 0.5}
        left.plot(x[mine], y[mine], markeredgewidth=0, **options)
        right.plot(x[mine], rest[mine], markeredgewidth=0, **options)
        left.plot([], [], label=label(name), **{**options, "markersize": 5, "alpha": 1})
    for axis in (left, right):
        axis.axhline(0, color=FAINT, linewidth=0.8, alpha=0.6, zorder=0)
        axis.set(xlabel="forward KL on new-task inputs, nats", xlim=(0, None))
        points_axis(axis.yaxis)
    if found.has_fit:
        grid = np.linspace(0, float(np.nanmax(x)), 120)
        fit = law.fit(found.points, MAIN)
        left.plot(grid, fit(grid), color=INK, linewidth=1.6, label="quadratic fit")
        band = law.band(found.points, MAIN, grid)
        if band is not None:
            left.fill_between(grid, *band, color=INK, alpha=0.15, linewidth=0)
        title = f"R² = {r2(found.main)} (paper {r2(found.main['paper'])}, replication {r2(found.main['replication'])})"
    else:
        title = "no fit, see above"
    fine = y[np.isfinite(x) & np.isfinite(y)]
    pad = 0.05 * (np.ptp(fine) if len(fine) else 1) + 0.005
    left.set_ylim(min(0, fine.min(initial=0)) - 2.2 * pad, fine.max(initial=0) + pad)  # a band may leave the picture
    left.set(title=title, ylabel="forgetting on FashionMNIST, points")
    right.set(title="Residuals of the fit", ylabel="forgetting minus its fit, points")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def predictors(found: Law) -> Figure:
    """R^2 of every predictor, ours with its interval beside the published values."""
    sides = [("on new-task inputs, or of the weights alone", ("new", "")), ("on prior-task inputs", ("prior",))]
    sides = [
        (title, [r for r in found.rows if r["inputs"] in inputs and (r["r2"] is not None or r["paper"])])
        for title, inputs in sides
    ]
    sides = [side for side in sides if side[1]]
    height = 1.2 + 0.27 * max(len(rows) for _, rows in sides)
    figure, axes = canvas((9.6, height), len(sides), sharex=True)
    marks = (("paper", "Table 1 of the paper", "D", "#D55E00"), ("replication", "replication", "s", "#009E73"))
    for axis, (title, rows) in zip(axes, sides, strict=True):
        for place, row in enumerate(reversed(rows)):
            if row["low"] is not None:
                axis.plot([row["low"], row["high"]], [place, place], color="#0072B2", linewidth=3.5, alpha=0.4)
            if row["r2"] is not None:
                axis.plot(row["r2"], place, marker="o", color="#0072B2", markersize=5.5)
            for key, _, marker, colour in marks:
                if row[key] and row[key]["r2"] is not None:
                    axis.plot(row[key]["r2"], place, marker=marker, markerfacecolor="none", color=colour, markersize=7)
        axis.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
        axis.tick_params(axis="y", length=0)
        axis.grid(axis="y", color=FAINT, alpha=0.15)
        axis.set(title=title, xlabel="R² of a quadratic fit of forgetting", xlim=(-0.03, 1.03), ylim=(-0.7, None))
    axes[0].plot([], [], color="#0072B2", marker="o", linewidth=3.5, label="here, with 95 % interval")
    for _, name, marker, colour in marks:
        axes[0].plot([], [], marker=marker, color=colour, markerfacecolor="none", linestyle="none", label=name)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def two_by_two(study: Study, rows: Sequence[dict]) -> Figure:
    """On-policy data (blue) or not (orange), with negative examples (filled, solid) or without (hollow, dashed)."""
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
        _curve(left, ours[method]["curve"], **line)
        what = f"{'on-policy' if colour == '#0072B2' else 'offline'}, {'' if filled else 'no '}negatives"
        face = options["markerfacecolor"]
        left.plot([], [], marker=marker, markerfacecolor=face, label=f"{label(method)} ({what})", **line)
    _base(left, study)
    for axis in (left, right):
        axis.set(xlabel=NEW)
        percent(axis, x=True)
    _limits(left, [p for p in study.points if p["method"] in ours and p["method"] in TWO_BY_TWO], study)
    percent(left, y=True)
    left.set(title="What is kept", ylabel=PRIOR)
    right.set(title="How far it moves", ylabel="forward KL on new-task inputs, nats", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def similarity(rows: Sequence[dict], methods: Sequence[str]) -> Figure:
    """CKA and CKNNA to the base policy at the same new-task accuracy, prior-task inputs, one standard error."""
    names = (("cka|prior", "CKA"), ("cknna_intersection|prior", "CKNNA"))
    rows = [row for row in rows if any(row["similarity"].get(name) for name, _ in names)][::-1]
    figure, axes = canvas((9.6, 1.3 + 0.3 * len(rows)), 2, sharey=True)
    for axis, (name, title) in zip(axes, names, strict=True):
        for place, row in enumerate(rows):
            value = row["similarity"].get(name)
            if value is not None:
                colour, marker, _ = style(row["method"], methods)
                error = value["standard_error"]
                axis.errorbar(value["mean"], place, xerr=error, color=colour, marker=marker, markersize=6, capsize=2)
        axis.set(title=title, xlabel="similarity to the base policy (1: the same)", xlim=(None, 1.0), ylim=(-0.6, None))
        axis.grid(axis="y", color=FAINT, alpha=0.15)
    axes[0].set_yticks(range(len(rows)), [label(row["method"]) for row in rows])
    return figure


def dynamics(study: Study) -> Figure:
    """Cosine of each measured step with the two tasks' loss gradients over the size of its KL change."""
    figure, axes = canvas((9.6, 4.9), 2, sharex=True, sharey=True)
    for axis, role, title in zip(
        axes, ("prior", "new"), ("with FashionMNIST's loss", "with ParityMNIST's loss"), strict=True
    ):
        for method in dict.fromkeys(run.method for run in study.dynamics):
            colour, marker, _ = style(method, [run.method for run in study.dynamics])
            steps = [row for run in study.dynamics if run.method == method for row in run.dynamics]
            steps = [row for row in steps if row.get("kl_change") and row.get(f"cosine_{role}") is not None]
            options = {"linestyle": "none", "marker": marker, "color": colour, "markeredgewidth": 0}
            x, y = [abs(row["kl_change"]) for row in steps], [row[f"cosine_{role}"] for row in steps]
            axis.plot(x, y, markersize=4, alpha=0.55, **options)
            if role == "prior":
                axis.plot([], [], label=label(method), markersize=5, **options)
        axis.axhline(0, color=FAINT, linewidth=0.8, alpha=0.6, zorder=0)
        axis.set(xscale="log", title=title, xlabel="size of the step's change of forward KL, nats")
    axes[0].set_ylabel("cosine of step and loss gradient (+1: uphill)")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def precision(rows: Sequence[dict]) -> Figure:
    """Unchanged weights and rank of the change, by method and precision of the training."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    types = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = canvas((9.6, 3.9), 2)
    looks = {"float32": ("#0072B2", ""), "bfloat16": ("#E69F00", "///")}
    titles = (("weight_sparsity_exact", "Weights that did not change"), ("weight_rank", "Rank of the change"))
    for axis, (key, title) in zip(axes, titles, strict=True):
        for index, dtype in enumerate(types):
            colour, hatch = looks.get(dtype, ("#009E73", ".."))
            for place, method in enumerate(names):
                row = next((r for r in rows if (r["method"], r["dtype"]) == (method, dtype)), None)
                if row is None or row[key] is None:
                    continue
                x = place + (index - (len(types) - 1) / 2) * 0.36
                axis.bar(x, row[key], 0.33, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
                axis.text(x, row[key] + 0.01, f"{100 * row[key]:.0f} %", ha="center", va="bottom", fontsize=9)
            if axis is axes[0]:
                axis.bar(0, 0, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=f"trained in {dtype}")
        axis.set_xticks(range(len(names)), [label(name) for name in names])
        axis.set(title=title, ylim=(0, 1.12), xlim=(-0.6, len(names) - 0.4))
        percent(axis, y=True)
        axis.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes[0].set_ylabel("share of all weights")
    axes[1].set_ylabel("share of the full rank, mean of matrices")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def theorem(rows: Sequence[dict]) -> Figure:
    """Largest difference of a probability from argmin KL(pi || pi_0) among correct policies, over the iterations."""
    figure, (axis,) = canvas((6.8, 4.6))
    spare = iter(("#56B4E9", "#CC79A7", "#E69F00", "#D55E00"))
    for process in dict.fromkeys(row["process"] for row in rows):
        mine = [row for row in rows if row["process"] == process and row.get("distance") is not None]
        name, colour, dash = PROCESSES.get(process) or (process.replace("_", " "), next(spare, INK), "-")
        y = [max(row["distance"], 1e-16) for row in mine]
        axis.plot([row["iteration"] for row in mine], y, color=colour, linestyle=dash, linewidth=1.8, label=name)
    axis.axhline(ARRIVED, color=FAINT, linewidth=0.8)
    axis.text(1.0, ARRIVED * 1.6, "10⁻⁶", transform=axis.get_yaxis_transform(), ha="right", va="bottom", color=FAINT)
    axis.set(yscale="log", xlabel="iteration", ylabel="largest difference of a probability\nfrom argmin KL(π ‖ π₀)")
    axis.set_ylim(5e-17, 3)
    axis.set_xlim(0, None)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def teacher(study: Study, rows: Sequence[dict], taught: Sequence[dict]) -> Figure:
    """Students that clone an RL-trained teacher's samples, the teacher's own way, and its method's runs."""
    figure, (axis,) = canvas((6.8, 4.9))
    own = taught[0]["method"] if taught else "grpo"
    for method in dict.fromkeys((own, "sft_teacher")):
        colour, marker, dash = style(method, study.methods)
        mine = study.of(method)
        name = f"{label(method)}, all runs" if method == own else "its students, all runs"
        options = {"linestyle": "none", "marker": marker, "color": colour, "markersize": 4, "alpha": 0.4}
        axis.plot([p["new"] for p in mine], [p["prior"] for p in mine], **options)
        curve = next((row["curve"] for row in rows if row["method"] == method), [])
        _curve(axis, curve, color=colour, linestyle=dash)
        axis.plot([], [], color=colour, marker=marker, linestyle=dash, label=name)
    for seed in dict.fromkeys(point["seed"] for point in taught):
        mine = [point for point in taught if point["seed"] == seed]
        x, y = [p["new"] for p in mine], [p["prior"] for p in mine]
        axis.plot(x, y, color=INK, linewidth=1, marker="o", markersize=3.5, alpha=0.9)
        axis.plot(x[-1], y[-1], color=INK, marker="*", markersize=12, linestyle="none")
    if taught:
        axis.plot([], [], color=INK, marker="*", linewidth=1, markersize=9, label="the teacher, over its training")
    _limits(axis, [p for p in study.points if p["method"] in (own, "sft_teacher")] + list(taught), study)
    axis.set(xlabel=NEW, ylabel=PRIOR)
    percent(axis, x=True, y=True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _base(axis, study: Study):
    bases = {(p["seed"], p["base_new"], p["base_prior"]) for p in study.points}
    x, y = [b for _, b, _ in sorted(bases, key=str)], [b for _, _, b in sorted(bases, key=str)]
    return axis.plot(x, y, color=INK, marker="*", markersize=11, linestyle="none", label="base policy", zorder=4)[0]


def _limits(axis, points: Sequence[dict], study: Study) -> None:
    x = [p["new"] for p in points] + [p["base_new"] for p in study.points]
    y = [p["prior"] for p in points] + [p["base_prior"] for p in study.points]
    pad_x, pad_y = 0.03 * (max(x) - min(x)) + 0.004, 0.04 * (max(y) - min(y)) + 0.004
    axis.set(xlim=(min(x) - pad_x, max(x) + pad_x), ylim=(min(y) - pad_y, max(y) + pad_y))
