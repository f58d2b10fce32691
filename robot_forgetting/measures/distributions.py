"""Distances of the distributions over tokens, exact over the vocabulary: KL both ways, JS, total variation, L2."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.measure import BASE, FINE_TUNED, Measure, States
from robot_forgetting.metrics import divergence
from robot_forgetting.metrics.statistics import clustered_mean
from robot_forgetting.policy import Policy
from robot_forgetting.rollout import noise_of_many

OVER_TOKENS = {"token": divergence.per_token, "decision": divergence.per_decision}  # what a unit is "per"


class TokenDistance(Measure):
    """A function of the two distributions at each token of decisions that one of both policies has sampled.

    At each state one decision is sampled from the base and one from the policy (temperature 1, the same noise); all
    distances share these passes. Standard errors treat an episode's states as one cluster.
    along: whose decisions, ``BASE`` or ``FINE_TUNED``
    units: ".../token": the mean over a decision's tokens; ".../decision": their sum, which for KL along its first
        argument's tokens is without bias the KL of whole decisions (chain rule)
    """

    units = ("1/token",)
    along = BASE

    @abstractmethod
    def distance(self, base: Tensor, fine_tuned: Tensor) -> Tensor:
        """Of logits [..., V] float32 of both policies, [...]."""

    def undefined(self, policy: Policy) -> str | None:
        return None if policy.can("compared") else policy.lacks("logits", "has no tokens")

    def measure(self, policy: Policy, states: States) -> list[dict]:
        return self.together([self], policy, states)

    @classmethod
    @torch.no_grad()
    def together(cls, members: Sequence[TokenDistance], policy: Policy, states: States) -> list[dict]:
        # A chunk's logits exist at once: as many states as memory has room for.
        chunk, clusters = policy.rows_at_once(), states.episode.tolist()
        found: dict[tuple[str, str], list[Tensor]] = {(one.name, unit): [] for one in members for unit in one.units}
        drawn = noise_of_many(np.random.default_rng([states.seed, 0xD1]), len(states), policy.noise_width)
        for start in range(0, len(states), chunk):
            obs = {key: column[start : start + chunk] for key, column in states.obs.items()}
            noise = torch.from_numpy(drawn[start : start + chunk])
            for along in (BASE, FINE_TUNED):
                mine = {one.name: one for one in members if one.along == along}
                if not mine:
                    continue
                with policy.base() if along == BASE else nullcontext():
                    action = policy.act(obs, temperature=1.0, noise=noise)
                values = policy.compared(obs, action, {name: one.distance for name, one in mine.items()})
                for name, value in values.items():
                    mask = action.mask.to(value.device)
                    for unit in mine[name].units:
                        per = OVER_TOKENS[unit.rpartition("/")[2]]
                        found[name, unit].append(per(value, mask).cpu())
        rows = []
        for (name, unit), parts in found.items():
            value, error = clustered_mean(torch.cat(parts).tolist(), clusters)
            row = {"measure": name, "unit": unit, "value": value, "standard_error": error}
            rows.append({**row, "n": len(states), "episodes": len(set(clusters))})
        return rows


class ForwardKL(TokenDistance):
    """KL(pi_0 || pi) in nats, along the base's tokens: RL's Razor's predictor of forgetting."""

    name, title = "forward_kl", "forward KL"
    units = ("nats/token", "nats/decision")
    distance = staticmethod(divergence.forward_kl)


class ReverseKL(TokenDistance):
    """KL(pi || pi_0) in nats, along the policy's own tokens."""

    name, title = "reverse_kl", "reverse KL"
    units, along = ("nats/token", "nats/decision"), FINE_TUNED
    distance = staticmethod(divergence.reverse_kl)


class JensenShannon(TokenDistance):
    """Jensen-Shannon divergence in nats, at most log 2, along the base's tokens."""

    name, title = "jensen_shannon", "Jensen-Shannon"
    units = ("nats/token",)
    distance = staticmethod(divergence.jensen_shannon)


class TotalVariation(TokenDistance):
    """Half the L1 distance of the probabilities, between 0 and 1, along the base's tokens."""

    name, title = "total_variation", "total variation"
    distance = staticmethod(divergence.total_variation)


class L2(TokenDistance):
    """Euclidean distance of the probabilities, along the base's tokens."""

    name, title = "l2", "L2"
    distance = staticmethod(divergence.l2)
