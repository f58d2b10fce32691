"""Where a policy computes, and in which precision."""

from __future__ import annotations

from typing import NamedTuple

import torch

from robot_forgetting.errors import UserError, unknown


def parse_device(device: str) -> torch.device:
    """``auto`` (a GPU where torch finds one), ``cpu``, ``cuda`` or ``cuda:1``; ``UserError`` for what is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device '{device}'; use auto, cpu, cuda or cuda:1") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch finds no usable CUDA GPU; use device=cpu, or install a CUDA torch")
    return place


class Precision(NamedTuple):
    """weights: as they are held; products: in which matrices are multiplied (autocast), None for the weights' own."""

    weights: torch.dtype
    products: torch.dtype | None


PRECISIONS = {
    "float32": Precision(torch.float32, None),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
    "float16": Precision(torch.float16, torch.float16),
    "mixed": Precision(torch.float32, torch.bfloat16),
}


def parse_precision(name: str) -> Precision:
    if name not in PRECISIONS:
        raise unknown("dtype", name, PRECISIONS)
    return PRECISIONS[name]
