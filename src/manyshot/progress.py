"""What a run tells while it goes: one place that times every phase, writes metrics.jsonl, and feeds whoever listens.

The library never prints. A listener (the CLI's live table, plain lines, JSON lines, or nothing) receives Events.
metrics.jsonl has a line when a phase starts, when it is done, and every few seconds in between, so that a run can be
watched from elsewhere, and one that died be told from one that takes its time.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from manyshot.memory import PeakMemory
from manyshot.rundir import append_line
from manyshot.secret_text import redacted

# phases whose time is training or evaluation; all others are the run's own overhead
WORK_PHASES = ("local_update", "validation", "score")
# between two lines about a phase that goes on; what watches a run takes silence of much longer than this for its end
BEAT = 5.0

Kind = Literal["start", "advance", "end", "message", "round"]


@dataclass(frozen=True)
class Event:
    """One thing that happened. `done` of `total` items (steps or examples) of a phase; `text` for messages.

    `round`: a round is over, with all of its files there; in a resumed run also those that were over before.
    """

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
        self._beat = time.monotonic()

    def tick(self, count: int = 1, loss: float | None = None) -> None:
        self._done += count
        event = self._event
        self._progress.listener(
            Event("advance", event.phase, event.round_index, event.task, self._done, event.total, loss)
        )
        if time.monotonic() - self._beat >= BEAT:
            self._beat = time.monotonic()
            place = {"phase": event.phase, "round": event.round_index, "task": event.task, "total": event.total}
            self._progress.record("advance", **place, done=self._done, loss=loss)


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
        place = {"phase": phase, "round": round_index, "task": task, "total": total}
        self.record("start", **place)
        self.listener(event)
        memory, started = PeakMemory(), time.perf_counter()
        try:
            yield TimedPhase(self, event)
            seconds = time.perf_counter() - started
        finally:
            held = memory.stop()
        self.record("phase", **place, seconds=round(seconds, 4), **held, **values)
        self.listener(Event("end", phase, round_index, task, total or 0, total, values={"seconds": seconds} | values))

    def message(self, text: str, **values: Any) -> None:
        """Something a person should read now."""
        self.listener(Event("message", "message", text=redacted(text), values=values))

    def finished_round(self, round_index: int) -> None:
        """All files of a round are there."""
        self.listener(Event("round", "round", round_index))

    def record(self, kind: str, **values: Any) -> None:
        """Append one line to metrics.jsonl."""
        if self.metrics is not None:
            shown = {name: redacted(value) if isinstance(value, str) else value for name, value in values.items()}
            append_line(self.metrics, {"kind": kind, "time": round(time.time(), 3)} | shown)


class Telling(Progress):
    """Of another process than the run's: writes what happens as lines, which pass_on reads where the run is."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(lambda event: self._tell({"event": event.to_json()}))
        self._stream = stream

    def record(self, kind: str, **values: Any) -> None:
        self._tell({"record": kind, "values": values})

    def _tell(self, value: dict[str, Any]) -> None:
        self._stream.write(json.dumps(value) + "\n")
        self._stream.flush()


def pass_on(told: Path, read: int, progress: Progress, **more: Any) -> int:
    """Tell what another process told after `read` bytes, as if it had happened here; records have `more` beside it.

    Returns the bytes that are read now. A file that is not there tells nothing; a line that is not all there yet waits.
    """
    try:
        with open(told, "rb") as stream:
            stream.seek(read)
            complete, end, _ = stream.read().rpartition(b"\n")
    except FileNotFoundError:
        return read
    for line in complete.splitlines():
        value = json.loads(line)
        if "event" in value:
            progress.listener(Event(**value["event"]))
        else:
            progress.record(value["record"], **value["values"], **more)
    return read + len(complete) + len(end)


def covered_seconds(lines: Sequence[Mapping[str, Any]], phases: Sequence[str]) -> float:
    """For how long at least one of these phases went on: several may at once."""
    spans = sorted(
        (line["time"] - line["seconds"], line["time"])
        for line in lines
        if line.get("kind") == "phase" and line.get("phase") in phases
    )
    covered, end = 0.0, float("-inf")
    for begin, stop in spans:
        covered += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return covered


def wall_seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    """How long a run has gone on, from its metrics; the pause before a resume does not count."""
    wall, began, last = 0.0, None, 0.0
    for line in lines:
        if line.get("kind") == "begin":
            wall += last - began if began is not None else 0.0
            began = line.get("began", line["time"])
        last = line["time"]
    return wall + (last - began if began is not None else 0.0)
