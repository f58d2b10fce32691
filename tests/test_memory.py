"""How many rows fit: estimates against what a forward pass at OpenVLA-7B's size keeps, and what follows from them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from live_bytes import LiveBytes, without_numbers
from test_openvla_policy import observations, small_nano
from torch._subclasses import FakeTensorMode
from toy import ToyPolicy
from toy_runs import run

from robot_forgetting.errors import UserError
from robot_forgetting.policies import lora, memory, own_base
from robot_forgetting.policies.memory import rows_that_fit
from robot_forgetting.policies.openvla.row_memory import PROMPT_TOKENS, acting_row_bytes, training_row_bytes
from robot_forgetting.policies.openvla.vla import OpenVLAPolicy
from robot_forgetting.policies.openvla.vla_model import OpenVLAConfig, OpenVLAModel

FULL = OpenVLAConfig()
SHALLOW = replace(FULL, num_layers=2, dino=replace(FULL.dino, depth=3), siglip=replace(FULL.siglip, depth=3))
GB = 10**9


def model(config: OpenVLAConfig, weights: torch.dtype, products: torch.dtype | None, adapters: bool, recompute: bool):
    with torch.device("meta"):
        made = OpenVLAModel(config).to(weights)
    made.products, made.gradient_checkpointing = products, recompute
    if adapters:
        lora.add(made, rank=32)
        lora.without_casts(made)
    return made


def measured(model: OpenVLAModel, rows: int, act: bool = False) -> tuple[int, int]:
    """Bytes that are held after a forward pass, and at most during it and the backward pass."""
    ids, bins = torch.ones(rows, PROMPT_TOKENS, dtype=torch.int64), torch.zeros(rows, 7, dtype=torch.int64)
    pixels = torch.empty(rows, 6, 224, 224, dtype=model.projector.fc1.weight.dtype)
    products = nullcontext() if model.products is None else torch.autocast("cpu", model.products)
    with LiveBytes(model) as live, products:
        if act:
            held = model.generate_actions(ids, None, pixels)
        else:
            held = model.action_logits(ids, None, pixels, bins)
        kept = live.now
        if not act:
            held.logsumexp(-1).sum().backward()
    return kept, live.peak


CASES = {
    "lora": (torch.bfloat16, torch.bfloat16, True),
    "mixed": (torch.float32, torch.bfloat16, False),
    "float32": (torch.float32, None, False),
}


@pytest.mark.parametrize("recompute", [False, True], ids=["all kept", "checkpointed"])
@pytest.mark.parametrize("case", CASES)
def test_activations_of_a_row(case, recompute):
    weights, products, adapters = CASES[case]
    made = model(SHALLOW, weights, products, adapters, recompute)
    with FakeTensorMode():
        one, two = (measured(without_numbers(made), rows)[0] for rows in (1, 2))
    kept, _ = training_row_bytes(SHALLOW, weights, products or weights, trained=not adapters, recompute=recompute)
    assert 1 <= kept / (two - one) < 1.2


def test_a_row_of_openvla_7b():
    """Checkpointed, vision and all: 0.2 GB at the peak, where 0.8 were kept before."""
    made = model(FULL, *CASES["lora"], True)
    trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert sum(parameter.numel() for parameter in trained) == 107_862_016
    assert {parameter.dtype for parameter in made.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    with FakeTensorMode():
        peak = measured(without_numbers(made), 64)[1]
    kept, once = training_row_bytes(FULL, torch.bfloat16, torch.bfloat16, trained=False, recompute=True)
    assert 1 <= (kept + once) * 64 / peak < 1.25
    assert kept + once < 0.25 * GB


def test_the_cache_of_a_row():
    made = model(SHALLOW, *CASES["lora"], False)
    with FakeTensorMode():
        peak = measured(without_numbers(made), 64, act=True)[1]
    assert 1 <= acting_row_bytes(SHALLOW, torch.bfloat16) * 64 / peak < 1.5
    assert 0.15 * GB < acting_row_bytes(FULL, torch.bfloat16) < 0.25 * GB


@pytest.mark.parametrize(
    "free, reserved, rows",
    [(1000 * GB, 0, 256), (100 * GB, 0, 64), (100 * GB, 60 * GB, 32), (79 * GB, 0, 32), (1 * GB, 0, 1), (1, 2, 1)],
)
def test_rows_that_fit(monkeypatch, free, reserved, rows):
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    assert rows_that_fit(GB, 256, torch.device("cpu"), reserved) == rows


@pytest.mark.parametrize("name", ["openvla-nano", "openvla-nano-bridge", "openvla-nano-google"])
def test_small_policies_are_computed_as_ever_on_any_machine(monkeypatch, name):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**8)
    policy = OpenVLAPolicy(name, device="cpu")
    assert policy.rows_at_once() == policy.rows_at_once(gradients=1) == policy.rows_at_once(gradients=2) == 256


@torch.no_grad()
def test_large_batches_are_computed_in_parts_where_memory_is_short(monkeypatch):
    policy = small_nano()
    obs, noise = observations(5), torch.rand(5, 7)
    whole = policy.act(obs, noise=noise)
    logits = policy.logits(obs, whole)
    seen = []
    read = policy._pictures.__call__
    monkeypatch.setattr(policy, "_pictures", lambda images, *rest: seen.append(len(images)) or read(images, *rest))
    monkeypatch.setattr(memory, "SMALL_BYTES", 0)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * acting_row_bytes(policy.config, torch.float32))
    parts = policy.act(obs, noise=noise)
    assert torch.equal(parts.tokens, whole.tokens) and policy.act(obs, temperature=0.0).tokens.shape == (5, 7)
    torch.testing.assert_close(policy.logits(obs, whole), logits)
    assert seen == [2, 2, 1] * 3


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {},
            r"'openvla-nano' needs .* besides its weights \(gradients .*, Adam's moments .*\), and cpu has",
        ),
        ({"keep_base": False}, "Adam's moments .*, a copy of the base"),
        ({"dtype": "mixed"}, "products' copies"),
        ({"lora": {"rank": 2}}, "use a smaller policy.lora.rank"),
    ],
)
def test_training_that_cannot_fit_is_refused(monkeypatch, options, message):
    policy = small_nano(**options)
    policy.check_training() if options.get("keep_base", True) else policy.check_training(compared=False)
    monkeypatch.setattr(own_base, "free_bytes", lambda device: 10**4)
    with pytest.raises(UserError, match=message):
        policy.check_training()


def test_no_copy_of_the_base(monkeypatch):
    policy = small_nano(keep_base=False)
    policy.check_training(compared=False)
    with pytest.raises(UserError, match="keeps no copy of its base weights"):
        policy.check_training()
    monkeypatch.setattr(own_base, "free_bytes", lambda device: 10**4)
    with pytest.raises(UserError, match="keeping the base of policy 'openvla-nano' needs .*a copy of the weights"):
        small_nano(keep_base=True)


def test_what_cannot_be_trained_is_refused_before_anything_is_measured(tmp_path):
    class Untrainable(ToyPolicy):
        def check_training(self, *, compared=True):
            raise UserError("too large")

    with pytest.raises(UserError, match="too large"):
        run(tmp_path / "run", policy=Untrainable(seed=1))
    assert not (tmp_path / "run").exists()
