"""What must be true of a folder after a kill, and at the end: what the crash harness compares."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crash_life import Life
from manyshot.manifest import MANIFEST
from manyshot.rundir import LOCK, PARTIAL, read_json, read_lines

# files that tell of times
TIMED = ("metrics.jsonl", "report.html", "report.json")
# those, one that a guard writes before a merge and again after it, and those that every step adds to
NOT_FINAL = (*TIMED, "report.md", "guards.json", "results.json", "trials.jsonl", MANIFEST, LOCK)
RECORD_OF = {  # a file of a step that has not got its record yet is not finished
    "adapter": "local_update.json",
    "model": "local_update.json",
    "optimizer.safetensors": "local_update.json",
    "losses.json": "scores.json",
    "outputs.json": "scores.json",
    "examples.json": "scores.json",
    "task_vector.safetensors": "merge.json",
    "outer_state.safetensors": "merge.json",
}


@dataclass
class Case:
    """A command on a tiny model that can be gone on with, and what it came to when nothing stopped it.

    `begin` makes the folder as it is before the command, `command` says how to go on with it. `left` counts the work of
    a folder that is not done yet, as Life.work does; `replaced` names files that the command may write anew.
    """

    name: str
    folder: Path
    unbroken: Path
    life: Life
    begin: Callable[[Path], None]
    command: Callable[[Path], Sequence[str]]
    left: Callable[[Path], Counter[str]]
    replaced: Sequence[str] = ()


def finished_files(folder: Path, replaced: Sequence[str] = ()) -> dict[str, tuple[int, int]]:
    """The files of finished steps: which file it is, and when it was last written."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if file.is_symlink() or not file.is_file() or file.name in NOT_FINAL or PARTIAL in str(name):
            continue
        part = next((part for part in name.parts if part in RECORD_OF), None)
        top = folder / Path(*name.parts[: name.parts.index(part)]) if part else None
        if "line_search" in name.parts or (top is not None and part and not (top / RECORD_OF[part]).exists()):
            continue
        if str(name) not in replaced:
            status = file.stat()
            found[str(name)] = (status.st_ino, status.st_mtime_ns)
    return found


def leftovers(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if PARTIAL in file.name or file.name == LOCK]


# ---- work that is left -----------------------------------------------------------------------------------------------


def steps_left(unbroken: Path, folder: Path) -> int:
    """Training steps of local updates that a folder has no record of; what several runs share is one."""
    there = {key for key, _ in _updates(folder)}
    return sum(steps for key, steps in dict(_updates(unbroken)).items() if key not in there)


def _updates(folder: Path) -> list[tuple[str, int]]:
    files = [file for file in folder.rglob("local_update.json") if PARTIAL not in str(file.relative_to(folder))]
    records = [read_json(file) for file in files]
    return [(record["key"], record["steps"]) for record in records]


def records_left(unbroken: Path, folder: Path, name: str) -> list[Path]:
    """Records of the unbroken folder, in folders of it, that another one has not got."""
    found = [file.relative_to(unbroken) for file in sorted(unbroken.glob(f"*/**/{name}"))]
    return [unbroken / file for file in found if not (folder / file).exists()]


def scores_left(unbroken: Path, folder: Path) -> int:
    """Tasks to score models on; a run's own scores.json, which gathers them, has no outputs beside it."""
    records = records_left(unbroken, folder, "scores.json")
    return sum(len(read_json(file)) for file in records if (file.parent / "outputs.json").exists())


def merges_left(unbroken: Path, folder: Path) -> int:
    return len(records_left(unbroken, folder, "merge.json"))


def check_count(case: Case) -> Case:
    """The case, if what its unbroken life did is what the records of it say; else nothing could be told of others."""
    case.begin(case.folder)
    expected = case.left(case.folder)
    if {name: case.life.work[name] for name in expected} != expected:
        raise SystemExit(f"{case.name}: its records speak of {dict(expected)}, and it did {dict(case.life.work)}")
    return case


# ---- the same bytes --------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    """Every file by name, links as what they point at; without the times in it, and without files that tell of them."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_symlink():
            found[name] = str(file.readlink()).encode()
        elif file.name == "trials.jsonl":
            found[name] = _without_times(read_lines(file))
        elif file.is_file() and file.name not in TIMED and not (file.name == "report.md" and _is_run(file.parent)):
            found[name] = file.read_bytes()
    return found


def _is_run(folder: Path) -> bool:
    """Whether its report tells of times, as that of a run does; those of comparisons and searches do not."""
    return (folder / "recipe.yaml").exists()


def _without_times(journal: Sequence[dict[str, Any]]) -> bytes:
    return json.dumps([{key: value for key, value in line.items() if key != "seconds"} for line in journal]).encode()


def unlike(unbroken: Path, folder: Path) -> list[str]:
    """Names of the files in which two folders differ."""
    ours, theirs = contents(unbroken), contents(folder)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
