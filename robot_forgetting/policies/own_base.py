"""Policies that can act as their own base: with new adapters off, or with the weights that they started from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robot_forgetting.errors import UserError
from robot_forgetting.policies import lora as adapters
from robot_forgetting.policy import Policy


class OwnBase(Policy):
    """Subclasses set ``model``, choose what is trained, and keep the weights to come back to: without LoRA those of the
    model, with adapters that were trained before (``lora["adapter"]``) theirs, and none with new adapters.

    lora: null for full fine-tuning, or {rank, alpha, targets} of ``lora.add``
    """

    model: nn.Module

    def __init__(self, name: str, lora: dict | None):
        super().__init__()
        self.name, self.lora = name, lora
        self._in_base = False
        self._base_weights: list[Tensor] | None = None
        self.continues = bool(lora and lora.get("adapter"))  # whether its adapters were trained before

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _choose_trained(self) -> None:
        """LoRA's adapters, or every parameter that is computed."""
        if self.lora is not None:
            adapters.add(self.model, **self.lora)
            return
        unused = set(map(id, getattr(self.model, "unused_parameters", list)()))
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) not in unused)

    def keep_as_base(self) -> None:
        self.continues = self.lora is not None
        if self.continues or self._base_weights is not None:  # else: a large policy that keeps no copy
            self._keep_base()

    def _keep_base(self) -> None:
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
                f"policy '{self.name}' keeps no copy of its base weights; use policy.lora or policy.keep_base=true"
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
