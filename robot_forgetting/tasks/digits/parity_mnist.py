"""ParityMNIST and FashionMNIST for one 10-label network: RL's Razor's controlled study (arXiv 2509.04259, section 4).

Both show a 28 x 28 picture, flattened to 0 .. 1, and a bit that says which task it is: +1 ParityMNIST, -1 FashionMNIST.
The new task is to answer any digit of the right parity; the prior task is to name the garment.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from robot_forgetting.errors import UserError
from robot_forgetting.methods.labels import FixedLabels, Labeler
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policy import ConventionSpec
from robot_forgetting.ranges import Count
from robot_forgetting.tasks.digits.idx import Images, load_images


class _Pictures(OneStepTask):
    """Pictures of ten classes, with a task bit. limit: only so many training pictures, the first; None for all."""

    choices = 10
    data: str
    bit: float

    def __init__(self, name: str, limit: Count | None):
        if limit is not None and limit < 1:
            raise UserError(f"task '{name}' cannot be limited to {limit} training pictures; give at least 1, or null")
        self.name, self.limit = name, limit

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_dimensions=1, action_mode="label")

    @cached_property
    def splits(self) -> dict[str, Images]:
        return {split: load_images(self.data, split) for split in ("train", "test")}

    def size(self, split: str) -> int:
        size = len(self.splits[split].labels)
        return min(size, self.limit or size) if split == "train" else size

    def observations(self, seeds: np.ndarray) -> dict:
        """features [N, 785] float32: pixels in 0 .. 1, then the task bit."""
        split, items = self.items(seeds)
        pixels = self.splits[split].pixels[items]
        features = np.empty((len(items), pixels.shape[1] + 1), np.float32)
        np.multiply(pixels, np.float32(1 / 255), out=features[:, :-1])
        features[:, -1] = self.bit
        return {"features": features}

    def classes(self, seeds: np.ndarray) -> np.ndarray:
        """[N] the class of each picture, 0 .. 9."""
        split, items = self.items(seeds)
        return self.splits[split].labels[items].astype(np.int64)


class ParityMNIST(_Pictures):
    """Success: the answer is a digit of the same parity as the picture's."""

    data, bit = "mnist", 1.0

    def __init__(self, name: str = "parity_mnist", limit: Count | None = None):
        super().__init__(name, limit)

    def rewards(self, seeds: np.ndarray, answers: Sequence) -> np.ndarray:
        return ((np.asarray(answers) + self.classes(seeds)) % 2 == 0).astype(np.float32)

    def labels(self) -> Labeler:
        """SFT-1: even digits are a 0, odd ones a 1."""
        return parity_labels(even=[0], odd=[1])


class FashionMNIST(_Pictures):
    """Success: the garment's class."""

    data, bit = "fashion_mnist", -1.0

    def __init__(self, name: str = "fashion_mnist", limit: Count | None = None):
        super().__init__(name, limit)

    def rewards(self, seeds: np.ndarray, answers: Sequence) -> np.ndarray:
        return (np.asarray(answers) == self.classes(seeds)).astype(np.float32)

    def labels(self) -> Labeler:
        return FixedLabels([[label] for label in range(10)])


def parity_labels(even: Sequence[int], odd: Sequence[int]) -> Labeler:
    """A labeler for ``SFT``: even digits get a label of ``even``, odd ones of ``odd``, uniformly at random.

    SFT-1 of the paper: even=[0], odd=[1]. SFT-2: even=[0, 4], odd=[1, 5]. Pre-training: all five
    of each.
    """
    for name, labels, rest in (("even", even, 0), ("odd", odd, 1)):
        if not labels or any(not 0 <= label <= 9 or label % 2 != rest for label in labels):
            raise UserError(f"parity_labels: '{name}' must list digits that are {name}, not {list(labels)}")
    table = [list(odd if digit % 2 else even) for digit in range(10)]
    return FixedLabels(table)
