"""The page of the controlled study: its runs, its title, its sections."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from robot_forgetting.metrics import published
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.report.page import Page, rows_of, write_page
from robot_forgetting.studies.digits import study_words
from robot_forgetting.studies.digits.study_extras import Dynamics, Precision, Theorem
from robot_forgetting.studies.digits.study_figures import Styles
from robot_forgetting.studies.digits.study_fronts import StudyFronts
from robot_forgetting.studies.digits.study_matched import Similarity, Teacher, TwoByTwo
from robot_forgetting.studies.digits.study_predictors import LawOfAll, LawSection, StudyPredictors
from robot_forgetting.studies.digits.study_provenance import StudyProvenance, StudyTerms
from robot_forgetting.studies.digits.study_runs import load_study
from robot_forgetting.studies.digits.study_sections import Accuracies, StudyPart

SECTIONS = (
    Accuracies(),
    StudyFronts(),
    LawSection(),
    LawOfAll(),
    StudyPredictors(),
    TwoByTwo(),
    Similarity(),
    Teacher(),
    Dynamics(),
    Precision(),
    Theorem(),
    StudyProvenance(),
    StudyTerms(),
)
NAMES = {"parity_mnist": "ParityMNIST", "fashion_mnist": "FashionMNIST"}
NOTHING = "No run of the sweep has finished, so there is nothing to say yet."


def write_study(folders: Sequence[RunFolder], output: Path) -> Path:
    """Writes the page, its tables as JSON, and its figures as figures/*.svg and *.pdf; returns the page's path.

    The same folders give the same files, byte for byte. UserError where no folder holds a run of a study.
    """
    return write_page(study_page(folders), output)


def study_page(folders: Sequence[RunFolder]) -> Page:
    study = load_study(folders)
    tables, colours = rows_of(study, SECTIONS), Styles(study.methods)
    new, prior = (study.tasks.get(role, name) for role, name in (("new", "a new task"), ("prior", "the prior task")))
    return Page(
        title=f"Forgetting {NAMES.get(prior, prior)} while learning {NAMES.get(new, new)}",
        subtitle=f"{study_words.scope(study)}. A controlled study after {published.PAPER}.",
        sections=SECTIONS,
        parts=[StudyPart("", (), tables, colours, study=study)],
        whole=StudyPart("", (), tables, colours, study=study),
        tables=tables,
        lead=study_words.headline(tables, study) or [NOTHING],
        notes=lambda: study.notes,
        files=True,
    )
