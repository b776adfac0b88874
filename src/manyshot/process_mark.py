"""Whether the process that began a run still runs, as seen from another process of the same machine."""

from __future__ import annotations

import os
import socket


def process_mark() -> str:
    """What tells this process from every other one that there was: host, number, and when it started (Linux)."""
    return _mark(os.getpid())


def is_alive(mark: str) -> bool | None:
    """Whether the process of a mark still runs; None where only its own machine could say."""
    parts = mark.rsplit("/", 2)
    if len(parts) < 3 or not parts[1].isdecimal() or parts[0] != socket.gethostname() or not parts[2]:
        return None
    return _mark(int(parts[1])) == mark


def _mark(number: int) -> str:
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()  # the name before it may hold anything
    except OSError:
        fields = []  # gone, or no Linux
    started = fields[19] if fields and fields[0] != "Z" else ""  # field 22 of all; a zombie has ended
    return f"{socket.gethostname()}/{number}/{started}"
