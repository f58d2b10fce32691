"""Run folders as pandas frames: the rows of many runs in one, and the tables that the page is made of."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from robot_forgetting.errors import UserError
from robot_forgetting.records.run_folder import RunFolder, find_runs

# Columns that say of which run a row is, beside "run"; -> the key of run.json. (A row's own "task" is the one that it
# is about, its "seed" an initial state's.)
OF_RUN = {"method": "method", "penalty": "penalty", "policy": "policy", "new_task": "task", "run_seed": "seed"}


class Runs:
    """Run folders, and what is in them as pandas frames.

    runs: the folders
    episodes, train, measures: rows of episodes.jsonl, train.jsonl and divergence.jsonl, with columns "run" and those of
        ``OF_RUN``
    success, forgetting: of each method over its runs, with n and 95 % intervals, by the page's own code
    tables: name -> each table of report.json, the matched comparison and the predictors among them
    """

    def __init__(self, runs: Iterable[RunFolder]):
        self.runs = list(runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str(run.path) for run in self.runs)})"

    @cached_property
    def episodes(self):
        return self._rows("episodes")

    @cached_property
    def train(self):
        return self._rows("train")

    @cached_property
    def measures(self):
        return self._rows("divergence")

    @cached_property
    def success(self):
        return self._tables("success")["success"]

    @cached_property
    def forgetting(self):
        return self._tables("forgetting")["forgetting"]

    @cached_property
    def tables(self) -> dict:
        return self._tables("standard")

    def _rows(self, table: str):
        frame = _frames()
        ids = [run.id for run in self.runs]
        unique = len(set(ids)) == len(ids)
        found = []
        for run in self.runs:
            state = run.run
            head = {"run": run.id if unique else str(run.path)} | {name: state.get(key) for name, key in OF_RUN.items()}
            found += [{**head, **row} for row in run.rows(table)]
        return frame(found, columns=None if found else ["run", *OF_RUN])

    def _tables(self, section: str) -> dict:
        from robot_forgetting.report.page import read_tables
        from robot_forgetting.report.section import HIDDEN

        frame = _frames()
        tables = read_tables([run.path for run in self.runs], [section])
        empty = [*HIDDEN, "task"]
        return {n: frame(rows, columns=None if rows else empty) for n, rows in tables.items() if isinstance(rows, list)}


def _frames() -> type:
    try:
        from pandas import DataFrame
    except ImportError as error:
        raise UserError("tables of runs need pandas: pip install pandas") from error
    return DataFrame


class Run(Runs):
    """One run folder and its tables; ``path`` and ``folder`` are what ``RunFolder`` has more."""

    def __init__(self, path: str | Path):
        super().__init__([RunFolder(path)])
        self.folder = self.runs[0]
        self.path = self.folder.path

    def summary(self) -> dict | None:
        """The content of summary.json; None before the run has ended."""
        return self.folder.summary()


def load_runs(paths: str | Path | Iterable[str | Path]) -> Runs:
    """The run folders at or below a path, or several; ``UserError`` where there is none."""
    return Runs(find_runs([paths] if isinstance(paths, str | Path) else paths))
