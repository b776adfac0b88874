"""The end of a program that was started for a job: made, and put into words."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress


def end_group(process: subprocess.Popen[bytes], grace: float) -> None:
    """End a process that leads a group, and all of that group: asked first, killed after `grace` seconds."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    with suppress(ProcessLookupError, PermissionError):  # nobody is left of the group
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def ended_by(number: int) -> str:
    """`was ended by signal SIGKILL`, with what that mostly means."""
    memory = "; most often there was too little memory" if number == signal.SIGKILL else ""
    return f"was ended by signal {signal.Signals(number).name}{memory}"
