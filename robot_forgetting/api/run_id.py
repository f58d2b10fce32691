"""The name of a run's folder: what differs from the defaults, at most ``MOST`` letters.

A name that would be longer keeps the words that tell runs of a sweep apart and ends in a hash of all the rest; what the
run was made of is in its config.yaml.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

MOST = 80
# What is kept first where a name is too long: what is run, its settings, the budget, the policy, lists of tasks.
WHAT, SETTING, BUDGET, POLICY, LIST = range(5)


def run_folder(
    sweep: Path, words: Sequence[tuple[int, str]], seed: int, whole: Iterable[str] = (), hashed: bool = False
) -> Path:
    """The folder in ``sweep`` of a run of these words, each with its rank, in the order of a short name.

    whole: texts that say all that the words say, and what they leave out; hashed: whether a short name needs them too
    A folder that was made when names had any length goes on being this run's.
    """
    long = _safe("-".join([*(word for _, word in words), f"seed{seed}"]))
    fits = len(long) <= MOST or os.path.isdir(sweep / long)
    return sweep / (long if fits and not hashed else shortened(words, seed, whole))


def shortened(words: Sequence[tuple[int, str]], seed: int, whole: Iterable[str]) -> str:
    """'google_robot_move_near-sft-sft_iterations30-seed1-1f3a09c2'; the hash is the same for every seed."""
    tail = f"-seed{seed}-{hashlib.sha256(chr(10).join(sorted(whole)).encode()).hexdigest()[:8]}"
    name = ""
    for rank, word in sorted(words, key=lambda one: one[0]):
        room = MOST - len(name) - len(tail) - bool(name)
        word = _safe(word)[: room if rank == WHAT else None]
        if word and len(word) <= room:
            name += f"-{word}" if name else word
    return name + tail


def _safe(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in text)
