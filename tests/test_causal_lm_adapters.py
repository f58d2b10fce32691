"""Adapters that peft saved on a language model: what is sampled, forced, merged and peft's own agree, or a refusal."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_lm import chats, noise, tiny_folder
from transformers import Qwen2ForCausalLM

from robot_forgetting.errors import UserError
from robot_forgetting.policies import lora
from robot_forgetting.policies.causal_lm.lm import CausalLM

TARGETS = ["q_proj", "down_proj"]
KINDS = {
    "plain": {"target_modules": TARGETS},
    "every linear layer": {"target_modules": "all-linear"},
    "rank-stabilised": {"target_modules": TARGETS, "use_rslora": True},
    "patterns": {"target_modules": TARGETS, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"down_proj": 40}},
    "dropout": {"target_modules": TARGETS, "lora_dropout": 0.5},
    "one layer": {"target_modules": TARGETS, "layers_to_transform": [1]},
    "dora": {"target_modules": TARGETS, "use_dora": True},
    "bias": {"target_modules": TARGETS, "bias": "lora_only"},
    "bias of its own": {"target_modules": TARGETS, "lora_bias": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "whole modules": {"target_modules": TARGETS, "modules_to_save": ["norm"]},
}
REFUSED = {"dora", "bias", "bias of its own", "head", "embedding", "whole modules"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("base") / "model", tied=False)


def saved_by_peft(base, folder, kind):
    model = Qwen2ForCausalLM.from_pretrained(base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, **KINDS[kind]))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_" in name:
                    parameter.mul_(4)
    made.save_pretrained(folder)
    return made.eval()


@pytest.mark.filterwarnings("ignore")  # peft's, of settings that are refused here
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_forced_and_merged_are_pefts_own_or_refused(kind, base, tmp_path):
    theirs = saved_by_peft(base, tmp_path / "adapter", kind)
    options = {"device": "cpu", "max_new_tokens": 6, "lora": {"adapter": str(tmp_path / "adapter")}}
    if kind in REFUSED:
        with pytest.raises(UserError, match="not supported|does not fit this policy"):
            CausalLM(str(base), **options)
        return
    policy = CausalLM(str(base), **options)
    obs = chats(each=4)
    action = policy.act(obs, noise=noise(12))
    forced = policy.log_prob(obs, action)
    assert torch.allclose(forced[action.mask], action.log_prob[action.mask], atol=1e-4)
    merged = Qwen2ForCausalLM.from_pretrained(base).eval()
    merged.load_state_dict(dict(lora.merged(policy.model)))
    ids = torch.tensor([policy.prompts.read(obs["messages"][:1], 0)[0] + action.tokens[0].tolist()])
    with torch.no_grad():
        ours, expected, plain = policy.model(ids).logits, theirs(ids).logits, merged(ids).logits
    assert torch.allclose(ours, expected, atol=1e-4)
    assert torch.allclose(plain, expected, atol=1e-3)
    with torch.no_grad(), theirs.disable_adapter():
        assert not torch.allclose(theirs(ids).logits, expected, atol=0.1), "an adapter without effect tests nothing"
