"""What each layer makes of the same inputs in the base and in the policy: CKA, CKNNA, and how far the states moved.

RL's Razor (appendix C.1) compares base and fine-tuned model by CKNNA on paragraphs that neither was trained on, and
does not say which layer, how its states become one vector per text, nor k. Here: every layer, and the mean over a
text's tokens (see a policy's ``hidden_states``). A language model reads held-out texts, other policies the base's
states of the tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from robot_forgetting.measure import BASE, TEXT, Measure, States
from robot_forgetting.metrics import drift, representation
from robot_forgetting.policy import Policy
from robot_forgetting.ranges import Count

LEAST = 4  # inputs, for CKA without bias and CKNNA


class LayerComparison(Measure):
    """A number for each layer, of its states on the same inputs; all of them share the passes that give the states.

    least: inputs; with fewer there are no rows
    """

    least: int = 1

    @abstractmethod
    def compare(self, base: Tensor, fine_tuned: Tensor) -> Tensor:
        """States [L, N, D] of L layers to [L]."""

    def undefined(self, policy: Policy) -> str | None:
        return None if policy.blocks else f"policy '{policy.name}' shows no layers"

    def at(self, policy: Policy) -> tuple[str, ...]:
        return (TEXT,) if policy.layers_read == TEXT else (BASE,)

    def measure(self, policy: Policy, states: States) -> list[dict]:
        return self.together([self], policy, states)

    @classmethod
    @torch.no_grad()
    def together(cls, members: Sequence[LayerComparison], policy: Policy, states: States) -> list[dict]:
        with policy.base():
            before = policy.hidden_states(states.obs)
        after = policy.hidden_states(states.obs)
        rows = []
        for one in (one for one in members if len(states) >= one.least):
            values = [value for pair in _stacks(before, after) for value in one.compare(*pair).tolist()]
            head = {"measure": one.name, "unit": one.units[0], **one.said()}
            for layer, value in enumerate(values):
                rows.append({**head, "layer": layer, "value": value, "standard_error": None, "n": len(states)})
        return rows

    def said(self) -> dict:
        """What its rows say of its settings."""
        return {}


def _stacks(before: Sequence[Tensor], after: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """States of neighbouring layers of one width, [L, N, D] each."""
    start = 0
    for end in range(1, len(before) + 1):
        if end == len(before) or before[end].shape != before[start].shape:
            yield tuple(torch.stack(list(side[start:end])) for side in (before, after))
            start = end


class CKA(LayerComparison):
    """Linear CKA without bias: a model is wider than there are inputs."""

    name, title, similarity, least = "cka_debiased", "CKA (linear, debiased)", True, LEAST

    def compare(self, base: Tensor, fine_tuned: Tensor) -> Tensor:
        return representation.linear_cka(base, fine_tuned, debiased=True)


class CKNNA(LayerComparison):
    """CKA over near pairs only. mask: "intersection" (published) or "union" (replicated); k: neighbours of an input."""

    similarity = True

    def __init__(self, mask: Literal["intersection", "union"] = "intersection", k: Count = 10):
        self.mask, self.k = mask, k
        self.name = f"cknna_{mask}"
        self.title = f"CKNNA (mask as {'published' if mask == 'intersection' else 'replicated'})"
        self.least = max(LEAST, k + 1)

    def compare(self, base: Tensor, fine_tuned: Tensor) -> Tensor:
        return representation.cknna(base, fine_tuned, k=self.k, mask=self.mask)

    def said(self) -> dict:
        return {"k": self.k}


class ActivationL2(LayerComparison):
    """Mean change of a layer's states over their mean length."""

    name, title = "activation_l2_relative", "change of states"

    def compare(self, base: Tensor, fine_tuned: Tensor) -> Tensor:
        return drift.activation_l2_relative(base, fine_tuned)


class ActivationL1(LayerComparison):
    """The same with sums of absolute values in the place of lengths."""

    name, title = "activation_l1_relative", "change of states, L1"

    def compare(self, base: Tensor, fine_tuned: Tensor) -> Tensor:
        return drift.activation_l1_relative(base, fine_tuned)
