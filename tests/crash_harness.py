"""Kill a small real run again and again, resume it, and compare what it ends with with a run that was never stopped.

    python tests/crash_harness.py --kills 200 --record docs/reliability.md      (make test-crash)

Every life is a process of its own that runs `manyshot run … --resume --json` on a tiny model. It is killed (SIGKILL,
SIGTERM or SIGINT) at a point chosen by seed: inside a write, before an fsync, before or after a rename (as told by
fault_points.py), or at anything that the run tells, such as a training step. A SIGKILL in a write leaves half of it.
After each life: files of finished steps are the same files, not written again. At the end: the same bytes as the
unbroken run, no finished step done again, nothing temporary left.

Lives are forked from one process that has imported everything, since imports would take most of the time.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml

import manyshot.api
import manyshot.cli
import manyshot.runner  # noqa: F401 - for the lives
from conftest import TASKS, write_base
from manyshot.__main__ import main as run_command
from manyshot.fault_points import LISTENERS
from manyshot.manifest import MANIFEST
from manyshot.rundir import LOCK, PARTIAL, read_json
from run_helpers import contents, small_mapping, unlike, write_data

# every kind of artefact that a run writes: experts, a post-hoc merge, adapters and optimizers that go on, an outer
# optimizer's state, steps shared out by weights; all weights trained, a line search
RECIPES: dict[str, dict[str, Any]] = {
    "adapters": {
        "protocol": {"rounds": 2, "local_steps": 4, "allocation": "gap"},
        "merge": {"reference": "start", "outer_optimizer": "nesterov", "outer_momentum": 0.5},
        "local_update": {"adapter_start": "own", "optimizer_state": "kept"},
        "evaluation": {"experts": True, "post_hoc": True},
    },
    "all weights": {
        "protocol": {"rounds": 2, "local_steps": 4},
        "operator": {"name": "task_arithmetic", "scaling": "auto"},
        "local_update": {"method": "full", "optimizer_state": "kept"},
    },
}
SIGNALS = {signal.SIGKILL: 3, signal.SIGTERM: 1, signal.SIGINT: 1}  # and how often
# files that tell of times; one that a guard writes before a merge and again after it; one that every step adds to
NOT_FINAL = ("metrics.jsonl", "report.html", "report.md", "report.json", "guards.json", MANIFEST, LOCK)
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
MARKER = "<!-- newest first; make test-crash adds a row -->\n"


@dataclass(frozen=True)
class Kill:
    """Send `number` to oneself at the n-th point of one kind in a life."""

    kind: str
    at: int
    number: signal.Signals
    seed: str


@dataclass
class Life:
    """What a life left: how it ended, its points in order, and what it told."""

    status: int
    points: list[str]
    events: list[dict[str, Any]]
    errors: str

    @property
    def steps(self) -> int:
        """Training steps that it took."""
        return sum(event["kind"] == "advance" and event["phase"] == "local_update" for event in self.events)

    @property
    def scored(self) -> int:
        """Tasks that it scored a model on."""
        return sum(event["kind"] == "start" and event["phase"] == "score" for event in self.events)

    def of_kind(self, kind: str) -> list[str]:
        return [point for point in self.points if point.split()[0] == kind]


# ---- one life --------------------------------------------------------------------------------------------------------


class Points:
    """Counts the points of this process, writes them down, and ends it at one of them."""

    def __init__(self, log: Path, folder: Path, kill: Kill | None) -> None:
        self.log, self.folder, self.kill = os.open(log, os.O_WRONLY | os.O_CREAT), folder, kill
        self.count: Counter[str] = Counter()
        self.lock = threading.RLock()  # pieces of a merge are written by several threads

    def passing(self, point: str, path: Path) -> None:
        where = os.path.relpath(path, self.folder)
        if not where.startswith(".."):
            self.reach(f"{point} {where}", lambda rng: tear(point, path, rng))

    def write(self, text: str) -> int:
        """What the command prints: an event is a point too."""
        if text.strip():
            os.write(self.log, text.strip().encode() + b"\n")
            event = json.loads(text)
            self.reach(f"event {event.get('kind', 'end')} {event.get('phase', '')}", lambda rng: None)
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False

    def reach(self, name: str, tear: Callable[[random.Random], None]) -> None:
        with self.lock:
            kind = name.split(maxsplit=1)[0]
            self.count[kind] += 1
            os.write(self.log, f"# {name}\n".encode())
            if self.kill is None or (kind, self.count[kind]) != (self.kill.kind, self.kill.at):
                return
            if self.kill.number == signal.SIGKILL:
                tear(random.Random(self.kill.seed))
            os.kill(os.getpid(), self.kill.number)


def tear(point: str, path: Path, rng: random.Random) -> None:
    """Make of a write, or a removal, what a kill in the middle of it leaves."""
    if point == "write":
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        if files:
            file = rng.choice(files)
            os.truncate(file, rng.randrange(file.stat().st_size + 1))
    elif point == "appended":
        os.truncate(path, path.stat().st_size - rng.randrange(8))
    elif point == "remove" and path.is_dir() and (files := sorted(path.iterdir())):
        gone = rng.choice(files)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def live(command: Sequence[str], folder: Path, log: Path, kill: Kill | None = None) -> Life:
    """Fork, run the command there, wait for its end."""
    errors = log.with_suffix(".err")
    for file in (log, errors):
        file.unlink(missing_ok=True)
    number = os.fork()
    if number == 0:
        code = 1
        try:
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            points = Points(log, folder, kill)
            sys.stdout, sys.argv = points, ["manyshot", *command]  # type: ignore[assignment]
            LISTENERS.append(points.passing)
            run_command()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            log.with_suffix(".modules").write_text("\n".join(sorted(sys.modules)), "utf-8")
            os._exit(code)
    _, status = os.waitpid(number, 0)
    lines = log.read_text("utf-8").splitlines()
    told = [json.loads(line) for line in lines if not line.startswith("#")]
    points = [line[2:] for line in lines if line.startswith("#")]
    return Life(status, points, [one for one in told if "kind" in one], errors.read_text("utf-8"))


def import_what_lives_import(log: Path) -> None:
    """Import what the first life imported on its way, so that no other has to."""
    for name in log.with_suffix(".modules").read_text("utf-8").split("\n"):
        if name not in sys.modules and not name.startswith(("__", "_", "torch._C")):
            with suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no life looks through all of it again


# ---- what must be true -----------------------------------------------------------------------------------------------


def finished_files(folder: Path) -> dict[str, tuple[int, int]]:
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
        status = file.stat()
        found[str(name)] = (status.st_ino, status.st_mtime_ns)
    return found


def leftovers(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if PARTIAL in file.name or file.name == LOCK]


@dataclass
class Reference:
    """A recipe, and its run that was never stopped."""

    recipe: Path
    folder: Path
    life: Life

    def pending(self, folder: Path) -> tuple[int, int]:
        """Training steps, and tasks to score models on, that a folder still lacks."""
        updates = {file.relative_to(self.folder): read_json(file) for file in self.folder.rglob("local_update.json")}
        scores = {file.relative_to(self.folder): read_json(file) for file in self.folder.glob("*/**/scores.json")}
        steps = sum(record["steps"] for name, record in updates.items() if not (folder / name).exists())
        return steps, sum(len(record) for name, record in scores.items() if not (folder / name).exists())


@dataclass
class Outcome:
    """What came of all kills."""

    kills: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    repeated_steps: int = 0
    problems: list[str] = field(default_factory=list)


def break_run(reference: Reference, work: Path, seed: str, kills: int, outcome: Outcome) -> None:
    """One run, killed so many times (fewer where it finishes first), then left alone."""
    rng, folder, log = random.Random(seed), work / "run", work / "life"
    shutil.rmtree(folder, ignore_errors=True)
    command = ["run", str(reference.recipe), "--output", str(folder), "--resume", "--json"]
    told: list[str] = []
    for left in range(kills, -1, -1):
        # a life that follows another has less to do; so that it is killed at all, all are killed early
        kill = choose(rng, reference.life, min(1.0, 2 / kills), f"{seed}/{left}")
        before, (steps, scored) = finished_files(folder), reference.pending(folder)
        life = live(command, folder, log, kill if left else None)
        after = finished_files(folder)
        rewritten = [name for name, stamp in before.items() if after.get(name) != stamp]
        where = f"{reference.recipe.stem}, {seed}, {' then '.join(told) or 'begin'}"
        if rewritten:
            outcome.problems.append(f"{where}: written again: {', '.join(rewritten)}")
        reached = life.of_kind(kill.kind)[kill.at - 1 :]
        if not left or not reached:  # it came to its end
            break
        told.append(f"{kill.number.name} at {reached[0]}")
        if (problem := ill_ended(life, kill, folder)) is not None:
            outcome.problems.append(f"{where}, {told[-1]}: {problem}")
        outcome.repeated_steps += max(0, life.steps - steps)
        outcome.kills[kill.number.name] += 1
        outcome.points[kill.kind] += 1
    if life.status != 0:
        outcome.problems.append(f"{where}: the resume ended with {life.status}: {life.errors[-2000:]}")
        return
    outcome.runs += 1
    outcome.repeated_steps += max(0, life.steps - steps)
    if (life.steps, life.scored) != (steps, scored):
        outcome.problems.append(
            f"{where}: {steps} steps and {scored} scores were left, {life.steps} and {life.scored} were done"
        )
    if differing := unlike(reference.folder, folder):
        outcome.problems.append(f"{where}: other bytes in {', '.join(differing)}")
    if left_over := leftovers(folder):
        outcome.problems.append(f"{where}: left over: {', '.join(left_over)}")


def choose(rng: random.Random, unbroken: Life, part: float, seed: str) -> Kill:
    """A kind of point, each as often as every other, and one of that kind in the first part of an unbroken run."""
    kind = rng.choice(sorted({point.split()[0] for point in unbroken.points}))
    at = rng.randint(1, max(1, int(part * len(unbroken.of_kind(kind)))))
    return Kill(kind, at, rng.choices(list(SIGNALS), list(SIGNALS.values()))[0], seed)


def ill_ended(life: Life, kill: Kill, folder: Path) -> str | None:
    """What is wrong with the end of a killed life; None where it is as it should be."""
    if kill.number == signal.SIGKILL:
        return None if os.WIFSIGNALED(life.status) else f"ended with {life.status}"
    if not os.WIFEXITED(life.status) or os.WEXITSTATUS(life.status) != 130 or "Traceback" in life.errors:
        return f"ended with {life.status}: {life.errors[-2000:]}"
    left = leftovers(folder)
    return f"left {', '.join(left)}" if left else None


# ---- all of it -------------------------------------------------------------------------------------------------------


def references(work: Path) -> list[Reference]:
    """Every recipe with its unbroken run."""
    base, found = write_base(work / "base"), []
    for task in TASKS[:2]:
        write_data(work / "data", task)
    for name, settings in RECIPES.items():
        mapping = small_mapping(base, work / "data", TASKS[:2])
        mapping["evaluation"] |= {"validation_examples": 2, "test_examples": 2}
        for key, value in settings.items():
            mapping[key] = mapping.get(key, {}) | value if key != "operator" else value
        recipe, folder = work / f"{name}.yaml", work / name
        recipe.write_text(yaml.safe_dump(mapping), "utf-8")
        life = live(["run", str(recipe), "--output", str(folder), "--json"], folder, work / "reference")
        if life.status != 0:
            raise SystemExit(f"{name}: the unbroken run failed: {life.errors}")
        found.append(Reference(recipe, folder, life))
        if (life.steps, life.scored) != found[-1].pending(work / "nothing"):
            raise SystemExit(f"{name}: {life.steps} steps and {life.scored} scores are not what its records say")
        import_what_lives_import(work / "reference")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=1, help="kills of one run before it is left alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="a Markdown file with a table of results")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        unbroken = references(work)
        began, number = processor_time(), 0
        while (done := outcome.kills.total()) < options.kills and not outcome.problems:
            reference, seed = unbroken[number % len(unbroken)], f"{options.seed}/{number}"
            break_run(reference, work, seed, min(options.per_run, options.kills - done), outcome)
            number += 1
        result = summary(outcome, options, processor_time() - began, unbroken)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result), "utf-8")
    if options.record:
        record(options.record, result)
    return int(bool(outcome.problems))


def processor_time() -> float:
    """Of this process and of all lives that have ended."""
    return sum(os.times()[:4])


def summary(
    outcome: Outcome, options: argparse.Namespace, seconds: float, unbroken: Sequence[Reference]
) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "seed": options.seed,
        "kills": outcome.kills.total(),
        "signals": dict(outcome.kills),
        "points": dict(outcome.points),
        "runs": outcome.runs,
        "repeated_steps": outcome.repeated_steps,
        "points_of_a_run": [len(reference.life.points) for reference in unbroken],
        "files_compared": [len(contents(reference.folder)) for reference in unbroken],
        # of processor time, which does not depend on what else the machine does
        "seconds_per_kill": round(seconds / max(1, outcome.kills.total()), 2),
        "problems": outcome.problems,
    }


def record(file: Path, result: Mapping[str, Any]) -> None:
    """Put a row on top of the table that follows the marker."""
    text = file.read_text("utf-8")
    if MARKER not in text:
        raise SystemExit(f"{file}: has no line {MARKER.strip()}")
    signals, points = (
        ", ".join(f"{name} {count}" for name, count in sorted(result[key].items())) for key in ("signals", "points")
    )
    identical = result["runs"] if not result["problems"] else f"no: {len(result['problems'])} problems"
    row = f"| {result['date']} | {result['seed']} | {result['kills']} | {signals} | {points} | {identical} | "
    row += f"{result['repeated_steps']} | {result['seconds_per_kill']} s |\n"
    head, rest = text.split(MARKER)
    header, rule, rows = rest.split("\n", 2)
    file.write_text(f"{head}{MARKER}{header}\n{rule}\n{row}{rows}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
