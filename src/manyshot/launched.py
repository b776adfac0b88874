"""One of the processes of a launched local update: `accelerate launch … -m manyshot.launched FOLDER`.

All ranks load the model, train, and measure the expert together, with its tensors wherever the launch puts them; rank 0
writes what a local update in one process would: one adapter or model folder, and its record.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path

from manyshot.launch_files import ERROR, JOB, MARK, TOLD
from manyshot.process_mark import is_alive, process_mark
from manyshot.progress import Telling
from manyshot.rundir import write_json


def main(folder: Path) -> int:
    """Do this rank's part of the job in `folder`. An error is left there for the launch to tell."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / MARK.format(rank)).write_text(process_mark(), "utf-8")
    given = json.loads((folder / JOB).read_text("utf-8"))
    threading.Thread(target=_end_with, args=(given["parent"], os.getppid()), daemon=True).start()
    try:
        from manyshot.launched_update import update_on_ranks  # once the thread above watches: this takes seconds

        with open(folder / TOLD if rank == 0 else os.devnull, "a", encoding="utf-8") as stream:
            update_on_ranks(json.dumps(given["job"]), Telling(stream), rank, ranks)
    except Exception as error:  # noqa: BLE001 - of any kind; another process tells of it
        traceback.print_exc()
        file = getattr(error, "filename", None)
        failure = {
            "rank": rank,
            "time": time.time(),
            "kind": type(error).__name__,
            "message": str(error),
            "errno": getattr(error, "errno", None),
            "file": str(file) if file is not None else None,
        }
        write_json(folder / ERROR.format(rank), failure)
        return 1
    return 0


def _end_with(parent: str, launcher: int) -> None:
    """A rank whose launcher or run was killed ends too: the run's folder may be another's by now."""
    while os.getppid() == launcher and is_alive(parent) is not False:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
