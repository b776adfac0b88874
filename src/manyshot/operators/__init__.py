"""The table of operators: ours, and those that installed packages bring through the entry point `manyshot.operators`.

One of ours adds its file, a line here, a row in tests/test_operators.py and a page in docs/operators/.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points

from manyshot.operators._base import MatrixOperator, Operator, Scan, Tile, merge_whole, tile_key
from manyshot.operators._norm import NormScan
from manyshot.operators._plan import OperatorPlan
from manyshot.operators._trim import TrimScan
from manyshot.operators.consensus_ta import ConsensusTA
from manyshot.operators.dare import Dare
from manyshot.operators.iso_c import IsoC
from manyshot.operators.mean import Mean
from manyshot.operators.metis import Metis
from manyshot.operators.task_arithmetic import TaskArithmetic
from manyshot.operators.ties import Ties
from manyshot.operators.tsv_m import TsvM

GROUP = "manyshot.operators"
BUILT_IN: dict[str, type[Operator]] = {
    "mean": Mean,
    "task_arithmetic": TaskArithmetic,
    "dare": Dare,
    "ties": Ties,
    "consensus_ta": ConsensusTA,
    "metis": Metis,
    "iso_c": IsoC,
    "tsv_m": TsvM,
}


def load_operator(entry: EntryPoint) -> type[Operator]:
    """The operator class of an entry point. Raises TypeError or ValueError that names the package at fault."""
    found = entry.load()
    where = f"entry point '{entry.name} = {entry.value}' ({GROUP})"
    # a class that only inherits from a dataclass has none of its own fields
    if not (isinstance(found, type) and issubclass(found, Operator) and "__dataclass_fields__" in vars(found)):
        raise TypeError(f"{where}: not a frozen dataclass that derives from manyshot.Operator")
    name = getattr(found, "name", None)
    if name != entry.name:
        raise ValueError(f"{where}: the class calls itself '{name}'; both names must be the same")
    if entry.name in BUILT_IN:
        raise ValueError(f"{where}: there is an operator of that name already")
    return found


def _table() -> dict[str, type[Operator]]:
    installed = sorted(entry_points(group=GROUP), key=lambda entry: entry.name)
    return BUILT_IN | {entry.name: load_operator(entry) for entry in installed}


OPERATORS: dict[str, type[Operator]] = _table()

__all__ = [
    "BUILT_IN",
    "OPERATORS",
    "ConsensusTA",
    "Dare",
    "IsoC",
    "MatrixOperator",
    "Mean",
    "Metis",
    "NormScan",
    "Operator",
    "OperatorPlan",
    "Scan",
    "TaskArithmetic",
    "Ties",
    "Tile",
    "TrimScan",
    "TsvM",
    "load_operator",
    "merge_whole",
    "tile_key",
]
