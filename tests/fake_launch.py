"""Stands in for accelerate launch in tests of what is made of its end: `python fake_launch.py HOW FOLDER`.

It starts two ranks as torchrun does, each in a session of its own; HOW is what they do.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from manyshot.process_mark import process_mark

SUMMARY = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 11)
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 12)
"""


def rank(number: int, how: str, folder: Path) -> int:
    (folder / f"rank_{number}.mark").write_text(process_mark(), "utf-8")
    if how == "hang":
        time.sleep(600)
    if how in ("ValueError", "ModelError", "OutOfMemoryError", "OSError"):
        error = {"rank": number, "time": 10.0 - number, "kind": how, "message": f"said by {number}\nand more"}
        error |= {"errno": 28, "file": "full.bin"} if how == "OSError" else {"errno": None, "file": None}
        (folder / f"rank_{number}.json").write_text(json.dumps(error), "utf-8")
        return 1
    return 0


def main(how: str, folder: Path) -> int:
    line = [sys.executable, __file__, how, str(folder)]
    ranks = [subprocess.Popen([*line, str(number)], start_new_session=True) for number in (0, 1)]
    sys.stdout.write(SUMMARY if how == "killed" else "what the processes print")
    return max(one.wait() for one in ranks) or (how != "done")


if __name__ == "__main__":
    place = Path(sys.argv[2])
    sys.exit(rank(int(sys.argv[3]), sys.argv[1], place) if len(sys.argv) > 3 else main(sys.argv[1], place))
