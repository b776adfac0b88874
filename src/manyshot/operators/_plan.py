"""Which operator merges which tensor: one for all, others by name pattern."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from manyshot.operators._base import Operator


@dataclass(frozen=True)
class OperatorPlan:
    """An operator for every tensor name. Of the patterns (as in a shell: * ? [ ]) that fit a name, the last wins."""

    default: Operator
    overrides: tuple[tuple[str, Operator], ...] = ()

    def for_tensor(self, name: str) -> Operator:
        fitting = [operator for pattern, operator in self.overrides if fnmatchcase(name, pattern)]
        return fitting[-1] if fitting else self.default

    def at_round(self, round_index: int) -> OperatorPlan:
        """Every per-round value replaced by its value for the round (1-based)."""
        overrides = tuple((pattern, operator.at_round(round_index)) for pattern, operator in self.overrides)
        return OperatorPlan(self.default.at_round(round_index), overrides)

    @property
    def searches_scaling(self) -> bool:
        """Whether a line search finds β (`scaling: auto` of the default operator)."""
        return self.default.searches_scaling

    def with_scaling(self, scaling: float) -> OperatorPlan:
        """A number for every `scaling: auto`; overrides that have a scaling of their own keep it."""
        overrides = tuple((pattern, operator.with_scaling(scaling)) for pattern, operator in self.overrides)
        return OperatorPlan(self.default.with_scaling(scaling), overrides)

    def unused(self, names: Iterable[str]) -> list[str]:
        """Patterns that fit none of the names."""
        names = list(names)
        return [pattern for pattern, _ in self.overrides if not any(fnmatchcase(name, pattern) for name in names)]

    def weights_for(self, operator: Operator, weights: tuple[float, ...]) -> tuple[float, ...]:
        """The default operator's weights as `operator` understands them: a mean's sum to 1, a sum's are multipliers."""
        if operator.weighting == self.default.weighting:
            return weights
        if operator.weighting == "multiplier":
            return tuple(weight * len(weights) for weight in weights)
        total = sum(weights)
        if total == 0:
            raise ValueError(f"the weights sum to 0, and {operator.name} divides by their sum")
        return tuple(weight / total for weight in weights)
