"""The kernels in plain torch: any device, and the same bits as kernels.c, one rounding per operation in the same order.

Shapes: T = tasks, P = entries of a tile, N = rows, R = rank, I = columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

MAGNITUDE = 0x7FFFFFFF
WORD = 0xFFFFFFFF


def widen(stored_P: torch.Tensor, out_P: torch.Tensor) -> bool:
    out_P.copy_(stored_P)
    return not bool(torch.isfinite(out_P).all())


def subtract(stored_P: torch.Tensor, before_P: torch.Tensor, out_P: torch.Tensor) -> bool:
    bad = widen(stored_P, out_P)
    out_P -= before_P
    return bad


def add_to(before_P: torch.Tensor, merged_P: torch.Tensor, out_P: torch.Tensor) -> bool:
    out_P.copy_(before_P + merged_P)
    return not bool(torch.isfinite(out_P).all())


def low_rank(b_NR: torch.Tensor, a_RI: torch.Tensor, scaling: float, start: int, out_P: torch.Tensor) -> None:
    columns, count = a_RI.shape[1], len(out_P)
    first, last = start // columns, -(-(start + count) // columns)
    rows_NI = b_NR[first:last, 0, None] * a_RI[0]
    for rank in range(1, a_RI.shape[0]):
        rows_NI += b_NR[first:last, rank, None] * a_RI[rank]
    skip = start - first * columns
    out_P.copy_((rows_NI * scaling).reshape(-1)[skip : skip + count])


def weighted_sum(task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, scaling: float) -> torch.Tensor:
    return _total(task_vectors_TP, weights_T) * scaling


def _total(task_vectors_TP: torch.Tensor, weights_T: torch.Tensor) -> torch.Tensor:
    # torch.sum may regroup additions depending on P; a loop over T does not
    total_P = task_vectors_TP[0] * weights_T[0]
    for vector_P, weight in zip(task_vectors_TP[1:], weights_T[1:], strict=True):
        total_P += vector_P * weight
    return total_P


def consensus(
    task_vectors_TP: torch.Tensor,
    weights_T: torch.Tensor,
    threshold: float,
    min_agreement: int,
    scaling: float,
    *,
    unweighted: bool,
    soft: bool,
) -> torch.Tensor:
    total_P = _total(task_vectors_TP, weights_T)
    votes_P = torch.zeros_like(total_P, dtype=torch.int32)
    voices_T = torch.ones_like(weights_T) if unweighted else weights_T
    voted_P = _total(task_vectors_TP, voices_T) if unweighted else total_P
    for vector_P, voice in zip(task_vectors_TP, voices_T, strict=True):
        own_P = vector_P * voice
        votes_P += own_P.abs() >= (voted_P - own_P).abs() * threshold
    if soft:
        # a divisor on the device: CUDA multiplies by the reciprocal of a number, which rounds differently
        return (
            total_P * (votes_P.clamp(max=min_agreement).float() / votes_P.new_tensor(min_agreement).float()) * scaling
        )
    return torch.where(votes_P >= min_agreement, total_P, 0.0) * scaling


def elect_and_average(task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, scaling: float) -> torch.Tensor:
    positive_P = _total(task_vectors_TP, weights_T) >= 0
    agreeing_P = torch.zeros_like(task_vectors_TP[0])
    divisor_P = torch.zeros_like(task_vectors_TP[0])
    for vector_P, weight in zip(task_vectors_TP, weights_T, strict=True):
        own_P = vector_P * weight
        agrees_P = torch.where(positive_P, own_P, -own_P) > 0
        agreeing_P += torch.where(agrees_P, own_P, 0.0)
        divisor_P += torch.where(agrees_P, weight, 0.0)
    return agreeing_P / torch.where(divisor_P == 0, 1.0, divisor_P) * scaling


# ---- draws -----------------------------------------------------------------------------------------------------------


def _mix(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser on 32-bit words that are held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & WORD
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def draws(key: int, offset: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) int64 in 0 … 2³² − 1; each depends on the key and its position alone."""
    position_P = torch.arange(offset, offset + count, device=device)
    low_P, page_P = position_P & WORD, position_P >> 32
    first_P = (low_P + (key & WORD) + _mix(page_P)) & WORD
    second_P = (key >> 32 & WORD) ^ ((page_P * 0x9E3779B9) & WORD)
    return _mix(_mix(first_P) ^ second_P)


def drop(task_vectors_TP: torch.Tensor, keys: Sequence[int], offset: int, limit: int, rescale: float) -> torch.Tensor:
    count, device = task_vectors_TP.shape[1], task_vectors_TP.device
    kept_TP = torch.stack([draws(key, offset, count, device) < limit for key in keys])
    # a divisor on the device: CUDA multiplies by the reciprocal of a number, which rounds differently
    return torch.where(kept_TP, task_vectors_TP, 0.0) / torch.tensor(rescale, dtype=torch.float32, device=device)


# ---- trimming --------------------------------------------------------------------------------------------------------


def _magnitudes(vector_P: torch.Tensor) -> torch.Tensor:
    return vector_P.contiguous().view(torch.int32) & MAGNITUDE


def histogram_high(task_vectors_TP: torch.Tensor, counts_TB: torch.Tensor) -> None:
    for task, vector_P in enumerate(task_vectors_TP):
        counts_TB[task] += torch.bincount(_magnitudes(vector_P) >> 16, minlength=counts_TB.shape[1]).cpu()


def histogram_low(task_vectors_TP: torch.Tensor, highs: Sequence[int], counts_TB: torch.Tensor) -> None:
    for task, (vector_P, high) in enumerate(zip(task_vectors_TP, highs, strict=True)):
        magnitudes_P = _magnitudes(vector_P)
        chosen = magnitudes_P[(magnitudes_P >> 16) == high] & 0xFFFF
        counts_TB[task] += torch.bincount(chosen, minlength=counts_TB.shape[1]).cpu()


def count_equal(task_vectors_TP: torch.Tensor, thresholds: Sequence[int], counts_T: torch.Tensor) -> None:
    for task, (vector_P, threshold) in enumerate(zip(task_vectors_TP, thresholds, strict=True)):
        counts_T[task] += (_magnitudes(vector_P) == threshold).sum().cpu()


def trim(task_vectors_TP: torch.Tensor, thresholds: Sequence[int], allowed: Sequence[int]) -> torch.Tensor:
    trimmed_TP = torch.empty_like(task_vectors_TP)
    for vector_P, threshold, left, out_P in zip(task_vectors_TP, thresholds, allowed, trimmed_TP, strict=True):
        magnitudes_P = _magnitudes(vector_P)
        equal_P = magnitudes_P == threshold
        keep_P = (magnitudes_P > threshold) | (equal_P & (equal_P.cumsum(0) <= max(0, left)))
        out_P.copy_(torch.where(keep_P, vector_P, 0.0))
    return trimmed_TP


# ---- sums for reports; may differ from the compiled ones in the last bits -------------------------------------------


def tally(task_vectors_TP: torch.Tensor, kept_P: torch.Tensor, *, pairs: bool) -> tuple[int, int, list[float]]:
    wide_TP = task_vectors_TP.double()
    gram_TT = (wide_TP @ wide_TP.T).tril() if pairs else torch.diag(wide_TP.square().sum(1))
    changed, kept = int((task_vectors_TP != 0).any(0).sum()), int((kept_P != 0).sum())
    return changed, kept, gram_TT.flatten().tolist()


def square_sum(vector_P: torch.Tensor) -> float:
    return float(vector_P.double().square().sum())


def square_bins(vector_P: torch.Tensor, counts_EH: torch.Tensor) -> None:
    magnitudes_P = _magnitudes(vector_P).long()
    exponents_P = magnitudes_P >> 23
    mantissas_P = (magnitudes_P & 0x7FFFFF) | ((exponents_P > 0).long() << 23)
    squares_P = mantissas_P.square()
    for half, part_P in enumerate((squares_P & 0xFFFFFF, squares_P >> 24)):
        binned_E = torch.zeros(counts_EH.shape[0], dtype=torch.long, device=vector_P.device)
        counts_EH[:, half] += binned_E.index_add_(0, exponents_P, part_P).cpu()
