"""What is read off a language model's head, a chunk of positions at a time.

Logits of 4,096 positions over 152,000 words are 2.5 GB in float32, and their softmax and gradient as much again. Here
they exist for a chunk of positions only, forward and backward; everything else is as large as the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 2**27  # of float32 logits at once


def chunk_size(vocabulary: int) -> int:
    """Positions whose logits exist at once."""
    return max(8, CHUNK_BYTES // (4 * vocabulary))


def token_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor) -> Tensor:
    """log softmax(hidden W^T + b)[token] in nats, float32, differentiable in hidden, W and b.

    hidden: [M, D]; weight: [V, D]; bias: [V] or None; tokens: [M] int64; returns [M]
    """
    return _TokenLogProbs.apply(hidden, weight, bias, tokens, chunk_size(len(weight)))


class _TokenLogProbs(torch.autograd.Function):
    """Backward recomputes a chunk's logits, unless only the hidden states need a gradient.

    d log p(t) / d h = W_t - p W does not depend on the gradient that comes in, so with a frozen head it is taken in the
    forward pass, where the softmax is at hand. A single chunk's probabilities are kept: no more than is allowed.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, chunk: int) -> Tensor:
        head_learns = any(ctx.needs_input_grad[1:3])
        ahead = ctx.needs_input_grad[0] and not head_learns
        values, slope = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden) if ahead else None
        kept = None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], weight, bias).float()
            chosen = logits.gather(1, tokens[rows, None]).squeeze(1)
            total = logits.logsumexp(1)
            values[rows] = chosen - total
            if ahead or (head_learns and len(hidden) <= chunk):
                probabilities = logits.sub_(total.unsqueeze(1)).exp_()
                if ahead:
                    slope[rows] = weight[tokens[rows]] - probabilities.to(weight.dtype) @ weight
                else:
                    kept = probabilities
        ctx.chunk, ctx.ahead = chunk, ahead
        ctx.save_for_backward(hidden, weight, bias, tokens, slope, kept)
        return values

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, weight, bias, tokens, slope, kept = ctx.saved_tensors
        if ctx.ahead:
            return (slope * gradient.unsqueeze(1).to(slope.dtype)), None, None, None, None
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            probabilities = kept
            if kept is None:
                probabilities = F.linear(hidden[rows], weight, bias).float().softmax(1)
            incoming = gradient[rows].unsqueeze(1)
            for_logits = probabilities.mul_(-incoming)
            for_logits.scatter_add_(1, tokens[rows, None], incoming.to(for_logits.dtype))
            narrow = for_logits.to(weight.dtype)
            if for_hidden is not None:
                for_hidden[rows] = narrow @ weight
            if for_weight is not None:
                if weight.dtype == torch.float32:
                    for_weight.addmm_(narrow.t(), hidden[rows])
                else:
                    for_weight += narrow.t() @ hidden[rows]
            if for_bias is not None:
                for_bias += for_logits.sum(0)
        return (
            for_hidden,
            None if for_weight is None else for_weight.to(weight.dtype),
            None if for_bias is None else for_bias.to(bias.dtype),
            None,
            None,
        )


Head = tuple[Tensor, Tensor | None]  # weight [V, D], bias [V] or None


def compare(
    base: Tensor, own: Tensor, heads: tuple[Head, Head], functions: Sequence[Callable[[Tensor, Tensor], Tensor]]
) -> Tensor:
    """Functions of two models' logits at the same positions, differentiable in the second model.

    base, own: hidden states [M, D]; heads: theirs; each function takes float32 logits [C, V] twice and gives [C].
    Returns [len(functions), M]
    """
    (base_weight, base_bias), (weight, bias) = heads

    def chunk(first: Tensor, second: Tensor, *parameters: Tensor | None) -> Tensor:
        with torch.no_grad():
            base_logits = F.linear(first, base_weight, base_bias).float().to(second.device)  # a teacher has its own
        logits = F.linear(second, *parameters).float()
        return torch.stack([function(base_logits, logits) for function in functions])

    size, parts = chunk_size(len(weight)), []
    for start in range(0, len(own), size):
        rows = slice(start, start + size)
        if torch.is_grad_enabled():  # forgets the chunk's logits and computes them again on the way back
            parts.append(checkpoint(chunk, base[rows], own[rows], weight, bias, use_reentrant=False))
        else:
            parts.append(chunk(base[rows], own[rows], weight, bias))
    return torch.cat(parts, 1) if parts else own.new_zeros(len(functions), 0, dtype=torch.float32)


def draw_tokens(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """One token per row by inverse CDF in the vocabulary's order, and its log-probability at that temperature.

    logits: [N, V] float32, overwritten; uniform: [N] in [0, 1); temperature 0 is greedy (log-probability 0). Sums go
    over blocks of the vocabulary first: a running sum over all of it is many times slower than the softmax.
    """
    if temperature == 0:
        tokens = logits.argmax(1)
        return tokens, torch.zeros_like(tokens, dtype=torch.float32)
    count, vocabulary = logits.shape
    if temperature != 1:
        logits.div_(temperature)
    total = logits.logsumexp(1, keepdim=True)
    probabilities = (logits - total).exp_()
    width = 256
    padded = F.pad(probabilities, (0, -vocabulary % width)).view(count, -1, width)
    blocks = padded.sum(2, dtype=torch.float64)
    ends = blocks.cumsum(1)
    # The sum is 1 up to rounding; the target stays inside it, so that no token without probability is ever chosen.
    target = (uniform.double() * ends[:, -1]).unsqueeze(1)
    block = (ends <= target).sum(1, keepdim=True).clamp_max(blocks.shape[1] - 1)
    before = ends.gather(1, block) - blocks.gather(1, block)
    inside = padded.gather(1, block.unsqueeze(2).expand(-1, -1, width)).squeeze(1).double()
    place = (inside.cumsum(1) <= target - before).sum(1, keepdim=True)
    last = (inside > 0).long().mul_(torch.arange(1, width + 1, device=logits.device)).amax(1, keepdim=True) - 1
    tokens = block * width + torch.minimum(place, last.clamp_min(0))
    return tokens.squeeze(1), (logits.gather(1, tokens) - total).squeeze(1)
