"""Kill a small real command again and again, go on with it, and compare what it ends with with one never stopped.

    python tests/crash_harness.py --kills 200 --record docs/reliability.md      (make test-crash)
    python tests/crash_harness.py --scenario extend --kills 20 --per-run 4

Every life is a process of its own that runs the command, or what goes on with it, on a tiny model. It is killed
(SIGKILL, SIGTERM or SIGINT) at a point chosen by seed: inside a write, before an fsync, before or after a rename, or at
anything that the command tells, such as a training step. A SIGKILL in a write leaves half of it. After each life: files
of finished steps are the same files, not written again. At the end: the same bytes as the unbroken one, no finished
step done again, nothing temporary left.

What is killed, and how: crash_life.py. What is compared: crash_check.py. The commands: crash_run.py, crash_extend.py,
crash_compare.py, crash_tune.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import manyshot.api
import manyshot.cli
import manyshot.runner  # noqa: F401 - for the lives
from crash_check import Case, check_count, contents, finished_files, leftovers, unlike
from crash_life import Kill, Life, choose, live
from manyshot.rundir import PARTIAL

SCENARIOS = ("run", "extend", "compare", "tune")
MARKER = "<!-- newest first; make test-crash adds a row -->\n"


@dataclass
class Outcome:
    """What came of all kills."""

    kills: Counter[str] = field(default_factory=Counter)
    points: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    repeated_steps: int = 0
    problems: list[str] = field(default_factory=list)


def break_one(case: Case, log: Path, seed: str, kills: int, outcome: Outcome) -> None:
    """One command, killed so many times (fewer where it finishes first), then left alone."""
    rng, folder = random.Random(seed), case.folder
    case.begin(folder)
    told: list[str] = []
    for more in range(kills, -1, -1):
        # a life that follows another has less to do; so that it is killed at all, all are killed early
        kill = choose(rng, case.life, min(1.0, 2 / kills), f"{seed}/{more}")
        before, left, torn = finished_files(folder, case.replaced), case.left(folder), leftovers(folder)
        life = live(case.command(folder), folder, log, kill if more else None)
        after = finished_files(folder, case.replaced)
        where = f"{case.name}, {seed}, {' then '.join(told) or 'begin'}"
        # what only a resume would need may go with the step that it was for
        if rewritten := [name for name, stamp in before.items() if after.get(name, stamp) != stamp]:
            outcome.problems.append(f"{where}: written again: {', '.join(rewritten)}")
        reached = life.of_kind(kill.kind)[kill.at - 1 :]
        if not more or not reached:  # it came to its end
            break
        told.append(f"{kill.number.name} at {reached[0]}")
        # interrupted while it removed what an earlier SIGKILL had left half written: the rest of it is still there
        excused = torn if reached[0].startswith("remove") and PARTIAL in reached[0] else []
        if (problem := ill_ended(life, kill, set(leftovers(folder)).difference(excused))) is not None:
            outcome.problems.append(f"{where}, {told[-1]}: {problem}")
        outcome.repeated_steps += max(0, life.work["steps"] - left["steps"])
        outcome.kills[kill.number.name] += 1
        outcome.points[kill.kind] += 1
    if life.status != 0:
        outcome.problems.append(f"{where}: going on ended with {life.status}: {life.errors[-2000:]}")
        return
    outcome.runs += 1
    outcome.repeated_steps += max(0, life.work["steps"] - left["steps"])
    if (done := {name: life.work[name] for name in left}) != left:
        outcome.problems.append(f"{where}: {dict(left)} was left, {done} was done")
    if differing := unlike(case.unbroken, folder):
        outcome.problems.append(f"{where}: other bytes in {', '.join(differing)}")
    if left_over := leftovers(folder):
        outcome.problems.append(f"{where}: left over: {', '.join(left_over)}")


def ill_ended(life: Life, kill: Kill, left_over: Collection[str]) -> str | None:
    """What is wrong with the end of a killed life; None where it is as it should be."""
    if kill.number == signal.SIGKILL:
        return None if os.WIFSIGNALED(life.status) else f"ended with {life.status}"
    if not os.WIFEXITED(life.status) or os.WEXITSTATUS(life.status) != 130 or "Traceback" in life.errors:
        return f"ended with {life.status}: {life.errors[-2000:]}"
    return f"left {', '.join(sorted(left_over))}" if left_over else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--scenario", choices=SCENARIOS, default="run", help="the command that is killed")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--per-run", type=int, default=1, help="kills of one run before it is left alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="a Markdown file with a table of results")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        to_make: list[Callable[[], Case]] = importlib.import_module(f"crash_{options.scenario}").cases(work)
        cases: list[Case] = []
        number, seconds = 0, 0.0
        while (done := outcome.kills.total()) < options.kills and not outcome.problems:
            if number < len(to_make):
                cases.append(check_count(to_make[number]()))
            case, seed, began = cases[number % len(cases)], f"{options.seed}/{number}", processor_time()
            break_one(case, work / "life", seed, min(options.per_run, options.kills - done), outcome)
            number, seconds = number + 1, seconds + processor_time() - began
        result = summary(outcome, options, seconds, cases)
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        options.json.write_text(json.dumps(result), "utf-8")
    if options.record:
        record(options.record, result)
    return int(bool(outcome.problems))


def processor_time() -> float:
    """Of this process and of all lives that have ended."""
    return sum(os.times()[:4])


def summary(outcome: Outcome, options: argparse.Namespace, seconds: float, cases: Sequence[Case]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "scenario": options.scenario,
        "seed": options.seed,
        "kills": outcome.kills.total(),
        "signals": dict(outcome.kills),
        "points": dict(outcome.points),
        "runs": outcome.runs,
        "repeated_steps": outcome.repeated_steps,
        "points_of_a_run": [len(case.life.points) for case in cases],
        "files_compared": [len(contents(case.unbroken)) for case in cases],
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
    row = (
        f"| {result['date']} | `{result['scenario']}` | {result['seed']} | {result['kills']} | {signals} | {points} | "
    )
    row += f"{identical} | {result['repeated_steps']} | {result['seconds_per_kill']} s |\n"
    head, rest = text.split(MARKER)
    header, rule, rows = rest.split("\n", 2)
    file.write_text(f"{head}{MARKER}{header}\n{rule}\n{row}{rows}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
