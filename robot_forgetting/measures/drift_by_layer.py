"""How far each layer of a policy has moved from the base's: what it makes of held-out texts, and its weights.

RL's Razor (appendix C.1) compares base and fine-tuned model by CKNNA on paragraphs that neither was trained on, and
does not say which layer, how its states become one vector per text, how many texts, nor k. Here: every layer, the mean
over a text's tokens (see the policy's ``hidden_states``), and keys of the configuration for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from robot_forgetting.errors import UserError
from robot_forgetting.measure import TEXT, WEIGHTS
from robot_forgetting.metrics import drift, representation
from robot_forgetting.policy import Policy
from robot_forgetting.task import Task

LEAST = 4  # texts, for CKA without bias and CKNNA
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
    ask = getattr(task, "prompts", None) or getattr(task, "observations", None)
    if ask is None:
        raise LookupError(f"none of the tasks is {name}, whose prompts would be the texts")
    asked = ask(task.seeds("test").start + first + np.arange(number))
    if "messages" not in asked:
        raise LookupError(f"{name} has no prompts in words")
    return [chat[-1]["content"] for chat in asked["messages"]]


def measure_layers(policy: Policy, texts: Sequence[str], *, source: str, k: int) -> list[dict]:
    """Rows of divergence.jsonl without stage and iteration, with the layer; a ``layer`` of None is the whole model.

    On the texts: CKA (linear, without bias: a model is wider than there are texts), CKNNA by both masks, and the change
    of the states over their length. Of the weights: |w - w0| / |w0|, adapters merged. CKA and CKNNA are 1 for the same.
    """
    policy.eval()
    obs = {"text": list(texts)}
    with policy.base():
        before = policy.hidden_states(obs)
    after = policy.hidden_states(obs)
    measures = {"cka_debiased": representation.linear_cka(before, after, debiased=True)}
    for mask in representation.MASKS:
        measures[f"cknna_{mask}"] = representation.cknna(before, after, k=k, mask=mask)
    measures["activation_l2_relative"] = drift.activation_l2_relative(before, after)
    rows = []
    for name, values in measures.items():
        head = {"task": source, "role": TEXT, "states": TEXT, "measure": name, "unit": "1"}
        head |= {"k": k} if name.startswith("cknna") else {}
        for layer, value in enumerate(values.tolist()):
            rows.append({**head, "layer": layer, "value": value, "standard_error": None, "n": len(texts)})
    head = {"task": None, "role": None, "states": WEIGHTS, "measure": "weight_l2_relative", "unit": "1"}
    moved, size = 0.0, 0.0  # squares, over all weights
    for layer, base, own in policy.layer_weights():
        change, norm = drift.weight_l2(base, own).item(), drift.weight_norm(base).item()
        moved, size = moved + change**2, size + norm**2
        if layer is not None:
            value = change / norm if norm else None
            rows.append({**head, "layer": layer, "value": value, "standard_error": None, "n": None})
    rows.append({**head, "layer": None, "value": (moved / size) ** 0.5, "standard_error": None, "n": None})
    return rows
