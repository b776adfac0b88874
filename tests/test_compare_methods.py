"""Methods of a comparison that train, merge or go in rounds in their own way: refused by key, shared by content."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import yaml

from conftest import TASKS
from manyshot import compare_jobs
from manyshot.compare_folder import CompareFolder, claim
from manyshot.compare_gain import shares
from manyshot.compare_methods import SECTIONS
from manyshot.compare_plan import count_steps, plan_compare
from manyshot.compare_recipe import CompareRecipe, choose
from manyshot.comparison import CompareResult, compare
from manyshot.content import keyed
from manyshot.errors import DataError, ModelError, RecipeError, RunFolderError
from manyshot.local_update import LocalUpdateJob, run_local_update
from manyshot.recipe_file import compare_recipe_from_mapping, load_compare_recipe, to_yaml
from manyshot.rundir import read_json
from run_helpers import small_mapping, write_data

pytestmark = pytest.mark.usefixtures("no_figures")

Json = dict[str, Any]
RAW: Json = {
    "models": {"tiny": "some/model"},
    "tasks": {name: {"data": f"owner/{name}"} for name in "abc"},
    "seeds": [0, 1],
    "protocol": {"rounds": 2, "local_steps": 4},
    "local_update": {"learning_rate": 0.001, "batch_size": 4},
    "methods": {"mean": {"operator": "mean"}},
}


def recipe_with(**method: Any) -> CompareRecipe:
    return compare_recipe_from_mapping(RAW | {"methods": RAW["methods"] | {"own": method}})


# ---- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ({"operator": "mean", "local_update": {"rate": 1}}, "local_update.rate: unknown key"),
        ({"operator": "mean", "local_update": {"rank": 0}}, "local_update.rank: Input should be greater than or equal"),
        ({"operator": "mean", "local_update": {"micro_batch_size": 3}}, "local_update: batch_size 4 is not a multiple"),
        ({"operator": "mean", "protocol": {"rounds": 9}}, "protocol: local_steps is 4 for 9 rounds"),
        ({"operator": "mean", "protocol": {"local_steps": 8}}, "protocol.local_steps: is the same for all methods"),
        ({"operator": "mean", "local_update": {"max_length": 9}}, "local_update.max_length: decides how models are me"),
        ({"operator": "mean", "local_update": {"dtype": "bfloat16"}}, "local_update.dtype: decides how models are"),
        ({"operator": "mean", "protocols": ["post_hoc"], "protocol": {"rounds": 3}}, "protocol: has no effect on post"),
        ({"joint": True, "merge": {"reference": "start"}}, "merge: has no effect on joint fine-tuning"),
        ({"joint": True, "grid": {"local_update.rank": [1, 2]}}, "grid: needs an operator"),
        ({"operator": "mean", "grid": {"merge.outer_momentum": [2]}}, "grid.merge.outer_momentum: Input should be les"),
        ({"operator": "mean", "grid": {"merge.momentum": [0.1]}}, "grid.merge.momentum: unknown key"),
        ({"operator": "mean", "grid": {"evaluation.x": [1]}}, "grid.evaluation.x: there is no section 'evaluation'"),
        ({"operator": "mean", "grid": {"protocol.rounds": [2, 5]}}, "grid.protocol.rounds: local_steps is 4 for 5"),
        ({"operator": "mean", "grid": {"merge.outer_momentum": [0.5]}}, "grid.merge.outer_momentum: is part of the ou"),
        ({"operator": "mean", "grid": {"local_update.max_length": [9]}}, "grid.local_update.max_length: decides how"),
        ({"ablation_of": "mean", "set": {"merge.outer_momentum": 0.5}}, "set.merge.outer_momentum: is part of the"),
    ],
)
def test_a_methods_own_settings_are_refused_by_their_line(method: Json, problem: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(RAW | {"methods": RAW["methods"] | {"own": method}}, sort_keys=False), "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_compare_recipe(file)
    (line,) = str(caught.value).splitlines()
    place, text = line.split(": ", 1)
    assert text.startswith(f"methods.own.{problem}")
    named = file.read_text("utf-8").splitlines()[int(place.rsplit(":", 1)[1]) - 1]
    assert named.strip().split(":")[0] in text


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"baseline": "x"}, "baseline: must name a method with many_shot: mean"),
        ({"tuning": {"choose_by": "loss"}}, "tuning.choose_by: Input should be 'multi_task_loss', 'share' or"),
        ({"task_sets": {"two": {"tasks": ["a", "b"], "against": "x"}}}, "task_sets.two.against: there is no 'x'"),
        (
            {
                "task_sets": {
                    "two": {"tasks": ["a", "b"]},
                    "more": {"tasks": ["a", "c"], "seeds": [5], "against": "two"},
                }
            },
            "task_sets.more.against: 'two' has no seed in common with it",
        ),
    ],
)
def test_what_shares_are_held_against_is_checked(change: Json, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compare_recipe_from_mapping(RAW | change)
    assert str(caught.value).startswith(f"compare: {problem}")


def test_a_section_of_a_method_has_the_recipes_keys_for_the_rest() -> None:
    recipe = recipe_with(operator="mean", local_update={"adapter_start": "averaged"}, protocol={"rounds": 4})
    own, shared = recipe.own("own"), recipe.shared
    assert own.differences(shared) == {"local_update.adapter_start": "averaged", "protocol.rounds": 4}
    assert (own.local_update.learning_rate, own.protocol.local_steps) == (0.001, 4)
    assert recipe.own("mean") == shared


def test_an_error_in_a_section_for_all_is_told_once() -> None:
    raw = RAW | {"local_update": {"learning_rate": -1}, "methods": {"mean": {"operator": "mean", "local_update": {}}}}
    with pytest.raises(RecipeError) as caught:
        compare_recipe_from_mapping(raw)
    assert str(caught.value) == "compare: local_update.learning_rate: Input should be greater than 0, found -1"


def test_an_ablation_has_the_sections_of_the_method_and_changes_what_it_sets() -> None:
    full = {"operator": "mean", "merge": {"reference": "start"}, "grid": {"merge.outer_momentum": [0.5, 0.7]}}
    part = {"ablation_of": "own", "set": {"merge.outer_momentum": 0.0}}
    recipe = compare_recipe_from_mapping(RAW | {"methods": {"part": part, "own": full}})
    assert [one.merge.outer_momentum for one in recipe.candidates("own")] == [0.5, 0.7]
    ablated = recipe.ablated("part", recipe.candidates("own")[1])
    assert (ablated.merge.reference, ablated.merge.outer_momentum) == ("start", 0.0)
    with pytest.raises(RecipeError, match=r"methods\.part\.merge: 'own' chooses merge\.outer_momentum by its grid"):
        compare_recipe_from_mapping(RAW | {"methods": {"part": part | {"merge": {"space": "weights"}}, "own": full}})


def test_choose_leaves_everything_else_as_it_is() -> None:
    shared = recipe_with(operator="mean").shared
    chosen = choose(shared, {"local_update.rank": 4, "merge.reference": "start"})
    assert chosen.differences(shared) == {"local_update.rank": 4, "merge.reference": "start"}
    assert chosen.operator == shared.operator


def test_a_recipe_with_own_sections_survives_its_own_yaml(tmp_path: Path) -> None:
    recipe = recipe_with(
        operator="mean", merge={"reference": "start"}, local_update={"rank": 2}, grid={"merge.outer_momentum": [0.1]}
    )
    (tmp_path / "again.yaml").write_text(to_yaml(recipe), "utf-8")
    assert load_compare_recipe(tmp_path / "again.yaml") == recipe


def test_the_methods_in_the_docs_load_and_mean_what_they_say() -> None:
    page = (Path(__file__).parents[1] / "docs" / "compare.md").read_text("utf-8")
    (block,) = [one for one in re.findall(r"```yaml\n(.*?)```", page, re.S) if one.startswith("methods:")]
    recipe = compare_recipe_from_mapping(RAW | {"protocol": {"rounds": 2, "local_steps": 10}} | yaml.safe_load(block))
    assert len(recipe.candidates("outer")) == 4
    assert recipe.own("ten").protocol.rounds == 10
    plain = recipe.ablated("no_outer", recipe.candidates("outer")[3])
    assert plain.differences(recipe.shared) == {"merge.reference": "start"}


def test_a_comparison_that_an_older_version_began_is_gone_on_with(tmp_path: Path) -> None:
    recipe = recipe_with(operator="metis", merge={"reference": "start"}, local_update={"rank": 2})
    old = yaml.safe_load(to_yaml(recipe))
    for section in (*SECTIONS, "evaluation"):
        old[section] = keyed(section, old[section])
    old["tasks"] = {name: keyed("tasks", spec) for name, spec in old["tasks"].items()}
    for method in old["methods"].values():
        for part in ("operator", *SECTIONS):
            method[part] = method[part] and keyed(part, method[part])
    del old["baseline"], old["tuning"]["choose_by"]
    folder = CompareFolder(tmp_path)
    folder.recipe.write_text(yaml.safe_dump(old), "utf-8")
    folder.environment.write_text("{}", "utf-8")
    claim(folder, recipe, resume=True, extend=False, force=False)
    # a new default is no reason to go on in another way: what was not said then is what was done then
    changed = recipe.model_copy(update={"merge": recipe.merge.model_copy(update={"search_objective": "worst"})})
    with pytest.raises(RunFolderError, match=r"merge\.search_objective: average -> worst; use --extend"):
        claim(folder, changed, resume=True, extend=False, force=False)


def test_a_plan_counts_updates_by_how_they_are_trained() -> None:
    def parts(**method: Any) -> Json:
        found: Json = count_steps(recipe_with(**method))["by_part"]
        return found

    # per seed 3 tasks: experts 3 × 4, first round 3 × 2, later rounds 3 × 2 for each of the two methods
    assert parts(operator="ties") == {"experts": 24, "first_rounds": 12, "later_rounds": 24, "joint": 0}
    # other adapters are other experts and other first rounds; where they only merge in rounds, no other experts
    own = {"operator": "mean", "local_update": {"rank": 2}}
    assert parts(**own) == {"experts": 48, "first_rounds": 24, "later_rounds": 24, "joint": 0}
    assert parts(**own, protocols=["many_shot"]) == {"experts": 24, "first_rounds": 24, "later_rounds": 24, "joint": 0}
    # four rounds: a first round of one step, and three steps after it
    four = parts(operator="mean", protocol={"rounds": 4}, protocols=["many_shot"])
    assert four == {"experts": 24, "first_rounds": 12 + 6, "later_rounds": 12 + 18, "joint": 0}
    # momentum is no matter of local updates: both candidates begin with what all begin with
    grid = {"operator": "mean", "merge": {"reference": "start"}, "grid": {"merge.outer_momentum": [0.1, 0.5]}}
    assert parts(**grid, protocols=["many_shot"]) == {
        **{"experts": 24, "first_rounds": 12, "joint": 0},
        "later_rounds": 12 + 2 * 6 + 6,  # two candidates on the first seed, the chosen one on the second
    }


def test_a_plan_counts_the_examples_of_other_batches() -> None:
    recipe = recipe_with(operator="mean", local_update={"batch_size": 8}, protocols=["many_shot"])
    # experts 24 steps, mean in rounds 24 steps of 4; the method of its own 24 steps of 8
    assert plan_compare(recipe)["train_examples"] == 48 * 4 + 24 * 8


def test_a_plan_counts_a_task_that_takes_part_of_the_steps() -> None:
    tasks = RAW["tasks"] | {"a": {"data": "owner/a", "steps_share": 0.5}}
    parts = count_steps(compare_recipe_from_mapping(RAW | {"tasks": tasks}))["by_part"]
    assert parts == {"experts": 2 * (4 + 4 + 2), "first_rounds": 2 * (2 + 2 + 1), "later_rounds": 2 * 5, "joint": 0}


# ---- a comparison ----------------------------------------------------------------------------------------------------

PAIR = TASKS[:2]
METHODS: Json = {
    "mean": {"operator": "mean"},
    "fast": {"operator": "mean", "local_update": {"learning_rate": 0.05}, "protocols": ["post_hoc"]},
    "fine": {"operator": "mean", "protocol": {"rounds": 4}, "protocols": ["many_shot"]},
    "momentum": {
        "operator": "mean",
        "merge": {"reference": "start", "outer_momentum": 0.6},
        "grid": {"local_update.learning_rate": [0.01, 0.05]},
        "protocols": ["many_shot"],
    },
    "plain": {"ablation_of": "momentum", "set": {"merge.outer_momentum": 0.0}, "protocols": ["many_shot"]},
    "joint": {"joint": True},
}


@pytest.fixture(scope="module")
def raw(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    data = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_data(data, task)
    small = small_mapping(base_folder, data)
    shared = {key: small[key] for key in ("protocol", "local_update", "evaluation")}
    shared["evaluation"].pop("experts")
    tasks = {name: small["tasks"][name] for name in PAIR}
    tasks["noise"] = {"train": {"data": tasks["letters"]["train"], "shuffle_completions": True}}
    sets = {"pair": {"tasks": list(PAIR)}, "noisy": {"tasks": [*PAIR, "noise"], "against": "pair"}}
    own = {"models": {"tiny": str(base_folder)}, "seeds": [0], "tasks": tasks, "task_sets": sets, "methods": METHODS}
    for name in ("fast", "fine", "momentum", "plain", "joint"):
        own["methods"] = own["methods"] | {name: METHODS[name] | {"task_sets": ["pair"]}}
    return own | shared | {"tuning": {"choose_by": "worst_share"}}


def make(raw: Json, **changes: Any) -> CompareRecipe:
    return compare_recipe_from_mapping(copy.deepcopy(raw) | copy.deepcopy(changes))


@pytest.fixture(scope="module")
def done(raw: Json, tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    return compare(make(raw), tmp_path_factory.mktemp("compare") / "done")


def cell_of(results: Json, method: str, protocol: str, task_set: str = "pair") -> Json:
    wanted = (method, protocol, task_set)
    (found,) = [one for one in results["cells"] if (one["method"], one["protocol"], one["task_set"]) == wanted]
    assert found["status"] == "done", found
    return dict(found)


def test_methods_share_what_they_train_alike_and_nothing_else(raw: Json, done: CompareResult) -> None:
    shared = [read_json(file)["steps"] for file in (done.folder / "updates").glob("*/local_update.json")]
    trials = [(file, read_json(file)) for file in (done.folder / "trials").rglob("local_update.json")]
    own = [record["steps"] for file, record in trials if record["round"] > 1 or file.parent.name == "joint"]
    steps = done.results["steps"]
    assert sum(shared) + sum(own) == steps["shared"] == count_steps(make(raw))["shared"]
    # at rate 0.01 three experts and first rounds, at 0.05 two of each; first rounds of one step
    assert steps["by_part"]["experts"] == 3 * 4 + 2 * 4
    assert steps["by_part"]["first_rounds"] == 3 * 2 + 2 * 2 + 2 * 1
    assert len(shared) == 3 + 3 + 2 + 2 + 2


def test_all_methods_are_divided_by_the_experts_that_are_trained_as_the_recipe_says(done: CompareResult) -> None:
    (reference,) = [one for one in done.results["references"] if one["task_set"] == "pair"]
    before, best = (reference[key]["losses"] for key in ("pretrained", "experts"))
    for one in done.results["cells"]:
        if one["task_set"] == "pair":
            assert one["share"] == shares(before, one["losses"], best)
    fast, mean = (cell_of(done.results, method, "post_hoc") for method in ("fast", "mean"))
    assert fast["losses"] != mean["losses"]
    joint = cell_of(done.results, "joint", "joint")
    assert fast["share_of_joint"] == shares(before, fast["losses"], joint["losses"])
    assert set(joint["share_of_joint"]["tasks"].values()) <= {1.0, None}


def test_example_losses_have_the_test_loss_as_their_mean(done: CompareResult) -> None:
    for one in done.results["cells"]:
        for task, losses in one["example_losses"].items():
            assert len(losses) == len(one["example_scores"][task])
            assert fmean(losses) == pytest.approx(one["losses"][task])


def test_more_rounds_take_the_same_steps(done: CompareResult) -> None:
    fine, mean = (cell_of(done.results, method, "many_shot") for method in ("fine", "mean"))
    assert [len(one["rounds"]) for one in (fine, mean)] == [4, 2]
    assert fine["train_steps"] == mean["train_steps"] == 8
    assert fine["settings"] == {"protocol.rounds": 4}


def test_candidates_are_chosen_by_the_worst_tasks_share_on_validation(done: CompareResult) -> None:
    (tuning,) = done.results["tuning"]
    worst = [one["worst_validation_share"] for one in tuning["candidates"]]
    assert tuning["choose_by"] == "worst_share"
    assert tuning["chosen"] == worst.index(max(worst))
    assert [one["settings"]["local_update.learning_rate"] for one in tuning["candidates"]] == [0.01, 0.05]
    chosen = cell_of(done.results, "momentum", "many_shot")
    assert chosen["settings"] == tuning["candidates"][tuning["chosen"]]["settings"]
    # by hand: validation losses of the pretrained model, the experts and the chosen candidate
    (reference,) = [one for one in done.results["references"] if one["task_set"] == "pair"]
    before = reference["pretrained"]["validation_losses"]
    updates = (read_json(file) for file in (done.folder / "updates").glob("*/local_update.json"))
    shared = [one for one in updates if one["steps"] == 4 and one["task"] in PAIR]
    after = chosen["rounds"][-1]["validation_losses"]
    possible = [
        min((before[task] - after[task]) / (before[task] - expert[task]) for task in PAIR)
        for letters in shared
        for numbers in shared
        if (letters["task"], numbers["task"]) == PAIR
        for expert in [{one["task"]: one["validation"]["loss"] for one in (letters, numbers)}]
    ]
    assert any(max(worst) == pytest.approx(one) for one in possible)


def test_an_ablation_takes_back_one_setting_of_what_was_chosen(done: CompareResult) -> None:
    full, part = (cell_of(done.results, name, "many_shot")["settings"] for name in ("momentum", "plain"))
    assert full["merge.outer_momentum"] == 0.6
    assert {key: value for key, value in full.items() if key != "merge.outer_momentum"} == part


def test_reports_show_shares_and_what_noise_costs(done: CompareResult) -> None:
    names = {file.name for file in done.files}
    assert {"share_kept.md", "per_task_shares.md", "bad_tasks.md"} <= names
    text = (done.folder / "tables" / "bad_tasks.md").read_text("utf-8")
    assert "noisy: pair with noise" in text
    assert "Share of the gain kept" in (done.folder / "report.md").read_text("utf-8")


def test_a_local_update_that_fails_takes_its_own_cells_with_it(
    raw: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(job: LocalUpdateJob, progress: Any) -> Json:
        if job.recipe.local_update.learning_rate == 0.05:
            raise ModelError(f"task '{job.task.name}': the loss is nan")
        return run_local_update(job, progress)

    monkeypatch.setattr(compare_jobs, "run_local_update", diverge)
    methods = {name: METHODS[name] | {"protocols": ["post_hoc"]} for name in ("mean", "fast")}
    sets = {"pair": {"tasks": list(PAIR)}}
    results = compare(make(raw, methods=methods, task_sets=sets), tmp_path / "out").results
    fine, failed = results["cells"]
    assert (fine["status"], failed["status"]) == ("done", "failed")
    assert failed["error"] == "task 'letters': the loss is nan; task 'numbers': the loss is nan"


@pytest.mark.parametrize(
    ("update", "error", "text"),
    [
        ({"batch_size": 99}, DataError, "methods.own: task 'letters': 24 training examples are fewer than one batch"),
        ({"target_modules": ["nothing"]}, ModelError, "methods.own: "),
        ({"trainer": {"no_such": 1}}, RecipeError, "methods.own: local_update.trainer.no_such: SFTConfig has no such"),
    ],
)
def test_a_methods_own_training_is_checked_before_the_first_step(
    raw: Json, tmp_path: Path, update: Json, error: type[Exception], text: str
) -> None:
    methods = {"own": {"operator": "mean", "local_update": update}}
    with pytest.raises(error) as caught:
        compare(make(raw, methods=methods), tmp_path / "out")
    assert str(caught.value).startswith(text)
    assert not (tmp_path / "out").exists()
