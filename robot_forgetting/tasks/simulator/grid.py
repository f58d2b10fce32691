"""Initial states of SimplerEnv's tasks: the evaluation's fixed configurations, and training states away from them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TEST_START = 1_000_000  # the first seed of the test split (``Task.seeds``): configuration 0
STREAM = 0xB21D6E  # of random numbers, so that no other use of the seed draws the same ones


def drawn(seed: int, number: int | None = None) -> tuple[int | None, np.random.Generator]:
    """The number of an episode's configuration (None in training), and random numbers of its seed.

    Test seed 1,000,000 + k has number k; a given one overrides the seed.
    """
    if number is None and seed >= TEST_START:
        number = seed - TEST_START
    return None if number is None else int(number), np.random.default_rng([seed, STREAM])


def dealt(number: int, places: int, colourings: int) -> tuple[int, int, int]:
    """Configuration, place and colouring of a test episode, where the evaluation has every place in every colouring.

    Configurations run through all places before one comes again, each time in its next colouring, so that a short
    evaluation covers as many places as it can.
    """
    configuration = number % (places * colourings)
    turn, place = divmod(configuration, places)
    return configuration, place, (place + turn) % colourings


@dataclass(frozen=True)
class Grid:
    """Configurations of a source and a target object, and where else they may lie in training.

    places: [P, 2, 2] xy of source and target, metres; turns: [Q, 2, 4] their quaternions (w, x, y, z). Configuration k
        of the P * Q takes places[k // Q] and turns[k % Q], as in the original.
    source, target: [[least x, greatest x], [least y, greatest y]] of their places in training, metres
    apart: least distance of the two then; turn: the source is turned by up to so many radians more
    held_out: [2]; in training source and target keep this far (metres) from every place that the grid has for them
    """

    places: np.ndarray
    turns: np.ndarray
    source: tuple
    target: tuple
    apart: float
    turn: float
    held_out: tuple[float, float]

    def __len__(self) -> int:
        return len(self.places) * len(self.turns)

    def state(self, seed: int, configuration: int | None = None) -> tuple[int, np.ndarray, np.ndarray]:
        """Configuration (-1 in training), places [2, 2] and quaternions [2, 4] of an episode, see ``drawn``."""
        number, rng = drawn(seed, configuration)
        if number is None:
            return -1, *self.draw(rng)
        configuration = number % len(self)
        place, turn = divmod(configuration, len(self.turns))
        return configuration, self.places[place], self.turns[turn]

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Places [2, 2] and quaternions [2, 4] for training."""
        while True:
            chosen = np.array([rng.uniform(*np.transpose(box)) for box in (self.source, self.target)])
            away = np.linalg.norm(chosen - self.places, axis=2).min(axis=0)
            if np.linalg.norm(chosen[0] - chosen[1]) >= self.apart and (away >= self.held_out).all():
                break
        turned = np.array(self.turns[rng.integers(len(self.turns))], dtype=np.float64)
        turned[0] = _about_the_vertical(rng.uniform(-self.turn, self.turn), turned[0])
        return chosen, turned


def _about_the_vertical(angle: float, quaternion: np.ndarray) -> np.ndarray:
    """A quaternion turned about z in the world."""
    c, s = np.cos(angle / 2), np.sin(angle / 2)
    w, x, y, z = quaternion
    return np.array([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w])
