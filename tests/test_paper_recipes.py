"""The paper's recipes: they hold the authors' settings, read data sets with the Hub's columns, and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyshot.compare_recipe import CompareRecipe
from manyshot.comparison import compare
from manyshot.operators import ConsensusTA, Dare, Metis, TaskArithmetic, Ties
from manyshot.recipe import Evaluation, LocalUpdate, Merge, Protocol, Recipe
from manyshot.recipe_file import load_compare_recipe, load_recipe
from manyshot.rundir import read_json
from manyshot.runner import run
from manyshot.tasks import Task, load_task
from paper_helpers import ARCHITECTURES, HUB, HUB_NAMES, load_benchmark, load_stand_in, make_model

FOLDER = Path(__file__).parents[1] / "recipes" / "paper"
RUNS = sorted(ARCHITECTURES)
GRIDS = ("table_1", "table_5", "tables_2_3_4")
FOUR = ("instruction", "math", "multilingual", "safety")
SMALL = (
    "protocol={rounds: 2, local_steps: 2}",
    "evaluation.validation_examples=6",
    "evaluation.test_examples=6",
    "local_update.device=cpu",
    "local_update.micro_batch_size=8",
)

pytestmark = pytest.mark.usefixtures("no_figures")


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def raw(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path_of(name).read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return {name: make_model(name, folder / name) for name in ARCHITECTURES}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", load_stand_in)


# ---- what they say ---------------------------------------------------------------------------------------------------


def test_paper_recipes_are_all_tested() -> None:
    assert sorted(file.stem for file in FOLDER.iterdir()) == sorted((*RUNS, *GRIDS))


@pytest.mark.parametrize("name", [*RUNS, *GRIDS])
def test_paper_recipes_begin_with_their_command(name: str) -> None:
    verb, folder = ("run", "runs") if name in RUNS else ("compare", "compare")
    first = path_of(name).read_text("utf-8").splitlines()[0]
    assert first == f"# manyshot {verb} recipes/paper/{name}.yaml -o {folder}/{name}"


def check_settings(recipe: Recipe | CompareRecipe) -> None:
    """The authors' settings; whatever else there is stays at our default."""
    assert recipe.protocol == Protocol(rounds=5, local_steps=125)
    assert recipe.local_update == LocalUpdate(
        rank=16,
        alpha=16,
        dropout=0.0,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        learning_rate=3e-4,
        batch_size=8,
        micro_batch_size=2,
        max_length=512,
    )
    assert recipe.merge == Merge(space="weights")
    assert recipe.evaluation == Evaluation(validation_examples=100, test_examples=200, batch_size=8)
    assert recipe.protocol.local_steps * recipe.local_update.batch_size == 1000  # examples of each task


@pytest.mark.parametrize("name", RUNS)
def test_paper_runs_have_the_authors_settings(name: str) -> None:
    recipe = load_recipe(path_of(name))
    check_settings(recipe)
    assert recipe.model == HUB_NAMES[name]
    assert recipe.method == Metis(temperature=2.0, mask_threshold=0.3, min_agreement=2, scaling=1.0)
    assert tuple(recipe.tasks) == FOUR


@pytest.mark.parametrize("name", GRIDS)
def test_paper_grids_have_the_authors_settings(name: str) -> None:
    recipe = load_compare_recipe(path_of(name))
    check_settings(recipe)
    operators = {method: spec.operator for method, spec in recipe.methods.items() if spec.operator is not None}
    assert operators["task_arithmetic"] == TaskArithmetic(scaling=0.4)
    assert operators["dare"] == Dare(density=0.2, scaling=0.4)
    assert operators["ties"] == Ties(density=0.2, scaling=1.0)
    assert operators["consensus_ta"] == ConsensusTA(mask_threshold=0.4, min_agreement=2, scaling=0.4)
    assert recipe.methods["consensus_ta"].grid == {"mask_threshold": [0.2, 0.3, 0.4, 0.5, 0.6]}
    assert operators["metis"] == Metis(temperature=2.0, mask_threshold=0.3, min_agreement=2, scaling=1.0)
    assert set(recipe.models.values()) <= set(HUB_NAMES.values())


def test_paper_grids_are_the_tables() -> None:
    one, two, five = (load_compare_recipe(path_of(name)) for name in ("table_1", "tables_2_3_4", "table_5"))
    assert list(one.models) == list(five.models) == ["llama-3.2-3b"]
    assert dict(two.models) == HUB_NAMES
    assert two.kept == one.kept == ["coqa", "pubmedqa"]
    assert five.kept == []
    assert {"iso_c", "tsv_m"} <= two.methods.keys()
    assert [len(one.tasks) for one in five.sets.values()] == [7, 8, 11]
    assert all(five.protocols(method) == ("many_shot",) for method in five.methods)
    assert [name for name, spec in one.methods.items() if spec.ablation_of == "metis"] == [
        "metis_no_gaps",
        "metis_no_mask",
    ]


def test_paper_grids_are_scored_by_the_papers_benchmarks() -> None:
    one, two, five = (load_compare_recipe(path_of(name)) for name in ("table_1", "tables_2_3_4", "table_5"))
    languages = ("fr", "es", "de", "ru")
    multilingual = [f"{task}_{code}" for task in ("m_mmlu", "arc", "hellaswag") for code in languages]
    by_task = {"instruction": ["ifeval"], "math": ["gsm8k_cot"], "multilingual": multilingual, "safety": ["xstest"]}
    assert one.benchmarks == two.benchmarks
    for recipe in (one, two):
        (task_set,) = recipe.sets
        assert recipe.scored(task_set) == {name: task for task, names in by_task.items() for name in names}
    scored = five.scored("eleven")
    assert [name for name, task in scored.items() if task == "german"] == ["m_mmlu_de", "arc_de", "hellaswag_de"]
    assert {name for name, task in scored.items() if name == task} == {"coding", "coding_evol"}
    # whichever table it is for, a benchmark is asked alike
    for name, benchmark in five.benchmarks.items():
        if name in one.benchmarks:
            asked = one.benchmarks[name].model_copy(update={"task": None, "harness": benchmark.harness or name})
            assert asked == benchmark.model_copy(update={"task": None, "harness": benchmark.harness or name})


@pytest.mark.parametrize("name", [*RUNS, "tables_2_3_4"])
def test_paper_recipes_share_their_four_tasks(name: str) -> None:
    assert raw(name)["tasks"] == raw("table_1")["tasks"]


# ---- what they read --------------------------------------------------------------------------------------------------


def tasks_of(name: str) -> dict[str, Task]:
    """Tasks of a grid with the stand-in data, with room for all examples."""
    specs = load_compare_recipe(path_of(name)).tasks
    as_run = Recipe(model="unused", tasks=specs, evaluation=Evaluation(validation_examples=4, test_examples=4))
    return {task: load_task(as_run, task) for task in specs}


def numbers(task: Task) -> dict[str, list[int]]:
    """The rows of each source that a task has in any split."""
    found: dict[str, list[int]] = {}
    for split in ("train", "validation", "test"):
        for place in task.splits[split]:
            found.setdefault(place["source"], []).extend(place["rows"])
    return {source: sorted(rows) for source, rows in found.items()}


@pytest.mark.usefixtures("stand_ins")
def test_paper_tasks_take_the_rows_that_their_filters_name() -> None:
    tasks = tasks_of("table_1")
    for source, rows in numbers(tasks["safety"]).items():
        if "wildguardmix" in source:  # of every four: refused harm, answered harmless, answered harm, prompt alone
            assert {row % 4 for row in rows} == {0, 1}
        else:
            assert {row % 4 for row in rows} == {0, 1, 2, 3}
    (languages,) = numbers(tasks["multilingual"]).values()
    assert {row % 5 for row in languages} == {0, 1, 2, 3}  # the fifth language is none of the paper's
    assert len(numbers(tasks["math"])) == 2 and len(numbers(tasks["instruction"])) == 1


@pytest.mark.usefixtures("stand_ins")
def test_paper_tasks_format_every_source_from_its_own_columns() -> None:
    hub = {
        "instruction": lambda i: HUB["allenai/tulu-3-sft-personas-instruction-following", None](i)["messages"],
        "multilingual": HUB["CohereLabs/aya_dataset", None],
    }
    tasks = tasks_of("table_1")
    for example in tasks["instruction"].train:
        question, answer = hub["instruction"](example.index)
        assert example.prompt == f"### Instruction:\n{question['content']}\n\n### Response:\n"
        assert example.completion == answer["content"]
    for example in tasks["multilingual"].train:
        row = hub["multilingual"](example.index)
        assert (example.prompt, example.completion) == (
            f"### Instruction:\n{row['inputs']}\n\n### Response:\n",
            row["targets"],
        )
    for example in tasks["safety"].train:
        if "wildjailbreak" in example.source:
            row = HUB["allenai/wildjailbreak", "train"](example.index)
            asked = row["adversarial"] if row["data_type"].startswith("adversarial") else row["vanilla"]
            assert asked in example.prompt and example.completion == row["completion"]
        else:
            row = HUB["allenai/wildguardmix", "wildguardtrain"](example.index)
            assert row["prompt"] in example.prompt and example.completion == row["response"]


@pytest.mark.usefixtures("stand_ins")
def test_paper_tasks_of_table_5_are_eleven_kinds_of_rows() -> None:
    tasks = tasks_of("table_5")
    assert len(tasks) == 11
    for number, language in enumerate(("french", "spanish", "german", "russian")):
        (rows,) = numbers(tasks[language]).values()
        assert {row % 5 for row in rows} == {number}
    for name, source in (
        ("coding", "OSS"),
        ("coding_evol", "Evol"),
        ("math_tir", "TIR"),
        ("jailbreak", "wildjailbreak"),
    ):
        assert all(source in place for place in numbers(tasks[name]))


# ---- they run --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", RUNS)
def test_paper_runs_run(name: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    recipe = load_recipe(path_of(name), (f"model={backbones[name]}", *SMALL, "evaluation.experts=false"))
    result = run(recipe, tmp_path / "run")
    record = read_json(result.folder / "round_002" / "merge.json")
    assert set(record["weights"]) == set(FOUR)
    assert sum(record["weights"].values()) == pytest.approx(1)
    scores = read_json(result.folder / "round_002" / "scores.json")
    assert {task: score["metric"] for task, score in scores.items()} == dict.fromkeys(FOUR, "token_accuracy")
    assert all(0 <= score["score"] <= 1 for score in scores.values())


def small_grid(name: str, backbones: dict[str, Path], *more: str) -> CompareRecipe:
    models = {model: str(backbones[model]) for model in load_compare_recipe(path_of(name)).models}
    return load_compare_recipe(
        path_of(name), (f"models={json.dumps(models)}", *SMALL, "seeds=[0]", "benchmarks={}", *more)
    )


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", GRIDS)
def test_paper_grids_run_their_own_method_on_two_tasks(name: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    one = {"llama-3.2-3b": str(backbones["llama-3.2-3b"])}
    metis = {"metis": raw(name)["methods"]["metis"] | {"protocols": ["many_shot"]}}
    only = (f"methods={json.dumps(metis)}", "task_sets={pair: {tasks: [instruction, safety]}}")
    recipe = small_grid(name, backbones, f"models={json.dumps(one)}", *only)
    (cell,) = compare(recipe, tmp_path / "grid").results["cells"]
    assert cell["status"] == "done", cell
    assert set(cell["scores"]) == {"instruction", "safety"}
    assert len(cell["rounds"]) == 2


@pytest.fixture
def benchmarks(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of the preset's benchmarks, too, with nothing asked of the Hub or of NLTK."""
    monkeypatch.setattr("datasets.load_dataset", load_benchmark)
    for module in ("manyshot.harness", "manyshot.compare_benchmarks"):
        monkeypatch.setattr(f"{module}.hub_answers", lambda: True)
    monkeypatch.setattr("manyshot.harness._has_punkt", lambda *, download: True)


@pytest.mark.usefixtures("benchmarks")
def test_paper_grid_is_scored_by_its_benchmarks(backbones: dict[str, Path], tmp_path: Path) -> None:
    """Those of the preset that our own task files are for."""
    known = load_compare_recipe(path_of("table_1")).benchmarks
    ours = {name: known[name].model_dump(mode="json") for name in ("xstest", "coqa", "pubmedqa")}
    metis = {"metis": raw("table_1")["methods"]["metis"] | {"protocols": ["post_hoc"]}}
    only = (f"methods={json.dumps(metis)}", "task_sets={pair: {tasks: [instruction, safety]}}")
    more = (f"benchmarks={json.dumps(ours)}", "harness={max_new_tokens: 3}")
    results = compare(small_grid("table_1", backbones, *only, *more), tmp_path / "grid").results
    (cell,) = results["cells"]
    assert cell["status"] == "done", cell
    assert {name: score["metric"] for name, score in cell["scores"].items()} == {
        "instruction": "token_accuracy",
        "xstest": "acc",
    }
    # two of the four prompts are safe, and the tiny model refuses nothing
    assert cell["scores"]["xstest"]["score"] == 0.5
    assert cell["normalized"]["tasks"]["safety"] == 1.0
    assert set(cell["retention"]) == {"coqa", "pubmedqa"}


@pytest.mark.slow
@pytest.mark.usefixtures("benchmarks")
def test_paper_grid_is_scored_by_the_preset(backbones: dict[str, Path], tmp_path: Path) -> None:
    """All fifteen benchmarks and both of retention, asked of the pretrained model, the experts and METIS."""
    metis = {"metis": raw("table_1")["methods"]["metis"] | {"protocols": ["post_hoc"]}}
    more = ("benchmarks={preset: metis}", "harness={max_new_tokens: 3, limit: 3}", f"methods={json.dumps(metis)}")
    results = compare(small_grid("table_1", backbones, *more), tmp_path / "grid").results
    (cell,) = results["cells"]
    assert cell["status"] == "done", cell
    assert {score["num_examples"] for score in cell["scores"].values()} == {3}
    assert list(cell["scores"]) == results["task_sets"]["all"]["scored"]
    assert set(cell["normalized"]["tasks"]) == set(FOUR)
    (reference,) = results["references"]
    for part in (cell, reference["pretrained"]):
        assert set(part["retention"]) == {"coqa", "pubmedqa"}
    # a reply is never empty and has no comma: every instruction is followed, by the expert as by the merged model
    assert cell["normalized"]["scored"]["ifeval"] == 1.0


@pytest.mark.slow
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("name", GRIDS)
def test_paper_grids_run_whole(name: str, backbones: dict[str, Path], tmp_path: Path) -> None:
    recipe = small_grid(name, backbones)
    results = compare(recipe, tmp_path / "grid").results
    assert {cell["status"] for cell in results["cells"]} == {"done"}
    assert {cell["model"] for cell in results["cells"]} == set(recipe.models)
    assert {cell["method"] for cell in results["cells"]} == set(recipe.methods)
