"""Values of another shape than the reader expects, as errors that name where they came from.

What a program writes of itself is read as it wrote it, without a check of every key. Somebody else's file, or one that
was edited, may hold anything in its place; what then fails in the middle of the reader says nothing to anybody.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from manyshot.errors import ManyshotError

P = ParamSpec("P")
R = TypeVar("R")


def misshapen(kind: type[ManyshotError], what: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For a function of a path, of several, or of what has a `path`: it raises `kind`, naming that and `what`, where it
    meets values that it is not made for.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                place = getattr(args[0], "path", args[0])
                named = ", ".join(map(str, place)) if isinstance(place, list | tuple) else str(place)
                raise kind(f"{named}: {what} ({type(error).__name__}: {error})") from error

        return guarded

    return decorate
