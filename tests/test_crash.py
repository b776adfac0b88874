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
from crash_check import finished_files, steps_left, unlike
from crash_harness import MARKER, record
from crash_life import Kill, Points, tear
from manyshot.rundir import write_json

HARNESS = Path(crash_harness.__file__)


def kill(folder: Path, *arguments: str) -> dict[str, Any]:
    """The harness in a process of its own; what it found, which is nothing wrong."""
    result = folder / "result.json"
    command = [sys.executable, str(HARNESS), *arguments, "--json", str(result)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(result.read_text("utf-8"))
    assert found["problems"] == [] and found["repeated_steps"] == 0
    return found


@pytest.mark.timeout(600)
def test_crash_harness_finds_nothing_in_twenty_kills(tmp_path: Path) -> None:
    found = kill(tmp_path, "--kills", "20", "--per-run", "5")
    assert found["kills"] == 20 and len(found["points"]) >= 6 and found["runs"] >= 4
    assert set(found["signals"]) == {"SIGKILL", "SIGTERM", "SIGINT"}


@pytest.mark.timeout(600)
def test_crash_harness_finds_nothing_in_an_extended_run_that_is_killed_twice(tmp_path: Path) -> None:
    found = kill(tmp_path, "--scenario", "extend", "--kills", "2", "--per-run", "2", "--seed", "2")
    assert (found["kills"], found["runs"]) == (2, 1)


@pytest.mark.slow  # a minute each: a dozen processes that train
@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", ["extend", "compare", "tune"])
def test_crash_harness_finds_nothing_in_twelve_kills_of_other_commands(scenario: str, tmp_path: Path) -> None:
    found = kill(tmp_path, "--scenario", scenario, "--kills", "12", "--per-run", "4", "--seed", "3")
    assert found["kills"] == 12 and found["runs"] >= 3


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
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "file").hardlink_to(tmp_path / "log")
    tear("write", tmp_path / "linked", random.Random(0))
    assert (tmp_path / "log").read_text() == "0123456789"
    tear("write", tmp_path / "file", random.Random(0))
    tear("write", tmp_path / "folder", random.Random(1))
    tear("appended", tmp_path / "log", random.Random(0))
    tear("fsync", tmp_path / "folder", random.Random(0))
    sizes = [(tmp_path / name).stat().st_size for name in ("file", "folder/a", "folder/b", "log")]
    assert sizes[0] < 10 and sum(sizes[1:3]) < 20 and 0 < sizes[3] < 10
    tear("remove", tmp_path / "folder", random.Random(0))
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_crash_check_names_files_of_other_bytes_and_leaves_out_times(tmp_path: Path) -> None:
    for name, seconds, value in (("left", 1.0, 1), ("right", 2.0, 2)):
        (tmp_path / name / "trials").mkdir(parents=True)
        (tmp_path / name / "trials.jsonl").write_text(f'{{"value": 0.5, "seconds": {seconds}}}\n')
        (tmp_path / name / "trials" / "metrics.jsonl").write_text(str(seconds))
        (tmp_path / name / "trials" / "losses.json").write_text(str(value))
        (tmp_path / name / "link").symlink_to(f"trials/{name}")
    assert unlike(tmp_path / "left", tmp_path / "left") == []
    assert unlike(tmp_path / "left", tmp_path / "right") == ["link", "trials/losses.json"]
    (tmp_path / "right" / "trials.jsonl").write_text('{"value": 0.25, "seconds": 1.0}\n')
    assert "trials.jsonl" in unlike(tmp_path / "left", tmp_path / "right")


def test_crash_check_counts_a_shared_local_update_once_and_none_that_is_half_written(tmp_path: Path) -> None:
    for name, key, steps in (("updates/a", "x", 4), ("trials/1/a", "x", 4), ("trials/1/b", "y", 2)):
        write_json(tmp_path / "unbroken" / name / "local_update.json", {"key": key, "steps": steps})
    folder = tmp_path / "folder"
    assert steps_left(tmp_path / "unbroken", folder) == 6
    write_json(folder / "updates" / "a.partial" / "local_update.json", {"key": "x", "steps": 4})
    assert steps_left(tmp_path / "unbroken", folder) == 6
    write_json(folder / "updates" / "a" / "local_update.json", {"key": "x", "steps": 4})
    assert steps_left(tmp_path / "unbroken", folder) == 2


def test_crash_check_takes_files_for_finished_when_their_record_is_there(tmp_path: Path) -> None:
    (tmp_path / "a" / "adapter").mkdir(parents=True)
    for name in ("a/adapter/weights", "a/manifest.json", "recipe.yaml", "b.partial"):
        (tmp_path / name).write_text("")
    assert list(finished_files(tmp_path)) == ["recipe.yaml"]
    write_json(tmp_path / "a" / "local_update.json", {})
    assert list(finished_files(tmp_path, ["recipe.yaml"])) == ["a/adapter/weights", "a/local_update.json"]


def test_crash_harness_puts_its_result_on_top_of_the_table(tmp_path: Path) -> None:
    file = tmp_path / "reliability.md"
    file.write_text(f"# Text\n{MARKER}| date |\n| --- |\n| old |\nmore\n")
    result = {"date": "2030-01-02", "scenario": "tune", "seed": 1, "kills": 3, "runs": 3, "repeated_steps": 0}
    result |= {"signals": {"SIGKILL": 3}, "points": {"fsync": 3}, "seconds_per_kill": 1.5, "problems": []}
    record(file, result)
    row = "| 2030-01-02 | `tune` | 1 | 3 | SIGKILL 3 | fsync 3 | 3 | 0 | 1.5 s |"
    assert file.read_text().split("\n")[1:] == [MARKER.strip(), "| date |", "| --- |", row, "| old |", "more", ""]
