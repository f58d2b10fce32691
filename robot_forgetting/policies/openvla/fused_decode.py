"""Seven action tokens from a narrow Llama in a few milliseconds: the decode loop with fused weights and a KV buffer.

For narrow layers the time goes into calls, not arithmetic. So the weights of query, key and value (and of gate and up)
are joined, the scales of the norms and of the attention are folded into them, and everything is a handful of calls per
layer. The joining copies the weights, once per decision: worth it for a nano model, out of the question for 7B, which
runs the plain loop of ``openvla_model``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDEST_FUSED = 512  # hidden size up to which copying the weights costs less than it saves


def sample_bins(logits: Tensor, temperature: float, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """Draws one index per row by inverse CDF: the first index whose cumulative probability exceeds the noise.

    logits: [N, V]; noise: [N] in [0, 1), ignored at temperature 0 (argmax). Returns indices and log-probabilities, [N].
    The log-probability is at the given temperature; of a greedy choice it is at temperature 1.
    """
    log_probs = torch.log_softmax(logits.float() / (temperature or 1.0), dim=-1)
    if temperature == 0:
        index = log_probs.argmax(-1, keepdim=True)
    else:
        # Doubles: the last cumulative sum must not fall below a noise close to one.
        cumulative = log_probs.double().exp().cumsum(-1)
        threshold = noise.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
        index = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    return index.squeeze(-1), log_probs.gather(-1, index).squeeze(-1)


def effective_weight(layer: nn.Module) -> Tensor:
    """The matrix a linear layer applies, with whatever LoRA adapters are active on it."""
    if type(layer) is nn.Linear:
        return layer.weight
    weight = layer.get_base_layer().weight
    if not layer.disable_adapters:
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                weight = weight + layer.get_delta_weight(adapter)
    return weight


class FusedLayer(NamedTuple):
    """Matrices of one decoder layer, [in, out]."""

    qkv: Tensor
    out: Tensor
    gate_up: Tensor
    down: Tensor


class FusedLlama:
    """A snapshot of a Llama's weights, good for one call of ``decode``."""

    def __init__(self, model: nn.Module, num_heads: int, eps: float):
        """model: transformers' ``LlamaModel`` (without head)."""
        hidden_size = model.norm.weight.shape[0]
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        root = hidden_size**0.5  # x / sqrt(mean(x^2) + eps) = root * x / hypot(norm(x), root * sqrt(eps))
        self.epsilon = model.norm.weight.new_full((), root * eps**0.5)
        self.final_scale = model.norm.weight * root
        self.layers = [self._fuse(layer, root) for layer in model.layers]

    def _fuse(self, layer: nn.Module, root: float) -> FusedLayer:
        attention, mlp = layer.self_attn, layer.mlp
        query = effective_weight(attention.q_proj) * self.head_dim**-0.5
        qkv = torch.cat([query, effective_weight(attention.k_proj), effective_weight(attention.v_proj)])
        gate_up = torch.cat([effective_weight(mlp.gate_proj), effective_weight(mlp.up_proj)])
        return FusedLayer(
            qkv.mul_(layer.input_layernorm.weight * root).t(),
            effective_weight(attention.o_proj).t(),
            gate_up.mul_(layer.post_attention_layernorm.weight * root).t(),
            effective_weight(mlp.down_proj).t(),
        )

    def _normalise(self, x: Tensor) -> Tensor:
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.epsilon)

    def _project(self, layer: FusedLayer, x: Tensor, count: int, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotated queries and keys, and values, [N, L, 3 heads, D]. x: [N L, hidden]; cos, sin: [(N,) L, 1, D]."""
        qkv = torch.mm(self._normalise(x), layer.qkv).view(count, -1, 3 * self.num_heads, self.head_dim)
        qk = qkv[:, :, : 2 * self.num_heads]
        rolled = torch.roll(qk, self.head_dim // 2, -1)
        torch.addcmul(qk * cos, rolled, sin, out=qk)
        return qkv

    def _mlp(self, layer: FusedLayer, x: Tensor) -> Tensor:
        gate, up = torch.mm(self._normalise(x), layer.gate_up).chunk(2, -1)
        return torch.addmm(x, F.silu(gate).mul_(up), layer.down)

    def prefill(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: Tensor) -> Tensor:
        """Runs the prompt [N, L, hidden], fills the cache, and returns the last position's state, [N, hidden].

        mask: [N, 1, L, L] bool or None for causal; cache: [layers, 2, N, heads, length, head_dim]
        """
        count, length, width = hidden.shape
        x = hidden.reshape(count * length, width)
        for index, layer in enumerate(self.layers):
            qkv = self._project(layer, x, count, cos, sin).view(count, length, 3, self.num_heads, self.head_dim)
            query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            cache[index, 0, :, :, :length] = key
            cache[index, 1, :, :, :length] = value
            last = index == len(self.layers) - 1
            if last:  # only the last position's output is needed from here on
                seen = None if mask is None else mask[:, :, -1:]
                y = F.scaled_dot_product_attention(query[:, :, -1:], key, value, attn_mask=seen, scale=1.0)
                x = x.view(count, length, width)[:, -1]
            else:
                y = F.scaled_dot_product_attention(
                    query, key, value, attn_mask=mask, is_causal=mask is None and length > 1, scale=1.0
                )
            x = torch.addmm(x, y.transpose(1, 2).reshape(-1, width), layer.out)
            x = self._mlp(layer, x)
        return self._normalise(x)

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, bias: Tensor | None, cache: Tensor, at: int) -> Tensor:
        """One more position for every row: [N, hidden] to its state [N, hidden].

        bias: [N heads, 1, at + 1], 0 or -inf, or None
        """
        count, width = x.shape
        rows = count * self.num_heads
        for index, layer in enumerate(self.layers):
            qkv = self._project(layer, x, count, cos, sin).view(count, 3, self.num_heads, self.head_dim)
            query = qkv[:, 0].reshape(rows, 1, self.head_dim)
            buffer = cache[index]
            buffer[:, :, :, at].copy_(qkv[:, 1:].transpose(0, 1))
            key, value = buffer.view(2, rows, -1, self.head_dim)[:, :, : at + 1].unbind(0)
            key = key.transpose(1, 2)
            scores = torch.bmm(query, key) if bias is None else torch.baddbmm(bias, query, key)
            y = torch.bmm(torch.softmax(scores, -1), value).view(count, width)
            x = torch.addmm(x, y, layer.out)
            x = self._mlp(layer, x)
        return self._normalise(x)
