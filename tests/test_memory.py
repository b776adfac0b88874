"""The most memory that a stretch of work holds, not what was held before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from manyshot import memory
from manyshot.memory import PeakMemory
from manyshot.progress import Progress
from manyshot.rundir import read_lines

MIB = 2**20
# 200 MiB before, 20 MiB during, and nothing after the second look began
HELD = """
import time
from manyshot.memory import PeakMemory, resident
before = bytearray(200 * 2**20)
del before
now, watch = resident(), PeakMemory()  # before the watch has a thread, whose own page may come and go unseen
during = bytearray(b"x") * (40 * 2**20)
del during
print(now, watch.stop()["memory"])
"""


# products of 60 shapes, after that of one
SHAPES = """
import torch
from manyshot.memory import bound_caches, resident
bound_caches(8)
torch.set_num_threads(1)
weights = torch.randn(576, 1536, dtype=torch.bfloat16)
for length in range(100, 160):
    product = torch.randn(length, 576, dtype=torch.bfloat16) @ weights
    del product
    first = resident() if length == 100 else first
print(resident() - first)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what a process holds now")
def test_products_of_many_shapes_do_not_fill_the_memory() -> None:
    """With bounds of 8 it was 19 MB, without bounds 90 MB (a processor with AVX-512)."""
    unbounded = {name: value for name, value in os.environ.items() if name not in memory.KEPT_SHAPES}
    done = subprocess.run([sys.executable, "-c", SHAPES], env=unbounded, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50 * MIB


def test_bounds_of_caches_that_are_set_already_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(memory.KEPT_SHAPES[0], "7")
    monkeypatch.delenv(memory.KEPT_SHAPES[1], raising=False)
    memory.bound_caches()
    assert [os.environ[name] for name in memory.KEPT_SHAPES] == ["7", "256"]
    monkeypatch.delenv(memory.KEPT_SHAPES[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the system does not say what a process holds now")
def test_peak_is_of_the_work_and_not_of_what_came_before() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    now, peak = map(int, done.stdout.split())
    assert now <= peak < now + 150 * MIB


def test_peak_is_told_even_where_only_the_high_water_mark_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: None)
    monkeypatch.setattr(memory, "high_water", lambda: 7)
    assert PeakMemory().stop() == {"memory": 7}
    monkeypatch.setattr(memory, "high_water", lambda: None)
    assert PeakMemory().stop() == {}


def test_a_mark_that_rises_meanwhile_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    marks = iter([100, 900])
    monkeypatch.setattr(memory, "resident", lambda: 50)
    monkeypatch.setattr(memory, "high_water", lambda: next(marks))
    assert PeakMemory().stop() == {"memory": 900}  # a moment between two looks
    marks = iter([900, 900])
    assert PeakMemory().stop() == {"memory": 50}


def test_memory_of_a_gpu_is_counted_from_the_start_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cuda = SimpleNamespace(
        is_initialized=lambda: True,
        reset_peak_memory_stats=lambda: said.append("reset"),
        max_memory_allocated=lambda: 11,
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert PeakMemory().stop()["gpu_memory"] == 11 and said == ["reset"]
    cuda.is_initialized = lambda: False
    assert "gpu_memory" not in PeakMemory().stop() and said == ["reset"]


def test_a_phase_says_what_it_held_and_leaves_no_thread_when_it_fails(tmp_path: Path) -> None:
    progress = Progress(metrics=tmp_path / "metrics.jsonl")
    watches: list[PeakMemory] = []

    class Watch(PeakMemory):
        def __init__(self) -> None:
            super().__init__()
            watches.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyshot.progress.PeakMemory", Watch)
        with progress.timed("merge", 1):
            pass
        with pytest.raises(RuntimeError, match="stop"), progress.timed("save", 1):
            raise RuntimeError("stop")
    (line,) = [line for line in read_lines(tmp_path / "metrics.jsonl") if line["kind"] == "phase"]
    assert line["phase"] == "merge" and line["memory"] > MIB
    assert all(one._thread is None or not one._thread.is_alive() for one in watches)
