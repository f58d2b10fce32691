"""What an object was built with: a run that is given objects in the place of names records them so.

``Policy``, ``Task``, ``Method``, ``Penalty`` and ``Measure`` remember their constructor's arguments by themselves.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path

MOST = 100  # items of a list that are written down; a longer one is told by a digest


class BuiltWith:
    """``built_with``: argument of the constructor -> its plain value, see ``described``."""

    built_with: dict = {}

    def __init_subclass__(cls, **named):
        super().__init_subclass__(**named)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)


def _remembering(constructor: Callable) -> Callable:
    @functools.wraps(constructor)
    def wrapped(self, *arguments, **named):
        if "built_with" not in vars(self):  # the constructor of the object's own class is called first
            object.__setattr__(self, "built_with", _given(constructor, arguments, named))
        constructor(self, *arguments, **named)

    return wrapped


def _given(constructor: Callable, arguments: tuple, named: dict) -> dict:
    try:
        bound = inspect.signature(constructor).bind(None, *arguments, **named)
    except TypeError:  # the constructor is about to say what is wrong
        return {}
    _, *given = bound.arguments.items()
    return {key: described(value) for key, value in given}


def described(thing: object) -> object:
    """Plain values that say what an object is: of one that was built, its class as `_target_` and what it was built
    with; of an array, a digest of its numbers; of what nothing is known of, the name of its class."""
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, Path):
        return str(thing)
    if isinstance(thing, Mapping):
        return {str(key): described(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple | range):
        listed = [described(one) for one in thing]
        return listed if len(listed) <= MOST else f"{len(listed)} items, sha256 {_digest(repr(listed).encode())}"
    if isinstance(thing, type) or inspect.isroutine(thing):
        return _name(thing)
    if is_dataclass(thing):
        return {"_target_": _name(type(thing))} | {
            one.name: described(getattr(thing, one.name)) for one in fields(thing) if one.init
        }
    if isinstance(thing, BuiltWith):
        return {"_target_": _name(type(thing)), **thing.built_with}
    if hasattr(thing, "__array__") and hasattr(thing, "shape"):
        array = thing.detach().cpu().float().numpy() if hasattr(thing, "detach") else thing
        return f"{_name(type(thing))} {list(thing.shape)}, sha256 {_digest(array.tobytes())}"
    return _name(type(thing))


def _name(kind) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
