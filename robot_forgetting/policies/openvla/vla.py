"""OpenVLA as a policy: pictures and an instruction in, seven action tokens out; 7B and nano are one class."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from robot_forgetting.errors import UserError
from robot_forgetting.machine.device import parse_device, parse_precision
from robot_forgetting.policies import lora as adapters
from robot_forgetting.policies.memory import rows_that_fit
from robot_forgetting.policies.openvla import vla_checkpoint as openvla_checkpoint
from robot_forgetting.policies.openvla.processor import ActionBins, ImageProcessor, Statistics
from robot_forgetting.policies.openvla.prompt_tokenizer import PromptTokenizer, train_small_tokenizer
from robot_forgetting.policies.openvla.row_memory import acting_row_bytes, training_row_bytes
from robot_forgetting.policies.openvla.vision import dinov2_tower, siglip_tower
from robot_forgetting.policies.openvla.vla_checkpoint import Checkpoint
from robot_forgetting.policies.openvla.vla_model import OpenVLAConfig, OpenVLAModel
from robot_forgetting.policies.own_base import OwnBase
from robot_forgetting.policy import Action, ConventionSpec
from robot_forgetting.ranges import ArgumentsOf, Pixels, Plain, Range, Width

LARGEST_COPY_BYTES = 2 * 10**9
PANDA_STATISTICS = {"maniskill_panda": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 7}}}


class OpenVLAPolicy(OwnBase):
    """A VLA whose action vocabulary is its 256 action bins (bin 0 is the lowest command value) and T = 7.

    checkpoint: a Hub id or a folder in the published layout (or what ``openvla_checkpoint.load`` returns)
    statistics: key of the ranges that are used whatever a task names; null: those that the task names, or the only ones
        there are
    add_statistics: further ranges, as in dataset_statistics.json: those of tasks that the checkpoint never saw
    dtype: float32; mixed: weights in float32, products in bfloat16; bfloat16, float16: to evaluate, or to fine-tune by
        LoRA (adapters are float32)
    device: auto, cpu, cuda, cuda:1 ...
    lora: null for full fine-tuning, or {rank, alpha, targets}; see ``lora.add``
    keep_base: whether full fine-tuning keeps a copy of the base weights for ``base()``; null: up to 2 GB
    action_mode, rotation, gripper, control_hz: what the checkpoint's actions mean, compared with the task's
    check_images: refuse a checkpoint that gives the same actions for a black and a white picture
    """

    declares = ConventionSpec(action_mode="delta")
    layers_read = "image"

    def __init__(
        self,
        checkpoint: str | Checkpoint,
        *,
        name: str = "openvla",
        statistics: str | None = None,
        add_statistics: dict[str, Plain] | None = None,
        dtype: str = "float32",
        device: str = "auto",
        lora: Annotated[dict, ArgumentsOf(adapters.add)] | None = None,
        keep_base: bool | None = None,
        action_mode: str | None = "delta",
        rotation: str | None = None,
        gripper: str | None = None,
        control_hz: Annotated[float, Range(0.01, 10_000)] | None = None,
        gradient_checkpointing: bool = False,
        check_images: bool = True,
    ):
        precision = self._precision = parse_precision(dtype)
        super().__init__(name, lora, products=precision.products)
        place = parse_device(device)
        if not isinstance(checkpoint, Checkpoint):
            checkpoint = openvla_checkpoint.load(checkpoint, dtype=precision.weights, device=place)
        self.source, self.tokenizer = checkpoint.source, checkpoint.tokenizer
        self.model: OpenVLAModel = checkpoint.model.to(place, precision.weights).eval()
        self.model.products = precision.products
        self.blocks = len(self.layers()) - 1
        config = checkpoint.model.config
        if add_statistics:
            config = checkpoint.model.config = replace(config, norm_stats={**config.norm_stats, **add_statistics})
        self.config = config
        self.model.gradient_checkpointing = gradient_checkpointing
        self.statistics = Statistics(config.norm_stats)
        if statistics is not None:
            self.statistics.dimensions(statistics)  # an unknown key lists the choices
        self.chosen = statistics
        self.settings |= {"statistics": statistics}
        self._prompts = PromptTokenizer(self.tokenizer, config.pad_token_id)
        self._pictures = ImageProcessor(config.image_size, config.image_resize_strategy, config.means, config.stds)
        self._bins = ActionBins(config.action_bins)
        self._spec = dict(action_mode=action_mode, rotation=rotation, gripper=gripper, control_hz=control_hz)
        if check_images:
            self.check_sees()
        self._choose_trained()
        size = sum(p.numel() * p.element_size() for p in self.trainable_parameters())
        wanted = lora is None and (keep_base or (keep_base is None and size <= LARGEST_COPY_BYTES))
        if wanted or self.continues:
            self._keep_base()

    # ---- Policy

    @torch.no_grad()
    def act(self, obs: dict, *, temperature: float = 1.0, noise: Tensor | None = None) -> Action:
        self._check_columns(obs)
        count, tokens = len(obs["instruction"]), self.config.action_tokens
        if temperature and noise is None:
            noise = torch.rand(count, tokens)
        if parts := self._parts(count):
            drawn = [None if noise is None else noise[part] for part in parts]
            pairs = zip(parts, drawn, strict=True)
            return Action.cat([self.act(take_rows(obs, p), temperature=temperature, noise=some) for p, some in pairs])
        ids, mask, pixels = self._inputs(obs)
        if temperature:
            noise = noise[:, :tokens].to(self.device)
        with self._products():
            bins, log_prob = self.model.generate_actions(ids, mask, pixels, temperature=temperature, noise=noise)
        return Action(bins, torch.ones_like(bins, dtype=torch.bool), log_prob)

    def logits(self, obs: dict, action: Action) -> Tensor:
        if not torch.is_grad_enabled() and (parts := self._parts(len(action))):
            return torch.cat([self.logits(take_rows(obs, part), action[part]) for part in parts])
        ids, mask, pixels = self._inputs(obs)
        with self._products():
            return self.model.action_logits(ids, mask, pixels, action.tokens.to(self.device))

    def decode(self, action: Action, *, statistics: str | None = None) -> np.ndarray:
        """Commands in the task's units, [N, 7] float32."""
        values = self._bins.decode(action.tokens.cpu().numpy())
        return self.statistics.unnormalise(values, self._key(statistics)).astype(np.float32)

    def encode(self, commands, *, statistics: str | None = None) -> Action:
        commands, key = np.asarray(commands, dtype=np.float64), self._key(statistics)
        if commands.ndim != 2 or commands.shape[1] != self.statistics.dimensions(key):
            raise UserError(
                f"commands must be [N, {self.statistics.dimensions(key)}]; these are {list(commands.shape)}"
            )
        bins = torch.from_numpy(self._bins.encode(self.statistics.normalise(commands, key)))
        return Action(bins, torch.ones_like(bins, dtype=torch.bool))

    def convention(self) -> ConventionSpec:
        key = self.chosen or self.statistics.only_key()
        dimensions = self.statistics.dimensions(key) if key else self.config.action_tokens
        # Chosen ones go with any task: that is what choosing them says.
        return ConventionSpec(
            action_dimensions=dimensions, statistics=None if self.chosen else self.statistics.only_key(), **self._spec
        )

    def rows_at_once(self, *, gradients: int = 0, most: int | None = None) -> int:
        reserved, products = self._autocast_bytes(), self._precision.products or self._precision.weights
        row = acting_row_bytes(self.config, products)
        if gradients:
            reserved += 12 * sum(parameter.numel() for parameter in self.trainable_parameters())
            dtypes, recompute = (self._precision.weights, products), self.model.gradient_checkpointing
            kept, once = training_row_bytes(self.config, *dtypes, trained=self.lora is None, recompute=recompute)
            row = gradients * kept + once
        return rows_that_fit(row, most or self.most_rows, self.device, reserved)

    def _parts(self, count: int) -> list[slice]:
        """The rows of a batch without gradients in parts for which there is memory; empty where all fit."""
        rows = self.rows_at_once(most=count)
        return [slice(start, start + rows) for start in range(0, count, rows)] if rows < count else []

    @torch.no_grad()
    def hidden_states(self, obs: dict) -> Tensor:
        """Means over the positions of prompt and picture but the first, on which attention rests."""
        if parts := self._parts(len(obs["instruction"])):
            return torch.cat([self.hidden_states(take_rows(obs, part)) for part in parts], 1)
        with self._products():
            return self.model.layer_states(*self._inputs(obs)).cpu()

    def layers(self) -> list[nn.Module]:
        return self.model.layers()

    # ---- beyond Policy

    def check_sees(self) -> None:
        """``UserError`` unless a black and a white picture give different action logits."""
        size = self.config.image_size
        images = np.stack([np.zeros((size, size, 3), np.uint8), np.full((size, size, 3), 255, np.uint8)])
        obs = {"image": images, "instruction": ["pick up the cube"] * 2}
        tokens = torch.full((2, self.config.action_tokens), self.config.action_bins // 2)
        with torch.no_grad():
            black, white = self.logits(obs, Action(tokens, tokens >= 0))
        if not (torch.isfinite(black).all() and torch.isfinite(white).all()):
            raise UserError(
                f"policy '{self.name}' ({self.source}) computes logits that are not finite; its weights are broken"
            )
        if torch.allclose(black, white, rtol=1e-5, atol=1e-6):
            raise UserError(
                f"policy '{self.name}' ({self.source}) gives the same action logits for a black and a white picture: "
                "it does not see; its vision towers or projector are not trained, or not loaded"
            )

    def set_statistics(self, norm_stats: dict) -> None:
        """Replaces the ranges by which commands are normalised; for pre-training, which measures them."""
        self.statistics = Statistics(norm_stats)
        self.chosen = None
        self.config = self.model.config = replace(self.config, norm_stats=norm_stats)

    def save(self, folder) -> None:
        """Writes the whole policy in the published layout, or with LoRA the adapter alone in peft's."""
        if self.lora is not None:
            adapters.save(folder, self.model, base=self.source)
        else:
            openvla_checkpoint.save(folder, self.model, self.tokenizer)

    def _inputs(self, obs: dict) -> tuple[Tensor, Tensor | None, Tensor]:
        self._check_columns(obs)
        device, weight = self.device, self.model.projector.fc1.weight
        pixels = self._pictures(obs["image"], device, weight.dtype)
        ids, mask = self._prompts(obs["instruction"])
        if len(ids) != len(pixels):
            raise UserError(f"{len(pixels)} pictures but {len(ids)} instructions in one observation batch")
        return ids.to(device), None if mask is None else mask.to(device), pixels

    def _check_columns(self, obs: dict) -> None:
        for column in ("image", "instruction"):
            if column not in obs:
                raise UserError(
                    f"policy '{self.name}' needs observations with '{column}'; this task gives {sorted(obs)}"
                )

    def _key(self, statistics: str | None) -> str:
        key = self.chosen or statistics or self.statistics.only_key()
        if key is None:
            raise UserError(
                f"policy '{self.name}' has several statistics; give policy.statistics=, one of: "
                + ", ".join(self.statistics.keys)
            )
        return key


def take_rows(obs: dict, rows: slice) -> dict:
    return {key: column[rows] for key, column in obs.items()}


def new_nano(
    *,
    name: str = "openvla-nano",
    image_size: Pixels = 64,
    patch_size: Width = 16,
    dino_dim: Width = 128,
    dino_depth: Width = 5,
    dino_channels: list[Width] | None = None,
    registers: Annotated[int, Range(0, 1024)] = 4,
    siglip_dim: Width = 128,
    siglip_depth: Width = 5,
    vision_heads: Width = 4,
    mlp_ratio: Annotated[float, Range(0.1, 100)] = 4.0,
    hidden_size: Width = 128,
    num_layers: Width = 3,
    num_heads: Width = 4,
    intermediate_size: Width = 352,
    text_tokens: Annotated[int, Range(257, 1_000_000)] = 768,
    instructions: list[str] | None = None,
    norm_stats: dict[str, Plain] | None = None,
    **options: Annotated[Any, ArgumentsOf(OpenVLAPolicy)],
) -> OpenVLAPolicy:
    """A small OpenVLA with random weights (torch's generator) and a tokenizer of its own, for training from scratch.

    Depths count the last block, which is stored but, as in OpenVLA, never computed.
    dino_channels: widths of a ``ConvolutionTower`` (one stride-2 layer each) in the place of the DINOv2 tower
    options: the keyword arguments of ``OpenVLAPolicy``
    """
    bins, padding = 256, 64
    vocabulary = text_tokens + bins
    dino_mlp, siglip_mlp = int(dino_dim * mlp_ratio), int(siglip_dim * mlp_ratio)
    config = OpenVLAConfig(
        dino=dinov2_tower(dino_dim, dino_depth, vision_heads, patch_size, image_size, dino_mlp,
                          registers=registers, layer_scale=1.0, channels=tuple(dino_channels or ())),
        siglip=siglip_tower(siglip_dim, siglip_depth, vision_heads, patch_size, image_size, siglip_mlp,
                            attention_pool=False),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocabulary + padding,
        pad_to_multiple_of=padding,
        pad_token_id=vocabulary,
        action_bins=bins,
        norm_stats=norm_stats or PANDA_STATISTICS,
    )  # fmt: skip
    model = OpenVLAModel(config)
    model.initialise()
    tokenizer = train_small_tokenizer(instructions or [], text_tokens=text_tokens, action_bins=bins)
    return OpenVLAPolicy(Checkpoint(model, tokenizer), name=name, **options)


new_nano.declares = OpenVLAPolicy.declares
