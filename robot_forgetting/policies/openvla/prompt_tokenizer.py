"""Prompts to token ids: the published Llama tokenizer file, or a small tokenizer trained on manipulation prompts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from robot_forgetting.errors import UserError

SPACE_ID = 29871  # Llama's lone "▁", which OpenVLA was trained to see between the prompt and the action

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]

_VERBS = (
    "pick up", "push", "pull", "lift", "grasp", "move", "place",
    "put", "stack", "turn", "open", "close", "pour", "insert",
)  # fmt: skip
_COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "white", "black")
_OBJECTS = ("cube", "block", "sphere", "ball", "bin", "bowl", "plate", "cup", "spoon", "carrot", "drawer", "can", "peg")
_PLACES = (
    "on top of", "into", "onto", "next to", "in front of", "to the left of", "to the right of", "towards", "from",
)  # fmt: skip

# The prompt's fixed words; a noun phrase; the words up to the next noun phrase.
_PHRASES = (
    r"^In: What action should the robot take to|\?\nOut:$"
    rf"| (?:the|a|an)(?: (?:{'|'.join(_COLOURS)}))? \w+"
    r"|(?: (?!(?:the|a|an) )\w+)+"
)


def prompt(instruction: str) -> str:
    """OpenVLA's prompt."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


def manipulation_instructions() -> list[str]:
    """Sentences that give the small tokenizer the words and phrases of table-top manipulation."""
    sentences = []
    for verb in _VERBS:
        for index, thing in enumerate(_OBJECTS):
            colour, other = _COLOURS[index % len(_COLOURS)], _COLOURS[(index + 3) % len(_COLOURS)]
            place, goal = _PLACES[index % len(_PLACES)], _OBJECTS[(index + 5) % len(_OBJECTS)]
            sentences.append(f"{verb} the {thing}")
            sentences.append(f"{verb} the {colour} {thing} {place} the {other} {goal}")
            sentences.append(f"{verb} the {colour} {thing} to the goal")
    return sentences


def train_small_tokenizer(
    instructions: Sequence[str] = (), *, text_tokens: int = 768, action_bins: int = 256
) -> Tokenizer:
    """A byte-level BPE for prompts whose last ``action_bins`` ids are the action tokens.

    Merges stay within phrases ("pick up", "the red cube", the prompt's fixed words), so a task's prompt has about seven
    tokens, most tasks' prompts are equally long, and tasks share the tokens of what they have in common. Other text
    falls back to pieces and, at last, to bytes. No text merges into an action token.
    """
    own = list(instructions) * 8  # every phrase of a task becomes one token
    sentences = manipulation_instructions() + own
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PHRASES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=text_tokens,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(prompt, sentences), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for index in range(len(vocabulary), text_tokens):
        vocabulary[f"<unused_{index}>"] = index
    for action_bin in range(action_bins):  # OpenVLA counts bins downwards from the end
        vocabulary[f"<action_{action_bin}>"] = text_tokens + action_bins - 1 - action_bin
    return Tokenizer.from_str(json.dumps(state))


def load_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{folder} has no tokenizer.json; download the whole checkpoint")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise UserError(
            f"{path} is not a readable tokenizer ({str(error).splitlines()[0]}); download it again"
        ) from error


class PromptTokenizer:
    """Instructions to left-padded prompts; each sentence is tokenised once."""

    def __init__(self, tokenizer: Tokenizer, pad_token_id: int):
        self.tokenizer = tokenizer
        self.pad_token_id = pad_token_id
        self._suffix = [SPACE_ID] if tokenizer.id_to_token(SPACE_ID) == "▁" else []
        self._known: dict[str, list[int]] = {}

    def ids(self, instruction: str) -> list[int]:
        known = self._known.get(instruction)
        if known is None:
            if not isinstance(instruction, str) or not instruction.strip():
                raise UserError(f"instruction {instruction!r} is empty; give the task a sentence")
            known = self.tokenizer.encode(prompt(instruction)).ids
            if self._suffix and known[-1:] != self._suffix:
                known = known + self._suffix
            self._known[instruction] = known
        return known

    def __call__(self, instructions: Iterable[str]) -> tuple[Tensor, Tensor | None]:
        """Ids [N, L] and a mask [N, L] bool, or None where all prompts are equally long."""
        rows = [self.ids(instruction) for instruction in instructions]
        length = max(map(len, rows))
        if all(len(row) == length for row in rows):
            return torch.tensor(rows), None
        padded = [[self.pad_token_id] * (length - len(row)) + row for row in rows]
        mask = [[False] * (length - len(row)) + [True] * len(row) for row in rows]
        return torch.tensor(padded), torch.tensor(mask)
