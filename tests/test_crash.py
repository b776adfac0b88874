"""The crash harness in its short form: kills at every kind of point of a write, and what must be true after each."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import crash_harness
from crash_harness import MARKER, record
from crash_life import Kill, Points, tear

HARNESS = Path(crash_harness.__file__)


@pytest.mark.timeout(600)
def test_crash_harness_finds_nothing_in_twenty_kills(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    command = [sys.executable, str(HARNESS), "--kills", "20", "--per-run", "5", "--json", str(result)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(result.read_text("utf-8"))
    assert found["problems"] == [] and found["repeated_steps"] == 0
    assert found["kills"] == 20 and len(found["points"]) >= 6 and found["runs"] >= 4
    assert set(found["signals"]) == {"SIGKILL", "SIGTERM", "SIGINT"}


def test_crash_harness_sends_its_signal_at_the_point_it_names(tmp_path: Path, monkeypatch: Any) -> None:
    sent: list[int] = []
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
    points = Points(tmp_path / "log", tmp_path / "run", Kill("fsync", 2, signal.SIGTERM, "0"))
    for point, name in (("fsync", "a"), ("write", "b"), ("fsync", "../elsewhere"), ("fsync", "b"), ("fsync", "c")):
        points.passing(point, tmp_path / "run" / name)
    assert sent == [signal.SIGTERM]
    assert (tmp_path / "log").read_text() == "fsync a\nwrite b\nfsync b\nfsync c\n"


def test_crash_harness_leaves_half_of_what_is_being_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder/a", "folder/b", "log"):
        (tmp_path / name).write_text("0123456789")
    tear("write", tmp_path / "file", random.Random(0))
    tear("write", tmp_path / "folder", random.Random(1))
    tear("appended", tmp_path / "log", random.Random(0))
    tear("fsync", tmp_path / "folder", random.Random(0))
    sizes = [(tmp_path / name).stat().st_size for name in ("file", "folder/a", "folder/b", "log")]
    assert sizes[0] < 10 and sum(sizes[1:3]) < 20 and 0 < sizes[3] < 10
    tear("remove", tmp_path / "folder", random.Random(0))
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_crash_harness_puts_its_result_on_top_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "reliability.md"
    file.write_text(f"# Text\n{MARKER}| date |\n| --- |\n| old |\nmore\n")
    result = {"date": "2030-01-02", "scenario": "tune", "seed": 1, "kills": 3, "runs": 3, "repeated_steps": 0}
    result |= {"signals": {"SIGKILL": 3}, "points": {"fsync": 3}, "seconds_per_kill": 1.5, "problems": []}
    record(file, result)
    row = "| 2030-01-02 | `tune` | 1 | 3 | SIGKILL 3 | fsync 3 | 3 | 0 | 1.5 s |"
    assert file.read_text().split("\n")[1:] == [MARKER.strip(), "| date |", "| --- |", row, "| old |", "more", ""]
