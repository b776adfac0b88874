"""Real task data, where MANYSHOT_REAL_DATA names its folder: every set loads, splits and becomes tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import MakeRecipe
from manyshot.errors import RecipeError
from manyshot.inputs import check_tasks
from manyshot.metrics import check_metric, find_metric
from manyshot.models import load_tokenizer
from manyshot.recipe_file import load_compare_recipe, recipe_from_mapping
from manyshot.runner import run
from manyshot.tasks import encode_all, load_task

LAPTOP_STUDY = Path(__file__).parents[1] / "recipes" / "study" / "laptop.yaml"
SETS = ("math/gsm8k", "math/svamp", "safety/refusal_pairs", "safety/coconot", "multilingual/xquad", "code/mbpp")


@pytest.mark.parametrize("name", SETS)
def test_real_set_loads_and_encodes(
    name: str, real_data: Path, recipe_mapping: dict[str, Any], base_folder: Path
) -> None:
    has_choices = name.startswith("safety/")
    recipe_mapping["tasks"]["real"] = {
        "train": str(real_data / f"{name}.train.jsonl"),
        "test": str(real_data / f"{name}.test.jsonl"),
        "metric": "choice_accuracy" if name == "safety/refusal_pairs" else "exact_match",
    }
    recipe = recipe_from_mapping(recipe_mapping, ["evaluation.test_examples=50", "evaluation.validation_examples=20"])
    task = load_task(recipe, "real")
    check_metric(find_metric(task.spec.metric, "real"), task.test, "real")
    assert (len(task.test), len(task.validation)) == (50, 20)
    assert (
        not {example.prompt for example in task.train} & {example.prompt for example in task.validation} or has_choices
    )
    encoded = encode_all(task.validation, load_tokenizer(base_folder), task, "validation", 4096, "completion")
    assert all(example.num_counted > 0 and not example.truncated for example in encoded)


def test_run_on_real_math_and_safety_merges_in_rounds(
    real_data: Path, make_recipe: MakeRecipe, recipe_mapping: dict[str, Any], tmp_path: Path
) -> None:
    recipe_mapping["tasks"] = {
        "math": {"data": str(real_data / "math" / "svamp.train.jsonl"), "metric": "exact_match"},
        "safety": {"data": str(real_data / "safety" / "refusal_pairs.train.jsonl"), "metric": "choice_accuracy"},
    }
    result = run(make_recipe("local_update.max_length=128", "operator.temperature=1"), tmp_path / "run")
    losses = {name: entry["multi_task_loss"] for name, entry in result.scores["rounds"].items()}
    assert losses["2"] < losses["1"] < result.scores["pretrained"]["multi_task_loss"]


def test_the_laptop_study_reads_its_tasks_from_the_folder_of_the_data(
    real_data: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(real_data)
    recipe = load_compare_recipe(LAPTOP_STUDY, [f"models.smollm2-135m={base_folder}"])
    names = tuple(recipe.sets["eleven"].tasks)
    assert len(names) == 11
    run_recipe = recipe.run_recipe("smollm2-135m", names, 0, recipe.shared, "many_shot")
    tasks = check_tasks(run_recipe)
    assert [task.name for task in tasks] == list(names)
    assert all((len(task.validation), len(task.test)) == (8, 28) for task in tasks)
    by_name = {task.name: task for task in tasks}
    pairs = {(example.meta or {})["pair"] for example in by_name["multilingual"].train}
    assert pairs == {
        f"{a}-{b}" for x in ("French", "German", "Spanish", "Russian") for a, b in (("English", x), (x, "English"))
    }
    with pytest.raises(RecipeError, match=r"tasks\.math\.train: no such file or folder: math/gsm8k"):
        monkeypatch.chdir(base_folder)
        load_compare_recipe(LAPTOP_STUDY)
