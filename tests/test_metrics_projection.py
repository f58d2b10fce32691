"""RL's Razor's theorem on finite problems, to 1e-6, and the two places where it needs its conditions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from robot_forgetting.errors import UserError
from robot_forgetting.metrics import projection
from robot_forgetting.metrics.projection import (
    expectation_maximisation,
    information_projection,
    kl,
    policy_gradient,
    supervised,
)

BASE = torch.tensor([[0.35, 0.05, 0.2, 0.1, 0.3], [0.1, 0.4, 0.2, 0.2, 0.1]], dtype=torch.float64)
REWARD = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.float64)
TARGET = torch.tensor([[0.7, 0.1, 0, 0.2, 0], [0, 4 / 7, 2 / 7, 0, 1 / 7]], dtype=torch.float64)


def test_closed_form_is_the_minimum():
    assert torch.allclose(information_projection(BASE, REWARD), TARGET)
    right = REWARD[0] > 0
    found = minimize(
        lambda q: float((q * np.log(q / BASE[0][right].numpy())).sum()),
        np.full(3, 1 / 3),
        bounds=[(1e-9, 1)] * 3,
        constraints={"type": "eq", "fun": lambda q: q.sum() - 1},
        tol=1e-12,
    )
    assert found.x == pytest.approx(TARGET[0][right].numpy(), abs=1e-5)
    assert found.fun == pytest.approx(-math.log(0.5), abs=1e-9)  # -log E_pi_0 R
    assert kl(TARGET, BASE).tolist() == pytest.approx([-math.log(0.5), -math.log(0.7)])


@pytest.mark.parametrize(
    "trajectory",
    [
        expectation_maximisation(BASE, REWARD, steps=1),
        expectation_maximisation(BASE, REWARD, steps=60, rate=0.3),
        policy_gradient(BASE, REWARD, steps=80, learning_rate=0.3, natural=True),
    ],
    ids=["exact projections", "partial projections", "natural policy gradient"],
)
def test_projections_and_natural_gradient_reach_the_nearest_optimal_policy(trajectory):
    assert (trajectory.success[-1] > 1 - 1e-6).all()
    assert (trajectory.distance[-1] < 1e-6).all()
    assert trajectory.divergence[-1].tolist() == pytest.approx([-math.log(0.5), -math.log(0.7)], abs=1e-6)
    assert (trajectory.distance.diff(dim=0) <= 1e-12).all()
    assert (trajectory.success.diff(dim=0) >= -1e-12).all()
    assert torch.equal(trajectory.policies[0], BASE)
    # Right answers keep their ratio on the whole way, not only at the end.
    ratio = trajectory.policies[:, 0, 0] / trajectory.policies[:, 0, 1]
    assert ratio.numpy() == pytest.approx(7, rel=1e-9)


def test_supervised_ends_at_its_labels():
    one = torch.nn.functional.one_hot(torch.tensor([1, 4]), 5).double()
    two = (REWARD * torch.tensor([1.0, 1, 1, 1, 0])) / 2
    two[0] = torch.tensor([0.5, 0.5, 0, 0, 0])
    for labels in (one, two, TARGET):
        found = supervised(BASE, labels, REWARD, steps=200)
        assert torch.allclose(found.policies[-1], labels, atol=1e-6)
        assert (found.success[-1] > 1 - 1e-6).all()
        excess = found.divergence[-1] - kl(TARGET, BASE)
        assert excess.tolist() == pytest.approx((kl(labels, BASE) - kl(TARGET, BASE)).tolist(), abs=1e-4)
        assert (excess > 0.03).all() or labels is TARGET  # the oracle's labels are the one exception


def test_plain_gradient_ends_elsewhere():
    """A softmax gradient favours the answer that is already likelier, so it leaves the ratios of the base policy."""
    coarse = policy_gradient(BASE, REWARD, steps=400, learning_rate=0.5)
    fine = policy_gradient(BASE, REWARD, steps=2000, learning_rate=0.1)
    assert (fine.success[-1] > 0.995).all()
    assert (fine.distance[-1] > 0.02).all()  # not a matter of the step size:
    assert torch.allclose(fine.distance[-1], coarse.distance[-1], atol=2e-3)
    longer = policy_gradient(BASE, REWARD, steps=4000, learning_rate=0.5)
    assert (longer.distance[-1] > fine.distance[-1]).all()  # and more training leads further away
    # It still ends nearer to the base policy than one label per question does.
    one = torch.nn.functional.one_hot(torch.tensor([1, 4]), 5).double()
    assert (fine.divergence[-1] < kl(one, BASE)).all()


def test_more_exact_projections_end_nearer():
    ends = [
        policy_gradient(BASE, REWARD, steps=12, learning_rate=2.0, inner_steps=n).distance[-1].max().item()
        for n in (1, 10, 100, 1000)
    ]
    assert ends == sorted(ends, reverse=True)
    assert ends[-1] < 2e-3


def test_first_plain_step_is_the_policy_gradient():
    """Lemma A.2: the step is along d E_pi R / d theta, divided by E_pi R."""
    theta = BASE.log().requires_grad_()
    success = (torch.softmax(theta, -1) * REWARD).sum(-1)
    (gradient,) = torch.autograd.grad(success.sum(), theta)
    stepped = policy_gradient(BASE, REWARD, steps=1, learning_rate=1e-3).policies[1].log()
    expected = theta + 1e-3 * gradient / success[:, None]
    assert torch.allclose(stepped, torch.log_softmax(expected, -1).detach(), atol=1e-12)


def test_first_natural_step_is_the_natural_policy_gradient():
    theta = BASE[0].log().requires_grad_()
    policy = torch.softmax(theta, -1)
    (gradient,) = torch.autograd.grad((policy * REWARD[0]).sum(), theta)
    fisher = torch.diag(BASE[0]) - BASE[0][:, None] * BASE[0]
    expected = torch.softmax(theta + 1e-2 * torch.linalg.pinv(fisher, hermitian=True) @ gradient, -1).detach()
    found = policy_gradient(BASE[0], REWARD[0], steps=1, learning_rate=1e-2, natural=True).policies[1]
    assert torch.allclose(found, expected, atol=1e-12)


def log_linear_expectation_maximisation(
    base: Tensor, features: Tensor, reward: Tensor, *, steps: int, rate: float = 0.5
) -> projection.Trajectory:
    """Alternating projections within pi_theta = pi_0 exp(theta . phi(y)) / Z, an exponential (e-flat) family.

    base, reward [Y]; features phi [Y, D]. The M-projection of (1 - rate) pi + rate I(pi) matches E phi, by Newton's
    method from the last theta to 1e-12. rate < 1: the exact projection of I(pi) lies at infinite theta. Where the
    reward is in the span of the features and 1, the end is the target, whatever the other features are.
    """
    theta = features.new_zeros(features.shape[1])

    def step(pi: Tensor) -> Tensor:
        nonlocal theta
        wanted = ((1 - rate) * pi + rate * information_projection(pi, reward)) @ features
        theta = match(base.log(), features, wanted, theta)
        return torch.softmax(base.log() + features @ theta, -1)

    return projection._run(base, reward, steps, step)


def match(log_base: Tensor, features: Tensor, wanted: Tensor, theta: Tensor) -> Tensor:
    """theta at which E phi is as wanted: maximises the concave theta . wanted - log Z(theta)."""

    def objective(theta: Tensor) -> Tensor:
        return theta @ wanted - torch.logsumexp(log_base + features @ theta, 0)

    for _ in range(100):
        pi = torch.softmax(log_base + features @ theta, -1)
        mean = pi @ features
        gap = wanted - mean
        if gap.abs().max() < 1e-12 * features.abs().max():
            break
        centred = features - mean
        # Features may be redundant: the least-norm step.
        step = torch.linalg.pinv(centred.T @ (centred * pi[:, None]), hermitian=True, rtol=1e-14) @ gap
        size = 1.0
        while objective(theta + size * step) < objective(theta) - 1e-14 and size > 1e-8:
            size /= 2
        theta = theta + size * step
    return theta


def test_exponential_family_with_the_reward_among_its_features():
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    mixed = torch.cat([REWARD[0][:, None] + other[:, :1], other], 1)  # the reward is in the span, not a column
    found = log_linear_expectation_maximisation(BASE[0], mixed, REWARD[0], steps=40)
    assert found.success[-1] > 1 - 1e-6
    assert found.distance[-1] < 1e-6
    assert found.divergence[-1].item() == pytest.approx(-math.log(0.5), abs=1e-5)


def test_exponential_family_without_it_may_end_elsewhere():
    """Two independent bits, three of four answers right: P* meets the closed family in two edges of a square.

    The end is on the better edge and solves the task, but it is not the point of P* nearest to pi_0.
    """
    bits = torch.tensor([[0, 0], [0, 1], [1, 1], [1, 0]], dtype=torch.float64)
    base = torch.tensor([0.594, 0.067, 0.058, 0.281], dtype=torch.float64)
    reward = torch.tensor([1, 1, 1, 0], dtype=torch.float64)
    nearest = information_projection(base, torch.tensor([1, 1, 0, 0]).double())  # the best of both edges
    ends = [log_linear_expectation_maximisation(base, bits, reward, steps=50, rate=rate) for rate in (0.5, 0.99)]
    for found in ends:
        assert found.success[-1] > 1 - 1e-6
        assert found.policies[-1][2] < 1e-6
        assert found.divergence[-1] > kl(nearest, base) + 0.03
    assert torch.allclose(ends[0].policies[-1], ends[1].policies[-1], atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: information_projection(BASE, torch.zeros_like(BASE)), "never gives a right answer"),
        (lambda: expectation_maximisation(BASE.float(), REWARD, steps=1), "float64"),
        (lambda: expectation_maximisation(TARGET, REWARD, steps=1), "none of them 0"),
        (lambda: expectation_maximisation(BASE * 2, REWARD, steps=1), "sum to 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()
