"""More sections of the controlled study's page: comparisons at equal accuracy, extras, and where it all comes from."""

from __future__ import annotations

from markupsafe import Markup

from robot_forgetting.metrics import published
from robot_forgetting.report import words
from robot_forgetting.report.markup import (
    Cell,
    bullets,
    columns,
    definitions,
    join,
    note,
    of,
    one,
    paragraph,
    strong,
    table,
    wrapped,
)
from robot_forgetting.studies.digits import study_figures as pictures
from robot_forgetting.studies.digits import study_tables, study_words
from robot_forgetting.studies.digits.study_runs import FIVE, Study, label, points_of
from robot_forgetting.studies.digits.study_sections import StudyPart, StudySection
from robot_forgetting.studies.digits.study_words import kl_text, percent, similarity_text, span

ALL = 60  # runs left out that the page names; the JSON file names all


class TwoByTwo(StudySection):
    name, title, alt = "two_by_two", "On-policy data or negative examples?", "On-policy data and negative examples"

    def rows(self, study: Study) -> dict:
        four = [method for method in study_tables.TWO_BY_TWO if study.of(method)]
        level = study_tables.common_level(study, four) if len(four) == len(study_tables.TWO_BY_TWO) else None
        return {"two_by_two": study_tables.matched_rows(study, four, level) if level else []}

    def figure(self, part: StudyPart):
        return pictures.two_by_two(part.study, part.rows("fronts")) if part.rows(self.name) else None

    def caption(self, part: StudyPart) -> str:
        n = sum(len(part.study.of(row["method"])) for row in part.rows(self.name))
        return (
            "On-policy data (blue) or not (orange), with negative examples (filled) or without (hollow). Lines: "
            f"exponentials through the points near each front. n = {n} checkpoints, "
            f"{part.seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        rows = {row["method"]: row for row in part.rows(self.name)}
        missing = [label(method) for method in study_tables.TWO_BY_TWO if method not in part.study.methods]
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
        level = study_tables.common_level(study, [m for m in reached if m in FIVE] or reached)
        return {"matched": study_tables.matched_rows(study, reached, level) if level else []}

    def figure(self, part: StudyPart):
        rows = part.rows("matched")
        known = any(row["similarity"].get("cka|prior") for row in rows)
        return pictures.similarity(rows, part.study.methods) if known else None

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
        if not {"sft_teacher", "grpo"} <= set(part.study.methods):
            return None
        taught = [point for run in part.study.teacher for point in points_of(run, [])]
        return pictures.teacher(part.study, part.rows("fronts"), taught)

    def caption(self, part: StudyPart) -> str:
        return (
            "SFT on labels sampled from a policy that was trained by RL, beside that teacher and its method. n = "
            f"{len(part.study.of('sft_teacher'))} checkpoints of students, "
            f"{part.seeds}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        said = "The paper: SFT on samples of an RL-trained teacher has the teacher's trade-off (Figure 9)."
        return figure and figure + note(said)


class Dynamics(StudySection):
    name, title, alt = "dynamics", "Dynamics", "Cosine of steps and loss gradients over their KL change"
    missing = "No dynamics were measured (reproduce.extras.dynamics)."

    def rows(self, study: Study) -> dict:
        return {"dynamics": study_tables.dynamics_rows(study) if study.dynamics else []}

    def figure(self, part: StudyPart):
        rows = part.rows(self.name)
        return pictures.dynamics(part.study) if rows and rows[0]["n"] else None

    def caption(self, part: StudyPart) -> str:
        first, runs = part.rows(self.name)[0], part.study.dynamics
        return (
            f"One point per measured step (each {runs[0].config.get('every')}th in one epoch): the size of the change "
            "of forward KL that it made, and the cosine of the step with the gradient of each task's loss; above 0 it "
            f"goes up that loss. n = {first['n']} steps of {words.plural(first['runs'], 'run')}, "
            f"{words.plural(len({run.seed for run in runs}), 'seed')}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        caption = (
            "Rank correlation (Spearman) of the size of a step's KL change with its cosine; 95 % bootstrap over runs "
            "where there are 3 or more. The paper: larger KL steps go more towards forgetting (positive, left), the "
            "opposite for the new task."
        )

        def correlation(row: dict, role: str) -> str:
            names = [f"{role}_{name}" for name in ("correlation", "low", "high")]
            return "too few steps" if row[names[0]] is None else words.r2(row, *names)

        shown = {
            "method": lambda row: "all" if row["method"] == "all" else part.method(row["method"]),
            "prior task's loss": lambda row: correlation(row, "prior"),
            "new task's loss": lambda row: correlation(row, "new"),
            "steps (runs)": lambda row: f"{row['n']} ({row['runs']})",
        }
        return figure + columns(caption, part.rows(self.name), shown)


class Precision(StudySection):
    name, title = "precision", "Sparsity, rank and the precision of training"
    alt = "Unchanged weights and rank of the change by precision"
    missing = "No runs in two precisions (reproduce.extras.precision)."

    def rows(self, study: Study) -> dict:
        return {"precision": study_tables.precision_rows(study)}

    def figure(self, part: StudyPart):
        rows = part.rows(self.name)
        known = any(row["weight_sparsity_exact"] is not None for row in rows)
        return pictures.precision(rows) if known else None

    def caption(self, part: StudyPart) -> str:
        rows = part.rows(self.name)
        return (
            "Left: weights equal to the base policy's bit for bit after training in float32 and in bfloat16 (pixels "
            "that are blank in every image keep theirs in both). Right: numerical rank of the change. n = "
            f"{words.plural(len(rows), 'run')}, {words.plural(len({row['seed'] for row in rows}), 'seed')}."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        named = {
            "weight_sparsity_exact": ("unchanged", "bit for bit"),
            "weight_sparsity": ("unchanged", "within 1e-5"),
            "weight_sparsity_bfloat16": ("unchanged", "rounded to bfloat16"),
            "weight_rank": ("rank", "numerical"),
            "weight_effective_rank": ("rank", "effective"),
            "new": "new task",
            "prior": "prior task",
        }
        caption = (
            "Share of weights that training left as they were, by three rules, and rank of the change (share of the "
            "full rank, mean of matrices; effective: exp of the entropy of the singular values)."
        )
        head = {"method": lambda row: part.method(row["method"]), "trained in": lambda row: row["dtype"]}
        values = {title: (lambda row, name=name: percent(row[name])) for name, title in named.items()}
        shown = columns(caption, part.rows(self.name), head | values)
        said = "The paper: sparse updates are an artefact of bfloat16; every method's update has full rank."
        return shown and figure + shown + note(said)


class Theorem(StudySection):
    name, title, wide = "theorem", "The theorem on a finite problem", False
    alt = "Distance to the KL-minimal optimal policy"
    missing = "The theorem was not checked (reproduce.extras.theorem)."

    def rows(self, study: Study) -> dict:
        return {"theorem": study_tables.theorem_rows(study)}

    def figure(self, part: StudyPart):
        return pictures.theorem(part.study.theorem) if part.study.theorem else None

    def caption(self, part: StudyPart) -> str:
        return (
            "How near each process comes to argmin KL(π ‖ π₀) among the policies that are always right, on one finite "
            "problem, computed exactly (n = 1, no seeds). Values below 1e-16 are drawn there."
        )

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        rows = part.rows(self.name)
        head = {
            "process": lambda row: pictures.process_name(row["process"]),
            "iterations": lambda row: row["iteration"],
            ("distance", "largest difference of a probability"): lambda row: words.small(row["distance"]),
            "success": lambda row: percent(row["success"], 2),
            ("KL(π ‖ π₀)", "nats"): lambda row: words.small(row["kl"], 5),
            "within 1e-6": lambda row: "yes" if row["arrives"] else "no",
        }
        caption = (
            "At the end of each process. The least KL(π ‖ π₀) of a policy that is always right is the one of those "
            "that arrive."
        )
        why = (
            "Projections and the natural gradient multiply the probabilities of all right answers by one factor, so "
            "these keep the base policy's proportions: they end at argmin KL(π ‖ π₀). The plain gradient of a softmax "
            "does not, however small its steps: of two right answers the likelier one gains. SFT ends where its "
            "labels are, whatever the base policy was."
        )
        shown = figure + columns(caption, rows, head)
        return shown and shown + paragraph(why)


class StudyProvenance(StudySection):
    name, title, once = "provenance", "Provenance", True

    def rows(self, study: Study) -> dict:
        return {
            "study": study.name,
            "command": study_words.command(study),
            "runs": [
                {"run": r.id, "method": r.method, "seed": r.seed, "setting": r.setting}
                for r in study.sweep + study.teacher
            ],
            "left_out": study.left_out,
            "notes": study.notes,
            "divergence": study_tables.divergence_rows(study),
            "checkpoints": study.points,
            "choices": [{"what": what, "here": here} for what, here in study_words.choices(study)],
            "published": {
                "table_1": published.TABLE_1,
                "replication": published.REPLICATION_TABLE,
                "law": published.FORGETTING_LAW,
                "fronts": published.FRONTS,
            },
        }

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        study, left_out = part.study, part.rows("left_out")
        why = [Markup('<span class="path">{}</span>: {}').format(row["run"], row["why"]) for row in left_out[:ALL]]
        why += [f"and {len(left_out) - ALL} more in the JSON file"] * (len(left_out) > ALL)
        seeds = ", ".join(map(str, study.seeds)) or "none"
        made = {
            "Versions": ", ".join(f"{name} {version}" for name, version in study.versions.items()),
            "Hardware": ", ".join(f"{key} {value}" for key, value in study.hardware.items() if value),
        }
        return join(
            [
                Markup('<p class="path"><code>{}</code></p>\n').format(part.tables["command"]),
                paragraph(f"{study_words.scope(study)}; seeds: {seeds}. {study_words.cost(study)}"),
                Markup("<h3>Choices where the paper is silent</h3>\n"),
                definitions((row["what"], row["here"]) for row in part.rows("choices")),
                Markup("<h3>Left out</h3>\n"),
                bullets(why) if why else note("Nothing: no run failed or diverged."),
                definitions((name, text) for name, text in made.items() if text),
            ]
        )


TERMS = {
    "Forgetting": "The base policy's accuracy on the prior task minus the fine-tuned policy's, in points.",
    "Forward, reverse KL": "KL(base || fine-tuned) and KL(fine-tuned || base) of the ten class probabilities, exact, "
    "in nats, mean over test images.",
    "Front": "The checkpoints of a method that no other of its checkpoints beats on both tasks; it is picked from "
    "noisy points and so lies a little too high.",
    "Brackets": "95 % percentile intervals: seeds are drawn with replacement, then runs within them; a run's "
    "checkpoints stay together. With one seed, they say nothing about other base policies.",
    "SFT-1, SFT-2, oracle": "Labels 0 and 1 for even and odd; {0, 4} and {1, 5} at random; sampled from the nearest "
    "policy to the base that is always right.",
}


class StudyTerms(StudySection):
    name, title, once = "terms", "Terms", True

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        return definitions(TERMS.items())
