"""How far weights and activations moved from the base policy.

Weights are named tensors. Differences are taken in float32, or wider where a tensor is wider. The change of all weights
is seen as one vector for L1 and L2, and as one block-diagonal operator, a block per matrix, for the spectral norm. A
tensor of more than two dimensions (a convolution) is a matrix [first, all others]; vectors (biases, norm scales) are no
matrices and count in L1, L2, Fisher and sparsity only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from robot_forgetting.errors import UserError

Weights = Mapping[str, Tensor]

TOLERANCE = 1e-5  # Mukherjee et al. 2505.11711: bf16 values that differ by no more are "the same"


def changes(base: Weights, fine_tuned: Weights) -> Iterator[tuple[str, Tensor]]:
    """Fine-tuned minus base of every tensor by name, one at a time to keep memory low.

    UserError where names or shapes do not belong together.
    """
    _same_names(base, fine_tuned, "the fine-tuned weights")
    for name, before in base.items():
        after = fine_tuned[name]
        if before.shape != after.shape:
            raise UserError(
                f"{name} is {tuple(before.shape)} in the base and {tuple(after.shape)} after training; "
                "compare policies of one architecture"
            )
        yield name, _wide(after) - _wide(before)


# Sums stay in the width of the difference within a tensor (torch sums pairwise, 1e-6) and are float64 across tensors.
def weight_l1(base: Weights, fine_tuned: Weights) -> Tensor:
    """sum_i |w_i - w0_i| over all weights, [] float64."""
    return _total(change.abs().sum() for _, change in changes(base, fine_tuned))


def weight_l2(base: Weights, fine_tuned: Weights) -> Tensor:
    """sqrt(sum_i (w_i - w0_i)^2) over all weights, [] float64."""
    return _total(change.square().sum() for _, change in changes(base, fine_tuned)).sqrt()


def weight_size(weights: Weights) -> Tensor:
    """sum_i |w_i| over all weights, [] float64: what ``weight_l1`` is to be compared with."""
    return _total(_wide(weight).abs().sum() for weight in weights.values())


def weight_norm(weights: Weights) -> Tensor:
    """sqrt(sum_i w_i^2) over all weights, [] float64: what ``weight_l2`` is to be compared with."""
    return _total(_wide(weight).square().sum() for weight in weights.values()).sqrt()


def weight_fisher_l2(base: Weights, fine_tuned: Weights, fisher: Weights) -> Tensor:
    """sqrt(sum_i F_i (w_i - w0_i)^2) with the diagonal Fisher F of the base policy, [] float64.

    Half the square is the second-order estimate, in nats per input, of the KL over the inputs that F is an expectation
    over (RL's Razor: those of the prior task). Whether the paper takes the root is not said.
    """
    _same_names(base, fisher, "the Fisher")
    return _total((change.square() * _wide(fisher[name])).sum() for name, change in changes(base, fine_tuned)).sqrt()


def sparsity(
    base: Weights, fine_tuned: Weights, *, tolerance: float = TOLERANCE, dtype: torch.dtype | None = None
) -> Tensor:
    """Fraction of all weights with |w - w0| <= tolerance, [] float64 between 0 and 1.

    dtype: round both to it first. Mukherjee et al. 2505.11711 compare checkpoints in bfloat16 with tolerance 1e-5. A
    bf16 number has 8 significant bits, so that a weight of 0.03 moves in steps of 1e-4 and smaller updates vanish: RL's
    Razor section 6 explains the sparsity by that. tolerance=0 without dtype counts what did not move at all.
    """
    if dtype is not None:
        base, fine_tuned = ({name: w.to(dtype) for name, w in side.items()} for side in (base, fine_tuned))
    still = _total((change.abs() <= tolerance).sum() for _, change in changes(base, fine_tuned))
    return still / sum(weight.numel() for weight in base.values())


def spectral_norms(base: Weights, fine_tuned: Weights) -> dict[str, Tensor]:
    """Largest singular value of the change of each matrix, {name: [] float64}, exact to float32.

    RL's Razor does not say how it combines the matrices. Their largest is the spectral norm of the block-diagonal
    operator whose Frobenius norm is ``weight_l2`` (biases aside), so that the two are norms of one thing. UserError
    where the change of a matrix is not finite, or so large that its square is not.
    """
    found = _matrices(base, fine_tuned)
    return {name: _eigenvalues(name, _gram(matrix))[-1].clamp_min(0).sqrt().double() for name, matrix in found}


def numerical_rank(values: Tensor, relative_tolerance: float) -> Tensor:
    """Number of singular values [..., K] above relative_tolerance times the largest, [...]; 0 for no change at all."""
    largest = values.amax(-1, keepdim=True)
    return ((values > relative_tolerance * largest) & (largest > 0)).sum(-1)


def effective_rank(values: Tensor) -> Tensor:
    """exp(-sum_k p_k log p_k) with p = singular values / their sum, [..., K] to [...]; 0 for no change at all.

    Roy and Vetterli, "The effective rank", 2007: between 1 and K, with no threshold to choose.
    """
    total = values.sum(-1, keepdim=True)
    share = values / torch.where(total > 0, total, 1.0)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def ranks(base: Weights, fine_tuned: Weights) -> dict[str, Tensor]:
    """{"weight_rank": numerical, "weight_effective_rank": entropy-based}, each [] float64 between 0 and 1.

    Both are rank / min(rows, columns), averaged over matrices, as in the published code of Mukherjee et al. 2505.11711.
    A singular value below max(rows, columns) * eps of float32 times the largest is zero, the rule of numpy's and
    torch's matrix_rank, used there too. float32 weights round by 6e-8 of their own size: an update that small beside
    them has full rank by rounding alone. Costs twice as much as all other measures of weights together.
    """
    means = (torch.stack(side).mean() for side in zip(*rank_shares(base, fine_tuned), strict=True))
    return dict(zip(("weight_rank", "weight_effective_rank"), means, strict=True))


def rank_shares(base: Weights, fine_tuned: Weights) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each matrix the two of ``ranks``, [] float64."""
    for name, matrix in _matrices(base, fine_tuned):
        values = singular_values(name, matrix)
        tolerance = max(matrix.shape) * torch.finfo(torch.float32).eps
        yield numerical_rank(values, tolerance).double() / len(values), effective_rank(values) / len(values)


def singular_values(name: str, matrix: Tensor) -> Tensor:
    """All of a matrix, falling, [min(rows, columns)] float64; ``name`` is said where there are none.

    Square roots of the eigenvalues of the smaller Gram matrix in float64: 3 times faster than an SVD; values below
    1e-8 of the largest are noise, which float32 weights have anyway.
    """
    return _eigenvalues(name, _gram(matrix.double())).clamp_min(0).sqrt().flip(-1)


def activation_l1(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """Mean over inputs of sum_d |h_d - h0_d|, activations [..., N, D] to [...]; leading dims broadcast."""
    return (_wide(fine_tuned) - _wide(base)).abs().sum(-1).mean(-1)


def activation_l2(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """Mean over inputs of sqrt(sum_d (h_d - h0_d)^2), activations [..., N, D] to [...]; leading dims broadcast."""
    return torch.linalg.vector_norm(_wide(fine_tuned) - _wide(base), dim=-1).mean(-1)


def activation_l1_relative(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """``activation_l1`` over the mean of the base's sum_d |h0_d|; 0 where nothing moved."""
    moved, size = activation_l1(base, fine_tuned), _wide(base).abs().sum(-1).mean(-1)
    return torch.where(moved == 0, 0.0, moved / size)


def activation_l2_relative(base: Tensor, fine_tuned: Tensor) -> Tensor:
    """``activation_l2`` over the mean length of the base's activations; 0 where nothing moved."""
    moved, size = activation_l2(base, fine_tuned), torch.linalg.vector_norm(_wide(base), dim=-1).mean(-1)
    return torch.where(moved == 0, 0.0, moved / size)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _same_names(base: Weights, other: Weights, what: str) -> None:
    if odd := sorted(base.keys() ^ other.keys()):
        raise UserError(f"base and {what} differ in names ({', '.join(odd[:3])}); compare tensors of one policy")


def _total(sums: Iterator[Tensor]) -> Tensor:
    return torch.stack([one.double() for one in sums]).sum()


def _matrices(base: Weights, fine_tuned: Weights) -> Iterator[tuple[str, Tensor]]:
    """The changes that are matrices, [rows, columns]."""
    return ((name, change.flatten(1)) for name, change in changes(base, fine_tuned) if change.ndim >= 2)


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT if len(matrix) <= matrix.shape[1] else matrix.mT @ matrix


def _eigenvalues(name: str, gram: Tensor) -> Tensor:
    if not torch.isfinite(gram).all():
        raise UserError(
            f"the change of {name} has no singular values: it is not finite, or too large to be squared; "
            "leave policies out that diverged"
        )
    return torch.linalg.eigvalsh(gram)
