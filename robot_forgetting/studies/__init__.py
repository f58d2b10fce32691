"""Studies that one command regenerates: `robot-forgetting reproduce NAME`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from robot_forgetting.errors import UserError


def reproduce(reproduce, config: dict, quick: bool, processes: int, seed: int, point: Callable) -> int:
    """Runs a study into ``run_dir`` (default: runs/STUDY, or runs/STUDY-quick) and makes its report.html.

    Continues what is there.
    """
    from robot_forgetting.report import write_report  # matplotlib, only where it is needed

    if reproduce is None:
        raise UserError("which study? for example: robot-forgetting reproduce parity_mnist")
    folder = Path(config["run_dir"] or f"runs/{reproduce.name}{'-quick' if quick else ''}")
    more = {"point": point} if getattr(reproduce, "composes", False) else {}
    code = reproduce.run(folder, quick=quick, processes=processes, first_seed=seed, **more)
    write_report([folder], folder / "report.html")
    return code
