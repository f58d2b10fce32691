"""What a decision of an OpenVLA takes in memory, by its configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch

from robot_forgetting.policies.memory import decoder_block, vision_block
from robot_forgetting.policies.openvla.vision import TowerConfig
from robot_forgetting.policies.openvla.vla_model import OpenVLAConfig

PROMPT_TOKENS = 64  # more than a prompt has


def _tokens(config: OpenVLAConfig) -> int:
    return config.dino.num_patches + PROMPT_TOKENS + config.action_tokens


class Stack(NamedTuple):
    """blocks: how many; inside: bytes that a row keeps in one; between: numbers that it hands to the next."""

    blocks: int
    inside: int
    between: int


def _tower(tower: TowerConfig, product_bytes: int, trained: bool) -> Stack:
    if tower.channels:  # input, convolution, norm and activation of each layer; nothing is recomputed
        sides = [tower.image_size >> (layer + 1) for layer in range(len(tower.channels))]
        return Stack(1, 4 * 4 * sum(width * side**2 for width, side in zip(tower.channels, sides, strict=True)), 0)
    tokens, scaled = tower.num_patches + tower.num_prefix_tokens, trained and tower.layer_scale is not None
    inside = tokens * vision_block(tower.embed_dim, tower.mlp_hidden, product_bytes, scaled=scaled)
    return Stack(tower.depth - 1, inside, tokens * tower.embed_dim)


def training_row_bytes(
    config: OpenVLAConfig, weights: torch.dtype, products: torch.dtype, *, trained: bool, recompute: bool
) -> tuple[int, int]:
    """Bytes of activations that one row keeps for the backward pass, and bytes that it needs there besides.

    weights, products: dtypes; trained: full fine-tuning; recompute: gradient checkpointing
    """
    held, product_bytes = weights.itemsize, products.itemsize
    width, tokens = config.hidden_size, _tokens(config)
    block = tokens * decoder_block(width, config.intermediate_size, product_bytes, trained=trained)
    stacks = [Stack(config.num_layers, block, tokens * width)]
    stacks += [_tower(tower, product_bytes, trained) for tower in (config.dino, config.siglip)]
    kept = sum(
        stack.blocks * (held * stack.between if recompute and stack.between else stack.inside) for stack in stacks
    )
    features = config.dino.embed_dim + config.siglip.embed_dim
    projector = config.dino.num_patches * (features * (held + 9 * product_bytes) + 2 * width * product_bytes)
    last_norm = tokens * width * 4 * (1 + trained)
    return kept + projector + last_norm, max(stack.inside for stack in stacks) * 4 // 3


def acting_row_bytes(config: OpenVLAConfig, products: torch.dtype) -> int:
    """The KV cache of one row, and what one block computes."""
    width, tokens, size = config.hidden_size, _tokens(config), products.itemsize
    cache = 2 * config.num_layers * tokens * width * size
    return cache + tokens * decoder_block(width, config.intermediate_size, size, trained=False)
