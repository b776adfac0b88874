"""manyshot: one model out of many fine-tunes, merged in rounds.

The public names are loaded when first used, so that `import manyshot` and the command line stay light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyshot.api import run as run
    from manyshot.errors import ManyshotError as ManyshotError
    from manyshot.operators import OPERATORS as OPERATORS
    from manyshot.operators import Mean as Mean
    from manyshot.operators import Metis as Metis
    from manyshot.operators import Operator as Operator
    from manyshot.recipe import Recipe as Recipe
    from manyshot.recipe_file import load_recipe as load_recipe
    from manyshot.run import RunResult as RunResult

    __version__: str

_PUBLIC = {
    "run": "manyshot.api",
    "RunResult": "manyshot.run",
    "Recipe": "manyshot.recipe",
    "load_recipe": "manyshot.recipe_file",
    "ManyshotError": "manyshot.errors",
    "OPERATORS": "manyshot.operators",
    "Operator": "manyshot.operators",
    "Mean": "manyshot.operators",
    "Metis": "manyshot.operators",
}

__all__ = [
    "OPERATORS",
    "ManyshotError",
    "Mean",
    "Metis",
    "Operator",
    "Recipe",
    "RunResult",
    "__version__",
    "load_recipe",
    "run",
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
