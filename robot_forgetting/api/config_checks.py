"""Checks of a configuration's plain values before anything is built: types, ranges, constructor arguments."""

from __future__ import annotations

import inspect

from robot_forgetting.api.settings import Root
from robot_forgetting.errors import UserError
from robot_forgetting.machine.user_modules import load_object
from robot_forgetting.ranges import arguments, problem


def check_root(plain: dict) -> None:
    """Types and ranges of the keys that belong to no constructor."""
    if said := problem("", plain, Root):
        raise UserError(said)


def check_node(node, path: str, where: str) -> None:
    """Compares a `_target_` node with its constructor: unknown arguments, missing ones, wrong types, numbers outside
    their range. The nodes inside it first."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        check_node(value, f"{path}.{key}", where)
    if not isinstance(node, dict) or "_target_" not in node:
        return
    target = load_object(str(node["_target_"]), where)
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    parameters = signature(target)
    if parameters is None:
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in given.keys() - parameters.keys():
            raise UserError(f"unknown key '{path}.{key}'; {target.__name__} takes: {', '.join(parameters) or 'none'}")
    for key, parameter in parameters.items():
        if key in given and (said := problem(f"{path}.{key}", given[key], parameter.annotation)):
            raise UserError(said)
        needed = parameter.default is parameter.empty and parameter.kind in (0, 1, 3)
        if needed and key not in given and not node.get("_partial_"):
            raise UserError(f"{where} lacks '{key}', which {target.__name__} needs; add it to its yaml")


def signature(target) -> dict[str, inspect.Parameter] | None:
    """The ``arguments`` of a constructor; None where it does not say."""
    try:
        return arguments(target)
    except (TypeError, ValueError, NameError):  # no signature, or annotations that cannot be evaluated
        return None
