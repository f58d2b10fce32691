"""Policies that can act as their own base: with new adapters off, or with the weights that they started from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from robot_forgetting.errors import UserError
from robot_forgetting.policies import lora as adapters
from robot_forgetting.policies.memory import free_bytes
from robot_forgetting.policy import Action, Policy

LORA = "'policy.lora={rank: 32, alpha: 16, targets: null}'"


class OwnBase(Policy):
    """Subclasses set ``model``, choose what is trained, and keep the weights to come back to: without LoRA those of the
    model, with adapters that were trained before (``lora["adapter"]``) theirs, and none with new adapters.

    lora: null for full fine-tuning, or {rank, alpha, targets} of ``lora.add``
    products: the dtype of matrix products under autocast; None: the weights' own
    """

    model: nn.Module

    def __init__(self, name: str, lora: dict | None, products: torch.dtype | None = None):
        super().__init__()
        self.name, self.lora, self._product_dtype = name, lora, products
        # What changes its decisions besides weights, convention and ``config``: part of a run's fingerprint.
        self.settings = {"products": str(products)}
        self._in_base = False
        self._base_weights: list[Tensor] | None = None
        self.continues = bool(lora and lora.get("adapter"))  # whether its adapters were trained before

    @abstractmethod
    def layers(self) -> list[nn.Module]:
        """The embedding, then the blocks one above the other, as ``hidden_states`` numbers them."""

    @torch.no_grad()
    def layer_weights(self) -> Iterator[tuple[int | None, dict[str, Tensor], dict[str, Tensor]]]:
        """(layer, base weights, own weights): the embedding (0), each block (1 ...), and what is left (None).

        Of what is computed. What an adapter adds is merged into a float32 copy, one layer's at a time.
        """
        base: dict[int, Tensor] = {}
        if self.lora is None:
            self._check_base()
            base = dict(zip(map(id, self.trainable_parameters()), self._base_weights, strict=True))
        adapted = {id(layer.get_base_layer().weight): layer for layer in self._adapted()}
        seen = set(map(id, getattr(self.model, "unused_parameters", list)()))

        def merged(own: Tensor, layer: BaseTunerLayer) -> Tensor:
            return own.float() + layer.get_delta_weight(adapters.ADAPTER).float()

        def pair(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
            before, after = {}, {}
            for name, parameter in module.named_parameters():
                if id(parameter) in seen or f".{adapters.ADAPTER}." in name:
                    continue
                seen.add(id(parameter))
                own = parameter.detach()
                before[name], after[name] = base.get(id(parameter), own), own
                if (layer := adapted.get(id(parameter))) is not None:
                    after[name] = merged(own, layer)
                    if self.continues:  # the base has adapters too
                        with self._swapped():
                            before[name] = merged(own, layer)
            return before, after

        for number, module in enumerate(self.layers()):
            yield number, *pair(module)
        rest = pair(self.model)
        if rest[0]:
            yield None, *rest

    def base_slopes(self, obs: dict, action: Action) -> Iterator[tuple[Tensor, Tensor]]:
        adapted, change = self._adapted(), self._added
        weights = [layer.get_base_layer().weight for layer in adapted] if adapted else self.trainable_parameters()
        held = [weight.requires_grad for weight in weights]
        own = [change(layer) for layer in adapted] if adapted else [weight.data for weight in weights]
        try:
            with self.base(), torch.enable_grad():
                for weight in weights:
                    weight.requires_grad_(True)
                found = torch.autograd.grad(self.log_prob(obs, action).sum(), weights, allow_unused=True)
                if adapted:  # the gradient by W is that by W + s B A
                    before = [change(layer) if self.continues else torch.zeros_like(o)
                              for layer, o in zip(adapted, own, strict=True)]  # fmt: skip
                else:
                    before = [weight.data for weight in weights]
        finally:
            for weight, needed in zip(weights, held, strict=True):
                weight.requires_grad_(needed)
        for slope, now, then in zip(found, own, before, strict=True):
            if slope is not None:
                yield slope, now.float() - then.float()

    def _adapted(self) -> list[BaseTunerLayer]:
        return [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    @staticmethod
    @torch.no_grad()
    def _added(layer: BaseTunerLayer) -> Tensor:
        return layer.get_delta_weight(adapters.ADAPTER).float()

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _choose_trained(self) -> None:
        """LoRA's adapters, or every parameter that is computed."""
        if self.lora is not None:
            adapters.add(self.model, **self.lora)
            if self._product_dtype is not None:  # autocast converts, to what the product needs
                adapters.without_casts(self.model)
            return
        unused = set(map(id, getattr(self.model, "unused_parameters", list)()))
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) not in unused)

    def keep_as_base(self) -> None:
        self.continues = self.lora is not None
        if self.continues or self._base_weights is not None:  # else: a large policy that keeps no copy
            self._keep_base()

    def _products(self) -> AbstractContextManager:
        """Inside, matrices are multiplied in the dtype chosen for products, whatever the weights are held in."""
        dtype = self._product_dtype
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def check_training(self, *, compared: bool = True) -> None:
        """``UserError`` for weights in half precision, no copy of the base to come back to, or too little memory."""
        weights = self.trainable_parameters()
        if any(parameter.dtype.itemsize < 4 for parameter in weights):
            raise UserError(
                f"policy '{self.name}' would lose small updates: its trained weights are held in "
                f"{str(weights[0].dtype).removeprefix('torch.')}; use {LORA}, or policy.dtype=mixed"
            )
        if self._product_dtype == torch.float16:
            raise UserError(f"policy '{self.name}' would lose small gradients in float16; use policy.dtype=bfloat16")
        count, copied = sum(p.numel() for p in weights), compared and self._base_weights is None and self.lora is None
        parts = {"gradients": 4 * count, "Adam's moments": 8 * count, "a copy of the base": 4 * count * copied}
        parts["products' copies"] = self._autocast_bytes()
        self._check_room(f"fine-tuning policy '{self.name}'", {what: size for what, size in parts.items() if size})
        if copied:
            self._check_base()

    def _autocast_bytes(self) -> int:
        """What autocast keeps of trained weights while it computes."""
        if self._product_dtype is None:
            return 0
        held = sum(parameter.numel() for parameter in self.trainable_parameters() if parameter.dtype == torch.float32)
        return held * self._product_dtype.itemsize

    def _check_room(self, what: str, parts: dict[str, int]) -> None:
        needed, free = sum(parts.values()), free_bytes(self.device)
        if free is not None and needed > free:
            listed = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in parts.items())
            raise UserError(
                f"{what} needs {needed / 1e9:.1f} GB besides its weights ({listed}), and {self.device} has "
                f"{free / 1e9:.1f} GB free; use {'a smaller policy.lora.rank' if self.lora else LORA}"
            )

    def _keep_base(self) -> None:
        size = sum(p.numel() * p.element_size() for p in self.trainable_parameters())
        self._check_room(f"keeping the base of policy '{self.name}'", {"a copy of the weights": size})
        self._base_weights = [parameter.detach().clone() for parameter in self.trainable_parameters()]

    def _frozen_tensors(self) -> list[Tensor]:
        return super()._frozen_tensors() + (self._base_weights or [])

    @contextmanager
    def base(self) -> Iterator[None]:
        if self._in_base:
            yield
            return
        self._in_base = True
        try:
            fresh = self.lora is not None and not self.continues
            with torch.no_grad(), adapters.disabled(self.model) if fresh else self._swapped():
                yield
        finally:
            self._in_base = False

    def _check_base(self) -> None:
        if self._base_weights is None:
            raise UserError(
                f"policy '{self.name}' keeps no copy of its base weights; use {LORA}, or policy.keep_base=true"
            )

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._check_base()
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchanges trainable weights and the base's by pointer; nothing is copied, and twice is the identity."""
        for index, parameter in enumerate(self.trainable_parameters()):
            parameter.data, self._base_weights[index] = self._base_weights[index], parameter.data
