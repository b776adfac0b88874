"""Merge speed and memory: whole commands beside mergekit's, and the merge itself beside a loop that only moves bytes.

    python benchmarks/merge_speed.py --work /path/with/30GB --mergekit /path/to/mergekit-yaml

Prints JSON lines (kept in WORK/merge_speed.jsonl) and a Markdown table. Commands take turns, so that what else the
machine does falls on both. Peak memory is the largest resident set of the command, which counts mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

OURS = [sys.executable, "-m", "manyshot", "merge"]
THEIRS = {
    "task_arithmetic": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.4}},
    "dare": {"merge_method": "dare_linear", "parameters": {"lambda": 0.4, "density": 0.2}},
    "ties": {"merge_method": "ties", "parameters": {"lambda": 1.0, "density": 0.2}},
}


def command(arguments: list[str], output: Path) -> tuple[float, float]:
    """Wall seconds and peak resident GB of a command; `output` is removed before and after."""
    shutil.rmtree(output, ignore_errors=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{errors.decode()[-2000:]}")
    shutil.rmtree(output, ignore_errors=True)
    return seconds, usage.ru_maxrss / 1e6


def ours(base: Path, models: list[Path], operator: str, output: Path, *flags: str) -> list[str]:
    weights = ["--preset", "paper", "--weights", ",".join("1" for _ in models)] if operator == "metis" else []
    return [*OURS, "--base", str(base), "--operator", operator, *weights, *flags, *map(str, models), "-o", str(output)]


def theirs(mergekit: str, base: Path, models: list[Path], operator: str, output: Path, work: Path) -> list[str]:
    import yaml

    spec = THEIRS[operator] | {
        "base_model": str(base),
        "models": [{"model": str(model), "parameters": {"weight": 1.0}} for model in models],
        "dtype": "bfloat16",
    }
    file = work / f"mergekit_{operator}.yaml"
    file.write_text(yaml.safe_dump(spec))
    return [mergekit, str(file), str(output)]


def floor(inputs: list[Path], output: Path, threads: int) -> float:
    """Seconds to read every input and write one output of the base's size, and nothing else, with as many threads."""
    import numpy as np

    block = 1 << 18
    size = inputs[0].stat().st_size
    began = time.perf_counter()
    files = [os.open(path, os.O_RDONLY) for path in inputs]
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def work(first: int) -> None:
        buffer = np.empty(block, np.uint8)
        for offset in range(first * block, size, threads * block):
            for file in files:
                count = os.preadv(file, [buffer], offset)
            os.pwrite(out, buffer[:count].data, offset)

    workers = [threading.Thread(target=work, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.fsync(out)
    seconds = time.perf_counter() - began
    for file in (*files, out):
        os.close(file)
    output.unlink()
    return seconds


def inner(base: Path, models: list[Path], operators: list[str], work: Path, repeats: int) -> dict[str, Any]:
    """The merge without start-up, in this process, taking turns with the floor."""
    import manyshot

    threads = len(os.sched_getaffinity(0))
    found: dict[str, list[float]] = {}
    files = [path / "model.safetensors" for path in (base, *models)]
    for _ in range(repeats):
        found.setdefault("floor", []).append(floor(files, work / "floor.bin", threads))
        for operator in operators:
            shutil.rmtree(work / "out", ignore_errors=True)
            experts = {f"m{i}": {"path": str(model), "weight": 1.0} for i, model in enumerate(models)}
            recipe = {"base": str(base), "experts": experts, "operator": operator}
            began = time.perf_counter()
            manyshot.merge(recipe, work / "out")
            found.setdefault(operator, []).append(time.perf_counter() - began)
    shutil.rmtree(work / "out", ignore_errors=True)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--mergekit")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", default="commands,floor,tasks,sizes,adapters")
    parser.add_argument("--inner", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.inner:
        given = json.loads(options.inner)
        models = [Path(model) for model in given["models"]]
        print(json.dumps(inner(Path(given["base"]), models, given["operators"], options.work, options.repeats)))
        return
    with open(options.work / "merge_speed.jsonl", "a") as log:

        def note(**values: Any) -> None:
            line = json.dumps(values)
            print(line, flush=True)
            log.write(line + "\n")
            log.flush()

        for part in options.parts.split(","):
            PARTS[part](options, note)


Note = Callable[..., None]


def make(options: argparse.Namespace, layout: str, count: int) -> tuple[Path, list[Path]]:
    """Base and models of a layout, made in processes of their own, whose memory then is not ours."""
    root = options.work / layout.lower()
    code = f"import merge_sets as s\ns.make_models({str(root)!r}, s.{layout}, {count + 1})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    return root / "m0", [root / f"m{i}" for i in range(1, count + 1)]


def commands(options: argparse.Namespace, note: Note) -> None:
    """Whole commands, ours and mergekit's in turn."""
    base, models = make(options, "MEDIUM", 4)
    output = options.work / "out"
    for operator in THEIRS:
        flags = ["--scaling", "1.0"] if operator == "ties" else ["--scaling", "0.4"]
        flags += ["--density", "0.2"] if operator != "task_arithmetic" else []
        mine, other = [], []
        for _ in range(options.repeats if operator != "ties" else max(1, options.repeats - 1)):
            mine.append(command(ours(base, models, operator, output, *flags), output))
            if options.mergekit:
                other.append(command(theirs(options.mergekit, base, models, operator, output, options.work), output))
        values: dict[str, Any] = {"seconds": median(mine, 0), "peak_gb": max(peak for _, peak in mine)}
        if other:
            values |= {"mergekit_seconds": median(other, 0), "mergekit_peak_gb": max(peak for _, peak in other)}
            values |= {"times_faster": values["mergekit_seconds"] / values["seconds"]}
            values |= {"peak_ratio": values["peak_gb"] / values["mergekit_peak_gb"]}
        note(part="commands", operator=operator, **values)


def median(runs: list[tuple[float, float]], which: int) -> float:
    return statistics.median(run[which] for run in runs)


def against_floor(options: argparse.Namespace, note: Note) -> None:
    base, models = make(options, "MEDIUM", 4)
    given = {"base": str(base), "models": [str(model) for model in models]}
    given["operators"] = ["mean", "task_arithmetic", "consensus_ta", "metis", "dare", "ties"]  # type: ignore[assignment]
    arguments = [sys.executable, __file__, "--work", str(options.work), "--repeats", str(options.repeats)]
    done = subprocess.run([*arguments, "--inner", json.dumps(given)], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    for operator, seconds in found.items():
        note(part="floor", operator=operator, seconds=seconds, times_floor=seconds / found["floor"])


def tasks(options: argparse.Namespace, note: Note) -> None:
    """4, 8 and 16 models: peak memory and seconds of the whole command."""
    base, models = make(options, "SMALL", 16)
    for operator in ("task_arithmetic", "metis", "ties"):
        for count in (4, 8, 16):
            runs = [
                command(ours(base, models[:count], operator, options.work / "out"), options.work / "out")
                for _ in range(options.repeats)
            ]
            note(part="tasks", operator=operator, tasks=count, seconds=median(runs, 0), peak_gb=median(runs, 1))


def sizes(options: argparse.Namespace, note: Note) -> None:
    """Six and eighteen layers of the same tensors: peak memory of the whole command."""
    for layout in ("SMALL", "DEEPER"):
        base, models = make(options, layout, 4)
        for operator in ("metis", "ties"):
            seconds, peak = command(ours(base, models, operator, options.work / "out"), options.work / "out")
            note(part="sizes", layout=layout, operator=operator, seconds=seconds, peak_gb=peak)


def adapters(options: argparse.Namespace, note: Note) -> None:
    """16 adapters of rank 16 on every linear layer of a base of 1.1 G parameters."""
    base, _ = make(options, "LARGE", 0)
    root = options.work / "adapters"
    code = f"import merge_sets as s\ns.make_adapters({str(root)!r}, s.LARGE, 16)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    for operator in ("task_arithmetic", "metis"):
        models = [root / f"a{i}" for i in range(16)]
        seconds, peak = command(ours(base, models, operator, options.work / "out"), options.work / "out")
        note(part="adapters", operator=operator, seconds=seconds, peak_gb=peak)


PARTS: dict[str, Callable[[argparse.Namespace, Note], None]] = {
    "commands": commands,
    "floor": against_floor,
    "tasks": tasks,
    "sizes": sizes,
    "adapters": adapters,
}

if __name__ == "__main__":
    main()
