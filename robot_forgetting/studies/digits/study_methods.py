"""The controlled study's methods by the names its configuration uses, each as a ``Method`` with its penalties."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from robot_forgetting.method import Method
from robot_forgetting.methods.grpo import GRPO
from robot_forgetting.methods.kl import KL
from robot_forgetting.methods.labels import Labeler, Labels, OracleLabels, TeacherLabels
from robot_forgetting.methods.reinforce import Reinforce
from robot_forgetting.methods.self_sft import SelfSFT
from robot_forgetting.methods.sft import SFT
from robot_forgetting.methods.simpo import SimPO
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.studies.digits.train_run import Recipe
from robot_forgetting.tasks.digits.parity_mnist import parity_labels


@dataclass(frozen=True)
class Details:
    """What the recipes of one sweep share.

    batch_size: pictures per optimiser step, for every method; group_size: answers to each of them (GRPO, REINFORCE)
    kl: {"coefficient", "direction"} of the +KL methods; teacher: weights of the RL-trained teacher, or None
    refreshes: times per epoch that iterative SFT draws its data anew
    """

    batch_size: int
    group_size: int
    kl: dict
    teacher: dict[str, Tensor] | None = None
    refreshes: int = 8

    def supervised(self, steps: int, seed: int, per_iteration: int = 1) -> dict:
        """What every method that learns from labels is built with."""
        common = {"iterations": steps // per_iteration, "steps_per_iteration": per_iteration, "seed": seed}
        return common | {"batch_size": self.batch_size, "optimiser": None}

    def rollouts(self, steps: int, seed: int) -> dict:
        """What every method that learns from its own answers' rewards is built with."""
        common = {"iterations": steps, "groups": self.batch_size, "group_size": self.group_size}
        return common | {"optimiser": None, "seed": seed}


class _Once(Labeler):
    """Another's labels, drawn once for the runs of a recipe: they follow from the base policy, the items and the seed.

    To ask the base policy or a teacher about 60,000 pictures takes a third of a run's time.
    """

    def __init__(self, labeler: Labeler):
        self.labeler, self.found = labeler, None

    def label(self, policy, task, seeds, stream) -> Labels:
        if self.found is None:
            self.found = self.labeler.label(policy, task, seeds, stream)
        return self.found


def _sft(labels: Labeler) -> Callable:
    def build(steps: int, details: Details, seed: int) -> Method:
        return SFT(**details.supervised(steps, seed), demonstrations=1, labels=_Once(labels))

    return build


def _teacher(steps: int, details: Details, seed: int) -> Method:
    sizes = [details.teacher["layer1.weight"].shape[0]]
    sizes += [value.shape[0] for key, value in details.teacher.items() if key.endswith("bias")]
    return _sft(TeacherLabels(MLPPolicy(sizes=sizes, weights=details.teacher)))(steps, details, seed)


def _grpo(steps: int, details: Details, seed: int) -> Method:
    return GRPO(**details.rollouts(steps, seed), minibatch_size=details.batch_size * details.group_size)


def _one_zero(steps: int, details: Details, seed: int) -> Method:
    return Reinforce(**details.rollouts(steps, seed), advantage="one_zero")


def _simpo(steps: int, details: Details, seed: int) -> Method:
    return SimPO(**details.supervised(steps, seed), labels=parity_labels(even=[0], odd=[1]))


def _self_sft(iterative: bool) -> Callable:
    def build(steps: int, details: Details, seed: int, per_iteration: int = 1) -> Method:
        return SelfSFT(**details.supervised(steps, seed, per_iteration), iterative=iterative)

    return build


# name: (builder, with KL penalty, traits). The 2 x 2 of on-policy data and negative examples is section 5.1's.
ON, OFF = {"on_policy": True}, {"on_policy": False}
SFT_1 = _sft(parity_labels(even=[0], odd=[1]))
METHODS = {
    "grpo": (_grpo, False, {**ON, "negatives": True}),
    "grpo_kl": (_grpo, True, {**ON, "negatives": True}),
    "sft_1": (SFT_1, False, {**OFF, "negatives": False}),
    "sft_2": (_sft(parity_labels(even=[0, 4], odd=[1, 5])), False, {**OFF, "negatives": False}),
    "sft_oracle": (_sft(OracleLabels()), False, {**OFF, "negatives": False}),
    "sft_oracle_soft": (_sft(OracleLabels(soft=True)), False, {**OFF, "negatives": False}),
    "reinforce_1_0": (_one_zero, False, {**ON, "negatives": False}),
    "simpo": (_simpo, False, {**OFF, "negatives": True}),
    "sft_teacher": (_teacher, False, {**OFF, "negatives": False}),
    "sft_kl": (SFT_1, True, {**OFF, "negatives": False}),
    "self_sft": (_self_sft(False), False, {**OFF, "negatives": False}),
    "iterative_sft": (_self_sft(True), False, {**ON, "negatives": False}),
}


def build(name: str, *, epochs: int, steps_per_epoch: int, details: Details, seed: int) -> Recipe:
    make, penalised, traits = METHODS[name]
    steps = epochs * steps_per_epoch
    penalties = [KL(**details.kl)] if penalised else []
    if name != "iterative_sft":
        return Recipe(make(steps, details, seed), steps, penalties=penalties, traits=traits)
    each = max(1, steps_per_epoch // details.refreshes)
    method = make(steps, details, seed, each)
    return Recipe(method, method.iterations * each, each, penalties, traits)
