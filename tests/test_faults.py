"""Faults in the middle of a run: a task that fails, a merge that makes things worse, files that vanish, a full disk."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TASKS
from manyshot import local_failure, rounds, steps_regression
from manyshot.errors import ManyshotError, MergeError, RecipeError, RunFolderError, TrainingError
from manyshot.gap_weights import for_all_tasks
from manyshot.operators import BUILT_IN
from manyshot.progress import Event
from manyshot.rundir import read_json, remove
from manyshot.runner import run
from manyshot.status import run_status
from manyshot.steps import measure
from run_helpers import Runs, distance, load_tensors, phases, round_folder, unlike

CHEAP = ("evaluation.validation_examples=3", "evaluation.test_examples=1", "local_update.warmup_steps=0")
SKIP = "protocol.on_failure=skip_task_this_round"
BACK = "merge.on_regression=rollback"
THREE_ROUNDS = ("protocol.rounds=3", "protocol.local_steps=3")
run_local_update = local_failure.run_local_update


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("faults"))


@pytest.fixture
def fail(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple[int, str]]]:
    """fail((2, "words"), error): that task raises in that round; what was tried is in the list that comes back."""

    def install(where: tuple[int, str], error: BaseException) -> list[tuple[int, str]]:
        tried: list[tuple[int, str]] = []

        def update(job: Any, progress: Any) -> Any:
            here = (job.round_index, job.task.name)
            if (job.folder / "local_update.json").exists():
                return run_local_update(job, progress)
            tried.append(here)
            if here == where:
                raise error
            return run_local_update(job, progress)

        monkeypatch.setattr(local_failure, "run_local_update", update)
        return tried

    return install


# ---- a task that fails -----------------------------------------------------------------------------------------------

ERRORS = {
    "memory": (MemoryError(), "ran out of memory; give it more memory"),
    "gpu memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), r"out of memory \(CUDA out of mem"),
    "trainer": (RuntimeError("shapes do not fit\nand more"), r"failed \(RuntimeError: shapes do not fit\)"),
    "program": (KeyError("weight"), r"failed \(KeyError: 'weight'\)"),
    "data": (ManyshotError("row 3: the loss is nan"), "row 3: the loss is nan"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_task_that_fails_stops_the_run_naming_round_task_file_and_next_command(
    runs: Runs, fail: Callable[..., Any], name: str
) -> None:
    error, text = ERRORS[name]
    folder, tried = runs.new_folder(), fail((1, "numbers"), error)
    with pytest.raises(TrainingError, match=text) as caught:
        run(runs.recipe(*CHEAP, "protocol.rounds=1"), folder)
    message, file = str(caught.value), folder / "round_001" / "numbers" / "failure.json"
    assert message.startswith("round 1, task 'numbers'") and "\n" not in message
    assert f"{file} has the traceback" in message
    assert any(type(error).__name__ in line for line in read_json(file)["traceback"])
    assert f"manyshot run {folder / 'recipe.yaml'} --resume --output {folder} tries it again" in message
    assert tried == [(1, "letters"), (1, "numbers")] and caught.value.exit_code == 2


def test_task_that_failed_is_tried_again_by_a_resume_and_leaves_no_trace(runs: Runs, fail: Callable[..., Any]) -> None:
    overrides = (*CHEAP, "protocol.rounds=1")
    with pytest.MonkeyPatch.context():
        whole = runs.get(*overrides)
    folder = runs.new_folder()
    fail((1, "words"), MemoryError())
    with pytest.raises(TrainingError):
        run(runs.recipe(*overrides), folder)
    fail((0, ""), MemoryError())
    run(runs.recipe(*overrides), folder, resume=True)
    assert unlike(whole.folder, folder) == []


def test_task_that_fails_may_be_left_out_of_its_round(runs: Runs, fail: Callable[..., Any]) -> None:
    folder, told = runs.new_folder(), list[Event]()
    tried = fail((2, "words"), MemoryError())
    recipe = runs.recipe(*CHEAP, *THREE_ROUNDS, SKIP)
    result = run(recipe, folder, listener=told.append)
    assert (2, "words") in tried and (3, "words") in tried
    entry, place = result.scores["rounds"]["2"], round_folder(result, 2)
    assert set(entry["weights"]) == {"letters", "numbers"} and sum(entry["weights"].values()) == pytest.approx(1)
    assert set(entry["losses"]) == set(entry["scores"]) == set(TASKS)
    assert [*entry["skipped"]] == [*read_json(place / "DONE.json")["skipped"]] == ["words"]
    assert "skipped" not in result.scores["rounds"]["3"] and set(result.scores["rounds"]["3"]["weights"]) == set(TASKS)
    # told, in the records, in status, in the card and in the report
    (finding,) = [one for one in entry["guards"] if one["kind"] == "task_skipped"]
    assert finding["tasks"] == ["words"] and "ran out of memory" in finding["found"]
    assert any(event.values.get("kind") == "task_skipped" for event in told)
    status = run_status(folder)
    assert status["next"] is None and status["steps_done"] == status["steps"]
    assert finding in status["findings"]
    assert "Round 2 went on without words" in (folder / "merged" / "README.md").read_text("utf-8")
    assert "left out of the round" in (folder / "report.md").read_text("utf-8")


def test_task_left_out_is_left_out_again_after_a_resume(runs: Runs, fail: Callable[..., Any]) -> None:
    recipe = runs.recipe(*CHEAP, *THREE_ROUNDS, SKIP)
    whole = runs.new_folder()
    fail((2, "words"), MemoryError())
    run(recipe, whole)
    folder = runs.new_folder()
    shutil.copytree(whole, folder, symlinks=True)
    for name in ("scores.json", "merged", "round_002/DONE.json", "round_002/loss_gap.json", "round_003"):
        remove(folder / name)
    for manifest in (folder / "manifest.json", folder / "round_002" / "manifest.json"):
        remove(manifest)
    remove(folder / "round_002" / "merge.json")
    tried = fail((0, ""), MemoryError())  # it would not fail this time
    run(recipe, folder, resume=True)
    assert (2, "words") not in tried
    assert [name for name in unlike(whole, folder) if not name.endswith("manifest.json")] == []


@pytest.mark.parametrize(
    "overrides",
    [
        ("local_update.adapter_start=own", "local_update.optimizer_state=kept"),
        ("local_update.adapter_start=averaged", "operator=task_arithmetic"),
        ("merge.space=factors", "operator=mean"),
        ("operator={name: metis, weight_memory: 0.5}", "protocol.allocation=gap"),
    ],
    ids=str,
)
def test_task_left_out_comes_back_from_where_it_was(
    runs: Runs, fail: Callable[..., Any], overrides: tuple[str, ...]
) -> None:
    fail((2, "words"), RuntimeError("no"))
    result = run(runs.recipe(*CHEAP, *THREE_ROUNDS, SKIP, *overrides), runs.new_folder())
    assert (round_folder(result, 3) / "words" / "local_update.json").exists()
    assert not (round_folder(result, 2) / "words" / "local_update.json").exists()
    if "operator=task_arithmetic" in overrides:  # a sum's weights are T in total in every round
        assert result.scores["rounds"]["2"]["weights"] == {"letters": 1.5, "numbers": 1.5}
    if "protocol.allocation=gap" in overrides:
        steps = [read_json(round_folder(result, 3) / task / "local_update.json")["steps"] for task in TASKS]
        assert sum(steps) == 3


def test_too_few_tasks_left_stop_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_but_one(job: Any, progress: Any) -> Any:
        if job.task.name != "letters":
            raise RuntimeError("no")
        return run_local_update(job, progress)

    monkeypatch.setattr(local_failure, "run_local_update", fail_but_one)
    folder = runs.new_folder()
    with pytest.raises(
        TrainingError, match=r"1 of 3 tasks are left, and a merge needs at least two; .*'words'"
    ) as caught:
        run(runs.recipe(*CHEAP, SKIP), folder)
    assert f"Remove {folder / 'round_001'} to try them again" in str(caught.value)


def test_fewer_tasks_than_must_agree_stop_the_run(runs: Runs, fail: Callable[..., Any]) -> None:
    fail((1, "words"), RuntimeError("no"))
    with pytest.raises(TrainingError, match=r"metis\.min_agreement: 3 tasks can never agree among 2"):
        run(runs.recipe(*CHEAP, SKIP, "operator.min_agreement=3"), runs.new_folder())


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RunFolderError("x: damaged"), KeyboardInterrupt()]
)
def test_what_is_no_fault_of_the_task_stops_the_run_whatever_the_recipe_says(
    runs: Runs, fail: Callable[..., Any], error: BaseException
) -> None:
    folder = runs.new_folder()
    fail((1, "letters"), error)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else RunFolderError):
        run(runs.recipe(*CHEAP, SKIP), folder)
    assert not list(folder.rglob("failure.json"))


def test_training_that_diverges_may_be_left_out_too(runs: Runs) -> None:
    overrides = ("tasks.words.loss_scale=1.0e+38", "local_update.learning_rate=1.0e+20")
    with pytest.raises(TrainingError, match="round 1, task 'letters'"):
        run(runs.recipe(*CHEAP, *overrides), runs.new_folder())


@pytest.mark.parametrize("name", BUILT_IN)
def test_for_all_tasks_keeps_the_total_of_a_sum_and_the_rest_as_it_is(name: str) -> None:
    operator = BUILT_IN[name]()
    weights = [1.0, 1.0] if operator.weighting == "multiplier" else [0.25, 0.75]
    assert for_all_tasks(operator, weights, 2) == weights
    assert for_all_tasks(operator, weights, 3) == ([1.5, 1.5] if operator.sums else weights)


# ---- a merge that makes things worse ---------------------------------------------------------------------------------

TWO = ("operator=mean", *CHEAP, "protocol.local_steps=2")
THREE = ("operator=mean", *CHEAP, *THREE_ROUNDS)


@pytest.fixture
def worse(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """worse(2): what round 2 merges is found to have a multi-task loss of 100."""
    runs.get(*TWO)  # other tests share it, so it is made while nothing is found worse

    def install(bad: int) -> None:
        for module, name in ((steps_regression, "proposed"), (rounds, f"round_{bad:03d}")):

            def found(run: Any, state: Any, folder: Path, round_index: int, name: str = name) -> Any:
                measured = measure(run, state, folder, round_index)
                is_bad = (round_index, folder.name) == (bad, name) and not (folder / "rollback.json").exists()
                return measured | ({"multi_task_loss": 100.0} if is_bad else {})

            monkeypatch.setattr(module, "measure", found)

    return install


def losses(result: Any, r: int) -> float:
    found: float = result.scores["rounds"][str(r)]["multi_task_loss"]
    return found


def test_regression_is_a_rise_by_more_than_the_tolerance() -> None:
    assert [steps_regression.regressed(2.0, end, 0.1) for end in (1.0, 2.0, 2.19, 2.21, float("nan"))] == [
        *(False, False, False, True, True)
    ]


def test_regression_stops_the_run_with_what_to_do(runs: Runs, worse: Callable[[int], None]) -> None:
    folder, recipe = runs.new_folder(), runs.recipe(*TWO, "merge.on_regression=stop")
    worse(2)
    for resume in (False, True):  # it does not go away by itself
        with pytest.raises(MergeError, match=r"round 2: the merged model's multi-task loss is 100\.0") as caught:
            run(recipe, folder, resume=resume)
    message = str(caught.value)
    assert f"regression_tolerance allows 2.00% more ({folder / 'round_002' / 'losses.json'}); set " in message
    assert f"--resume --output {folder} merge.on_regression=warn goes on with it" in message
    assert not (folder / "round_002" / "DONE.json").exists()
    run(runs.recipe(*TWO), folder, resume=True)
    assert [name for name in unlike(runs.get(*TWO).folder, folder) if name.endswith(".safetensors")] == []


def test_regression_is_taken_back(runs: Runs, worse: Callable[[int], None]) -> None:
    told: list[str] = []
    folder = runs.new_folder()
    worse(2)
    result = run(runs.recipe(*THREE, BACK), folder, listener=lambda event: told.append(event.text))
    first, second = round_folder(result, 1), round_folder(result, 2)
    name = "task_vector.safetensors"
    assert (first / name).read_bytes() == (second / name).read_bytes()
    assert distance(load_tensors(first / "merged"), load_tensors(second / "merged")) == 0
    assert result.scores["rounds"]["2"]["losses"] == result.scores["rounds"]["1"]["losses"]
    record = read_json(second / "rollback.json")
    assert record["rolled_back"] and record["multi_task_loss"] == {"merged": 100.0, "start": losses(result, 1)}
    assert losses(result, 2) == losses(result, 1) != losses(result, 3)
    assert read_json(second / "merge.json")["update_norm"] == 0 and read_json(second / "DONE.json")["rolled_back"]
    assert [one["kind"] for one in result.scores["rounds"]["2"]["guards"]] == ["rolled_back"]
    assert any("the merge was taken back" in text for text in told)
    assert "merge of round 2 made the losses worse" in (folder / "merged" / "README.md").read_text("utf-8")
    assert "taken back" in (folder / "report.md").read_text("utf-8")
    assert not list(folder.rglob("proposed"))
    assert run_status(folder)["next"] is None


def test_rollback_that_takes_nothing_back_changes_no_byte(runs: Runs) -> None:
    plain, other = runs.get(*TWO), runs.get(*TWO, BACK)
    found = [name for name in unlike(plain.folder, other.folder) if not name.endswith(("README.md", "manifest.json"))]
    assert found == ["recipe.yaml"]


def test_rollback_of_the_first_round_leaves_the_pretrained_model(runs: Runs, worse: Callable[[int], None]) -> None:
    worse(1)
    result = run(runs.recipe(*TWO, BACK), runs.new_folder())
    first = load_tensors(round_folder(result, 1) / "task_vector.safetensors")
    assert first and all(not tensor.any() for tensor in first.values())
    assert result.scores["rounds"]["1"]["losses"] == result.scores["pretrained"]["losses"]
    assert losses(result, 2) != losses(result, 1)


class Killed(BaseException):
    """A kill, as far as the code can see."""


@pytest.mark.parametrize("rolls_back", [True, False])
def test_rollback_killed_while_it_moves_files_ends_with_the_unbroken_bytes(
    runs: Runs, worse: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, rolls_back: bool
) -> None:
    recipe = runs.recipe(*TWO, BACK, "local_update.adapter_start=averaged")
    if rolls_back:
        worse(2)
    replace_file = os.replace
    whole = run(recipe, runs.new_folder()).folder
    folder = runs.new_folder()
    for after in (0, 1, 3):  # renames after the verdict
        left: list[int] = []

        def counting(source: Any, target: Any, left: list[int] = left, after: int = after) -> None:
            if left:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            replace_file(source, target)
            if Path(target).name == "verdict.json" and "round_002" in str(target):
                left[:] = [after]

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counting)
            with pytest.raises(Killed):
                run(recipe, folder, resume=True)
        assert not (folder / "round_002" / "merge.json").exists()
        run(recipe, folder, resume=True)
        assert unlike(whole, folder) == [], after
        # what was trained before the kill is not trained again
        assert [one for one in phases(folder, "local_update") if one[0] == 2] == [(2, task) for task in TASKS]
        remove(folder / "round_002")
        for name in ("scores.json", "merged", "manifest.json", "metrics.jsonl"):
            remove(folder / name)


# what a first step of these makes of d: d itself, as the plain optimizer does
LIKE_PLAIN = {
    "sgd": ("merge.outer_momentum=0.5",),
    "nesterov": (
        *("merge.outer_optimizer=nesterov", "merge.outer_momentum=0.5"),
        f"merge.outer_step_size={1 / 1.5}",
    ),
}


@pytest.mark.parametrize("name", LIKE_PLAIN)
def test_rollback_starts_momentum_anew(runs: Runs, worse: Callable[[int], None], name: str) -> None:
    worse(2)
    plain, other = (runs.get(*THREE, BACK, "merge.reference=start", *more) for more in ((), LIKE_PLAIN[name]))
    assert not (round_folder(other, 2) / "outer_state.safetensors").exists()
    vectors = [load_tensors(round_folder(result, 3) / "task_vector.safetensors") for result in (plain, other)]
    assert distance(*vectors) < 1e-6


def test_rollback_starts_adam_anew(runs: Runs, worse: Callable[[int], None]) -> None:
    """Its first step is η d/(|d| + ε): every entry moves by η."""
    worse(2)
    steps = ("merge.outer_optimizer=adam", "merge.outer_step_size=0.001", "merge.outer_epsilon=1.0e-12")
    result = runs.get(*THREE, BACK, "merge.reference=start", *steps)
    before, after = (load_tensors(round_folder(result, r) / "task_vector.safetensors") for r in (2, 3))
    sizes = torch.cat([(after[name] - before[name]).abs().flatten() for name in after])
    assert float(sizes[sizes > 0].median()) == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ("local_update.adapter_start=own", "local_update.optimizer_state=kept"),
        ("local_update.adapter_start=averaged", "local_update.optimizer_state=kept"),
        ("merge.space=factors",),
    ],
    ids=str,
)
def test_rollback_takes_back_where_adapters_and_optimizers_go_on_from(
    runs: Runs, worse: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...]
) -> None:
    worse(2)
    began: dict[tuple[int, str], tuple[Any, Any]] = {}

    def note(job: Any, progress: Any) -> Any:
        began[job.round_index, job.task.name] = (job.start.start_adapter, job.optimizer_state)
        return run_local_update(job, progress)

    monkeypatch.setattr(local_failure, "run_local_update", note)
    result = run(runs.recipe(*THREE, BACK, *overrides), runs.new_folder())
    first = round_folder(result, 1)
    if "own" in overrides[0]:
        assert began[3, "words"] == (first / "words" / "adapter", first / "words" / "optimizer.safetensors")
        return
    adapter, optimizer = began[3, "words"]
    stored = "adapter_model.safetensors"
    assert (adapter / stored).read_bytes() == (first / "carried_adapter" / stored).read_bytes()
    assert optimizer == (first / "words" / "optimizer.safetensors" if len(overrides) > 1 else None)


# ---- what vanishes ---------------------------------------------------------------------------------------------------


def test_file_that_vanishes_in_the_middle_is_named_with_what_to_do(runs: Runs) -> None:
    folder = runs.new_folder()

    def vanish(event: Event) -> None:
        if (event.kind, event.phase) == ("phase", "merge"):
            return
        adapter = folder / "round_001" / "letters" / "adapter" / "adapter_model.safetensors"
        if event.phase == "local_update" and event.task == "words" and adapter.exists():
            adapter.unlink()

    with pytest.raises(ManyshotError, match=r"round_001/letters/adapter") as caught:
        run(runs.recipe(*CHEAP, "protocol.rounds=1"), folder, listener=vanish)
    assert caught.value.exit_code == 2


# ---- a disk of its own -----------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A small file system in memory, and what sets its options; only who may mount one has it."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True, capture_output=True)

    try:
        mount("size=40k")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("nobody may mount a file system here")
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))  # else refused at the start
    yield place, lambda options: mount(f"remount,{options}")
    subprocess.run(["umount", place], check=True)


def test_disk_that_is_really_full_or_read_only_ends_a_run_that_goes_on_later(
    runs: Runs, disk: tuple[Path, Callable[[str], None]]
) -> None:
    place, remount = disk
    folder, recipe = place / "run", runs.recipe(*TWO)
    for size in ("40k", "160k"):
        remount(f"size={size}")
        with pytest.raises(RunFolderError, match=rf"{place}.*[Nn]o space left") as caught:
            run(recipe, folder, resume=True)
        assert "--resume goes on" in str(caught.value) and not list(folder.rglob("*.partial"))
    remount("size=8m,ro")
    with pytest.raises(RunFolderError, match=rf"{place}.*Read-only file system"):
        run(recipe, folder, resume=True)
    remount("size=8m,rw")
    run(recipe, folder, resume=True)
    assert unlike(runs.get(*TWO).folder, folder) == []


# ---- what the recipe may say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("protocol.on_failure=retry",), "protocol.on_failure"),
        (("merge.on_regression=ignore",), "merge.on_regression"),
        (("merge.regression_tolerance=0.1",), "merge.regression_tolerance: is for on_regression: stop or rollback"),
        (("merge.on_regression=stop", "merge.regression_tolerance=-1"), "merge.regression_tolerance"),
    ],
)
def test_settings_of_faults_that_cannot_be_meant_are_refused(
    runs: Runs, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        runs.recipe(*overrides)
