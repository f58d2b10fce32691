"""The controlled study's base policy: one network, trained on a few labelled pictures of both tasks at once."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from robot_forgetting.engine.train import train
from robot_forgetting.errors import UserError
from robot_forgetting.machine.files import disk, follow_umask
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.labels import Labeler, Labels
from robot_forgetting.methods.sft import SFT
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policies.mlp import MLPPolicy
from robot_forgetting.policy import ConventionSpec
from robot_forgetting.ranges import Count, LearningRate, Seed, Share
from robot_forgetting.records.run_folder import RunFolder
from robot_forgetting.tasks.digits.parity_mnist import FashionMNIST, ParityMNIST, parity_labels

ANY_OF_THE_PARITY = {"even": [0, 2, 4, 6, 8], "odd": [1, 3, 5, 7, 9]}


class OneStepMixture(OneStepTask):
    """The first ``count`` training items of each task, one after the other."""

    def __init__(self, tasks: Sequence[OneStepTask], labelers: Sequence[Labeler], count: int):
        for task in tasks:
            if not 1 <= count <= task.size("train"):
                raise UserError(f"'{task.name}' has {task.size('train')} training items, not {count} for pre-training")
        self.tasks, self.labelers, self.count = list(tasks), list(labelers), count
        self.name = "+".join(task.name for task in tasks)

    def convention(self) -> ConventionSpec:
        return self.tasks[0].convention()

    def size(self, split: str) -> int:
        return self.count * len(self.tasks)

    def observations(self, seeds: np.ndarray) -> dict:
        _, items = self.items(seeds)
        rows: dict[str, np.ndarray] = {}
        for index, task in enumerate(self.tasks):
            mine = np.flatnonzero(items // self.count == index)
            if len(mine):
                for key, column in task.observations(task.seeds("train").start + items[mine] % self.count).items():
                    rows.setdefault(key, np.empty((len(items), *column.shape[1:]), column.dtype))[mine] = column
        return rows

    def rewards(self, seeds: np.ndarray, answers: Sequence) -> np.ndarray:
        raise UserError(f"the mixture {self.name} gives no rewards; use a supervised method")

    def labels(self) -> Labeler:
        return _PartLabels()


class _PartLabels(Labeler):
    """Each part's own labels; the seeds must be the whole mixture's."""

    def label(self, policy, task: OneStepMixture, seeds, stream) -> Labels:
        own = [part.seeds("train").start + np.arange(task.count) for part in task.tasks]
        parts = zip(task.labelers, task.tasks, own, strict=True)
        return Labels(np.concatenate([labeler.label(policy, part, s, stream).labels for labeler, part, s in parts]))


def pretrain(
    new: ParityMNIST,
    prior: FashionMNIST,
    *,
    seed: Seed,
    sizes: Sequence[int] = (785, 512, 256, 10),
    images: Count = 500,
    epochs: Count = 10,
    batch_size: Count = 64,
    learning_rate: LearningRate = 1e-3,
    warmup_ratio: Share = 0.1,
) -> dict[str, Tensor]:
    """Weights of a network trained on ``images`` pictures of each task (section B.3); seconds, the same for a seed.

    A digit's label is any of its parity at random, a garment's its class. AdamW, cosine schedule: the paper is silent,
    this is the replication's set-up.
    """
    mixture = OneStepMixture([new, prior], [parity_labels(**ANY_OF_THE_PARITY), prior.labels()], images)
    steps = epochs * (mixture.size("train") // batch_size)
    method = SFT(
        iterations=steps, steps_per_iteration=1, batch_size=batch_size, demonstrations=1, optimiser=None, seed=seed
    )
    optimiser = Optimiser(
        learning_rate=learning_rate, schedule="cosine", warmup_steps=round(warmup_ratio * steps), micro_batch=1_000_000
    )
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(seed)
        policy = MLPPolicy(sizes=sizes)
        with RunFolder.create(scratch, config={}) as run:
            train(policy, mixture, method, optimiser=optimiser, run=run, seed=seed, checkpoints=False, log_every=steps)
    return policy.network()


def pretrained_mlp(
    *, seed: Seed = 0, images: Count = 500, epochs: Count = 10, learning_rate: LearningRate = 1e-3, name: str = "mlp"
) -> MLPPolicy:
    """The base policy as an ordinary policy, pre-trained on the spot."""
    weights = pretrain(
        ParityMNIST(), FashionMNIST(), seed=seed, images=images, epochs=epochs, learning_rate=learning_rate
    )
    return MLPPolicy(weights=weights, name=name)


pretrained_mlp.declares = MLPPolicy.declares


def load_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it to train it again") from error


def save_weights(weights: dict[str, Tensor], file: Path) -> None:
    with disk(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in weights.items()}, part)
        follow_umask(part)
        part.rename(file)
