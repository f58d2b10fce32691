"""Changes of weights and activations against numpy and by hand; cosine of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robot_forgetting.errors import UserError
from robot_forgetting.metrics import drift
from robot_forgetting.metrics.dynamics import cosine


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    base = {
        "a.weight": torch.randn(6, 9, generator=generator),
        "a.bias": torch.randn(6, generator=generator),
        "b.weight": torch.randn(4, 2, 3, generator=generator),
        "scale": torch.randn((), generator=generator),
    }
    return base, {name: w + 0.1 * torch.randn(w.shape, generator=generator) for name, w in base.items()}


def test_norms_against_numpy(weights):
    base, fine_tuned = weights
    fisher = {name: torch.rand_like(w) for name, w in base.items()}
    f = np.concatenate([w.numpy().ravel() for w in fisher.values()])
    d = np.concatenate([(fine_tuned[name] - w).numpy().ravel().astype(float) for name, w in base.items()])
    assert drift.weight_l1(base, fine_tuned).item() == pytest.approx(np.abs(d).sum(), rel=1e-6)
    assert drift.weight_l2(base, fine_tuned).item() == pytest.approx(np.linalg.norm(d), rel=1e-6)
    expected = math.sqrt((f * d**2).sum())
    assert drift.weight_fisher_l2(base, fine_tuned, fisher).item() == pytest.approx(expected, rel=1e-6)
    assert drift.sparsity(base, fine_tuned, tolerance=0.05).item() == pytest.approx((np.abs(d) <= 0.05).mean())
    for name, norm in drift.spectral_norms(base, fine_tuned).items():
        matrix = (fine_tuned[name] - base[name]).numpy().reshape(len(base[name]), -1)
        assert norm.item() == pytest.approx(np.linalg.norm(matrix, 2), rel=1e-5)


def test_spectral_norm_of_a_wide_and_a_tall_matrix_by_hand():
    base = {"wide": torch.zeros(2, 3), "tall": torch.zeros(3, 1), "bias": torch.zeros(4)}
    after = {
        "wide": torch.tensor([[3.0, 0, 0], [0, 4, 0]]),
        "tall": torch.tensor([[1.0], [2], [2]]),
        "bias": torch.full((4,), 100.0),
    }
    norms = drift.spectral_norms(base, after)
    assert {name: round(v.item(), 5) for name, v in norms.items()} == {"wide": 4.0, "tall": 3.0}


def test_ranks():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(8, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    base = {"w": torch.zeros(8, 20), "v": torch.zeros(5, 4)}
    values = drift.singular_values("w", low)
    assert values.numpy() == pytest.approx(np.linalg.svd(low.double().numpy(), compute_uv=False), abs=1e-6)
    assert drift.numerical_rank(values, 1e-5).item() == np.linalg.matrix_rank(low.numpy()) == 3
    assert drift.effective_rank(torch.ones(4)).item() == pytest.approx(4)  # four equal values
    found = drift.ranks(base, {"w": low, "v": torch.eye(5)[:, :4]})
    assert found["weight_rank"].item() == pytest.approx((3 / 8 + 1) / 2)
    assert 1 / 8 < 2 * found["weight_effective_rank"].item() - 1 < 3 / 8
    assert [value.item() for value in drift.ranks(base, base).values()] == [0, 0]
    share = values / values.sum()
    entropy = -(share[:3] * share[:3].log()).sum()
    assert drift.effective_rank(values).item() == pytest.approx(entropy.exp().item(), rel=1e-5)


def test_sparsity_in_bfloat16():
    # Near 1 bf16 steps are 2^-7 upwards, 2^-8 downwards: +0.003 is lost, +0.006 is a step.
    base = {"w": torch.ones(4)}
    after = {"w": torch.tensor([1.003, 1.006, 1.0, 1 + 5e-6])}
    assert drift.sparsity(base, after).item() == 0.5
    assert drift.sparsity(base, after, tolerance=0).item() == 0.25
    assert drift.sparsity(base, after, dtype=torch.bfloat16).item() == 0.75


def test_bfloat16_weights_are_compared_in_float32():
    base, after = ({"w": torch.full((1000,), v, dtype=torch.bfloat16)} for v in (1.0, 1.0078125))
    assert drift.weight_l1(base, after).item() == 7.8125


def test_activations_by_hand():
    base = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    after = torch.stack([torch.tensor([[3.0, -4.0], [1.0, 2.0]]), base])
    assert drift.activation_l1(base, after).tolist() == [4.0, 0.0]
    assert drift.activation_l2(base, after).tolist() == [3.0, 0.0]


def test_half_the_squared_fisher_distance_estimates_the_kl():
    w = {"b": torch.randn(5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    after = {"b": w["b"] + torch.tensor([1e-3, 0, 0, 0, 0]).double()}  # along one axis the diagonal is all there is
    p, q = (torch.log_softmax(side["b"], -1) for side in (w, after))
    fisher = {"b": p.exp() * (1 - p.exp())}
    kl = (p.exp() * (p - q)).sum().item()
    assert drift.weight_fisher_l2(w, after, fisher).item() ** 2 / 2 == pytest.approx(kl, rel=1e-2)


@pytest.mark.parametrize(
    ("base", "after", "message"),
    [
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "differ in names"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "after training"),
        ({"a": torch.zeros(3, 2)}, {"a": torch.zeros(2)}, "after training"),
    ],
)
def test_weights_that_do_not_belong_together(base, after, message):
    with pytest.raises(UserError, match=message):
        drift.weight_l2(base, after)


def test_a_foreign_fisher(weights):
    base, fine_tuned = weights
    with pytest.raises(UserError, match="the Fisher"):
        drift.weight_fisher_l2(base, fine_tuned, {"a.weight": base["a.weight"]})


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_no_spectrum_of_a_diverged_run(weights, value):
    """1e25 is finite, but its square is not in float32; ranks square in float64, where it is."""
    base, fine_tuned = weights
    broken = {**fine_tuned, "a.weight": fine_tuned["a.weight"].clone().fill_(value)}
    for measure in (drift.spectral_norms, *([] if value == 1e25 else [drift.ranks])):
        with pytest.raises(UserError, match="a.weight has no singular values: it is not finite, or too large"):
            measure(base, broken)


def test_cosine():
    gradient = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}
    for scale, expected in ((2.0, 1), (-1.0, -1), (0.0, 0)):
        update = {name: scale * value for name, value in gradient.items()}
        assert cosine(update, gradient).item() == pytest.approx(expected)
    assert cosine({"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([1.0, 0.0])}).item() == pytest.approx(0.5**0.5)
    with pytest.raises(UserError, match="differ in names"):
        cosine(update, {"a": gradient["a"]})
    with pytest.raises(UserError, match="in the update"):
        cosine({"a": torch.zeros(3)}, {"a": torch.zeros(2)})
