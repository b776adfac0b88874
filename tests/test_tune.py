"""Whole searches on the tiny model: what they train and look at, what an interruption changes, what they leave."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import manyshot
from conftest import TASKS
from manyshot import local_update, tune_outputs, tuning
from manyshot.errors import MergeError, MissingExtraError, RunFolderError
from manyshot.inputs import Inputs
from manyshot.manifest import MANIFEST
from manyshot.progress import Event
from manyshot.recipe_file import load_recipe, tune_recipe_from_mapping
from manyshot.rundir import read_json, read_lines, remove
from manyshot.runner import run
from manyshot.steps import Run
from manyshot.tune_plan import plan_tune
from manyshot.tune_recipe import TuneRecipe
from manyshot.tuning import TuneResult, tune
from run_helpers import contents, phases, small_mapping, unlike, write_data

Json = dict[str, Any]
PAIR = TASKS[:2]
# what an interruption must not change
KEPT = ("tune.json", "best.yaml", "report.md", "trials/trials_1.csv")


@pytest.fixture(scope="module")
def raw(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    data = tmp_path_factory.mktemp("data")
    for task in PAIR:
        write_data(data, task)
    return small_mapping(base_folder, data, PAIR)


@pytest.fixture(scope="module", autouse=True)
def _no_figures() -> Any:
    """Drawing takes longer than searching; one test draws."""

    def missing() -> None:
        raise MissingExtraError("figures are not drawn here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tune_outputs, "require_matplotlib", missing)
        yield


def make(raw: Json, parameters: Json, *overrides: str, **search: Any) -> TuneRecipe:
    return tune_recipe_from_mapping(copy.deepcopy(raw) | {"search": {"parameters": parameters} | search}, overrides)


def trained(folder: Path) -> list[tuple[int, str]]:
    return phases(folder, "local_update")


def settings_of(result: TuneResult, search: int = 0) -> list[Json]:
    return [trial["settings"] for trial in result.results["searches"][search]["trials"]]


SPACE: Json = {"operator.temperature": {"low": 0.05, "high": 5.0, "log": True}, "operator.mask": [True, False]}


@pytest.fixture(scope="module")
def once(raw: Json, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """One merge of the experts, five trials."""
    recipe = make(raw, SPACE, "evaluation.experts=true", trials=5)
    return tune(recipe, tmp_path_factory.mktemp("once") / "search")


def test_experts_are_trained_once_and_the_recipes_own_settings_come_first(once: TuneResult) -> None:
    assert trained(once.folder) == [(1, task) for task in PAIR]
    (search,) = once.results["searches"]
    assert search["ended_by"] == "trials"
    assert len(search["trials"]) == 5
    assert search["own"] == 0
    assert settings_of(once)[0] == {"operator.temperature": 2.0, "operator.mask": True}
    values = [trial["value"] for trial in search["trials"]]
    assert search["chosen"] == values.index(min(values))
    for trial in search["trials"]:
        assert trial["multi_task_loss"] == pytest.approx(sum(trial["losses"].values()) / 2)


def test_a_trial_leaves_what_was_measured_and_no_model(once: TuneResult) -> None:
    kinds = {file.suffix for file in (once.folder / "trials").rglob("*") if file.is_file()}
    assert kinds == {".json", ".csv"}  # merges write no metrics of their own


def test_the_best_recipe_is_a_run_that_goes_on_with_what_was_trained(once: TuneResult, tmp_path: Path) -> None:
    recipe = load_recipe(once.best)
    assert recipe.protocol.rounds == 1
    assert recipe.evaluation.experts
    alone = run(recipe, tmp_path / "alone")
    best = once.results["best"]
    assert {task: found["loss"] for task, found in alone.scores["rounds"]["1"]["losses"].items()} == (
        best["trial"]["losses"]
    )
    # on a copy, so that other tests find the search as it was left
    shutil.copytree(once.folder / "run", tmp_path / "run", symlinks=True)
    run(recipe, tmp_path / "run", resume=True)
    assert trained(tmp_path / "run") == []
    assert unlike(tmp_path / "run", alone.folder) == []


def interrupted(recipe: TuneRecipe, folder: Path, after: Callable[[str], bool]) -> TuneResult:
    """A search that is stopped at the first message that fits, and gone on with."""

    def stop(event: Event) -> None:
        if event.kind == "message" and after(event.text):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(recipe, folder, listener=stop)
    return tune(recipe, folder, resume=True)


@pytest.mark.parametrize("text", ["trial 2 of 5", "is the best of"])
def test_an_interrupted_search_ends_as_an_unbroken_one(raw: Json, once: TuneResult, tmp_path: Path, text: str) -> None:
    recipe = make(raw, SPACE, "evaluation.experts=true", trials=5)
    found = interrupted(recipe, tmp_path / "search", lambda message: text in message)
    for name in KEPT:
        assert (found.folder / name).read_bytes() == (once.folder / name).read_bytes(), name
    assert unlike(found.folder / "run", once.folder / "run") == []
    assert trained(found.folder) == [(1, task) for task in PAIR]


def test_a_search_that_is_over_is_read_back(raw: Json, once: TuneResult) -> None:
    before = contents(once.folder)
    again = tune(make(raw, SPACE, "evaluation.experts=true", trials=5), once.folder, resume=True)
    assert again.results == once.results
    assert contents(once.folder) == before


def test_no_test_split_is_looked_at(raw: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = copy.deepcopy(raw)
    for task in PAIR:
        write_data(tmp_path / "data", task)
        own["tasks"][task] |= {split: str(tmp_path / "data" / f"{task}.{split}.jsonl") for split in ("train", "test")}
    seen: list[str] = []
    runs: list[Run] = []
    check, encode, alone = tuning.check_inputs, local_update.encode_held_out, tuning.all_steps_alone

    def check_then_poison(recipe: Any) -> Inputs:
        found = check(recipe)
        for task in PAIR:
            Path(own["tasks"][task]["test"]).unlink()
        return found

    def watched(task: Any, tokenizer: Any, recipe: Any, split: Any = "validation") -> Any:
        seen.append(split)
        return encode(task, tokenizer, recipe, split)

    def noted(current: Run) -> Any:
        runs.append(current)
        return alone(current)

    monkeypatch.setattr(tuning, "check_inputs", check_then_poison)
    monkeypatch.setattr(local_update, "encode_held_out", watched)
    monkeypatch.setattr(tuning, "all_steps_alone", noted)
    for rounds in ("each", "all"):
        for task in PAIR:
            write_data(tmp_path / "data", task)
        recipe = make(own, {"operator.temperature": [0.5, 2.0]}, rounds=rounds, sampler="grid", objective="share")
        result = tune(recipe, tmp_path / rounds)
        names = {file.name for file in result.folder.rglob("*")}
        assert not names & {"outputs.json", "scores.json"} - ({"scores.json"} if rounds == "all" else set())
    assert set(seen) == {"validation"}
    assert all(task.test == () and task.train for current in runs for task in current.tasks)


# ---- rounds ----------------------------------------------------------------------------------------------------------


def each_recipe(raw: Json) -> TuneRecipe:
    parameters = {"operator.temperature": [0.05, 5.0]}
    return make(raw, parameters, rounds="each", sampler="grid", objective="worst_share")


@pytest.fixture(scope="module")
def each(raw: Json, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    """Both rounds, one after the other, judged by the worst task's share."""
    return tune(each_recipe(raw), tmp_path_factory.mktemp("each") / "search")


def test_rounds_are_searched_in_turn_and_the_next_one_trains_from_the_best(
    raw: Json, each: TuneResult, tmp_path: Path
) -> None:
    first, second = each.results["searches"]
    assert (first["round"], second["round"]) == (1, 2)
    chosen = [one["trials"][one["chosen"]] for one in (first, second)]
    recipe = load_recipe(each.best)
    temperatures = tuple(trial["settings"]["operator.temperature"] for trial in chosen)
    assert recipe.method.temperature == temperatures
    # experts, then both rounds; each once
    assert trained(each.folder) == [(1, task) for task in PAIR] * 2 + [(2, task) for task in PAIR]
    alone = run(recipe, tmp_path / "alone")
    for index, trial in enumerate(chosen, start=1):
        losses = alone.scores["rounds"][str(index)]["losses"]
        assert {task: found["loss"] for task, found in losses.items()} == trial["losses"]
    steps = sum(read_json(file)["steps"] for file in (each.folder / "run").rglob("local_update.json"))
    assert steps == sum(plan_tune(each_recipe(raw))["steps"].values()) == 8 + 4 + 4


def test_an_interrupted_search_of_rounds_ends_as_an_unbroken_one(raw: Json, each: TuneResult, tmp_path: Path) -> None:
    found = interrupted(each_recipe(raw), tmp_path / "search", lambda message: "round 2, trial 1" in message)
    assert found.results == each.results
    assert found.best.read_bytes() == each.best.read_bytes()
    assert unlike(found.folder / "run", each.folder / "run") == []
    assert trained(found.folder) == trained(each.folder)


def test_files_of_a_search_that_were_changed_are_named_and_repaired(
    raw: Json, each: TuneResult, tmp_path: Path
) -> None:
    folder = tmp_path / "search"
    shutil.copytree(each.folder, folder, symlinks=True)
    assert not list((folder / "trials").rglob(MANIFEST))  # nothing of a trial that is over is gone on with
    damaged = (f"round_001/{PAIR[0]}/adapter/adapter_model.safetensors", "round_001/task_vector.safetensors")
    for name in damaged:
        file = folder / "run" / name
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    (folder / "run" / "round_000" / "losses.json").unlink()
    with pytest.raises(RunFolderError) as caught:
        tune(each_recipe(raw), folder, resume=True)
    for text in (*(f"run/{name} was changed" for name in damaged), "run/round_000/losses.json is gone"):
        assert text in str(caught.value)
    steps = f"run/round_000: losses, run/round_001/{PAIR[0]}: local update, run/round_001: merge"
    assert f"--resume --repair, which redoes just: {steps}" in str(caught.value)
    found = tune(each_recipe(raw), folder, repair=True)
    assert found.results == each.results
    assert unlike(folder / "run", each.folder / "run") == []
    assert trained(folder)[len(trained(each.folder)) :] == [(1, PAIR[0])]
    tune(each_recipe(raw), folder, resume=True)


def test_the_objective_is_the_share_of_the_experts_gain_that_is_kept(each: TuneResult) -> None:
    results = each.results
    for search in results["searches"]:
        for trial in search["trials"]:
            shares = {
                task: (results["pretrained_losses"][task] - trial["losses"][task])
                / (results["pretrained_losses"][task] - results["expert_losses"][task])
                for task in PAIR
            }
            assert trial["shares"] == pytest.approx(shares)
            assert trial["value"] == min(trial["shares"].values())
        values = [trial["value"] for trial in search["trials"]]
        assert search["chosen"] == values.index(max(values))


def test_a_search_of_the_first_round_leaves_the_other_rounds_to_the_run(raw: Json, tmp_path: Path) -> None:
    recipe = make(raw, {"operator.temperature": [0.05, 2.0, 5.0]}, rounds="first", sampler="random", trials=2)
    result = tune(recipe, tmp_path / "search")
    assert trained(result.folder) == [(1, task) for task in PAIR]
    assert settings_of(result)[0] == {"operator.temperature": 2.0}
    best = load_recipe(result.best)
    assert best.protocol.rounds == 2
    done = run(best, tmp_path / "search" / "run", resume=True)
    assert trained(done.folder) == [(2, task) for task in PAIR]
    losses = done.scores["rounds"]["1"]["losses"]
    assert {task: found["loss"] for task, found in losses.items()} == result.results["best"]["trial"]["losses"]
    left = contents(done.folder)
    tune(recipe, tmp_path / "search", resume=True)
    run(best, tmp_path / "search" / "run", resume=True)  # and finds everything as it was left
    assert contents(done.folder) == left


def test_a_search_of_whole_runs_shares_round_1_and_finds_what_the_runs_find(
    raw: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(raw, {"operator.scaling": [0.5, 1.0]}, rounds="all", sampler="grid")

    def killed(path: Path) -> None:
        """In the middle of what is removed of the first trial when it is over."""
        if not path.is_dir():
            return remove(path)
        (path / "losses.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuning, "remove", killed)
        tune(recipe, tmp_path / "search")
    result = tune(recipe, tmp_path / "search", resume=True)
    assert not list((result.folder / "trials").rglob("*.safetensors"))
    records = [read_lines(file) for file in result.folder.rglob("metrics.jsonl")]
    done = [line for lines in records for line in lines if line["kind"] == "phase"]
    assert sorted(line["round"] for line in done if line["phase"] == "local_update") == [1, 1, 2, 2, 2, 2]
    (search,) = result.results["searches"]
    assert search["round"] == 0
    best = run(load_recipe(result.best), tmp_path / "alone")
    losses = best.scores["rounds"]["2"]["losses"]
    assert {task: found["loss"] for task, found in losses.items()} == result.results["best"]["trial"]["losses"]
    assert best.scores["rounds"]["2"]["multi_task_loss"] == result.results["best"]["trial"]["value"]


# ---- budgets, failures, folders --------------------------------------------------------------------------------------


def test_local_updates_of_another_run_are_not_trained_again(raw: Json, once: TuneResult, tmp_path: Path) -> None:
    recipe = make(raw, {"operator.scaling": [0.5, 1.5]}, trials=1, reuse=str(once.folder / "run"))
    result = tune(recipe, tmp_path / "search")
    assert trained(result.folder) == []
    other = make(raw, {"operator.scaling": [0.5, 1.5]}, "seed=1", trials=1, reuse=str(once.folder / "run"))
    assert trained(tune(other, tmp_path / "other").folder) == [(1, task) for task in PAIR]
    nothing = make(raw, {"operator.scaling": [0.5]}, trials=1, reuse=str(tmp_path))
    (tmp_path / "search").rename(tmp_path.parent / f"{tmp_path.name}_search")
    (tmp_path / "other").rename(tmp_path.parent / f"{tmp_path.name}_other")
    with pytest.raises(RunFolderError, match=r"search\.reuse: .* is no folder of a run or comparison"):
        tune(nothing, tmp_path / "third")


def test_settings_that_cannot_be_merged_are_a_failed_trial_and_alone_an_error(
    raw: Json, once: TuneResult, tmp_path: Path
) -> None:
    reuse = str(once.folder / "run")
    parameters = {"operator.mask_threshold": [1e9, 0.3]}
    result = tune(make(raw, parameters, sampler="grid", reuse=reuse), tmp_path / "search")
    own, failed = result.results["searches"][0]["trials"]
    assert "keeps no coordinate" in failed["error"]
    assert (own["error"], failed["value"], result.results["searches"][0]["chosen"]) == (None, None, 0)
    assert "failed: the operator's mask keeps no coordinate" in (result.folder / "report.md").read_text("utf-8")
    with pytest.raises(MergeError, match=r"none of 1 settings could be merged; the first: the operator's mask"):
        tune(make(raw, {"operator.mask_threshold": [1e9]}, sampler="grid", reuse=reuse), tmp_path / "none")


def test_time_ends_a_search_after_its_first_trial_at_the_earliest(raw: Json, once: TuneResult, tmp_path: Path) -> None:
    recipe = make(raw, {"operator.scaling": [0.5, 1.5]}, seconds=1e-6, reuse=str(once.folder / "run"))
    result = tune(recipe, tmp_path / "search")
    (search,) = result.results["searches"]
    assert (len(search["trials"]), search["ended_by"], search["own"]) == (1, "seconds", None)
    assert "own settings are not among those" in (result.folder / "report.md").read_text("utf-8")


def test_settings_that_were_tried_are_not_merged_again(raw: Json, once: TuneResult, tmp_path: Path) -> None:
    recipe = make(raw, {"operator.mask": [True]}, trials=3, reuse=str(once.folder / "run"))
    result = tune(recipe, tmp_path / "search")
    assert len({json.dumps(trial["losses"]) for trial in result.results["searches"][0]["trials"]}) == 1
    # the trial, and the merge that is gone on with
    assert len(phases(result.folder, "merge")) == 2


def test_a_folder_with_something_in_it_is_refused(raw: Json, once: TuneResult, tmp_path: Path) -> None:
    recipe = make(raw, SPACE, "evaluation.experts=true", trials=5)
    with pytest.raises(RunFolderError, match="is not empty; --resume goes on with the search in it"):
        tune(recipe, once.folder)
    with pytest.raises(RunFolderError, match=r"the recipe differs from the search's: search.trials: 5 -> 6"):
        tune(make(raw, SPACE, "evaluation.experts=true", trials=6), once.folder, resume=True)
    (tmp_path / "tune.yaml").write_text("{}", "utf-8")
    for how in ("resume", "force"):
        with pytest.raises(RunFolderError, match=r"this folder holds no tune.yaml and environment.json of one"):
            tune(recipe, tmp_path, **{how: True})


def test_data_that_changed_since_a_search_began_is_refused(raw: Json, tmp_path: Path) -> None:
    own = copy.deepcopy(raw)
    for task in PAIR:
        write_data(tmp_path / "data", task)
        own["tasks"][task]["validation"] = str(tmp_path / "data" / f"{task}.validation.jsonl")
    recipe = make(own, {"operator.scaling": [0.5, 1.5]}, trials=2)

    def stop(event: Event) -> None:
        if event.kind == "message" and "trial 1" in event.text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(recipe, tmp_path / "search", listener=stop)
    lines = Path(own["tasks"][PAIR[0]]["validation"]).read_text("utf-8").splitlines()
    Path(own["tasks"][PAIR[0]]["validation"]).write_text("\n".join(reversed(lines)) + "\n", "utf-8")
    with pytest.raises(RunFolderError, match=rf"tasks.{PAIR[0]} changed since the search began"):
        tune(recipe, tmp_path / "search", resume=True)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_report_shows_every_trial_and_what_was_chosen(once: TuneResult) -> None:
    text = (once.folder / "report.md").read_text("utf-8")
    best = once.results["best"]
    assert f"- Best: {best['trial']['value']:.4f} with operator.temperature" in text
    assert text.count("\n| ") == 2 + 5  # header, alignment, trials
    assert "the test splits were not looked at" in text
    assert "There are no figures" in text
    rows = (once.folder / "trials" / "trials_1.csv").read_text("utf-8").splitlines()
    assert rows[0] == f"trial,operator.temperature,operator.mask,multi_task_loss,{','.join(PAIR)},note"
    assert rows[1].endswith((",chosen", ',"chosen, the recipe\'s own settings"'))
    assert repr(best["trial"]["settings"]["operator.temperature"]) in rows[1]


def test_a_figure_has_a_panel_for_every_setting(each: TuneResult, tmp_path: Path) -> None:
    from manyshot.tune_figures import write_figures

    results = copy.deepcopy(each.results)
    trials = results["searches"][0]["trials"]
    for trial, scaling in zip(trials, (0.5, 2.0), strict=True):
        trial["settings"]["operator.scaling"] = scaling
    failed = copy.deepcopy(trials[0]) | {"value": None, "error": "failed", "number": 2}
    trials.append(failed)
    results["parameters"]["operator.scaling"] = {"low": 0.1, "high": 3.0, "log": True, "step": None}
    results["searches"] = results["searches"][:1]
    written = write_figures(results, tmp_path)
    assert [file.name for file in written[1]] == ["sensitivity_1.png", "sensitivity_1.svg"]
    assert all(file.stat().st_size > 5000 for file in written[1])


def test_tune_is_there_from_python(raw: Json, once: TuneResult, tmp_path: Path) -> None:
    search = {"parameters": {"operator.scaling": [1.0]}, "trials": 1, "reuse": str(once.folder / "run")}
    result = manyshot.tune(copy.deepcopy(raw) | {"search": search}, tmp_path / "search")
    assert isinstance(result, manyshot.TuneResult)
    assert result.results["best"]["settings"] == {"operator.scaling": 1.0}
