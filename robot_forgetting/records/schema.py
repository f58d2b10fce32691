"""What the files of a run folder hold. They are checked when they are read: an older version may have written them,
or somebody else.

A key must be there unless its kind is ``... | None``, which may be absent or null, or it has a default, which it gets
where an older record lacks it. Keys that are not listed are kept as they are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from robot_forgetting.errors import UserError, shortened

REQUIRED = object()


@dataclass(frozen=True)
class Kind:
    """words: what a value must be; fits: whether it is; optional: it may be absent."""

    words: str
    fits: Callable[[Any], bool]
    optional: bool = False

    def __or__(self, none: None) -> Kind:
        return Kind(f"{self.words} or null", lambda value: value is None or self.fits(value), True)


# 64 bits: what numpy and a double can do something with.
TEXT = Kind("a text", lambda value: type(value) is str)
WHOLE = Kind("a whole number", lambda value: type(value) is int and -(2**63) <= value < 2**63)
COUNT = Kind("a count", lambda value: type(value) is int and 0 <= value < 2**63)
NUMBER = Kind(
    "a number",
    lambda value: math.isfinite(value) if type(value) is float else type(value) is int and -(2**63) <= value < 2**63,
)
FLAG = Kind("true or false", lambda value: type(value) is bool)
RATE = Kind("a number from 0 to 1", lambda value: type(value) in (int, float) and 0 <= value <= 1)
NAME = Kind(
    "a text or an object with a name",
    lambda value: (
        type(value) is str
        or (type(value) is dict and any(type(value.get(key)) is str and value[key] for key in ("name", "_target_")))
    ),
)
OBJECT = Kind("an object", lambda value: type(value) is dict)


DECODE = Kind(
    "an object whose temperature is a number",
    lambda value: type(value) is dict and NUMBER.fits(value.get("temperature", 1.0)),
)


def _trained(value) -> bool:
    return type(value) is dict and list_of(TEXT).fits(value.get("trained_on") or [])


def list_of(kind: Kind) -> Kind:
    return Kind(f"a list, each of it {kind.words}", lambda value: type(value) is list and all(map(kind.fits, value)))


def object_of(kind: Kind) -> Kind:
    return Kind(
        f"an object, each value of it {kind.words}",
        lambda value: type(value) is dict and all(map(kind.fits, value.values())),
    )


# Per table: key -> kind, or (kind, default).
CHECKPOINT = {"stage": WHOLE, "iteration": (WHOLE, 0)}
TABLES: dict[str, dict] = {
    "episodes": {
        **CHECKPOINT,
        "task": TEXT,
        "seed": WHOLE,
        "success": FLAG,
        "role": (TEXT, "new"),
        "decode": (TEXT, "sampled"),
        "temperature": (NUMBER | None, None),
        "source": (TEXT | None, None),
        "error": (TEXT | None, None),
        "video": TEXT | None,
        "episode": WHOLE | None,
        "reward": NUMBER | None,
        "steps": NUMBER | None,
        "seconds": NUMBER | None,
    },
    "train": {
        "stage": (WHOLE, 1),
        "iteration": WHOLE,
        "step": WHOLE | None,
        "loss": NUMBER | None,
        "penalty": NUMBER | None,
        "grad_norm": NUMBER | None,
        "learning_rate": NUMBER | None,
        "seconds": NUMBER | None,
        "env_steps": NUMBER | None,
        "rollout_success": NUMBER | None,
        "episodes": WHOLE | None,
    },
    "divergence": {
        **CHECKPOINT,
        "stage": (WHOLE, 1),
        "measure": TEXT,
        "unit": TEXT,
        "states": TEXT | None,
        "value": NUMBER | None,
        "task": TEXT | None,
        "role": TEXT | None,
        "standard_error": NUMBER | None,
        "n": WHOLE | None,
        "episodes": WHOLE | None,
        "layer": WHOLE | None,
        "k": WHOLE | None,
    },
    # Those of a controlled study.
    "dynamics": {
        "iteration": WHOLE,
        "kl": NUMBER | None,
        "kl_change": NUMBER | None,
        "update_norm": NUMBER | None,
        "cosine_prior": NUMBER | None,
        "cosine_new": NUMBER | None,
    },
    "theorem": {"process": TEXT, "iteration": WHOLE, "distance": NUMBER, "success": NUMBER | None, "kl": NUMBER | None},
}
RUN: dict = {
    "schema_version": WHOLE,
    "status": (TEXT, "failed"),
    "verb": (TEXT | None, None),
    "policy": NAME | None,
    "task": NAME | None,
    "method": NAME | None,
    "penalty": NAME | None,
    "seed": WHOLE | None,
    "decode": DECODE | None,
    "roles": object_of(list_of(NAME)) | None,
    "sequence": list_of(TEXT) | None,
    "stage": COUNT | None,
    "instructions": object_of(TEXT) | None,
    "chance": object_of(RATE) | None,
    "protocols": OBJECT | None,
    "left_out": OBJECT | None,
    "undefined": OBJECT | None,
    "measures": OBJECT | None,
    "versions": OBJECT | None,
    "hardware": OBJECT | None,
    "render": OBJECT | None,
    "timings": object_of(NUMBER | None) | None,
    "traits": OBJECT | None,
    "peak_memory_bytes": NUMBER | None,
    "fingerprint": TEXT | None,
    "checkpoint": TEXT | None,
    "checkpoint_state": Kind("an object whose trained_on is a list of texts", _trained) | None,
    "shipped": TEXT | None,
    "error": TEXT | None,
    "study": TEXT | None,
    "part": TEXT | None,
    "diverged": FLAG | None,
    "iterations": WHOLE | None,
    "restarts": (WHOLE, 0),
}
SUMMARY: dict = {
    name: list_of(OBJECT) | None
    for name in ("success", "forgetting", "no_signal", "divergence", "errors", "dynamics", "theorem")
} | {"matrix": object_of(OBJECT) | None, "sequence": object_of(OBJECT) | None}
# Rows of summary.json; its other lists are written for people and not read back.
SUCCESS: dict = {
    **CHECKPOINT,
    "role": (TEXT, "new"),
    "decode": (TEXT, "sampled"),
    "task": TEXT | None,
    "rate": NUMBER | None,
    "n": WHOLE | None,
    "successes": WHOLE | None,
}
STATE: dict = {"iteration": COUNT, "step": COUNT}  # of a checkpoint


def checked(value: Mapping, keys: Mapping, where: str, fix: str) -> dict:
    """``value`` with the defaults that it lacks; ``UserError`` for a key that is missing or of another kind.

    where: file and line, for the message; fix: what its reader can do
    """
    for key, kind in keys.items():
        kind, default = kind if isinstance(kind, tuple) else (kind, REQUIRED)
        if key in value:
            if not kind.fits(value[key]):
                raise UserError(f"{where}: '{key}' is {_short(value[key])}, not {kind.words}; {fix}")
        elif default is not REQUIRED:
            value = {**value, key: default}
        elif not kind.optional:
            raise UserError(f"{where}: '{key}' is missing; {fix}")
    return value


def _short(value) -> str:
    return shortened(json.dumps(value, default=str))
