"""SimPO as in RL's Razor: supervised positives against wrong answers of an external model (2509.04259, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor
from torch.nn.functional import logsigmoid

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Method, Optimiser, mean_over_tokens
from robot_forgetting.methods.labels import LabelledItems, WrongLabels
from robot_forgetting.policy import Action, Policy
from robot_forgetting.ranges import Count, Range, Seed


class SimPO(Method):
    """loss = -log sigma(log pi(y_w) - log pi(y_l) - margin), margin 1, no length normalisation, no beta, as printed.

    labels: the ``Labeler`` of y_w (None: the task's own); negatives: of y_l (None: uniform among the wrong answers, an
        external model that knows nothing of the task; the paper's external model is not named)
    """

    calls = ("encode", "log_prob")

    def __init__(
        self,
        *,
        iterations: Count,
        steps_per_iteration: Count,
        batch_size: Count,
        optimiser: Optimiser,
        labels=None,
        negatives=None,
        margin: Annotated[float, Range(0, 1000)] = 1.0,
        seed: Seed = 0,
    ):
        self.iterations, self.steps, self.batch_size = iterations, steps_per_iteration, batch_size
        self.optimiser, self.margin, self.seed = optimiser, margin, seed
        self.labels, self.negatives = labels, negatives or WrongLabels()

    def check(self, policy: Policy, task) -> None:
        if not task.one_step:
            raise UserError(f"simpo needs pairs of answers to one question; '{task.name}' is no one-step task")

    def begin(self, policy: Policy, task, past: Sequence) -> None:
        self._chosen = LabelledItems(policy, task, self.labels, self.seed)
        # Another stream than the labels': a wrong answer must not depend on which right one was drawn.
        self._rejected = LabelledItems(policy, task, self.negatives, self.seed, stream=self.seed + 1_000_003)
        self._chosen.keep(self._rejected.kept)
        self._rejected.keep(self._chosen.kept)

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        batches = []
        for step in range(iteration * self.steps, (iteration + 1) * self.steps):
            batch = self._chosen.batch(step, self.batch_size)
            rejected = self._rejected.action(step, self.batch_size)
            batches.append(Batch(batch.obs, batch.action, extra={"rejected": rejected.tokens, "counts": rejected.mask}))
        return batches

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        chosen = policy.log_prob(batch.obs, batch.action).sum(1)
        rejected = policy.log_prob(batch.obs, Action(batch.extra["rejected"], batch.extra["counts"])).sum(1)
        loss = -logsigmoid(chosen - rejected - self.margin).unsqueeze(1)
        return mean_over_tokens(loss, batch.action.mask[:, :1])
