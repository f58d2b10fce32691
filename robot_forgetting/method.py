"""Fine-tuning methods and penalties: what data, what loss. The optimiser loop is in ``engine/train.py``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from robot_forgetting.built_with import BuiltWith
from robot_forgetting.errors import UserError
from robot_forgetting.policy import Action, Policy
from robot_forgetting.ranges import Count, CountOrNone, LearningRate, Range, check_fields

Beta = Annotated[float, Range(0, 0.999_999)]


@dataclass(frozen=True)
class Optimiser:
    """AdamW and its schedule.

    schedule: "constant" or "cosine" (to zero), after a linear warm-up over ``warmup_steps``
    max_grad_norm: longer gradients are shortened to it; None: they are not
    micro_batch: rows per forward pass; a larger batch is accumulated over several (same gradient, less memory). None:
        as many as memory has room for, see ``Policy.rows_at_once``
    """

    learning_rate: LearningRate
    weight_decay: Annotated[float, Range(0, 1000)] = 0.0
    warmup_steps: CountOrNone = 0
    schedule: str = "constant"
    max_grad_norm: Annotated[float, Range(0, 1e9, above=True)] | None = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    micro_batch: Count | None = None

    def __post_init__(self):
        if self.schedule not in ("constant", "cosine"):
            raise UserError(f"unknown schedule '{self.schedule}'; choose one of: constant, cosine")
        check_fields(self)

    def rate(self, step: int, fraction: float) -> float:
        """Learning rate of optimiser step ``step`` when ``fraction`` of the iterations is done."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        decay = 0.5 * (1 + math.cos(math.pi * fraction)) if self.schedule == "cosine" else 1.0
        return self.learning_rate * warm * decay


@dataclass(frozen=True)
class Batch:
    """Rows for one optimiser step. ``collect`` makes them on the CPU; a loss or a penalty gets them on the policy's
    device (``to``), but for the observations, which the policy moves itself.

    obs: the policy's observation columns, N rows
    action: N decisions (sampled, or a demonstration's)
    advantage: [N] or None; reward-like weight of a decision
    extra: further [N, ...] tensors a method wants to carry to its own loss
    tokens_per_row: how many tokens a row stands for in means over tokens; None: what the batch has on average. A part
        of a batch keeps the whole's number, so that parts of long and of short decisions add up to the whole's mean.
    """

    obs: dict
    action: Action
    advantage: Tensor | None = None
    extra: dict[str, Tensor] | None = None
    tokens_per_row: float | None = None

    def __len__(self) -> int:
        return len(self.action)

    def __getitem__(self, index: slice) -> Batch:
        return replace(
            self,
            obs={key: column[index] for key, column in self.obs.items()},
            action=self.action[index],
            advantage=None if self.advantage is None else self.advantage[index],
            extra=None if self.extra is None else {key: value[index] for key, value in self.extra.items()},
            tokens_per_row=self.mean_tokens,
        )

    def to(self, device) -> Batch:
        """The same rows with decisions, advantages and extras on a device."""
        return replace(
            self,
            action=self.action.to(device),
            advantage=None if self.advantage is None else self.advantage.to(device),
            extra=None if self.extra is None else {key: value.to(device) for key, value in self.extra.items()},
        )

    @property
    def mean_tokens(self) -> float:
        """``tokens_per_row``, counted where it was not given."""
        if self.tokens_per_row is not None:
            return self.tokens_per_row
        return self.action.mask.sum().item() / max(1, len(self))


def mean_over_tokens(values: Tensor, mask: Tensor, per_row: float | None = None) -> Tensor:
    """Mean of [N, T] values over the tokens that count, a scalar; 0 where none does.

    per_row: divide by so many tokens per row in place of those there are (``Batch.tokens_per_row``)
    """
    count = mask.sum().clamp_min(1) if per_row is None else max(1.0, len(mask) * per_row)
    return (values * mask).sum() / count


class Staged(BuiltWith):
    """What methods and penalties have in common: they live through all stages of a sequence, and may remember.

    ``task`` and ``past`` are those of a ``Stage``, one by one: a plug-in that learns a single task names both.
    """

    def begin(self, policy: Policy, task, past: Sequence) -> None:
        """Called before the first iteration of every stage, with the policy as the last stage left it.

        A restart calls it again, for the stage before the present one too, and then ``load_state_dict``: it may depend
        only on its arguments and on what ``state_dict`` keeps.
        past: the tasks whose data may be used, those of earlier stages first
        """

    def end(self, policy: Policy, task) -> None:
        """Called after the last iteration of every stage, once: what it does to the policy, and what it remembers for
        ``state_dict``, are in the stage's last checkpoint."""

    def state_dict(self) -> dict[str, Tensor]:
        """What later iterations and stages need, beyond what ``begin`` makes of its arguments."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but the checkpoint holds {sorted(state)}")


class Method(Staged, ABC):
    """A way to adapt a policy to a task. One iteration = one ``collect`` and one optimiser step per batch it returns.

    The design's ``collect`` returned a single batch; a sequence of them makes an iteration the unit of checkpointing
    (nothing half-used has to survive a restart) without a second hook.
    """

    iterations: int
    optimiser: Optimiser
    # Which of the policy's optional methods it calls: a policy without one is refused before anything is measured.
    calls: Sequence[str] = ()

    def check(self, policy: Policy, task) -> None:  # noqa: B027
        """``UserError``, before anything is measured, where the method cannot adapt this policy to this task."""

    @abstractmethod
    def collect(self, policy: Policy, task, iteration: int) -> Sequence[Batch]:
        """The iteration's batches. Must depend on (policy, state, iteration) only, so that a restart repeats it.

        iteration: counted from 0 through all stages of a sequence, so that no two of them draw the same noise; within
        its stage it is ``iteration % self.iterations``
        """

    @abstractmethod
    def loss(self, policy: Policy, batch: Batch) -> Tensor:
        """Scalar: the mean over the batch's rows.

        May read only the policy, the batch and what ``begin`` set: on a CPU a part of every batch is computed in a
        forked process, which does not see what ``collect`` changed since. Carry anything else in ``batch.extra``.
        """

    def metrics(self) -> dict[str, float]:
        """Numbers about the last ``collect`` for train.jsonl (rollout success, reward, ...)."""
        return {}


class Penalty(Staged, ABC):
    """Rides on any method: a scalar added to its loss."""

    calls: Sequence[str] = ()  # see ``Method``

    @abstractmethod
    def __call__(self, policy: Policy, batch: Batch) -> Tensor:
        """Scalar, already multiplied by its coefficient."""
