"""The studies in recipes/study: they load beside their data, say what they cost, and run, a small slice of each."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from manyshot.compare_plan import plan_compare
from manyshot.compare_recipe import CompareRecipe
from manyshot.comparison import CompareResult, compare
from manyshot.operators import Metis
from manyshot.presets import filled
from manyshot.recipe_file import compare_recipe_from_mapping, load_compare_recipe
from run_helpers import ROWS, write_data

pytestmark = pytest.mark.usefixtures("no_figures")

Json = dict[str, Any]
FOLDER = Path(__file__).parents[1] / "recipes" / "study"
STUDIES = sorted(file.stem for file in FOLDER.glob("*.yaml"))
BETTER = ("better", "better_momentum", "better_rounds", "better_screen", "better_stress")


def raw(name: str) -> Json:
    found: Json = yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))
    return found


def files_of(value: object) -> Iterator[str]:
    """Every data file that a part of a recipe names."""
    if isinstance(value, str) and value.endswith(".jsonl"):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from files_of(part)


def load(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> CompareRecipe:
    """The recipe as it is read from the folder of its data."""
    for file in files_of(raw(name)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    monkeypatch.chdir(folder)
    return load_compare_recipe(FOLDER / f"{name}.yaml")


@pytest.mark.parametrize("name", STUDIES)
def test_studies_load_beside_their_data_and_begin_with_their_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(name, tmp_path, monkeypatch).models == {"smollm2-135m": "demo:smollm2-135m-instruct"}
    first = (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()[0]
    assert first.startswith(f"# manyshot compare recipes/study/{name}.yaml --workers 2")


@pytest.mark.parametrize("name", BETTER)
def test_studies_say_how_many_steps_they_take(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_compare(load(name, tmp_path, monkeypatch))
    said = re.search(r"# ([\d,]+) steps by `--plan`", (FOLDER / f"{name}.yaml").read_text("utf-8"))
    assert said is not None
    assert int(said[1].replace(",", "")) == plan["steps"]["shared"]


def test_the_finalists_are_asked_alike_and_the_default_is_one_of_them() -> None:
    final = raw("better")["methods"]
    for study in ("better_stress", "better_rounds"):
        for name, method in raw(study)["methods"].items():
            assert method | {"protocols": None} == final[name] | {"protocols": None}, (study, name)
    assert {key: final["metis"][key] for key in ("operator", "merge")} == filled({"operator": "metis"})
    paper = {key: value for key, value in final["metis_paper"]["operator"].items() if key != "name"}
    assert Metis(**paper) == Metis()  # as it is declared; its grid has the paper's temperature


# ---- a small slice of each -------------------------------------------------------------------------------------------

KINDS = {"math": "letters", "safety": "numbers"}


def tiny_task(spec: Json, data: Path) -> Json:
    """A study's task on a file of the tests, with everything that the study says of it beside its data."""
    kind = KINDS["safety" if "safety/" in str(spec) else "math"]
    paths = {split: str(data / f"{kind}.{split}.jsonl") for split in ROWS}
    kept = {key: value for key, value in spec.items() if key in ("metric", "columns", "loss_scale", "steps_share")}
    found: Json = paths | kept
    for split in ("train", "test"):
        if isinstance(spec[split], dict) and spec[split].get("shuffle_completions"):
            found[split] = {"data": paths[split], "shuffle_completions": True}
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for kind in KINDS.values():
        write_data(folder, kind)
    return folder


def run_slice(
    name: str, base: Path, data: Path, output: Path, methods: tuple[str, ...], sets: dict[str, list[str]]
) -> CompareResult:
    """Some methods on some task sets, as the study says them, with the tests' model, data and few steps."""
    study = raw(name)
    wanted = dict.fromkeys(task for tasks in sets.values() for task in tasks)
    small = {
        "models": {"tiny": str(base)},
        "tasks": {task: tiny_task(study["tasks"][task], data) for task in wanted},
        "task_sets": {task_set: study["task_sets"][task_set] | {"tasks": tasks} for task_set, tasks in sets.items()},
        "methods": {method: study["methods"][method] for method in methods},
        "baseline": "mean" if "mean" in methods else None,
        "seeds": [0],
        "protocol": {"rounds": 2, "local_steps": 4},
        "local_update": {"rank": 2, "alpha": 4, "batch_size": 4, "learning_rate": 0.01, "max_length": 32},
        "evaluation": {"validation_examples": 4, "test_examples": 4},
    }
    result = compare(compare_recipe_from_mapping(copy.deepcopy(study | small)), output)
    assert [cell.get("error") for cell in result.results["cells"]] == [None] * len(result.results["cells"])
    return result


def test_the_stress_study_runs_and_says_what_bad_tasks_cost(base_folder: Path, data: Path, tmp_path: Path) -> None:
    sets = {
        "clean": ["math", "safety"],
        "loud": ["math_times_100", "safety"],
        "twice": ["math", "math_again", "safety"],
        "noisy": ["math", "safety", "noise"],
        "short": ["math_short", "safety"],
    }
    methods = ("mean", "metis")
    result = run_slice("better_stress", base_folder, data, tmp_path / "out", methods, sets)
    text = (tmp_path / "out" / "tables" / "bad_tasks.csv").read_text("utf-8")
    assert len(text.splitlines()) == 1 + 4 * 3  # the mean once and in rounds, METIS in rounds
    caption = (tmp_path / "out" / "tables" / "bad_tasks.md").read_text("utf-8")
    assert "loud: clean with math_times_100 in place of math" in caption.replace("\\_", "_").replace("&#95;", "_")
    losses = {
        (one["task_set"], task): loss
        for one in result.results["references"]
        for task, loss in one["pretrained"]["losses"].items()
    }
    assert losses["loud", "math_times_100"] == pytest.approx(100 * losses["clean", "math"])
    assert losses["twice", "math_again"] == losses["clean", "math"]
    steps = {cell["task_set"]: cell["train_steps"] for cell in result.results["cells"]}
    assert steps == {"clean": 8, "loud": 8, "twice": 12, "noisy": 12, "short": 4 + 2}


def test_the_finalists_run_on_tasks_that_contradict_each_other(base_folder: Path, data: Path, tmp_path: Path) -> None:
    result = run_slice("better", base_folder, data, tmp_path / "out", ("metis",), {"conflict": ["safety", "complying"]})
    (cell,) = result.results["cells"]
    assert set(cell["share"]["tasks"]) == {"safety", "complying"}


def test_the_screening_runs_methods_that_train_in_their_own_way(base_folder: Path, data: Path, tmp_path: Path) -> None:
    methods = ("mean", "own_kept", "by_weight")
    result = run_slice("better_screen", base_folder, data, tmp_path / "out", methods, {"unlike": ["math", "safety"]})
    settings = {cell["method"]: cell["settings"] for cell in result.results["cells"]}
    assert settings["own_kept"] == {"local_update.adapter_start": "own", "local_update.optimizer_state": "kept"}
    assert settings["by_weight"]["protocol.allocation"] == "gap"
    assert all(cell["validation_share"] is not None for cell in result.results["cells"])
