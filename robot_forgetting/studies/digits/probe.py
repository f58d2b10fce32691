"""What is measured of a network at a checkpoint: success on both tasks, and every predictor of forgetting.

What belongs to the base alone is computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.methods.labels import correct, draw
from robot_forgetting.metrics import divergence, drift, representation
from robot_forgetting.metrics.statistics import wilson
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.ranges import Count, Range

DISTANCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "l2")
UNITS = {"forward_kl": "nats/token", "reverse_kl": "nats/token", "jensen_shannon": "nats/token"}
SAMPLING = 1_000_000  # the evaluations' stream of sampling noise


@dataclass(frozen=True)
class Settings:
    """What is measured on how much.

    images: test images per task, evenly spread over the test split, for success and divergences; all 20,000 would cost
        as much as a third of the training of a sweep, and 2,000 leave a standard error of at most 1.1 points
    similarity: how many of them for CKA and CKNNA, whose Gram matrices grow with their square
    fisher: training images for the Fisher
    layer: hidden layer of CKA and CKNNA, counted from 1; k: neighbours of CKNNA
    """

    images: Count = 2000
    similarity: Count = 500
    fisher: Count = 1000
    layer: Annotated[int, Range(1, 1000)] = 2
    k: Count = 10

    def __post_init__(self):
        if not 4 <= self.similarity <= self.images or not self.k < self.similarity:
            raise UserError("probe: 4 <= similarity <= images and k < similarity are needed")


class Probe:
    """tasks: role -> task. The base is the policy's own."""

    def __init__(self, policy: MLPPolicy, tasks: dict[str, OneStepTask], settings: Settings):
        if not 1 <= settings.layer < len(policy.sizes) - 1:
            raise UserError(f"probe.layer must be 1 to {len(policy.sizes) - 2}, not {settings.layer}")
        self.tasks, self.settings = tasks, settings
        self.weights = policy.base_network()
        self._inputs = {role: _Inputs(policy, task, settings) for role, task in tasks.items()}

    def base_success(self) -> list[dict]:
        """The base's rows of summary.json's table ``success``, without stage and iteration."""
        return [row for role, inputs in self._inputs.items() for row in inputs.success(role, inputs.logits)]

    def measure(self, policy: MLPPolicy, *, ranks: bool = False) -> tuple[list[dict], list[dict]]:
        """Rows of ``success`` and of divergence.jsonl, both without stage and iteration.

        ranks: also of the weight change; they cost as much as everything else together.
        """
        success, found = [], []
        for role, inputs in self._inputs.items():
            hidden, logits = policy.activations(inputs.features)
            success += inputs.success(role, logits)
            where = {"task": inputs.task.name, "role": role, "states": "test"}
            for name, value, error, n in inputs.divergences(hidden, logits):
                row = {"measure": name, "unit": UNITS.get(name, "1"), "value": value, "standard_error": error, "n": n}
                found.append({**where, **row})
        for role, states, name, value in self._weight_changes(policy.network(), ranks):
            task = self.tasks[role].name if role else None
            where = {"task": task, "role": role, "states": states, "measure": name, "unit": "1"}
            found.append({**where, "value": float(value), "standard_error": None, "n": None})
        return success, found

    def _weight_changes(self, weights: dict[str, Tensor], ranks: bool) -> Iterator[tuple]:
        """Role and states whose inputs weigh the change, measure, value."""
        for role in ("prior", "new"):
            value = drift.weight_fisher_l2(self.weights, weights, self._inputs[role].fisher)
            yield role, "train", "weight_fisher_l2", value
        found = {name: getattr(drift, name)(self.weights, weights) for name in ("weight_l1", "weight_l2")}
        found["weight_spectral"] = max(drift.spectral_norms(self.weights, weights).values())
        found["weight_sparsity"] = drift.sparsity(self.weights, weights)
        if ranks:
            found |= drift.ranks(self.weights, weights)
            found["weight_sparsity_exact"] = drift.sparsity(self.weights, weights, tolerance=0.0)
            found["weight_sparsity_bfloat16"] = drift.sparsity(self.weights, weights, dtype=torch.bfloat16)
        yield from ((None, None, name, value) for name, value in found.items())


class _Inputs:
    """One task's fixed inputs, with what the base does on them."""

    def __init__(self, policy: MLPPolicy, task: OneStepTask, settings: Settings):
        size = task.size("test")
        if size < settings.images:
            raise UserError(f"task '{task.name}' has {size} test items; probe.images={settings.images} is too many")
        start = task.seeds("test").start
        self.seeds = start + np.arange(settings.images) * size // settings.images
        self.task, self.settings = task, settings
        self.features = task.observations(self.seeds)["features"]
        self.right = correct(task, self.seeds)
        base = MLPPolicy(sizes=policy.sizes, weights=policy.base_network())
        self.hidden, self.logits = base.activations(self.features)
        # Training inputs, after those of pre-training (which are the first): the base did not see these.
        items = task.seeds("train").start + task.size("train") - 1 - np.arange(min(settings.fisher, task.size("train")))
        self.fisher = fisher(policy.base_network(), task.observations(items)["features"])

    def success(self, role: str, logits: Tensor) -> Iterator[dict]:
        probabilities = logits.softmax(-1)
        answers = {
            "sampled": torch.from_numpy(draw(probabilities, self.seeds, SAMPLING)),
            "greedy": probabilities.argmax(-1),
        }
        for decode, chosen in answers.items():
            won, n = int(self.right.gather(1, chosen.unsqueeze(1)).sum()), len(chosen)
            low, high = wilson(won, n)
            row = {"task": self.task.name, "role": role, "decode": decode, "n": n, "successes": won}
            yield {**row, "rate": won / n, "low": low, "high": high}

    def divergences(self, hidden: list[Tensor], logits: Tensor) -> Iterator[tuple[str, float, float | None, int]]:
        """Measure, value, standard error and n."""
        n = len(logits)
        for name in DISTANCES:
            values = getattr(divergence, name)(self.logits, logits).double()
            yield name, float(values.mean()), float(values.std() / n**0.5), n
        before, after = torch.cat(self.hidden, -1), torch.cat(hidden, -1)
        for name in ("activation_l1", "activation_l2"):
            yield name, float(getattr(drift, name)(before, after)), None, n
        few, layer = self.settings.similarity, self.settings.layer - 1
        spread = torch.arange(few) * n // few
        before, after = self.hidden[layer][spread], hidden[layer][spread]
        yield "cka", float(representation.linear_cka(before, after)), None, few
        for mask in representation.MASKS:  # the paper's, and the replication's
            yield f"cknna_{mask}", float(representation.cknna(before, after, k=self.settings.k, mask=mask)), None, few


def fisher(weights: dict[str, Tensor], features: np.ndarray | Tensor) -> dict[str, Tensor]:
    """The diagonal Fisher of an MLP, without labels: sums of products of squares, one pass per label.

    F_i = mean_x sum_y pi(y|x) (d log pi(y|x) / d w_i)^2 over inputs x. The gradient of a weight matrix is input times
    gradient of the layer's output, so its square sums over x as inputs^2 @ gradients^2.
    """
    depth, hidden = len(weights) // 2, [torch.as_tensor(features)]
    for layer in range(1, depth + 1):
        out = hidden[-1] @ weights[f"layer{layer}.weight"] + weights[f"layer{layer}.bias"]
        hidden.append(out.relu() if layer < depth else out)
    probabilities = hidden.pop().softmax(-1)
    squares: list = [0.0] * depth  # layer -> sum_y pi(y|x) (d log pi(y|x) / d output)^2, [N, out]
    for label in range(probabilities.shape[1]):
        gradient = -probabilities
        gradient[:, label] += 1
        for layer in range(depth, 0, -1):
            squares[layer - 1] = squares[layer - 1] + probabilities[:, label : label + 1] * gradient.square()
            if layer > 1:
                gradient = (gradient @ weights[f"layer{layer}.weight"].T) * (hidden[layer - 1] > 0)
    found = {}
    for layer, (inputs, square) in enumerate(zip(hidden, squares, strict=True), start=1):
        found[f"layer{layer}.weight"] = inputs.square().T @ square / len(inputs)
        found[f"layer{layer}.bias"] = square.mean(0)
    return found


def mean_success(rows: Sequence[dict], role: str, decode: str = "greedy") -> float:
    return next(row["rate"] for row in rows if (row["role"], row["decode"]) == (role, decode))
