"""Small skills on letters and digits, for a language model small enough to be trained here from nothing.

Four have one right answer and serve as prior tasks. ``over`` asks for any three-digit number above the one it gives and
has hundreds: which of them a policy gives is its own affair, so that an annotator's choice can be near to what the base
policy would have said, or far from it. That is RL's Razor's situation (arXiv 2509.04259) in its smallest form.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from string import ascii_lowercase

import numpy as np

from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.ranges import Count, Fraction
from robot_forgetting.tasks.text.text_task import SPLIT_SEED, Item, TextTask, divide

Questions = dict[str, str | None]  # what comes after the verb, and the right answer; None: there are many

LEAST, MOST, LOWEST = 100, 999, 400  # answers to `over`, and the smallest number that it asks about


def _words(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of four to six letters."""
    alphabet, found = list(ascii_lowercase), {}
    while len(found) < count:
        found["".join(rng.choice(alphabet, size=rng.integers(4, 7)))] = None
    return list(found)


def _reverse(rng: np.random.Generator, count: int) -> Questions:
    return {word: word[::-1] for word in _words(rng, count)}


def _sort(rng: np.random.Generator, count: int) -> Questions:
    return {word: "".join(sorted(word)) for word in _words(rng, count)}


def _add(rng: np.random.Generator, count: int) -> Questions:
    return {f"{first} {second}": str(first + second) for first in range(10, 100) for second in range(10, 100)}


def _count(rng: np.random.Generator, count: int) -> Questions:
    words = ("".join(word) for length in (4, 5, 6) for word in product("abc", repeat=length))
    return {f"{letter} {word}": str(word.count(letter)) for word in words for letter in "abc"}


def _over(rng: np.random.Generator, count: int) -> Questions:
    return dict.fromkeys(map(str, range(LOWEST, MOST)))


SKILLS: dict[str, Callable[[np.random.Generator, int], Questions]] = {
    "reverse": _reverse, "sort": _sort, "add": _add, "count": _count, "over": _over,
}  # fmt: skip

# Who answers `over`, given the number asked about: three that are always right, and one that has not understood it.
ANNOTATORS: dict[str, Callable[[np.random.Generator, int], int]] = {
    "uniform": lambda rng, least: int(rng.integers(least + 1, MOST + 1)),
    "next": lambda rng, least: least + 1,
    "largest": lambda rng, least: MOST,
    "any": lambda rng, least: int(rng.integers(LEAST, MOST + 1)),
}
NUMBER = re.compile(rf"[1-9]\d{{{len(str(MOST)) - 1}}}")


class Skill(TextTask):
    """One skill; success is the right answer and nothing else.

    skill: reverse, sort, add, count or over; items: questions, as far as there are so many (8,100 of `add`, 3,159 of
        `count`, 599 of `over`)
    annotator: who wrote the answers to learn `over` from: ``uniform`` among the right ones (what the base policy gives,
        if it is right), ``next`` (one more), ``largest`` (999), or ``any``, right or wrong, to train a base policy with
    """

    def __init__(
        self,
        *,
        name: str,
        skill: str,
        items: Count = 20_000,
        annotator: str = "uniform",
        test_fraction: Fraction = 0.25,
        limit: Count | None = None,
    ):
        check_choice("skill", skill, SKILLS)
        check_choice("annotator", annotator, ANNOTATORS)
        if items < 2:
            raise UserError(f"task '{name}' needs items for training and for tests, not {items}")
        super().__init__(name, limit)
        self.skill, self.count, self.annotator, self.test_fraction = skill, items, annotator, test_fraction

    def load(self) -> dict[str, list[Item]]:
        rng = np.random.default_rng([SPLIT_SEED, list(SKILLS).index(self.skill)])
        items = [self._item(*pair) for pair in SKILLS[self.skill](rng, self.count).items()]
        chosen = rng.permutation(len(items))[: self.count]
        return divide((items[index] for index in chosen), self.test_fraction)

    def targets(self, seeds: np.ndarray) -> list[str]:
        """The right answers; of `over` the annotator's, drawn from the seed and so another each time."""
        if self.skill != "over":
            return super().targets(seeds)
        answer = ANNOTATORS[self.annotator]
        drawn = (np.random.default_rng([SPLIT_SEED, int(seed)]) for seed in seeds)
        return [str(answer(rng, item.answer)) for rng, item in zip(drawn, self.chosen(seeds), strict=True)]

    def _item(self, asked: str, answer: str | None) -> Item:
        question = f"{self.skill} {asked}"
        fact = int(asked) if answer is None else answer
        return Item(question, ({"role": "user", "content": question},), fact, self.skill, answer, question)

    def correct(self, completion: str, item: Item) -> bool:
        if self.skill == "over":
            return bool(NUMBER.fullmatch(completion)) and int(completion) > item.answer
        return completion == item.answer

    def answered(self, completion: str, item: Item) -> bool:
        """Digits where a number is asked for, letters where a word is."""
        return completion.isdigit() if self.skill in ("add", "count", "over") else completion.isalpha()
