"""Weights that are no numbers any more are no result: they are refused wherever they arise, or would be used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from robot_forgetting.errors import Diverged
from robot_forgetting.policy import Action, Policy


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether there is neither nan nor inf in any tensor, nor numbers so large that their sum is infinite.

    A sum carries both and reads each number once: 1 ms of the small OpenVLA, 0.2 % of a step of 64 rows.
    """
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    wide = [torch.float64 if tensor.dtype == torch.float64 else torch.float32 for tensor in floating]
    sums = [tensor.sum(dtype=dtype) for tensor, dtype in zip(floating, wide, strict=True)]
    if not sums:
        return True
    return bool(torch.stack([one.to(sums[0].device, torch.float64) for one in sums]).isfinite().all())


def check_finite(tensors: Mapping[str, Tensor], what: str, fix: str) -> None:
    """``Diverged``, which names the first tensor with nan or inf."""
    if not are_finite(tensors.values()):
        name = next(name for name, tensor in tensors.items() if not are_finite([tensor]))
        raise Diverged(f"{what} holds numbers that are none (nan or inf in {name}); {fix}")


def misfits(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> list[str]:
    """What is missing, unexpected or misshapen among tensors that were read, a line each; name -> shape."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    both = [(name, list(found[name]), list(shape)) for name, shape in expected.items() if name in found]
    return problems + [f"{name} has shape {one} instead of {other}" for name, one, other in both if one != other]


def check_weights(policy: Policy) -> None:
    """``Diverged`` where a policy that is to be measured cannot be."""
    fix = "its training diverged, or its file is broken: take other weights"
    check_finite(dict(policy.named_parameters()), f"policy '{policy.name}'", fix)


def check_probabilities(policy: Policy, action: Action) -> None:
    """The same for what a policy computes: finite weights can be so large that their products are not."""
    if any(n is not None and n.isnan().any() for n in (action.log_prob, action.values)):
        what = "probabilities" if action.values is None else "actions"
        raise Diverged(
            f"policy '{policy.name}' computes {what} that are no numbers; its weights are too large or broken "
            "(while training: lower method.optimiser.learning_rate)"
        )
