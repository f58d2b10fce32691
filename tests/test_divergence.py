"""Divergences against hand values, scipy and torch, at ordinary and at extreme logits."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.special import rel_entr

from robot_forgetting.metrics.divergence import (
    forward_kl,
    l2,
    per_decision,
    per_token,
    reverse_kl,
    total_variation,
)

MEASURES = [forward_kl, reverse_kl, total_variation, l2]
P, Q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (forward_kl, 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)),
        (reverse_kl, 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)),
        (total_variation, 0.4),
        (l2, math.sqrt(0.32)),
    ],
)
def test_by_hand(measure, expected):
    assert measure(P.log(), Q.log()).item() == pytest.approx(expected, rel=1e-6)
    assert measure(P.log() + 7, Q.log() - 300).item() == pytest.approx(expected, rel=1e-4)  # logits shift freely


def test_against_scipy():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 7, 256, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    p, q = a.softmax(-1).numpy(), b.softmax(-1).numpy()
    assert forward_kl(a, b).numpy() == pytest.approx(rel_entr(p, q).sum(-1), rel=1e-10)
    assert reverse_kl(a, b).numpy() == pytest.approx(rel_entr(q, p).sum(-1), rel=1e-10)
    assert total_variation(a, b).shape == (5, 7)


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_logits_give_zero_and_values_are_never_negative(measure):
    logits = torch.randn(100, 256, generator=torch.Generator().manual_seed(1)) * 10
    assert (measure(logits, logits) == 0).all()
    assert (measure(logits, logits + 1e-6 * logits) >= 0).all()


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_stay_finite(measure, dtype):
    a = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 0.0]], dtype=dtype)
    value = measure(a, -a)
    assert value.isfinite().all()
    assert value.dtype == torch.float32


def test_missing_support():
    a, b = torch.tensor([0.0, -torch.inf]), torch.tensor([0.0, 0.0])
    assert forward_kl(a, b).item() == pytest.approx(math.log(2))
    assert reverse_kl(a, b).item() == math.inf
    assert total_variation(a, b).item() == pytest.approx(0.5)


def test_gradient_is_finite_with_masked_tokens():
    base = torch.tensor([0.0, 1.0, -torch.inf])
    fine_tuned = torch.tensor([0.5, 0.0, -torch.inf], requires_grad=True)
    forward_kl(base, fine_tuned).backward()
    expected = fine_tuned.detach().softmax(-1) - base.softmax(-1)  # d KL(p||q) / d logits of q
    assert torch.allclose(fine_tuned.grad, expected, atol=1e-6)


def test_per_token_and_per_decision():
    values = torch.tensor([[1.0, 3.0, math.nan], [2.0, 2.0, 2.0], [math.nan, math.nan, math.nan]])
    mask = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    assert per_token(values, mask).tolist() == [2.0, 2.0, 0.0]
    assert per_decision(values, mask).tolist() == [4.0, 6.0, 0.0]
