"""metrics.jsonl while it grows: new lines as they are complete, and what they say is going on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyshot.rundir import require_regular

Line = dict[str, Any]


class MetricsTail:
    """Reads what was appended since the last look. A half-written last line waits until it has its end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[Line] = []
        self._offset = 0
        self._file: tuple[int, int] | None = None

    def read(self) -> list[Line]:
        """All complete lines so far. A file that was replaced (--force) is read from its start."""
        require_regular(self.path)
        try:
            with open(self.path, "rb") as stream:
                status = self.path.stat()
                if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
                    self.lines, self._offset, self._file = [], 0, (status.st_dev, status.st_ino)
                stream.seek(self._offset)
                complete, end, _ = stream.read().rpartition(b"\n")
        except FileNotFoundError:
            self.lines, self._offset, self._file = [], 0, None
            return []
        self._offset += len(complete) + len(end)
        self.lines += _objects(complete)
        return self.lines


def _objects(blob: bytes) -> list[Line]:
    """The lines that are JSON objects with a time: a crash may have cut one off, and a resume closed it."""
    found = []
    for line in blob.split(b"\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and isinstance(value.get("time"), int | float):
            found.append(value)
    return found


@dataclass(frozen=True)
class Doing:
    """The phase that is going on: `done` of `total` steps or examples."""

    phase: str
    round_index: int
    task: str
    done: int
    total: int | None
    loss: float | None
    since: float


def doing(lines: Sequence[Mapping[str, Any]]) -> Doing | None:
    """What the last lines say is going on; None between two phases. Of several jobs at once, the last that told."""
    found: Doing | None = None
    ended: set[Any] = set()
    for line in reversed(lines):
        if (job := line.get("job")) is not None and found is None:
            if line.get("kind") == "phase":
                ended.add(job)  # which says nothing of the others
            if job in ended:
                continue
        if line.get("kind") == "advance" and found is None:
            found = _doing(line)
        elif line.get("kind") == "start":
            if found is not None and _place(line) != (found.phase, found.round_index, found.task):
                continue  # of a job that runs beside it
            since = float(line["time"])
            return _doing(line) if found is None else Doing(**(vars(found) | {"since": since}))
        elif line.get("kind") in ("begin", "end", "failed") or (line.get("kind") == "phase" and job is None):
            return None
    return None


def _place(line: Mapping[str, Any]) -> tuple[str, int, str]:
    return str(line["phase"]), int(line["round"]), str(line["task"])


def _doing(line: Mapping[str, Any]) -> Doing:
    return Doing(*_place(line), line.get("done", 0), line.get("total"), line.get("loss"), float(line["time"]))


def last_of(lines: Sequence[Line], kind: str) -> Line | None:
    """The last line of a kind."""
    return next((line for line in reversed(lines) if line.get("kind") == kind), None)
