"""A run may be stopped anywhere, by anything; going on from there ends with the bytes of a run that was not stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TASKS
from manyshot.errors import DataError, ManyshotError, RunFolderError
from manyshot.progress import Event
from manyshot.rundir import PARTIAL, append_line, read_lines
from manyshot.runner import run
from run_helpers import Runs, contents, phases, unlike

PAIR = TASKS[:2]
# every kind of step: experts, post-hoc, two rounds with a carried adapter
WHOLE = (
    *("evaluation.experts=true", "evaluation.post_hoc=true", "protocol.local_steps=2"),
    *("evaluation.validation_examples=2", "evaluation.test_examples=2", "local_update.adapter_start=averaged"),
)
SHORT = (
    "protocol.rounds=1",
    "protocol.local_steps=1",
    "evaluation.validation_examples=2",
    "evaluation.test_examples=2",
)
SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from manyshot.recipe_file import load_recipe
from manyshot.runner import run
run(load_recipe(Path(sys.argv[1])), Path(sys.argv[2]), resume=True)
"""


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("resume"), tasks=PAIR)


@pytest.fixture(scope="module")
def moments(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run folder as a kill would leave it, right before and right after every file or folder gets its final name.

    Before: what is being written is only half there, and has its temporary name.
    """
    kept = tmp_path_factory.mktemp("moments")
    folder = runs.new_folder()
    replace = os.replace

    def keep(half: bool) -> None:
        copy = kept / f"{len(list(kept.iterdir())):03d}"
        shutil.copytree(folder, copy, symlinks=True)
        for file in copy.rglob("*") if half else ():
            if PARTIAL in str(file.relative_to(copy)) and file.is_file() and not file.is_symlink():
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    def watched(source: Any, target: Any) -> None:
        inside = folder in Path(target).parents and PARTIAL not in str(Path(target).relative_to(folder))
        if inside:
            keep(half=True)
        replace(source, target)
        if inside:
            keep(half=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyshot.rundir.os.replace", watched)
        run(runs.recipe(*WHOLE), folder)
    assert unlike(runs.get(*WHOLE).folder, folder) == []
    return sorted(kept.iterdir())


def finished_updates(folder: Path) -> set[Path]:
    return {file.parent.relative_to(folder) for file in folder.rglob("local_update.json") if PARTIAL not in str(file)}


def stamps(folder: Path) -> dict[Path, int]:
    """When the adapters of finished updates, and the task vectors of finished merges, were last written."""
    files = [file for update in finished_updates(folder) for file in (folder / update / "adapter").iterdir()]
    files += [file.with_name("task_vector.safetensors") for file in folder.rglob("merge.json")]
    return {file: file.stat().st_mtime_ns for file in files}


def leftovers(folder: Path) -> list[str]:
    return [str(file) for file in folder.rglob(f"*{PARTIAL}*")]


def resume_and_compare(runs: Runs, folder: Path) -> None:
    """Resume; the result is the unbroken run's, and no update that had its record is trained again."""
    done, lines_before = finished_updates(folder), len(phases(folder, "local_update"))
    written = stamps(folder)
    run(runs.recipe(*WHOLE), folder, resume=True)
    assert unlike(runs.get(*WHOLE).folder, folder) == []
    assert leftovers(folder) == []
    num_all = len(finished_updates(folder))
    assert num_all == 6
    assert len(phases(folder, "local_update")) - lines_before == num_all - len(done)
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in written.items())


# ---- stopped anywhere ------------------------------------------------------------------------------------------------


def test_resume_after_a_kill_at_any_write_gives_the_unbroken_bytes(runs: Runs, moments: list[Path]) -> None:
    assert len(moments) > 80
    for folder in moments[3::13]:
        resume_and_compare(runs, folder)


@pytest.mark.slow
def test_resume_after_a_kill_at_every_write_gives_the_unbroken_bytes(runs: Runs, moments: list[Path]) -> None:
    for folder in moments:
        if not (folder / "scores.json").exists() or not phases(folder, "check"):
            resume_and_compare(runs, folder)


def bomb(at: int) -> Callable[[Event], None]:
    """A listener that interrupts the run at its n-th event, as Ctrl-C does."""
    count = 0

    def listen(event: Event) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt

    return listen


def test_resume_after_one_interrupt_after_another_gives_the_unbroken_bytes(runs: Runs) -> None:
    """Interrupted at event 2, then at event 4 of what was left, then 6, …, until it gets through."""
    folder = runs.new_folder()
    num_interrupts = 0
    for at in range(2, 200, 2):
        done = finished_updates(folder)
        count_before = len(phases(folder, "local_update"))
        stamps_before = stamps(folder)
        try:
            run(runs.recipe(*WHOLE), folder, resume=True, listener=bomb(at))
        except KeyboardInterrupt:
            num_interrupts += 1
            assert leftovers(folder) == []  # an interrupt, unlike a kill, cleans up behind itself
        trained = len(phases(folder, "local_update")) - count_before
        assert trained <= len(finished_updates(folder) - done) + 1
        assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps_before.items())
        if (folder / "scores.json").exists() and read_lines(folder / "metrics.jsonl")[-1]["kind"] == "end":
            break
    assert num_interrupts >= 8
    assert unlike(runs.get(*WHOLE).folder, folder) == []


@pytest.mark.slow
def test_resume_after_an_interrupt_at_any_event_gives_the_unbroken_bytes(runs: Runs) -> None:
    num_events = len(_events(runs))
    assert num_events > 50
    for at in range(1, num_events + 1, 5):
        folder = runs.new_folder()
        with pytest.raises(KeyboardInterrupt):
            run(runs.recipe(*WHOLE), folder, listener=bomb(at))
        resume_and_compare(runs, folder)


def _events(runs: Runs) -> list[Event]:
    events: list[Event] = []
    run(runs.recipe(*WHOLE), runs.new_folder(), listener=events.append)
    return events


def kill_when(runs: Runs, folder: Path, there: Callable[[], bool]) -> None:
    """Start the run in a process of its own and kill it (SIGKILL) as soon as `there` says so."""
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(runs.recipe(*WHOLE).model_dump(mode="json")), "utf-8")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(recipe), str(folder)], env=environment)
    try:
        deadline = time.monotonic() + 240
        while not there() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the process ended before it was killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_resume_after_sigkill_gives_the_unbroken_bytes(runs: Runs) -> None:
    folder = runs.new_folder()
    kill_when(runs, folder, (folder / "round_001" / "letters" / "local_update.json").exists)
    assert not (folder / "round_002").exists()
    resume_and_compare(runs, folder)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.2])
def test_resume_after_sigkill_at_some_time_gives_the_unbroken_bytes(runs: Runs, delay: float) -> None:
    folder = runs.new_folder()
    begun: list[float] = []

    def there() -> bool:
        if (folder / "round_000").exists() and not begun:
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] >= delay

    kill_when(runs, folder, there)
    resume_and_compare(runs, folder)


def test_resume_of_a_finished_run_trains_merges_and_scores_nothing(runs: Runs) -> None:
    finished = runs.get(*WHOLE).folder
    folder = runs.new_folder()
    shutil.copytree(finished, folder, symlinks=True)
    lines = len(read_lines(folder / "metrics.jsonl"))
    result = run(runs.recipe(*WHOLE), folder, resume=True)
    new = {line.get("phase") for line in read_lines(folder / "metrics.jsonl")[lines:]}
    assert new == {None, "check", "validation"}  # the last check reloads the merged model, as always
    assert unlike(runs.get(*WHOLE).folder, folder) == []
    assert result.scores == runs.get(*WHOLE).scores


def test_resume_does_not_count_the_pause_as_time_of_the_run(runs: Runs) -> None:
    folder = runs.new_folder()
    with pytest.raises(KeyboardInterrupt):
        run(runs.recipe(*WHOLE), folder, listener=bomb(20))
    lines = read_lines(folder / "metrics.jsonl")
    (folder / "metrics.jsonl").unlink()
    for line in lines:  # as if all this had happened an hour ago
        shifted = {key: value - 3600 for key, value in line.items() if key in ("time", "began")}
        append_line(folder / "metrics.jsonl", line | shifted)
    seconds = run(runs.recipe(*WHOLE), folder, resume=True).seconds
    assert 0 < seconds["wall"] < 600


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(runs: Runs) -> Path:
    """A run that was interrupted early."""
    folder = runs.new_folder()
    with pytest.raises(KeyboardInterrupt):
        run(runs.recipe(*SHORT), folder, listener=bomb(4))
    return folder


def refusal(runs: Runs, folder: Path, *overrides: str, resume: bool = True) -> str:
    before = contents(folder)
    with pytest.raises(RunFolderError) as caught:
        run(runs.recipe(*SHORT, *overrides), folder, resume=resume)
    assert contents(folder) == before
    return str(caught.value)


def test_resume_with_another_recipe_is_refused_and_says_every_change(runs: Runs, stopped: Path) -> None:
    message = refusal(runs, stopped, "seed=7", "local_update.learning_rate=0.5")
    assert str(stopped) in message and "--force" in message
    assert "seed: 0 -> 7" in message and "local_update.learning_rate: 0.01 -> 0.5" in message


def test_resume_with_other_data_is_refused_and_names_the_task(runs: Runs, stopped: Path) -> None:
    file = runs.folder / "data" / "numbers.train.jsonl"
    original = file.read_text("utf-8")
    rows = [json.loads(line) for line in original.splitlines()]
    rows[5]["completion"] = "no"
    try:
        file.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
        message = refusal(runs, stopped)
    finally:
        file.write_text(original, "utf-8")
    assert "the content of tasks.numbers changed since the run began" in message and "letters" not in message
    run(runs.recipe(*SHORT), stopped, resume=True)  # put back as it was, it goes on


def test_resume_with_another_base_model_is_refused(runs: Runs) -> None:
    base = runs.folder / "own_base"
    shutil.copytree(runs.mapping["model"], base)
    folder = runs.new_folder()
    with pytest.raises(KeyboardInterrupt):
        run(runs.recipe(*SHORT, f"model={base}"), folder, listener=bomb(4))
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    assert "the content of model changed since the run began" in refusal(runs, folder, f"model={base}")


def test_resume_with_a_damaged_record_is_refused_and_names_it(runs: Runs, stopped: Path) -> None:
    environment = stopped / "environment.json"
    environment.write_bytes(environment.read_bytes()[:50])
    assert str(environment) in refusal(runs, stopped)
    (stopped / "recipe.yaml").write_text("a: [", "utf-8")
    assert str(stopped / "recipe.yaml") in refusal(runs, stopped)


def test_folder_that_is_not_empty_is_refused_and_both_flags_are_named(runs: Runs, stopped: Path) -> None:
    message = refusal(runs, stopped, resume=False)
    assert str(stopped) in message and "--resume" in message and "--force" in message


def test_folder_that_is_no_run_is_never_touched(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work", "utf-8")
    for flags in ({"resume": True}, {"force": True}, {"resume": True, "force": True}, {}):
        with pytest.raises(RunFolderError, match=str(tmp_path)):
            run(runs.recipe(*SHORT), tmp_path, **flags)
    file = tmp_path / "thesis.tex"
    for flags in ({"resume": True}, {"force": True}, {}):
        with pytest.raises(RunFolderError, match=r"thesis\.tex: is a file, not a folder"):
            run(runs.recipe(*SHORT), file, **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert file.read_text("utf-8") == "years of work"


def test_force_starts_over_and_leaves_nothing_of_the_old_run(runs: Runs, stopped: Path) -> None:
    (stopped / "round_009").mkdir()
    (stopped / "notes.txt").write_text("old", "utf-8")
    run(runs.recipe(*SHORT, "seed=3"), stopped, force=True)
    assert unlike(runs.get(*SHORT, "seed=3").folder, stopped) == []


def test_force_keeps_the_old_run_when_the_new_one_cannot_start(runs: Runs, stopped: Path) -> None:
    before = contents(stopped)
    with pytest.raises(DataError):
        run(runs.recipe(*SHORT, "tasks.letters.metric=unknown"), stopped, force=True)
    assert contents(stopped) == before


@pytest.mark.parametrize("there", [True, False])
def test_resume_without_a_run_just_starts(runs: Runs, tmp_path: Path, there: bool) -> None:
    folder = tmp_path / "deep" / "run"
    if there:
        folder.mkdir(parents=True)
        (folder / f"recipe.yaml{PARTIAL}").write_text("tasks: {le", "utf-8")  # killed in the very first write
    run(runs.recipe(*SHORT), folder, resume=True)
    assert unlike(runs.get(*SHORT).folder, folder) == []


def test_run_that_cannot_start_leaves_no_folder(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(ManyshotError):
        run(runs.recipe(*SHORT, "tasks.letters.metric=unknown"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
