"""What the crash harness kills, and how: lives of a command, each a process of its own, and the points that they pass.

Lives are forked from one process that has imported everything, since imports would take most of the time. A point is
one of a write (as told by fault_points.py), or anything that the command tells of, such as a training step.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from manyshot.__main__ import main as run_command
from manyshot.fault_points import LISTENERS
from manyshot.progress import Progress, TimedPhase

SIGNALS = {signal.SIGKILL: 3, signal.SIGTERM: 1, signal.SIGINT: 1}  # and how often


@dataclass(frozen=True)
class Kill:
    """Send `number` to oneself at the n-th point of one kind in a life."""

    kind: str
    at: int
    number: signal.Signals
    seed: str


@dataclass
class Life:
    """What a life left: how it ended, its points in order, and what it said of errors."""

    status: int
    points: list[str]
    errors: str

    @property
    def work(self) -> Counter[str]:
        """What it took of training steps, scored of tasks, and merged."""
        told = Counter(self.points)
        return Counter(
            steps=told["event advance local_update"], scores=told["event start score"], merges=told["event start merge"]
        )

    def of_kind(self, kind: str) -> list[str]:
        return [point for point in self.points if point.split()[0] == kind]


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

    def telling(self, kind: str, phase: str) -> None:
        self.reach(f"event {kind} {phase}", lambda rng: None)

    def reach(self, name: str, tear: Callable[[random.Random], None]) -> None:
        with self.lock:
            kind = name.split(maxsplit=1)[0]
            self.count[kind] += 1
            os.write(self.log, f"{name}\n".encode())
            if self.kill is None or (kind, self.count[kind]) != (self.kill.kind, self.kill.at):
                return
            if self.kill.number == signal.SIGKILL:
                tear(random.Random(self.kill.seed))
            os.kill(os.getpid(), self.kill.number)


def tear(point: str, path: Path, rng: random.Random) -> None:
    """Make of a write, or a removal, what a kill in the middle of it leaves."""
    if point == "write":
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
        # a hard link to a file of another step is there or not: nothing of it is written
        if files := [file for file in files if file.stat().st_nlink == 1]:
            file = rng.choice(files)
            os.truncate(file, rng.randrange(file.stat().st_size + 1))
    elif point == "appended":
        os.truncate(path, path.stat().st_size - rng.randrange(8))
    elif point == "remove" and path.is_dir() and (files := sorted(path.iterdir())):
        gone = rng.choice(files)
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()


def listen(points: Points) -> None:
    """Hear of every write, and of all that is told, by the parts of a command too that nobody listens to."""
    LISTENERS.append(points.passing)
    record, tick, message = Progress.record, TimedPhase.tick, Progress.message

    def recorded(self: Progress, kind: str, **values: Any) -> None:
        if kind != "advance":  # once in a while, by the clock: no point of a seed
            points.telling(kind, values.get("phase", ""))
        record(self, kind, **values)

    def ticked(self: TimedPhase, *values: Any, **named: Any) -> None:
        points.telling("advance", self._event.phase)
        tick(self, *values, **named)

    def said(self: Progress, text: str, **values: Any) -> None:
        points.telling("message", "")
        message(self, text, **values)

    Progress.record, TimedPhase.tick, Progress.message = recorded, ticked, said  # type: ignore[method-assign]


def live(command: Sequence[str], folder: Path, log: Path, kill: Kill | None = None) -> Life:
    """Fork, run the command there, wait for its end."""
    errors = log.with_suffix(".err")
    for file in (log, errors):
        file.unlink(missing_ok=True)
    number = os.fork()
    if number == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            sys.argv = ["manyshot", *command]
            listen(Points(log, folder, kill))
            run_command()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:  # noqa: BLE001 - an error of the command's is read by the harness
            traceback.print_exc()
        finally:
            log.with_suffix(".modules").write_text("\n".join(sorted(sys.modules)), "utf-8")
            os._exit(code)
    _, status = os.waitpid(number, 0)
    return Life(status, log.read_text("utf-8").splitlines(), errors.read_text("utf-8"))


def import_what_lives_import(log: Path) -> None:
    """Import what the first life imported on its way, so that no other has to."""
    for name in log.with_suffix(".modules").read_text("utf-8").split("\n"):
        if name not in sys.modules and not name.startswith(("__", "_", "torch._C")):
            with suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()  # no life looks through all of it again


def choose(rng: random.Random, unbroken: Life, part: float, seed: str) -> Kill:
    """A kind of point, each as often as every other, and one of that kind in the first part of an unbroken life."""
    kind = rng.choice(sorted({point.split()[0] for point in unbroken.points}))
    at = rng.randint(1, max(1, int(part * len(unbroken.of_kind(kind)))))
    return Kill(kind, at, rng.choices(list(SIGNALS), list(SIGNALS.values()))[0], seed)
