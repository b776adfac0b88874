"""The table of operators.

A new one adds its file, a line here, a row in tests/test_operators.py and a section in docs/operators.md.
"""

from __future__ import annotations

from manyshot.operators._base import Operator
from manyshot.operators.mean import Mean
from manyshot.operators.metis import Metis

OPERATORS: dict[str, type[Operator]] = {"mean": Mean, "metis": Metis}

__all__ = ["OPERATORS", "Mean", "Metis", "Operator"]
