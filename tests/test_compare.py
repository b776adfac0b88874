"""A whole comparison on the tiny model: what cells share, what is chosen where, and what an interruption costs."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import TASKS
from manyshot import compare_jobs, executor_choice
from manyshot.compare_plan import count_steps
from manyshot.compare_recipe import CompareRecipe
from manyshot.comparison import CompareResult, compare
from manyshot.errors import RunFolderError, WorkerError
from manyshot.progress import Event
from manyshot.recipe_file import compare_recipe_from_mapping, load_compare_recipe, recipe_from_mapping, to_yaml
from manyshot.rundir import read_json
from manyshot.runner import run
from run_helpers import small_mapping, write_data

pytestmark = pytest.mark.usefixtures("no_figures")

Json = dict[str, Any]
PAIR = TASKS[:2]
METHODS: Json = {
    "sum": {"operator": "task_arithmetic", "grid": {"scaling": [0.2, 0.4]}},
    "metis": {"operator": {"name": "metis", "temperature": 0.5}},
    "no_mask": {"ablation_of": "metis", "set": {"mask": False}, "protocols": ["many_shot"], "removes": "mask"},
    "joint": {"joint": True},
}


def mapping(base: Path, data: Path) -> Json:
    """A comparison as plain data: seven cells at one place, nine runs."""
    small = small_mapping(base, data)
    own = {key: small[key] for key in ("protocol", "local_update", "evaluation")}
    own["evaluation"].pop("experts")
    tasks = {name: small["tasks"][name] for name in PAIR}
    retention = {TASKS[2]: small["tasks"][TASKS[2]]}
    return {
        "models": {"tiny": str(base)},
        "tasks": tasks,
        "retention": retention,
        "preset": "paper",
        "seeds": [0],
        "methods": METHODS,
    } | own


def make(raw: Json, *overrides: str, **changes: Any) -> CompareRecipe:
    return compare_recipe_from_mapping(copy.deepcopy(raw) | changes, overrides)


def cell_of(results: Json, method: str, protocol: str) -> Json:
    (found,) = [one for one in results["cells"] if (one["method"], one["protocol"]) == (method, protocol)]
    return dict(found)


@pytest.fixture(scope="module")
def raw(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    data = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_data(data, task)
    return mapping(base_folder, data)


@pytest.fixture(scope="module")
def done(raw: Json, tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    return compare(make(raw), tmp_path_factory.mktemp("compare") / "done")


def test_every_cell_of_the_grid_is_done_and_scored(done: CompareResult) -> None:
    cells = done.results["cells"]
    assert [(one["method"], one["protocol"]) for one in cells] == [
        *[(name, protocol) for name in ("sum", "metis") for protocol in ("post_hoc", "many_shot")],
        ("no_mask", "many_shot"),
        ("joint", "joint"),
    ]
    for one in cells:
        assert one["status"] == "done"
        assert list(one["scores"]) == sorted(PAIR)
        assert list(one["retention"]) == [TASKS[2]]
        assert one["multi_task_loss"] == pytest.approx(sum(one["losses"].values()) / 2)
        assert [len(values) for values in one["example_scores"].values()] == [6, 6]


def test_more_workers_than_memory_holds_are_refused_before_anything_is_written(
    raw: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_choice, "available", lambda: 900_000_000)
    with pytest.raises(WorkerError, match=r"--workers: 2 workers .* has 0\.9 GB free; run one after the other"):
        compare(make(raw), tmp_path / "none", workers=2)
    assert not (tmp_path / "none" / "compare.yaml").exists()


@pytest.mark.slow  # two more processes load torch, transformers and peft
def test_two_workers_come_to_the_results_of_one_process(raw: Json, done: CompareResult, tmp_path: Path) -> None:
    heard: list[Event] = []
    found = compare(make(raw), tmp_path / "done", workers=2, listener=heard.append)
    timed = ("seconds", "peak_memory_bytes")
    whole, parts = (
        [{k: v for k, v in one.items() if k not in timed} for one in r.results["cells"]] for r in (done, found)
    )
    assert parts == whole
    assert sorted(path.name for path in found.folder.iterdir()) == sorted(path.name for path in done.folder.iterdir())
    assert {event.task for event in heard if event.kind == "advance"} >= set(PAIR)


def test_a_many_shot_cell_is_the_run_of_the_same_recipe(raw: Json, done: CompareResult, tmp_path: Path) -> None:
    one = cell_of(done.results, "metis", "many_shot")
    recipe = recipe_from_mapping(
        {"model": raw["models"]["tiny"], "tasks": raw["tasks"], "operator": METHODS["metis"]["operator"], "seed": 0}
        | {"preset": "paper"}
        | {key: raw[key] for key in ("protocol", "local_update")}
        | {"evaluation": raw["evaluation"] | {"experts": True}}
    )
    alone = run(recipe, tmp_path / "run").scores
    last = alone["rounds"]["2"]
    assert [entry["multi_task_validation_loss"] for entry in one["rounds"]] == [
        alone["rounds"][str(r)]["multi_task_loss"] for r in (1, 2)
    ]
    assert one["rounds"][1]["weights"] == last["weights"]
    assert {task: score["score"] for task, score in one["scores"].items()} == {
        task: score["score"] for task, score in last["scores"].items()
    }
    assert one["normalized"] == last["normalized"]


def test_training_steps_are_those_that_were_planned(raw: Json, done: CompareResult) -> None:
    records = {}
    for file in done.folder.rglob("local_update.json"):
        record = read_json(file)
        records[record["key"]] = record["steps"]  # a shared update has one key wherever it lies
    steps = done.results["steps"]
    assert sum(records.values()) == steps["shared"] == count_steps(make(raw))["shared"]
    # experts 2 × 4, first rounds 2 × 2, later rounds of 2 candidates, METIS and its ablation 4 × 2 × 2, joint 8
    assert steps["by_part"] == {"experts": 8, "first_rounds": 4, "later_rounds": 16, "joint": 8}
    # post-hoc 2 × 8, many-shot 4 runs × 8 and experts 3 × 8, joint 8 and experts 8
    assert steps["one_by_one"] == 16 + 32 + 24 + 16


def test_candidates_are_chosen_on_validation_and_the_others_never_see_a_test_split(done: CompareResult) -> None:
    assert [(one["method"], one["protocol"]) for one in done.results["tuning"]] == [
        ("sum", "post_hoc"),
        ("sum", "many_shot"),
    ]
    tested = {one["folder"] for one in done.results["cells"]}
    for record in done.results["tuning"]:
        losses = [one["multi_task_validation_loss"] for one in record["candidates"]]
        assert record["chosen"] == losses.index(min(losses))
        chosen = cell_of(done.results, "sum", record["protocol"])
        assert chosen["settings"] == record["candidates"][record["chosen"]]["settings"]
        assert chosen["rounds"][-1]["multi_task_validation_loss"] == min(losses)
    trials = {folder.name for folder in (done.folder / "trials").iterdir()}
    untested = trials - tested
    assert len(untested) == 2
    assert all((done.folder / "trials" / name / "test").is_dir() for name in tested)
    assert not any((done.folder / "trials" / name / "test").exists() for name in untested)


def test_an_ablation_is_the_full_method_with_one_setting_changed(done: CompareResult) -> None:
    full, part = (cell_of(done.results, name, "many_shot")["settings"] for name in ("metis", "no_mask"))
    assert part == full | {"mask": False}
    assert done.results["methods"]["no_mask"]["ablation_of"] == "metis"


def test_rounds_say_what_the_theory_speaks_of(done: CompareResult) -> None:
    first, second = cell_of(done.results, "metis", "many_shot")["rounds"]
    assert first["round"] == 1
    for entry in (first, second):
        assert all(value > 0 for value in entry["drift"].values())
        assert entry["distance"] > 0
        assert entry["cosines"]["letters"]["letters"] == pytest.approx(1)
        assert sum(entry["weights"].values()) == pytest.approx(1)
    # in round 1 the round's start is the pretrained model, so drift is the norm of the task vectors: of round 2's,
    # which hold what round 1 changed too, it is not
    merge = read_json(
        done.folder / "trials" / cell_of(done.results, "metis", "many_shot")["folder"] / "round_001/merge.json"
    )
    assert first["drift"] == merge["task_vector_norms"]


def test_experts_are_measured_where_their_losses_decide_something(done: CompareResult) -> None:
    for method, measured in (("sum", False), ("metis", True)):
        one = cell_of(done.results, method, "many_shot")
        trial = done.folder / "trials" / one["folder"]
        records = [read_json(trial / f"round_00{r}" / PAIR[0] / "local_update.json") for r in (1, 2)]
        # the first round's local updates are shared, and somebody may ask for their losses
        assert ["validation" in record for record in records] == [True, measured]
        assert bool(one["rounds"][1]["loss_gaps"]) == measured
        assert set(one["rounds"][1]["weights"]) == set(PAIR)


def test_joint_fine_tuning_sees_the_examples_of_all_tasks(done: CompareResult) -> None:
    trial = done.folder / "trials" / cell_of(done.results, "joint", "joint")["folder"]
    record = read_json(trial / "joint" / "local_update.json")
    experts = [read_json(file) for file in (done.folder / "updates").glob("*/local_update.json")]
    of_all_steps = [one for one in experts if one["steps"] == 4]
    assert record["steps"] == sum(one["steps"] for one in of_all_steps) == 8
    assert record["num_tokens"] == sum(one["num_tokens"] for one in of_all_steps)


def test_resume_runs_nothing_again(raw: Json, done: CompareResult, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("was run again")

    before = {file: file.stat().st_mtime_ns for file in (done.folder / "trials").rglob("*.safetensors")}
    monkeypatch.setattr(compare_jobs, "run_rounds", refuse)
    again = compare(make(raw), done.folder, resume=True)
    assert again.results == done.results
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_an_interrupted_cell_goes_on_and_ends_alike(
    raw: Json, done: CompareResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupter:
        """Ctrl-C in the second round of the second many-shot trial."""

        def __init__(self) -> None:
            self.seen = 0

        def __call__(self, event: Event) -> None:
            self.seen += event.kind == "start" and event.phase == "local_update" and event.round_index == 2
            if self.seen == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(make(raw), tmp_path / "out", listener=Interrupter())
    finished = list((tmp_path / "out" / "trials").glob("*/trial.json"))
    times = {file: file.stat().st_mtime_ns for file in finished}
    assert finished
    result = compare(make(raw), tmp_path / "out", resume=True)
    assert result.results == done.results | {"name": "out"}
    assert {file: file.stat().st_mtime_ns for file in finished} == times


def test_damaged_work_is_refused_by_name_and_redone_on_request(raw: Json, done: CompareResult, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(done.folder, folder, symlinks=True)
    shared = sorted((folder / "updates").rglob("adapter_model.safetensors"))[0]
    merged = sorted((folder / "trials").rglob("task_vector.safetensors"))[0]
    trained, merged_bytes = shared.read_bytes(), merged.read_bytes()
    shared.write_bytes(b"")
    merged.unlink()
    with pytest.raises(RunFolderError) as caught:
        compare(make(raw), folder, resume=True)
    for file, step in ((shared, "local update"), (merged, "trial")):
        assert str(file.relative_to(folder)) in str(caught.value) and step in str(caught.value)
    result = compare(make(raw), folder, repair=True)
    assert result.results == done.results | {"name": "copy"}
    assert (shared.read_bytes(), merged.read_bytes()) == (trained, merged_bytes)


def test_a_changed_recipe_is_refused_by_name_and_extended_on_request(raw: Json, done: CompareResult) -> None:
    changed = make(raw, methods={"metis": METHODS["metis"], "mean": {"operator": "mean", "protocols": ["post_hoc"]}})
    with pytest.raises(RunFolderError, match=r"the recipe differs.*methods\.mean.*use --extend"):
        compare(changed, done.folder, resume=True)
    with pytest.raises(RunFolderError, match=r"is not empty; --resume"):
        compare(changed, done.folder)
    kept = {file: file.stat().st_mtime_ns for file in done.folder.rglob("trial.json")}
    extended = compare(changed, done.folder, extend=True)
    assert [one["status"] for one in extended.results["cells"]] == ["done"] * 3
    before = cell_of(done.results, "metis", "many_shot")
    del before["share_of_joint"]  # joint fine-tuning is wanted no more
    assert cell_of(extended.results, "metis", "many_shot") == before
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    compare(make(raw), done.folder, extend=True)  # as it was, for the tests after this one


def test_a_folder_of_something_else_is_never_deleted(raw: Json, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(RunFolderError, match=r"holds no compare\.yaml"):
        compare(make(raw), tmp_path, force=True)
    assert (tmp_path / "precious.txt").exists()


def test_a_cell_that_fails_does_not_stop_the_others(raw: Json, tmp_path: Path) -> None:
    methods = {
        "empty": {"operator": {"name": "metis", "mask_threshold": 1e9}, "protocols": ["post_hoc"]},
        "mean": {"operator": "mean", "protocols": ["post_hoc"]},
    }
    said: list[str] = []
    result = compare(make(raw, methods=methods), tmp_path / "out", listener=lambda event: said.append(event.text))
    failed, fine = result.results["cells"]
    assert (failed["status"], fine["status"]) == ("failed", "done")
    assert "keeps no coordinate" in failed["error"]
    # one line for each cell, and none of what its rounds say
    lines = [text for text in said if text and not text.startswith(("checking", "warning"))]
    assert len(lines) == 2
    assert lines[0].startswith("tiny/all/seed 0/empty/post_hoc: failed: ")


def test_a_grid_without_a_candidate_that_runs_fails_as_a_cell(raw: Json, tmp_path: Path) -> None:
    methods = {
        "empty": {"operator": "metis", "grid": {"mask_threshold": [1e9, 2e9]}, "protocols": ["post_hoc"]},
        "mean": {"operator": "mean", "protocols": ["post_hoc"]},
    }
    results = compare(make(raw, methods=methods), tmp_path / "out").results
    assert [one["status"] for one in results["cells"]] == ["failed", "done"]
    assert results["tuning"][0]["chosen"] is None


def test_an_expert_that_scores_zero_leaves_no_ratio_and_no_nan(raw: Json, tmp_path: Path) -> None:
    tasks = copy.deepcopy(raw["tasks"])
    rows = [json.loads(line) for line in Path(tasks["letters"]["test"]).read_text().splitlines()]
    never = tmp_path / "never.test.jsonl"
    never.write_text("".join(json.dumps({"prompt": row["prompt"], "completion": "never said"}) + "\n" for row in rows))
    tasks["letters"] |= {"test": str(never), "metric": "exact_match"}
    methods = {"mean": {"operator": "mean"}}
    result = compare(make(raw, tasks=tasks, methods=methods), tmp_path / "out")
    for one in result.results["cells"]:
        assert one["normalized"]["tasks"]["letters"] is None
        assert one["normalized"]["average"] == one["normalized"]["tasks"]["numbers"]
    texts = [file.read_text("utf-8") for file in result.files if file.suffix in (".md", ".csv", ".tex")]
    assert texts
    assert not any("nan" in text.lower().split() or "inf" in text.lower().split() for text in texts)
    assert "letters" in (result.folder / "report.md").read_text("utf-8")


def test_a_recipe_survives_its_own_yaml(raw: Json, tmp_path: Path) -> None:
    recipe = make(raw)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe), "utf-8")
    assert load_compare_recipe(tmp_path / "again.yaml") == recipe


def test_a_method_may_merge_in_its_own_way(raw: Json, tmp_path: Path) -> None:
    operator = {"name": "task_arithmetic", "scaling": 0.6}
    own = {"operator": operator, "merge": {"reference": "start"}, "protocols": ["many_shot"]}
    paper = {"operator": operator, "protocols": ["many_shot"]}
    said: list[str] = []
    recipe = make(raw, methods={"own": own, "paper": paper}, retention={})
    results = compare(recipe, tmp_path / "out", listener=lambda event: said.append(event.text)).results
    alone = {
        reference: run(
            recipe_from_mapping(
                {"model": raw["models"]["tiny"], "tasks": raw["tasks"], "operator": operator, "seed": 0}
                | {key: raw[key] for key in ("protocol", "local_update")}
                | {"evaluation": raw["evaluation"] | {"experts": False}, "merge": {"reference": reference}}
            ),
            tmp_path / reference,
        ).scores["rounds"]["2"]["multi_task_loss"]
        for reference in ("start", "pretrained")
    }
    found = {name: cell_of(results, name, "many_shot")["rounds"][-1] for name in ("own", "paper")}
    assert found["own"]["multi_task_validation_loss"] == alone["start"]
    assert found["paper"]["multi_task_validation_loss"] == alone["pretrained"]
    assert alone["start"] != alone["pretrained"]
    # the growth that the other form warns of
    warned = [text for text in said if text.startswith("warning")]
    assert len(warned) == 1
    assert "methods.paper, many_shot, 2 tasks: operator.scaling" in warned[0]
