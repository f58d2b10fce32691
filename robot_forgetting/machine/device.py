"""Where a policy computes, and in which precision."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from typing import NamedTuple

import torch

from robot_forgetting.errors import UserError, check_choice
from robot_forgetting.machine import nvidia


def parse_device(device: str) -> torch.device:
    """``auto`` (a GPU where torch finds one), ``cpu``, ``cuda`` or ``cuda:1``; ``UserError`` for what is not there.

    ``auto`` on a machine with an NVIDIA GPU that torch cannot use says so, once, on stderr.
    """
    reason = "" if device == "cpu" else unusable_gpu()
    if device == "auto":
        if reason:
            _say_once(f"computing on the CPU, although there is a GPU: {reason}")
        device = "cuda" if torch.cuda.is_available() and not reason else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"unknown device '{device}'; use auto, cpu, cuda or cuda:1") from error
    if place.type == "cuda" and reason:
        raise UserError(f"device={device}, but torch cannot use the GPU: {reason}")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device}, but torch finds no usable CUDA GPU; use device=cpu, or install a CUDA torch")
    # With its number, as tensors have it.
    return torch.device("cuda", torch.cuda.current_device()) if place == torch.device("cuda") else place


@functools.cache
def unusable_gpu() -> str:
    """Why torch cannot use this machine's NVIDIA GPU, and what to type; "" where it can, or there is none to see.

    A GPU for which torch's build has no code counts as unusable too: torch calls it available, and then fails.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in ("", "-1"):
        return ""
    with warnings.catch_warnings(record=True) as caught:  # torch's own words about an old driver are a paragraph
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    found, compiled = nvidia.gpus(), torch.cuda.get_arch_list() if usable and torch.version.cuda else []
    capabilities = [gpu.capability for gpu in found if gpu.capability]
    coded = not compiled or any(nvidia.has_kernels(capability, compiled) for capability in capabilities)
    if not found or (usable and (coded or not capabilities)):
        return ""
    said = "; ".join(" ".join(str(warning.message).split()) for warning in caught)
    return nvidia.mismatch(found, torch.__version__, torch.version.cuda) or (
        f"{nvidia.described(found)}; torch {torch.__version__} "
        + ("has no code for it" if usable else f"says: {said or 'no GPU'}")
        + (f" (CUDA_VISIBLE_DEVICES={visible})" if visible else "")
    )


@functools.cache
def _say_once(text: str) -> None:
    print(f"robot-forgetting: {text}", file=sys.stderr, flush=True)


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
    check_choice("dtype", name, PRECISIONS)
    return PRECISIONS[name]
