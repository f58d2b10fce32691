"""Adapters that peft saved: each of its options is computed as peft does, sampled, trained and merged, or refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_openvla_policy import observations, small_nano

from robot_forgetting.errors import UserError
from robot_forgetting.policies import lora
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.policies.openvla.vla_model import OpenVLAModel

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),  # of biases; peft takes them for shards
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nano")
    small_nano().save(folder)
    return folder


def by_peft(saved, folder, config) -> torch.nn.Module:
    """An adapter of peft's own with random weights, saved into ``folder``; the model that it adapts."""
    torch.manual_seed(0)
    adapted = get_peft_model(OpenVLAPolicy(str(saved), device="cpu").model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                # A magnitude multiplies; biases and the matrices of LoRA add.
                parameter.add_(0.3 * torch.randn_like(parameter)) if "magnitude" not in name else parameter.mul_(1.5)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


# ---- our own, and back


def test_saved_files_have_the_mode_of_any_other_file(saved, tmp_path):
    (tmp_path / "file").write_text("")
    usual = (tmp_path / "file").stat().st_mode
    small_nano().save(tmp_path / "whole")
    OpenVLAPolicy(str(saved), lora={"rank": 2, "alpha": 4}).save(tmp_path / "adapter")
    modes = {path.name: path.stat().st_mode for path in tmp_path.glob("*/*")}
    assert {"model.safetensors", "adapter_model.safetensors"} <= modes.keys()
    assert set(modes.values()) == {usual}, modes


def moved(policy: OpenVLAPolicy) -> OpenVLAPolicy:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    return policy


def test_adapters_are_saved_in_peft_layout(saved, tmp_path):
    from peft import PeftModel

    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj", "attn.qkv"]}
    policy = moved(OpenVLAPolicy(str(saved), device="cpu", lora=lora))
    policy.save(tmp_path)
    obs, action = observations(), policy.act(observations())
    expected = policy.logits(obs, action)
    again = OpenVLAPolicy(str(saved), device="cpu", lora={"adapter": str(tmp_path)})
    assert torch.equal(again.logits(obs, action), expected)
    plain = OpenVLAPolicy(str(saved), device="cpu")
    assert not torch.allclose(plain.logits(obs, action), expected)
    PeftModel.from_pretrained(plain.model, str(tmp_path))
    torch.testing.assert_close(plain.logits(obs, action), expected)


def test_the_base_of_trained_adapters_has_them(saved, tmp_path):
    """What a run starts from is its base, and not the checkpoint below the adapters."""
    lora = {"rank": 2, "alpha": 4, "targets": ["q_proj"]}
    first = moved(OpenVLAPolicy(str(saved), device="cpu", lora=lora))
    first.save(tmp_path)
    policy = OpenVLAPolicy(str(saved), device="cpu", lora={**lora, "adapter": str(tmp_path)})
    obs, action = observations(), first.act(observations())
    expected = first.logits(obs, action)
    moved(policy)
    assert not torch.allclose(policy.logits(obs, action), expected)
    with policy.base():
        assert torch.equal(policy.logits(obs, action), expected)
    assert not torch.allclose(policy.logits(obs, action), expected)


@pytest.mark.parametrize(
    "lora, message",
    [
        ({"rank": 0}, "rank of at least 1"),
        ({"targets": ["query"]}, "no layer is called 'query'; layers: .*q_proj"),
        ({"adapter": "/nowhere"}, r"has no adapter_config\.json"),
    ],
)
def test_bad_adapters(saved, lora, message):
    with pytest.raises(UserError, match=message):
        OpenVLAPolicy(str(saved), device="cpu", lora=lora)


def test_an_adapter_of_another_model_is_refused(saved, tmp_path):
    policy = OpenVLAPolicy(str(saved), device="cpu", lora={"rank": 2})
    policy.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"does not fit this policy: missing {name}"):
        OpenVLAPolicy(str(saved), device="cpu", lora={"adapter": str(tmp_path)})


# ---- saved by peft


OPTIONS = {
    "plain": {},
    "every kind of layer": {"target_modules": ["q_proj", "down_proj", "qkv", "proj", "fc1", "fc3"]},  # patch_embed too
    "only pictures": {"target_modules": ["patch_embed.proj"]},
    "pattern": {"target_modules": r".*layers\.\d+\.self_attn\.(k|v)_proj"},
    "head": {"target_modules": ["lm_head"]},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 16}},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "dropout": {"lora_dropout": 0.5},
    "transposed": {"fan_in_fan_out": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_supported_options_are_computed_as_peft_does(saved, tmp_path, options):
    """Teacher-forced as by peft, sampled alike, in training mode too, and by a plain model with merged weights."""
    config = LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options})
    by_peft(saved, tmp_path, config)
    policy = OpenVLAPolicy(str(saved), device="cpu", lora={"adapter": str(tmp_path)})
    obs = observations()
    action = policy.act(obs, noise=torch.rand(4, 7))
    with torch.no_grad():
        expected = by_peft_logits(saved, tmp_path, policy, obs, action)
        torch.testing.assert_close(policy.logits(obs, action), expected)
        torch.testing.assert_close(policy.log_prob(obs, action), action.log_prob, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(policy.train().logits(obs, action), expected)
        plain = OpenVLAPolicy(str(saved), device="cpu")
        before = plain.logits(obs, action)
        plain.model.load_state_dict(dict(lora.merged(policy.model)))
        torch.testing.assert_close(plain.logits(obs, action), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-3)


def by_peft_logits(saved, folder, policy, obs, action) -> torch.Tensor:
    """Through peft's own loading and transformers' forward pass, over the whole vocabulary."""
    from peft import PeftModel

    model: OpenVLAModel = OpenVLAPolicy(str(saved), device="cpu").model
    PeftModel.from_pretrained(model, str(folder)).eval()
    ids, mask, pixels = policy._inputs(obs)
    bins, first = action.tokens, model.config.first_action_id
    ids = torch.cat([ids, model.bins_to_ids(bins[:, :-1])], 1)
    if mask is not None:
        mask = torch.nn.functional.pad(mask, (0, bins.shape[1] - 1), value=True)
    logits = model(ids, mask, pixels)[:, -bins.shape[1] :]
    return logits[..., first : first + model.config.action_bins].flip(-1)


@pytest.mark.parametrize("dtype", ["mixed", "bfloat16"])
def test_adapters_of_every_layer_in_half_precision(saved, tmp_path, dtype):
    by_peft(saved, tmp_path, LoraConfig(r=2, **OPTIONS["every kind of layer"]))
    policy = OpenVLAPolicy(str(saved), device="cpu", dtype=dtype, lora={"adapter": str(tmp_path)})
    obs = observations()
    action = policy.act(obs, noise=torch.rand(4, 7))
    torch.testing.assert_close(policy.log_prob(obs, action), action.log_prob, atol=0.02, rtol=0.02)
    policy.log_prob(obs, action).sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in policy.trainable_parameters())


REFUSED = {
    "dora": (LoraConfig(use_dora=True, target_modules=["q_proj"]), "use_dora=true is not supported"),
    "bias of its own": (LoraConfig(lora_bias=True, target_modules=["fc1"]), "lora_bias=true is not supported"),
    "trained biases": (LoraConfig(bias="all", target_modules=["fc1"]), 'bias="all" is not supported'),
    "whole modules": (
        LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        r'modules_to_save=\["lm_head"\] is not supported',
    ),
    "pissa": (LoraConfig(init_lora_weights="pissa", target_modules=["q_proj"]), 'init_lora_weights="pissa" is not'),
    "embedding": (LoraConfig(target_modules=["embed_tokens"]), r"an adapter on '.*embed_tokens' is not supported"),
    "ia3": (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "adapters of type IA3 are not supported"),
    "loha": (LoHaConfig(target_modules=["q_proj"]), "adapters of type LOHA are not supported"),
}


@pytest.mark.parametrize("config, message", REFUSED.values(), ids=REFUSED)
def test_the_rest_is_refused_by_name(saved, tmp_path, config, message):
    by_peft(saved, tmp_path, config)
    with pytest.raises(UserError, match=f"{message}.*merge_and_unload"):
        OpenVLAPolicy(str(saved), device="cpu", lora={"adapter": str(tmp_path)})


@pytest.mark.parametrize(
    "name, value",
    [("layer_replication", [[0, 2]]), ("trainable_token_indices", [1]), ("target_parameters", ["a"]),
     ("use_qalora", True), ("alora_invocation_tokens", [5]), ("an_option_of_tomorrow", 1)],
)  # fmt: skip
def test_options_that_change_more_than_matrices_are_refused(saved, tmp_path, name, value):
    by_peft(saved, tmp_path, LoraConfig(target_modules=["q_proj"]))
    said = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**said, name: value}))
    with pytest.raises(UserError, match=f"{name}=.* is not supported"):
        OpenVLAPolicy(str(saved), device="cpu", lora={"adapter": str(tmp_path)})


def test_adapters_of_layers_that_are_never_computed_stand_still(saved, tmp_path):
    """peft's names reach the towers' last blocks too, which OpenVLA has and does not use."""
    by_peft(saved, tmp_path, LoraConfig(r=2, target_modules=["fc1"]))
    policy = OpenVLAPolicy(str(saved), device="cpu", lora={"adapter": str(tmp_path)})
    obs = observations()
    policy.log_prob(obs, policy.act(obs)).sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trainable_parameters())
    policy.save(tmp_path / "again")
    assert OpenVLAPolicy(str(saved), device="cpu", lora={"adapter": str(tmp_path / "again")})
