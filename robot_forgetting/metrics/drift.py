"""How far weights and activations moved from the base policy, for one fine-tuned policy or for many at once.

Weights are named tensors. Those of the fine-tuned policies may have leading run dimensions ([R, *shape] against
[*shape]); every function then returns one value per run. Where the base has run dimensions too (each run its own
base), say how many with ``run_dims``. Differences are taken in float32, or wider where a tensor is wider.

The change of all weights is seen as one vector for L1 and L2, and as one block-diagonal operator, a block per matrix,
for the spectral norm. A tensor of more than two dimensions (a convolution) is a matrix [first, all others]; vectors
(biases, norm scales) are no matrices and count in L1, L2, Fisher and sparsity only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robot_forgetting.errors import UserError, unknown

Weights = Mapping[str, Tensor]

TOLERANCE = 1e-5  # Mukherjee et al. 2505.11711: bf16 values that differ by no more are "the same"
AGGREGATES = {"max": lambda values: values.amax(0), "mean": lambda values: values.mean(0), "sum": lambda v: v.sum(0)}


@dataclass(frozen=True)
class Change:
    """``delta`` = fine-tuned minus base of the tensor ``name``: [*runs, *shape], ``runs`` dimensions in front."""

    name: str
    delta: Tensor
    runs: int

    @property
    def size(self) -> int:
        """Entries per run."""
        return self.delta.shape[self.runs :].numel()

    def flat(self) -> Tensor:
        """[*runs, size]."""
        return self.delta.reshape(*self.delta.shape[: self.runs], -1)

    def matrix(self) -> Tensor | None:
        """[*runs, rows, columns]; None for a vector or a scalar."""
        if self.delta.ndim - self.runs < 2:
            return None
        return self.delta.reshape(*self.delta.shape[: self.runs + 1], -1)


def changes(base: Weights, fine_tuned: Weights, *, run_dims: int | None = None) -> Iterator[Change]:
    """The change of every tensor, one at a time to keep memory low.

    run_dims: leading run dimensions of the fine-tuned tensors; None: as many as they have more than the base's.
    UserError where names or shapes do not belong together.
    """
    _same_names(base, fine_tuned, "the fine-tuned weights")
    for name, before in base.items():
        after = fine_tuned[name]
        runs = after.ndim - before.ndim if run_dims is None else run_dims
        if not 0 <= runs <= after.ndim or before.shape not in (after.shape[runs:], after.shape):
            raise UserError(
                f"{name} is {tuple(before.shape)} in the base and {tuple(after.shape)} after training; "
                "compare policies of one architecture, with run dimensions in front"
            )
        yield Change(name, _wide(after) - _wide(before), runs)


def weight_l1(base: Weights, fine_tuned: Weights, *, run_dims: int | None = None) -> Tensor:
    """sum_i |w_i - w0_i| over all weights, [*runs] float64."""
    return _total(_l1(change) for change in changes(base, fine_tuned, run_dims=run_dims))


def weight_l2(base: Weights, fine_tuned: Weights, *, run_dims: int | None = None) -> Tensor:
    """sqrt(sum_i (w_i - w0_i)^2) over all weights, [*runs] float64."""
    return _total(_squares(change) for change in changes(base, fine_tuned, run_dims=run_dims)).sqrt()


def weight_size(weights: Weights) -> Tensor:
    """sum_i |w_i| over all weights of one policy, [] float64: what ``weight_l1`` is to be compared with."""
    return _total(_wide(weight).abs().sum().double() for weight in weights.values())


def weight_norm(weights: Weights) -> Tensor:
    """sqrt(sum_i w_i^2) over all weights of one policy, [] float64: what ``weight_l2`` is to be compared with."""
    return _total(_wide(weight).square().sum().double() for weight in weights.values()).sqrt()


def weight_fisher_l2(base: Weights, fine_tuned: Weights, fisher: Weights, *, run_dims: int | None = None) -> Tensor:
    """sqrt(sum_i F_i (w_i - w0_i)^2) with the diagonal Fisher F of the base policy, [*runs] float64.

    F has the base's shapes. Half the square is the second-order estimate, in nats per input, of the KL over the inputs
    that F is an expectation over (RL's Razor: those of the prior task). Whether the paper takes the root is not said.
    """
    _same_names(base, fisher, "the Fisher")
    return _total(
        _squares(change, fisher[change.name]) for change in changes(base, fine_tuned, run_dims=run_dims)
    ).sqrt()


def sparsity(
    base: Weights,
    fine_tuned: Weights,
    *,
    tolerance: float = TOLERANCE,
    dtype: torch.dtype | None = None,
    run_dims: int | None = None,
) -> Tensor:
    """Fraction of all weights with |w - w0| <= tolerance, [*runs] float64 between 0 and 1.

    dtype: round both to it first. Mukherjee et al. 2505.11711 compare checkpoints in bfloat16 with tolerance 1e-5. A
    bf16 number has 8 significant bits, so that a weight of 0.03 moves in steps of 1e-4 and smaller updates vanish: RL's
    Razor section 6 explains the sparsity by that. tolerance=0 without dtype counts what did not move at all.
    """
    if dtype is not None:
        base, fine_tuned = ({name: w.to(dtype) for name, w in side.items()} for side in (base, fine_tuned))
    found = list(_still(changes(base, fine_tuned, run_dims=run_dims), tolerance))
    return _total(still for still, _ in found) / sum(size for _, size in found)


def spectral_norms(base: Weights, fine_tuned: Weights, *, run_dims: int | None = None) -> dict[str, Tensor]:
    """Largest singular value of the change of each matrix, {name: [*runs]}, exact to float32."""
    return {name: _largest(name, matrix) for name, matrix in _matrices(changes(base, fine_tuned, run_dims=run_dims))}


def spectral_norm(base: Weights, fine_tuned: Weights, *, aggregate: str = "max", run_dims: int | None = None) -> Tensor:
    """One spectral norm of the change for all matrices, [*runs] float64; ``aggregate``: "max", "mean" or "sum".

    RL's Razor does not say how it combines the matrices. "max" is the spectral norm of the block-diagonal operator
    whose Frobenius norm is ``weight_l2`` (biases aside), so that the two are norms of one thing.
    """
    norms = spectral_norms(base, fine_tuned, run_dims=run_dims)
    return _aggregate(list(norms.values()), aggregate)


def singular_values(base: Weights, fine_tuned: Weights, *, run_dims: int | None = None) -> dict[str, Tensor]:
    """All singular values of the change of each matrix, falling, {name: [*runs, min(rows, columns)]} float64.

    Square roots of the eigenvalues of the smaller Gram matrix in float64: 3 times faster than an SVD; values below
    1e-8 of the largest are noise, which float32 weights have anyway.
    """
    found = _matrices(changes(base, fine_tuned, run_dims=run_dims))
    return {name: _singular_values(name, matrix) for name, matrix in found}


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


def ranks(
    base: Weights, fine_tuned: Weights, *, relative_tolerance: float | None = None, run_dims: int | None = None
) -> dict[str, Tensor]:
    """{"weight_rank": numerical, "weight_effective_rank": entropy-based}, each [*runs] float64 between 0 and 1.

    Both are rank / min(rows, columns), averaged over matrices, as in the published code of Mukherjee et al. 2505.11711.
    Default tolerance: max(rows, columns) * eps of float32, the rule of numpy's and torch's matrix_rank, used there too.
    float32 weights round by 6e-8 of their own size: an update that small beside them has full rank by rounding alone.
    """
    found = list(rank_shares(base, fine_tuned, relative_tolerance=relative_tolerance, run_dims=run_dims))
    means = (_aggregate(list(side), "mean") for side in (zip(*found, strict=True) if found else ([], [])))
    return dict(zip(("weight_rank", "weight_effective_rank"), means, strict=True))


def rank_shares(
    base: Weights, fine_tuned: Weights, *, relative_tolerance: float | None = None, run_dims: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each matrix the two of ``ranks``, [*runs] float64."""
    for name, matrix in _matrices(changes(base, fine_tuned, run_dims=run_dims)):
        values, side = _singular_values(name, matrix), max(matrix.shape[-2:])
        tolerance = side * torch.finfo(torch.float32).eps if relative_tolerance is None else relative_tolerance
        count = values.shape[-1]
        yield numerical_rank(values, tolerance).double() / count, effective_rank(values) / count


def weight_change(
    base: Weights,
    fine_tuned: Weights,
    *,
    fisher: Weights | None = None,
    tolerance: float = TOLERANCE,
    aggregate: str = "max",
    run_dims: int | None = None,
) -> dict[str, Tensor]:
    """Every measure of the weights except the ranks in one pass, each [*runs] float64.

    {"weight_l1", "weight_l2", "weight_spectral", "weight_sparsity"}, and with the Fisher "weight_fisher_l2"; formulas
    at the functions of those names. ``ranks`` costs twice as much as all these together. UserError where a change of
    a matrix is not finite, or so large that its square is not.
    """
    if fisher is not None:
        _same_names(base, fisher, "the Fisher")
    columns: dict[str, list[Tensor]] = {"l1": [], "l2": [], "fisher_l2": [], "sparsity": [], "spectral": []}
    count = 0
    for change in changes(base, fine_tuned, run_dims=run_dims):
        columns["l1"].append(_l1(change))
        columns["l2"].append(_squares(change))
        if fisher is not None:
            columns["fisher_l2"].append(_squares(change, fisher[change.name]))
        for still, size in _still([change], tolerance):
            columns["sparsity"].append(still)
            count += size
        columns["spectral"] += [_largest(name, matrix) for name, matrix in _matrices([change])]
    found = {
        "weight_l1": _total(columns["l1"]),
        "weight_l2": _total(columns["l2"]).sqrt(),
        "weight_spectral": _aggregate(columns["spectral"], aggregate),
        "weight_sparsity": _total(columns["sparsity"]) / count,
    }
    if fisher is not None:
        found["weight_fisher_l2"] = _total(columns["fisher_l2"]).sqrt()
    return found


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


def diagonal_fisher(
    log_probabilities: Callable[[Weights, Tensor], Tensor], weights: Weights, inputs: Tensor, *, chunk: int = 8
) -> dict[str, Tensor]:
    """F_i = mean_x sum_y p(y|x) (d log p(y|x) / d w_i)^2 over inputs [N, ...]: the model's own Fisher, without labels.

    log_probabilities: weights and ONE input to log p [V], over which the sum is exact. Needs chunk * V times the memory
    of the weights; a policy with a closed form is faster.
    """

    def of_one(x: Tensor) -> dict[str, Tensor]:
        p = log_probabilities(weights, x).exp()
        slopes = torch.func.jacrev(lambda w: log_probabilities(w, x))(weights)
        return {name: torch.tensordot(p, slope.square(), 1) for name, slope in slopes.items()}

    weights = {name: w.detach() for name, w in weights.items()}
    found = {name: torch.zeros_like(w) for name, w in weights.items()}
    for part in inputs.split(chunk):
        for name, values in torch.func.vmap(of_one)(part).items():
            found[name] += values.sum(0) / len(inputs)
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _same_names(base: Weights, other: Weights, what: str) -> None:
    if odd := sorted(base.keys() ^ other.keys()):
        raise UserError(f"base and {what} differ in names ({', '.join(odd[:3])}); compare tensors of one policy")


# Sums stay in the width of the difference within a tensor (torch sums pairwise, 1e-6) and are float64 across tensors.
def _l1(change: Change) -> Tensor:
    return change.flat().abs().sum(-1).double()


def _squares(change: Change, weight: Tensor | None = None) -> Tensor:
    squares = change.flat().square()
    if weight is not None:
        runs = weight.ndim - (change.delta.ndim - change.runs)  # the weight may have run dimensions too
        squares = squares * _wide(weight).reshape(*weight.shape[:runs], -1)
    return squares.sum(-1).double()


def _still(found, tolerance: float) -> Iterator[tuple[Tensor, int]]:
    for change in found:
        yield (change.flat().abs() <= tolerance).sum(-1).double(), change.size


def _matrices(found) -> Iterator[tuple[str, Tensor]]:
    for change in found:
        if (matrix := change.matrix()) is not None:
            yield change.name, matrix


def _gram(matrix: Tensor) -> Tensor:
    return matrix @ matrix.mT if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT @ matrix


def _largest(name: str, matrix: Tensor) -> Tensor:
    return _eigenvalues(name, _gram(matrix))[..., -1].clamp_min(0).sqrt().double()


def _singular_values(name: str, matrix: Tensor) -> Tensor:
    return _eigenvalues(name, _gram(matrix.double())).clamp_min(0).sqrt().flip(-1)


def _eigenvalues(name: str, gram: Tensor) -> Tensor:
    if not torch.isfinite(gram).all():
        raise UserError(
            f"the change of {name} has no singular values: it is not finite, or too large to be squared; "
            "leave policies out that diverged"
        )
    return torch.linalg.eigvalsh(gram)


def _total(parts) -> Tensor:
    return torch.stack(list(parts)).sum(0)


def _aggregate(parts: list[Tensor], how: str) -> Tensor:
    if how not in AGGREGATES:
        raise unknown("aggregate", how, AGGREGATES)
    if not parts:
        raise UserError("no matrix among the weights; spectral norms and ranks need one")
    return AGGREGATES[how](torch.stack(parts))
