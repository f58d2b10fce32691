"""Measures: how far a policy has moved from its base. One file and one yaml (configs/measure/NAME.yaml) add one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from robot_forgetting.built_with import BuiltWith
from robot_forgetting.errors import fault

if TYPE_CHECKING:  # the report reads ``Quantity`` without torch
    from robot_forgetting.policy import Policy

BASE, FINE_TUNED, DEMONSTRATIONS = DECISIONS = ("base", "fine_tuned", "demonstrations")  # whose states of a task
TEXT, WEIGHTS = "text", "weights"  # held-out texts; no inputs at all


@dataclass(frozen=True)
class Quantity:
    """What a number says: a measure in a unit, on inputs of the tasks of a role, at named states; "" where it has none.

    As a text, which is its key in report.json: "forward_kl|nats/token|new|base".
    """

    measure: str
    unit: str
    inputs: str = ""
    states: str = ""

    @classmethod
    def of(cls, row: Mapping) -> Quantity:
        """Of a row of divergence.jsonl."""
        return cls(*(str(row.get(key) or "") for key in ("measure", "unit", "role", "states")))

    def as_predictor(self) -> dict:
        """What a row of report.json's ``predictors`` says of it."""
        return {"predictor": self.measure, "unit": self.unit, "inputs": self.inputs, "states": self.states}

    def __str__(self) -> str:
        return f"{self.measure}|{self.unit}|{self.inputs}|{self.states}"


@dataclass(frozen=True)
class States:
    """Inputs at which a policy is compared with its base: columns of N rows, and the episode each came from [N].

    name: one of ``DECISIONS``, TEXT (the column ``text``) or WEIGHTS (no inputs)
    seed: of the noise by which decisions are drawn at them
    """

    obs: dict = field(default_factory=dict)
    episode: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    name: str = BASE
    seed: int = 0

    def __len__(self) -> int:
        return len(self.episode)


class Measure(BuiltWith, ABC):
    """A distance between a policy and its base, or a similarity of the two.

    name: in the records and in ``measures=[...]``, the name of its yaml; title: on the page
    units: a row of each; "1" for a number without
    similarity: whether it is 1 for the base itself and falls; a distance is 0 and grows
    """

    name: str
    title: str
    units: tuple[str, ...] = ("1",)
    similarity: bool = False

    def undefined(self, policy: Policy) -> str | None:
        """Why it says nothing about this policy, for `left_out` of run.json; None: it can be measured."""
        return None

    def at(self, policy: Policy) -> tuple[str, ...]:
        """Names of the states at which it is measured, see ``States``."""
        return DECISIONS

    @abstractmethod
    def measure(self, policy: Policy, states: States) -> list[dict]:
        """Rows of divergence.jsonl without their place: {"measure", "unit", "value", "standard_error", "n"}.

        And what else a row says: "episodes"; of a layer's number "layer" (0: the embedding, None: all of them). Must
        depend on policy and states only, and leave the policy as it was. A value of None: not defined there.
        """

    @classmethod
    def together(cls, members: Sequence[Measure], policy: Policy, states: States) -> list[dict]:
        """Rows of several measures of a family: a class that has a ``together`` of its own shares one pass."""
        return [row for member in members for row in member.measure(policy, states)]


def measured(measures: Sequence[Measure], policy: Policy, states: States) -> list[dict]:
    """The rows of all measures that are measured at such states, in the order of the list."""
    families: dict[type[Measure], list[Measure]] = {}
    for one in measures:
        if states.name in one.at(policy):
            families.setdefault(next(kind for kind in type(one).__mro__ if "together" in vars(kind)), []).append(one)
    rows: dict[str, list[dict]] = {one.name: [] for one in measures}
    policy.eval()
    for family, members in families.items():
        for row in _checked(members, family.together(members, policy, states)):
            rows[row["measure"]].append(row)
    return [row for found in rows.values() for row in found]


def _checked(members: Sequence[Measure], rows: object) -> list[dict]:
    """The rows that measures of a family gave."""
    units = {(one.name, unit) for one in members for unit in one.units}
    for row in rows if isinstance(rows, list) else [rows]:
        if not isinstance(row, dict) or "value" not in row or (row.get("measure"), row.get("unit")) not in units:
            promised = ", ".join(f"'{name}' in '{unit}'" for name, unit in sorted(units))
            said = f"gives {row!r:.80}; list rows {{'measure', 'unit', 'value', ...}} of {promised}"
            raise fault(members[0], "measure", said)
    return rows
