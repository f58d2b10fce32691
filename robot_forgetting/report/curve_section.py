"""Learning curves: success of training rollouts, and of evaluated checkpoints."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.report.figures import INK, Colours, canvas, percent
from robot_forgetting.report.markup import Content, note, pictured
from robot_forgetting.report.runs import BASE, Group
from robot_forgetting.report.section import GroupedRuns, Part, Section


class Curves(Section):
    name, title, trained = "curves", "Learning curves", True
    alt = "Learning curves: rollout success and evaluated success over training"

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        return {"curves": curve_rows(runs.groups)}

    def figure(self, part: Part):
        points, rollouts = part.rows("checkpoints"), part.rows("curves")
        return learning_curves(points, rollouts, part.colours) if points or rollouts else None

    def html(self, part: Part, figure: Markup) -> Content:
        caption = (
            "Left: share of successful training rollouts of each RL run, on training initial states (thin: each "
            "iteration, thick: mean of 5). Right: evaluated checkpoints on test initial states; checkpoints during "
            "training are tried on fewer episodes than final policies."
        )
        none = note("Nothing was trained or no checkpoint was evaluated.")
        return pictured(figure, caption, wide=True) or none


def curve_rows(groups: Sequence[Group]) -> list[dict]:
    """Per run: success of training rollouts by iteration with cumulative environment steps and seconds."""
    return [
        {**group.keys, "run": run.id, "seed": run.state.get("seed"), "stage": stage, "iteration": iteration, **entry}
        for group in groups
        if group.method != BASE
        for run in group.runs
        for (stage, iteration), entry in sorted(run.progress.items())
    ]


def learning_curves(points: Sequence[dict], rollouts: Sequence[dict], colours: Colours):
    """Left: success of training rollouts over environment steps (RL). Right: evaluated success over training time."""
    on_policy = [row for row in rollouts if row["success"] is not None]
    seconds = all(row["seconds"] is not None for row in points)
    x_key, unit = ("seconds", 60.0) if seconds else ("iteration", 1.0)
    figure, (left, right) = canvas((9.4, 3.9), 2, sharey=True)
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
    return figure
