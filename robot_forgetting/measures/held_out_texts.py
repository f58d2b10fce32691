"""The texts that a language model's layers read: prompts of a task, or of a file; neither model was trained on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robot_forgetting.errors import UserError
from robot_forgetting.measures.layer_states import LEAST
from robot_forgetting.task import Task

FILES = (".txt", ".jsonl", ".json", ".jsonl.gz", ".json.gz")


def held_out_texts(settings: dict, tasks: Sequence[Task], first: int = 0) -> list[str]:
    """The texts: prompts of one of the tasks, or what a file holds; without repetition, evenly spread.

    settings: {"source", "number", "characters", "neighbours"}; source: a task's name; a .txt file, whose texts are
        parted by empty lines; or a .jsonl or .json file of rows with the key "text" (.gz or not)
    first: the number of a task's first item that is read, counted from the start of its test split
    Fewer than ``number`` where there are no more. LookupError where no task of that name shows enough prompts.
    """
    source, number, k = settings["source"], settings["number"], settings["neighbours"]
    if not 1 <= k < number or number < LEAST or settings["characters"] < 1:
        raise UserError(
            f"held_out_text: number={number} must be at least {LEAST} and above neighbours={k}, "
            "neighbours and characters at least 1"
        )
    is_file = source.endswith(FILES)
    texts = _of_file(Path(source)) if is_file else _of_task(source, number, tasks, first)
    texts = [text.strip()[: settings["characters"]] for text in texts]
    texts = [text for text in dict.fromkeys(texts) if text]
    if len(texts) <= max(k, LEAST - 1):
        few = f"{source} holds {len(texts)} different texts, too few for held_out_text.neighbours={k}"
        raise UserError(f"{few}; give a larger file or fewer neighbours") if is_file else LookupError(few)
    chosen = np.linspace(0, len(texts) - 1, min(number, len(texts))).round().astype(int)
    return [texts[index] for index in chosen]


def _of_file(file: Path) -> list[str]:
    from robot_forgetting.tasks.sources import read_rows

    if not file.is_file():
        raise UserError(f"held_out_text.source: {file} does not exist; give a file, or the name of a prior task")
    if ".txt" not in file.suffixes:
        return [row.get("text") for row in read_rows(file)]
    try:
        return re.split(r"\n\s*\n", file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"held_out_text.source: {file} cannot be read ({error})") from error


def _of_task(name: str, number: int, tasks: Sequence[Task], first: int) -> list[str]:
    task = next((task for task in tasks if task.name == name), None)
    if task is None:
        raise LookupError(f"none of the tasks is {name}, whose prompts would be the texts")
    asked = task.prompts(task.seeds("test").start + first + np.arange(number))
    if "messages" not in (asked or {}):
        raise LookupError(f"{name} has no prompts in words")
    return [chat[-1]["content"] for chat in asked["messages"]]
