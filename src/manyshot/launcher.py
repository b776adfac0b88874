"""A local update in several processes: accelerate's launcher around manyshot.launched, followed until it ends.

The job goes out as JSON in a folder of its own, where every rank leaves its mark and, when it fails, its error; rank 0
tells there what it does. What the processes print goes to a log beside the expert, which stays when they fail.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from manyshot import errors
from manyshot.child_process import end_group, ended_by
from manyshot.errors import ManyshotError, RecipeError, TrainingError, suggestion
from manyshot.launch_files import ERROR, JOB, MARK, TOLD
from manyshot.launch_spec import KEY, Launch, command_line, plain_config, read_launch
from manyshot.process_mark import is_alive, process_mark
from manyshot.progress import Progress, pass_on
from manyshot.rundir import remove
from manyshot.training_spec import LocalUpdate

LOG = "launch.log"
MODULE = "manyshot.launched"
# seconds: between two looks at the processes, and for them to end when told to
EVERY, GRACE = 0.1, 5.0
# torchrun's last words on a rank that has ended
ENDED = re.compile(r"rank\s*:\s*(\d+)\s+\(local_rank.*?\)\s*exitcode\s*:\s*(-?\d+)")


def check_launch(update: LocalUpdate, device: str) -> None:
    """Raises RecipeError for a launch that accelerate would not take, or that this machine has no devices for."""
    from accelerate.commands.launch import launch_command_parser

    launch = read_launch(update)
    known = {action.dest: action for action in launch_command_parser()._actions}
    for name, value in launch.arguments.items():
        if name not in known:
            raise RecipeError(f"{KEY}.{name}: accelerate launch has no such argument{suggestion(name, known)}")
        choices = known[name].choices
        if choices is not None and str(value) not in {str(choice) for choice in choices}:
            raise RecipeError(f"{KEY}.{name}: found {value!r}; there are: {', '.join(map(str, choices))}")
    if launch.sharding and device == "cpu":
        raise RecipeError(
            f"{KEY}: accelerate shards a model among GPUs only; on processors launch without {launch.sharding}"
        )
    _check_seats(launch, device)


def _check_seats(launch: Launch, device: str) -> None:
    """Every rank has a GPU of its own, among those that this process may use."""
    there = torch.cuda.device_count()
    if device != "cpu" and there and there < launch.num_processes:
        raise RecipeError(f"{KEY}.num_processes: {launch.num_processes}, and torch can use {there} GPUs here")


def run_launched(job: Any, update: LocalUpdate, folder: Path, where: str, progress: Progress) -> None:
    """Run a job, a dataclass that JSON can hold, in the processes that the recipe asks for; they leave their work in
    `folder`.

    Raises TrainingError naming the rank that failed and the log, or what that rank raised where a user can act on it.
    """
    launch, log = read_launch(update), folder / LOG
    _check_seats(launch, update.device)
    folder.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what is held here is missing there
    with tempfile.TemporaryDirectory(prefix="manyshot-launch-") as name:
        work = Path(name)
        text = TypeAdapter(type(job)).dump_json(job).decode()
        (work / JOB).write_text(json.dumps({"parent": process_mark(), "job": json.loads(text)}), "utf-8")
        (work / "accelerate.json").write_text(json.dumps(plain_config(launch)), "utf-8")
        command = command_line(launch, work / "accelerate.json", torch.get_num_threads(), MODULE, work)
        with open(log, "wb") as stream:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                in_time = _follow(process, work / TOLD, update.time_limit, progress)
            finally:
                _end(process, work)
        if not in_time:
            raise TrainingError(
                f"{where}: still running after {update.time_limit:g} seconds (local_update.time_limit), so its "
                f"{launch.num_processes} processes were ended; {log} has their output"
            )
        if process.returncode:
            raise _failure(work, log, launch.num_processes, where) or TrainingError(
                f"{where}: accelerate launch ended with exit code {process.returncode}, and no rank says why; "
                f"{log} has its output"
            )
    remove(log)


# ---- while it runs ---------------------------------------------------------------------------------------------------


def _follow(process: subprocess.Popen[bytes], told: Path, time_limit: float | None, progress: Progress) -> bool:
    """Pass on what rank 0 tells, until the launcher has ended; False where the time is over first."""
    end = time.monotonic() + time_limit if time_limit is not None else None
    read = 0
    while True:
        with suppress(subprocess.TimeoutExpired):
            process.wait(EVERY)
        read = pass_on(told, read, progress)
        if process.returncode is not None:
            return True
        if end is not None and time.monotonic() >= end:
            return False


def _end(process: subprocess.Popen[bytes], work: Path) -> None:
    """End the launcher and the ranks, each of which leads a group of processes of its own."""
    end_group(process, GRACE)  # a launcher that is asked to ends its ranks
    for file in work.glob(MARK.format("*")):
        mark = file.read_text("utf-8")
        if is_alive(mark):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(int(mark.rsplit("/", 2)[1]), signal.SIGKILL)


# ---- when it fails ---------------------------------------------------------------------------------------------------


def _failure(work: Path, log: Path, num_processes: int, where: str) -> Exception | None:
    """What ended the launch: a rank that was killed, else the first rank that failed."""
    for rank, code in ENDED.findall(log.read_text("utf-8", "replace")):
        if int(code) < 0 and -int(code) != signal.SIGTERM:  # which the others get for it
            return TrainingError(
                f"{where}: rank {rank} of {num_processes} {ended_by(-int(code))}; {log} has its output"
            )
    failed = sorted((json.loads(file.read_text("utf-8")) for file in work.glob(ERROR.format("*"))), key=_when)
    if not failed:
        return None
    return _as_raised(failed[0], f"rank {failed[0]['rank']} of {num_processes}", log, where)


def _when(failure: Mapping[str, Any]) -> tuple[float, int]:
    return failure["time"], failure["rank"]


def _as_raised(failure: Mapping[str, Any], rank: str, log: Path, where: str) -> Exception:
    """The error of a rank, of its own kind where callers tell that kind from others."""
    kind, message = failure["kind"], failure["message"]
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, ManyshotError):
        remove(log)  # everything is said
        return own(message)
    if kind in ("MemoryError", "OutOfMemoryError"):
        return MemoryError(f"{rank}: {message}; {log} has its output".replace(": ;", ";"))
    if failure["errno"] is not None:
        return OSError(failure["errno"], f"{rank}: {os.strerror(failure['errno'])}", failure["file"])
    reason = next(iter(message.strip().splitlines()), "")
    return TrainingError(f"{where}: {rank} failed ({kind}{f': {reason}' if reason else ''}); {log} has its output")
