"""How far the weights moved, layer by layer and all together, adapters merged; a layer's tensors at a time.

Of the weights alone: no inputs, so that a number of a run's says nothing of what the policy does. RL's Razor compares
them with distances of distributions (section 6), and finds the L1 and spectral norm, sparsity and rank to predict
forgetting worse.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.measure import BASE, WEIGHTS, Measure, States
from robot_forgetting.metrics import drift
from robot_forgetting.metrics.drift import Weights
from robot_forgetting.policy import Policy
from robot_forgetting.ranges import Count, Range
from robot_forgetting.rollout import noise_of_many


class WeightChange(Measure):
    """A number of the change of weights, for each layer and for all: all measures share one walk over the layers.

    The weights of a policy of 7 billion are merged with its adapters a layer at a time; what a layer comes to is a few
    numbers, which are read from its device once, at the end.
    """

    @abstractmethod
    def parts(self, base: Weights, fine_tuned: Weights) -> Tensor:
        """What one layer comes to, [K] float64."""

    @abstractmethod
    def value(self, layers: Sequence[Sequence[float]]) -> float | None:
        """Of the parts [layers, K] of one or all layers; None where it is not defined."""

    def at(self, policy: Policy) -> tuple[str, ...]:
        return (WEIGHTS,)

    def undefined(self, policy: Policy) -> str | None:
        return None if policy.can("layer_weights") else policy.lacks("layer_weights", "does not show its weights")

    def measure(self, policy: Policy, states: States) -> list[dict]:
        return self.together([self], policy, states)

    @classmethod
    @torch.no_grad()
    def together(cls, members: Sequence[WeightChange], policy: Policy, states: States) -> list[dict]:
        layers, found = [], {one.name: [] for one in members}
        for layer, base, own in policy.layer_weights():
            layers.append(layer)
            for one in members:
                found[one.name].append(one.parts(base, own))
        rows = []
        for one in members:
            parts = torch.stack(found[one.name]).tolist()
            head = {"measure": one.name, "unit": one.units[0]}
            values = {layer: one.value([part]) for layer, part in zip(layers, parts, strict=True) if layer is not None}
            values[None] = one.value(parts)
            for layer, value in values.items():
                rows.append({**head, "layer": layer, "value": value, "standard_error": None, "n": None})
        return rows


class RelativeL1(WeightChange):
    """sum |w - w0| / sum |w0|."""

    name, title = "weight_l1_relative", "change of weights, L1"

    def parts(self, base: Weights, fine_tuned: Weights) -> Tensor:
        return torch.stack([drift.weight_l1(base, fine_tuned), drift.weight_size(base)])

    def value(self, layers: Sequence[Sequence[float]]) -> float | None:
        change, size = map(sum, zip(*layers, strict=True))
        return change / size if size else None


class RelativeL2(WeightChange):
    """|w - w0| / |w0|."""

    name, title = "weight_l2_relative", "change of weights"

    def parts(self, base: Weights, fine_tuned: Weights) -> Tensor:
        return torch.stack([drift.weight_l2(base, fine_tuned), drift.weight_norm(base)])

    def value(self, layers: Sequence[Sequence[float]]) -> float | None:
        if len(layers) == 1:
            change, norm = layers[0]
            return change / norm if norm else None
        change, norm = (sum(value**2 for value in column) for column in zip(*layers, strict=True))
        return (change / norm) ** 0.5


class Spectral(WeightChange):
    """The largest singular value of the change of any matrix: its norm as one block-diagonal operator."""

    name, title = "weight_spectral", "change of weights, spectral norm"

    def parts(self, base: Weights, fine_tuned: Weights) -> Tensor:
        norms = list(drift.spectral_norms(base, fine_tuned).values())
        return (torch.stack(norms).amax() if norms else _zero(base)).view(1)

    def value(self, layers: Sequence[Sequence[float]]) -> float:
        return max(largest for (largest,) in layers)


class Sparsity(WeightChange):
    """The share of weights that moved by no more than ``tolerance``; 1e-5 is Mukherjee et al.'s (2505.11711)."""

    name, title, similarity = "weight_sparsity", "share of weights that stayed", True

    def __init__(self, tolerance: Annotated[float, Range(0, 1)] = drift.TOLERANCE):
        self.tolerance = tolerance

    def parts(self, base: Weights, fine_tuned: Weights) -> Tensor:
        count = sum(weight.numel() for weight in base.values())
        share = drift.sparsity(base, fine_tuned, tolerance=self.tolerance)
        return torch.stack([share * count, torch.full_like(share, count)])

    def value(self, layers: Sequence[Sequence[float]]) -> float | None:
        still, count = map(sum, zip(*layers, strict=True))
        return still / count if count else None


class Rank(WeightChange):
    """The rank of the change over a matrix's smaller side, the mean over matrices; its singular values cost more than
    all other measures of weights together. ``metrics.drift.ranks`` says what counts as zero."""

    name, title = "weight_rank", "rank of the change"
    which = 0  # of ``drift.rank_shares``

    def parts(self, base: Weights, fine_tuned: Weights) -> Tensor:
        shares = [pair[self.which] for pair in drift.rank_shares(base, fine_tuned)]
        total = torch.stack(shares).sum() if shares else _zero(base)
        return torch.stack([total, torch.full_like(total, len(shares))])

    def value(self, layers: Sequence[Sequence[float]]) -> float | None:
        total, count = map(sum, zip(*layers, strict=True))
        return total / count if count else None


class EffectiveRank(Rank):
    """The same with exp(entropy of the singular values), which has no threshold (Roy and Vetterli, 2007)."""

    name, title = "weight_effective_rank", "effective rank of the change"
    which = 1


class FisherL2(Measure):
    """sqrt(sum_i F_i (w_i - w0_i)^2), with the diagonal Fisher F of the base over its own decisions at a task's states.

    F_i = mean of (d log p(decision) / d w_i)^2 over one decision at each of some states, sampled from the base: half
    the measure's square is a second-order estimate of the KL there, in nats per decision. A backward pass a decision.
    decisions: at most, evenly spread over the states
    """

    name, title = "weight_fisher_l2", "change of weights, by the Fisher"

    def __init__(self, decisions: Count = 32):
        self.decisions = decisions

    def at(self, policy: Policy) -> tuple[str, ...]:
        return (BASE,)

    def undefined(self, policy: Policy) -> str | None:
        what = "does not show the gradients of its base"
        return None if policy.can("base_slopes") else policy.lacks("base_slopes", what)

    def measure(self, policy: Policy, states: States) -> list[dict]:
        chosen = np.unique(np.linspace(0, len(states) - 1, min(self.decisions, len(states))).round().astype(int))
        noise = noise_of_many(np.random.default_rng([states.seed, 0xF1]), len(states), policy.noise_width)
        squares = []
        for index in chosen:
            obs = {key: column[index : index + 1] for key, column in states.obs.items()}
            with policy.base():
                action = policy.act(obs, temperature=1.0, noise=torch.from_numpy(noise[index : index + 1]))
            parts = [(slope.float() * change).square().sum() for slope, change in policy.base_slopes(obs, action)]
            squares.append(torch.stack(parts).double().sum())
        value = torch.stack(squares).mean().sqrt().item()
        return [{"measure": self.name, "unit": "1", "value": value, "standard_error": None, "n": len(chosen)}]


def _zero(weights: Weights) -> Tensor:
    """[] float64 where the weights are."""
    return next(iter(weights.values())).new_zeros((), dtype=torch.float64)
