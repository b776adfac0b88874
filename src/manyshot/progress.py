"""What a run tells while it goes: one place that times every phase, writes metrics.jsonl, and feeds whoever listens.

The library never prints. A listener (the CLI's progress bars, plain lines, JSON lines, or nothing) receives Events.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from manyshot.rundir import append_line

# phases whose time is training or evaluation; all others are the run's own overhead
WORK_PHASES = ("local_update", "validation", "score")

Kind = Literal["start", "advance", "end", "message"]


@dataclass(frozen=True)
class Event:
    """One thing that happened. `done` of `total` items (steps or examples) of a phase; `text` for messages."""

    kind: Kind
    phase: str
    round_index: int = 0
    task: str = ""
    done: int = 0
    total: int | None = None
    loss: float | None = None
    text: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


Listener = Callable[[Event], None]


class TimedPhase:
    """A phase that is running; `tick(n, loss)` says that n more items are done."""

    def __init__(self, progress: Progress, event: Event) -> None:
        self._progress = progress
        self._event = event
        self._done = 0

    def tick(self, count: int = 1, loss: float | None = None) -> None:
        self._done += count
        event = self._event
        self._progress.listener(
            Event("advance", event.phase, event.round_index, event.task, self._done, event.total, loss)
        )


class Progress:
    """Times phases and passes events on. Without a metrics file it only listens."""

    def __init__(self, listener: Listener | None = None, metrics: Path | None = None) -> None:
        self.listener: Listener = listener or (lambda event: None)
        self.metrics = metrics

    @contextmanager
    def timed(
        self, phase: str, round_index: int = 0, task: str = "", total: int | None = None, **values: Any
    ) -> Iterator[TimedPhase]:
        """Time a phase; on success its line goes to metrics.jsonl."""
        event = Event("start", phase, round_index, task, total=total)
        self.listener(event)
        started = time.perf_counter()
        yield TimedPhase(self, event)
        seconds = time.perf_counter() - started
        self.record("phase", phase=phase, round=round_index, task=task, seconds=round(seconds, 4), **values)
        self.listener(Event("end", phase, round_index, task, total or 0, total, values={"seconds": seconds} | values))

    def message(self, text: str, **values: Any) -> None:
        """Something a person should read now."""
        self.listener(Event("message", "message", text=text, values=values))

    def record(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.metrics is not None:
            append_line(self.metrics, {"kind": kind, "time": round(time.time(), 3)} | values)
