"""Metrics of a sequence of T tasks, each under the name of the one definition that it follows.

Papers call different numbers by one name ("BWT", "NBT", "forgetting"): never put two of these into one column.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def sequence_metrics(
    R0: Sequence[float],
    R: Sequence[Sequence[float]],
    curves: Sequence[Sequence[float]] | None = None,
    single: Sequence[Sequence[float]] | None = None,
) -> dict[str, float | list[float]]:
    """Every definition that the given numbers allow; a mean over no tasks (T = 1) is left out.

    R0: [T] success of the base policy on each task; R: [T, T], R[i][j] that on task j after the stage of task i
    curves: for each task its success while it is trained, one value per evaluation, the last one after its stage
    single: the same of runs that train the base policy on that task alone

    With j the task, i the stage, both 1 .. T, and R[0] = R0:

    acc: mean_j R[T,j]
    bwt: mean_{j<T} R[T,j] - R[j,j] (GEM, Lopez-Paz and Ranzato 2017; mammoth)
    bwt_trace: the same sum divided by T (TRACE)
    nbt_hu: -bwt (arXiv 2603.11653)
    nbt_zhu: a list, for each i < T: mean_{j>i} R[i,i] - R[j,i] (arXiv 2605.26820)
    nbt_libero: sum_{i<T} nbt_zhu[i] / T: the last task has nothing to forget and is counted (LIBERO)
    fwt_zero_shot: mean_{j>1} R[j-1,j] - R0[j]
    forgetting_cw: mean_j R[j,j] - R[T,j], over all T (Continual World)
    forgetting_mammoth: mean_{j<T} max_i R[i,j] - R[T,j], never negative
    forgetting_cora: mean over pairs i > j of (R[i-1,j] - R[i,j]) / best_j, with best_j = max_i R[i,j], base included
    transfer_cora: mean over pairs i < j of (R[i,j] - R[i-1,j]) / best_j (CORA)
    With curves, where f_j is the mean of task j's curve held at its maximum from where it first reaches it:
    fwt_libero: mean_j f_j; auc_libero: mean_j (f_j + sum_{i>j} R[i,j]) / (T - j + 1) (LIBERO)
    With single too, X and Y the means of a task's two curves:
    transfer_cw: sum_j (X_j - Y_j) / sum_j (1 - Y_j); transfer_cw_tasks: a list, each task's ratio, None where Y_j = 1
    """
    base, after = np.asarray(R0, float), np.asarray(R, float)
    count = len(base)
    if count < 1 or after.shape != (count, count):
        raise ValueError(f"R must be {count} x {count} for {count} tasks, not {' x '.join(map(str, after.shape))}")
    own, last = after.diagonal(), after[-1]
    found: dict[str, float | list] = {"acc": last.mean(), "forgetting_cw": (own - last).mean()}
    later = [own[i] - after[i + 1 :, i].mean() for i in range(count - 1)]
    found |= {"bwt_trace": (last - own).sum() / count, "nbt_libero": sum(later) / count}
    if count > 1:
        found |= {"bwt": (last - own)[:-1].mean(), "nbt_hu": (own - last)[:-1].mean(), "nbt_zhu": later}
        found["fwt_zero_shot"] = np.mean([after[j - 1, j] - base[j] for j in range(1, count)])
        found["forgetting_mammoth"] = (after.max(0) - last)[:-1].mean()
        found |= _cora(np.vstack([base, after]))
    if curves is not None:
        held = [_held(np.asarray(curve, float)) for curve in curves]
        found["fwt_libero"] = np.mean(held)
        found["auc_libero"] = np.mean([np.mean([held[j], *after[j + 1 :, j]]) for j in range(count)])
    if curves is not None and single is not None:
        x, y = (np.array([np.mean(curve) for curve in given]) for given in (curves, single))
        if (1 - y).sum() > 0:
            found["transfer_cw"] = (x - y).sum() / (1 - y).sum()
        found["transfer_cw_tasks"] = [(a - b) / (1 - b) if b < 1 else None for a, b in zip(x, y, strict=True)]
    return {name: _plain(value) for name, value in found.items()}


def _held(curve: np.ndarray) -> float:
    """Mean of a curve that stays at its maximum once it is there: the best checkpoint is kept."""
    best = int(curve.argmax())
    return float(np.concatenate([curve[:best], np.full(len(curve) - best, curve[best])]).mean())


def _cora(rows: np.ndarray) -> dict[str, float]:
    """rows: [T + 1, T], the base policy's first. A task that is never solved has no differences and counts as 0."""
    best = rows.max(0)
    change = np.diff(rows, axis=0) / np.where(best > 0, best, 1.0)  # [i - 1, j] = (R[i,j] - R[i-1,j]) / best_j
    pairs = np.arange(len(change))
    return {
        "forgetting_cora": -change[pairs[:, None] > pairs[None, :]].mean(),
        "transfer_cora": change[pairs[:, None] < pairs[None, :]].mean(),
    }


def _plain(value):
    """Floats; without the sign of a zero."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if value is None else float(value) + 0.0
