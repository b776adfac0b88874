"""The inner loops of a merge on torch tensors: compiled where that was possible, else torch, with the same bits.

Every function works on flat float32 tiles and writes into what it is given or returns a new tensor; none changes its
inputs. Shapes: T = tasks, P = entries of a tile, N = rows, R = rank, I = columns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from manyshot.kernels import _native, _torch
from manyshot.kernels._operation import Operation, draw_limit

STORED = {torch.bfloat16: _native.STORED["BF16"], torch.float32: _native.STORED["F32"]}


def _usable(tensor: torch.Tensor) -> bool:
    """The compiled kernels take CPU tensors; what they are given is contiguous, or else a row of such a tensor."""
    return bool(_native.CALL) and tensor.is_cpu


def widen(stored_P: torch.Tensor, out_P: torch.Tensor) -> bool:
    """out = float32(stored). True when an entry is NaN or Inf."""
    stored = STORED.get(stored_P.dtype)
    if stored and _usable(out_P):
        return bool(_native.CALL["widen"](stored, stored_P.data_ptr(), out_P.data_ptr(), out_P.numel()))
    return _torch.widen(stored_P, out_P)


def subtract(stored_P: torch.Tensor, before_P: torch.Tensor, out_P: torch.Tensor) -> bool:
    """out = float32(stored) − before. True when an entry of `stored` is NaN or Inf."""
    stored = STORED.get(stored_P.dtype)
    if stored and _usable(out_P):
        pointers = stored_P.data_ptr(), before_P.data_ptr(), out_P.data_ptr()
        return bool(_native.CALL["subtract"](stored, *pointers, out_P.numel()))
    return _torch.subtract(stored_P, before_P, out_P)


def add_to(before_P: torch.Tensor, merged_P: torch.Tensor, out_P: torch.Tensor) -> bool:
    """out = before + merged in float32, rounded once to out's type. True when a result is NaN or Inf."""
    stored = STORED.get(out_P.dtype)
    if stored and _usable(out_P):
        pointers = before_P.data_ptr(), merged_P.data_ptr(), out_P.data_ptr()
        return bool(_native.CALL["add_to"](stored, *pointers, out_P.numel()))
    return _torch.add_to(before_P, merged_P, out_P)


def low_rank(b_NR: torch.Tensor, a_RI: torch.Tensor, scaling: float, start: int, out_P: torch.Tensor) -> None:
    """out = entries start… of scaling · B·A, row by row; the sum over R runs in order, so tiles do not change it."""
    if _usable(out_P) and a_RI.stride(1) == 1:
        _native.CALL["low_rank"](
            *(b_NR.data_ptr(), b_NR.stride(0), b_NR.stride(1), a_RI.data_ptr(), a_RI.stride(0), a_RI.shape[0]),
            *(a_RI.shape[1], scaling, start, out_P.numel(), out_P.data_ptr()),
        )
    else:
        _torch.low_rank(b_NR, a_RI, scaling, start, out_P)


def _readable(task_vectors_TP: torch.Tensor, other: torch.Tensor | None = None) -> bool:
    """Whether the compiled kernels can read rows, and weights or a merged vector beside them, where they lie."""
    return (
        _usable(task_vectors_TP)
        and task_vectors_TP.stride(1) == 1
        and task_vectors_TP.dtype == torch.float32
        and (other is None or (other.dtype == torch.float32 and other.is_contiguous()))
    )


def _rows(task_vectors_TP: torch.Tensor) -> tuple[int, int, int]:
    return task_vectors_TP.data_ptr(), task_vectors_TP.shape[0], task_vectors_TP.stride(0)


def weighted_sum(task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """scaling · Σ_τ w_τ v_τ, added in task order."""
    if not _readable(task_vectors_TP, weights_T):
        return _torch.weighted_sum(task_vectors_TP, weights_T, scaling)
    out_P = torch.empty_like(task_vectors_TP[0])
    _native.CALL["weighted_sum"](
        *_rows(task_vectors_TP), weights_T.data_ptr(), scaling, out_P.data_ptr(), out_P.numel()
    )
    return out_P


def consensus(
    task_vectors_TP: torch.Tensor,
    weights_T: torch.Tensor,
    threshold: float,
    min_agreement: int,
    scaling: float,
    *,
    unweighted: bool = False,
    soft: bool = False,
) -> torch.Tensor:
    """scaling · V_i where Σ_τ 1[|w_τ v_τ,i| ≥ threshold · |V_i − w_τ v_τ,i|] ≥ min_agreement, else 0; V = Σ_τ w_τ v_τ.

    A task votes for a coordinate that the rest does not dominate; the coordinate stays when enough tasks vote for it.
    `unweighted`: the votes are 1[|v_τ,i| ≥ threshold · |S_i − v_τ,i|], S = Σ_τ v_τ. `soft`: of scaling · V_i stays the
    share min(votes, min_agreement) / min_agreement.
    """
    if not _readable(task_vectors_TP, weights_T):
        return _torch.consensus(
            task_vectors_TP, weights_T, threshold, min_agreement, scaling, unweighted=unweighted, soft=soft
        )
    out_P = torch.empty_like(task_vectors_TP[0])
    how = _native.how_agreed(unweighted=unweighted, soft=soft)
    _native.CALL["consensus"](
        *(*_rows(task_vectors_TP), weights_T.data_ptr(), threshold, min_agreement, how, scaling),
        *(out_P.data_ptr(), out_P.numel()),
    )
    return out_P


def elect_and_average(task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling · Σ agreeing w_τ v_τ / Σ agreeing w_τ; those agree whose sign is that of Σ_τ w_τ v_τ (plus for zero)."""
    if not _readable(task_vectors_TP, weights_T):
        return _torch.elect_and_average(task_vectors_TP, weights_T, scaling)
    out_P = torch.empty_like(task_vectors_TP[0])
    _native.CALL["elect_and_average"](
        *_rows(task_vectors_TP), weights_T.data_ptr(), scaling, out_P.data_ptr(), out_P.numel()
    )
    return out_P


def uniform(key: int, offset: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """(count,) float32 in [0, 1), 24 bits each; entry i depends on the key and on offset + i alone."""
    return (_torch.draws(key, offset, count, torch.device(device)) >> 8).float() * 2.0**-24


def drop(
    task_vectors_TP: torch.Tensor, keys: Sequence[int], offset: int, density: float, rescale: float
) -> torch.Tensor:
    """z ⊙ v / rescale, (T, P); z ~ Bernoulli(density) drawn from (the task's key, position)."""
    limit = draw_limit(density)
    if not _readable(task_vectors_TP):
        return _torch.drop(task_vectors_TP, keys, offset, limit, rescale)
    out_TP = _like(task_vectors_TP)
    words = (ctypes.c_uint64 * len(keys))(*keys)
    _native.CALL["drop"](*_rows(task_vectors_TP), words, offset, limit, rescale, out_TP.data_ptr(), out_TP.shape[1])
    return out_TP


def _like(task_vectors_TP: torch.Tensor) -> torch.Tensor:
    return torch.empty(task_vectors_TP.shape, dtype=torch.float32)


def histogram_high(task_vectors_TP: torch.Tensor, counts_TB: torch.Tensor) -> None:
    """Add to counts (T, 2¹⁵; int64) how many magnitudes have each value of their high 15 bits."""
    if _readable(task_vectors_TP):
        _native.CALL["histogram_high"](*_rows(task_vectors_TP), task_vectors_TP.shape[1], counts_TB.data_ptr())
    else:
        _torch.histogram_high(task_vectors_TP, counts_TB)


def histogram_low(task_vectors_TP: torch.Tensor, highs: Sequence[int], counts_TB: torch.Tensor) -> None:
    """Add to counts (T, 2¹⁶; int64) the low 16 bits of the magnitudes whose high 15 bits are the task's `highs`."""
    if _readable(task_vectors_TP):
        words = (ctypes.c_uint32 * len(highs))(*highs)
        _native.CALL["histogram_low"](*_rows(task_vectors_TP), task_vectors_TP.shape[1], words, counts_TB.data_ptr())
    else:
        _torch.histogram_low(task_vectors_TP, highs, counts_TB)


def count_equal(task_vectors_TP: torch.Tensor, thresholds: Sequence[int], counts_T: torch.Tensor) -> None:
    """Add to counts (T, int64) the entries whose magnitude has exactly the bits of the task's threshold."""
    if _readable(task_vectors_TP):
        words = (ctypes.c_uint32 * len(thresholds))(*thresholds)
        _native.CALL["count_equal"](*_rows(task_vectors_TP), task_vectors_TP.shape[1], words, counts_T.data_ptr())
    else:
        _torch.count_equal(task_vectors_TP, thresholds, counts_T)


def trim(task_vectors_TP: torch.Tensor, thresholds: Sequence[int], allowed: Sequence[int]) -> torch.Tensor:
    """(T, P): magnitudes above the task's threshold (bits), the first `allowed` of those equal to it, else zeros."""
    if not _readable(task_vectors_TP):
        return _torch.trim(task_vectors_TP, thresholds, allowed)
    out_TP = _like(task_vectors_TP)
    words, left = (ctypes.c_uint32 * len(thresholds))(*thresholds), (ctypes.c_int64 * len(allowed))(*allowed)
    _native.CALL["trim"](*_rows(task_vectors_TP), task_vectors_TP.shape[1], words, left, out_TP.data_ptr())
    return out_TP


def tally(task_vectors_TP: torch.Tensor, kept_P: torch.Tensor, *, pairs: bool) -> tuple[int, int, list[float]]:
    """Coordinates that some task changed, coordinates kept, and v vᵀ (T·T: the diagonal, with `pairs` also below).

    Sums are float32 within 512 entries, float64 over them.
    """
    if not _readable(task_vectors_TP, kept_P):
        return _torch.tally(task_vectors_TP, kept_P, pairs=pairs)
    counts, gram = (ctypes.c_int64 * 2)(), (ctypes.c_double * task_vectors_TP.shape[0] ** 2)()
    _native.CALL["tally"](*_rows(task_vectors_TP), kept_P.data_ptr(), kept_P.numel(), pairs, counts, gram)
    return counts[0], counts[1], gram[:]


def square_sum(vector_P: torch.Tensor) -> float:
    """Σ v², float32 within 512 entries, float64 over them."""
    if _usable(vector_P):
        return float(_native.CALL["square_sum"](vector_P.data_ptr(), vector_P.numel()))
    return _torch.square_sum(vector_P)


def square_bins(vector_P: torch.Tensor, counts_EH: torch.Tensor) -> None:
    """Add Σ v² to counts (256 exponents, 2 halves; int64), exactly, so that neither order nor cuts matter.

    Under an entry's exponent: the low 24 bits of its squared mantissa, and the others. NaN and Inf fall under 255.
    """
    if _usable(vector_P) and vector_P.dtype == torch.float32 and vector_P.is_contiguous():
        _native.CALL["square_bins"](vector_P.data_ptr(), vector_P.numel(), counts_EH.data_ptr())
    else:
        _torch.square_bins(vector_P, counts_EH)


def apply(
    operation: Operation,
    task_vectors_TP: torch.Tensor,
    weights_T: torch.Tensor,
    *,
    keys: Sequence[int] = (),
    offset: int = 0,
    thresholds: Sequence[int] = (),
    allowed: Sequence[int] = (),
) -> torch.Tensor:
    """An operation step by step: (T, P) task vectors -> (P,)."""
    rows_TP = task_vectors_TP
    if operation.prepare == "drop":
        rows_TP = drop(rows_TP, keys, offset, operation.density, operation.rescale)
    elif operation.prepare == "trim":
        rows_TP = trim(rows_TP, thresholds, allowed)
    if operation.combine == "consensus":
        return consensus(
            *(rows_TP, weights_T, operation.threshold, operation.agreement, operation.scaling),
            unweighted=operation.unweighted,
            soft=operation.soft,
        )
    if operation.combine == "elect":
        return elect_and_average(rows_TP, weights_T, operation.scaling)
    return weighted_sum(rows_TP, weights_T, operation.scaling)
