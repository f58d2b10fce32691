"""The printed table of a conformance check: one line per check, as soon as its result is known."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from robot_forgetting.errors import UserError


class Wrong(Exception):
    """A check's finding: 'what is wrong; what to do'."""


class NotApplicable(Exception):
    """Why a check has nothing to look at."""


def expect(condition, complaint: str) -> None:
    """Raises ``Wrong`` unless the condition holds."""
    if not condition:
        raise Wrong(complaint)


@dataclass(frozen=True)
class Row:
    """state: "ok", "FAIL" or "skip"."""

    state: str
    name: str
    detail: str


class Table:
    """Runs checks and prints their rows.

    A check is a function that returns a detail ("20 of 20 succeeded") or None, and raises what it finds. Any other
    exception is a finding too: a plug-in may fail in every way there is.
    """

    def __init__(self):
        self.rows: list[Row] = []
        self._own = Path(__file__).parent

    def section(self, title: str) -> None:
        print(title, flush=True)

    def note(self, text: str) -> None:
        print(f"  ({text})", flush=True)

    def check(self, name: str, function: Callable[[], str | None]) -> bool:
        """Runs one check; whether it did not fail."""
        try:
            row = Row("ok", name, function() or "")
        except NotApplicable as reason:
            row = Row("skip", name, str(reason))
        except (Wrong, UserError) as finding:
            row = Row("FAIL", name, _one_line(finding))
        except Exception as error:
            in_worker = str(error).startswith("Traceback")  # another process's, whose last line says it all
            where = "" if in_worker else f"{type(error).__name__}{self._place(error)}: "
            row = Row("FAIL", name, where + _one_line(error))
        self.add(row)
        return row.state != "FAIL"

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(f"  {row.state:4}  {row.name:27}  {row.detail}".rstrip(), flush=True)

    def finish(self) -> int:
        """Prints the sum; the exit code."""
        failed = sum(row.state == "FAIL" for row in self.rows)
        print(f"{failed} of {len(self.rows)} checks failed" if failed else f"all {len(self.rows)} checks passed")
        return 2 if failed else 0

    def _place(self, error: Exception) -> str:
        """' at my_method.py:17': the innermost line that is not in an installed library."""
        frames = traceback.extract_tb(error.__traceback__)
        outside = [f for f in frames if "site-packages" not in f.filename and "/lib/python" not in f.filename]
        outside = [f for f in outside if Path(f.filename).parent != self._own] or frames
        return f" at {Path(outside[-1].filename).name}:{outside[-1].lineno}"


def _one_line(error: BaseException) -> str:
    """The message; of a worker's traceback only its last line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Traceback"):
        places = [line.strip() for line in lines if line.strip().startswith("File ")]
        own = [line for line in places if "site-packages" not in line and "/lib/python" not in line] or places
        return f"{lines[-1].strip()} ({own[-1]})" if own else lines[-1].strip()
    return " ".join(" ".join(lines).split()) or type(error).__name__
