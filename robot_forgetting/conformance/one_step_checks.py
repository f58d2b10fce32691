"""Conformance checks of a one-step task: items, observations, rewards, and that its environments agree with them."""

from __future__ import annotations

import numpy as np

from robot_forgetting.conformance.check_table import Table, expect
from robot_forgetting.one_step import OneStepTask

FEW = 16


def check_one_step(table: Table, task: OneStepTask) -> None:
    if not table.check("items", lambda: _items(task)):
        return
    table.check("same seed, same observation", lambda: _observations(task))
    table.check("rewards", lambda: _rewards(task))
    table.check("one decision per episode", lambda: _environment(task))


def _items(task: OneStepTask) -> str:
    for split in ("train", "test"):
        size = task.size(split)
        expect(size >= 1, f"size('{split}') is {size}; a task needs items to train on and others to test")
        start = task.seeds(split).start
        found = task.items(np.array([start, start + size]))
        expect(found[0] == split, f"seed {start} of '{split}' is said to be of '{found[0]}'")
    return f"{task.size('train')} to train on, {task.size('test')} to test"


def _seeds(task: OneStepTask, split: str) -> np.ndarray:
    return task.seeds(split).start + np.arange(min(FEW, task.size(split)))


def _observations(task: OneStepTask) -> str:
    keys: list[str] = []
    for split in ("train", "test"):
        seeds = _seeds(task, split)
        first, again, backwards = (task.observations(s) for s in (seeds, seeds, seeds[::-1]))
        expect(first, "observations() has no columns; the policy has nothing to look at")
        keys = sorted(first)
        for key, column in first.items():
            expect(len(column) == len(seeds), f"column '{key}' has {len(column)} rows for {len(seeds)} seeds")
            for row, other in ((column, again[key]), (column, backwards[key][::-1])):
                same = all(_equal(a, b) for a, b in zip(row, other, strict=True))
                expect(same, f"'{key}' of one seed differs from call to call; draw it from the seed alone")
    return ", ".join(keys)


def _equal(a, b) -> bool:
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def _answers(task: OneStepTask) -> list:
    """Each answer of a classifier; else texts that a policy may give."""
    return list(range(task.choices)) if task.choices else ["", "42", "no idea"]


def _rewards(task: OneStepTask) -> str:
    for split in ("train", "test"):
        seeds, answers = _seeds(task, split), _answers(task)
        found = np.array([task.rewards(seeds, [answer] * len(seeds)) for answer in answers])
        expect(
            found.shape == (len(answers), len(seeds)),
            f"rewards() gives {list(found.shape[1:])} numbers for {len(seeds)} seeds; give one each",
        )
        expect(np.isfinite(found).all(), "a reward is not finite")
        expect(
            found.min() >= 0 and found.max() <= 1,
            f"rewards reach from {found.min():g} to {found.max():g}; they are in 0 .. 1, and 1 is a success",
        )
        if task.choices:
            right = (found >= 1).sum(0)
            expect(right.min() >= 1, f"seed {seeds[right.argmin()]} has no right answer among its {task.choices}")
            expect(right.min() < task.choices, "every answer is right; there is nothing to learn")
    if not task.choices:
        return "answers are texts"
    return f"{right.min()} to {right.max()} of {task.choices} answers are right"


def _environment(task: OneStepTask) -> str:
    env = task.make_env(2)
    try:
        seeds, answer = _seeds(task, "train")[:2], _answers(task)[0]
        env.request(0, {slot: int(seed) for slot, seed in enumerate(seeds)}, {})
        starts = env.wait()[1]
        expected = task.observations(seeds)
        for slot, transition in enumerate(starts):
            expect(not transition.done, "an episode is done right after its reset")
            for key, column in expected.items():
                same = _equal(transition.observation[key], column[slot])
                expect(same, f"'{key}' in the environment is not that of observations() for the same seed")
        env.request(0, {}, dict.fromkeys(range(len(starts)), answer))
        rewards = task.rewards(seeds[: len(starts)], [answer] * len(starts))
        for transition, reward in zip(env.wait()[1], rewards, strict=True):
            expect(transition.done, "an episode goes on after its only decision")
            expect(
                transition.reward == reward and transition.success is bool(reward >= 1),
                f"the environment gives reward {transition.reward}, success {transition.success}; rewards() {reward}",
            )
    finally:
        env.close()
    return ""
