"""RL's Razor's experiments with language models (arXiv 2509.04259, section 3 and Table 2): a sweep of ordinary runs.

FOLDER/METHOD-SETTINGS-seedS/ holds a run, the same folder that `robot-forgetting run` would write with these settings:
nothing is trained or measured here. A finished run is left as it is, an unfinished one continues.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypedDict

from robot_forgetting.engine.experiment import Setup, run
from robot_forgetting.errors import Diverged, UserError
from robot_forgetting.machine.progress import bar, say
from robot_forgetting.ranges import Count, LearningRate, Plain, Range, Seeds
from robot_forgetting.records.run_folder import RunFolder

# A method's axes, and the keys of the configuration that they set. "passes" over the training questions become numbers
# of iterations, which depend on the task's size; without it the budget's hold.
AXES = {
    "rates": ("method.optimiser.learning_rate", "lr"),
    "schedules": ("method.optimiser.schedule", ""),
    "batch_sizes": ("method.batch_size", "batch"),
    "updates": ("method.epochs", "updates"),
    "annotators": ("task.annotator", ""),
    "iterations": ("method.iterations", "iterations"),
    "passes": (None, "passes"),
}
ITERATIONS = 10  # about, of a supervised run that is given in passes


@dataclass(frozen=True)
class Spec:
    """One run: its folder's name, the keys that make it, and passes over the data (None: the budget's)."""

    id: str
    settings: dict
    passes: float | None


class Axes(TypedDict, total=False):
    """Values of ``AXES``."""

    rates: list[LearningRate]
    schedules: list[str]
    batch_sizes: list[Count]
    updates: list[Count]
    annotators: list[str]
    iterations: list[Count]
    passes: list[Annotated[float, Range(0, 10_000, above=True)]]


class Quick(TypedDict, total=False):
    """What of the study `quick=true` changes."""

    common: dict[str, Plain]
    grid: dict[str, Axes | list[Axes]]
    seeds: Seeds


class Study:
    """The sweep: for each method every combination of its axes, for each seed.

    common: {policy, task, budget, ...}: keys of every run, which the command line may replace
    grid: {method: {axis of ``AXES``: values}}, or a list of such axes for a method
    quick: what `quick=true` changes of ``common``, ``grid`` and ``seeds``
    """

    composes = True  # its runs are configurations, see ``run``

    def __init__(
        self, *, name: str, common: dict[str, Plain], grid: dict[str, Axes | list[Axes]], seeds: Seeds, quick: Quick
    ):
        self.name, self.common, self.grid, self.seeds, self.quick = name, common, grid, seeds, quick

    def run(
        self, folder: Path, *, point: Callable, quick: bool = False, processes: int = 1, first_seed: int = 0
    ) -> int:
        """Does what is missing in ``folder``, one run after the other; returns 0.

        point(common, fixed): the command's arguments with other defaults and with keys that nobody may replace;
            its ``call(Setup)`` builds a run, ``value("task")`` the new task alone
        processes: threads of a policy on a CPU; the runs take turns, since one model fills a machine's memory
        """
        changes = self.quick if quick else {}
        common = self.common | changes.get("common", {})
        specs = self.specs(
            changes.get("grid", self.grid), range(first_seed, first_seed + changes.get("seeds", self.seeds))
        )
        if not specs:
            raise UserError("reproduce.grid asks for no run at all: each method needs values for each of its axes")
        size = point(common, {}).value("task").size("train")  # complains of missing data before anything else
        done = [spec for spec in specs if _finished(folder / spec.id)]
        diverged = []
        with bar(self.name, len(specs), len(done)) as progress:
            for spec in specs:
                if spec in done:
                    continue
                fixed = {**spec.settings, "run_dir": folder / spec.id}
                if spec.passes is not None:
                    fixed |= _iterations(point(common, fixed).plain["method"], spec.passes, size)
                try:
                    run(point(common, fixed).call(Setup))
                    shutil.rmtree(folder / spec.id / "checkpoints", ignore_errors=True)  # gigabytes each
                except Diverged as error:
                    say(f"  {spec.id}: {error}; it is left out")
                    diverged.append(spec)
                progress.advance(1, spec.id)
        say(f"{len(specs) - len(diverged)} runs of {len(specs)} finished: {folder}")
        return 0

    def specs(self, grid: dict, seeds: Sequence[int]) -> list[Spec]:
        """Every run of the sweep, a seed's together."""
        found = []
        parts = [(method, axes) for method, several in grid.items() for axes in _several(several)]
        for seed, (method, axes) in itertools.product(seeds, parts):
            for values in itertools.product(*axes.values()):
                chosen = dict(zip(axes, values, strict=True))
                keys = {AXES[axis][0]: value for axis, value in chosen.items() if AXES[axis][0]}
                said = [f"{AXES[axis][1]}{value}" for axis, value in chosen.items() if value is not None]
                name = "-".join([method, *said, f"seed{seed}"])
                found.append(Spec(name, {"method": method, "seed": seed, **keys}, chosen.get("passes")))
        return found


def _iterations(method: dict, passes: float, size: int) -> dict[str, int]:
    """Keys that make a method see every training question ``passes`` times, up to a part of an iteration."""
    if "groups" in method:
        return {"method.iterations": max(1, int(passes * size) // min(method["groups"], size))}
    steps = max(1, int(passes * size) // min(method["batch_size"], size))
    each = max(1, steps // ITERATIONS)
    return {"method.steps_per_iteration": each, "method.iterations": steps // each}


def _finished(folder: Path) -> bool:
    return (folder / "run.json").is_file() and RunFolder(folder).finished


def _several(axes: dict | list[dict]) -> list[dict]:
    return axes if isinstance(axes, list) else [axes]
