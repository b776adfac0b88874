"""A merge that is killed or interrupted, in a process of its own, leaves nothing under its final name."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import manyshot
from manyshot import kernels
from manyshot.tensors import Checkpoint
from merge_helpers import draw, make_base

# the command, with a pause after each piece that it has merged
SLOW = """
import signal, sys, time
import manyshot.stream as stream
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
merge_piece = stream.merge_piece
def slowly(*arguments, **options):
    done = merge_piece(*arguments, **options)
    print("merged a piece", flush=True)
    time.sleep(0.2)
    return done
stream.merge_piece = slowly
from manyshot.__main__ import main
main()
"""


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    from manyshot.tensor_writer import write_tensors

    base = make_base(tmp_path / "base")
    write_tensors(
        tmp_path / "expert" / "model.safetensors",
        {name: base.read(name) + draw("e", name, shape=base.info(name).shape) for name in base.names},
    )
    return ["--base", str(tmp_path / "base"), str(tmp_path / "expert"), "-o", str(tmp_path / "out"), "--threads", "1"]


def stop_in_the_middle(arguments: list[str], number: signal.Signals) -> tuple[int, str]:
    """Run the command, send it a signal after its first piece; its exit code and what it said."""
    command = [sys.executable, "-c", SLOW, "merge", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "merged a piece\n"
        process.send_signal(number)
        errors = process.stderr.read()
    return process.returncode, errors


@pytest.mark.skipif(not kernels.compiled(), reason="the kernels are not compiled here")
def test_merge_killed_leaves_nothing_under_its_name_and_can_be_done_again(arguments: list[str], tmp_path: Path) -> None:
    code, _ = stop_in_the_middle(arguments, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    recipe = {"base": str(tmp_path / "base"), "experts": {"expert": {"path": str(tmp_path / "expert")}}}
    manyshot.merge(recipe, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert", "out"]
    assert Checkpoint(tmp_path / "out").names == Checkpoint(tmp_path / "base").names


@pytest.mark.skipif(not kernels.compiled(), reason="the kernels are not compiled here")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_merge_interrupted_says_so_and_leaves_nothing(
    number: signal.Signals, arguments: list[str], tmp_path: Path
) -> None:
    code, errors = stop_in_the_middle(arguments, number)
    assert code == 130
    assert errors == f"manyshot: interrupted; nothing was left under {tmp_path / 'out'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "expert"]
