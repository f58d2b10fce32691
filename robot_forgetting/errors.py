"""The one exception a user is meant to see, and whose fault any other one is: ours, or a plug-in's.

A plug-in is code that is neither this package nor an installed library: a user's own method, penalty, task, expert or
policy. An exception is laid to the file of the innermost frame that is not a library's: a plug-in that calls torch
wrongly is named with its own line, and a bug of ours stays one, also where a plug-in led to it.
"""

from __future__ import annotations

import inspect
import os
import sysconfig
import traceback
from collections.abc import Iterator
from multiprocessing.pool import RemoteTraceback
from types import CodeType, FrameType

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")


class UserError(Exception):
    """A bad input or a broken machine. The command line prints it as one line and exits with code 2."""


class Diverged(UserError):
    """A loss, or weights, that are no longer finite numbers."""


class PluginError(UserError):
    """A fault in a plug-in; begins with its file and line."""


def unknown(kind: str, name: object, choices) -> UserError:
    """A ``UserError`` for a name that does not exist, listing those that do."""
    return UserError(f"unknown {kind} '{name}'; choose one of: {', '.join(sorted(map(str, choices)))}")


def check_choice(kind: str, name: object, choices) -> None:
    """Raises ``unknown`` where there is no such name."""
    if name not in choices:
        raise unknown(kind, name, choices)


# ---- whose code it is


def is_plugin(kind: type) -> bool:
    """Whether a class is a user's own."""
    return not _ours(kind.__module__) and not _library(_file(kind))


def place(thing: object) -> str:
    """'my_method.py, line 17': where a function or a class is written; its name where nobody knows."""
    thing = inspect.unwrap(getattr(thing, "__func__", thing))
    try:
        line = thing.__code__.co_firstlineno if hasattr(thing, "__code__") else inspect.getsourcelines(thing)[1]
    except (OSError, TypeError):
        return getattr(thing, "__qualname__", repr(thing))
    return f"{_short(_file(thing))}, line {line}"


def fault(plugin: object, hook: str, complaint: str) -> Exception:
    """What to raise where a plug-in's method gave something wrong: '..., line 17: Mine.loss() <complaint>'.

    A ``PluginError`` (a library's class was the plug-in's choice); a ``TypeError`` where the class is ours, since a bug
    of ours is no user's error.
    """
    kind = plugin if isinstance(plugin, type) else type(plugin)
    function = getattr(kind, hook, None)
    inherited = function is None or _ours(getattr(function, "__module__", ""))
    said = f"{place(kind if inherited else function)}: {kind.__name__}.{hook}() {complaint}"
    return TypeError(said) if _ours(kind.__module__) else PluginError(said)


def blamed(error: BaseException) -> str | None:
    """'my_method.py, line 17, in loss: KeyError: 'x'' where a plug-in raised (or caused) this; None: none did."""
    for link in _chain(error):
        frames = _frames(link)
        if isinstance(link, SyntaxError) and link.filename and not _library(link.filename):
            return f"{_short(link.filename)}, line {link.lineno}: {type(link).__name__}: {link.msg}"
        if frames and not _ours_frame(frames[-1][0]):
            return f"{_told(*frames[-1])}: {described(link)}"
    return None


def caller(error: BaseException) -> str | None:
    """The innermost place in a plug-in from which our own code, where the exception was raised, had been called."""
    found = [_told(*frame) for frame in _frames(error) if not _ours_frame(frame[0])]
    return found[-1] if found else None


def by_library(error: BaseException) -> bool:
    """Whether below the function that caught the exception (and what caused it) only libraries were at work."""
    causes = [link for link in _chain(error) if link is not error]
    return len(_frames(error)) <= 1 and not any(map(_frames, causes))


def one_line(error: BaseException) -> str:
    """An exception's text; its name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(text: str, most: int = 60) -> str:
    """A text of at most so many letters, ``...`` in the place of the rest."""
    return text if len(text) <= most else text[: most - 3] + "..."


def described(error: BaseException) -> str:
    """'KeyError: 'x''."""
    name, text = type(error).__name__, one_line(error)
    return text if text == name else f"{name}: {text}"


def located(error: BaseException) -> str:
    """'KeyError at train.py:12: 'x' (called from my_method.py, line 3, in loss)': one of our own code."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    via = f" (called from {plugin})" if (plugin := caller(error)) else ""
    return f"{type(error).__name__}{where}: {one_line(error)}{via}"


def _chain(error: BaseException) -> list[BaseException]:
    """An exception and those that it was raised from."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__
    return chain


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """(frame, line) of a traceback, outermost first, without those of libraries."""
    walked: Iterator[tuple[FrameType, int]] = traceback.walk_tb(error.__traceback__)
    return [(frame, line) for frame, line in walked if _ours_frame(frame) or not _library(frame.f_code.co_filename)]


def _told(frame: FrameType, line: int) -> str:
    return f"{_short(frame.f_code.co_filename)}, line {line}, in {frame.f_code.co_name}"


def _ours_frame(frame: FrameType) -> bool:
    spec = frame.f_globals.get("__spec__")  # of `python -m robot_forgetting.cli` the name is __main__
    return _ours(spec.name if spec is not None else frame.f_globals.get("__name__", ""))


def _ours(module: str) -> bool:
    return module.partition(".")[0] == __package__


def _library(file: str) -> bool:
    return file.startswith(("<", *LIBRARIES)) or any(folder in file for folder in INSTALLED)


def _file(thing: object) -> str:
    code: CodeType | None = getattr(thing, "__code__", None)
    try:
        return code.co_filename if code is not None else inspect.getsourcefile(thing) or "<unknown>"
    except TypeError:  # a class without a file: of a builtin, or typed at a prompt
        return "<unknown>"


def _short(file: str) -> str:
    """Relative to the working folder, where it lies below."""
    relative = os.path.relpath(file)
    return file if relative.startswith(os.pardir) else relative


# ---- across the boundary between two processes


def told(error: Exception) -> tuple[type[Exception], str, str]:
    """What another process is told of an exception, which itself may not be picklable; for ``raised``."""
    trace = "".join(traceback.format_exception(error))
    if isinstance(error, UserError):
        return UserError, str(error), trace
    if (line := blamed(error)) is not None:
        return PluginError, line, trace
    return RuntimeError, located(error), trace


def raised(kind: type[Exception], line: str, trace: str) -> Exception:
    """The exception that another process has told of: to be raised here, its traceback shown with ``debug=true``."""
    error = kind(line)
    error.__cause__ = RemoteTraceback(trace)
    return error
