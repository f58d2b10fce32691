"""RL's Razor's theorem on a finite problem, exactly: of all policies that solve the task, which one is reached?

A policy is a distribution over the Y answers to a question, [..., Y] in float64, and a reward says which answers are
right (0 or 1, [..., Y]). The optimal set is P* = {pi: E_pi R = 1}. Section 5 and appendix A of arXiv:2509.04259:

- I-projection (lemma A.1): keeping the right ones among samples of pi gives argmin KL(q || pi) over q in P*, which is
  q = pi R / E_pi R. It is what reward does.
- M-projection (lemma A.2): the policy of the family nearest to q, argmin KL(q || pi). It is what training does.
- Alternating both (theorem 5.2, A.4) leads to argmin KL(pi || pi_0) over P*, which is the ``target`` pi_0 R / E_pi_0 R,
  where the family is an exponential one and the M-projections are exact.

What these functions show, and the tests state as numbers:

1. Exact or partial M-projections and the natural policy gradient reach the target: they multiply all right answers by
   one factor, so the ratios between right answers stay those of pi_0.
2. SFT is the same M-projection with labels that do not move, so it ends at the labels, wherever they are.
3. The plain gradient of a softmax does NOT reach the target, however small the step: d(theta_i - theta_j)/dt =
   (1 - E R) (pi_i - pi_j) / E R for two right answers, so the likelier one gains, and as 1 - E R falls only like 1/t
   this adds up without bound. One plain step per batch is not an exact M-projection, which the theorem asks for;
   with more steps on the same batch (``inner_steps``) the end comes nearer.
4. Full support and E R = 1 exclude each other unless every answer is right. The theorem holds for the closure of the
   family, and there where the reward is in the span of the features; without that the end may be another member of P*,
   further from pi_0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from robot_forgetting.errors import UserError


@dataclass(frozen=True)
class Trajectory:
    """The policy after 0, 1, ..., S steps: ``policies`` [S+1, ..., Y]; and the closed-form ``target`` [..., Y]."""

    policies: Tensor
    reward: Tensor
    target: Tensor

    @property
    def success(self) -> Tensor:
        """E_pi R, [S+1, ...]."""
        return (self.policies * self.reward).sum(-1)

    @property
    def divergence(self) -> Tensor:
        """KL(pi || pi_0) in nats, [S+1, ...]; at the target its least value on P*, -log E_pi_0 R."""
        return kl(self.policies, self.policies[0])

    @property
    def distance(self) -> Tensor:
        """Total variation to the target, [S+1, ...], between 0 and 1: finite at every step, unlike a KL."""
        return (self.policies - self.target).abs().sum(-1) / 2


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) = sum_y p log(p / q) in nats, probabilities [..., Y] to [...]; +inf where q lacks support."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def information_projection(policy: Tensor, reward: Tensor) -> Tensor:
    """argmin KL(q || pi) over {q: E_q R = 1} = pi R / E_pi R, what rejection sampling draws from, [..., Y].

    Applied to pi_0 it is the closed-form target. UserError where pi gives every right answer probability 0.
    """
    right = policy * reward
    mass = right.sum(-1, keepdim=True)
    if not (mass > 0).all():
        raise UserError("the policy never gives a right answer; there is nothing to project on")
    return right / mass


def expectation_maximisation(base: Tensor, reward: Tensor, *, steps: int, rate: float = 1.0) -> Trajectory:
    """Alternating projections of a tabular policy: pi <- (1 - rate) pi + rate I(pi), the M-projection partial or full.

    rate 1 is an exact M-projection and arrives in one step. A smaller one is a natural-gradient step on
    KL(I(pi) || pi): 1 - E R shrinks by 1 - rate each time.
    """
    return _run(base, reward, steps, lambda pi: _towards(pi, information_projection(pi, reward), rate))


def supervised(base: Tensor, labels: Tensor, reward: Tensor, *, steps: int, rate: float = 0.1) -> Trajectory:
    """SFT on a fixed distribution of labels [..., Y]: the same M-projection, pi <- (1 - rate) pi + rate labels."""
    return _run(base, reward, steps, lambda pi: _towards(pi, labels, rate))


def policy_gradient(
    base: Tensor, reward: Tensor, *, steps: int, learning_rate: float, natural: bool = False, inner_steps: int = 1
) -> Trajectory:
    """Exact gradient ascent on E_pi R of a softmax over Y logits theta, started at log pi_0.

    plain: theta += learning_rate pi (R - E R) / E R, a gradient step on KL(q || pi) with q = I(pi) (lemma A.2);
    inner_steps > 1 takes several with the same q, towards the exact M-projection
    natural: theta += learning_rate (R - E R), the inverse Fisher times the gradient; reaches the target
    """
    if natural:
        return _run(base, reward, steps, lambda pi: _softmax(pi.log() + learning_rate * reward))

    def step(pi: Tensor) -> Tensor:
        labels = information_projection(pi, reward)
        for _ in range(inner_steps):
            pi = _softmax(pi.log() + learning_rate * (labels - pi))
        return pi

    return _run(base, reward, steps, step)


def _towards(policy: Tensor, labels: Tensor, rate: float) -> Tensor:
    return (1 - rate) * policy + rate * labels


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, -1)


def _run(base: Tensor, reward: Tensor, steps: int, step: Callable[[Tensor], Tensor]) -> Trajectory:
    if base.dtype != torch.float64:
        raise UserError("the check is to 1e-6 over many steps; give the base policy in float64")
    if not (base > 0).all() or not torch.allclose(base.sum(-1), torch.ones(()).double(), atol=1e-9):
        raise UserError("the base policy must be probabilities that sum to 1, none of them 0")
    policies = [base]
    for _ in range(steps):
        policies.append(step(policies[-1]))
    return Trajectory(torch.stack(policies), reward, information_projection(base, reward))
