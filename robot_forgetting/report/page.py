"""``write_report``: run folders in, report.html and report.json out."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from pathlib import Path

from markupsafe import Markup

from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import plain, write_atomic, write_json
from robot_forgetting.measure import Quantity
from robot_forgetting.metrics import published
from robot_forgetting.records.run_folder import SCHEMA_VERSION, find_runs
from robot_forgetting.records.summary import DECODES
from robot_forgetting.report import figures, words
from robot_forgetting.report.comparison import (
    checkpoint_points,
    curve_rows,
    front_rows,
    left_out_rows,
    matched_rows,
    of,
    predictor_rows,
)
from robot_forgetting.report.layer_section import MEASURES as LAYER_MEASURES
from robot_forgetting.report.layer_section import layer_rows, layer_section
from robot_forgetting.report.media import Embedder, comparisons
from robot_forgetting.report.runs import BASE, Group, Run, group, load
from robot_forgetting.report.tables import (
    PRIOR_MEAN,
    columns,
    divergence_rows,
    forgetting_rows,
    silent,
    success_rows,
    with_base,
)
from robot_forgetting.report.template import template
from robot_forgetting.studies.digits.study_page import write_study
from robot_forgetting.studies.digits.study_runs import is_study

STATES = ("base", "demonstrations", "fine_tuned")  # in order of preference for the plot
MEASURES = {"forward_kl": "forward KL", "reverse_kl": "reverse KL", "total_variation": "total variation", "l2": "L2"}
MEASURES |= LAYER_MEASURES


def write_report(run_folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page and, beside it, a JSON file of the same name with every table; returns the page's path.

    Runs of a controlled study have a page of their own (``study.write_study``), with its figures as files.

    run_folders: run folders, or folders that hold some
    output: the page's file, or a folder for report.html; default report.html here
    """
    if not run_folders:
        raise UserError("no run folder given; name some, as in: robot-forgetting report runs/demo")
    output = Path("report.html" if output is None else output)
    if output.is_dir() or not output.suffix:
        output = output / "report.html"
    folders = find_runs(run_folders)
    if any(is_study(folder) for folder in folders):
        return write_study(folders, output)
    runs = [load(folder) for folder in folders]
    groups = group(runs)
    tables = build(runs, groups)
    html = render(runs, groups, tables)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{output.parent} cannot be made: {error.strerror}; choose another output") from error
    write_json(output.with_suffix(".json"), tables)
    write_atomic(output, html)
    print(f"{output} ({output.stat().st_size / 1e6:.1f} MB, {words.plural(len(runs), 'run')}); open it in a browser")
    return output


def build(runs: Sequence[Run], groups: Sequence[Group]) -> dict:
    """Every table of the page as plain rows."""
    points = checkpoint_points(groups)
    tables = {
        "schema_version": SCHEMA_VERSION,
        "runs": [_provenance(run) for run in runs],
        "success": success_rows(groups),
        "forgetting": forgetting_rows(groups),
        "divergence": divergence_rows(groups),
        "layers": layer_rows(groups),
        "checkpoints": points,
        "fronts": front_rows(points),
        "matched": matched_rows(groups),
        "predictors": predictor_rows(points),
        "leave_one_method_out": left_out_rows(points),
        "curves": curve_rows(groups),
        "errors": [
            {"run": run.id, **{key: row.get(key) for key in ("stage", "iteration", "task", "decode", "seed", "error")}}
            for run in runs
            for row in run.episodes
            if row.get("error")
        ],
    }
    return plain(tables)


def _provenance(run: Run) -> dict:
    keys = ("verb", "seed", "decode", "fingerprint", "versions", "hardware", "render", "timings", "error")
    sources = sorted({row["source"] for row in run.episodes if row.get("source")})
    return {
        "run": run.id,
        "status": run.status,
        "policy": run.policy,
        "new_task": run.new_task,
        "method": run.method,
        "variant": run.variant,
        "shipped": run.shipped,
        "episodes": len(run.episodes),
        "copied_from": sources,
        "last_checkpoint": list(run.final) if run.final else None,
        "peak_memory_bytes": run.state.get("peak_memory_bytes"),  # of the main process
    } | {key: run.state.get(key) for key in keys}


def render(runs: Sequence[Run], groups: Sequence[Group], tables: dict) -> str:
    """The page as text."""
    colours = figures.Colours([one.method for one in groups])
    functions = {
        "percent": words.percent,
        "number": words.number,
        "interval": words.interval,
        "cknna": published.CKNNA,
        "small": words.small,
        "r2": words.r2,
        "role_name": _role_name,
        "measure_name": lambda measure: MEASURES.get(measure, measure),
        "states_name": lambda states: "" if states == "text" else states.replace("_", "-"),
        "colour": lambda method: colours.colour(method).replace(figures.INK, "currentColor"),
    }
    embedder = Embedder()
    sections = []
    for setting in dict.fromkeys((one.policy, one.new_task, one.shipped) for one in groups):
        members = [one for one in groups if (one.policy, one.new_task, one.shipped) == setting]
        sections.append(_section(len(sections), setting, members, tables, colours, embedder))
    measured = sum(run.shipped is None for run in runs)
    decodes = sorted({_text(run.state["decode"]) for run in runs if run.state.get("decode")})
    subtitle = f"Report of {time.strftime('%Y-%m-%d %H:%M')}; {words.plural(measured, 'run')} measured here"
    if measured < len(runs):
        subtitle += f", {len(runs) - measured} shipped with the repository (marked)"
    return template("page.html", functions).render(
        title="What was learned, and what was forgotten",
        subtitle=subtitle,
        sections=sections,
        notes=_notes(runs, embedder),
        lead=[section for section in sections if not section["shipped"]] or sections,
        runs=[_run_line(run) for run in runs],
        decode="; ".join(decodes) or "not recorded",
        provenance=_distinct(runs),
        errors=tables["errors"],
    )


def _role_name(task: str, role: str) -> str:
    if task == PRIOR_MEAN:
        return ""
    return {"new": "new task", "prior": "prior task", "text": "held-out text"}.get(role, role.replace("_", "-"))


def _section(index: int, setting: tuple, groups: list[Group], tables: dict, colours, embedder: Embedder) -> dict:
    policy, new_task, shipped = setting
    rows = {
        name: of(tables[name], setting) for name in ("success", "forgetting", "divergence", "checkpoints", "fronts")
    }
    more = ("matched", "predictors", "leave_one_method_out", "curves", "layers")
    rows |= {name: of(tables[name], setting) for name in more}
    runs = [run for one in groups for run in one.runs]
    cols = columns(runs)
    points = rows["checkpoints"]
    plotted = _plotted({key for row in points for key in row["divergence"]})
    fit = None
    if plotted:
        wanted = plotted.as_predictor()
        fit = next((row for row in rows["predictors"] if wanted.items() <= row.items()), None)
    name = f"s{index}"
    drawn = bool(points or rows["curves"])
    learned = [row for row in points if row["stage"] > 0]
    temperatures = sorted({float((run.state.get("decode") or {}).get("temperature", 1.0)) for run in runs})
    temperature = " or ".join(map(str, temperatures)) + (", as in rollouts" if temperatures == [1.0] else "")
    variants = [group.variant for group in with_base(groups)]
    protocols = any(run.state.get("protocols") for run in runs)
    return {
        "id": name,
        "title": f"{new_task} with {policy}" + (", shipped results" if shipped else ""),
        "shipped": shipped,
        "reading": words.reading(
            policy, new_task, rows["success"], rows["forgetting"], rows["matched"], fit, rows["curves"]
        ),
        "columns": cols,
        "success": _wide(
            rows["success"], cols, variants, colours, temperature, "Share of episodes that succeed", protocols
        ),
        "forgetting": _wide(
            rows["forgetting"],
            [col for col in cols if col[1] != "new"],
            variants,
            colours,
            temperature,
            "Forgetting in points: base minus fine-tuned success on the same initial states, with 95 % intervals",
            protocols,
        ),
        "trained": any(group.method != BASE for group in groups),
        "detectable": words.detectable(rows["forgetting"]),
        "no_signal": words.no_signal(list(silent(runs).values())),
        "scatter": Markup(figures.scatter(points, rows["fronts"], colours, f"{name}a")) if learned else None,
        "matched": rows["matched"] if len({row["method"] for row in learned}) > 1 or rows["matched"] else [],
        "divergence": _divergence(rows["divergence"], cols, variants),
        "layers": layer_section(rows["layers"], colours, f"{name}d"),
        "kl": Markup(figures.kl_against_forgetting(points, plotted, colours, f"{name}b"))
        if plotted and learned
        else None,
        "kl_text": _kl_text(plotted.states) if plotted else "",
        "predictors": [row for row in rows["predictors"] if row["r2"] is not None],
        "too_few": words.too_few([row for row in rows["predictors"] if row["r2"] is not None]),
        "no_law": _no_law(rows["predictors"]),
        "left_out": rows["leave_one_method_out"],
        "curves": Markup(figures.learning_curves(points, rows["curves"], colours, f"{name}c")) if drawn else None,
        "videos": _videos(groups, embedder),
    }


def _no_law(predictors: Sequence[dict]) -> str:
    """Why there is no fit of forgetting on any divergence; "" where there is one."""
    if any(row["r2"] is not None for row in predictors):
        return ""
    return next(
        (row["note"] for row in predictors if row["note"]), "no checkpoint has both a divergence and a forgetting"
    )


def _plotted(keys: Collection[str]) -> Quantity | None:
    """The forward KL on new-task inputs, on the first kind of states there is."""
    wanted = (Quantity("forward_kl", "nats/token", "new", states) for states in STATES)
    return next((quantity for quantity in wanted if str(quantity) in keys), None)


def _kl_text(states: str) -> str:
    whose = {"base": "the base policy's episodes", "fine_tuned": "the fine-tuned policy's own episodes"}
    return f"forward KL on new-task inputs, at states of {whose.get(states, 'demonstrations')}"


def _wide(
    rows: list[dict], cols, variants, colours, temperature: str, caption: str, protocols: bool = False
) -> list[dict]:
    """Rows as one table per decode: a line per policy, a cell per task."""
    tables = []
    for decode in DECODES:
        mine = [row for row in rows if row["decode"] == decode]
        lines = []
        for variant in dict.fromkeys(variants):
            cells = {row["task"]: row for row in mine if row["variant"] == variant}
            if not cells:
                continue
            first = next(iter(cells.values()))
            colour = colours.colour(first["method"])
            line = {"method": first["method"], "variant": variant, "cells": []}
            line["note"] = "" if first["method"] == BASE else words.plural(first["runs"], "run")
            for task, _ in cols:
                row = cells.get(task)
                strip = ""
                if row and "rate" in row:
                    strip = Markup(
                        figures.strip([run["rate"] for run in row["per_run"]], row["low"], row["high"], colour)
                    )
                line["cells"].append({"row": row, "strip": strip, "mean": task == PRIOR_MEAN})
            lines.append(line)
        if lines:
            how = f"temperature {temperature}" if decode == "sampled" else "temperature 0"
            how += "; benchmarks by their own protocol" if protocols else ""
            dots = "; dots are runs, the bar the interval" if "rate" in mine[0] else ""
            tables.append({"caption": f"{caption}. Decode: {decode} ({how}){dots}.", "lines": lines})
    return tables


def _divergence(rows: list[dict], cols, variants) -> list[dict]:
    tables = []
    for states in sorted({row["states"] for row in rows}, key=lambda s: STATES.index(s) if s in STATES else 9):
        mine = [row for row in rows if row["states"] == states]
        measures = list(dict.fromkeys((row["measure"], row["unit"]) for row in mine))
        lines = []
        for variant in dict.fromkeys(variants):
            for task, role in cols:
                cells = {(r["measure"], r["unit"]): r for r in mine if (r["variant"], r["task"]) == (variant, task)}
                if cells:
                    first = next(iter(cells.values()))
                    line = {key: first[key] for key in ("method", "variant", "n", "episodes")}
                    lines.append(line | {"task": task, "role": role, "cells": [cells.get(key) for key in measures]})
        shown = states.replace("_", "-")
        tables.append(
            {
                "title": f"The same at states of: {shown}",
                "caption": "Distance between the action distributions of base and final policy, at states of: "
                f"{shown}. Mean ± one standard error.",
                "measures": [{"name": MEASURES.get(m, m), "unit": unit.replace("1/", "per ")} for m, unit in measures],
                "lines": lines,
            }
        )
    return tables


def _videos(groups: Sequence[Group], embedder: Embedder) -> list[dict]:
    rows = comparisons(groups)
    for row in rows:
        for video in row["videos"]:
            path = video.pop("path")
            label = "base policy" if video["who"] == BASE else f"after {video['who']}"
            video |= {"uri": embedder.uri(path), "name": path.name, "label": label}
    return rows


def _notes(runs: Sequence[Run], embedder: Embedder) -> list[str]:
    notes = []
    for run in runs:
        if run.status != "finished":
            reached = f"evaluated up to iteration {run.final[1]}" if run.final else "no fine-tuned policy evaluated yet"
            why = f" ({run.state['error']})" if run.state.get("error") else ""
            notes.append(f"Run {run.id} is {run.status}{why}: {reached}; its numbers are not final.")
    seen: dict[tuple, bool] = {}
    differing = 0
    for run in runs:
        for (stage, _, task, _, decode), seeds in run.outcomes.items():
            for seed, success in seeds.items() if stage == 0 else ():
                key = (run.policy, run.state.get("fingerprint"), run.shipped, task, decode, seed)
                differing += seen.setdefault(key, success) != success
    if differing:
        where = words.plural(differing, "episode")
        notes.append(f"The base policy's outcome differs between runs on {where}; the first run counts.")
    if embedder.left_out:
        notes.append(
            f"{words.plural(embedder.left_out, 'video')} left out to keep the page small; see the run folders."
        )
    return notes


def _run_line(run: Run) -> dict:
    timings = {
        name: value for name, value in (run.state.get("timings") or {}).items() if isinstance(value, (int, float))
    }
    total = timings.get("total", sum(timings.values()) if timings else None)
    memory = run.state.get("peak_memory_bytes")
    unfinished = run.status != "finished"
    return {
        "id": run.id,
        "shipped": run.shipped,
        "status": run.status,
        "reached": f"evaluated to iteration {run.final[1]}" if unfinished and run.final else "",
        "error": run.state.get("error"),
        "method": run.state.get("verb") if run.method == BASE else run.variant,
        "seed": run.state.get("seed"),
        "wall": words.duration(total),
        "timings": [(name, words.duration(value)) for name, value in timings.items() if name != "total"],
        "memory": "n/a" if not memory else f"{memory / 1e9:.1f} GB",
        "episodes": len(run.episodes),
        "crashed": sum(bool(row.get("error")) for row in run.episodes),
    }


def _distinct(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Versions, hardware and render options; said once where all runs agree, else with the runs they belong to."""
    result = []
    names = {
        "policy": "Policy",
        "fingerprint": "Fingerprint of policy and tasks",
        "protocols": "Protocols of benchmarks",
        "chance": "Rate of guessing",
        "left_out": "Left out",
        "render": "Render option",
        "hardware": "Hardware",
        "versions": "Versions",
        "shipped": "Shipped",
    }
    for key, title in names.items():
        found: dict[str, list[str]] = {}
        for run in runs:
            value = run.policy if key == "policy" else run.state.get(key)
            if value:
                found.setdefault(_text(value), []).append(run.id)
        if found:
            everywhere = len(found) == 1 and len(next(iter(found.values()))) == len(runs)
            lines = [text if everywhere else f"{text} ({_some(ids)})" for text, ids in found.items()]
            result.append((title, lines))
    copied = sorted({row["source"] for run in runs for row in run.episodes if row.get("source")})
    if copied:
        result.append(("Base episodes copied from", [", ".join(copied)]))
    return result


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(_field(key, item) for key, item in value.items() if item not in (None, [], {}))
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _field(key: str, value) -> str:
    if key.endswith("_bytes") and isinstance(value, (int, float)):
        return f"{key.removesuffix('_bytes')} {value / 1e9:.1f} GB"
    return f"{key} {_text(value)}"
