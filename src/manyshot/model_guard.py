"""What a model's folder may do to whoever loads it: raise whatever it likes, or ask for more than there is time for."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manyshot.errors import ManyshotError, ModelError

# building a model takes time for each of these: the deepest have hundreds of layers, the widest hundreds of experts
MOST = 10_000
COUNTS = re.compile(r"layer|expert|block")


@contextmanager
def as_one_error(what: str) -> Iterator[None]:
    """Whatever transformers raises, from inside of all that it builds of a folder's files, as a ModelError."""
    try:
        yield
    except (ManyshotError, MemoryError):
        raise
    except BaseException as error:
        # of any type; where the Rust libraries end in a panic, it is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ModelError(f"{what} ({error})") from None


def refuse_endless(file: Path) -> None:
    """Raises ModelError for a config.json with more layers, experts or blocks than any model has.

    What is no JSON is left to whoever reads it.
    """
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    for key, value in _numbers(config):
        if COUNTS.search(key) and key.startswith(("n_", "num_")) and value > MOST:
            shown = f"{value:.4g}" if value < sys.float_info.max else "beyond 1e308"
            raise ModelError(f"{file}: '{key}' is {shown}; no model has more than {MOST:,}")


def _numbers(value: object) -> Iterator[tuple[str, float]]:
    """Every number of nested sections, with its key."""
    sections = [value]
    while sections:
        section = sections.pop()
        for key, part in section.items() if isinstance(section, dict) else ():
            if isinstance(part, int | float):
                yield key, part
            sections.append(part)
