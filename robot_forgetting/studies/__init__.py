"""Studies that one command regenerates, `robot-forgetting reproduce NAME`, and the page of any run folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from robot_forgetting.errors import UserError


def reproduce(reproduce, config: dict, quick: bool, processes: int, seed: int, point: Callable) -> int:
    """Runs a study into ``run_dir`` (default: runs/STUDY, or runs/STUDY-quick) and makes its report.html.

    Continues what is there.
    """
    if reproduce is None:
        raise UserError("which study? for example: robot-forgetting reproduce parity_mnist")
    folder = Path(config["run_dir"] or f"runs/{reproduce.name}{'-quick' if quick else ''}")
    more = {"point": point} if getattr(reproduce, "composes", False) else {}
    code = reproduce.run(folder, quick=quick, processes=processes, first_seed=seed, **more)
    write_report([folder], folder / "report.html")
    return code


def write_report(
    run_folders: Sequence[Path], output: Path | None = None, sections: Sequence[str] = ("standard",)
) -> Path:
    """``report.write_report``, or the page of the controlled study where some folder holds a run of it."""
    from robot_forgetting.report import page  # jinja2, and matplotlib: only where it is needed
    from robot_forgetting.studies.digits.study_page import write_study
    from robot_forgetting.studies.digits.study_runs import is_study

    folders, place = page.places(run_folders, output)
    if not any(map(is_study, folders)):
        return page.write_report(run_folders, output, sections)
    if list(sections) != ["standard"]:
        raise UserError("sections= is for ordinary runs: a study's page has its own; leave it out")
    return write_study(folders, place)
