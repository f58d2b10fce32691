"""Drift by layer: of the states that texts make, and of the weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from robot_forgetting.measure import TEXT, WEIGHTS
from robot_forgetting.metrics import published
from robot_forgetting.report import words
from robot_forgetting.report.figures import FAINT, Colours, canvas
from robot_forgetting.report.markup import Content, join, note, of, pictured, table
from robot_forgetting.report.runs import Group
from robot_forgetting.report.section import GroupedRuns, Part, Section
from robot_forgetting.report.tables import final_divergence

PANELS = {
    "cknna_intersection": "CKNNA to the base model (1: the same)",
    "weight_l2_relative": "change of the block's weights, relative L2",
}


class Layers(Section):
    name, title, trained = "layers", "Drift by layer", True
    alt = "CKNNA and change of weights by layer"

    def rows(self, runs: GroupedRuns) -> dict[str, list[dict]]:
        return {"layers": layer_rows(runs.groups)}

    def figure(self, part: Part):
        rows = part.rows(self.name)
        return by_layer(rows, part.colours) if rows else None

    def html(self, part: Part, figure: Markup) -> Content:
        whole = [row for row in part.rows(self.name) if row["layer"] is None]
        if not whole:
            return ""
        read = dict.fromkeys((row["n"], row["inputs"], row["texts"]) for row in whole if row["n"])
        texts = " or ".join(f"{n} {'texts' if inputs == TEXT else 'states'} of {name}" for n, inputs, name in read)
        k = " or ".join(dict.fromkeys(str(row["k"]) for row in whole if row["k"]))
        shown = pictured(
            figure,
            f"Left: similarity of what base and final policy make of {texts} (mean state of an input's tokens but the "
            "first; the last layer is after the final norm). Right: length of the change of a layer's weights over "
            "their own, adapters merged. Lines: mean of all runs of a method; shaded: their range. The methods are not "
            "at equal new-task success here.",
            wide=True,
        )
        caption = (
            f"Drift of the model as a whole: of states the mean over blocks, on {texts}; of weights all of them. 1 is "
            f"no drift for CKNNA ({f'k = {k}; ' if k else ''}few inputs can carry it a little above 1), CKA and the "
            "share of weights that stayed, 0 for the changes, which are relative but for the spectral norm. In "
            "brackets the least and the largest run."
        )
        known = list(words.MEASURES)
        measures = sorted({row["measure"]: None for row in whole}, key=lambda name: (known + [name]).index(name))
        titles = [part.measure_name(name).rstrip(")").partition(" (")[::2] for name in measures]
        lines = []
        for variant in dict.fromkeys(row["variant"] for row in whole):
            cells = {row["measure"]: row for row in whole if row["variant"] == variant}
            first = next(iter(cells.values()))
            lines.append([part.who(first), *(_value(cells.get(name)) for name in measures), first["runs"]])
        reported = ", ".join(f"{row['value']} for {row['method']}" for row in published.CKNNA)
        more = (
            f"RL's Razor reports a CKNNA of {reported} for Qwen2.5-3B on Wikipedia paragraphs at equal new-task "
            "success, without naming layer, pooling, number of texts or k. Only the order can be compared."
        )
        return shown + table(caption, ["policy", *titles, "runs"], lines) + note(more)


def _value(row: dict | None) -> Content:
    if row is None:
        return ""
    spread = f"[{words.small(row['least'])}, {words.small(row['largest'])}]" if row["runs"] > 1 else ""
    return join([words.small(row["value"]), of(spread)], " ")


def layer_rows(groups: Sequence[Group]) -> list[dict]:
    """Each measure at each layer, of final policies: mean, least and largest over runs; n texts in each run.

    A ``layer`` of None is the model as a whole: of the states the mean over blocks, of the weights all of them.
    """
    rows = []
    for group in groups:
        found: dict[tuple, list[float]] = {}
        about: dict[str, dict] = {}
        for run in group.runs:
            for (measure, layer), row in _of_run(final_divergence(run)).items():
                found.setdefault((measure, layer), []).append(row["value"])
                about[measure] = {"texts": row.get("task"), "inputs": row.get("role")}
                about[measure] |= {"n": row.get("n"), "k": row.get("k")}
        for (measure, layer), values in found.items():
            spread = {"value": float(np.mean(values)), "least": min(values), "largest": max(values)}
            rows.append(
                {**group.keys, "measure": measure, "layer": layer, **spread, "runs": len(values), **about[measure]}
            )
    return rows


def _of_run(rows: Sequence[dict]) -> dict[tuple, dict]:
    """(measure, layer) -> row, with the mean over blocks. Of what layers read: texts, or the new task's states."""
    rows = [row for row in rows if row.get("role") in (None, TEXT, "new")]
    rows = [row for row in rows if "layer" in row and row.get("value") is not None]
    found = {(row["measure"], row["layer"]): row for row in rows}
    for measure in dict.fromkeys(row["measure"] for row in rows if row["states"] != WEIGHTS):
        blocks = [row for row in rows if row["measure"] == measure and row.get("layer")]
        if blocks:
            mean = float(np.mean([row["value"] for row in blocks]))
            found[measure, None] = {**blocks[0], "layer": None, "value": mean}
    return found


def by_layer(rows: Sequence[dict], colours: Colours):
    """CKNNA and change of weights against the layer: a line per method, the mean of its runs, and their range."""
    figure, both = canvas((9.4, 3.6), 2, sharex=True)
    for axes, (measure, title) in zip(both, PANELS.items(), strict=True):
        mine = [row for row in rows if row["measure"] == measure and row["layer"] is not None]
        for method in dict.fromkeys(row["method"] for row in mine):
            line = _line([row for row in mine if row["method"] == method])
            colour, marker = colours.colour(method), colours.marker(method)
            axes.plot(line[0], line[1], color=colour, marker=marker, markersize=4, label=method)
            axes.fill_between(line[0], line[2], line[3], color=colour, alpha=0.15, linewidth=0)
        if measure.startswith("cknna"):
            axes.axhline(1, color=FAINT, linewidth=0.8, alpha=0.5, zorder=0)
        else:
            axes.set_ylim(0, None)
        axes.set(title=title, xlabel="layer (0: embedding)")
        axes.xaxis.get_major_locator().set_params(integer=True)
    lines = max((axes.get_legend_handles_labels() for axes in figure.axes), key=lambda pair: len(pair[0]))
    figure.legend(*lines, loc="outside right upper")
    return figure


def _line(rows: Sequence[dict]) -> tuple[list, list, list, list]:
    """Layers, and the mean, least and largest of the runs of all settings of a method."""
    layers = sorted({row["layer"] for row in rows})
    columns: tuple[list, list, list] = ([], [], [])
    for layer in layers:
        here = [row for row in rows if row["layer"] == layer]
        mean = np.average([row["value"] for row in here], weights=[row["runs"] for row in here])
        values = (mean, min(row["least"] for row in here), max(row["largest"] for row in here))
        for column, value in zip(columns, values, strict=True):
            column.append(float(value))
    return layers, *columns
