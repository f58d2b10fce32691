"""A Qwen2 with random weights and a tokenizer of single bytes, to be trained by `robot-forgetting pretrain`."""

from __future__ import annotations

import tempfile
from typing import Annotated, Any

from robot_forgetting.policies.causal_lm.lm import CausalLM
from robot_forgetting.policies.causal_lm.lm_checkpoint import quiet
from robot_forgetting.ranges import ArgumentsOf, Tokens, Width

# A role is one token: a question of twenty bytes is not worth twenty more of frame.
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
END, PAD = "<|im_end|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def new_nano(
    *,
    hidden_size: Width,
    num_layers: Width,
    num_heads: Width,
    intermediate_size: Width,
    positions: Tokens = 256,
    **options: Annotated[Any, ArgumentsOf(CausalLM)],
) -> CausalLM:
    """The policy; weights are drawn from torch's generator, ``options`` are those of ``CausalLM``."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    words = byte_tokenizer()
    config = Qwen2Config(
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=positions,
        vocab_size=len(words),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as folder, quiet():
        Qwen2ForCausalLM(config).save_pretrained(folder)
        words.save_pretrained(folder)
        made = CausalLM(folder, **options)
    made.source = "random weights"
    return made


new_nano.declares = CausalLM.declares


def byte_tokenizer():
    """256 bytes and five special tokens: any text can be read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, END, *ROLES]
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=PAD, extra_special_tokens=list(ROLES)
    )
    fast.chat_template = TEMPLATE
    return fast
