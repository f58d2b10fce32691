"""Changes of weights and activations against numpy, by hand and with run dimensions; cosine of a step."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from robot_forgetting.errors import UserError
from robot_forgetting.metrics import drift
from robot_forgetting.metrics.dynamics import cosine

RUNS = 3


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    base = {
        "a.weight": torch.randn(6, 9, generator=generator),
        "a.bias": torch.randn(6, generator=generator),
        "b.weight": torch.randn(4, 2, 3, generator=generator),
        "scale": torch.randn((), generator=generator),
    }
    fine_tuned = {name: w + 0.1 * torch.randn(RUNS, *w.shape, generator=generator) for name, w in base.items()}
    return base, fine_tuned


def vector(base, fine_tuned, run):
    return np.concatenate([(fine_tuned[name][run] - w).numpy().ravel().astype(float) for name, w in base.items()])


def matrices(base, fine_tuned, run):
    return [(fine_tuned[n][run] - base[n]).numpy().reshape(base[n].shape[0], -1) for n in ("a.weight", "b.weight")]


def test_norms_against_numpy(weights):
    base, fine_tuned = weights
    fisher = {name: torch.rand_like(w) for name, w in base.items()}
    f = np.concatenate([w.numpy().ravel() for w in fisher.values()])
    found = drift.weight_change(base, fine_tuned, fisher=fisher, tolerance=0.05)
    for run in range(RUNS):
        d = vector(base, fine_tuned, run)
        assert found["weight_l1"][run].item() == pytest.approx(np.abs(d).sum(), rel=1e-6)
        assert found["weight_l2"][run].item() == pytest.approx(np.linalg.norm(d), rel=1e-6)
        assert found["weight_fisher_l2"][run].item() == pytest.approx(math.sqrt((f * d**2).sum()), rel=1e-6)
        assert found["weight_sparsity"][run].item() == pytest.approx((np.abs(d) <= 0.05).mean())
        spectral = max(np.linalg.norm(m, 2) for m in matrices(base, fine_tuned, run))
        assert found["weight_spectral"][run].item() == pytest.approx(spectral, rel=1e-5)


def test_one_pass_equals_the_functions_and_one_run_equals_its_row(weights):
    base, fine_tuned = weights
    fisher = {name: torch.rand_like(w) for name, w in base.items()}
    found = drift.weight_change(base, fine_tuned, fisher=fisher)
    single = {name: w[1] for name, w in fine_tuned.items()}
    alone = drift.weight_change(base, single, fisher=fisher)
    assert torch.equal(found["weight_l1"], drift.weight_l1(base, fine_tuned))
    assert torch.equal(found["weight_l2"], drift.weight_l2(base, fine_tuned))
    assert torch.equal(found["weight_fisher_l2"], drift.weight_fisher_l2(base, fine_tuned, fisher))
    assert torch.equal(found["weight_spectral"], drift.spectral_norm(base, fine_tuned))
    assert torch.equal(found["weight_sparsity"], drift.sparsity(base, fine_tuned))
    for name, value in alone.items():
        assert value.shape == () and value.dtype == torch.float64
        assert value.item() == pytest.approx(found[name][1].item(), rel=1e-6)


def test_each_run_with_its_own_base(weights):
    base, fine_tuned = weights
    bases = {name: torch.stack([w + run for run in range(RUNS)]) for name, w in base.items()}
    moved = {name: w + torch.arange(RUNS).view(-1, *[1] * (w.ndim - 1)) for name, w in fine_tuned.items()}
    fisher = {name: torch.ones_like(w) for name, w in bases.items()}
    found = drift.weight_change(bases, moved, fisher=fisher, tolerance=0.05, run_dims=1)
    expected = drift.weight_change(base, fine_tuned, tolerance=0.05)
    for name, values in expected.items():
        assert found[name].numpy() == pytest.approx(values.numpy(), rel=1e-4)
    assert torch.allclose(found["weight_fisher_l2"], found["weight_l2"])
    assert drift.ranks(bases, moved, run_dims=1)["weight_rank"].tolist() == [1.0] * RUNS


def test_spectral_norm_of_a_wide_and_a_tall_matrix_by_hand():
    base = {"wide": torch.zeros(2, 3), "tall": torch.zeros(3, 1), "bias": torch.zeros(4)}
    after = {
        "wide": torch.tensor([[3.0, 0, 0], [0, 4, 0]]),
        "tall": torch.tensor([[1.0], [2], [2]]),
        "bias": torch.full((4,), 100.0),
    }
    norms = drift.spectral_norms(base, after)
    assert {name: round(v.item(), 5) for name, v in norms.items()} == {"wide": 4.0, "tall": 3.0}
    for aggregate, expected in (("max", 4), ("mean", 3.5), ("sum", 7)):
        assert drift.spectral_norm(base, after, aggregate=aggregate).item() == pytest.approx(expected)


def test_ranks():
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(8, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    base = {"w": torch.zeros(8, 20), "v": torch.zeros(5, 4)}
    after = {"w": torch.stack([low, low * 0]), "v": torch.stack([torch.eye(5)[:, :4], torch.zeros(5, 4)])}
    values = drift.singular_values(base, after)
    assert values["w"][0].numpy() == pytest.approx(np.linalg.svd(low.double().numpy(), compute_uv=False), abs=1e-6)
    assert drift.numerical_rank(values["w"], 1e-5).tolist() == [np.linalg.matrix_rank(low.numpy()), 0] == [3, 0]
    assert drift.effective_rank(values["v"]).tolist() == pytest.approx([4, 0])  # four equal values; no change
    found = drift.ranks(base, after)
    assert found["weight_rank"].tolist() == pytest.approx([(3 / 8 + 1) / 2, 0])
    assert 1 / 8 < 2 * found["weight_effective_rank"][0].item() - 1 < 3 / 8
    share = values["w"][0] / values["w"][0].sum()
    entropy = -(share[:3] * share[:3].log()).sum()
    assert drift.effective_rank(values["w"][0]).item() == pytest.approx(entropy.exp().item(), rel=1e-5)


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


def test_diagonal_fisher_against_the_closed_form_of_a_linear_softmax():
    generator = torch.Generator().manual_seed(0)
    w, b = torch.randn(3, 4, generator=generator), torch.randn(3, generator=generator)
    x = torch.randn(11, 4, generator=generator)
    found = drift.diagonal_fisher(
        lambda weights, x: torch.log_softmax(weights["w"] @ x + weights["b"], -1), {"w": w, "b": b}, x, chunk=4
    )
    p = torch.softmax(x @ w.T + b, -1)
    # Var_y of (1[y=i] - p_i) is p_i (1 - p_i), times x_j^2 for a weight.
    assert torch.allclose(found["b"], (p * (1 - p)).mean(0), atol=1e-6)
    assert torch.allclose(found["w"], torch.einsum("ni,nj->ij", p * (1 - p), x**2) / 11, atol=1e-6)


def test_half_the_squared_fisher_distance_estimates_the_kl():
    generator = torch.Generator().manual_seed(1)
    w = {"b": torch.randn(5, generator=generator, dtype=torch.float64)}
    fisher = drift.diagonal_fisher(
        lambda weights, _: torch.log_softmax(weights["b"], -1), w, torch.zeros(1, 1).double()
    )
    after = {"b": w["b"] + torch.tensor([1e-3, 0, 0, 0, 0]).double()}  # along one axis the diagonal is all there is
    p, q = (torch.log_softmax(side["b"], -1) for side in (w, after))
    kl = (p.exp() * (p - q)).sum().item()
    assert drift.weight_fisher_l2(w, after, fisher).item() ** 2 / 2 == pytest.approx(kl, rel=1e-2)


@pytest.mark.parametrize(
    ("base", "after", "message"),
    [
        ({"a": torch.zeros(2)}, {"b": torch.zeros(2)}, "differ in names"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(3)}, "after training"),
        ({"a": torch.zeros(3, 2)}, {"a": torch.zeros(2)}, "after training"),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, "no matrix"),
    ],
)
def test_weights_that_do_not_belong_together(base, after, message):
    with pytest.raises(UserError, match=message):
        drift.spectral_norm(base, after)


def test_unknown_aggregate_and_foreign_fisher(weights):
    base, fine_tuned = weights
    with pytest.raises(UserError, match="choose one of: max, mean, sum"):
        drift.spectral_norm(base, fine_tuned, aggregate="median")
    with pytest.raises(UserError, match="the Fisher"):
        drift.weight_change(base, fine_tuned, fisher={"a.weight": base["a.weight"]})


def test_nan_stays_in_its_run(weights):
    base, fine_tuned = weights
    broken = {name: w.clone() for name, w in fine_tuned.items()}
    broken["a.bias"][1, 0] = math.nan
    found = drift.weight_l2(base, broken)
    assert found.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e25])
def test_no_spectrum_of_a_diverged_run(weights, value):
    """1e25 is finite, but its square is not in float32; ranks square in float64, where it is."""
    base, fine_tuned = weights
    broken = {name: w.clone() for name, w in fine_tuned.items()}
    broken["a.weight"][1, 0, 0] = value
    for measure in (drift.weight_change, drift.spectral_norm, *([] if value == 1e25 else [drift.ranks])):
        with pytest.raises(UserError, match="a.weight has no singular values: it is not finite, or too large"):
            measure(base, broken)


def test_cosine():
    gradient = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[2.0]])}
    update = {
        "a": torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 5.0], [0.0, 0.0]]),
        "b": torch.tensor([[[4.0]], [[-2.0]], [[0.0]], [[0.0]]]),
    }
    assert cosine(update, gradient).tolist() == pytest.approx([1, -1, 0, 0])
    assert cosine({"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([1.0, 0.0])}).item() == pytest.approx(0.5**0.5)
    per_run = {"a": gradient["a"] * torch.tensor([[1.0], [-1], [1], [1]]), "b": torch.ones(4, 1, 1) * 2}
    expected = [5 / 5, (1 - 4) / 5, 0, 0]
    assert cosine(update, per_run, run_dims=1).tolist() == pytest.approx(expected)
    with pytest.raises(UserError, match="differ in names"):
        cosine(update, {"a": gradient["a"]})
    with pytest.raises(UserError, match="in the update"):
        cosine({"a": torch.zeros(3)}, {"a": torch.zeros(2)})
