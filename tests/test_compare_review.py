"""What a comparison must not do: stop with a traceback, divide by a stale number, or lose what is finished."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import TASKS
from manyshot import compare_jobs
from manyshot.cli_compare import show_result
from manyshot.compare_plan import count_steps, plan_compare
from manyshot.compare_recipe import CompareRecipe
from manyshot.comparison import CompareResult, compare
from manyshot.errors import ModelError, RecipeError, RunFolderError
from manyshot.evaluate import MeasureJob, run_measure
from manyshot.local_update import LocalUpdateJob, run_local_update
from manyshot.operators import Metis
from manyshot.recipe_file import compare_recipe_from_mapping, to_yaml
from manyshot.rundir import read_json, write_json
from run_helpers import small_mapping, write_data

pytestmark = pytest.mark.usefixtures("no_figures")

Json = dict[str, Any]

# ---- recipes ---------------------------------------------------------------------------------------------------------

RAW: Json = {
    "models": {"tiny": "some/model"},
    "tasks": {name: {"data": f"owner/{name}"} for name in "abc"},
    "preset": "paper",
    "seeds": [0, 1],
    "protocol": {"rounds": 2, "local_steps": 4},
    "methods": {"metis": {"operator": "metis"}},
}
TUNED: Json = {"operator": "metis", "grid": {"temperature": [1.0, 2.0]}, "protocols": ["many_shot"]}


def part(**method: Any) -> Json:
    return {"methods": {"metis": {"operator": "metis"}, "part": {"ablation_of": "metis"} | method}}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"seeds": [-1]}, "seeds.0: Input should be greater than or equal to 0"),
        ({"tasks": {name: {"data": "owner/x"} for name in ("merged", "b")}}, "tasks.merged: this name is taken"),
        ({"merge": {"outer_step_size": 0.5}}, "merge.outer_step_size: is part of the outer optimizer"),
        ({"merge": {"reference": "start", "outer_step_size": [1.0, 0.5]}}, "merge.outer_step_size: has 2 values for 1"),
        ({"merge": {"space": "factors"}, "local_update": {"method": "full"}}, "local_update.method: full needs space"),
        (
            {"tasks": RAW["tasks"] | {"a": {"data": "owner/a", "rank": 3}}, "merge": {"space": "factors"}},
            "tasks: tasks differ in rank or alpha",
        ),
        (part(set={"temperature": [1.0, 2.0, 3.0]}), "methods.part.set.temperature: has 3 values for 1 rounds"),
        (part(set={"mask": False}, protocols=["post_hoc"] * 2), "methods.part.protocols: names one twice"),
        (
            {"methods": {"metis": TUNED, "part": {"ablation_of": "metis", "set": {"mask": False}}}},
            "methods.part.protocols: 'metis' has a grid, and is not searched with post_hoc",
        ),
        ({"tuning": {"seeds": [0, 0]}}, "tuning.seeds: names a seed twice"),
        ({"categories": {"all": ["a", "a"]}}, "categories.all: names a task twice"),
        ({"retention": {"r": {"train": {"data": "owner/r", "dat": 1}}}}, "retention.r.train.dat: unknown key; did you"),
        ({"models": {"a/b": "some/model"}}, "models.a/b: a name starts with a letter or digit"),
    ],
)
def test_what_no_run_could_use_is_refused_by_its_key(change: Json, problem: str) -> None:
    with pytest.raises(RecipeError) as caught:
        compare_recipe_from_mapping(RAW | change)
    assert str(caught.value).startswith(f"compare: {problem}")


def test_an_override_reaches_into_an_operator_that_is_named_only() -> None:
    recipe = compare_recipe_from_mapping(RAW, ("methods.metis.operator.temperature=3",))
    assert recipe.methods["metis"].operator == Metis(temperature=3.0)


def test_steps_leave_out_what_is_not_trained() -> None:
    once = compare_recipe_from_mapping(RAW | {"protocol": {"rounds": 1, "local_steps": 4}})
    # one round is all steps from the pretrained model: the experts themselves
    assert count_steps(once)["by_part"] == {"experts": 24, "first_rounds": 0, "later_rounds": 0, "joint": 0}
    tasks = RAW["tasks"] | {"a": {"data": "owner/a", "expert": "some/adapter"}}
    adopting = count_steps(compare_recipe_from_mapping(RAW | {"tasks": tasks}))
    assert adopting["by_part"] == {"experts": 16, "first_rounds": 8, "later_rounds": 12, "joint": 0}
    # per seed: two cells with 8 steps of experts each, and one many-shot run of 2 × 4 and 1 × 2 steps
    assert adopting["one_by_one"] == 2 * (2 * 8 + 8 + 2)


def test_a_plan_counts_every_example_that_is_measured() -> None:
    more = {"retention": {"r": {"data": "owner/r"}}, "evaluation": {"validation_examples": 10, "test_examples": 100}}
    plan = plan_compare(compare_recipe_from_mapping(RAW | more))
    # per seed: pretrained on 3 tasks, 3 experts, 3 first updates; merged once and twice, 3 second updates
    assert plan["validation_examples"] == 2 * 10 * (3 + 3 + 3 + 3 + 6 + 3)
    # per seed: pretrained on 4 tasks, 3 experts, two cells on 4 tasks
    assert plan["test_examples"] == 2 * 100 * (4 + 3 + 8)


# ---- comparisons that go on ------------------------------------------------------------------------------------------

ONCE: Json = {"mean": {"operator": "mean", "protocols": ["post_hoc"]}}


@pytest.fixture(scope="module")
def raw(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    data = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_data(data, task)
    small = small_mapping(base_folder, data)
    shared = {key: small[key] for key in ("tasks", "protocol", "local_update", "evaluation")}
    shared["tasks"].pop("words")
    shared["protocol"] = {"rounds": 2, "local_steps": 2}
    shared["evaluation"] |= {"validation_examples": 3, "test_examples": 3}
    return {"models": {"tiny": str(base_folder)}, "seeds": [0], "methods": ONCE} | shared


def make(raw: Json, **changes: Any) -> CompareRecipe:
    return compare_recipe_from_mapping(copy.deepcopy(raw) | copy.deepcopy(changes))


@pytest.fixture(scope="module")
def finished(raw: Json, tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    return compare(make(raw), tmp_path_factory.mktemp("finished") / "out")


@pytest.fixture
def done(finished: CompareResult, tmp_path: Path) -> Path:
    """A copy of a finished comparison of one cell."""
    return Path(shutil.copytree(finished.folder, tmp_path / "out"))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The kind of folder and the tasks of everything that is measured on a test split from now on."""
    seen: list[tuple[str, ...]] = []

    def watch(job: MeasureJob, progress: Any) -> Json:
        if job.split == "test" and not (job.folder / "scores.json").exists():
            seen.append((job.folder.parent.parent.name, *(task.name for task in job.tasks)))
        return run_measure(job, progress)

    monkeypatch.setattr(compare_jobs, "run_measure", watch)
    return seen


def test_a_retention_task_that_comes_later_is_measured_alone(
    raw: Json, done: Path, measured: list[tuple[str, ...]]
) -> None:
    words = {split: raw["tasks"]["letters"][split].replace("letters", "words") for split in ("train", "test")}
    result = compare(make(raw, retention={"words": words | {"metric": "choice_accuracy"}}), done, extend=True)
    (cell,) = result.results["cells"]
    assert cell["status"] == "done"
    assert list(cell["retention"]) == ["words"]
    assert measured == [("references", "words"), ("trials", "words")]


def test_denominators_follow_the_settings_of_the_evaluation(
    raw: Json, done: Path, measured: list[tuple[str, ...]]
) -> None:
    compare(make(raw, evaluation=raw["evaluation"] | {"max_new_tokens": 2}), done, extend=True)
    assert sorted(measured) == [
        *[("references", "letters")] * 2,  # the pretrained model, and the task's expert
        *[("references", "numbers")] * 2,
        ("trials", "letters", "numbers"),
    ]


def test_another_attention_is_measured_anew(raw: Json, done: Path, measured: list[tuple[str, ...]]) -> None:
    compare(make(raw, local_update=raw["local_update"] | {"attn_implementation": "eager"}), done, extend=True)
    assert len(measured) == 5


def test_an_expert_whose_content_changed_is_merged_anew(raw: Json, done: Path, tmp_path: Path) -> None:
    adapters = {task: next((done / "updates").glob(f"{task}-*")) / "adapter" for task in ("letters", "numbers")}
    expert = tmp_path / "expert"
    shutil.copytree(adapters["letters"], expert)
    tasks = copy.deepcopy(raw["tasks"])
    tasks["letters"]["expert"] = str(expert)
    (before,) = compare(make(raw, tasks=tasks), tmp_path / "adopting").results["cells"]
    shutil.copytree(adapters["numbers"], expert, dirs_exist_ok=True)
    (after,) = compare(make(raw, tasks=tasks), tmp_path / "adopting", resume=True).results["cells"]
    assert after["losses"] != before["losses"]


def test_what_a_kill_kept_from_being_removed_goes_later(raw: Json, done: Path) -> None:
    (trial,) = (done / "trials").iterdir()
    left = trial / "round_001" / "letters" / "adapter"
    left.mkdir()
    compare(make(raw), done, resume=True)
    assert not left.exists()


def test_another_placement_is_not_mixed_in(raw: Json, done: Path) -> None:
    described = read_json(done / "environment.json")
    assert described["placement"] == "float32 on cpu"
    write_json(done / "environment.json", described | {"placement": "bfloat16 on cuda"})
    with pytest.raises(RunFolderError, match=r"bfloat16 on cuda.*float32 on cpu.*local_update\.dtype"):
        compare(make(raw), done, resume=True)
    compare(make(raw, local_update=raw["local_update"] | {"device": "cpu", "dtype": "float32"}), done, extend=True)


def test_force_leaves_a_folder_that_holds_a_recipe_of_that_name(raw: Json, tmp_path: Path) -> None:
    (tmp_path / "compare.yaml").write_text(to_yaml(make(raw)), "utf-8")
    (tmp_path / "thesis.tex").write_text("years of work", "utf-8")
    for flag in ({"force": True}, {"extend": True}, {"resume": True}):
        with pytest.raises(RunFolderError, match=r"holds no compare\.yaml and environment\.json"):
            compare(make(raw), tmp_path, **flag)
    assert (tmp_path / "thesis.tex").exists()


def test_quiet_prints_the_reports_path_and_nothing_else(
    finished: CompareResult, capsys: pytest.CaptureFixture[str]
) -> None:
    show_result(finished, quiet=True, as_json=False)
    assert capsys.readouterr() == (f"{finished.folder / 'report.md'}\n", "")


# ---- cells that fail -------------------------------------------------------------------------------------------------


def test_joint_fine_tuning_and_rounds_of_all_weights_are_scored(raw: Json, tmp_path: Path) -> None:
    methods = {"joint": {"joint": True}, "mean": {"operator": "mean", "protocols": ["many_shot"]}}
    result = compare(
        make(raw, methods=methods, local_update=raw["local_update"] | {"method": "full"}), tmp_path / "out"
    )
    assert [cell["status"] for cell in result.results["cells"]] == ["done", "done"]
    assert result.results["cells"][0]["losses"] != result.results["cells"][1]["losses"]


def test_a_cell_that_torch_refuses_does_not_stop_the_others(
    raw: Json, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Any) -> Json:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(compare_jobs, "run_rounds", refuse)
    methods = {"ties": {"operator": "ties", "protocols": ["post_hoc"]}} | ONCE
    failed, fine = compare(make(raw, methods=methods), done, extend=True).results["cells"]
    assert (failed["status"], fine["status"]) == ("failed", "done")
    assert failed["error"] == "RuntimeError: out of memory"


def test_an_expert_that_diverges_fails_the_cells_of_its_seed_only(
    raw: Json, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(job: LocalUpdateJob, progress: Any) -> Json:
        if job.recipe.seed == 1:
            raise ModelError(f"task '{job.task.name}': the loss is nan")
        return run_local_update(job, progress)

    monkeypatch.setattr(compare_jobs, "run_local_update", diverge)
    methods = {"sum": {"operator": "task_arithmetic", "grid": {"scaling": [0.1, 0.3]}, "protocols": ["post_hoc"]}}
    result = compare(make(raw, methods=methods, seeds=[1, 0], tuning={"seeds": [1, 0]}), done, extend=True)
    (tuning,) = result.results["tuning"]
    assert tuning["seeds"] == [0]
    assert tuning["chosen"] is not None
    assert {cell["seed"]: cell["status"] for cell in result.results["cells"]} == {0: "done", 1: "failed"}
    (failed,) = [cell for cell in result.results["cells"] if cell["status"] == "failed"]
    assert "task 'letters': the loss is nan" in failed["error"]
    assert "the loss is nan" in (done / "report.md").read_text("utf-8")
