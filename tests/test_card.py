"""The model card: what the Hub's own library reads of it, and that text of recipes and models stays text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from manyshot.base_model import DEMO_MODEL, BaseModel
from manyshot.card import card_text
from manyshot.card_text import fenced, front_matter, is_hub_id, metadata, origin_of, public_recipe, table
from manyshot.executors import LocalExecutor
from manyshot.progress import Progress
from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping
from manyshot.rundir import RunFolder
from manyshot.steps import Run
from manyshot.tasks import Task

HOSTILE = '</script><img src=x onerror=alert(1)>|`"\n---\nlicense: mit'


def score(value: float, metric: str = "exact_match") -> dict[str, Any]:
    return {"metric": metric, "score": value, "stderr": 0.05, "num_examples": 32}


def entry(scores: dict[str, float], loss: float) -> dict[str, Any]:
    return {
        "scores": {task: score(value) for task, value in scores.items()},
        "losses": {task: {"loss": loss} for task in scores},
        "multi_task_loss": loss,
    }


@pytest.fixture
def summary() -> dict[str, Any]:
    """What a run of two tasks and two rounds has measured after round 1."""
    gaps = {"loss_gaps": {"math": 0.5, "code": 0.25}, "weights": {"math": 0.6, "code": 0.4}, "kept_share": 0.75}
    return {
        "pretrained": entry({"math": 0.1, "code": 0.2}, 3.0),
        "experts": {"scores": {"math": score(0.5), "code": score(0.4)}},
        "post_hoc": entry({"math": 0.3, "code": 0.2}, 2.0),
        "rounds": {"1": entry({"math": 0.475, "code": 0.2}, 1.5) | gaps},
    }


def make_run(tmp_path: Path, model: str = "owner/base-model", **tasks: Any) -> Run:
    """A run that only the card looks at."""
    (tmp_path / "math.jsonl").touch()
    mapping = {
        "model": model,
        "tasks": tasks or {"math": {"train": str(tmp_path / "math.jsonl")}, "code": {"data": "owner/code-data"}},
        "protocol": {"rounds": 2, "local_steps": 10},
        "evaluation": {"post_hoc": True},
    }
    recipe: Recipe = recipe_from_mapping(mapping)
    loaded = tuple(Task(name, spec, (), (), (), {}) for name, spec in recipe.tasks.items())
    base = BaseModel(model, tmp_path, "digest")
    return Run(recipe, RunFolder(tmp_path), base, loaded, LocalExecutor(), Progress())


def read(text: str) -> tuple[dict[str, Any], str]:
    """(metadata, text) as the Hub's library reads them."""
    card = ModelCard(text)
    return card.data.to_dict(), card.text


def test_card_has_the_keys_of_the_hub_and_its_library_reads_the_results(tmp_path: Path, summary: Any) -> None:
    text = card_text(make_run(tmp_path), 1, summary)
    found, _ = read(text)
    assert found["base_model"] == ["owner/base-model"]
    assert (found["base_model_relation"], found["library_name"]) == ("merge", "transformers")
    assert (found["pipeline_tag"], found["datasets"]) == ("text-generation", ["owner/code-data"])
    assert found["tags"] == ["merge", "manyshot", "manyshot-metis"]
    name, results = model_index_to_eval_results(yaml.safe_load(text.split("---\n")[1])["model-index"])
    assert name == "base-model, merged from 2 tasks"
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in results] == [
        ("math", "exact_match", 0.475),
        ("code", "exact_match", 0.2),
    ]
    assert all(one.source_name and one.source_url and one.dataset_split == "test" for one in results)
    assert len({one.unique_identifier for one in results}) == 2  # none overwrites another


def test_card_tells_what_was_merged_how_it_scores_and_where_it_falls_short(tmp_path: Path, summary: Any) -> None:
    _, text = read(card_text(make_run(tmp_path), 1, summary))
    assert "round 1 of 2" in text and "10 local steps per task" in text and "LoRA of rank 16" in text
    assert "| math | math.jsonl | 0 | exact\\_match |" in text and "| code | owner/code-data | 0 |" in text
    row = next(line for line in text.splitlines() if line.startswith("| math | exact"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    spread = " ± 0.050"
    assert cells[2:] == [f"0.100{spread}", f"0.500{spread}", f"0.300{spread}", f"0.475{spread}", "0.95", "32"]
    assert "0.725 on average" in text and "0.500 on its worst task (code)" in text
    assert "1.500; of the base model: 3.000" in text
    limits = text.split("## Limits")[1].split("## Use")[0]
    assert "code (0.50)" in limits and "math" not in limits and "32 test examples" in limits
    assert "licence is not known here" in limits
    assert str(tmp_path) not in text


def test_card_takes_licence_and_languages_from_the_base_models_own_card(tmp_path: Path, summary: Any) -> None:
    said = {"license": "other", "license_name": "gemma", "license_link": "https://x", "language": ["en", "de", 7]}
    (tmp_path / "README.md").write_text(front_matter(said) + "# Base\n", "utf-8")
    found, text = read(card_text(make_run(tmp_path), 1, summary))
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "gemma", "https://x")
    assert found["language"] == ["en", "de"]
    assert "not known here" not in text


@pytest.mark.parametrize("damaged", ["---\nlicense: [\n---\n", "---\n- a\n---\n", "none", "---\nlicense: {a: 1}\n---"])
def test_a_damaged_card_of_the_base_says_nothing(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "README.md").write_text(damaged, "utf-8")
    origin = origin_of("owner/base", BaseModel("owner/base", tmp_path, ""))
    assert (dict(origin.license), list(origin.languages)) == ({}, [])


def test_the_demo_model_has_its_licence_and_a_local_one_no_id(tmp_path: Path) -> None:
    demo = origin_of(DEMO_MODEL, BaseModel("HuggingFaceTB/SmolLM2-135M-Instruct", tmp_path, ""))
    assert metadata(demo, "metis")["license"] == "apache-2.0" and demo.hub_id == demo.name
    local = origin_of(str(tmp_path), BaseModel(str(tmp_path), tmp_path, ""))
    assert (local.hub_id, local.name) == (None, tmp_path.name)
    assert "base_model" not in metadata(local, "mean")


def test_text_of_recipes_models_and_data_cannot_break_out_of_the_card(tmp_path: Path, summary: Any) -> None:
    run = make_run(tmp_path)
    template = {"template": f"```\n{HOSTILE}\n{{prompt}}"}
    tasks = {name: spec.model_copy(update=template) for name, spec in run.recipe.tasks.items()}
    recipe = run.recipe.model_copy(update={"tasks": tasks})
    renamed = {**summary, "rounds": {"1": summary["rounds"]["1"]}}
    for model in (renamed["rounds"]["1"], renamed["pretrained"], renamed["post_hoc"], renamed["experts"]):
        for one in model["scores"].values():
            one["metric"] = HOSTILE
    hostile_base = replace(run.base, name=HOSTILE)
    said = {"license": HOSTILE, "language": [HOSTILE]}
    (tmp_path / "README.md").write_text(front_matter(said), "utf-8")
    text = card_text(replace(run, recipe=recipe, base=hostile_base), 1, renamed)
    found, body = read(text)
    assert found["license"] != "mit" and found["model-index"][0]["results"][0]["metrics"][0]["type"] == HOSTILE
    prose, code = body.split("## Recipe")
    assert "<img" not in prose and "</script>" not in prose and '`"' not in prose.replace('\\`"', "")
    fence = code.strip().splitlines()[0].removesuffix("yaml")
    assert len(fence) > 3 and code.strip().endswith(fence)  # the code block ends where it should
    assert fence not in code.strip()[len(fence) + 4 : -len(fence)]


def test_fences_and_tables_hold_whatever_is_in_them() -> None:
    assert fenced("a\n````\nb", "yaml") == "`````yaml\na\n````\nb\n`````"
    assert table(["a|b"], [["<b>\n*x*"]]) == "| a&#124;b |\n| --- |\n| &lt;b&gt; \\*x\\* |"


def test_recipes_in_cards_tell_no_paths_and_no_trackers() -> None:
    recipe = {
        "model": "/home/me/base",
        "tasks": {"a": {"train": [{"data": "/me/a.jsonl"}], "test": "/me/b.jsonl", "template": "/think {prompt}"}},
        "trackers": {"names": ["wandb"], "project": "secret"},
    }
    found = yaml.safe_load(public_recipe(recipe))
    task = {"train": [{"data": "a.jsonl"}], "test": "b.jsonl", "template": "/think {prompt}"}
    assert found == {"model": "base", "tasks": {"a": task}}


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", True), ("owner/name-1.5_b", True), ("demo:math", False), ("/home/x", False), ("a/b/c", False),
     ("owner/x.gguf", False), ("a--b/c", False), ("", False), ("x" * 97, False), ("ä/b", False)],
)  # fmt: skip
def test_ids_of_the_hub_are_told_from_all_else(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected
