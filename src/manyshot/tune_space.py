"""The space that a search tries settings from: one dimension per setting, a range of numbers or a list of choices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Settings = dict[str, Any]
# a value this close to a step of the range is that step
STEP_ERROR = 1e-8


@dataclass(frozen=True)
class Dimension:
    """One searched setting, such as `operator.temperature`: `choices`, or the numbers from `low` to `high`."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    whole: bool = False

    def values(self) -> list[Any]:
        """Every value, where there are finitely many."""
        if self.choices:
            return list(self.choices)
        step = self.step or 1.0  # a range without a step is finite where its numbers are whole
        count = int((self.high - self.low) / step + STEP_ERROR) + 1
        return [self.number(self.low + i * step) for i in range(count)]

    def number(self, value: float) -> float | int:
        """A number of the range as the recipe takes it."""
        if self.whole:
            return round(value)
        return float(value) if self.step is None else round(float(value), 12)  # 0.1 + 2 · 0.1 is meant to be 0.3

    def holds(self, value: Any) -> bool:
        """Whether the value is one that the search may come to."""
        if self.choices:
            return any(same(value, choice) for choice in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = (value - self.low) / (self.step or 1.0)
        return (self.step is None and not self.whole) or abs(steps - round(steps)) <= STEP_ERROR


def same(left: Any, right: Any) -> bool:
    """Whether two settings are the same: 1 and 1.0 are, 1 and true are not; a list is the tuple it becomes."""
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(same(one, other) for one, other in zip(left, right, strict=True))
    return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)


def same_settings(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)


def grid(dimensions: Sequence[Dimension]) -> Iterator[Settings]:
    """Every combination of the dimensions' values, the last dimension fastest."""
    for values in itertools.product(*(dimension.values() for dimension in dimensions)):
        yield dict(zip((dimension.name for dimension in dimensions), values, strict=True))


def grid_size(dimensions: Sequence[Dimension]) -> int:
    size = 1
    for dimension in dimensions:
        size *= len(dimension.values())
    return size


def shown_value(value: Any) -> str:
    """A setting as people read it."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
