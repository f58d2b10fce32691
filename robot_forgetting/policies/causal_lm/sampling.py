"""Completions from a causal language model: left-padded prompts, a KV cache, one token per row and step.

transformers' ``generate`` is not used: it draws from torch's generator for the batch as a whole, so that a completion
would depend on the rows beside it; and it carries finished rows to the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from robot_forgetting.one_step import uniforms
from robot_forgetting.policies.causal_lm.vocabulary import draw_tokens
from robot_forgetting.policy import Action

COMPACT = 0.75  # share of rows still running at which the finished ones leave the batch (that copies the cache)


class GrowingLayer(DynamicLayer):
    """A cache layer with room to grow; the plain one copies all it holds at every token."""

    room = 64

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffer = None
        length, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self._buffer is None or self._buffer.shape[-2] < end:
            shape = (2, *key_states.shape[:-2], max(end + self.room, end * 3 // 2), key_states.shape[-1])
            buffer = key_states.new_empty(shape)
            if length:
                buffer[0, ..., :length, :], buffer[1, ..., :length, :] = self.keys, self.values
            self._buffer = buffer
        self._buffer[0, ..., length:end, :], self._buffer[1, ..., length:end, :] = key_states, value_states
        self._show(end)
        return self.keys, self.values

    def _show(self, end: int) -> None:
        self.keys, self.values = self._buffer[0, ..., :end, :], self._buffer[1, ..., :end, :]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._pick(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._pick(indices)

    def _pick(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        room = min(length + self.room, self._buffer.shape[-2])
        self._buffer = self._buffer[:, :, :, :room].index_select(1, indices)
        self._show(length)


def new_cache(config) -> DynamicCache:
    cache = DynamicCache(config=config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """ids, mask (bool) and positions, [N, L], of prompts that end together."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    positions = torch.arange(width, device=device) - (width - lengths).unsqueeze(1)
    return ids, positions >= 0, positions.clamp_min(0)


def read_prompts(body: nn.Module, prompts, pad: int, cache: DynamicCache) -> tuple[Tensor, Tensor, Tensor]:
    """The states [N, 1, D] after the prompts, and mask and positions [N, L] of what ``cache`` then holds."""
    ids, seen, positions = left_padded(prompts, pad, next(body.parameters()).device)
    out = body(
        input_ids=ids,
        attention_mask=None if bool(seen.all()) else seen.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return out.last_hidden_state[:, -1:], seen, positions


@torch.no_grad()
def sample(
    body: nn.Module,
    head,
    prompts: Sequence[Sequence[int]],
    *,
    repeats: int,
    stops: Sequence[int],
    pad: int,
    limit: int,
    temperature: float,
    noise: Tensor,
) -> Action:
    """``repeats`` completions of each prompt, in a row; every prompt is read once.

    body: the model without its head; head: hidden states [N, D] to logits [N, V]; limit: tokens at most
    noise: [N] in [0, 1); a row's number seeds the stream of its uniforms, so that its completion is its own
    """
    device = next(body.parameters()).device
    cache = new_cache(body.config)
    hidden, seen, positions = read_prompts(body, prompts, pad, cache)
    hidden = hidden[:, 0].repeat_interleave(repeats, 0)
    padded = not bool(seen.all())
    if repeats > 1:
        cache.batch_repeat_interleave(repeats)
        seen, positions = seen.repeat_interleave(repeats, 0), positions.repeat_interleave(repeats, 0)
    count = len(prompts) * repeats
    position = positions[:, -1:]
    # 24 bits, as ``uniforms`` gives them
    streams = (noise.double().cpu().numpy() * 2**24).astype(np.int64)
    ends = torch.tensor(sorted(stops), device=device)
    tokens = torch.full((count, limit), pad, dtype=torch.int64)
    mask, log_prob = torch.zeros(count, limit, dtype=torch.bool), torch.zeros(count, limit)
    rows, running = np.arange(count), torch.ones(count, dtype=torch.bool)
    for step in range(limit):
        drawn = torch.from_numpy(uniforms(streams[rows], np.full(len(rows), step))).to(device)
        chosen, value = draw_tokens(head(hidden).float(), temperature, drawn)
        now = torch.from_numpy(rows)[running]
        tokens[now, step], log_prob[now, step] = chosen.cpu()[running], value.cpu()[running]
        mask[now, step] = True
        running &= ~torch.isin(chosen, ends).cpu()
        if step + 1 == limit or not running.any():
            break
        if running.float().mean() <= COMPACT:
            kept = running.nonzero().squeeze(1)
            rows, running = rows[kept.numpy()], running[kept]
            kept = kept.to(device)
            cache.batch_select_indices(kept)
            chosen, seen, position = chosen[kept], seen[kept], position[kept]
        position = position + 1
        if padded:
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
        out = body(
            input_ids=chosen.unsqueeze(1),
            attention_mask=seen.long() if padded else None,
            position_ids=position,
            past_key_values=cache,
            use_cache=True,
        )
        hidden = out.last_hidden_state[:, -1]
    longest = max(1, int(mask.any(0).sum()))
    return Action(tokens[:, :longest], mask[:, :longest], log_prob[:, :longest])
