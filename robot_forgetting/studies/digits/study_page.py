"""``write_study``: a controlled study's page, its tables as JSON, and its figures for a paper, from run folders."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from matplotlib.figure import Figure

from robot_forgetting.machine.files import disk, plain, write_atomic, write_json
from robot_forgetting.metrics import published
from robot_forgetting.records.run_folder import SCHEMA_VERSION, RunFolder
from robot_forgetting.report import figures, words
from robot_forgetting.report.template import template
from robot_forgetting.studies.digits import study_figures as pictures
from robot_forgetting.studies.digits import study_tables as rows
from robot_forgetting.studies.digits import study_words
from robot_forgetting.studies.digits.study_runs import FIVE, Study, label, load_study, points_of

INKS = ((figures.INK, "#000000"), (figures.FAINT, "#555555"))  # of figures on white paper
NAMES = {"parity_mnist": "ParityMNIST", "fashion_mnist": "FashionMNIST"}


def write_study(folders: Sequence[RunFolder], output: Path) -> Path:
    """Writes ``output``, the JSON file of the same name, and figures/*.svg and *.pdf beside them; returns ``output``.

    The same folders give the same files, byte for byte. UserError where no folder holds a run of a study.
    """
    study = load_study(folders)
    found = rows.laws(study)
    tables = build(study, found)
    drawn = draw(study, found, tables)
    html = render(study, found, tables, drawn)
    with disk(output.parent):
        (output.parent / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        write_atomic(output.parent / "figures" / f"{name}.svg", on_paper(figure["svg"]))
        write_atomic(output.parent / "figures" / f"{name}.pdf", figure["pdf"])
    write_json(output.with_suffix(".json"), tables)
    write_atomic(output, html)
    size = output.stat().st_size / 1e6
    print(f"{output} ({size:.1f} MB, {words.plural(len(study.sweep), 'run')}); open it in a browser")
    return output


def build(study: Study, found: dict[str, rows.Law]) -> dict:
    """Every table of the page as plain rows. ``predictors``: over the paper's methods; ``predictors_all``: over all."""
    main = found.get("paper") or found.get("all")
    other = found.get("all") if "paper" in found else None
    reached = [m for m in study.methods if study.of(m)]
    level = rows.common_level(study, [m for m in reached if m in FIVE] or reached)
    four = [m for m in rows.TWO_BY_TWO if m in reached]
    four_level = rows.common_level(study, four) if len(four) == len(rows.TWO_BY_TWO) else None
    tables = {
        "schema_version": SCHEMA_VERSION,
        "study": study.name,
        "command": study_words.command(study),
        "runs": [
            {"run": r.id, "method": r.method, "seed": r.seed, "setting": r.setting} for r in study.sweep + study.teacher
        ],
        "left_out": study.left_out,
        "notes": study.notes,
        "base": rows.base_rows(study) if study.points else [],
        "success": rows.success_rows(study),
        "divergence": rows.divergence_rows(study),
        "checkpoints": study.points,
        "fronts": rows.front_rows(study),
        "matched": rows.matched_rows(study, reached, level) if level else [],
        "levels": rows.level_rows(study, reached),
        "two_by_two": rows.matched_rows(study, four, four_level) if four_level else [],
        "predictors": main.rows if main else [],
        "predictors_methods": main.methods if main else [],
        "predictors_all": other.rows if other else [],
        "residuals": main.residual_rows() if main else [],
        "leave_one_method_out": main.left_out_rows() if main else [],
        "transfer": main.transfer_rows() if main else [],
        "dynamics": rows.dynamics_rows(study) if study.dynamics else [],
        "precision": rows.precision_rows(study),
        "theorem": rows.theorem_rows(study),
        "choices": [{"what": what, "here": here} for what, here in study_words.choices(study)],
        "published": {
            "table_1": published.TABLE_1,
            "replication": published.REPLICATION_TABLE,
            "law": published.FORGETTING_LAW,
            "fronts": published.FRONTS,
        },
    }
    return plain(tables)


def draw(study: Study, found: dict[str, rows.Law], tables: dict) -> dict[str, dict]:
    """{name: {"svg", "pdf", "caption"}} of every figure that there are numbers for."""
    drawn: dict[str, dict] = {}
    scope = f"{words.plural(len(study.points), 'checkpoint')} of {words.plural(len(study.sweep), 'run')}, "
    scope += words.plural(len(study.seeds), "seed")

    def add(name: str, title: str, caption: str, make, *arguments) -> None:
        with figures.drawing():
            drawn[name] = save(make(*arguments), name, title) | {"caption": caption}

    if study.points:
        add(
            "fronts",
            "New-task against prior-task accuracy",
            "Accuracy on the new task against the prior task. Faint: every checkpoint; strong: those within 2 points "
            "of their method's front; lines: an exponential through those, with 95 % bands from drawing "
            f"{_drawn(study)} where there are 3 runs. n = {scope}.",
            pictures.fronts,
            study,
            tables["fronts"],
        )
    for name, one in found.items():
        if one.points is None or rows.MAIN not in one.points.predictors:
            continue
        which = "the paper's methods" if name == "paper" else "all methods"
        n = (one.main or {}).get("n", 0)
        add(
            "law" if name == "paper" or "paper" not in found else "law_all",
            "Forgetting over forward KL",
            f"Forgetting over forward KL(base || fine-tuned) on new-task inputs, pooled over {which}, with a quadratic "
            f"fit and its 95 % band; right: what it leaves. n = {n} checkpoints of "
            f"{words.plural(len(one.points.run_names), 'run')}, "
            f"{words.plural(len(set(one.points.run_seeds)), 'seed')}.",
            pictures.forgetting_law,
            study,
            one,
        )
    main = found.get("paper") or found.get("all")
    if main and any(row["r2"] is not None for row in main.rows):
        add(
            "predictors",
            "R squared of every predictor",
            "How much of the variation in forgetting a quadratic of each predictor explains: here with 95 % intervals, "
            f"and as published. n = {max(row['n'] for row in main.rows)} checkpoints, "
            f"{words.plural(len(study.seeds), 'seed')}.",
            pictures.predictors,
            main,
        )
    if tables["two_by_two"]:
        methods = [row["method"] for row in tables["two_by_two"]]
        n = sum(len(study.of(method)) for method in methods)
        add(
            "two_by_two",
            "On-policy data and negative examples",
            "On-policy data (blue) or not (orange), with negative examples (filled) or without (hollow). Lines: "
            f"exponentials through the points near each front. n = {n} checkpoints, "
            f"{words.plural(len(study.seeds), 'seed')}.",
            pictures.two_by_two,
            study,
            tables["fronts"],
        )
    if any(row["similarity"].get("cka|prior") for row in tables["matched"]):
        n = min(row["near"] for row in tables["matched"] if row["near"])
        add(
            "similarity",
            "Similarity to the base policy at matched accuracy",
            f"Similarity of the hidden layer to the base policy's on prior-task inputs, mean of the checkpoints within "
            f"1 point of {study_words.points(tables['matched'][0]['level'], 0)} new-task accuracy (at least {n} per "
            f"method), ± one standard error over runs; {words.plural(len(study.seeds), 'seed')}.",
            pictures.similarity,
            tables["matched"],
            study.methods,
        )
    if "sft_teacher" in study.methods and "grpo" in study.methods:
        taught = [point for run in study.teacher for point in points_of(run, [])]
        n = len(study.of("sft_teacher"))
        add(
            "teacher",
            "SFT on the samples of an RL-trained teacher",
            "SFT on labels sampled from a policy that was trained by RL, beside that teacher and its method. n = "
            f"{n} checkpoints of students, {words.plural(len(study.seeds), 'seed')}.",
            pictures.teacher,
            study,
            tables["fronts"],
            taught,
        )
    if tables["dynamics"] and tables["dynamics"][0]["n"]:
        every = study.dynamics[0].config.get("every")
        add(
            "dynamics",
            "Cosine of steps and loss gradients over their KL change",
            f"One point per measured step (each {every}th in one epoch): the size of the change of forward KL that it "
            "made, and the cosine of the step with the gradient of each task's loss; above 0 it goes up that loss. "
            f"n = {tables['dynamics'][0]['n']} steps of {words.plural(tables['dynamics'][0]['runs'], 'run')}, "
            f"{words.plural(len({run.seed for run in study.dynamics}), 'seed')}.",
            pictures.dynamics,
            study,
        )
    if any(row["weight_sparsity_exact"] is not None for row in tables["precision"]):
        add(
            "precision",
            "Unchanged weights and rank of the change by precision",
            "Left: weights equal to the base policy's bit for bit after training in float32 and in bfloat16 (pixels "
            "that are blank in every image keep theirs in both). Right: numerical rank of the change. n = "
            f"{words.plural(len(tables['precision']), 'run')}, "
            f"{words.plural(len({row['seed'] for row in tables['precision']}), 'seed')}.",
            pictures.precision,
            tables["precision"],
        )
    if study.theorem:
        add(
            "theorem",
            "Distance to the KL-minimal optimal policy",
            "How near each process comes to argmin KL(π ‖ π₀) among the policies that are always right, on one finite "
            "problem, computed exactly (n = 1, no seeds). Values below 1e-16 are drawn there.",
            pictures.theorem,
            study.theorem,
        )
    return drawn


def _drawn(study: Study) -> str:
    return "seeds and runs" if len(study.seeds) > 1 else "runs"


def save(figure: Figure, name: str, title: str) -> dict:
    """The figure as inline SVG and as a PDF, without dates."""
    buffer = io.BytesIO()
    svg = figures.svg(figure, name, title)
    figure.set_layout_engine("none")  # it is laid out, and doing it again takes as long as drawing
    figure.savefig(buffer, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return {"svg": svg, "pdf": buffer.getvalue(), "title": title}


def on_paper(svg: str) -> str:
    """An inline figure as a file of its own: black ink on white, with a size."""
    svg = svg.replace("currentColor", INKS[0][1]).replace("var(--faint)", INKS[1][1])
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()
    svg = svg.replace("<svg", f'<svg width="{width}pt" height="{height}pt" style="background:#fff"', 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg}\n'


def render(study: Study, found: dict[str, rows.Law], tables: dict, drawn: dict) -> str:
    """The page as text."""
    functions = {
        "points": study_words.points,
        "span": study_words.span,
        "r2": words.r2,
        "small": words.small,
        "plural": words.plural,
        "label": label,
        "signed": words.number,
        "published": study_words.published_text,
        "verdict": study_words.verdict_text,
        "similarity_text": study_words.similarity_text,
        "kl_text": study_words.kl_text,
        "process_name": lambda name: (pictures.PROCESSES.get(name) or (name.replace("_", " "),))[0],
        "swatch": lambda method: pictures.style(method, study.methods)[0].replace(figures.INK, "currentColor"),
        "predictor_name": lambda name: rows.PREDICTORS.get(name, name.replace("_", " ")),
        "inputs_name": lambda inputs: {"new": "new task", "prior": "prior task"}.get(inputs, "none"),
    }
    main = found.get("paper") or found.get("all")
    scope = f"{words.plural(len(study.sweep), 'run')} of {words.plural(len(study.methods), 'method')}, "
    scope += f"{words.plural(len(study.seeds), 'seed')}, {words.plural(len(study.points), 'checkpoint')}"

    def name(role: str, otherwise: str) -> str:
        task = study.tasks.get(role, otherwise)
        return NAMES.get(task, task)

    return template("study.html", functions).render(
        title=f"Forgetting {name('prior', 'the prior task')} while learning {name('new', 'a new task')}",
        subtitle=scope,
        lead=study_words.headline(tables, found, study),
        tables=tables,
        figures={name: {**figure, "svg": Markup(figure["svg"])} for name, figure in drawn.items()},
        main=main,
        main_methods=", ".join(map(label, main.methods)) if main else "",
        reason=_no_law(main),
        disagreements=study_words.disagreements(main) if main and main.has_fit else [],
        two_by_two=_cells(tables["two_by_two"]),
        missing=[label(method) for method in rows.TWO_BY_TWO if method not in study.methods],
        cost=study_words.cost(study),
        seeds=", ".join(map(str, study.seeds)),
        versions=", ".join(f"{name} {version}" for name, version in study.versions.items()),
        hardware=", ".join(f"{key} {value}" for key, value in study.hardware.items() if value),
        papers={"paper": published.PAPER, "replication": published.REPLICATION},
        claims=published.FRONTS,
        cknna=published.CKNNA,
    )


def _no_law(main: rows.Law | None) -> str:
    if main is None:
        return "no finished run of the sweep"
    if main.has_fit:
        return ""
    return main.note or (main.main or {}).get("note") or "forward KL was not recorded at any checkpoint"


def _cells(matched: Sequence[dict]) -> list[dict]:
    """The 2 x 2 as lines: on-policy, offline; each with and without negatives."""
    of = {row["method"]: row for row in matched}
    if not of:
        return []
    grid = (("on-policy", "grpo", "reinforce_1_0"), ("offline", "simpo", "sft_1"))
    return [{"name": name, "cells": [of[one], of[two]]} for name, one, two in grid]
