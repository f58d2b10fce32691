"""KL-to-base penalties, exact over the action vocabulary; they ride on any method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Penalty, mean_over_tokens
from robot_forgetting.metrics.divergence import forward_kl, reverse_kl
from robot_forgetting.policy import Policy
from robot_forgetting.ranges import Weight


class KL(Penalty):
    """coefficient * mean over the batch's tokens of KL between base and current token distributions, in nats.

    direction "forward": KL(pi_0 || pi); "reverse": KL(pi || pi_0). Both are taken exactly at each token, given the
    batch's earlier tokens (sampled by the policy under RL, the expert's under SFT), on the batch's states.
    """

    calls = ("compared",)

    def __init__(self, *, coefficient: Weight, direction: str = "forward"):
        if direction not in ("forward", "reverse"):
            raise UserError(f"unknown KL direction '{direction}'; choose one of: forward, reverse")
        self.coefficient = coefficient
        self.divergence = {"forward": forward_kl, "reverse": reverse_kl}[direction]

    def begin(self, policy: Policy, task, past: Sequence) -> None:
        pass

    def __call__(self, policy: Policy, batch: Batch) -> Tensor:
        values = policy.compared(batch.obs, batch.action, {"kl": self.divergence})["kl"]
        return self.coefficient * mean_over_tokens(values, batch.action.mask, batch.tokens_per_row)
