"""Which code an object runs: its module and those it imports, as digests that comments and docstrings do not change.

Rows that were measured by other code are other rows, whatever the names and settings say. Followed are the user's own
modules and this package's; what lies among the installed packages is told by their versions (run.json) and not read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import CodeType, FunctionType

from robot_forgetting.machine.user_modules import folders

PACKAGE = "robot_forgetting"
# Of the package: what takes part in no number of an episode, and would change digests at every other repair.
NO_PART = ("built_with", "contracts", "errors", "finite", "measure", "method", "moved", "ranges", "machine.doctor",
           "machine.files", "machine.progress", "machine.user_modules", "machine.vulkan", "engine.experiment",
           "engine.replica", "engine.train", "api", "cli", "conformance", "measures", "records", "report",
           "studies")  # fmt: skip
ASIDE = {PACKAGE, *(f"{PACKAGE}.{name}" for name in NO_PART)}


def code_of(objects: Iterable[object], named: Iterable[str] = ()) -> dict[str, str]:
    """Module -> digest, of all code that the objects and the named modules run; "module:Class" where a class has no
    source (it was typed into a notebook or a prompt): then the digest is of its compiled functions."""
    found: dict[str, str] = {}
    kinds = [kind for one in objects for kind in _kinds(one)]
    waiting = [kind.__module__ for kind in kinds] + list(named)
    roots = set(waiting)  # read wherever they lie; of what they import, not the installed packages
    for kind in kinds:
        if file_of(kind.__module__) is None and not _installed(kind.__module__):
            found[f"{kind.__module__}:{kind.__qualname__}"] = _compiled(kind)
    while waiting:
        name = waiting.pop()
        if name in found or name in ASIDE or name.rpartition(".")[0] in ASIDE - {PACKAGE}:
            continue
        file = file_of(name) if name in roots or not _installed(name) else None
        if file is not None:
            found[name], imported = _digest(file, name)
            waiting += imported
    return dict(sorted(found.items()))


def _kinds(one: object) -> Iterator[type | FunctionType]:
    """The classes and functions that an object is made of: its own, and those of what it holds."""
    held = list(vars(one).values()) if hasattr(one, "__dict__") else []
    within = [item for items in held if isinstance(items, list | tuple) for item in items[:8]]
    for value in [one, *held, *within]:
        if isinstance(value, FunctionType):
            yield value
        for kind in type(value).__mro__:
            if (kind is type(value) and value is one) or not _installed(kind.__module__):
                yield kind


@cache
def file_of(name: str) -> str | None:
    """The source file of a module, which is not imported for it; None where it has none."""
    module = sys.modules.get(name)
    spec = None if module is not None else _spec(name)
    origin = getattr(module, "__file__", None) if spec is None else spec.origin
    return origin if origin is not None and origin.endswith(".py") and Path(origin).is_file() else None


@cache
def _spec(name: str):
    top, _, rest = name.partition(".")
    if top == PACKAGE:  # one of its folders lies elsewhere in a checkout, which only its own finder knows
        with suppress(ImportError, AttributeError):  # what stands after a dot may be no module
            return importlib.util.find_spec(name)
        return None
    if not rest:
        return PathFinder.find_spec(top, [*sys.path, *folders])
    parent = _spec(name.rpartition(".")[0])
    places = parent and parent.submodule_search_locations
    return PathFinder.find_spec(name, list(places)) if places else None


@cache
def _installed(name: str) -> bool:
    """Whether a module is Python's own, or lies among the installed packages (the package itself never does)."""
    top = name.partition(".")[0]
    if top in (PACKAGE, "__main__", "__mp_main__"):
        return False
    if top in sys.stdlib_module_names:
        return True
    spec = sys.modules[top].__spec__ if top in sys.modules else _spec(top)
    if spec is None:  # not there, or run without a file of its own
        return False
    places = [spec.origin or "", *(spec.submodule_search_locations or [])]
    return any(part in ("site-packages", "dist-packages") for place in places for part in Path(place).parts)


@cache  # as it was when first asked for: a later edit does not change the code that this process runs
def _digest(file: str, name: str) -> tuple[str, list[str]]:
    """Of a source file: the digest without comments and docstrings, and the modules that it imports anywhere."""
    text = Path(file).read_bytes()
    try:
        tree = ast.parse(text)
    except SyntaxError:  # it could not be imported either; what imports it says so
        return hashlib.sha256(text).hexdigest()[:12], []
    package = name if file.endswith("__init__.py") else name.rpartition(".")[0]
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            imported += [source, *(f"{source}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.body and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12], imported


def _compiled(kind: type | FunctionType) -> str:
    """Digest of the compiled functions of a class or a function, and of those of its module that they call by name."""
    digest, waiting, seen = hashlib.sha256(), [kind], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, type):
            held = [inspect.unwrap(value) for _, value in sorted(vars(one).items()) if callable(value)]
            waiting += [value for value in held if isinstance(value, FunctionType | type)]
        if not isinstance(one, FunctionType):
            continue
        for code in _codes(one.__code__):
            constants = [repr(part) for part in code.co_consts if isinstance(part, int | float | str | bytes | tuple)]
            digest.update(repr((code.co_name, code.co_code, code.co_names, constants)).encode())
            called = [one.__globals__.get(name) for name in code.co_names]
            waiting += [part for part in called if getattr(part, "__module__", None) == kind.__module__]
    return digest.hexdigest()[:12]


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for part in code.co_consts:
        if inspect.iscode(part):
            yield from _codes(part)
