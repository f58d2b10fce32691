"""In which dtypes policies train: weights, gradients and moments in float32, products in bfloat16 where asked."""

from __future__ import annotations

from pathlib import Path

import hydra
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from test_openvla_policy import observations, small_nano
from tiny_lm import tiny_lm

from robot_forgetting import configs
from robot_forgetting.errors import UserError
from robot_forgetting.method import Optimiser
from robot_forgetting.methods.sft import SFT
from robot_forgetting.policies.openvla import vla_checkpoint as openvla_checkpoint
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.policies.openvla.vla_checkpoint import Checkpoint
from robot_forgetting.records.checkpoints import load_checkpoint, save_checkpoint
from robot_forgetting.records.run_folder import RunFolder

CONFIGS = str(Path(configs.__file__).parent)
# Those whose weights are here; the others are the same classes with larger ones.
POLICIES = ["openvla", "openvla-nano", "openvla-nano-bridge", "openvla-nano-google", "openvla-nano-new",
            "openvla-nano-bridge-new", "openvla-nano-google-new", "qwen-nano", "qwen-nano-new"]  # fmt: skip
LORA = {"rank": 2, "alpha": 4}


def built(name: str, **options):
    with hydra.initialize_config_dir(CONFIGS, version_base="1.3"):
        config = hydra.compose("config", overrides=[f"policy={name}", "device=cpu"])
        return instantiate(config.policy, **options, _convert_="all")


def decisions(policy, count: int = 2) -> dict:
    if hasattr(policy, "prompts"):
        return {"messages": [[{"role": "user", "content": "say one"}], [{"role": "user", "content": "two"}]] * count}
    size = policy.config.image_size
    images = np.random.default_rng(0).integers(0, 256, (2 * count, size, size, 3), dtype=np.uint8)
    return {"image": images, "instruction": ["pick up the red cube", "push the blue cube onto the target"] * count}


@pytest.mark.parametrize("dtype, lora", [("float32", None), ("float32", LORA), ("mixed", None), ("bfloat16", LORA)])
@pytest.mark.parametrize("name", POLICIES)
def test_what_is_trained_is_float32(name, dtype, lora):
    policy = built(name, dtype=dtype, lora=lora)
    policy.check_training()
    obs = decisions(policy)
    weights = policy.trainable_parameters()
    adam = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    policy.train()
    policy.log_prob(obs, policy.act(obs)).sum().backward()
    adam.step()
    moved = [parameter for parameter in weights if parameter.grad is not None]
    assert len(moved) > 0.9 * len(weights)
    assert {tensor.dtype for p in moved for tensor in (p, p.grad, *adam.state[p].values())} == {torch.float32}
    frozen = {parameter.dtype for parameter in policy.parameters() if not parameter.requires_grad}
    assert frozen <= {torch.bfloat16 if dtype == "bfloat16" else torch.float32}


@pytest.mark.parametrize("name", ["openvla-nano", "qwen-nano"])
def test_full_fine_tuning_in_half_precision_is_refused(name):
    with pytest.raises(UserError, match=r"held in bfloat16; use 'policy\.lora=.*', or policy\.dtype=mixed"):
        built(name, dtype="bfloat16", lora=None).check_training()


def test_fine_tuning_in_float16_is_refused():
    with pytest.raises(UserError, match=r"lose small gradients in float16; use policy\.dtype=bfloat16"):
        nano("float16", lora=LORA).check_training()


def nano(dtype: str, **options) -> OpenVLAPolicy:
    return OpenVLAPolicy(small_checkpoint(), dtype=dtype, device="cpu", **options)


def small_checkpoint() -> Checkpoint:
    policy = small_nano()
    with torch.no_grad():  # logits as sharp as after training
        policy.model.language_model.lm_head.weight.mul_(20)
    return Checkpoint(policy.model, policy.tokenizer)


def test_small_updates_are_not_lost():
    policy = nano("bfloat16", lora={"rank": 4, "alpha": 8, "targets": ["q_proj"]})
    before = [parameter.detach().clone() for parameter in policy.trainable_parameters()]
    adam = torch.optim.AdamW(policy.trainable_parameters(), lr=2e-5)
    obs, action = observations(), policy.act(observations())
    for _ in range(20):
        adam.zero_grad()
        policy.log_prob(obs, action).sum().backward()
        adam.step()
    still = [(a == b).float().mean().item() for a, b in zip(before, policy.trainable_parameters(), strict=True)]
    assert max(still) < 0.01


def moved(policy):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy


@pytest.mark.parametrize("lora", [None, {"rank": 16, "alpha": 16}], ids=["full", "lora"])
@pytest.mark.parametrize("dtype, typical", [("float32", 1e-5), ("mixed", 3e-3), ("bfloat16", 3e-3)])
def test_forced_log_probabilities_are_those_of_sampling(dtype, typical, lora):
    """The trained nano, and adapters that have moved: a decision's ratio pi / pi_sampled is 1 before the first step.

    Typical differences, in nats a decision: 4e-6 in float32, up to 1.3e-3 in bfloat16 (6e-2 where logits are rounded).
    """
    policy = built("openvla-nano", dtype=dtype, lora=lora)
    policy = moved(policy) if lora else policy
    obs = decisions(policy, 16)
    noise = torch.rand(32, 16, generator=torch.Generator().manual_seed(0))
    action = policy.act(obs, noise=noise)
    with torch.no_grad():
        difference = policy.log_prob(obs, action) - action.log_prob
    assert difference.dtype == torch.float32
    assert difference.sum(1).square().mean().sqrt() < typical
    assert difference.abs().max() < 20 * typical


def test_adapters_load_back_in_float32_and_old_ones_do_too(tmp_path):
    first = moved(nano("bfloat16", lora={**LORA, "targets": ["q_proj"]}))
    first.save(tmp_path / "new")
    again = nano("bfloat16", lora={"adapter": str(tmp_path / "new")})
    for one, other in zip(first.trainable_parameters(), again.trainable_parameters(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(one, other)
    for parameter in first.trainable_parameters():  # as adapters were held before
        parameter.data = parameter.data.bfloat16()
    first.save(tmp_path / "old")
    old = nano("bfloat16", lora={"adapter": str(tmp_path / "old")})
    for one, other in zip(first.trainable_parameters(), old.trainable_parameters(), strict=True):
        assert other.dtype == torch.float32 and torch.equal(one.float(), other)


def test_mixed_is_saved_in_float32(tmp_path):
    policy = nano("mixed")
    policy.save(tmp_path)
    loaded = openvla_checkpoint.load(tmp_path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in policy.model.state_dict().items())


def test_rows_per_pass_are_chosen_where_none_are_given():
    assert Optimiser(learning_rate=1.0).micro_batch is None
    assert tiny_lm().rows_at_once(gradients=1) == 256


def test_a_checkpoint_in_bfloat16_is_continued_in_float32(tmp_path):
    """As checkpoints of adapters were before."""
    policy = nano("bfloat16", lora={**LORA, "targets": ["q_proj"]})
    weights, method = (
        policy.trainable_parameters(),
        SFT(iterations=1, steps_per_iteration=1, batch_size=1, demonstrations=1, optimiser=None),
    )
    adam = torch.optim.AdamW(weights, lr=1e-3, fused=True)
    obs = observations()

    def step() -> None:
        policy.log_prob(obs, policy.act(obs)).sum().backward()
        adam.step()

    step()
    with RunFolder.create(tmp_path, config={}, run={}) as folder:
        save_checkpoint(folder.checkpoints, policy, adam, method, iteration=1, step=1)
        for file in folder.checkpoints.glob("*/[po]*.safetensors"):
            tensors = load_file(file).items()
            save_file({name: t if name.endswith(".step") else t.bfloat16() for name, t in tensors}, file)
        (state,) = folder.checkpoints.glob("*/state.json")
        state.write_text('{"iteration": 1, "step": 1}')  # of which those knew no layout
        load_checkpoint(folder.checkpoints, policy, adam, method)
    step()
    assert {tensor.dtype for p in weights for tensor in (p, *adam.state[p].values())} == {torch.float32}
