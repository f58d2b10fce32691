"""Run folders as tables: rows of many runs in one pandas frame each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from robot_forgetting.errors import UserError
from robot_forgetting.records.run_folder import RunFolder, find_runs
from robot_forgetting.records.summary import forgetting_table, success_table

# Columns that say of which run a row is, beside "run"; -> the key of run.json. (A row's own "task" is the one that it
# is about, its "seed" an initial state's.)
OF_RUN = {"method": "method", "penalty": "penalty", "policy": "policy", "new_task": "task", "run_seed": "seed"}


class Runs:
    """Run folders, and their rows as pandas frames with a column "run" and those of ``OF_RUN``.

    runs: the folders; episodes, train: rows of the files of these names; measures: of divergence.jsonl
    success, forgetting: as in summary.json, with n and 95 % intervals; of unfinished runs what there is so far
    """

    def __init__(self, runs: Iterable[RunFolder]):
        self.runs = list(runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str(run.path) for run in self.runs)})"

    @cached_property
    def episodes(self):
        return self._frame(lambda run: run.rows("episodes"))

    @cached_property
    def train(self):
        return self._frame(lambda run: run.rows("train"))

    @cached_property
    def measures(self):
        return self._frame(lambda run: run.rows("divergence"))

    @cached_property
    def success(self):
        return self._frame(lambda run: success_table(run.rows("episodes")))

    @cached_property
    def forgetting(self):
        return self._frame(lambda run: forgetting_table(run.rows("episodes")))

    def _frame(self, rows: Callable[[RunFolder], Sequence[Mapping]]):
        try:
            import pandas
        except ImportError as error:
            raise UserError("tables of runs need pandas: pip install pandas") from error
        ids = [run.id for run in self.runs]
        unique = len(set(ids)) == len(ids)
        found = []
        for run in self.runs:
            state = run.run
            head = {"run": run.id if unique else str(run.path)} | {name: state.get(key) for name, key in OF_RUN.items()}
            found += [{**head, **row} for row in rows(run)]
        return pandas.DataFrame(found, columns=None if found else ["run", *OF_RUN])


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
