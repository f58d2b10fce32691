"""Distances between two categorical distributions given by logits, exact over the vocabulary.

All functions take logits [..., V] of the base policy (pi_0) and of the fine-tuned policy (pi) for the same tokens and
return one value per token, [...], float32 or wider, differentiable. A logit of -inf means probability zero. Leading
dimensions broadcast, so one base [N, V] goes with many fine-tuned policies [R, N, V]. Wasserstein distance is left out:
labels without an order have no distance to transport over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _log_probabilities(logits: Tensor) -> Tensor:
    # bf16 and fp16 logits carry 8 to 11 bits; the sums over V must not lose more.
    return torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    # 0 log(0/q) = 0. The inner `where` also keeps the gradient of the unused branch finite.
    empty = log_p == -torch.inf
    terms = log_p.exp() * (log_p.masked_fill(empty, 0.0) - log_q.masked_fill(empty, 0.0))
    # Each sum is >= 0 in exact arithmetic; rounding can leave -1e-8.
    return torch.where(empty, torch.zeros_like(terms), terms).sum(-1).clamp_min(0.0)


def forward_kl(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """KL(pi_0 || pi) = sum_v pi_0(v) (log pi_0(v) - log pi(v)), nats per token; +inf where pi lacks support."""
    return _kl(_log_probabilities(base), _log_probabilities(fine_tuned))


def reverse_kl(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """KL(pi || pi_0) = sum_v pi(v) (log pi(v) - log pi_0(v)), nats per token; +inf where pi_0 lacks support."""
    return forward_kl(fine_tuned, base)


def jensen_shannon(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """JS = KL(pi_0 || m) / 2 + KL(pi || m) / 2 with m = (pi_0 + pi) / 2, nats per token, between 0 and log 2."""
    log_p, log_q = _log_probabilities(base), _log_probabilities(fine_tuned)
    # logaddexp(-inf, -inf) has the right value and a NaN gradient; _kl never reads what stands there.
    absent = (log_p == -torch.inf) & (log_q == -torch.inf)
    log_m = torch.logaddexp(log_p.masked_fill(absent, 0.0), log_q.masked_fill(absent, 0.0)) - math.log(2)
    return (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2


def total_variation(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """TV(pi_0, pi) = 1/2 sum_v |pi_0(v) - pi(v)|, per token, between 0 and 1, no unit."""
    difference = _log_probabilities(base).exp() - _log_probabilities(fine_tuned).exp()
    return difference.abs().sum(-1) / 2


def l2(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """||pi_0 - pi||_2 = sqrt(sum_v (pi_0(v) - pi(v))^2), per token, between 0 and sqrt(2), no unit."""
    difference = _log_probabilities(base).exp() - _log_probabilities(fine_tuned).exp()
    return torch.linalg.vector_norm(difference, dim=-1)


def per_token(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that count of each decision: [N, T] and bool [N, T] to [N]. No token gives 0."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1).clamp_min(1)


def per_decision(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the tokens that count of each decision, [N, T] and bool [N, T] to [N].

    For KL in nats/decision: given the tokens of one sampled decision, the sum of the exact token terms estimates the KL
    of the joint distribution without bias if the decision was sampled from the first argument of the KL (pi_0 for
    forward, pi for reverse). Total variation and L2 have no such chain rule and are reported per token only.
    """
    return torch.where(mask, values, 0.0).sum(-1)
