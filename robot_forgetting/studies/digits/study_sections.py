"""What the sections of the controlled study's page share, and the first of them."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from robot_forgetting.metrics import published
from robot_forgetting.report import words
from robot_forgetting.report.markup import Content, columns, note, of, pictured, strong
from robot_forgetting.report.section import Part, Section
from robot_forgetting.studies.digits.study_law import MAIN
from robot_forgetting.studies.digits.study_runs import Study, label
from robot_forgetting.studies.digits.study_words import percent


@dataclass
class StudyPart(Part):
    """The whole study."""

    study: Study | None = None
    trained = True

    def method(self, method: str) -> Markup:
        """A method's name behind its colour."""
        return self.who({"method": method, "variant": label(method)})

    @property
    def seeds(self) -> str:
        return words.plural(len(self.study.seeds), "seed")


class StudySection(Section):
    """A section with a figure that is a file, too; ``missing``: what stands there without numbers."""

    wide = True
    missing = ""

    def html(self, part: StudyPart, figure: Markup) -> Content:
        return self.content(part, self.pictured(part, figure)) or note(self.missing)

    @abstractmethod
    def content(self, part: StudyPart, figure: Markup) -> Markup:
        """HTML with the figure; empty where there are no numbers."""

    def pictured(self, part: StudyPart, figure: Markup) -> Markup:
        if not figure:
            return Markup()
        file = Markup(' <span class="path">figures/{}.svg, .pdf</span>').format(self.name)
        return pictured(figure, Markup.escape(self.caption(part)) + file, self.wide)


class Accuracies(StudySection):
    name, title, missing = "base", "Accuracies", "No checkpoint with both accuracies."

    def rows(self, study: Study) -> dict:
        base = base_rows(study) if study.points else []
        return {"base": base, "success": success_rows(study)}

    def content(self, part: StudyPart, figure: Markup) -> Markup:
        def seeds(row: dict) -> Markup:
            return of(", ".join(f"seed {seed['seed']}: {percent(seed['rate'])}" for seed in row["per_seed"]))

        bases = columns(
            "Base policies, test images, most likely class.",
            part.rows("base"),
            {
                "task": lambda row: row["task"] + of(words.role_name(row["role"])),
                "here": lambda row: strong(percent(row["mean"]), seeds(row)),
                "replication": lambda row: percent(row["replication"], 0),
                "paper": lambda row: "not reported",
            },
        )
        caption = (
            "Per method, the run that ended with the best accuracy on the new task (picked on the test images, so a "
            "little too high)."
        )
        shown = {
            "method": lambda row: part.method(row["method"]),
            "new task": lambda row: strong(percent(row["new"])),
            "prior task": lambda row: percent(row["prior"]),
            ("forgetting", "points"): lambda row: words.number(row["forgetting"]),
            ("forward KL", "nats"): lambda row: words.small(row["forward_kl"]),
            "runs (seeds)": lambda row: f"{row['runs']} ({row['seeds']})",
            "checkpoints": lambda row: row["checkpoints"],
        }
        return bases and bases + columns(caption, part.rows("success"), shown)


def base_rows(study: Study) -> list[dict]:
    """Accuracy of the base policies, one each seed, beside the replication's."""
    rows = []
    for role in ("new", "prior"):
        of_seed = {point["seed"]: point[f"base_{role}"] for point in study.points}
        task = study.tasks.get(role, role)
        known = next((row["value"] for row in published.BASE_ACCURACY if row["task"] == task), None)
        values = list(of_seed.values())
        rows.append(
            {
                "task": task,
                "role": role,
                "mean": float(np.mean(values)) if values else None,
                "per_seed": [{"seed": seed, "rate": value} for seed, value in of_seed.items()],
                "paper": None,
                "replication": known,
            }
        )
    return rows


def success_rows(study: Study) -> list[dict]:
    """Per method the best new-task accuracy that a run ended with, and the prior-task accuracy there."""
    rows = []
    for method in study.methods:
        final = [point for point in study.of(method) if point["final"]]
        if not final:  # all its runs ended with a policy that is not finite; ``left_out`` names them
            continue
        best = max(final, key=lambda point: (point["new"], point["prior"]))
        row = {"method": method, "runs": len(final), "seeds": len({point["seed"] for point in final})}
        row |= {"checkpoints": len(study.of(method)), "run": best["run"], "new": best["new"], "prior": best["prior"]}
        rows.append(row | {"forgetting": best["forgetting"], "forward_kl": best["predictors"].get(MAIN)})
    return rows
