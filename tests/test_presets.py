"""Presets: what a recipe leaves open for METIS is filled in, what it says is not, and nothing else depends on them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from conftest import TASKS
from manyshot import presets
from manyshot.content import keyed_recipe
from manyshot.errors import RecipeError, RunFolderError
from manyshot.operators import Mean, Metis
from manyshot.presets import PRESETS, Fill
from manyshot.recipe import LocalUpdate, Merge, Recipe
from manyshot.recipe_file import (
    compare_recipe_from_mapping,
    load_recipe,
    merge_recipe_from_mapping,
    recipe_from_mapping,
    to_yaml,
    tune_recipe_from_mapping,
)
from manyshot.run_identity import differences
from manyshot.rundir import content_key, read_json
from manyshot.runner import run
from manyshot.starter import starter_recipe
from manyshot.yaml_text import read_yaml
from run_helpers import Runs

Json = dict[str, Any]
RAW: Json = {"model": "some/model", "tasks": {"a": {"data": "demo:math"}, "b": {"data": "demo:safety"}}}
PLAIN = Merge()


def filled(section: str, preset: str = "default") -> Json:
    """What a preset fills in, in one section."""
    return {key: value for fill in PRESETS[preset] if fill.section == section for key, value in fill.values.items()}


DEFAULT, DEFAULT_MERGE = Metis(**filled("operator")), Merge(**filled("merge"))


def make(*overrides: str, **raw: Any) -> Recipe:
    return recipe_from_mapping(RAW | raw, overrides)


def test_presets_hold_these_values() -> None:
    """The values themselves, once: what changes them means to."""
    assert filled("operator") == {"gap": "relative", "temperature": 0.5, "weight_memory": 0.5, "mask": False}
    assert filled("merge") == {
        **{"reference": "start", "outer_optimizer": "nesterov"},
        **{"outer_momentum": 0.7, "outer_look_ahead": "between_rounds"},
    }
    assert filled("local_update") == {}
    assert PRESETS["paper"] == ()  # declared: test_recipe.py


def test_presets_fill_in_settings_that_there_are_with_other_values_than_declared() -> None:
    declared = {
        "operator": dataclasses.asdict(Metis()),
        "merge": PLAIN.model_dump(),
        "local_update": LocalUpdate().model_dump(),
    }
    for fill in (fill for fills in PRESETS.values() for fill in fills):
        for key, value in fill.values.items():
            assert declared[fill.section][key] != value, key
        assert {*fill.unless, *fill.beside} <= declared[fill.section].keys()
        assert fill.why


@pytest.mark.parametrize("raw", [{}, {"operator": "metis"}, {"operator": {"name": "metis"}}, {"preset": None}], ids=str)
def test_preset_of_metis_without_further_keys_is_the_default(raw: Json) -> None:
    recipe = make(**raw)
    assert (recipe.method, recipe.merge) == (DEFAULT, DEFAULT_MERGE)
    assert recipe.local_update == LocalUpdate(**filled("local_update"))


@pytest.mark.parametrize("raw", [{"operator": "metis"}, {}, {"operator": {"name": "metis"}}], ids=str)
def test_preset_paper_is_as_declared(raw: Json) -> None:
    for recipe in (make(preset="paper", **raw), make("preset=paper", **raw)):
        assert (recipe.method, recipe.merge, recipe.local_update) == (Metis(), PLAIN, LocalUpdate())


@pytest.mark.parametrize("name", ["mean", "ties", "consensus_ta"])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_touch_no_other_operator(name: str, preset: str) -> None:
    recipe, alone = make(operator=name, preset=preset), make(operator=name)
    assert recipe == alone
    assert (recipe.merge, recipe.local_update) == (PLAIN, LocalUpdate())


def test_preset_that_there_is_not_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"preset: Input should be 'default' or 'paper', found 'papr'"):
        make(preset="papr")
    methods = {"metis": {"operator": "metis", "preset": "papr"}}
    with pytest.raises(RecipeError, match=r"methods.metis.preset: Input should be 'default' or 'paper', found 'papr'"):
        compare_recipe_from_mapping({"models": {"m": "some/model"}, "tasks": RAW["tasks"], "methods": methods})
    with pytest.raises(RecipeError, match="there is none of that name; did you mean 'paper'"):
        starter_recipe("papr")


# ---- what a recipe says itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "expected"),
    [
        ({"gap": "absolute"}, {"mask": DEFAULT.mask}),  # λ is in the gaps' unit
        ({"temperature": 3.0}, {"temperature": 3.0}),
        ({"temperature": "auto"}, {"temperature": "auto"}),
        ({"mask_threshold": 0.1}, {"mask": True, "mask_threshold": 0.1}),
        ({"vote": "unweighted"}, {"mask": True, "vote": "unweighted"}),
        ({"mask": "soft"}, {"mask": "soft"}),
        ({"mask": True}, {"mask": True}),
    ],
    ids=str,
)
def test_preset_leaves_alone_what_the_operator_says_and_what_goes_with_it(operator: Json, expected: Json) -> None:
    whole = {} if "gap" in operator else filled("operator")
    assert make(operator={"name": "metis"} | operator).method == Metis(**(whole | operator | expected))


@pytest.mark.parametrize(
    "merge",
    [
        {"reference": "start"},
        {"reference": "pretrained"},
        {"reference": "start", "outer_optimizer": "adam", "outer_step_size": 1e-4},
        {"space": "factors"},
    ],
    ids=str,
)
def test_preset_leaves_alone_a_merge_of_another_form(merge: Json) -> None:
    recipe = make(merge=merge)
    assert recipe.merge == Merge(**merge)
    assert recipe.method == DEFAULT


def test_preset_fills_in_the_rest_of_its_own_form_of_merge() -> None:
    for key, value in {"outer_momentum": 0.35, "outer_step_size": 0.5, "on_regression": "stop"}.items():
        assert make(f"merge.{key}={value}").merge == Merge(**(filled("merge") | {key: value}))


def test_preset_of_one_round_merges_plainly() -> None:
    recipe = make("protocol.rounds=1")
    assert (recipe.method, recipe.merge) == (DEFAULT, PLAIN)


def test_preset_with_an_override_of_the_mask_has_a_mask() -> None:
    assert make(overrides={"*.mlp.*": {"mask_threshold": 0.1}}).method.mask is True  # type: ignore[attr-defined]
    assert make(overrides={"*": {"name": "consensus_ta", "mask_threshold": 0.1}}).method == DEFAULT


def test_preset_of_local_updates_is_for_adapters_that_are_all_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "default", (Fill("local_update", {"adapter_start": "averaged"}, "to see"),))
    assert make().local_update.adapter_start == "averaged"
    assert make("local_update.adapter_start=svd").local_update.adapter_start == "svd"
    for other in ("local_update.method=full", "tasks.a.rank=4", "merge.space=factors", "protocol.rounds=1"):
        assert make(other).local_update.adapter_start == "fresh"


def test_preset_leaves_alone_what_python_says_in_objects() -> None:
    whole = {"model": "m", "tasks": RAW["tasks"]}
    recipe = Recipe(**whole, operator=Metis())
    assert (recipe.method, recipe.merge) == (Metis(), PLAIN)
    assert Recipe(**whole, operator="metis", merge=Merge(on_regression="stop")).merge == Merge(on_regression="stop")


# ---- what is resolved ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_resolved_recipe_says_everything_itself_under_any_preset(preset: str) -> None:
    recipe = make(preset=preset)
    raw = read_yaml(to_yaml(recipe))
    assert "preset" not in raw
    for other in PRESETS:
        assert recipe_from_mapping(raw | {"preset": other}) == recipe


def test_content_does_not_depend_on_how_settings_came_about() -> None:
    def named(recipe: Recipe) -> str:
        return content_key(keyed_recipe(recipe.model_dump(mode="json")))

    explicit = {"operator": {"name": "metis"} | filled("operator"), "merge": filled("merge")}
    assert named(make()) == named(make(**explicit, preset="paper")) != named(make(preset="paper"))


def test_run_of_the_papers_settings_resumes_from_its_own_recipe_and_is_no_run_of_the_default(
    base_folder: Path, tmp_path: Path
) -> None:
    """As for a folder from before there were presets: its recipe.yaml has no key of that name."""
    runs = Runs(base_folder, tmp_path, tasks=TASKS[:2])
    small = ("evaluation.validation_examples=2", "evaluation.test_examples=2", "evaluation.experts=true")
    begun = runs.get(*small, "protocol.local_steps=2")
    folder, scores = begun.folder, begun.scores
    assert "preset" not in read_yaml((folder / "recipe.yaml").read_text("utf-8"))
    again = run(load_recipe(folder / "recipe.yaml"), folder, resume=True)
    assert again.scores == scores and len(list(folder.glob("round_*"))) == 3

    now = runs.recipe(*small, "protocol.local_steps=2", "preset=default", "evaluation.post_hoc=true")
    with pytest.raises(RunFolderError, match=r"merge.outer_momentum: 0.0 -> .*merge.reference: pretrained -> start"):
        run(now, folder, resume=True)
    # the default goes through; the post-hoc merge beside it takes no step ahead of rounds that it does not have
    done = run(now, tmp_path / "default")
    first, once = (read_json(done.folder / name / "merge.json") for name in ("round_001", "post_hoc"))
    assert once["merged_norm"] <= max(once["task_vector_norms"].values())
    assert (done.folder / "round_001" / "outer_state.safetensors").exists()
    assert not (done.folder / "post_hoc" / "outer_state.safetensors").exists()
    assert first["weights"].keys() == once["weights"].keys()


# ---- comparisons, searches, merges, the starter ----------------------------------------------------------------------


def compare_with(*overrides: str, **methods: Json) -> Any:
    raw = {"models": {"m": "some/model"}, "tasks": RAW["tasks"], "seeds": [0], "methods": methods}
    return compare_recipe_from_mapping(raw, overrides)


def test_compare_has_a_preset_for_all_and_one_for_each_method() -> None:
    methods = {
        "mine": {"operator": "metis"},
        "theirs": {"operator": "metis", "preset": "paper"},
        "mean": {"operator": "mean"},
    }
    recipe = compare_with(**methods)
    mine, theirs, mean = (recipe.own(name) for name in methods)
    assert (mine.operator, mine.merge) == (DEFAULT, DEFAULT_MERGE)
    assert (theirs.operator, theirs.merge) == (Metis(), PLAIN)
    assert (mean.operator, mean.merge) == (Mean(), PLAIN)
    assert compare_with("preset=paper", **methods).own("mine") == theirs
    assert compare_recipe_from_mapping(read_yaml(to_yaml(recipe))) == recipe
    assert compare_recipe_from_mapping(read_yaml(to_yaml(recipe)) | {"preset": "paper"}) == recipe


def test_compare_merges_once_without_momentum_and_a_grid_counts_as_said() -> None:
    recipe = compare_with(
        mine={"operator": "metis", "grid": {"mask_threshold": [0.1, 0.2]}},
        post={"operator": "metis", "protocols": ["post_hoc"]},
    )
    own = recipe.own("mine")
    assert own.operator == Metis(**(filled("operator") | {"mask": True}))
    runs = {shot: recipe.run_recipe("m", ("a", "b"), 0, own, shot).merge for shot in ("post_hoc", "many_shot")}
    assert runs["many_shot"] == DEFAULT_MERGE
    assert differences(PLAIN.model_dump(), runs["post_hoc"].model_dump()) == ["reference: pretrained -> start"]
    assert recipe.own("post").merge == PLAIN
    around = compare_recipe_from_mapping(
        {"models": {"m": "some/model"}, "tasks": RAW["tasks"], "merge": {"reference": "pretrained"}}
        | {"methods": {"mine": {"operator": "metis"}, "less": {"ablation_of": "mine", "set": {"gap": "none"}}}}
    )
    assert around.own("mine").merge == around.own("less").merge == PLAIN


def test_search_fills_in_what_it_does_not_search_for() -> None:
    def searched(rounds: str, name: str) -> Any:
        search = {"rounds": rounds, "parameters": {name: [0.1, 0.2]}}
        return tune_recipe_from_mapping(RAW | {"search": search})

    recipe = searched("all", "operator.temperature")
    assert (recipe.method, recipe.merge) == (DEFAULT, DEFAULT_MERGE)
    assert recipe.trial_recipe.merge == DEFAULT_MERGE
    assert searched("all", "merge.outer_momentum").merge == DEFAULT_MERGE
    masked = searched("post_hoc", "operator.mask_threshold")
    assert (masked.method.mask, masked.merge) == (True, PLAIN)


def test_merge_recipe_takes_the_operators_part() -> None:
    raw = {"base": "some/base", "experts": {"a": {"path": "x", "weight": 1}, "b": {"path": "y", "weight": 1}}}
    assert merge_recipe_from_mapping(raw | {"operator": "metis"}).method == DEFAULT
    assert merge_recipe_from_mapping(raw | {"operator": "metis", "preset": "paper"}).method == Metis()
    assert merge_recipe_from_mapping(raw).method.name == "task_arithmetic"


@pytest.mark.parametrize("preset", PRESETS)
def test_starter_recipe_is_the_preset_with_every_key(preset: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(starter_recipe(preset), "utf-8")
    recipe, expected = load_recipe(tmp_path / "recipe.yaml"), make(preset=preset)
    assert (recipe.method, recipe.merge, recipe.local_update) == (
        expected.method,
        expected.merge,
        expected.local_update,
    )
    raw = read_yaml(starter_recipe(preset))
    assert raw["preset"] == preset
    del raw["operator"], raw["merge"]
    assert recipe_from_mapping(raw).merge == expected.merge  # deleting what is not changed changes nothing
