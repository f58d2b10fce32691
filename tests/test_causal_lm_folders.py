"""Folders of other people's language models: whatever is missing, left over or of another shape is named."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lm import tiny_folder

from robot_forgetting.errors import UserError
from robot_forgetting.policies.causal_lm.lm import CausalLM

LAYER = "model.layers.1.self_attn.q_proj.weight"


def loaded(folder) -> CausalLM:
    return CausalLM(str(folder), device="cpu", max_new_tokens=4)


def weights(folder, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config(folder, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def cut(folder) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


DAMAGE = {
    "a tensor is missing": (lambda f: weights(f, lambda t: t.pop(LAYER)), f"missing {LAYER}"),
    "a bias is missing": (lambda f: weights(f, lambda t: t.pop(LAYER.replace("weight", "bias"))), "missing .*bias"),
    "a norm is missing": (lambda f: weights(f, lambda t: t.pop("model.norm.weight")), "missing model.norm.weight"),
    "the embedding is missing": (lambda f: weights(f, lambda t: t.pop("model.embed_tokens.weight")), "embed_tokens"),
    "a tensor is left over": (lambda f: weights(f, lambda t: t.update(extra=torch.zeros(2))), "unexpected extra"),
    "a layer more": (lambda f: config(f, num_hidden_layers=1, layer_types=None), "unexpected model.layers.1"),
    "a layer less": (lambda f: config(f, num_hidden_layers=3, layer_types=None), r"missing model.layers.2.*and 6 more"),
    "another shape": (
        lambda f: weights(f, lambda t: t.update({LAYER: torch.zeros(3, 32)})),
        r"q_proj.weight has shape \[3, 32\] instead of \[32, 32\]",
    ),
    "an untied head": (lambda f: config(f, tie_word_embeddings=False), "missing lm_head.weight"),
    "cut off": (cut, "cannot be loaded"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
    "a text for a number": (lambda f: config(f, hidden_size="wide"), "cannot be loaded"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "cannot be loaded"),
    "a tokenizer of nothing": (lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be loaded"),
    "an adapter's": (lambda f: (f / "adapter_config.json").write_text("{}"), "is an adapter's folder"),
    "its own program": (
        lambda f: config(f, model_type="mine", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}),
        "a program of its own, which is never run",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_folder_is_one_line_that_names_it(kind, tmp_path, monkeypatch):
    folder = tiny_folder(tmp_path / "model")
    (folder / "own.py").write_text("raise SystemExit('ran')\n")
    change, said = DAMAGE[kind]
    change(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    with pytest.raises(UserError, match=said) as error:
        loaded(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_folder_loads(tied, tmp_path):
    assert loaded(tiny_folder(tmp_path / "model", tied=tied)).blocks == 2


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["somebody/kernels", "eager", "flash_attention_2"])
def test_a_folder_does_not_choose_how_it_is_computed(key, value, tmp_path):
    folder = tiny_folder(tmp_path / "model")
    ours = loaded(folder).model.config._attn_implementation
    config(folder, **{key: value})
    assert loaded(folder).model.config._attn_implementation == ours
