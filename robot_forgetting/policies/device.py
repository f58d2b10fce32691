"""Where a policy computes."""

from __future__ import annotations

import torch

from robot_forgetting.errors import UserError


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
