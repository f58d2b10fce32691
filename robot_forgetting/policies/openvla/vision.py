"""OpenVLA's image side: the two vision transformers and the fused projector, in plain torch.

Tensor names are those of the published checkpoint (which inherits timm's), so that weights load name by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VIT_EPS = 1e-6


@dataclass(frozen=True)
class TowerConfig:
    """Dimensions of one vision tower.

    registers: number of register tokens; with ``class_token`` they precede the patches and get no position embedding
    layer_scale: initial LayerScale factor, or None for a tower without LayerScale
    channels: of a ``ConvolutionTower``'s layers; empty for a vision transformer
    attention_pool: whether the checkpoint carries SigLIP's pooling head (never computed: OpenVLA reads patches)
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    image_size: int
    mlp_hidden: int
    class_token: bool = False
    registers: int = 0
    layer_scale: float | None = None
    attention_pool: bool = False
    channels: tuple = ()

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.class_token) + self.registers


# DINOv2 with class token, four registers and LayerScale; SigLIP with an attention-pooling head in the checkpoint.
dinov2_tower = partial(TowerConfig, class_token=True, registers=4, layer_scale=1e-5)
siglip_tower = partial(TowerConfig, attention_pool=True)

DINOV2_LARGE = dinov2_tower(1024, 24, 16, 14, 224, 4096)
SIGLIP_SO400M = siglip_tower(1152, 27, 16, 14, 224, 4304)


class PatchEmbed(nn.Module):
    """Non-overlapping patches to vectors; weights are a convolution's, [embed_dim, 3, patch, patch]."""

    def __init__(self, patch_size: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, H, W] to [N, patches, embed_dim], patches row by row."""
        if type(self.proj) is not nn.Conv2d:  # an adapter, which computes itself
            return self.proj(pixels).flatten(2).transpose(1, 2)
        count, channels, height, width = pixels.shape
        patch = self.patch_size
        # A convolution without overlap is a matrix product; on CPU that is several times faster for small batches.
        pixels = pixels.reshape(count, channels, height // patch, patch, width // patch, patch)
        pixels = pixels.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, channels * patch * patch)
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        count, length, dim = x.shape
        qkv = self.qkv(x).view(count, length, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = F.scaled_dot_product_attention(query, key, value)
        return self.proj(x.transpose(1, 2).reshape(count, length, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    def __init__(self, dim: int, value: float):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.full((dim,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        dim, scale = config.embed_dim, config.layer_scale
        self.norm1 = nn.LayerNorm(dim, eps=VIT_EPS)
        self.attn = Attention(dim, config.num_heads)
        self.ls1 = nn.Identity() if scale is None else LayerScale(dim, scale)
        self.norm2 = nn.LayerNorm(dim, eps=VIT_EPS)
        self.mlp = Mlp(dim, config.mlp_hidden)
        self.ls2 = nn.Identity() if scale is None else LayerScale(dim, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class AttentionPool(nn.Module):
    """SigLIP's pooling head: held so that the published checkpoint loads and saves completely; never computed."""

    def __init__(self, dim: int, mlp_hidden: int):
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=VIT_EPS)
        self.mlp = Mlp(dim, mlp_hidden)


class VisionTower(nn.Module):
    """A vision transformer that returns the patches of its second-to-last block, before the final norm."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.config = config
        dim = config.embed_dim
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, dim))
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim, eps=VIT_EPS)
        if config.attention_pool:
            self.attn_pool = AttentionPool(dim, config.mlp_hidden)

    def forward(self, pixels: Tensor, recompute: bool = False) -> Tensor:
        """[N, 3, H, W] to [N, patches, embed_dim]; recompute: gradient checkpointing, block by block."""
        x = self.patch_embed(pixels) + self.pos_embed
        prefix = [token.expand(len(x), -1, -1) for token in self._prefix()]
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x[:, self.config.num_prefix_tokens :]

    def unused_parameters(self) -> list[nn.Parameter]:
        """Parameters that the checkpoint carries but no output depends on."""
        modules = [self.blocks[-1], self.norm] + ([self.attn_pool] if self.config.attention_pool else [])
        return [parameter for module in modules for parameter in module.parameters()]

    def _prefix(self) -> list[Tensor]:
        tokens = [self.cls_token] if self.config.class_token else []
        return tokens + ([self.reg_token] if self.config.registers else [])

    def initialise(self) -> None:
        """Weights for training from scratch: Xavier-uniform layers as in ViT, truncated normal embeddings."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patch = self.patch_embed.proj
        nn.init.trunc_normal_(patch.weight, std=1 / math.sqrt(patch.weight[0].numel()))
        nn.init.zeros_(patch.bias)
        for token in self._prefix():
            nn.init.trunc_normal_(token, std=0.02)
        start_places(self)


class ConvolutionTower(nn.Module):
    """Stride-2 convolutions in a tower's place, for policies small enough to be trained from scratch on a CPU.

    From scratch, patch transformers of this size needed nearly twice the decisions (docs/vision_towers.md). Not part of
    the published OpenVLA.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.config = config
        widths = [3, *config.channels]
        kernels = [5] + [3] * (len(config.channels) - 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2)
            for before, after, kernel in zip(widths, widths[1:], kernels, strict=False)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in config.channels)
        self.head = nn.Linear(config.channels[-1], config.embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_patches, config.embed_dim))

    def forward(self, pixels: Tensor, recompute: bool = False) -> Tensor:
        """[N, 3, H, W] to [N, patches, embed_dim]; there is little to recompute."""
        x = pixels.contiguous(memory_format=torch.channels_last)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.gelu(norm(convolution(x)))
        return self.head(x.flatten(2).transpose(1, 2)) + self.pos_embed

    def unused_parameters(self) -> list[nn.Parameter]:
        return []

    def initialise(self) -> None:
        """PyTorch's own initialisation of the layers; places as in the transformer."""
        start_places(self)


def tower(config: TowerConfig) -> nn.Module:
    """The module that a tower's configuration describes."""
    return ConvolutionTower(config) if config.channels else VisionTower(config)


@torch.no_grad()
def start_places(tower: nn.Module) -> None:
    """Position embeddings of sines and cosines of row and column: a start from which places are told apart at once."""
    grid, dim = tower.config.image_size // tower.config.patch_size, tower.config.embed_dim
    rows_and_columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    y, x = (place.flatten().float().unsqueeze(1) for place in rows_and_columns)
    frequency = torch.pi / 2 / grid * torch.arange(1, -(-dim // 4) + 1)
    waves = torch.cat([f(c * frequency) for c in (x, y) for f in (torch.sin, torch.cos)], dim=1)
    tower.pos_embed[0] = 0.5 * waves[:, :dim]


class VisionBackbone(nn.Module):
    """Both towers on the two halves of a six-channel picture; features joined channel-wise."""

    def __init__(self, dino: TowerConfig, siglip: TowerConfig):
        super().__init__()
        self.featurizer = tower(dino)
        self.fused_featurizer = tower(siglip)

    def forward(self, pixel_values: Tensor, recompute: bool = False) -> Tensor:
        """[N, 6, H, W] to [N, patches, dino + siglip]."""
        dino, siglip = pixel_values.split(3, dim=1)
        return torch.cat([self.featurizer(dino, recompute), self.fused_featurizer(siglip, recompute)], dim=-1)


class Projector(nn.Module):
    """Three layers with GELU between them; the first is four times the vision width."""

    def __init__(self, vision_dim: int, hidden_size: int):
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_size)
        self.fc3 = nn.Linear(hidden_size, hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(features)))))

    def initialise(self) -> None:
        for layer in (self.fc1, self.fc2, self.fc3):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
