"""Feed changed inputs to everything that reads files of strangers, and keep each that does harm.

    python tests/fuzz_driver.py --inputs 100000 --seed 0 --folder build/fuzz       (make fuzz)
    python tests/fuzz_driver.py --sweep --folder build/sweep                       (make fuzz-sweep)
    python tests/fuzz_driver.py --replay build/fuzz/failures/recipe-run-00000042.bin

An input does harm when it ends in anything but success or a ManyshotError, takes more than 5 s of processor time, asks
for more than 1 GB of memory, kills its process, writes outside of the folder it is read in, unpickles, opens a network
connection or starts a program. An input that is answered in a way that none was before (in other words: another error)
joins those that others are made from. Input number i of a target follows from the seed, i and what joined before it; a
run that was stopped goes on where it was. With --sweep inputs are not drawn: every place of a target's good inputs is
changed in every way that is known (fuzz_sweep.py), one at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.dont_write_bytecode = True

from fuzz_sweep import Sweep  # noqa: E402
from fuzz_targets import Arena, Target  # noqa: E402 - libraries look at the environment when they are imported
from manyshot.errors import ManyshotError  # noqa: E402

SECONDS = 5.0
SWEEP = "sweep"  # in the place of a seed
PATIENCE = 300.0  # of the parent, in wall time: for what no signal ends
MEMORY = 2**30
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
MOVES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod")
NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pickle.find_class")


class Hang(BaseException):
    """An input took too long. No product code catches it."""


class Watch:
    """Notes what is written outside of a folder, and what should never happen, while it is on."""

    def __init__(self) -> None:
        self.roots: tuple[str, ...] = ()
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & WRITES:
            self._note(event, args[0])
        elif event in MOVES:
            for path in args[:2]:
                self._note(event, path)
        elif event in NEVER:
            self.seen.append(f"{event} {args[:2]!r}")

    def _note(self, event: str, path: object) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = os.path.realpath(os.fsdecode(path))
            if place != os.devnull and not place.startswith(self.roots):
                self.seen.append(f"{event} {place}")

    @contextmanager
    def over(self, folder: Path) -> Iterator[list[str]]:
        self.roots, self.seen, self.on = (os.path.realpath(folder) + os.sep,), [], True
        try:
            yield self.seen
        finally:
            self.on = False


WATCH = Watch()


def try_input(arena: Arena, target: Target, data: bytes) -> tuple[str, str]:
    """("accepted" | "refused" | "harm", what happened) for one input."""

    def ring(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, ring)
    with WATCH.over(arena.folder) as seen:
        try:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            target.read(data)
            outcome = "accepted", ""
        except ManyshotError as error:
            outcome = "refused", str(error)
        except Hang:
            outcome = "harm", f"more than {SECONDS:g} s of processor time\n{traceback.format_exc()}"
        except BaseException:  # noqa: BLE001 - whatever it is, it is what is looked for
            outcome = "harm", traceback.format_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)
    return ("harm", f"outside of its folder, or never to happen: {'; '.join(seen)}") if seen else outcome


def answer_kind(kind: str, what: str) -> str:
    """What was answered without the names and numbers in it: an input that is answered in a new way is worth changing
    further, as one that reaches a new line is.
    """
    return kind + re.sub(r"'[^']*'|\"[^\"]*\"|\d+|/\S+|\[.*|\(.*", "…", what.strip().partition("\n")[0])[:200]


# ---- one target, in a process of its own -----------------------------------------------------------------------------


def slug(name: str) -> str:
    return name.replace(" ", "-")


def bound_memory(num_bytes: int = MEMORY) -> None:
    """From now on this process gets `num_bytes` more address space than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class Session:
    """A fuzzing session in a folder: its seed, how far every target is, what was kept."""

    def __init__(self, folder: Path, seed: int | str) -> None:
        self.folder, self.seed = folder, seed
        self.failures, self.corpus = folder / "failures", folder / "corpus"
        self.state_file = folder / "state.json"
        for place in (self.failures, self.corpus):
            place.mkdir(parents=True, exist_ok=True)
        self.done: dict[str, dict[str, Any]] = {}
        if self.state_file.exists():
            state = json.loads(self.state_file.read_text("utf-8"))
            if state["seed"] != seed:
                raise SystemExit(
                    f"{folder}: was begun with seed {state['seed']}; go on with that, or take another folder"
                )
            self.done = state["done"]

    def counts(self, target: Target) -> dict[str, Any]:
        empty: dict[str, Any] = {"inputs": 0, "accepted": 0, "refused": 0, "harm": 0, "kept": 0, "slowest": 0.0}
        return self.done.setdefault(target.name, empty)

    def save(self) -> None:
        partial = self.state_file.with_suffix(".partial")
        partial.write_text(json.dumps({"seed": self.seed, "done": self.done}), "utf-8")
        partial.replace(self.state_file)

    def keep(self, target: Target, index: int, data: bytes, what: str) -> Path:
        """A failing input, what it did, and how to see it again."""
        file = self.failures / f"{slug(target.name)}-{index:08d}.bin"
        file.write_bytes(data)
        file.with_suffix(".txt").write_text(f"{replay_command(file)}\n\n{what}\n", "utf-8", "backslashreplace")
        return file

    def fuzz(self, arena: Arena, target: Target, until: int) -> None:
        """All inputs of a target, in child processes: one that dies or hangs is a finding, and the next goes on."""
        current = self.folder / "current"
        while self.counts(target)["inputs"] < until:
            child = os.fork()
            if child == 0:
                self._child(arena, target, until, current)
            died = _wait(child, current)
            state = json.loads(self.state_file.read_text("utf-8")) if self.state_file.exists() else {"done": {}}
            self.done |= state["done"]
            if died is None:
                continue
            number, _, data = current.read_bytes().partition(b"\n")
            counts = self.counts(target)
            counts["inputs"], counts["harm"] = int(number) + 1, counts["harm"] + 1
            print(f"  {target.name}: {died}: {self.keep(target, int(number), data, died)}", flush=True)
            self.save()

    def _child(self, arena: Arena, target: Target, until: int, current: Path) -> None:
        """Never returns."""
        try:
            bound_memory()
            self._loop(arena, target, until, current)
            self.save()
        except BaseException:  # noqa: BLE001 - the child ends here, whatever happens
            traceback.print_exc()
            os._exit(70)
        os._exit(0)

    def _drawn(self, target: Target, index: int, corpus: list[bytes]) -> bytes:
        """Input number `index`, by the seed."""
        rng = random.Random(f"{self.seed}/{target.name}/{index}")
        return target.mutate(rng.choice(corpus), rng, corpus)

    def _loop(self, arena: Arena, target: Target, until: int, current: Path) -> None:
        place = self.corpus / slug(target.name)
        place.mkdir(exist_ok=True)
        corpus = [*target.seeds, *(file.read_bytes() for file in sorted(place.iterdir()))]
        counts = self.counts(target)
        known = {answer_kind(*try_input(arena, target, data)) for data in corpus}
        sweep = Sweep(target) if self.seed == SWEEP else None
        for index in range(counts["inputs"], until):
            data = self._drawn(target, index, corpus) if sweep is None else sweep[index]
            current.write_bytes(f"{index}\n".encode() + data)
            began = time.process_time()
            kind, what = try_input(arena, target, data)
            counts["slowest"] = max(counts["slowest"], round(time.process_time() - began, 3))
            counts[kind] += 1
            counts["inputs"] += 1
            if kind == "harm":
                file = self.keep(target, index, data, what)
                print(f"  {target.name}: {what.strip().splitlines()[-1][:150]}: {file}", flush=True)
            elif sweep is None and len(data) < 50_000 and (answer := answer_kind(kind, what)) not in known:
                known.add(answer)
                (place / f"{index:08d}.bin").write_bytes(data)
                corpus.append(data)
                counts["kept"] += 1
            if index % 50 == 0:
                self.save()


def _wait(child: int, current: Path) -> str | None:
    """Wait for a child; how it ended, where that is not as it should."""
    done = threading.Event()
    killed: list[bool] = []

    def guard() -> None:
        while not done.wait(2.0):
            if current.exists() and time.time() - current.stat().st_mtime > PATIENCE:
                killed.append(True)
                os.kill(child, signal.SIGKILL)
                return

    if current.exists():
        os.utime(current)
    thread = threading.Thread(target=guard)
    thread.start()
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    code = os.waitstatus_to_exitcode(status)
    if killed:
        return f"hung for {PATIENCE:g} s"
    if code == 70:
        raise SystemExit("the driver itself failed; see above")
    return None if code == 0 else f"its process ended with {code}"


def replay_command(file: Path) -> str:
    return f"python tests/fuzz_driver.py --replay {file}"


def replay(file: Path, arena: Arena) -> int:
    """Read one kept input again, with the traceback of what it does."""
    named = {slug(target.name): target for target in arena.targets()}
    target = named[file.stem.rpartition("-")[0]]
    bound_memory()
    kind, what = try_input(arena, target, file.read_bytes())
    print(f"{target.name}: {kind}\n{what}")
    return int(kind == "harm")


def table(session: Session, targets: list[Target], seconds: float) -> str:
    """What a session came to, for people and for docs/reliability.md."""
    lines = ["| read as | inputs | accepted | refused | new answers | harm | slowest |", "| --- | " + "---: | " * 6]
    total: Counter[str] = Counter()
    for target in targets:
        counts = session.counts(target)
        total.update({key: counts[key] for key in ("inputs", "accepted", "refused", "kept", "harm")})
        numbers = [f"{counts[key]:,}" for key in ("inputs", "accepted", "refused", "kept", "harm")]
        lines.append(f"| {target.name} | {' | '.join(numbers)} | {counts['slowest']:.2f} s |")
    numbers = [f"{total[key]:,}" for key in ("inputs", "accepted", "refused", "kept", "harm")]
    lines.append(f"| all | {' | '.join(numbers)} | |")
    day = datetime.now(UTC).strftime("%Y-%m-%d")
    return f"{day}, seed {session.seed}, {seconds:.0f} s in this sitting\n\n" + "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz what reads files of strangers.")
    parser.add_argument("--inputs", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    parser.add_argument("--sweep", action="store_true", help="every known change of every place, in place of a draw")
    parser.add_argument("--only", action="append", help="a target's name; again for more")
    parser.add_argument("--replay", type=Path, help="read one kept input again")
    asked = parser.parse_args()
    if asked.replay:
        with tempfile.TemporaryDirectory() as scratch:
            return replay(asked.replay, Arena(Path(scratch) / "arena"))
    session = Session(asked.folder, SWEEP if asked.sweep else asked.seed)
    arena = Arena(asked.folder / "arena")
    targets = arena.targets()
    began, parts = time.time(), sum(target.part for target in targets)
    chosen = [target for target in targets if not asked.only or target.name in asked.only]
    for target in chosen:
        until = len(Sweep(target)) if asked.sweep else -(-asked.inputs * target.part // parts)
        print(f"{target.name}: {session.counts(target)['inputs']:,} of {until:,} inputs", flush=True)
        session.fuzz(arena, target, until)
    print(table(session, chosen, time.time() - began))
    harm = sum(session.counts(target)["harm"] for target in chosen)
    if harm:
        print(f"\n{harm} inputs did harm, kept in {session.failures} with what they did and how to see it again")
    return int(harm > 0)


if __name__ == "__main__":
    sys.exit(main())
