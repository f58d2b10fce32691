"""Modules of the user's own, in the working folder and in those of hydra.searchpath.

These folders join the path only when something is named that no installed module answers for, and then behind all the
others: a working folder may hold what somebody else wrote, and a `numpy.py` among downloaded runs must not run.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from robot_forgetting.errors import UserError, blamed, one_line

PLACES = "modules are found in the current folder and in those of hydra.searchpath"
folders: list[str] = []


def search(places: Iterable[Path | str]) -> None:
    """Names the folders in which ``import_module`` may look; a spawned process has to be told again."""
    folders[:] = dict.fromkeys(str(Path(place).resolve()) for place in places)


def import_module(name: str) -> ModuleType:
    top = name.partition(".")[0]
    if top not in sys.modules and importlib.util.find_spec(top) is None:
        sys.path.extend(folder for folder in folders if folder not in sys.path)
    return importlib.import_module(name)


def load_object(dotted: str, where: str = ""):
    """The object that a dotted path names; ``UserError``, which begins with ``where``, if there is none."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        start = f"{where}: cannot import" if where else "cannot import"
        cure = hidden(dotted) or PLACES if module else "give it as package.module.name"
        why = blamed(error) or one_line(error)
        raise UserError(f"{start} '{dotted}' ({why}); {cure}") from error


def hidden(dotted: str) -> str:
    """Says which file cannot be reached because a module before it on the path has its name; nothing if none."""
    top = dotted.partition(".")[0]
    specs = [PathFinder.find_spec(top, [folder]) for folder in (*sys.path, *folders)] if top else []
    files = list(dict.fromkeys(spec.origin for spec in specs if spec is not None and spec.has_location))
    if len(files) < 2:
        return ""
    return f"{files[-1]} is hidden by {files[0]}: give your module a name that no installed one has"
