"""Memory of a round's merge of fully fine-tuned experts: it must not grow with tasks, nor with the model.

    python benchmarks/full_merge_memory.py --work /path/with/1GB

Experts are float32 model folders, as `local_update.method: full` leaves them; each merge is a process of its own, as a
round's. Prints a line for every size and number of tasks: the most memory beyond what the process held before the
merge, as a share of one expert, and as a share of all experts together.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# (megabytes of one expert, tasks)
CASES = ((64, 2), (64, 4), (64, 8), (64, 16), (128, 8))
# files that there really are; further tasks have names of their own for the same bytes
DIFFERENT = 4


def make_model(folder: Path, megabytes: int, seed: int) -> None:
    """A model folder of matrices with 2²¹ float32 entries each."""
    import numpy as np

    from manyshot.tensor_writer import make_header
    from manyshot.tensors import TensorInfo

    rng = np.random.default_rng(seed)
    infos = {f"layers.{number:03d}.weight": TensorInfo((1024, 2048), "F32") for number in range(megabytes // 8)}
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as stream:
        stream.write(make_header(infos)[0])
        for info in infos.values():
            stream.write((rng.random(info.num_elements, np.float32) - np.float32(0.5)).tobytes())


def measure(folder: Path, tasks: int, threads: int) -> dict[str, int]:
    """Merge so many experts in this process; bytes held before it, and at most."""
    from manyshot.memory import PeakMemory, resident
    from manyshot.operators import Metis
    from manyshot.round_merge import merge_weights
    from manyshot.task_vector import ModelUpdate
    from manyshot.tensors import Checkpoint

    experts = [folder / f"expert_{number % DIFFERENT}" for number in range(tasks)]
    before, watch = resident() or 0, PeakMemory()
    merge_weights(
        Checkpoint(folder / "base"),
        None,
        tuple(f"task_{number}" for number in range(tasks)),
        tuple(ModelUpdate(expert) for expert in experts),
        Metis(),
        [1 / tasks] * tasks,
        folder / "merged.safetensors",
        threads=threads,
    )
    return {"before": before, "most": watch.stop()["memory"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "TASKS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(Path(given.one[0]), int(given.one[1]), given.threads)))
        return
    print("| one expert | tasks | all experts | memory of the merge | of one expert | of all experts |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=given.work) as scratch:
        folder = Path(scratch)
        size = 0
        for megabytes, tasks in CASES:
            if megabytes != size:
                for place in folder.iterdir():
                    shutil.rmtree(place) if place.is_dir() else place.unlink()
                for number, name in enumerate(("base", *(f"expert_{number}" for number in range(DIFFERENT)))):
                    make_model(folder / name, megabytes, number)
                size = megabytes
            command = [sys.executable, __file__, "--threads", str(given.threads), "--one", str(folder), str(tasks)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
            found = json.loads(done.stdout)
            grown = (found["most"] - found["before"]) / 1e6
            one = (folder / "base" / "model.safetensors").stat().st_size / 1e6
            shares = f"{grown / one:.2f} | {grown / one / tasks:.3f}"
            print(f"| {one:.0f} MB | {tasks} | {one * tasks:.0f} MB | {grown:.0f} MB | {shares} |", flush=True)


if __name__ == "__main__":
    main()
