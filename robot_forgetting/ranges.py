"""What a setting may be, declared where it is taken: ``groups: Count``, ``clip: Annotated[float, Range(0, 1)]``.

A constructor of your own declares its settings the same way. They are checked before anything is built (see
``config_checks``); `robot-forgetting list keys` and docs/settings.md print them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from robot_forgetting.errors import UserError, shortened


@dataclass(frozen=True)
class Range:
    """The least and the most that a number may be.

    above: the least itself is excluded; also: a number outside the range that is allowed too
    """

    least: float
    most: float
    above: bool = False
    also: float | None = None

    def __contains__(self, value: float) -> bool:
        return value == self.also or (self.least < value if self.above else self.least <= value) and value <= self.most

    def __str__(self) -> str:
        low = f"above {_number(self.least)} and up to" if self.above else f"from {_number(self.least)} to"
        return f"{low} {_number(self.most)}{'' if self.also is None else f', or {_number(self.also)}'}"


@dataclass(frozen=True)
class ArgumentsOf:
    """Marks a mapping of a function's arguments, of those that can be given by name only where it has any."""

    function: Callable
    without: tuple[str, ...] = ()

    def parameters(self) -> dict[str, inspect.Parameter]:
        every = arguments(self.function)
        named = {name: one for name, one in every.items() if one.kind is one.KEYWORD_ONLY} or every
        return {name: one for name, one in named.items() if name not in self.without}


def arguments(function: Callable) -> dict[str, inspect.Parameter]:
    """Those that a function or class takes, annotations evaluated; those of OTHER among them where it passes some on:
    ``**options: Annotated[Any, ArgumentsOf(OTHER)]``."""
    found = dict(inspect.signature(function, eval_str=True).parameters)
    for name, parameter in list(found.items()):
        passed_on = [mark for mark in unmarked(parameter.annotation)[1] if isinstance(mark, ArgumentsOf)]
        if parameter.kind is parameter.VAR_KEYWORD and passed_on:
            del found[name]
            named = {key: one.replace(kind=one.KEYWORD_ONLY) for key, one in passed_on[0].parameters().items()}
            found |= {key: one for key, one in named.items() if key not in found}
    return found


OPEN = object()  # marks a typed dictionary that may have further keys

# The seeds that numpy and torch take, and those derived from them; and some room for the seeds of a study.
Seed = Annotated[int, Range(0, 4_000_000_000)]
Seeds = Annotated[int, Range(1, 10_000)]  # how many
Count = Annotated[int, Range(1, 10_000_000)]
CountOrNone = Annotated[int, Range(0, 10_000_000)]  # none at all: 0
Width = Annotated[int, Range(1, 65_536)]  # of layers, and how many
Pixels = Annotated[int, Range(16, 2048)]
Processes = Annotated[int, Range(1, 512)]
Environments = Annotated[int, Range(1, 16_384)]
Tokens = Annotated[int, Range(1, 1_000_000)]
Steps = Annotated[int, Range(1, 100_000)]  # of an episode
Share = Annotated[float, Range(0, 1)]
Fraction = Annotated[float, Range(0.001, 0.999)]  # that leaves something on both sides
Temperature = Annotated[float, Range(0.01, 100, also=0)]  # 0: greedy
# As far as float32 goes: a rate that is too large shows in the loss, which is not finite then.
LearningRate = Annotated[float, Range(0, 1e38, above=True)]
Weight = Annotated[float, Range(0, 1e6)]  # of one term of a loss against another
Plain = Annotated[Any, Range(-1e9, 1e9)]  # what others read: its numbers are finite, no more is known


def problem(path: str, value: Any, kind: Any) -> str | None:
    """One line that says what is wrong with a plain value; None where it suits the annotation.

    Judged are int, float, bool, str, None, Literal, list, tuple and dict with what they hold, typed dictionaries, data
    classes, and unions of these, with ``Range`` and ``ArgumentsOf`` in ``Annotated``. Any other annotation takes
    anything. A float must be finite: nothing here has a use for nan or inf, and both pass every comparison.
    """
    found = [_problem(path, value, option) for option in options(kind)]
    if None in found:
        return None
    fix = f"; as a text it is written '\"{value}\"'" if str in options(kind) and isinstance(value, int | float) else ""
    return next((text for text in found if text), f"{path}={shortened(str(value))} is not {words(kind)}{fix}")


def _problem(path: str, value: Any, option: Any) -> str | None:
    """As ``problem``; an empty text: the value is of another type altogether."""
    option, marks = unmarked(option)
    origin, inner = typing.get_origin(option) or option, typing.get_args(option)
    if origin is Any:
        outside = any(number not in mark for number in _numbers(value) for mark in marks if isinstance(mark, Range))
        return "" if outside else None
    if origin is Literal:
        return None if value in inner else ""
    if origin in (None, types.NoneType):
        return None if value is None else ""
    if origin in (bool, str):
        return None if type(value) is origin else ""
    if origin in (int, float):
        if isinstance(value, bool) or not isinstance(value, int if origin is int else int | float):
            return ""
        return None if math.isfinite(value) and all(value in m for m in marks if isinstance(m, Range)) else ""
    if origin in (list, tuple, Sequence):
        if not isinstance(value, list | tuple):
            return ""
        if origin is tuple and inner and inner[-1] is not ...:
            kinds = inner if len(inner) == len(value) else None
        else:
            kinds = [inner[0] if inner else Any] * len(value)
        return "" if kinds is None else _first(
            problem(f"{path}[{i}]", one, kind) for i, (one, kind) in enumerate(zip(value, kinds, strict=True))
        )  # fmt: skip
    if (fields := known_keys(option, marks)) is not None:
        if not isinstance(value, dict):
            return ""
        # What another class is built from is compared with that one's constructor, see ``config_checks.check_node``.
        return None if "_target_" in value else _fields_problem(path, value, fields, OPEN in marks)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            return ""
        return _first(problem(f"{path}.{key}", one, inner[1]) for key, one in value.items()) if inner else None
    return None


def _fields_problem(path: str, value: dict, fields: dict, is_open: bool) -> str | None:
    for key, (_, needed) in fields.items():
        if needed and key not in value:
            return f"{path} lacks '{key}'; add it to its yaml" if path else f"'{key}' cannot be left out"
    for key, one in value.items():
        if key in fields:
            if said := problem(f"{path}.{key}" if path else key, one, fields[key][0]):
                return said
        elif not is_open:
            return f"unknown key '{path}.{key}'; {path} takes: {', '.join(fields)}"
    return None


def known_keys(option: Any, marks: Sequence = ()) -> dict[str, tuple[Any, bool]] | None:
    """Key -> (annotation, whether it must be given) of a mapping whose keys are declared; None for anything else."""
    for mark in marks:
        if isinstance(mark, ArgumentsOf):
            return {k: (p.annotation, p.default is p.empty and p.kind != 4) for k, p in mark.parameters().items()}
    if typing.is_typeddict(option):
        hints = typing.get_type_hints(option, include_extras=True)
        return {key: _required(hint, option.__total__) for key, hint in hints.items()}
    if isinstance(option, type) and dataclasses.is_dataclass(option):
        hints = typing.get_type_hints(option, include_extras=True)
        missing = dataclasses.MISSING
        return {
            one.name: (hints[one.name], one.default is missing and one.default_factory is missing)
            for one in dataclasses.fields(option)
            if one.init
        }
    return None


def _required(hint: Any, total: bool) -> tuple[Any, bool]:
    # ``__required_keys__`` does not see through annotations that are texts.
    marked = typing.get_origin(hint) in (typing.Required, typing.NotRequired)
    needed = typing.get_origin(hint) is typing.Required if marked else total
    return (typing.get_args(hint)[0] if marked else hint), needed


def check_fields(instance: Any) -> None:
    """``UserError`` where a field of a data class is outside its declared range, however the object was made."""
    for name, (kind, _) in known_keys(type(instance)).items():
        if said := problem(name, getattr(instance, name), kind):
            raise UserError(said)


def options(kind: Any) -> tuple:
    """The members of a union; a single kind alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)


def unmarked(option: Any) -> tuple[Any, tuple]:
    """An annotation without ``Annotated``, and its marks."""
    if typing.get_origin(option) is Annotated:
        return option.__origin__, option.__metadata__
    return option, ()


def words(kind: Any) -> str:
    """An annotation in words: "a whole number from 1 to 512, or null"; "anything" where it is not judged."""
    said = [_words(option) for option in options(kind)]
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])}, or {said[-1]}"


def _words(option: Any) -> str:
    option, marks = unmarked(option)
    origin, inner = typing.get_origin(option) or option, typing.get_args(option)
    ranges = "".join(f" {mark}" for mark in marks if isinstance(mark, Range)).replace(" 0, or", ", 0, or")
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if origin in simple:
        return simple[origin] + ranges
    if origin in (None, types.NoneType):
        return "null"
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is tuple and inner and inner[-1] is not ...:
        return f"a list of {len(inner)}, each {words(inner[0])}"
    if origin in (list, tuple, Sequence):
        return f"a list, each {words(inner[0])}" if inner and inner[0] is not Any else "a list"
    if (fields := known_keys(option, marks)) is not None:
        return f"a mapping of {', '.join(fields)}"
    return "a mapping" if origin in (dict, Mapping) else f"anything, its numbers{ranges}" if ranges else "anything"


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in a plain value."""
    if isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _numbers(one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _first(found: Iterator[str | None]) -> str | None:
    return next((text for text in found if text), None)


def _number(value: float) -> str:
    return f"{value:_}" if isinstance(value, int) else f"{value:g}"
