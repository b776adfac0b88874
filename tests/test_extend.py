"""A run that has finished gets more rounds, and tasks with them: what it has done stays, to the byte."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from conftest import TASKS
from manyshot import extend_command
from manyshot.cli import app
from manyshot.errors import RecipeError, RunFolderError
from manyshot.extend_command import extend
from manyshot.gap_weights import gap_weights, remember
from manyshot.manifest import find_damages
from manyshot.outer import STATE_NAME
from manyshot.report_command import write_report
from manyshot.rundir import read_json
from manyshot.runner import run
from manyshot.segments import Segment, first_rounds, read_segments, write_segments
from manyshot.status import run_status
from run_helpers import Runs, contents, phases, write_data

PAIR = TASKS[:2]
SMALL = ("evaluation.validation_examples=2", "evaluation.test_examples=2")
SHORT = (*SMALL, "protocol.rounds=1", "protocol.local_steps=2")
LONG = (*SMALL, "protocol.rounds=2", "protocol.local_steps=4")
NESTEROV = ("merge.reference=start", "merge.outer_optimizer=nesterov", "merge.outer_momentum=0.5")
ARRIVES = (*NESTEROV, "merge.outer_look_ahead=between_rounds")
# what names the recipe that a local update, and so all else, was made by
RECIPE_NAMED = ("local_update.json", "README.md", "manifest.json")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(base_folder, tmp_path_factory.mktemp("extend"), tasks=PAIR)
    write_data(made.folder / "data", TASKS[2])
    return made


def finished(runs: Runs, *overrides: str) -> Path:
    """A copy of a finished run, that a test may change."""
    done = runs.get(*overrides).folder
    folder = runs.new_folder()
    shutil.copytree(done, folder, symlinks=True)
    return folder


def rounds_of(folder: Path) -> dict[str, bytes]:
    found = contents(folder)
    return {name: data for name, data in found.items() if name.startswith("round_") and not name.endswith(RECIPE_NAMED)}


@pytest.mark.parametrize("settings", [(), NESTEROV], ids=["plain", "nesterov"])
def test_extend_ends_with_the_bytes_of_a_run_that_was_as_long_from_the_beginning(
    settings: tuple[str, ...], runs: Runs
) -> None:
    folder = finished(runs, *SHORT, *settings)
    before = len(phases(folder, "local_update"))
    result = extend(folder)
    whole = runs.get(*LONG, *settings)
    assert rounds_of(folder) == rounds_of(whole.folder)
    assert result.scores["rounds"] == whole.scores["rounds"]
    assert phases(folder, "local_update")[before:] == [(2, task) for task in PAIR]  # nothing is trained again
    assert (folder / "merged").resolve() == (folder / "round_002" / "merged").resolve()
    assert find_damages(folder, lambda text: None) == []
    again = contents(folder)
    run(runs.recipe(*LONG, *settings), folder, resume=True)
    assert contents(folder) == again


@pytest.mark.parametrize("start", ["fresh", "averaged", "svd"])
def test_extend_goes_on_from_where_a_run_has_come_to(start: str, runs: Runs) -> None:
    """What took its plain step because no round was to follow stays what it is, and leaves the velocity it had."""
    adapters = (f"local_update.adapter_start={start}",)
    folder = finished(runs, *SHORT, *ARRIVES, *adapters)
    before = rounds_of(folder)
    extend(folder)
    after, state = rounds_of(folder), f"round_001/{STATE_NAME}"
    assert {name for name, data in before.items() if after[name] != data} == {
        "round_001/DONE.json",  # they name the state
        "round_001/merge.json",
    }
    ahead = rounds_of(runs.get(*LONG, *NESTEROV, *adapters).folder)
    assert {name for name in after.keys() - before.keys() if name.startswith("round_001")} == {state}
    assert after[state] == ahead[state]
    assert after["round_001/task_vector.safetensors"] != ahead["round_001/task_vector.safetensors"]
    assert find_damages(folder, lambda text: None) == []
    again = contents(folder)
    run(runs.recipe(*LONG, *ARRIVES, *adapters), folder, resume=True)
    assert contents(folder) == again


@pytest.mark.parametrize("resumed", [False, True], ids=["extend", "run --resume, then extend"])
def test_extend_that_was_killed_before_the_longer_recipe_was_written_is_done_by_the_same_command(
    resumed: bool, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = finished(runs, *SHORT, *NESTEROV)

    def killed(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extend_command, "write_text", killed)
        extend(folder)
    assert not (folder / "round_001" / "merge.json").exists()  # it is to be made again
    if resumed:
        run(runs.recipe(*SHORT, *NESTEROV), folder, resume=True)
    extend(folder)
    assert rounds_of(folder) == rounds_of(runs.get(*LONG, *NESTEROV).folder)
    assert [segment.rounds for segment in read_segments(folder)] == [1]
    assert find_damages(folder, lambda text: None) == []


@pytest.mark.parametrize("longer", [False, True])
def test_extend_that_is_interrupted_says_how_to_go_on(
    longer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("before")

    def interrupted(*arguments: object, **named: object) -> None:
        if longer:
            recipe.write_text("after")
        raise KeyboardInterrupt

    monkeypatch.setattr(extend_command, "extend", interrupted)
    ended = CliRunner().invoke(app, ["extend", str(tmp_path), "--quiet"])
    again = f"manyshot run {recipe} --resume --output {tmp_path}" if longer else "the same command"
    assert (ended.exit_code, ended.stderr) == (130, f"manyshot: interrupted; go on with {again}\n")


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_extend_adds_a_task_that_is_measured_everywhere_and_trained_from_now_on(runs: Runs, memory: float) -> None:
    overrides = (*SHORT, "evaluation.experts=true", f"operator={{name: metis, mask: false, weight_memory: {memory}}}")
    folder, task = finished(runs, *overrides), TASKS[2]
    before = contents(folder)
    data = runs.folder / "data"
    added = [f"tasks.{task}.{split}={data / f'{task}.{split}.jsonl'}" for split in ("train", "validation", "test")]
    result = extend(folder, 1, 3, [*added, f"tasks.{task}.metric=choice_accuracy"])
    after = contents(folder)
    kept = [name for name in before if name.startswith(("round_", "experts/"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    models = [result.scores["pretrained"], result.scores["experts"], *result.scores["rounds"].values()]
    assert all(set(model["scores"]) == set(TASKS) and set(model["losses"]) == set(TASKS) for model in models)
    assert read_json(folder / "round_002" / task / "local_update.json")["steps"] == 3
    assert read_json(folder / "experts" / task / "local_update.json")["steps"] == 2  # as many as the others'
    weighed = read_json(folder / "round_002" / "loss_gap.json")
    assert set(weighed["weights"]) == set(TASKS)
    earlier = read_json(folder / "round_001" / "loss_gap.json")["weights"] | {task: 1 / len(TASKS)}
    now = gap_weights(list(weighed["loss_gaps"].values()), weighed["temperature"])
    expected = remember(now, [earlier[name] for name in weighed["loss_gaps"]], memory)
    assert list(weighed["weights"].values()) == pytest.approx(expected)
    assert result.normalized is not None and set(result.normalized["tasks"]) == set(TASKS)
    status = run_status(folder)
    assert status["finished"] and status["next"] is None and status["tasks"] == list(TASKS)
    write_report([folder])
    assert find_damages(folder, lambda text: None) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=3"], "seed: 0 -> 3"),
        (["local_update.learning_rate=0.5"], "local_update.learning_rate: 0.01 -> 0.5"),
        (["operator.temperature=7"], "operator.temperature: "),
        (["tasks.letters.metric=exact_match"], "tasks.letters.metric"),
        (["protocol.rounds=9"], "--rounds says how many"),
    ],
)
def test_extend_refuses_what_would_change_what_was_done(overrides: list[str], message: str, runs: Runs) -> None:
    folder = finished(runs, *SHORT)
    before = contents(folder)
    with pytest.raises(RecipeError, match=message):
        extend(folder, overrides=overrides)
    assert contents(folder) == before


def test_extend_refuses_a_run_that_has_not_finished_and_says_how_to(runs: Runs, tmp_path: Path) -> None:
    folder = finished(runs, *SHORT)
    (folder / "scores.json").unlink()
    with pytest.raises(RunFolderError, match=r"has finished 1 of 1 rounds; first finish it by manyshot run .*--resume"):
        extend(folder)
    with pytest.raises(RunFolderError, match="holds no run"):
        extend(tmp_path)


def test_segments_say_since_when_a_task_takes_part(tmp_path: Path) -> None:
    assert read_segments(tmp_path) == [] and first_rounds(tmp_path, ["a", "b"]) == {}
    write_segments(tmp_path, [Segment(2, ["a"], {}), Segment(4, ["a", "b"], {})])
    assert first_rounds(tmp_path, ["a", "b", "c"]) == {"b": 3, "c": 5}
    assert read_segments(tmp_path)[1].tasks == ["a", "b"]


@pytest.mark.parametrize("text", ["{}", '{"segments": [{"round": 1}]}', '{"segments": 3}'])
def test_segments_that_are_damaged_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "extended.json").write_text(text)
    with pytest.raises(RunFolderError, match=r"extended\.json: damaged"):
        read_segments(tmp_path)
