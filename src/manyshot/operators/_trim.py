"""Exact trimming to the largest magnitudes, without a sort and without holding the vector.

A float32 magnitude is ordered as its bits are, so the k-th largest is found by counting: first the high 15 bits of all
entries, then the low 16 bits of those that share the k-th's high bits. Where entries equal to the k-th are more than
may stay, the first ones in order stay, so exactly k entries are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manyshot import kernels

if TYPE_CHECKING:
    import torch

Counts = np.ndarray[Any, np.dtype[np.int64]]
HIGH_BINS, LOW_BINS = 1 << 15, 1 << 16


def num_kept(density: float, num_entries: int) -> int:
    """Entries that a trim to `density` keeps: ⌊density · n⌋, but at least one."""
    return max(1, int(density * num_entries)) if num_entries else 0


class TrimScan:
    """Finds each task's threshold: the bits of its k-th largest magnitude, and how many entries equal to it stay."""

    def __init__(self, num_tasks: int, num_entries: int, density: float) -> None:
        self.stage = 0
        self.num_tasks = num_tasks
        self.num_kept = num_kept(density, num_entries)
        self.highs = [0] * num_tasks
        self.left = [self.num_kept] * num_tasks  # how many are to be kept from the current bin
        self.thresholds = [0] * num_tasks
        # nothing is trimmed, and nothing has to be counted
        self.done = self.num_kept >= num_entries
        if self.done:
            self.left = [num_entries] * num_tasks

    @property
    def per_tile(self) -> bool:
        return self.stage == 2

    def counts_shape(self) -> tuple[int, ...]:
        return ((self.num_tasks, HIGH_BINS), (self.num_tasks, LOW_BINS), (self.num_tasks,))[self.stage]

    @property
    def words(self) -> list[int]:
        """What the pass that is due looks for in each task: nothing, high bits, or whole magnitudes."""
        return ([0] * self.num_tasks, self.highs, self.thresholds)[self.stage]

    def allowed(self, preceding: Sequence[int]) -> list[int]:
        """Entries equal to each task's threshold that may still stay, after `preceding` of them."""
        return [left - before for left, before in zip(self.left, preceding, strict=True)]

    def observe(self, task_vectors_TP: torch.Tensor, weights_T: torch.Tensor, counts: Counts) -> None:
        import torch

        counted = torch.as_tensor(counts)  # the same memory
        if self.stage == 0:
            kernels.histogram_high(task_vectors_TP, counted)
        elif self.stage == 1:
            kernels.histogram_low(task_vectors_TP, self.highs, counted)
        else:
            kernels.count_equal(task_vectors_TP, self.thresholds, counted)

    def advance(self, counts: Counts) -> None:
        if self.stage == 2:
            self.done = True
            return
        counts = np.asarray(counts)
        split = False  # whether some but not all entries equal to a threshold stay
        for task in range(self.num_tasks):
            found, above = _bin_of_kth(counts[task], self.left[task])
            self.left[task] -= above
            if self.stage == 0:
                self.highs[task] = found
                continue
            self.thresholds[task] = self.highs[task] << 16 | found
            if self.thresholds[task] == 0:
                self.left[task] = 0  # zeros are zeros, kept or not
            split |= 0 < self.left[task] < int(counts[task, found])
        self.stage += 1
        self.done = self.stage == 2 and not split


def _bin_of_kth(counts_B: Counts, kth: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many entries lie in higher bins."""
    up_to_B = counts_B.cumsum(0)
    total = int(up_to_B[-1])
    # the k-th largest of n is the (n − k + 1)-th smallest
    found = int(np.searchsorted(up_to_B, total - kth + 1))
    return found, total - int(up_to_B[found])
