"""Drift by layer: rows of report.json, the table's lines, and the figure of it against depth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from robot_forgetting.measure import TEXT, WEIGHTS
from robot_forgetting.report.figures import FAINT, Colours, drawing, svg
from robot_forgetting.report.runs import Group
from robot_forgetting.report.tables import final_divergence

# In the order of the table's columns.
MEASURES = {
    "cknna_intersection": "CKNNA (mask as published)",
    "cknna_union": "CKNNA (mask as replicated)",
    "cka_debiased": "CKA (linear, debiased)",
    "activation_l2_relative": "change of states",
    "weight_l2_relative": "change of weights",
}
PANELS = {
    "cknna_intersection": "CKNNA to the base model (1: the same)",
    "weight_l2_relative": "change of the block's weights, relative L2",
}


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
                about[measure] = {"texts": row.get("task"), "n": row.get("n"), "k": row.get("k")}
        for (measure, layer), values in found.items():
            spread = {"value": float(np.mean(values)), "least": min(values), "largest": max(values)}
            rows.append(
                {**group.keys, "measure": measure, "layer": layer, **spread, "runs": len(values), **about[measure]}
            )
    return rows


def _of_run(rows: Sequence[dict]) -> dict[tuple, dict]:
    """(measure, layer) -> row, with the mean over blocks."""
    rows = [row for row in rows if row.get("states") in (TEXT, WEIGHTS) and row.get("value") is not None]
    found = {(row["measure"], row.get("layer")): row for row in rows}
    for measure in dict.fromkeys(row["measure"] for row in rows if row["states"] == TEXT):
        blocks = [row for row in rows if row["measure"] == measure and row.get("layer")]
        if blocks:
            mean = float(np.mean([row["value"] for row in blocks]))
            found[measure, None] = {**blocks[0], "layer": None, "value": mean}
    return found


def layer_section(rows: Sequence[dict], colours: Colours, name: str) -> dict | None:
    """What the page shows of one setting: {"figure", "measures", "lines", "texts"}; None without rows."""
    if not rows:
        return None
    measures = [measure for measure in MEASURES if any(row["measure"] == measure for row in rows)]
    whole = [row for row in rows if row["layer"] is None]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in whole):
        cells = {row["measure"]: row for row in whole if row["variant"] == variant}
        first = next(iter(cells.values()))
        line = {"method": first["method"], "variant": variant, "runs": first["runs"]}
        lines.append(line | {"cells": [cells.get(measure) for measure in measures]})
    sources = dict.fromkeys(f"{row['n']} texts of {row['texts']}" for row in whole if row["n"])
    return {
        "figure": by_layer(rows, colours, name),
        "measures": [MEASURES[measure].rstrip(")").partition(" (")[::2] for measure in measures],  # name, remark
        "lines": lines,
        "texts": " or ".join(sources),
        "neighbours": " or ".join(dict.fromkeys(str(row["k"]) for row in whole if row["k"])),
    }


def by_layer(rows: Sequence[dict], colours: Colours, name: str) -> str:
    """CKNNA and change of weights against the layer: a line per method, the mean of its runs, and their range."""
    with drawing():
        figure = Figure(figsize=(9.4, 3.6), layout="constrained")
        for axes, (measure, title) in zip(figure.subplots(1, 2, sharex=True), PANELS.items(), strict=True):
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
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper")
        return svg(figure, name, "CKNNA and change of weights by layer")


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
