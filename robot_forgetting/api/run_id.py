"""The name of a run's folder: what differs from the defaults, at most ``MOST`` letters.

A name that would be longer keeps the words that tell runs of a sweep apart and ends in a hash of all the rest; what the
run was made of is in its config.yaml.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from robot_forgetting.api.composing import GROUPS
from robot_forgetting.built_with import described

MOST = 80
# What is kept first where a name is too long: what is run, its settings, the budget, the policy, lists of tasks.
WHAT, SETTING, BUDGET, POLICY, LIST = range(5)
TASK_LISTS = ("sequence", "prior", "held_out")
# Keys that a name says in a word of its own, or that change nothing in the results.
NOT_SAID = {*GROUPS, "sequence", "seed", "sweep", "debug", "run_dir", "output", "device", "processes"}
USUAL = (("policy", "openvla-nano", POLICY), ("penalty", "none", WHAT), ("budget", "demo", BUDGET))


def folder_of(verb: str, names: Mapping, overrides: Iterable[str], plain: Mapping, objects: Mapping) -> Path:
    """runs/SWEEP/stack_cube-sft-seed0, plus whatever else in a command changes the result.

    names: group -> what is chosen in it; plain: the configuration; objects: what stands in the place of names
    """
    run = verb == "run"
    learned = "+".join(plain["sequence"] or [names["task"] or ""]) or None
    words = [(WHAT, name) for name in ([] if run else [verb]) + [learned] + [names["method"]] * run]
    words += [(rank, names[group]) for group, usual, rank in USUAL if names[group] != usual]
    words = [(rank, word) for rank, word in words if word is not None]
    whole = [verb, *(f"{group}={name}" for group, name in names.items() if name is not None)]
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        if key not in NOT_SAID and not key.startswith("hydra."):
            word = key.rpartition(".")[2] + Path(value.strip("[]")).name
            words.append((LIST if key in TASK_LISTS else SETTING, word))
            whole.append(text.lstrip("+"))
    whole += [f"sequence={plain['sequence']}"] if plain["sequence"] else []
    whole += [f"{name}={described(given)}" for name, given in objects.items()]
    return run_folder(Path("runs", plain["sweep"]), words, plain["seed"], whole, bool(objects))


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
