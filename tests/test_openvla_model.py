"""OpenVLA's network: against recorded tensors, against transformers' own Llama, and against itself one by one."""

from __future__ import annotations

import json

import pytest
import torch
from scipy import stats

from robot_forgetting.errors import UserError
from robot_forgetting.policies.openvla import vla_model as openvla_model
from robot_forgetting.policies.openvla.fused_decode import sample_bins
from robot_forgetting.policies.openvla.golden import check_golden
from robot_forgetting.policies.openvla.vision import dinov2_tower, siglip_tower
from robot_forgetting.policies.openvla.vla_checkpoint import read_config
from robot_forgetting.policies.openvla.vla_model import OpenVLAConfig, OpenVLAModel

PAD = 300 + 256


def small_config(**changes) -> OpenVLAConfig:
    fields = dict(
        dino=dinov2_tower(24, 3, 2, 8, 16, 96, layer_scale=0.5),
        siglip=siglip_tower(16, 2, 2, 8, 16, 40),
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=48,
        vocab_size=PAD + 64,
        pad_token_id=PAD,
    )
    return OpenVLAConfig(**(fields | changes))


@pytest.fixture(scope="module")
def model() -> OpenVLAModel:
    torch.manual_seed(0)
    model = OpenVLAModel(small_config())
    model.initialise()
    with torch.no_grad():  # trained norms are not ones, logits not flat
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
        model.language_model.lm_head.weight.mul_(20)
    return model.eval()


def prompts(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(2, 300, (len(lengths), longest), generator=generator)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = PAD
        ids[row, longest - length] = 1
        mask[row, longest - length :] = True
    return ids, mask if min(lengths) < longest else None


def pixels(count: int) -> torch.Tensor:
    return torch.randn(count, 6, 16, 16, generator=torch.Generator().manual_seed(2))


def transformers_log_prob(model, ids, pixel_values, bins):
    """Log-probabilities of one row's bins by transformers' Llama on the unpadded sequence, full vocabulary then cut."""
    sequence = torch.cat([ids, model.bins_to_ids(bins)])[None]
    first = model.config.first_action_id
    logits = model(sequence, None, pixel_values[None])[0, -len(bins) - 1 : -1, first : first + 256].flip(-1)
    return logits.log_softmax(-1).gather(-1, bins[:, None])[:, 0]


def test_golden_tensors(shared):
    rows = check_golden(shared / "golden" / "openvla")
    assert len(rows) == 17
    assert [row for row in rows if not row.ok] == []


def test_golden_folder_without_files(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        check_golden(tmp_path)


def test_published_configuration_gives_the_published_tensors(shared, tmp_path):
    names = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    config = {
        "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp", "hf_llm_id": "meta-llama/Llama-2-7b-hf",
        "image_resize_strategy": "resize-naive", "image_sizes": [224, 224], "llm_backbone_id": "llama2-7b-pure",
        "n_action_bins": 256, "pad_to_multiple_of": 64, "pad_token_id": 32000, "timm_model_ids": names,
        "timm_override_act_layers": [None, None], "use_fused_vision_backbone": True,
        "vision_backbone_id": "dinosiglip-vit-so-224px", "norm_stats": {"a": {"action": {"q01": [0], "q99": [1]}}},
        "text_config": {"model_type": "llama", "pad_token_id": 32000, "torch_dtype": "bfloat16", "vocab_size": 32064},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    pictures = {"means": [[0.484375, 0.455078125, 0.40625], [0.5] * 3], "stds": [[0.228515625] * 3, [0.5] * 3]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(pictures))
    config = read_config(tmp_path)
    with torch.device("meta"):
        ours = {name: list(tensor.shape) for name, tensor in OpenVLAModel(config).state_dict().items()}
    assert ours == json.loads((shared / "golden" / "openvla" / "openvla_7b_state_dict.json").read_text())
    assert config.first_action_id == 31744 and config.means[0][0] == 0.484375


@pytest.mark.parametrize("widest_fused", [0, 512], ids=["plain", "fused"])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 2, 5]], ids=["equal", "left-padded"])
@torch.no_grad()
def test_decoding_equals_transformers_row_by_row(model, monkeypatch, widest_fused, lengths):
    monkeypatch.setattr(openvla_model, "WIDEST_FUSED", widest_fused)
    ids, mask = prompts(lengths)
    noise = torch.rand(3, 7, generator=torch.Generator().manual_seed(3))
    bins, log_prob = model.generate_actions(ids, mask, pixels(3), temperature=1.0, noise=noise)
    for row, length in enumerate(lengths):
        prompt, picture = ids[row, -length:], pixels(3)[row]
        reference = transformers_log_prob(model, prompt, picture, bins[row])
        torch.testing.assert_close(log_prob[row], reference, atol=2e-5, rtol=1e-5)
        alone, _ = model.generate_actions(
            prompt[None], None, picture[None], temperature=1.0, noise=noise[row : row + 1]
        )
        assert torch.equal(alone[0], bins[row])
    forced = model.action_logits(ids, mask, pixels(3), bins).log_softmax(-1).gather(-1, bins[..., None])[..., 0]
    torch.testing.assert_close(forced, log_prob, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_greedy_is_the_argmax_of_teacher_forced_logits(model):
    ids, mask = prompts([4, 6])
    bins, log_prob = model.generate_actions(ids, mask, pixels(2), temperature=0.0)
    logits = model.action_logits(ids, mask, pixels(2), bins)
    assert torch.equal(logits.argmax(-1), bins)
    torch.testing.assert_close(log_prob, logits.log_softmax(-1).amax(-1), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_padded_forward_equals_unpadded(model):
    ids, mask = prompts([6, 3])
    padded = model(ids, mask, pixels(2))[1, -1]
    alone = model(ids[1:, 3:], None, pixels(2)[1:])[0, -1]
    torch.testing.assert_close(padded, alone, atol=2e-5, rtol=1e-5)


def test_gradients_reach_every_used_parameter_and_checkpointing_keeps_them(model):
    ids, _ = prompts([5, 5])
    bins = torch.arange(14).view(2, 7) * 15
    unused = {id(parameter) for parameter in model.unused_parameters()}
    gradients = []
    for checkpointing in (False, True):
        model.gradient_checkpointing = checkpointing
        model.zero_grad(set_to_none=True)
        model.action_logits(ids, None, pixels(2), bins).logsumexp(-1).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if id(p) not in unused})
        assert all(p.grad is None for p in model.parameters() if id(p) in unused)
    model.gradient_checkpointing = False
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_bins_and_ids_mirror_each_other():
    with torch.device("meta"):
        model = OpenVLAModel(small_config(vocab_size=32064))
    ids = torch.tensor([31743, 31744, 31872, 31999, 32000, 100])
    assert model.ids_to_bins(ids).tolist() == [255, 255, 127, 0, 0, 255]
    assert model.bins_to_ids(torch.tensor([0, 127, 255])).tolist() == [31999, 31872, 31744]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_inverse_cdf_draws_the_distribution(temperature):
    logits = torch.tensor([1.0, 0.0, -1.0, -30.0, 0.5])
    noise = torch.rand(20_000, generator=torch.Generator().manual_seed(4))
    drawn, log_prob = sample_bins(logits.expand(20_000, -1), temperature, noise)
    expected = torch.softmax(logits / temperature, 0)
    counts = torch.bincount(drawn, minlength=5)
    assert counts[3] == 0  # e^-15 and less
    share = expected[[0, 1, 2, 4]].double()
    assert stats.chisquare(counts[[0, 1, 2, 4]].numpy(), (share / share.sum() * 20_000).numpy()).pvalue > 0.01
    torch.testing.assert_close(log_prob, expected.log()[drawn])


@pytest.mark.parametrize("noise, index", [(0.0, 1), (0.4999, 1), (0.5, 2), (1 - 2**-24, 2)])
def test_inverse_cdf_at_the_edges(noise, index):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    assert sample_bins(logits, 1.0, torch.tensor([noise]))[0].item() == index
