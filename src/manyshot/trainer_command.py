"""The command of a user's own trainer: what may stand in it, who must have consented, and how it runs.

No shell sees it: it is split as a shell would, and each placeholder is replaced inside its argument. It runs in a group
of processes of its own, which ends with it, or at its time limit; all that it says goes into a log.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from manyshot.child_process import end_group, ended_by
from manyshot.errors import RecipeError, TrainingError, suggestion

CONSENT = "MANYSHOT_ALLOW_COMMAND"
KEY = "local_update.command"
# what a command may name, each by {name}; {config} is a JSON file with all of them
PLACEHOLDERS = {
    "start": "the model that the round starts from, a plain model folder; for reading only",
    "output": "an empty folder for what was trained: a PEFT adapter, or a whole model",
    "data": "the examples of this round in their order, a JSON-lines file in TRL's format",
    "data_folder": "the folder that this file is alone in, for loaders that want one",
    "messages": "the same examples as conversations: every line has `messages`, with a folder to itself too",
    "config": "a JSON file with all that is said here, and the recipe's local_update",
    "task": "name of the task",
    "round": "1 to R; experts that train alone are 1",
    "steps": "optimizer steps to take",
    "steps_before": "optimizer steps that the task has taken in the rounds before",
    "total_steps": "optimizer steps of the task in all rounds",
    "seed": "of this task and round",
    "batch_size": "examples of an optimizer step",
    "max_length": "tokens of an example",
    "learning_rate": "as the recipe says",
    "rank": "of an adapter, as the recipe says for the task",
    "alpha": "likewise",
    "device": "cpu, cuda, cuda:1, mps",
}
PLACEHOLDER = re.compile(r"\{([A-Za-z_]+)\}")
# seconds: how often it is looked after, how long it may take to end when told to
BEAT, GRACE = 2.0, 10.0
LONGEST_TAIL = 300

Values = Mapping[str, str | int | float]


def command_problem(command: str) -> str | None:
    """What is wrong with a command, in words; None where nothing is."""
    try:
        parts = shlex.split(command)
    except ValueError as error:
        return f"cannot be taken apart ({error})"
    if not parts:
        return "is empty"
    named = {name for part in parts for name in PLACEHOLDER.findall(part)}
    if unknown := sorted(named - PLACEHOLDERS.keys()):
        return f"{{{unknown[0]}}} is no placeholder{suggestion(unknown[0], PLACEHOLDERS)}"
    missing = [] if "config" in named else [f"{{{name}}}" for name in ("start", "output") if name not in named]
    if missing:
        return f"says nowhere {' and '.join(missing)}: where the model is, and where the trained one goes"
    return None


def fill(command: str, values: Values) -> list[str]:
    """The arguments, each with its placeholders replaced."""
    return [PLACEHOLDER.sub(lambda match: str(values[match[1]]), part) for part in shlex.split(command)]


def check_command(command: str) -> None:
    """Raises RecipeError where nobody has consented to run it, or there is no such program."""
    if os.environ.get(CONSENT) != "1":
        raise RecipeError(
            f"{KEY}: runs a program, with all that you may do on this machine. A recipe alone cannot ask for that: "
            f"read the command, and if it is yours or you trust it say so by `manyshot --allow-command …` "
            f"({CONSENT}=1 from Python)"
        )
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        raise RecipeError(f"{KEY}: no program '{program}' on this machine's PATH, or it may not be executed")


def files_of(command: str) -> list[Path]:
    """The files that stand in a command (a script, its configuration), in order."""
    paths = [Path(part) for part in shlex.split(command)[1:]]
    return [path for path in paths if path.is_file()]


def allow() -> None:
    """Consent, for this process and those that it starts."""
    os.environ[CONSENT] = "1"


def run_command(
    command: str, values: Values, log: Path, *, time_limit: float | None, where: str, beat: Callable[[], None]
) -> None:
    """Run a trainer to its end, its output in `log`; `beat` is called every few seconds.

    Raises TrainingError, naming the log, for one that fails or goes on after `time_limit` seconds.
    """
    check_command(command)
    arguments = fill(command, values)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as stream:
        stream.write(f"$ {shlex.join(arguments)}\n".encode())
        stream.flush()
        try:
            process = subprocess.Popen(
                arguments, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            raise RecipeError(f"{KEY}: '{arguments[0]}' cannot be started ({error.strerror})") from None
        try:
            code = _wait(process, time_limit, beat)
        finally:
            end_group(process, GRACE)
    if code is None:
        raise TrainingError(
            f"{where}: the trainer was still running after {time_limit:g} seconds (local_update.time_limit) and was "
            f"ended{_said(log)}"
        )
    if code != 0:
        ended = f"ended with exit code {code}" if code > 0 else ended_by(-code)
        raise TrainingError(f"{where}: the trainer {ended}{_said(log)}")


def _wait(process: subprocess.Popen[bytes], time_limit: float | None, beat: Callable[[], None]) -> int | None:
    """The exit code; None where the time is over first."""
    end = time.monotonic() + time_limit if time_limit is not None else None
    while True:
        left = BEAT if end is None else min(BEAT, max(0.0, end - time.monotonic()))
        try:
            return process.wait(left)
        except subprocess.TimeoutExpired:
            if end is not None and time.monotonic() >= end:
                return None
            beat()


def _said(log: Path) -> str:
    """Where its output is, and the end of it."""
    text = log.read_bytes()[-4 * LONGEST_TAIL :].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines()[1 if text.startswith("$ ") else 0 :] if line.strip()]
    shown = "".join(mark if mark.isprintable() else " " for mark in lines[-1][-LONGEST_TAIL:]) if lines else ""
    return f"; {log} has its output" + (f", which ends with: {shown}" if shown else ", which is empty")
