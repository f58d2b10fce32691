"""Distillation on the policy's own samples: from another policy, or from itself when it sees a demonstration."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.method import Batch, Method, Optimiser, mean_over_tokens
from robot_forgetting.methods.labels import LabelledItems
from robot_forgetting.methods.on_policy import RolloutPlan, minibatches, sample_rollouts
from robot_forgetting.metrics.divergence import forward_kl, reverse_kl
from robot_forgetting.one_step import answer
from robot_forgetting.policy import Policy, Reference
from robot_forgetting.ranges import Count, Environments, Seed, Share
from robot_forgetting.records.checkpoints import load_weights, trainable, trained_checkpoint
from robot_forgetting.records.run_folder import RunFolder

# Of the teacher and the policy, in this order.
DIRECTIONS = {"forward": forward_kl, "reverse": reverse_kl}


class _Distillation(Method):
    """loss = mean over the tokens of the policy's samples of KL between the teacher's and the policy's distributions.

    It is taken exactly over the vocabulary at each token, given the sample's earlier tokens. "forward" is
    KL(teacher || policy), "reverse" KL(policy || teacher).
    """

    calls = ("compared",)

    def __init__(self, direction: str):
        if direction not in DIRECTIONS:
            raise UserError(f"unknown KL direction '{direction}'; choose one of: {', '.join(DIRECTIONS)}")
        self.divergence = DIRECTIONS[direction]
        self._metrics: dict[str, float] = {}

    def _loss(self, policy: Policy, batch: Batch, teacher: Policy, obs: dict) -> Tensor:
        reference = Reference(teacher, obs)
        values = policy.compared(batch.obs, batch.action, {"kl": self.divergence}, reference)["kl"]
        return mean_over_tokens(values, batch.action.mask, batch.tokens_per_row)

    def metrics(self) -> dict[str, float]:
        return self._metrics


class OnPolicyDistillation(_Distillation):
    """The policy acts, a fixed teacher says at each token what it would have done (Lu et al. 2025; Agarwal et al. 2024,
    arXiv 2306.13649, with the student's samples only). No reward is read.

    teacher: a policy with the same tokens; None: the base policy, with the weights of ``teacher_run``
    teacher_run: a finished run folder whose fine-tuned weights the teacher gets, for example one of RL
    """

    def __init__(
        self,
        *,
        iterations: Count,
        groups: Count,
        group_size: Count,
        optimiser: Optimiser,
        teacher: Policy | None = None,
        teacher_run: str | None = None,
        direction: str = "reverse",
        minibatch_size: Count = 512,
        num_envs: Environments = 16,
        seed: Seed = 0,
    ):
        super().__init__(direction)
        if teacher is None and teacher_run is None:
            raise UserError(
                "on_policy_distillation needs a teacher: method.teacher_run=RUN_FOLDER, a finished run of this "
                "policy, or +policy@method.teacher=NAME, another policy with the same tokens"
            )
        self.iterations, self.optimiser, self.seed = iterations, optimiser, seed
        self.plan, self.minibatch_size = RolloutPlan(groups, group_size, num_envs, seed), minibatch_size
        self.teacher, self.teacher_run = teacher, teacher_run

    def check(self, policy: Policy, task) -> None:
        if self.teacher is not None:
            policy.check_tokens(self.teacher)
        if self.teacher_run is not None:
            trained_checkpoint(RunFolder(self.teacher_run))

    def begin(self, policy: Policy, task, past: Sequence) -> None:
        self._teacher = (self.teacher or policy.copied()).eval()
        if self.teacher_run is not None:
            load_weights(self._teacher, trained_checkpoint(RunFolder(self.teacher_run)))

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        rollouts = sample_rollouts(policy, task, self.plan, iteration)
        self._metrics = rollouts.metrics()
        batch = rollouts.batch(torch.ones(len(rollouts.rewards)))
        return minibatches(batch, size=self.minibatch_size, epochs=1, seed=[self.seed, iteration])

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        return self._loss(policy, batch, self._teacher, batch.obs)


class SDFT(_Distillation):
    """Self-distillation fine-tuning (Shenfeld et al. 2026, arXiv 2601.19897): one answer per question, one step per
    iteration; the teacher is the policy itself, reading the question together with its demonstration.

    The teacher's weights are an exponential moving average of the policy's, from the base on.

    teacher_rate: share of the policy in that average at each step; 0: the base stays the teacher
    template: what the teacher reads in the place of the question; {question}, {demonstration}
    labels: the ``Labeler`` of the demonstrations; None: the task's own
    """

    def __init__(
        self,
        *,
        iterations: Count,
        batch_size: Count,
        optimiser: Optimiser,
        template: str,
        labels=None,
        direction: str = "forward",
        teacher_rate: Share = 0.02,
        seed: Seed = 0,
    ):
        super().__init__(direction)
        if "{question}" not in template or "{demonstration}" not in template:
            raise UserError("sdft: method.template must contain {question} and {demonstration}")
        self.iterations, self.batch_size, self.optimiser, self.seed = iterations, batch_size, optimiser, seed
        self.template, self.labels, self.teacher_rate = template, labels, teacher_rate

    def check(self, policy: Policy, task) -> None:
        if not task.one_step or "messages" not in task.observations(task.seeds("train")[:1]):
            raise UserError(
                f"sdft's teacher reads demonstrations in its prompt; '{task.name}' asks no questions in words"
            )
        if self.teacher_rate and any(p.dtype != torch.float32 for p in trainable(policy).values()):
            raise UserError(
                "sdft: a moving average of weights in bfloat16 would stand still; use policy.dtype=mixed, policy.lora, "
                "or method.teacher_rate=0"
            )

    def begin(self, policy: Policy, task, past: Sequence) -> None:
        self._data = LabelledItems(policy, task, self.labels, self.seed)
        self._teacher = policy.copied().eval()

    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        self._follow(policy)
        policy.eval()
        seeds, demonstrations = self._data.texts(iteration, self.batch_size)
        streams = np.random.default_rng([self.seed, iteration, 0x5DF7]).integers(2**31, size=(len(seeds), 1))
        found = answer(policy, task, seeds, streams)
        asked = task.observations(seeds)["messages"]
        read = [self._shown(*pair) for pair in zip(asked, demonstrations, strict=True)]
        self._metrics = {
            "rollout_success": found.rewards.mean().item(),
            "completion_tokens": found.action.mask.sum(1).float().mean().item(),
        }
        return [Batch({**found.obs, "teacher_messages": read}, found.action)]

    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        return self._loss(policy, batch, self._teacher, {"messages": batch.obs["teacher_messages"]})

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in trainable(self._teacher).items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        mine = trainable(self._teacher)
        if {name: p.shape for name, p in mine.items()} != {name: t.shape for name, t in state.items()}:
            raise UserError("the checkpoint's teacher belongs to another policy; start in a new run_dir")
        with torch.no_grad():
            for name, parameter in mine.items():
                parameter.copy_(state[name])

    @torch.no_grad()
    def _follow(self, policy: Policy) -> None:
        for mine, own in zip(trainable(self._teacher).values(), trainable(policy).values(), strict=True):
            mine.lerp_(own, self.teacher_rate)

    def _shown(self, messages: list[dict], demonstration: str) -> list[dict]:
        """The conversation whose last message is the question, as the teacher reads it."""
        parts = {"{question}": messages[-1]["content"], "{demonstration}": demonstration}
        text = re.sub("|".join(map(re.escape, parts)), lambda found: parts[found[0]], self.template)
        return [*messages[:-1], {**messages[-1], "content": text}]
