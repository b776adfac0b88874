"""The most memory that a stretch of work holds: of this process, and of what PyTorch has on GPUs."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import Any

# a control group's files, of version 2 and 1: its limit, what it uses, and of that, what can go
GROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)
# what oneDNN and PyTorch call the number of compiled matrix products that they keep; both are 1024 where nobody says
KEPT_SHAPES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
# between two looks, in seconds; the kernel's own high-water mark tells of what is shorter, where it rises
EVERY = 0.02


class PeakMemory:
    """Looks at the memory of this process from now on until `stop`, by a thread that hardly runs."""

    def __init__(self) -> None:
        self._mark, self._peak = high_water(), resident()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if self._peak is not None:
            self._thread = threading.Thread(target=self._look, daemon=True)
            self._thread.start()
        if (cuda := _cuda()) is not None:
            cuda.reset_peak_memory_stats()

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._peak = max(self._peak or 0, resident() or 0)

    def stop(self) -> dict[str, int]:
        """Bytes by `memory` and, where a GPU was used, `gpu_memory`; what the system does not say is left out."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._peak = max(self._peak or 0, resident() or 0)
        mark, found = high_water(), {}
        # a mark that has risen was reached just now; one that has not is of earlier work
        risen = mark if mark is not None and mark != self._mark else None
        if (peak := max(filter(None, (self._peak, risen)), default=mark)) is not None:
            found["memory"] = peak
        if (cuda := _cuda()) is not None:
            found["gpu_memory"] = int(cuda.max_memory_allocated())
        return found


def bound_caches(shapes: int = 256) -> None:
    """Let this process, and those that it starts, keep so many compiled matrix products; before the first is computed.

    On a CPU each product in bfloat16 is compiled for its shape, thus for each length of a batch, and takes about a
    megabyte in each of two caches: gigabytes over a long run. A training step needs about 50. Results are the same.
    """
    for name in KEPT_SHAPES:
        os.environ.setdefault(name, str(shapes))


def resident() -> int | None:
    """Bytes that this process holds now; None where the system does not say (it does on Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def available() -> int | None:
    """Bytes that new processes may still take: of the machine, or of the container where that has less; None where the
    system does not say.
    """
    found = [left for left in (_free_of_machine(), *map(_free_of_group, GROUPS)) if left is not None]
    return min(found, default=None)


def _free_of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _free_of_group(names: tuple[str, str, str]) -> int | None:
    """What the control group's limit leaves; files that are held for quick reading can go."""
    try:
        limit, used, statistics = (Path("/sys/fs/cgroup", name).read_text("ascii") for name in names)
        kept = dict(line.split() for line in statistics.splitlines())
        return int(limit) - int(used) + int(kept.get("total_inactive_file", kept.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or one without a limit ("max")
        return None


def high_water() -> int | None:
    """The most bytes that this process has ever held; None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _cuda() -> Any:
    """torch.cuda, where torch is there and has begun to use it; a look at memory loads and starts neither."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None
