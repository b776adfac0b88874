"""A comparison scored by benchmarks of the harness: its numbers by hand, what is asked once, what is refused before."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import TASKS, make_rows
from manyshot import compare_benchmarks, compare_jobs
from manyshot.compare_benchmarks import BenchmarkJob, benchmark_file, check_benchmarks, run_benchmarks
from manyshot.compare_recipe import CompareRecipe
from manyshot.comparison import CompareResult, compare
from manyshot.errors import DataError, MissingExtraError, ModelError
from manyshot.eval_command import evaluate_model
from manyshot.harness import HarnessSettings
from manyshot.models import ModelState
from manyshot.progress import Progress
from manyshot.recipe_file import compare_recipe_from_mapping
from manyshot.rundir import read_json
from manyshot.runner import run
from run_helpers import small_mapping, write_data

pytestmark = pytest.mark.usefixtures("no_figures")

Json = dict[str, Any]
PAIR = TASKS[:2]  # letters, numbers
CELL = ("metis", "many_shot")
HARNESS: Json = {"batch_size": 4, "max_new_tokens": 4}


def write_rows(path: Path, rows: Sequence[Json]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def with_choices(task: str, count: int) -> list[Json]:
    """Rows that are answered by likelihood, the right one in turn at any place."""
    rows = []
    for i, row in enumerate(make_rows(task, count, seed=7)):
        others = [word for word in ("a", "3", "f") if word != row["completion"]]
        rows.append({"prompt": row["prompt"], "answer": i % 2, "choices": []})
        rows[-1]["choices"] = (
            [row["completion"], *others] if i % 2 == 0 else [others[0], row["completion"], *others[1:]]
        )
    return rows


@pytest.fixture(scope="module")
def raw(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Json:
    """Two tasks; two benchmarks of the first, one of the second, one of neither, and one that nobody can answer."""
    data = tmp_path_factory.mktemp("data")
    for task in TASKS:
        write_data(data, task)
    small = small_mapping(base_folder, data)
    small["evaluation"].pop("experts")
    letters = write_rows(data / "choose.jsonl", with_choices("letters", 12))
    numbers = write_rows(data / "choose_numbers.jsonl", with_choices("numbers", 10))
    never = [{"prompt": row["prompt"], "completion": "never said"} for row in make_rows("letters", 3)]
    return {
        "models": {"tiny": str(base_folder)},
        "tasks": {name: small["tasks"][name] for name in PAIR},
        "preset": "paper",
        "seeds": [0],
        "benchmarks": {
            "pick": {"data": letters, "metric": "acc", "task": "letters"},
            "never": {"data": write_rows(data / "never.jsonl", never), "task": "letters"},
            "numbers": {"data": numbers, "metric": "acc_norm", "few_shot": 1, "task": "numbers"},
            "words": {"data": write_rows(data / "words.jsonl", with_choices("words", 8))},
        },
        "harness": HARNESS,
        "methods": {"metis": {"operator": "metis"}, "joint": {"joint": True}},
    } | {key: small[key] for key in ("protocol", "local_update", "evaluation")}


def make(raw: Json, *overrides: str, **changes: Any) -> CompareRecipe:
    return compare_recipe_from_mapping(copy.deepcopy(raw) | changes, overrides)


@pytest.fixture(scope="module")
def done(raw: Json, tmp_path_factory: pytest.TempPathFactory) -> CompareResult:
    return compare(make(raw), tmp_path_factory.mktemp("compare") / "done")


def cell_of(results: Json, method: str, protocol: str) -> Json:
    (found,) = [one for one in results["cells"] if (one["method"], one["protocol"]) == (method, protocol)]
    return dict(found)


def asked(model: Path, spec: Json, name: str, **where: Any) -> float:
    """What `manyshot eval` says of a model on one benchmark."""
    settings = HarnessSettings(few_shot=spec.get("few_shot"), batch_size=4, generation={"max_gen_toks": 4})
    found = evaluate_model(model, data=[f"{spec['data']},name={name}"], settings=settings, **where).scores
    metric = spec.get("metric") or ("exact_match" if name == "never" else "acc")
    value = found[f"{name}/{metric},none"]
    assert value is not None
    return value


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_benchmark_scores_are_those_of_manyshot_eval(raw: Json, done: CompareResult, base_folder: Path) -> None:
    (reference,) = done.results["references"]
    for name, spec in raw["benchmarks"].items():
        kept = reference["pretrained"]["retention" if name == "words" else "scores"][name]
        assert kept["score"] == asked(base_folder, spec, name)
        if name != "words":
            (expert,) = [
                folder
                for folder in (done.folder / "updates").glob(f"{spec['task']}-*")
                if read_json(folder / "local_update.json")["steps"] == 4
            ]
            assert reference["experts"]["scores"][name]["score"] == asked(
                base_folder, spec, name, adapter=expert / "adapter"
            )


def test_a_cell_is_asked_in_the_state_that_training_left(raw: Json, done: CompareResult, tmp_path: Path) -> None:
    """The same recipe as a run of its own, its last round evaluated by `manyshot eval`."""
    one = make(raw).run_recipe("tiny", PAIR, 0, make(raw).candidates("metis")[0], "many_shot")
    alone = run(one, tmp_path / "run").folder
    cell = cell_of(done.results, "metis", "many_shot")
    for name, spec in raw["benchmarks"].items():
        kept = cell["retention" if name == "words" else "scores"][name]
        assert kept["score"] == asked(alone, spec, name, round_index=2)


def test_normalized_performance_is_by_the_experts_of_the_benchmarks_tasks(done: CompareResult) -> None:
    (reference,) = done.results["references"]
    experts = {name: one["score"] for name, one in reference["experts"]["scores"].items()}
    assert experts["never"] == 0
    assert min(experts["pick"], experts["numbers"]) > 0
    for one in [*done.results["cells"], reference["pretrained"]]:
        scores = {name: score["score"] for name, score in one["scores"].items()}
        by_hand = {"pick": scores["pick"] / experts["pick"], "numbers": scores["numbers"] / experts["numbers"]}
        assert one["normalized"]["scored"] == by_hand | {"never": None}
        # the benchmark that nobody answers is in no mean
        assert one["normalized"]["tasks"] == {"letters": by_hand["pick"], "numbers": by_hand["numbers"]}
        assert one["normalized"]["average"] == pytest.approx((by_hand["pick"] + by_hand["numbers"]) / 2)
        assert one["normalized"]["worst"] == min(by_hand.values())


def test_a_task_is_the_mean_of_its_benchmarks(raw: Json, tmp_path: Path) -> None:
    two = raw["benchmarks"] | {"again": raw["benchmarks"]["pick"] | {"metric": "acc_norm"}}
    result = compare(make(raw, benchmarks=two, methods={"mean": {"operator": "mean"}}), tmp_path / "out")
    for one in result.results["cells"]:
        by_name = one["normalized"]["scored"]
        letters = (by_name["pick"] + by_name["again"]) / 2
        assert one["normalized"]["tasks"]["letters"] == pytest.approx(letters)
        # of tasks, not of benchmarks: letters has more of them, and counts as much as numbers
        assert one["normalized"]["average"] == pytest.approx((letters + by_name["numbers"]) / 2)


def test_example_scores_are_those_that_the_score_is_the_mean_of(done: CompareResult) -> None:
    counts = {"pick": 12, "never": 3, "numbers": 10}
    for one in done.results["cells"]:
        assert {name: len(values) for name, values in one["example_scores"].items()} == counts
        for name, values in one["example_scores"].items():
            assert fmean(values) == pytest.approx(one["scores"][name]["score"])
            assert one["scores"][name]["num_examples"] == counts[name]


def test_losses_stay_those_of_the_test_splits(done: CompareResult) -> None:
    for one in done.results["cells"]:
        losses = read_json(done.folder / "trials" / one["folder"] / "test" / "losses.json")
        assert one["losses"] == {task: losses[task]["loss"] for task in PAIR}
        assert set(one["scores"]) == {"pick", "never", "numbers"}
        assert set(one["retention"]) == {"words"}
    assert done.results["task_sets"]["all"] == {
        "tasks": list(PAIR),
        "scored": ["pick", "never", "numbers"],
        "seeds": [0],
        "against": None,
    }


def test_tables_name_benchmarks_and_what_has_no_ratio(done: CompareResult) -> None:
    report = (done.folder / "report.md").read_text("utf-8")
    assert "letters: pick (acc), never (by its rows); numbers: numbers (acc\\_norm, 1-shot); retention: words" in report
    assert "the expert scores 0 on never; normalized performance is not defined" in report
    scores = (done.folder / "tables" / "per_task_scores.md").read_text("utf-8")
    assert "pick: acc, 12 examples; never: exact_match, 3 examples" in scores.replace("\\_", "_")
    table = (done.folder / "tables" / "per_task_normalized.csv").read_text("utf-8").splitlines()
    assert table[0].startswith("model,task_set,method,protocol,pick")
    assert ",words" in (done.folder / "tables" / "table_4.csv").read_text("utf-8").splitlines()[0]
    losses = (done.folder / "tables" / "per_task_losses.csv").read_text("utf-8").splitlines()[0]
    assert "letters" in losses and "pick" not in losses


def test_settings_and_data_are_recorded(raw: Json, done: CompareResult) -> None:
    folder = done.folder / "trials" / cell_of(done.results, "joint", "joint")["folder"] / "test" / "benchmarks"
    (file,) = folder.glob("numbers-*.json")
    found = read_json(file)
    assert (found["settings"]["batch_size"], found["settings"]["chat_template"]) == (4, False)
    assert found["record"]["num_fewshot"] == 1
    assert len(found["record"]["data_sha256"]) == 64
    assert done.results["benchmarks"]["numbers"] == {
        **{"data": "choose_numbers.jsonl", "harness": None, "metric": "acc_norm"},
        **{"few_shot": 1, "task": "numbers"},
    }
    assert done.results["harness"] == HARNESS | {"chat_template": False, "limit": None}


# ---- asked once ------------------------------------------------------------------------------------------------------


def refuse(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("was done again")


def test_resume_asks_and_trains_nothing_again(raw: Json, done: CompareResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_benchmarks, "run_tasks", refuse)
    monkeypatch.setattr(compare_jobs, "run_rounds", refuse)
    assert compare(make(raw), done.folder, resume=True).results == done.results


def test_an_interrupted_job_goes_on_with_the_next_benchmark(
    raw: Json, base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(raw)
    job = BenchmarkJob(recipe.local_update, ModelState(base_folder), tmp_path, recipe.benchmarks, recipe.harness)
    ask, names = compare_benchmarks.run_tasks, []

    def interrupted(model: Any, tokenizer: Any, opened: Any, *others: Any) -> Json:
        names.extend(opened.tasks)
        if len(names) == 3:
            raise KeyboardInterrupt
        return ask(model, tokenizer, opened, *others)

    monkeypatch.setattr(compare_benchmarks, "run_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_benchmarks(job, Progress())
    run_benchmarks(job, Progress())
    assert names == ["pick", "never", "numbers", "numbers", "words"]


def test_changed_settings_are_asked_anew_without_training(
    raw: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    methods = {"metis": {"operator": "metis", "protocols": ["many_shot"]}}
    own = {name: raw["benchmarks"][name] for name in ("pick", "words")}
    plain = compare(make(raw, benchmarks={}, methods=methods), folder)
    assert set(cell_of(plain.results, "metis", "many_shot")["scores"]) == set(PAIR)
    monkeypatch.setattr(compare_jobs, "run_rounds", refuse)
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    first = cell_of(compare(make(raw, benchmarks=own, methods=methods), folder, extend=True).results, *CELL)
    # numbers has no benchmark: it keeps its own test split
    assert "; numbers: its own test split" in (folder / "report.md").read_text("utf-8")
    assert set(first["scores"]) == {"pick", "numbers"}
    assert first["scores"]["numbers"] == cell_of(plain.results, *CELL)["scores"]["numbers"]
    cut = cell_of(
        compare(make(raw, "harness.limit=5", benchmarks=own, methods=methods), folder, extend=True).results, *CELL
    )
    assert cut["scores"]["pick"]["num_examples"] == 5
    assert cut["example_scores"]["pick"] == first["example_scores"]["pick"][:5]
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == times
    # and back: what was asked with the first settings is still there
    monkeypatch.setattr(compare_benchmarks, "run_tasks", refuse)
    assert cell_of(compare(make(raw, benchmarks=own, methods=methods), folder, extend=True).results, *CELL) == first


def test_two_benchmarks_that_ask_the_same_are_one_file(raw: Json, tmp_path: Path) -> None:
    recipe = make(raw)
    spec = recipe.benchmarks["pick"].model_copy(update={"data": None, "harness": "arc_fr"})
    of_other = spec.model_copy(update={"task": "numbers"})
    same = benchmark_file(tmp_path, "first", spec, recipe.harness)
    assert same == benchmark_file(tmp_path, "second", of_other, recipe.harness)
    assert same.name.startswith("arc_fr-")
    others = [
        benchmark_file(tmp_path, "first", spec.model_copy(update={"few_shot": 3}), recipe.harness),
        benchmark_file(tmp_path, "first", spec.model_copy(update={"metric": "acc_norm"}), recipe.harness),
        benchmark_file(tmp_path, "first", spec, recipe.harness.model_copy(update={"chat_template": True})),
    ]
    assert len({same, *others}) == 4


def test_a_benchmark_that_breaks_fails_before_anything_is_trained(
    raw: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("max_gen_toks is more than the model takes")

    monkeypatch.setattr(compare_benchmarks, "run_tasks", break_down)
    monkeypatch.setattr(compare_jobs, "run_local_update", refuse)
    results = compare(make(raw), tmp_path / "out").results
    assert {one["status"] for one in results["cells"]} == {"failed"}
    assert "benchmarks.pick: cannot be asked: AssertionError: max_gen_toks is more" in results["cells"][0]["error"]


def test_a_job_with_nothing_left_loads_no_model(raw: Json, base_folder: Path, tmp_path: Path) -> None:
    recipe = make(raw)
    update = recipe.run_recipe("tiny", PAIR, 0, recipe.shared, "post_hoc").local_update
    job = BenchmarkJob(update, ModelState(tmp_path / "nowhere"), tmp_path, {}, recipe.harness)
    run_benchmarks(job, Progress())
    assert list(tmp_path.iterdir()) == []


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_an_unknown_task_is_refused_before_the_folder_is_touched(raw: Json, tmp_path: Path) -> None:
    wrong = {"one": {"harness": "manyshot_xstst", "metric": "acc"}, "two": {"harness": "arc_frr", "metric": "acc"}}
    with pytest.raises(DataError) as caught:
        compare(make(raw, benchmarks=wrong), tmp_path / "out")
    first, second = str(caught.value).splitlines()
    assert first.startswith("benchmarks.one: the harness has no task 'manyshot_xstst'; did you mean")
    assert second.startswith("benchmarks.two: the harness has no task 'arc_frr'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "acc_norms"}, "benchmarks.pick: task 'pick': unknown metric 'acc_norms'"),
        ({"few_shot": 99}, "benchmarks.pick: task 'pick' has 11 examples to show, 99 are asked for"),
    ],
)
def test_what_a_benchmark_cannot_be_asked_is_refused(raw: Json, change: Json, message: str, base_folder: Path) -> None:
    recipe = make(raw, benchmarks={"pick": raw["benchmarks"]["pick"] | change})
    with pytest.raises(DataError) as caught:
        check_benchmarks(recipe.benchmarks, recipe.harness, {"tiny": ModelState(base_folder)})
    assert str(caught.value).startswith(message)


def test_a_group_of_the_harness_and_a_metric_of_a_corpus_are_refused(
    raw: Json, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def called(name: str) -> Any:
        def aggregate(values: Sequence[float]) -> float:
            return fmean(values)

        aggregate.__name__ = name
        return aggregate

    ways = {"acc": called("mean"), "ppl": called("weighted_perplexity"), "err": called("mean")}
    task = SimpleNamespace(
        _filters=[SimpleNamespace(name="none")],
        aggregation=lambda: ways,
        higher_is_better=lambda: {"acc": True, "ppl": False, "err": False},
    )

    def opened(names: Sequence[str]) -> Any:
        return lambda requests, settings: compare_benchmarks.OpenTasks(dict.fromkeys(names, task), {}, ())

    monkeypatch.setattr(compare_benchmarks, "hub_answers", lambda: True)
    check = {"metric": "err"}, {"metric": "ppl"}, {"metric": "acc,strict"}
    for spec in check:
        recipe = make(raw, benchmarks={"some": spec})
        monkeypatch.setattr(compare_benchmarks, "open_tasks", opened(["some"]))
        with pytest.raises(DataError, match=r"benchmarks\.some\.metric: 'some' has no '.*; there are: acc,none$"):
            check_benchmarks(recipe.benchmarks, recipe.harness, {})
    monkeypatch.setattr(compare_benchmarks, "open_tasks", opened(["some_fr", "some_de"]))
    with pytest.raises(DataError, match=r"benchmarks\.some: 'some' is a group.*one by one: some_fr, some_de"):
        check_benchmarks(recipe.benchmarks, recipe.harness, {})


def test_data_that_cannot_be_loaded_are_all_named(
    raw: Json, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyshot.compare_benchmarks.hub_answers", lambda: False)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", Path("empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "hub")
    names = {"xstest": "manyshot_xstest", "pubmedqa": "manyshot_pubmedqa"}
    recipe = make(raw, benchmarks={name: {"harness": task, "metric": "acc"} for name, task in names.items()})
    with pytest.raises(DataError) as caught:
        check_benchmarks(recipe.benchmarks, recipe.harness, {"tiny": ModelState(base_folder)})
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines] == ["benchmarks.xstest", "benchmarks.pubmedqa"]
    assert "Couldn't reach 'Paul/XSTest' on the Hub" in lines[0]


def test_without_the_harness_the_install_line_comes_first(raw: Json, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyshot.harness.find_spec", lambda name: None)
    recipe = make(raw)
    with pytest.raises(MissingExtraError, match=r"pip install 'manyshot\[eval\]'"):
        check_benchmarks(recipe.benchmarks, recipe.harness, {})


def test_a_chat_template_is_refused_where_a_model_has_none(raw: Json, base_folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(base_folder, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((bare / "tokenizer_config.json").read_text("utf-8"))
    config.pop("chat_template", None)
    (bare / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    recipe = make(raw, "harness.chat_template=true")
    check_benchmarks(recipe.benchmarks, recipe.harness, {"tiny": ModelState(base_folder)})
    with pytest.raises(ModelError, match=r"^models\.bare: harness\.chat_template: .* has no chat template"):
        check_benchmarks(recipe.benchmarks, recipe.harness, {"bare": ModelState(bare)})
