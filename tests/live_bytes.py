"""Bytes that are alive while a model computes on fake tensors, which have shapes and dtypes and no numbers."""

from __future__ import annotations

import weakref

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """now, peak: bytes of the storages that were made inside and are still held."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet(parameter.untyped_storage() for parameter in model.parameters())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._count(storage.nbytes())
                weakref.finalize(storage, self._count, -storage.nbytes())
        return out

    def _count(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def without_numbers(model: nn.Module) -> nn.Module:
    """A model on the meta device with parameters and buffers of the fake mode that is active, on its CPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model
