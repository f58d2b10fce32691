"""How many rows a device has room for: what a row takes by a model's dimensions, and what is free."""

from __future__ import annotations

from pathlib import Path

import torch

# Rows that take less than this together are computed at once, whatever else fills the machine: small models give the
# same numbers everywhere.
SMALL_BYTES = 4 * 10**9
SHARE = 0.8  # of the free memory; the rest is for what is not counted, and for fragments


def decoder_block(width: int, mlp_width: int, product_bytes: int, *, trained: bool) -> int:
    """Bytes a token that a Llama block keeps for the backward pass.

    Two norms keep their input in float32, and where their scale is trained what it multiplies; products keep what they
    multiply: the norms' outputs, queries, keys, values and the attention's output, gate, up, the activation of gate and
    its product with up.
    """
    return width * (2 * 4 * (1 + trained) + 6 * product_bytes) + 4 * mlp_width * product_bytes


def vision_block(width: int, mlp_width: int, product_bytes: int, *, scaled: bool) -> int:
    """The same of a vision transformer's block; scaled: whether it has LayerScale factors that are trained."""
    return width * (2 * 4 + (6 + 2 * scaled) * product_bytes) + 2 * mlp_width * product_bytes


def free_bytes(device: torch.device) -> int | None:
    """What a process can still allocate there; None where that is not known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def rows_that_fit(row_bytes: int, most: int, device: torch.device, reserved: int = 0) -> int:
    """``most``, or the power of two below it that fits beside ``reserved`` bytes; at least one.

    Powers of two, so that a little more or less free memory does not change how a batch is divided.
    """
    if row_bytes * most <= SMALL_BYTES or (free := free_bytes(device)) is None:
        return most
    fit = int(SHARE * (free - reserved)) // row_bytes
    return most if fit >= most else 1 << max(0, fit.bit_length() - 1) if fit > 0 else 1
