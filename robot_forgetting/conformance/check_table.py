"""The printed table of a conformance check: one line per check, as soon as its result is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from robot_forgetting.errors import UserError, blamed, located, one_line


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
            row = Row("FAIL", name, one_line(finding))
        except Exception as error:
            row = Row("FAIL", name, blamed(error) or located(error))
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
