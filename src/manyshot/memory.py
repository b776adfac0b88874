"""The most memory that a stretch of work holds: of this process, and of what PyTorch has on GPUs."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

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


def resident() -> int | None:
    """Bytes that this process holds now; None where the system does not say (it does on Linux)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
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
