"""How a training step aligns with a gradient: is a step on the new task also one that raises the prior tasks' loss?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from robot_forgetting.errors import UserError


def cosine(update: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> Tensor:
    """<u, g> / (|u| |g|) over all tensors as one vector, [] float64 between -1 and 1; 0 where either is 0.

    update: weights after minus before a step; gradient: of a loss at the weights before. RL's Razor C.3: the gradient
    of the prior task's loss; +1 is a step straight up that loss, towards forgetting.
    """
    if odd := sorted(update.keys() ^ gradient.keys()):
        raise UserError(f"update and gradient differ in names ({', '.join(odd[:3])}); take both from one policy")
    sums = []
    for name, step in update.items():
        slope = gradient[name]
        if slope.shape != step.shape:
            raise UserError(f"{name} is {tuple(step.shape)} in the update and {tuple(slope.shape)} in the gradient")
        step, slope = (t if t.dtype == torch.float64 else t.float() for t in (step, slope))
        sums.append(torch.stack([one.sum().double() for one in (step * slope, step.square(), slope.square())]))
    product, updates, gradients = torch.stack(sums).sum(0)
    length = (updates * gradients).sqrt()
    return torch.where(length > 0, product / torch.where(length > 0, length, 1.0), 0.0).clamp(-1, 1)
