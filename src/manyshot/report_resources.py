"""What a run cost: seconds, tokens and memory per phase from metrics.jsonl, and what its folder holds on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from manyshot.progress import wall_seconds
from manyshot.report_data import Phase, number
from manyshot.rundir import read_lines

# phases in the order in which people think of them, by the name in metrics.jsonl
PHASES = {
    "local_update": "training",
    "validation": "validation losses",
    "score": "test scores",
    "merge": "merging",
    "search": "line search",
    "load": "loading models",
    "save": "saving",
    "check": "checking the result",
}
# what a file of a run folder belongs to, by a part of its path, and the phase that writes it; the first that fits
KINDS = (
    ("merged", "merged models", "save"),
    ("carried_adapter", "carried adapters", "merge"),
    ("adapter", "adapters", "save"),
    ("model", "fine-tuned models", "save"),
    ("optimizer.safetensors", "optimizers' states", "save"),
    ("task_vector.safetensors", "task vectors (float32)", "merge"),
    ("outer_state.safetensors", "outer optimizer's state", "merge"),
    ("outputs.json", "answers to test examples", "score"),
)
OTHER = "records"
# characters of what a run failed with that are shown
LONGEST_ERROR = 300
# kind of file -> the phase that writes it, as people read it
WRITTEN_BY = {kind: PHASES[phase] for _, kind, phase in KINDS}


def read_phases(metrics: Iterable[Path]) -> list[Phase]:
    """Sums over files, rounds and tasks of every phase; those without a name of their own come last, by theirs."""
    found = [line for file in metrics for line in read_lines(file)]
    lines = [line for line in found if line.get("kind") == "phase" and line.get("phase")]
    names = list(dict.fromkeys(str(line["phase"]) for line in lines))
    order = [name for name in PHASES if name in names] + [name for name in names if name not in PHASES]
    return [_phase(name, [line for line in lines if line["phase"] == name]) for name in order]


def _phase(name: str, lines: list[dict[str, Any]]) -> Phase:
    tokens, memory, on_gpu = (
        [value for line in lines if (value := number(line.get(key)))] for key in ("tokens", "memory", "gpu_memory")
    )
    return Phase(
        name=PHASES.get(name, name.replace("_", " ")),
        seconds=sum(number(line.get("seconds")) or 0.0 for line in lines),
        count=len(lines),
        tokens=int(sum(tokens)) if tokens else None,
        memory=int(max(memory)) if memory else None,
        gpu_memory=int(max(on_gpu)) if on_gpu else None,
    )


def seconds_in_all(metrics: Path) -> float | None:
    """Seconds from begin to end, pauses before a resume left out; None where nothing tells of a begin."""
    lines = [line for line in read_lines(metrics) if number(line.get("time")) is not None]
    return wall_seconds(lines) if any(line.get("kind") == "begin" for line in lines) else None


def read_failure(metrics: Path) -> str | None:
    """What a run ended with that did not finish; None where it did, goes on, or was killed."""
    lines = read_lines(metrics)
    if not lines or lines[-1].get("kind") != "failed":
        return None
    text = " ".join(str(lines[-1].get("error")).split()).rstrip(".")
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]} …"


def disk_use(folder: Path) -> dict[str, int]:
    """Bytes by what they are, largest first; a file of several names counts once, links and reports not at all."""
    found, seen = dict[str, int](), set[tuple[int, int]]()
    for place, _, files in sorted(os.walk(folder)):
        parts = Path(place).relative_to(folder).parts
        for file in files:
            path = Path(place, file)
            if not path.is_symlink() and not file.startswith("report."):
                kind = next((kind for name, kind, _ in KINDS if name in (*parts, file)), OTHER)
                with suppress(FileNotFoundError):  # a run that goes on has just renamed or removed it
                    status = path.stat()
                    if (status.st_dev, status.st_ino) not in seen:
                        seen.add((status.st_dev, status.st_ino))
                        found[kind] = found.get(kind, 0) + status.st_size
    return dict(sorted(found.items(), key=lambda item: -item[1]))
