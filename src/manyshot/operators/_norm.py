"""By how much a mask shortens a tensor's merged vector, exactly, so that the rest can be given its length back.

A float32 is m · 2^(e − 150), with an integer m below 2²⁴ and e its exponent (1 for the smallest). So a sum of squares
is an integer in units of 2^−298, and it is added up as one: exponent by exponent, in whole numbers. Then neither the
order of the entries nor the cuts between tiles change a bit of it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from manyshot import kernels

if TYPE_CHECKING:
    import torch

Counts = np.ndarray[Any, np.dtype[np.int64]]
# of a float32; the last exponent is that of Inf and NaN
EXPONENTS, HALF_BITS = 256, 24
# where next to nothing is kept; a number beyond float32 would turn it into Inf
LARGEST_FACTOR = 2.0**64


class NormScan:
    """Finds f = ‖V‖ / ‖kept‖ over a tensor: V = Σ w v, kept = what an operation (of scaling 1) leaves of it."""

    def __init__(self, operation: kernels.Operation) -> None:
        self.operation = replace(operation, scaling=1.0)
        self.factor = 1.0
        self.done = False

    @property
    def per_tile(self) -> bool:
        return False

    def counts_shape(self) -> tuple[int, ...]:
        return 2, EXPONENTS, 2

    def observe(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, counts: Counts) -> None:
        import torch

        whole_EH, kept_EH = torch.as_tensor(counts)  # the same memory
        kernels.square_bins(kernels.weighted_sum(task_vectors_TP, weights_T), whole_EH)
        kernels.square_bins(kernels.apply(self.operation, task_vectors_TP, weights_T), kept_EH)

    def advance(self, counts: Counts) -> None:
        whole, kept = (_square(counts_EH) for counts_EH in counts)
        if kept:
            self.factor = min(math.sqrt(whole / kept), LARGEST_FACTOR)
        self.done = True

    def rescaled(self, operation: kernels.Operation) -> kernels.Operation:
        """An operation whose result has the length that it had without the mask, times its scaling."""
        return replace(operation, scaling=operation.scaling * self.factor)


def _square(counts_EH: Counts) -> int:
    """Σ v² in units of 2^−298, of finite entries."""
    parts = ((max(exponent, 1) - 1, int(low), int(high)) for exponent, (low, high) in enumerate(counts_EH[:-1]))
    return sum((low + (high << HALF_BITS)) << 2 * shift for shift, low, high in parts)
