"""The demo as its users run it: wall time, peak memory, share of the time that is not training or evaluation.

    python benchmarks/demo_run.py [KEY=VALUE …]

Runs `manyshot demo` in a process of its own, in a temporary folder, and prints what the run's own metrics.jsonl says.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "manyshot", "demo", *sys.argv[1:], "--output", f"{scratch}/demo", "--json"]
        started = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        wall = time.perf_counter() - started
    result = json.loads(done.stdout.splitlines()[-1])
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    seconds, scores = result["seconds"], result["scores"]
    print(f"wall {wall:.0f} s (start of the process to its end), peak memory {peak:.2f} GiB")
    print("seconds by phase:", ", ".join(f"{name} {value:.1f}" for name, value in sorted(seconds.items())))
    print(f"not training or evaluation: {seconds['overhead_share']:.1%} of the run's wall time")
    last = scores["rounds"][str(len(scores["rounds"]))]
    for name, entry in (("in rounds", last), ("post-hoc", scores.get("post_hoc"))):
        if entry is not None:
            normalized = entry["normalized"]
            print(
                f"{scores['operator']} {name}: average {normalized['average']:.3f}, worst {normalized['worst']:.3f} "
                f"({normalized['worst_task']}), multi-task loss {entry['multi_task_loss']:.3f}"
            )


if __name__ == "__main__":
    main()
