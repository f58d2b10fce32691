"""The command line as a user sees it, for tests."""

from __future__ import annotations

from robot_forgetting.cli import command_line as cli


def complaint(capsys, *arguments: str) -> str:
    """The one line that a bad command prints."""
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    return err
