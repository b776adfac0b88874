"""Where a write can be cut short: everything that writes artefacts passes here, and the crash harness listens.

Without listeners nothing happens. The points of one file, in order: `open` (its partial name is there), `piece` (a part
of its tensors is written), `write` (the system has all of it), `fsync`, `rename`, `named` (its folder is not durable
yet); of a log: `append`, `appended`; of what goes away: `remove`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

LISTENERS: list[Callable[[str, Path], None]] = []


def passing(point: str, path: Path) -> None:
    """Say that a write of `path` has come to `point`."""
    for listener in LISTENERS:
        listener(point, path)
