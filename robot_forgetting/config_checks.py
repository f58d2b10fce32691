"""Checks of a configuration's plain values before anything is built: types, ranges, constructor arguments."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Sequence

from robot_forgetting.errors import UserError
from robot_forgetting.user_modules import load_object

GROUPS = ("task", "method", "policy", "penalty", "budget", "reproduce")

ROOT_TYPES = {
    "seed": int, "episodes": int | None, "seed_start": int | None, "num_envs": int, "processes": int, "render": str,
    "simulation": str, "image_size": int, "full_pictures": bool,
    "sweep": str, "run_dir": str | None, "output": str | None, "golden": str | None, "checkpoint": str | None,
    "recordings": str | None,
    "device": str, "kind": str, "debug": bool, "quick": bool, "prior": list, "held_out": list,
    "limit": int | None, "allow_code_execution": bool | str,
}  # fmt: skip
LEAST = {
    "seed": 0,
    "episodes": 1,
    "limit": 1,
    "seed_start": 0,
    "num_envs": 1,
    "processes": 1,
    "image_size": 16,
    "temperature": 0,
}


# What the commands read of a budget; its other keys are for the yaml of methods.
BUDGET = ("episodes", "greedy_episodes", "interim_points", "interim_episodes", "divergence_episodes",
          "divergence_states", "videos")  # fmt: skip
PRETRAIN = {"demonstrations": dict, "iterations": int, "steps_per_iteration": int, "batch_size": int,
            "label_sigma": float, "episodes": int, "optimiser": dict}  # fmt: skip

HELD_OUT_TEXT = {"source": str | None, "number": int, "characters": int, "neighbours": int}

KINDS = ("robot", "text")  # of tasks; methods have settings for each


OWN_KEYS = "pretrain.demonstrations"  # a mapping whose keys the user chooses


def replacing(argument: str) -> list[str]:
    """A given mapping of ``OWN_KEYS`` takes the place of ours; hydra would merge the two."""
    return [f"~{OWN_KEYS}", f"+{argument}"] if argument.startswith(f"{OWN_KEYS}={{") else [argument]


def typed(arguments: Sequence[str]) -> list[str]:
    """Arguments as the user gave them: what ``replacing`` took apart is one again."""
    kept = [argument for argument in arguments if argument != f"~{OWN_KEYS}"]
    return [argument[1:] if argument.startswith(f"+{OWN_KEYS}=") else argument for argument in kept]


def by_kind(robot, text, *, _root_):
    """The resolver ``${by_kind:ROBOT,TEXT}``: the value for the kind of task that the configuration is about."""
    return text if _root_.get("kind") == "text" else robot


def check_root(plain: dict) -> None:
    """Types and ranges of the keys that belong to no constructor."""
    values = {**plain, "temperature": (plain.get("decode") or {}).get("temperature")}
    for key, kind in {**ROOT_TYPES, "temperature": float}.items():
        value = values.get(key)
        shown = "decode.temperature" if key == "temperature" else key
        if not fits(value, kind):
            raise UserError(f"{shown}={value} is not {_kind_name(kind)}")
        if key in LEAST and value is not None and value < LEAST[key]:
            raise UserError(f"{shown}={value} is too small; the least is {LEAST[key]}")

    if plain.get("kind") not in KINDS:
        raise UserError(f"kind={plain.get('kind')} is unknown; choose one of: {', '.join(KINDS)}")
    _check_mapping("budget", plain.get("budget"), dict.fromkeys(BUDGET, int))
    _check_mapping("pretrain", plain.get("pretrain"), PRETRAIN)
    _check_mapping("held_out_text", plain.get("held_out_text"), HELD_OUT_TEXT)
    counts = plain["pretrain"]["demonstrations"]
    _check_mapping("pretrain.demonstrations", counts, dict.fromkeys(counts, int))


def _check_mapping(name: str, values, kinds: dict) -> None:
    """A mapping of whole numbers that are counts, numbers and mappings."""
    if not isinstance(values, dict):
        raise UserError(f"{name}={values} is not a mapping")
    for key, kind in kinds.items():
        if key not in values:
            raise UserError(f"{name} lacks '{key}'; add it to its yaml")
        if not fits(values[key], kind):
            raise UserError(f"{name}.{key}={values[key]} is not {_kind_name(kind)}")
        if kind is int and values[key] < 0:
            raise UserError(f"{name}.{key}={values[key]} is too small; the least is 0")


def check_node(node, path: str, where: str) -> None:
    """Compares a `_target_` node with its constructor: unknown arguments, missing ones, wrong types."""
    if isinstance(node, list):
        for index, item in enumerate(node):
            check_node(item, f"{path}.{index}", where)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        check_node(value, f"{path}.{key}", where)
    if "_target_" not in node:
        return
    target = load_object(str(node["_target_"]), where)
    given = {key: value for key, value in node.items() if not key.startswith("_")}
    try:
        parameters = inspect.signature(target, eval_str=True).parameters
    except (TypeError, ValueError, NameError):  # no signature, or annotations that cannot be evaluated
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        for key in given.keys() - parameters.keys():
            raise UserError(f"unknown key '{path}.{key}'; {target.__name__} takes: {', '.join(parameters)}")
    for key, parameter in parameters.items():
        if key in given and not fits(given[key], parameter.annotation):
            raise UserError(f"{path}.{key}={given[key]} is not {_kind_name(parameter.annotation)}")
        needed = parameter.default is parameter.empty and parameter.kind in (0, 1, 3)
        if needed and key not in given and not node.get("_partial_"):
            raise UserError(f"{where} lacks '{key}', which {target.__name__} needs; add it to its yaml")


def fits(value, kind) -> bool:
    """Whether a plain value suits an annotation; annotations other than int, float, bool, str, list are not judged.

    A float must be finite: nothing here has a use for nan or inf, and both pass every comparison that should stop them.
    """
    options = getattr(kind, "__args__", ()) if _is_union(kind) else (kind,)
    judged = {int, float, bool, str, list, dict, type(None), None}
    if any(option not in judged for option in options):
        return True
    for option in options:
        if option in (None, type(None)):
            if value is None:
                return True
        elif option is float:
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                return True
        elif type(value) is option:
            return True
    return False


def _is_union(kind) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _kind_name(kind) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list [a, b]"}
    options = getattr(kind, "__args__", ()) if _is_union(kind) else (kind,)
    return " or ".join(words.get(option, "null" if option is type(None) else "a mapping") for option in options)
