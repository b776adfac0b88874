"""manyshot: one model out of many fine-tunes, merged in rounds.

The public names are loaded when first used, so that `import manyshot` and the command line stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyshot.api import compare as compare
    from manyshot.api import extend as extend
    from manyshot.api import merge as merge
    from manyshot.api import report as report
    from manyshot.api import run as run
    from manyshot.api import tune as tune
    from manyshot.compare_recipe import CompareRecipe as CompareRecipe
    from manyshot.comparison import CompareResult as CompareResult
    from manyshot.errors import ManyshotError as ManyshotError
    from manyshot.eval_command import EvalResult as EvalResult
    from manyshot.eval_command import evaluate_model as evaluate_model
    from manyshot.export_command import ExportResult as ExportResult
    from manyshot.export_command import export_run as export_run
    from manyshot.harness import HarnessSettings as HarnessSettings
    from manyshot.merge_recipe import MergeRecipe as MergeRecipe
    from manyshot.operators import OPERATORS as OPERATORS
    from manyshot.operators import ConsensusTA as ConsensusTA
    from manyshot.operators import Dare as Dare
    from manyshot.operators import IsoC as IsoC
    from manyshot.operators import MatrixOperator as MatrixOperator
    from manyshot.operators import Mean as Mean
    from manyshot.operators import Metis as Metis
    from manyshot.operators import Operator as Operator
    from manyshot.operators import TaskArithmetic as TaskArithmetic
    from manyshot.operators import Ties as Ties
    from manyshot.operators import Tile as Tile
    from manyshot.operators import TsvM as TsvM
    from manyshot.operators import merge_whole as merge_whole
    from manyshot.recipe import Recipe as Recipe
    from manyshot.recipe_file import load_recipe as load_recipe
    from manyshot.report_command import ReportResult as ReportResult
    from manyshot.runner import RunResult as RunResult
    from manyshot.tune_recipe import TuneRecipe as TuneRecipe
    from manyshot.tuning import TuneResult as TuneResult

    __version__: str

_PUBLIC = {
    "run": "manyshot.api",
    "extend": "manyshot.api",
    "merge": "manyshot.api",
    "compare": "manyshot.api",
    "report": "manyshot.api",
    "ReportResult": "manyshot.report_command",
    "tune": "manyshot.api",
    "evaluate_model": "manyshot.eval_command",
    "EvalResult": "manyshot.eval_command",
    "export_run": "manyshot.export_command",
    "ExportResult": "manyshot.export_command",
    "HarnessSettings": "manyshot.harness",
    "RunResult": "manyshot.runner",
    "Recipe": "manyshot.recipe",
    "MergeRecipe": "manyshot.merge_recipe",
    "CompareRecipe": "manyshot.compare_recipe",
    "CompareResult": "manyshot.comparison",
    "TuneRecipe": "manyshot.tune_recipe",
    "TuneResult": "manyshot.tuning",
    "load_recipe": "manyshot.recipe_file",
    "ManyshotError": "manyshot.errors",
    "OPERATORS": "manyshot.operators",
    "ConsensusTA": "manyshot.operators",
    "Dare": "manyshot.operators",
    "IsoC": "manyshot.operators",
    "MatrixOperator": "manyshot.operators",
    "Mean": "manyshot.operators",
    "Metis": "manyshot.operators",
    "Operator": "manyshot.operators",
    "TaskArithmetic": "manyshot.operators",
    "Ties": "manyshot.operators",
    "Tile": "manyshot.operators",
    "TsvM": "manyshot.operators",
    "merge_whole": "manyshot.operators",
}

__all__ = [
    "OPERATORS",
    "CompareRecipe",
    "CompareResult",
    "ConsensusTA",
    "Dare",
    "EvalResult",
    "ExportResult",
    "HarnessSettings",
    "IsoC",
    "ManyshotError",
    "MatrixOperator",
    "Mean",
    "MergeRecipe",
    "Metis",
    "Operator",
    "Recipe",
    "ReportResult",
    "RunResult",
    "TaskArithmetic",
    "Ties",
    "Tile",
    "TsvM",
    "TuneRecipe",
    "TuneResult",
    "__version__",
    "compare",
    "evaluate_model",
    "export_run",
    "extend",
    "load_recipe",
    "merge",
    "merge_whole",
    "report",
    "run",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _PUBLIC:
        raise AttributeError(f"module 'manyshot' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("manyshot")
    except PackageNotFoundError:  # a source tree that is not installed
        return "0+unknown"
