"""Jensen-Shannon, and one base against many fine-tuned policies."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.spatial.distance import jensenshannon

from robot_forgetting.metrics import divergence
from robot_forgetting.metrics.divergence import jensen_shannon

NAMES = ["forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "l2"]


def logits(*shape, seed=0, dtype=torch.float64):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_jensen_shannon_by_hand_and_by_scipy():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    by_hand = (
        0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.3) + 0.9 * math.log(9 / 7) + 0.1 * math.log(1 / 3)
    ) / 2
    assert jensen_shannon(p.log(), q.log()).item() == pytest.approx(by_hand, rel=1e-6)
    a, b = logits(6, 9), logits(6, 9, seed=1)
    expected = jensenshannon(a.softmax(-1), b.softmax(-1), axis=1) ** 2
    assert jensen_shannon(a, b).numpy() == pytest.approx(expected, rel=1e-9)
    assert torch.allclose(jensen_shannon(a, b), jensen_shannon(b, a))


def test_jensen_shannon_without_common_support():
    a, b = torch.tensor([0.0, -torch.inf, -torch.inf]), torch.tensor([-torch.inf, 0.0, -torch.inf])
    assert jensen_shannon(a, b).item() == pytest.approx(math.log(2))
    free = torch.tensor([0.3, 0.1, -torch.inf], requires_grad=True)
    jensen_shannon(a, free).backward()
    assert free.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_one_base_against_many_policies(name):
    base, fine_tuned = logits(7, 5), logits(2, 3, 7, 5, seed=1)
    measure = getattr(divergence, name)
    values = measure(base, fine_tuned)
    assert values.shape == (2, 3, 7)
    assert torch.allclose(values[1, 2], measure(base, fine_tuned[1, 2]))
    assert torch.allclose(measure(fine_tuned, base)[0, 1], measure(fine_tuned[0, 1], base))


def test_a_base_with_missing_support_broadcasts():
    base, fine_tuned = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[[0.0, 0.0]], [[0.0, -torch.inf]]])
    assert divergence.forward_kl(base, fine_tuned)[:, 0].tolist() == pytest.approx([math.log(2), 0])
    assert divergence.reverse_kl(base, fine_tuned)[:, 0].tolist() == [math.inf, 0]
