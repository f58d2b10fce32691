"""A Qwen2 of a few thousand random weights with a tokenizer of its own, and a text task."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from robot_forgetting.methods.labels import Labeler, Labels
from robot_forgetting.one_step import OneStepTask
from robot_forgetting.policies.causal_lm.lm import CausalLM
from robot_forgetting.policies.causal_lm.lm_checkpoint import quiet
from robot_forgetting.policy import ConventionSpec

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = "What is the sum of one and two? Answer with a letter: A, B, C or D. yes no user assistant system 0123456789 "

QUESTIONS = [
    "one plus two",
    "Answer yes or no: is two the sum of one and one, and is three the sum of one and two?",
    "A",
]


def tokenizer(words: str = WORDS, size: int = 320):
    """Byte-level BPE with the ChatML tokens, as Qwen's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    made.train_from_iterator([words], trainers.BpeTrainer(vocab_size=size, **options))
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def tiny_folder(folder: Path, *, seed: int = 0, context: int = 512, tied: bool = True, **sizes) -> Path:
    """Saves a random Qwen2 as transformers does and returns its folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = tokenizer()
    values = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2Config(
        **{**values, "intermediate_size": 64, **sizes},
        vocab_size=len(words),
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():  # transformers' own start is nearly uniform over the vocabulary
                if parameter.dim() > 1:
                    parameter.mul_(8)
    with quiet():
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return Path(folder)


@lru_cache(maxsize=4)
def _folder(tied: bool) -> str:
    made = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return str(tiny_folder(Path(made), tied=tied))


def tiny_lm(*, tied: bool = True, seed: int = 0, **options) -> CausalLM:
    """The policy; ``options`` are those of ``CausalLM``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of fresh adapters
        return CausalLM(_folder(tied), **{"max_new_tokens": 8, "name": "tiny", "device": "cpu", **options})


def chats(texts=QUESTIONS, each: int = 1) -> dict:
    """Observations: every text ``each`` times."""
    return {"messages": [[{"role": "user", "content": text}] for text in texts for _ in range(each)]}


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(seed))


def nudge(policy: CausalLM, size: float = 0.05, seed: int = 3) -> None:
    """Stands for optimiser steps: every trained weight moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * size).to(parameter))


class LettersTask(OneStepTask):
    """Success where the completion contains the item's letter, which a random model writes now and then."""

    def __init__(self, name: str = "letters", items: int = 12):
        self.name, self.items_per_split = name, items

    def convention(self) -> ConventionSpec:
        return ConventionSpec(action_dimensions=1, action_mode="text")

    def size(self, split: str) -> int:
        return self.items_per_split

    def letters(self, seeds) -> list[str]:
        return ["ABCD"[index % 4] for index in self.items(seeds)[1]]

    def observations(self, seeds) -> dict:
        split, indices = self.items(seeds)
        asked = [f"{split} {i}: Answer with a letter, one plus {'two ' * (i % 3)}" for i in indices]
        return {"messages": [[{"role": "user", "content": text}] for text in asked]}

    def rewards(self, seeds, answers) -> np.ndarray:
        return np.array([a in text for a, text in zip(self.letters(seeds), answers, strict=True)], np.float32)

    def labels(self) -> Labeler:
        return Letters()


class Letters(Labeler):
    """The right letter, or with ``shift`` another one."""

    def __init__(self, shift: int = 0):
        self.shift = shift

    def label(self, policy, task, seeds, stream) -> Labels:
        return Labels(["ABCD"[("ABCD".index(letter) + self.shift) % 4] for letter in task.letters(seeds)])
