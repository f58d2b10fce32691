"""Questions to language models: items with a prompt, a right answer and perhaps a solution to learn from.

A text task says where its items come from, how they are put to the model and what a completion must say; everything
else is here. The reward is binary and reads the completion alone: ``correct`` never sees a prompt, since prompts list
the options and may hold the answer.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from robot_forgetting.errors import UserError
from robot_forgetting.machine.progress import say
from robot_forgetting.methods.labels import GivenTargets, Labeler
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policy import ConventionSpec

SPLIT_SEED = 42


@dataclass(frozen=True)
class Item:
    """One question.

    question: identifies the item: no two items of a task share it, whatever their prompts add
    messages: the chat that the model answers, [{"role", "content"}]
    answer: what a task's ``correct`` compares with
    subtask: the part of the data set it comes from, for the records
    target: a completion to learn from, or None where the data give none
    where: 'FILE, row 3'
    """

    question: str
    messages: tuple[dict, ...]
    answer: object
    subtask: str
    target: str | None
    where: str


class TextTask(OneStepTask):
    """A data set of questions; one decision is a whole completion, its reward 1 or 0.

    limit: only so many training items (None: all); which ones does not depend on the order of the files
    teacher: a ``tasks.teacher.Teacher`` that writes the targets of supervised methods; None, or one without a base_url:
        the items' own targets, see ``Item.target``
    """

    def __init__(self, name: str, limit: int | None, teacher=None):
        if limit is not None and limit < 1:
            raise UserError(f"task '{name}' cannot be limited to {limit} training items; give at least 1, or null")
        self.name, self.limit, self.teacher = name, limit, teacher

    @abstractmethod
    def load(self) -> dict[str, list[Item]]:
        """The items of 'train' and 'test', disjoint by question."""

    @abstractmethod
    def correct(self, completion: str, item: Item) -> bool:
        """Whether a completion answers the item; must not look at ``item.messages``."""

    @abstractmethod
    def answered(self, completion: str, item: Item) -> bool:
        """Whether a completion gives any answer in the format that was asked for, right or wrong."""

    def settings(self) -> dict:
        """What changes the meaning of this task's numbers besides its items."""
        return {}

    @property
    def spec(self) -> dict:
        """Identifies settings and test items: rows of tasks that differ in it are never pooled."""
        digest = hashlib.sha256()
        for item in self.splits["test"]:
            digest.update(f"{item.messages}{item.answer}".encode())
        return {**self.settings(), "test_items": digest.hexdigest()[:16]}

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_mode="text")

    @cached_property
    def splits(self) -> dict[str, list[Item]]:
        splits = self.load()
        for split, items in splits.items():
            if not items:
                raise UserError(f"task '{self.name}' has no {split} items; give it more data or other settings")
        splits["train"] = splits["train"][: self.limit]
        return splits

    def size(self, split: str) -> int:
        return len(self.splits[split])

    def chosen(self, seeds: np.ndarray) -> list[Item]:
        """The items of the seeds."""
        split, indices = self.items(seeds)
        return [self.splits[split][index] for index in indices]

    def observations(self, seeds: np.ndarray) -> dict:
        """messages: N chats."""
        return {"messages": [list(item.messages) for item in self.chosen(seeds)]}

    def rewards(self, seeds: np.ndarray, answers: Sequence[str]) -> np.ndarray:
        pairs = zip(answers, self.chosen(seeds), strict=True)
        return np.array([self.correct(text, item) for text, item in pairs], np.float32)

    def flags(self, seed: int, answer: str) -> dict:
        """The item's subtask, and whether the answer had the format asked for."""
        item = self.chosen(np.array([seed]))[0]
        return {"subtask": item.subtask, "answered": self.answered(answer, item)}

    def targets(self, seeds: np.ndarray) -> list[str | None]:
        """The items' own targets."""
        return [item.target for item in self.chosen(seeds)]

    def labels(self) -> Labeler:
        return self.teacher if self.teacher is not None and self.teacher.base_url else GivenTargets()


def position(question: str) -> float:
    """A number in [0, 1) that depends on the question and ``SPLIT_SEED`` alone."""
    digest = hashlib.sha256(f"{SPLIT_SEED}:{folded(question)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def ordered(items: Iterable[Item]) -> list[Item]:
    """By ``position``: ``limit``, and the first items of an evaluation, are then no stretch of a file."""
    return sorted(items, key=lambda item: position(item.question))


def divide(items: Iterable[Item], test_fraction: float) -> dict[str, list[Item]]:
    """Train and test, ``ordered``.

    A question's place depends on its text alone, so that it stays in its split whatever else the data hold: a sample's
    test items are test items of the whole. The test split therefore has about, not exactly, ``test_fraction`` of them.
    """
    if not 0 < test_fraction < 1:
        raise UserError(f"test_fraction must be between 0 and 1, not {test_fraction}")
    items = ordered(items)
    test = [item for item in items if position(item.question) < test_fraction]
    return {"train": items[len(test) :], "test": test}


def folded(text: str) -> str:
    """Equal for texts that differ in white space only (not in case: it tells atoms of a SMILES apart)."""
    return " ".join(text.split())


def distinct(name: str, items: Iterable[Item]) -> list[Item]:
    """The items with each question once, the first one's; says how many were dropped."""
    found: dict[str, Item] = {}
    dropped = []
    for item in items:
        if found.setdefault(folded(item.question), item) is not item:
            dropped.append(item)
    say_dropped(name, "repeated questions", [item.where for item in dropped])
    return list(found.values())


def without(name: str, train: Iterable[Item], test: Iterable[Item]) -> list[Item]:
    """The training items whose question is not in the test split; says how many were dropped."""
    asked = {folded(item.question) for item in test}
    kept, dropped = [], []
    for item in train:
        (dropped if folded(item.question) in asked else kept).append(item)
    say_dropped(name, "training items that are test items too", [item.where for item in dropped])
    return kept


def say_dropped(name: str, what: str, where: Sequence[str]) -> None:
    """One line about rows that are left out; nothing where there are none."""
    if where:
        say(f"  {name}: dropped {len(where)} {what} (the first: {where[0]})")
