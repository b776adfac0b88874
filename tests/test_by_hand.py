"""Rounds by hand: what teams send is merged as a run would merge it, and what cannot be meant is refused by name."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_trainer import write_adapter, write_model
from manyshot.by_hand import Sent, add, round_status, start
from manyshot.by_hand_merge import merge, tell_losses
from manyshot.errors import DataError, MergeError, ModelError, RecipeError, RunFolderError
from manyshot.export_source import open_source
from manyshot.manifest import find_damages
from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.report_read import read_run
from manyshot.rundir import read_json
from manyshot.seeding import preserved_random_state
from manyshot.status import run_status
from manyshot.tasks import load_task
from run_helpers import load_tensors, write_data

TEAM = Path(__file__).parent.parent / "examples" / "any_trainer" / "team.py"
QUERY = "model.layers.{}.self_attn.q_proj.weight"
LOSSES = {"north": (2.0, 1.0), "south": (1.5, 1.25)}


def by_hand_mapping(base: Path) -> dict[str, Any]:
    return {
        "preset": "paper",
        "model": str(base),
        "tasks": {name: {"data": "elsewhere"} for name in LOSSES},
        "protocol": {"rounds": 2, "local_steps": 4},
        "operator": {"name": "metis", "temperature": 2.0, "mask": False},
    }


def send(run: Path, task: str, folder: Path, losses: tuple[float, float] | None = None, **more: Any) -> str:
    merged, expert = LOSSES[task] if losses is None else losses
    return add(run, Sent(task, folder, merged, expert), **more)


def adapter(folder: Path, seed: int, **more: Any) -> Path:
    """What a team sends: an adapter of rank 2, α 4, on the query projections."""
    write_adapter({"seed": seed, "start": "the/model/that/we/were/given"}, folder, **more)
    return folder


def update_of(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW = (α/r)·B·A of such an adapter, by tensor."""
    found = load_tensors(folder / "adapter_model.safetensors")
    part = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    return {QUERY.format(i): 2.0 * found[part.format(i, "B")] @ found[part.format(i, "A")] for i in range(2)}


@pytest.fixture(scope="module")
def recipe(base_folder: Path) -> Recipe:
    return recipe_from_mapping(by_hand_mapping(base_folder))


@pytest.fixture(scope="module")
def begun(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to which one of two teams has sent its expert."""
    folder = tmp_path_factory.mktemp("begun")
    start(recipe, folder / "run")
    send(folder / "run", "north", adapter(folder / "sent", 1))
    return folder / "run"


@pytest.fixture
def one(begun: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, closed with the losses of its last model."""
    folder = tmp_path_factory.mktemp("finished")
    run = folder / "run"
    start(recipe, run)
    for seed, name in enumerate(LOSSES):
        send(run, name, adapter(folder / f"{name}_1", seed))
    merge(run)
    for seed, name in enumerate(LOSSES):
        send(run, name, adapter(folder / f"{name}_2", 10 + seed), (1.4, 1.0))
    merge(run)
    tell_losses(run, {"north": 1.2, "south": 1.1})
    return run


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_round_by_hand_weighs_by_the_losses_that_teams_told_and_merges_what_they_sent(finished: Path) -> None:
    record = read_json(finished / "round_001" / "loss_gap.json")
    assert record["loss_gaps"] == {"north": 1.0, "south": 0.25}
    shares = np.exp([1.0 / 2.0, 0.25 / 2.0])
    assert list(record["weights"].values()) == pytest.approx((shares / shares.sum()).tolist())
    vector = load_tensors(finished / "round_001" / "task_vector.safetensors")
    sent = [update_of(finished.parent / f"{name}_1") for name in LOSSES]
    for name, merged in vector.items():
        wanted = sum(weight * one[name] for weight, one in zip(record["weights"].values(), sent, strict=True))
        torch.testing.assert_close(merged, wanted, rtol=1e-5, atol=1e-7)


def test_round_by_hand_goes_on_from_the_merged_model(finished: Path) -> None:
    first, second = (load_tensors(finished / f"round_00{r}" / "task_vector.safetensors") for r in (1, 2))
    weights = read_json(finished / "round_002" / "loss_gap.json")["weights"]
    sent = {name: update_of(finished.parent / f"{name}_2") for name in LOSSES}
    for name, merged in second.items():
        wanted = first[name] + sum(weights[task] * sent[task][name] for task in LOSSES)
        torch.testing.assert_close(merged, wanted, rtol=1e-4, atol=1e-6)


def test_round_by_hand_leaves_the_folder_of_a_run(finished: Path) -> None:
    assert find_damages(finished, lambda text: None) == []
    told = read_json(finished / "round_001" / "losses.json")
    assert {name: one["loss"] for name, one in told.items()} == {"north": 1.4, "south": 1.4}
    status = run_status(finished)
    assert (status["rounds_done"], status["next"], status["finished"]) == (2, None, True)
    assert open_source(finished, None).round_index == 2
    _, details = read_run(finished)
    assert [problem.file for problem in details.problems] == []
    assert details.stopped is None
    assert (finished / "merged" / "README.md").read_text().startswith("---\n")


def test_round_by_hand_says_where_it_stands(one: Path, begun: Path, base_folder: Path) -> None:
    found = round_status(one)
    assert (found["round"], found["missing"], found["model"]) == (1, ["south"], str(base_folder))
    assert found["sent"]["north"] == {"returned": "adapter", "steps": 2, "loss_merged": 2.0, "loss_expert": 1.0}


def test_round_by_hand_takes_a_whole_model(one: Path, base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write_model({"start": str(base_folder)}, tmp_path / "model", add=0.5)
    send(one, "south", tmp_path / "model")
    merge(one)
    vector = load_tensors(one / "round_001" / "task_vector.safetensors")
    weight = read_json(one / "round_001" / "loss_gap.json")["weights"]["south"]
    added = vector["model.layers.0.mlp.up_proj.weight"]
    torch.testing.assert_close(added, torch.full_like(added, 0.5 * weight), rtol=1e-4, atol=1e-6)


# ---- what teams send again, or wrongly -------------------------------------------------------------------------------


def test_round_by_hand_takes_the_same_again_and_something_else_only_where_asked(begun: Path, one: Path) -> None:
    same = begun.parent / "sent"
    assert "nothing to do" in send(one, "north", same)
    with pytest.raises(RunFolderError, match="round 1, task 'north': something else has been sent before; --replace"):
        send(one, "north", same, (2.0, 1.5))
    assert send(one, "north", same, (2.0, 1.5), replace=True) == "round 1, task 'north': taken"
    assert round_status(one)["sent"]["north"]["loss_expert"] == 1.5


def test_round_by_hand_knows_the_files_of_an_earlier_round(finished: Path) -> None:
    assert "those of round 1" in send(finished, "north", finished.parent / "north_1")


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ((float("nan"), 1.0), "task 'south': --loss-merged is nan"),
        ((1.0, float("inf")), "task 'south': --loss-expert is inf"),
        ((1.0, -0.5), "task 'south': --loss-expert is -0.5"),
    ],
)
def test_round_by_hand_refuses_losses_that_are_none(one: Path, losses: tuple[float, float], message: str) -> None:
    with pytest.raises(RunFolderError, match=message):
        send(one, "south", one.parent, losses)


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: folder.mkdir(), "found nothing"),
    (lambda folder: adapter(folder, 2, width=64), r"the adapter's update has shape \(64, 64\)"),
    (lambda folder: adapter(folder, 2, layers=3), "has no such tensor; it was trained on another model"),
    (lambda folder: adapter(folder, 2, value=np.nan), "q_proj.weight' holds NaN or Inf"),
]


@pytest.mark.parametrize(("make", "message"), WRONG)
def test_round_by_hand_refuses_what_does_not_belong_to_the_base(
    one: Path, tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "wrong")
    with pytest.raises(ModelError, match=message):
        send(one, "south", tmp_path / "wrong")
    assert round_status(one)["missing"] == ["south"]


def test_round_by_hand_refuses_adapters_of_the_pretrained_model_in_later_rounds(
    one: Path, base_folder: Path, tmp_path: Path
) -> None:
    send(one, "south", adapter(tmp_path / "first", 2, said=str(base_folder)))
    merge(one)
    with pytest.raises(ModelError, match="the pretrained model; a round's adapters are trained on the merged model"):
        send(one, "south", adapter(tmp_path / "second", 3, said=str(base_folder)))


def test_round_by_hand_refuses_a_task_that_is_none(one: Path) -> None:
    with pytest.raises(RunFolderError, match="no task 'nord'; did you mean 'north'"):
        add(one, Sent("nord", one, 1.0, 1.0))


# ---- the merge -------------------------------------------------------------------------------------------------------


def test_merge_by_hand_names_who_is_missing(one: Path) -> None:
    with pytest.raises(RunFolderError, match="round 1: nothing has been sent by south; --without NAME"):
        merge(one)
    with pytest.raises(MergeError, match="1 of 2 tasks are left, and a merge needs at least two"):
        merge(one, ["south"])


def test_merge_by_hand_goes_on_without_a_task_and_takes_it_again_in_the_next_round(
    base_folder: Path, tmp_path: Path
) -> None:
    mapping = by_hand_mapping(base_folder)
    mapping["tasks"]["west"] = {"data": "elsewhere"}
    mapping["operator"]["gap"] = "relative"
    run = tmp_path / "run"
    start(recipe_from_mapping(mapping), run)
    for seed, name in enumerate(LOSSES):
        send(run, name, adapter(tmp_path / f"{name}_1", seed))
    found = merge(run, ["west"])
    assert found["weights"].keys() == LOSSES.keys()
    assert read_json(run / "round_001" / "DONE.json")["skipped"] == {"west": "round 1, task 'west': nothing was sent"}
    for seed, name in enumerate((*LOSSES, "west")):
        send(run, name, adapter(tmp_path / f"{name}_2", 10 + seed), (1.0, 0.5))
    with pytest.raises(MergeError, match="task 'west': it was not in round 1"):
        merge(run)
    add(run, Sent("west", tmp_path / "west_2", 1.0, 0.5, loss_pretrained=1.5), replace=True)
    found = merge(run)
    assert found["weights"].keys() == {"north", "south", "west"}
    # what they lack of what their experts gained
    gaps = [(1.0 - 0.5) / (pretrained - 0.5) for pretrained in (2.0, 1.5, 1.5)]
    shares = np.exp(np.array(gaps) / 2.0)
    assert list(found["weights"].values()) == pytest.approx((shares / shares.sum()).tolist())


def test_merge_by_hand_that_was_interrupted_is_made_anew_of_what_was_sent_since(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    send(one, "south", adapter(tmp_path / "south", 2))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError):
        patch.setattr("manyshot.by_hand_merge._card", lambda *args: (_ for _ in ()).throw(RuntimeError("cut")))
        merge(one)
    assert (one / "round_001" / "merge.json").exists()
    send(one, "south", adapter(tmp_path / "other", 3), replace=True)
    merge(one)
    vector = load_tensors(one / "round_001" / "task_vector.safetensors")
    weights = read_json(one / "round_001" / "loss_gap.json")["weights"]
    name = QUERY.format(0)
    sent = {"north": update_of(one / "round_001" / "north" / "adapter"), "south": update_of(tmp_path / "other")}
    wanted = sum(weights[task] * sent[task][name] for task in sent)
    torch.testing.assert_close(vector[name], wanted, rtol=1e-4, atol=1e-6)


def test_merge_by_hand_refuses_an_expert_that_was_changed_since(one: Path, tmp_path: Path) -> None:
    send(one, "south", adapter(tmp_path / "south", 2))
    shutil.copy(tmp_path / "south" / "adapter_model.safetensors", one / "round_001" / "north" / "adapter")
    with pytest.raises(RunFolderError, match=r"round_001/north/adapter/adapter_model\.safetensors was changed"):
        merge(one)


# ---- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": {"a": {"data": "elsewhere"}, "b": {"data": "owner/texts"}}}, "tasks.b.data: in rounds by hand"),
        ({"operator": {"name": "task_arithmetic", "scaling": "auto"}}, "operator.scaling: auto measures"),
        ({"merge": {"on_regression": "stop"}}, "merge.on_regression"),
        ({"merge": {"space": "factors"}}, "merge.space"),
    ],
)
def test_start_by_hand_refuses_what_needs_data(
    base_folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        start(recipe_from_mapping(by_hand_mapping(base_folder) | change), tmp_path / "run")


def test_start_by_hand_goes_on_with_the_same_recipe_only(one: Path, base_folder: Path, recipe: Recipe) -> None:
    assert start(recipe, one)["missing"] == ["south"]
    with pytest.raises(RunFolderError, match=r"the recipe differs from the run's: protocol\.rounds: 2 -> 3"):
        start(recipe_from_mapping(by_hand_mapping(base_folder), ["protocol.rounds=3"]), one)


def test_run_refuses_a_task_whose_data_is_elsewhere(recipe: Recipe) -> None:
    with pytest.raises(DataError, match=r"task 'north': its data is elsewhere.*manyshot round"):
        load_task(recipe, "north")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers for a property by its old name
def test_example_of_two_teams_gets_better_round_by_round(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """examples/any_trainer/team.py as each team, and what it prints as the options of `manyshot round add`."""
    run, before = tmp_path / "run", {}
    found = start(recipe, run)
    for name, task in (("north", "letters"), ("south", "numbers")):
        write_data(tmp_path, task)
        (tmp_path / f"{task}.train.jsonl").rename(tmp_path / f"{name}.train.jsonl")
        (tmp_path / f"{task}.validation.jsonl").rename(tmp_path / f"{name}.validation.jsonl")
    for round_index in (1, 2):
        for name in LOSSES:
            data = [str(tmp_path / f"{name}.{split}.jsonl") for split in ("train", "validation")]
            sent = tmp_path / f"{name}_{round_index}"
            monkeypatch.setattr(sys, "argv", ["team.py", found["model"], *data, str(sent), "6"])
            with preserved_random_state():
                runpy.run_path(str(TEAM), run_name="__main__")
            words = capsys.readouterr().out.split()
            told = dict(zip(words[::2], map(float, words[1::2]), strict=True))
            assert told["--loss-expert"] < told["--loss-merged"]
            if round_index == 2:
                assert told["--loss-merged"] < before[name]
            before[name] = told["--loss-merged"]
            send(run, name, sent, (told["--loss-merged"], told["--loss-expert"]))
        merge(run)
        found = round_status(run)
    assert found["finished"]


def test_round_commands_tell_people_and_programs(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from manyshot.cli import app

    runner = CliRunner()
    shown = runner.invoke(app, ["round", "status", str(one)])
    assert (shown.exit_code, "south: nothing yet (2 steps)" in shown.output) == (0, True)
    told = json.loads(runner.invoke(app, ["round", "status", str(one), "--json"]).output)
    assert told["missing"] == ["south"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("start", {"--json"}),
        ("add", {"--loss-merged", "--loss-expert", "--loss-pretrained", "--steps", "--replace", "--json"}),
        ("merge", {"--without", "--json"}),
        ("finish", {"--json"}),
        ("status", {"--json"}),
    ],
)
def test_help_of_every_round_command_lists_its_options(command: str, options: set[str]) -> None:
    from typer.testing import CliRunner

    from manyshot.cli import app

    shown = CliRunner().invoke(app, ["round", command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    found = {word.strip(",.;") for word in shown.output.split() if word.startswith("--")}
    assert found - {"--help"} == options
