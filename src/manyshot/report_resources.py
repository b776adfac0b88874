"""What a run cost: seconds, tokens and memory per phase from metrics.jsonl, and what its folder holds on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
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
# what a file of a run folder belongs to, by a part of its path; the first that fits
KINDS = (
    ("merged", "merged models"),
    ("adapter", "adapters"),
    ("carried_adapter", "adapters"),
    ("model", "fine-tuned models"),
    ("task_vector.safetensors", "task vectors (float32)"),
    ("outputs.json", "answers to test examples"),
)


def read_phases(metrics: Iterable[Path]) -> list[Phase]:
    """Sums over files, rounds and tasks of every phase; those without a name of their own come last, by theirs."""
    found = [line for file in metrics for line in read_lines(file)]
    lines = [line for line in found if line.get("kind") == "phase" and line.get("phase")]
    names = list(dict.fromkeys(str(line["phase"]) for line in lines))
    order = [name for name in PHASES if name in names] + [name for name in names if name not in PHASES]
    return [_phase(name, [line for line in lines if line["phase"] == name]) for name in order]


def _phase(name: str, lines: list[dict[str, Any]]) -> Phase:
    tokens, memory = ([value for line in lines if (value := number(line.get(key)))] for key in ("tokens", "memory"))
    return Phase(
        name=PHASES.get(name, name.replace("_", " ")),
        seconds=sum(number(line.get("seconds")) or 0.0 for line in lines),
        count=len(lines),
        tokens=int(sum(tokens)) if tokens else None,
        memory=int(max(memory)) if memory else None,
    )


def seconds_in_all(metrics: Path) -> float | None:
    """Seconds from begin to end, pauses before a resume left out; None where nothing tells of a begin."""
    lines = [line for line in read_lines(metrics) if number(line.get("time")) is not None]
    return wall_seconds(lines) if any(line.get("kind") == "begin" for line in lines) else None


def disk_use(folder: Path) -> dict[str, int]:
    """Bytes by what they are, largest first; links are not followed, and reports do not count themselves."""
    found: dict[str, int] = {}
    for place, _, files in os.walk(folder):
        parts = Path(place).relative_to(folder).parts
        for file in files:
            path = Path(place, file)
            if not path.is_symlink() and not file.startswith("report."):
                kind = next((kind for name, kind in KINDS if name in (*parts, file)), "records")
                found[kind] = found.get(kind, 0) + path.stat().st_size
    return dict(sorted(found.items(), key=lambda item: -item[1]))
