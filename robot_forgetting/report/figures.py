"""Figures as inline SVG: real text, colours that colour-blind eyes tell apart, ink that follows the page's theme."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from robot_forgetting.measure import Quantity
from robot_forgetting.metrics.pareto import quadratic_fit
from robot_forgetting.report.runs import BASE

# Okabe and Ito's palette without its yellow (invisible on white) and black (the ink); markers differ as well.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, FAINT = "#010203", "#010204"  # stand-ins, replaced by the page's own colours

RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "robot_forgetting",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # a name with a dollar is a name
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
}


@contextlib.contextmanager
def drawing(**more) -> Iterator[None]:
    """Matplotlib's own defaults, then ``RC``: a `matplotlibrc` in the working folder changes nothing."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(RC | more)
        yield


class Colours:
    """A colour and a marker per method, the same in all figures and tables of a page."""

    def __init__(self, methods: Sequence[str]):
        self.methods = [method for method in dict.fromkeys(methods) if method != BASE]

    def colour(self, method: str) -> str:
        return INK if method not in self.methods else PALETTE[self.methods.index(method) % len(PALETTE)]

    def marker(self, method: str) -> str:
        return "*" if method not in self.methods else MARKERS[self.methods.index(method) % len(MARKERS)]


def scatter(points: Sequence[dict], fronts: Sequence[dict], colours: Colours, name: str) -> str:
    """New-task against prior-task success: small marks are checkpoints, large ones final policies, lines the fronts."""
    with drawing():
        figure = Figure(figsize=(6.6, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for front in fronts:
            edge = [(point["new"], point["prior"]) for point in front["front"]]
            colour = colours.colour(front["method"])
            if len(edge) > 1:
                axes.plot(*zip(*edge, strict=True), color=colour, alpha=0.55, linewidth=1.2, zorder=1)
        for method in dict.fromkeys(row["method"] for row in points):
            mine = [row for row in points if row["method"] == method and row["stage"] > 0]
            style = {"color": colours.colour(method), "marker": colours.marker(method), "linestyle": "none"}
            passing = [row for row in mine if not row["final"]]
            axes.plot([r["new"] for r in passing], [r["prior"] for r in passing], markersize=4, alpha=0.65, **style)
            final = [row for row in mine if row["final"]]
            _crosses(axes, final, ("new", "prior"), style)
            axes.plot([], [], markersize=8, label=f"{method}, final policy", **style)
        base = [row for row in points if row["stage"] == 0][:1]
        style = {"color": INK, "marker": "*", "linestyle": "none", "markersize": 13}
        _crosses(axes, base, ("new", "prior"), style)
        axes.plot([], [], label="base policy", **style)
        axes.plot([], [], color=INK, marker=".", linestyle="none", alpha=0.5, label="checkpoint during training")
        axes.plot([], [], color=INK, alpha=0.55, linewidth=1.2, label="front of a method")
        axes.set(xlabel="success on the new task", ylabel="mean success on the prior tasks", xlim=(-0.02, 1.02))
        bottom = min([row["prior_low"] for row in points], default=0)
        axes.set_ylim(min(0.5, bottom - 0.05) if bottom < 0.5 else 0.4, 1.02)
        percent(axes, x=True, y=True)
        axes.legend(loc="lower left")
        return svg(figure, name, "Scatter of success on the new task against mean success on the prior tasks")


def kl_against_forgetting(points: Sequence[dict], quantity: Quantity, colours: Colours, name: str) -> str:
    """Forgetting over a divergence, all checkpoints, with the quadratic fit where there are enough points."""
    key = str(quantity)
    used = [row for row in points if key in row["divergence"] and row["forgetting"] is not None]
    with drawing():
        figure = Figure(figsize=(6.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color=FAINT, linewidth=0.8, alpha=0.5)
        x = np.array([row["divergence"][key] for row in used])
        fit = quadratic_fit(x, [row["forgetting"] for row in used])
        if fit.r2 is not None:
            grid = np.linspace(0, x.max(), 100)
            label = f"quadratic fit, R² = {fit.r2:.2f}, n = {fit.n} checkpoints"
            axes.plot(grid, fit(grid), color=INK, linestyle="--", linewidth=1, alpha=0.7, label=label)
        else:
            axes.plot([], [], linestyle="none", label=f"no fit: {fit.note}")
        for method in dict.fromkeys(row["method"] for row in used):
            mine = [row for row in used if row["method"] == method]
            style = {"color": colours.colour(method), "marker": colours.marker(method), "linestyle": "none"}
            passing = [row for row in mine if not row["final"]]
            xy = [row["divergence"][key] for row in passing], [row["forgetting"] for row in passing]
            axes.plot(*xy, markersize=4, alpha=0.65, **style)
            final = [{**row, "x": row["divergence"][key], "x_low": None} for row in mine if row["final"]]
            _crosses(axes, final, ("x", "forgetting"), style)
            axes.plot([], [], markersize=8, label=method, **style)
        axes.set(xlabel=f"{quantity.measure.replace('_', ' ').replace('kl', 'KL')}, {quantity.unit}", xlim=(0, None))
        axes.set_ylabel("forgetting on the prior tasks, points")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}".replace("-", "\N{MINUS SIGN}"))
        axes.legend(loc="best")
        return svg(figure, name, "Scatter of forgetting against divergence from the base policy")


def learning_curves(points: Sequence[dict], rollouts: Sequence[dict], colours: Colours, name: str) -> str:
    """Left: success of training rollouts over environment steps (RL). Right: evaluated success over training time."""
    on_policy = [row for row in rollouts if row["success"] is not None]
    seconds = all(row["seconds"] is not None for row in points)
    x_key, unit = ("seconds", 60.0) if seconds else ("iteration", 1.0)
    with drawing():
        figure = Figure(figsize=(9.4, 3.9), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        for run in dict.fromkeys(row["run"] for row in on_policy):
            mine = [row for row in on_policy if row["run"] == run]
            x, y = np.array([row["env_steps"] for row in mine]) / 1000, np.array([row["success"] for row in mine])
            colour = colours.colour(mine[0]["method"])
            left.plot(x, y, color=colour, linewidth=0.8, alpha=0.5)
            smooth = np.array([y[max(0, i - 2) : i + 3].mean() for i in range(len(y))])
            left.plot(x, smooth, color=colour, label=mine[0]["method"])
        if not on_policy:
            left.text(0.5, 0.5, "no rollouts in these runs", transform=left.transAxes, ha="center", va="center")
        left.set(title="Training rollouts", xlabel="environment steps, thousands")
        left.set_ylabel("success")
        for run in dict.fromkeys(row["run"] for row in points):
            mine = [row for row in points if row["run"] == run]
            colour, marker = colours.colour(mine[0]["method"]), colours.marker(mine[0]["method"])
            x = [row[x_key] / unit for row in mine]
            right.plot(x, [row["new"] for row in mine], color=colour, marker=marker, markersize=4)
            right.plot(x, [row["prior"] for row in mine], color=colour, marker=marker, markersize=4, linestyle=":")
        for method in dict.fromkeys(row["method"] for row in points):
            right.plot([], [], color=colours.colour(method), marker=colours.marker(method), markersize=4, label=method)
        right.plot([], [], color=INK, label="new task")
        right.plot([], [], color=INK, linestyle=":", label="mean of prior tasks")
        right.set(title="Evaluated checkpoints", xlabel="training time, minutes" if seconds else "training iteration")
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        left.set_ylim(0, 1.02)
        percent(left, y=True)
        return svg(figure, name, "Learning curves: rollout success and evaluated success over training")


def strip(values: Sequence[float], low: float | None, high: float | None, colour: str) -> str:
    """A 92 x 12 px mark for a table cell: interval as a line, one dot per run, on a scale from 0 to 1."""

    def x(value: float) -> float:
        return 4 + 84 * min(max(value, 0.0), 1.0)

    parts = ['<line x1="4" x2="88" y1="6" y2="6" class="scale"/>']
    if low is not None and high is not None:
        ends = f'x1="{x(low):.1f}" x2="{x(high):.1f}" y1="6" y2="6"'
        parts.append(f'<line {ends} stroke="{colour}" stroke-width="3" opacity=".45"/>')
    parts += [f'<circle cx="{x(value):.1f}" cy="6" r="2.6" fill="{colour}"/>' for value in values]
    head = '<svg class="strip" viewBox="0 0 92 12" width="92" height="12" aria-hidden="true">'
    return (head + "".join(parts) + "</svg>").replace(INK, "currentColor")


def _crosses(axes, rows: Sequence[dict], names: tuple[str, str], style: dict) -> None:
    """Large markers with their 95 % intervals."""
    for row in rows:
        errors = []
        for name in names:
            low = row.get(f"{name}_low")
            errors.append(
                None if low is None else [[max(row[name] - low, 0)], [max(row[f"{name}_high"] - row[name], 0)]]
            )
        options = {"markersize": 8, **style}
        axes.errorbar(row[names[0]], row[names[1]], xerr=errors[0], yerr=errors[1], elinewidth=0.9, zorder=3, **options)


def percent(axes, *, x: bool = False, y: bool = False) -> None:
    for axis in (axes.xaxis,) * x + (axes.yaxis,) * y:
        axis.set_major_formatter(lambda value, _: f"{round(100 * value, 1):g} %")


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an SVG element: theme colours, unique ids, a title for screen readers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = text.replace(INK, "currentColor").replace(FAINT, "var(--faint)")
    head = re.match(r"<svg[^>]*>", text).group()
    opened = (
        re.sub(r'(width|height)="[\d.]+pt"', "", head)[:-1] + f' role="img" aria-label="{title}"><title>{title}</title>'
    )
    return text.replace(head, opened, 1)
