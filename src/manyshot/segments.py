"""Runs that were extended: what each part of a run was begun with. Its own recipe.yaml is that of the last part.

extended.json: {"segments": [{"rounds": 2, "tasks": ["math", …], "recipe": {…}}, …]}: up to which round, with which
tasks, by which resolved recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manyshot.errors import RunFolderError
from manyshot.rundir import read_json, write_json

EXTENDED = "extended.json"


@dataclass(frozen=True)
class Segment:
    """A part of a run that is over: it ended with round `rounds`."""

    rounds: int
    tasks: list[str]
    recipe: dict[str, Any]


def read_segments(run: Path) -> list[Segment]:
    """The parts before the last, oldest first; none of a run that was never extended."""
    path = run / EXTENDED
    if not path.exists():
        return []
    try:
        found = [Segment(**segment) for segment in read_json(path)["segments"]]
    except (KeyError, TypeError) as error:
        raise RunFolderError(f"{path}: damaged ({error})") from None
    rounds = [segment.rounds for segment in found]
    if not all(isinstance(one, int) for one in rounds) or rounds != sorted(set(rounds)):
        raise RunFolderError(f"{path}: damaged (rounds {rounds})")
    return found


def write_segments(run: Path, segments: Sequence[Segment]) -> None:
    write_json(run / EXTENDED, {"segments": [asdict(segment) for segment in segments]})


def first_rounds(run: Path, tasks: Sequence[str]) -> Mapping[str, int]:
    """The first round of every task that was not there from the beginning."""
    segments = read_segments(run)
    found = {}
    for task in tasks:
        without = [segment.rounds for segment in segments if task not in segment.tasks]
        if without:
            found[task] = without[-1] + 1
    return found
