"""One writer for a folder: the second is told who the first is, and one that died keeps nobody out."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from manyshot.errors import RunFolderError
from manyshot.process_mark import process_mark
from manyshot.run_lock import clear, one_writer
from manyshot.rundir import LOCK, PARTIAL

HOLD = """
import sys, time
from pathlib import Path
from manyshot.run_lock import one_writer
with one_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def elsewhere(tmp_path: Path) -> Any:
    """A process that holds the lock of tmp_path / "run"."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def refusal(folder: Path) -> str:
    before = sorted(folder.iterdir())
    with pytest.raises(RunFolderError) as caught, one_writer(folder):
        pass
    assert sorted(folder.iterdir()) == before
    return str(caught.value)


def test_lock_of_another_process_refuses_and_names_it(elsewhere: Any, tmp_path: Path) -> None:
    message = refusal(tmp_path / "run")
    assert f"process {elsewhere.pid} on {socket.gethostname()}" in message
    assert str(tmp_path / "run") in message and "manyshot status" in message


def test_lock_of_a_killed_process_is_taken_over_and_its_holder_told(elsewhere: Any, tmp_path: Path) -> None:
    (tmp_path / "run" / f"scores.json{PARTIAL}").write_text("{")
    (tmp_path / "run" / f"adapter{PARTIAL}").mkdir()
    elsewhere.kill()
    elsewhere.wait()
    with one_writer(tmp_path / "run") as before:
        assert before is not None and f"process {elsewhere.pid} on " in before
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]  # what was half written is gone
    with one_writer(tmp_path / "run") as before:
        assert before is None  # it was given back


def test_lock_leaves_no_trace(tmp_path: Path) -> None:
    with one_writer(tmp_path / "runs" / "a"):
        assert (tmp_path / "runs" / "a" / LOCK).exists()
        assert str(os.getpid()) in refusal(tmp_path / "runs" / "a")  # even within one process
    assert list(tmp_path.iterdir()) == []
    with one_writer(tmp_path / "runs" / "a"):
        (tmp_path / "runs" / "a" / "recipe.yaml").write_text("")
    assert [path.name for path in (tmp_path / "runs" / "a").iterdir()] == ["recipe.yaml"]


def test_lock_that_is_given_back_while_it_is_opened_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, removed = fcntl.flock, []

    def slow(descriptor: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / LOCK).unlink())  # as its holder does before it closes the file
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", slow)
    with one_writer(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == process_mark()


@pytest.mark.parametrize(
    ("mark", "refused"),
    [(process_mark(), True), ("elsewhere/12/99", True), (f"{socket.gethostname()}/999999999/5", False), ("", False)],
    ids=["alive", "elsewhere", "dead", "empty"],
)
def test_lock_without_locks_of_the_file_system_goes_by_its_file(
    mark: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    who = {"process": mark, "pid": 12, "host": "elsewhere", "user": "ada", "since": "since yesterday"}
    (tmp_path / LOCK).write_text(json.dumps(who) if mark else "")
    if refused:
        message = refusal(tmp_path)
        assert "ada's process 12 on elsewhere (since yesterday)" in message
        assert f"remove {tmp_path / LOCK}" in message
    else:
        with one_writer(tmp_path):
            pass
        assert list(tmp_path.iterdir()) == []


def test_clear_removes_everything_but_the_lock(tmp_path: Path) -> None:
    with one_writer(tmp_path):
        (tmp_path / "round_001").mkdir()
        (tmp_path / "round_001" / "a.json").write_text("{}")
        (tmp_path / "merged").symlink_to("round_001")
        clear(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]
