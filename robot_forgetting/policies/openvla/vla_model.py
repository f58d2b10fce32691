"""OpenVLA (Kim et al., 2024, arXiv:2406.09246): fused vision towers, a projector, and a stock Llama for action tokens.

Two paths compute the same numbers: ``forward`` calls transformers' Llama, while ``action_logits`` and
``generate_actions`` run a short loop over the Llama's own submodules (so LoRA layers put in their place are used),
which costs much less per token.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from robot_forgetting.policies.openvla.fused_decode import WIDEST_FUSED, FusedLlama, effective_weight, sample_bins
from robot_forgetting.policies.openvla.vision import DINOV2_LARGE, SIGLIP_SO400M, Projector, TowerConfig, VisionBackbone

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


# What transformers calls the language model's dimensions, and what they are called here.
LLAMA = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "bos_token_id": "bos_token_id",
    "pad_token_id": "pad_token_id",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_positions",
}


@dataclass(frozen=True)
class OpenVLAConfig:
    """Dimensions and conventions of an OpenVLA; the defaults are those of OpenVLA-7B.

    vocab_size: rows of the embedding, i.e. the tokenizer's size rounded up; the tokenizer's own size is
        ``vocab_size - pad_to_multiple_of``, and the last ``action_bins`` ids below that are the action tokens
    means, stds: per tower, RGB
    norm_stats: key -> {"action": {"q01", "q99", "mask"}}
    """

    dino: TowerConfig = DINOV2_LARGE
    siglip: TowerConfig = SIGLIP_SO400M
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    intermediate_size: int = 11008
    vocab_size: int = 32064
    pad_to_multiple_of: int = 64
    bos_token_id: int = 1
    pad_token_id: int = 32000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    max_positions: int = 2048
    action_bins: int = 256
    action_tokens: int = 7
    image_resize_strategy: str = "resize-naive"
    means: tuple = (IMAGENET_MEAN, (0.5, 0.5, 0.5))
    stds: tuple = (IMAGENET_STD, (0.5, 0.5, 0.5))
    norm_stats: dict = field(default_factory=dict)

    @property
    def text_vocab_size(self) -> int:
        """Size of the tokenizer's vocabulary, action tokens included."""
        return self.vocab_size - self.pad_to_multiple_of

    @property
    def first_action_id(self) -> int:
        return self.text_vocab_size - self.action_bins

    @property
    def image_size(self) -> int:
        return self.dino.image_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def llama(self) -> LlamaConfig:
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return LlamaConfig(**{name: getattr(self, ours) for name, ours in LLAMA.items()}, rope_parameters=rope)


def smooth_rows(count: int, width: int, scale: float) -> Tensor:
    """Random [count, width] vectors that vary smoothly along the rows: low-frequency waves in a random basis."""
    place = torch.arange(count).unsqueeze(1) / count
    frequency = torch.arange(1, width // 2 + 1)
    waves = torch.cat([(torch.pi * frequency * place).cos(), (torch.pi * frequency * place).sin()], dim=1)
    waves = waves / frequency.sqrt().repeat(2)
    rows = waves @ torch.randn(waves.shape[1], width)
    return rows / rows.std() * scale


class OpenVLAModel(nn.Module):
    """Weights and forward passes; images are already normalised and prompts already tokenised here.

    Action tokens are numbered by *bin*: bin b is token id ``text_vocab_size - 1 - b``, so that neighbouring bins are
    neighbouring command values (OpenVLA counts its ids downwards from the end of the vocabulary).
    """

    def __init__(self, config: OpenVLAConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.products: torch.dtype | None = None  # of matrix products under autocast; None: the weights' dtype
        self.vision_backbone = VisionBackbone(config.dino, config.siglip)
        self.projector = Projector(config.dino.embed_dim + config.siglip.embed_dim, config.hidden_size)
        self.language_model = LlamaForCausalLM(config.llama())

    def initialise(self) -> None:
        """Random weights for training from scratch."""
        self.vision_backbone.featurizer.initialise()
        self.vision_backbone.fused_featurizer.initialise()
        self.projector.initialise()
        for name, parameter in self.language_model.named_parameters():
            if parameter.dim() == 2:
                # Embeddings at 0.02 as in Llama; layers by fan-in, because 0.02 is far too little for narrow layers.
                embedding = "embed_tokens" in name or "lm_head" in name
                nn.init.trunc_normal_(parameter, std=0.02 if embedding else (2 * parameter.shape[1]) ** -0.5)
        # Neighbouring bins start out alike, so that what is learned about one bin holds for its neighbours.
        ids, width = self.bins_to_ids(torch.arange(self.config.action_bins)), self.config.hidden_size
        with torch.no_grad():
            self.language_model.lm_head.weight[ids] = smooth_rows(self.config.action_bins, width, 0.05)
            self.language_model.model.embed_tokens.weight[ids] = smooth_rows(self.config.action_bins, width, 0.5)

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that the checkpoint carries but no output depends on (the towers' last blocks and heads)."""
        backbone = self.vision_backbone
        return backbone.featurizer.unused_parameters() + backbone.fused_featurizer.unused_parameters()

    @property
    def _recompute(self) -> bool:
        return self.gradient_checkpointing and torch.is_grad_enabled()

    def bins_to_ids(self, bins: Tensor) -> Tensor:
        return self.config.text_vocab_size - 1 - bins

    def ids_to_bins(self, ids: Tensor) -> Tensor:
        """Bins of token ids; ids that are no action tokens go to the nearest bin, as in OpenVLA."""
        return (self.config.text_vocab_size - 1 - ids).clamp(0, self.config.action_bins - 1)

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Normalised pictures [N, 6, H, W] to language-model embeddings [N, patches, hidden]."""
        return self.projector(self.vision_backbone(pixel_values, self._recompute))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None, patches: Tensor | None = None) -> Tensor:
        """Prompt embeddings with the patches inserted after BOS: [N, 1 + patches + L - 1, hidden].

        Every row starts with BOS; of a left-padded prompt the first padding token is replaced by it (see ``_mask``).
        """
        patches = self.encode_images(pixel_values) if patches is None else patches
        embed_tokens = self.language_model.model.embed_tokens
        start = embed_tokens(torch.full_like(input_ids[:, :1], self.config.bos_token_id))
        return torch.cat([start, patches.to(start.dtype), embed_tokens(input_ids[:, 1:])], dim=1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> Tensor:
        """Logits over the whole vocabulary at every position by transformers' own Llama: [N, patches + L, vocab]."""
        hidden = self.embed(input_ids, pixel_values)
        mask = self._mask(attention_mask, hidden.shape[1])
        positions = None if mask is None else self._positions(mask)
        return self.language_model(
            inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False
        ).logits

    def layers(self) -> list[nn.Module]:
        """The Llama's embedding and its blocks."""
        return [self.language_model.get_input_embeddings(), *self.language_model.model.layers]

    def layer_states(self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor) -> Tensor:
        """What the Llama makes of patches and prompt, the mean over its positions but the first: after the embedding,
        then after each block, the last after the final norm, [1 + blocks, N, hidden] float32."""
        hidden = self.embed(input_ids, pixel_values)
        mask = self._mask(attention_mask, hidden.shape[1])
        positions = None if mask is None else self._positions(mask)
        states = self.language_model.model(
            inputs_embeds=hidden, attention_mask=mask, position_ids=positions, use_cache=False,
            output_hidden_states=True,
        ).hidden_states  # fmt: skip
        counts = torch.ones_like(hidden[..., :1]) if mask is None else mask.unsqueeze(2).to(hidden.dtype)
        counts = counts[:, 1:].float()
        return torch.stack([(state[:, 1:].float() * counts).sum(1) / counts.sum(1) for state in states])

    def action_logits(
        self, input_ids: Tensor, attention_mask: Tensor | None, pixel_values: Tensor, bins: Tensor
    ) -> Tensor:
        """Teacher-forced logits of the action bins, [N, T, action_bins] float32, differentiable.

        bins: [N, T]; position t is conditioned on bins before t. The head is applied to T positions and the rows of
        action tokens only, so the full [N, L, vocab] logits never exist.
        """
        hidden = self.embed(input_ids, pixel_values)
        mask = self._mask(attention_mask, hidden.shape[1])
        given = self.language_model.model.embed_tokens(self.bins_to_ids(bins[:, :-1]))
        hidden = torch.cat([hidden, given.to(hidden.dtype)], dim=1)
        if mask is not None:
            mask = F.pad(mask, (0, given.shape[1]), value=True)
        hidden = self._run(hidden, mask)
        return self._head(hidden[:, -bins.shape[1] :], self._head_rows())

    @torch.no_grad()
    def generate_actions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        pixel_values: Tensor,
        *,
        temperature: float = 0.0,
        noise: Tensor | None = None,
        tokens: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Decodes action bins with a KV cache; returns bins and log-probabilities, [N, T].

        noise: [N, T] in [0, 1), needed unless temperature is 0.
        """
        count_tokens = tokens or self.config.action_tokens
        hidden = self.embed(input_ids, pixel_values)
        count, prompt_length, width = hidden.shape
        length = prompt_length + count_tokens - 1
        mask = self._mask(attention_mask, prompt_length)
        shape = (self.config.num_layers, 2, count, self.config.num_heads, length, self.config.head_dim)
        cache = hidden.new_empty(shape, dtype=self.products)
        mask = None if mask is None else F.pad(mask, (0, count_tokens - 1), value=True)
        position = torch.arange(length, device=hidden.device) if mask is None else self._positions(mask)
        rotary = self._rotary(position, self.products or hidden.dtype)
        # Half-precision weights that a norm's scale is folded into would round otherwise than ``action_logits``.
        fused = width <= WIDEST_FUSED and (self.products or hidden.dtype) == torch.float32
        decoder = self._fused_decode if fused else self._plain_decode
        state, step_forward = decoder(hidden, mask, rotary, cache)
        rows = self._head_rows()
        bins, log_probs = [], []
        for step in range(count_tokens):
            logits = self._head(state, rows)
            chosen, log_prob = sample_bins(logits, temperature, None if noise is None else noise[:, step])
            bins.append(chosen)
            log_probs.append(log_prob)
            if step + 1 < count_tokens:
                embedding = self.language_model.model.embed_tokens(self.bins_to_ids(chosen))
                state = step_forward(embedding, prompt_length + step)
        return torch.stack(bins, 1), torch.stack(log_probs, 1)

    def _fused_decode(self, hidden: Tensor, mask: Tensor | None, rotary: tuple, cache: Tensor):
        """The prompt's last state, and a function from (next embedding, its place) to the next state."""
        llama = FusedLlama(self.language_model.model, self.config.num_heads, self.config.rms_norm_eps)
        length = hidden.shape[1]
        cos, sin = (x.unsqueeze(1) if mask is None else x.transpose(1, 2) for x in rotary)  # [(N,) L, 1, D]
        bias = None
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=hidden.dtype, device=hidden.device).masked_fill_(~mask, -torch.inf)
            bias = bias.repeat_interleave(self.config.num_heads, 0).unsqueeze(1)
        prefill_mask = None if mask is None else self._causal(mask[:, :length])
        state = llama.prefill(hidden, cos[..., :length, :, :], sin[..., :length, :, :], prefill_mask, cache)

        def step(embedding: Tensor, at: int) -> Tensor:
            here = slice(at, at + 1)
            seen = None if bias is None else bias[:, :, : at + 1]
            x = llama.step(embedding, cos[..., here, :, :], sin[..., here, :, :], seen, cache, at)
            return x * llama.final_scale

        return state * llama.final_scale, step

    def _plain_decode(self, hidden: Tensor, mask: Tensor | None, rotary: tuple, cache: Tensor):
        """The same as ``_fused_decode`` through the submodules themselves, without a copy of any weight."""

        def places(start: int, end: int) -> tuple:
            return tuple(part[..., start:end, :] for part in rotary)

        length = hidden.shape[1]
        prefill_mask = None if mask is None else self._causal(mask[:, :length])
        state = self._layers(hidden, places(0, length), prefill_mask, cache, 0, last_only=True)

        def step(embedding: Tensor, at: int) -> Tensor:
            seen = None if mask is None else mask[:, None, None, : at + 1]
            return self._layers(embedding.unsqueeze(1), places(at, at + 1), seen, cache, at)[:, -1]

        return state[:, -1], step

    # ---- the Llama's layers, without transformers' per-call cost

    def _run(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """The whole sequence at once, causal."""
        position = torch.arange(hidden.shape[1], device=hidden.device) if mask is None else self._positions(mask)
        rotary = self._rotary(position, self.products or hidden.dtype)
        return self._layers(hidden, rotary, None if mask is None else self._causal(mask), None, 0)

    def _layers(
        self, hidden: Tensor, rotary: tuple, mask: Tensor | None, cache: Tensor | None, start: int, last_only=False
    ) -> Tensor:
        """Decoder layers and final norm. ``last_only`` skips what only earlier positions of the last layer need."""
        model = self.language_model.model
        final = len(model.layers) - 1
        for index, layer in enumerate(model.layers):
            arguments = (layer, hidden, rotary, mask, None if cache is None else cache[index], start)
            if self._recompute:
                hidden = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                hidden = self._layer(*arguments, last=last_only and index == final)
        return self._norm(model.norm, hidden)

    def _layer(
        self, layer, hidden: Tensor, rotary: tuple, mask: Tensor | None, cache: Tensor | None, start: int, last=False
    ) -> Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        count, length, _ = hidden.shape
        heads, head_dim = self.config.num_heads, self.config.head_dim
        shape = (count, length, heads, head_dim)
        x = self._norm(layer.input_layernorm, hidden)
        query = _rotate(attention.q_proj(x).view(shape).transpose(1, 2), *rotary)
        key = _rotate(attention.k_proj(x).view(shape).transpose(1, 2), *rotary)
        value = attention.v_proj(x).view(shape).transpose(1, 2)
        if cache is not None:
            end = start + length
            cache[0, :, :, start:end] = key
            cache[1, :, :, start:end] = value
            if start:
                key, value = cache[0, :, :, :end], cache[1, :, :, :end]
        causal = mask is None and length > 1
        if last:
            query, hidden, causal, length = query[:, :, -1:], hidden[:, -1:], False, 1
            mask = None if mask is None else mask[:, :, -1:]
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal)
        hidden = hidden + attention.o_proj(x.transpose(1, 2).reshape(count, length, heads * head_dim))
        x = self._norm(layer.post_attention_layernorm, hidden)
        return hidden + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        x = F.rms_norm(x, norm.weight.shape, norm.weight, self.config.rms_norm_eps)
        return x if self.products is None else x.to(self.products)  # once, not in each product that reads it

    def _rotary(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of rotary embeddings, [(N, 1,) L, head_dim]."""
        dim = self.config.head_dim
        exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=position.device) / dim
        angle = position.unsqueeze(-1).float() * (1.0 / self.config.rope_theta**exponent)
        cos, sin = angle.cos(), angle.sin()
        cos, sin = torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)
        return (cos, sin) if position.dim() == 1 else (cos.unsqueeze(1), sin.unsqueeze(1))

    def _head_rows(self) -> Tensor:
        """The head's rows of the action tokens in the order of bins, in float32."""
        first = self.config.first_action_id
        with self._in_float32():
            weight = effective_weight(self.language_model.lm_head)
        return weight[first : first + self.config.action_bins].flip(0).float()

    def _head(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Logits in float32: in bfloat16 they have steps of 1/16 from 8 on, and so would ratios of probabilities."""
        with self._in_float32():
            return F.linear(hidden.float(), rows)

    def _in_float32(self):
        device = self.language_model.lm_head.weight.device.type
        return nullcontext() if self.products is None else torch.autocast(device, enabled=False)

    def _mask(self, attention_mask: Tensor | None, length: int) -> Tensor | None:
        """Which of ``length`` positions (BOS, patches, text) count, [N, length] bool; None when all do.

        BOS moves in front of the patches, so in a padded row its old place, between padding and text, is masked too.
        """
        if attention_mask is None or bool(attention_mask.all()):
            return None
        text = attention_mask.bool()
        left_padded = ~text[:, :1]
        is_bos = (text.long().cumsum(1) == 1) & text & left_padded
        text = (text & ~is_bos)[:, 1:]
        return F.pad(text, (length - text.shape[1], 0), value=True)

    @staticmethod
    def _positions(mask: Tensor) -> Tensor:
        return (mask.long().cumsum(1) - 1).clamp(min=0)

    @staticmethod
    def _causal(mask: Tensor) -> Tensor:
        """[N, 1, L, L] bool, True where a query may look. Column 0 is BOS and always counts, so no row is empty."""
        length = mask.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
        return causal & mask[:, None, None, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; ``sin`` carries the sign of its half."""
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, torch.roll(x, half, -1), sin)
