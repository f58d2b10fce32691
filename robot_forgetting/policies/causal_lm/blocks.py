"""A language model layer by layer: what each makes of a text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from robot_forgetting.policies.causal_lm.hidden import of_like_length

TOKENS_AT_ONCE = 2048  # of a forward pass that keeps the states of every layer


def blocks_of(body: nn.Module) -> list[nn.Module]:
    """The transformer's blocks in their order; none where the model does not keep them in one list."""
    count = getattr(body.config, "num_hidden_layers", 0)
    lists = (module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, []))


def mean_states(body: nn.Module, rows: Sequence[Sequence[int]], pad: int, batch_rows: int) -> Tensor:
    """Each layer's states, averaged over a text's tokens but the first, [1 + blocks, N, D] float32 on the CPU.

    As transformers numbers them: after the embedding, then after each block, the last after the final norm.
    The first token is left out (unless it is the only one): attention rests on it whatever it says, and its state can
    be hundreds of times as long as all others, so that a mean with it would tell a text's length and little else.
    """
    device, parts, order = next(body.parameters()).device, [], []
    for group in of_like_length([len(row) for row in rows]):
        at_once = max(1, min(batch_rows, TOKENS_AT_ONCE // max(len(rows[row]) for row in group)))
        for start in range(0, len(group), at_once):
            chosen = group[start : start + at_once]
            parts.append(_means(body, [rows[row] for row in chosen], pad, device))
            order += chosen
    return torch.cat(parts, 1)[:, torch.argsort(torch.tensor(order))]


def _means(body: nn.Module, rows: Sequence[Sequence[int]], pad: int, device) -> Tensor:
    # Right-padded, so that plain causal attention is right without a mask.
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    places = torch.arange(width, device=device)
    counts = (places < lengths) & ((places > 0) | (lengths == 1))
    states = body(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    means = [(state.float() * counts.unsqueeze(2)).sum(1) / counts.sum(1, keepdim=True) for state in states]
    return torch.stack(means).cpu()
