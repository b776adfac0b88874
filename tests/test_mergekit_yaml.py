"""mergekit's YAML: what each key means here, and what is refused by key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from manyshot.errors import RecipeError
from manyshot.merge_recipe import MergeRecipe
from manyshot.mergekit_yaml import expert_names
from manyshot.operators import Dare, Mean, TaskArithmetic, Ties
from manyshot.recipe_file import load_merge_recipe


def config(method: str, models: dict[str, dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """A mergekit file: two models with weights, a base for the methods that need one."""
    models = {"some/one": {"weight": 0.5}, "some/two": {"weight": 1.5}} if models is None else models
    base = {} if method == "linear" else {"base_model": "some/base"}
    listed = [{"model": model} | ({"parameters": own} if own else {}) for model, own in models.items()]
    return {"merge_method": method, "models": listed} | base | more


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(raw: dict[str, Any], *overrides: str) -> MergeRecipe:
    Path("mk.yaml").write_text(yaml.safe_dump(raw, sort_keys=False), "utf-8")
    return load_merge_recipe(Path("mk.yaml"), overrides)


def refusal(raw: dict[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        load(raw)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def weights(recipe: MergeRecipe) -> dict[str, float]:
    return dict(zip(recipe.experts, recipe.given_weights(), strict=True))


# ---- methods ---------------------------------------------------------------------------------------------------------


def test_linear_is_the_mean_with_shares_and_the_first_model_as_base(folder: Path) -> None:
    recipe = load(config("linear"))
    assert recipe.method == Mean()
    assert recipe.base == "some/one"
    assert weights(recipe) == {"one": 0.25, "two": 0.75}
    assert load(config("linear", parameters={"normalize": True})) == recipe


def test_linear_takes_its_base_as_a_model_like_the_others(folder: Path) -> None:
    models = {"some/base": {"weight": 2}, "some/one": {"weight": 1}, "some/two": {"weight": 1}}
    recipe = load(config("linear", models, base_model="some/base"))
    assert weights(recipe) == {"base": 0.5, "one": 0.25, "two": 0.25}
    assert recipe.experts["base"].path == recipe.base == "some/base"


def test_linear_without_normalize_needs_weights_that_sum_to_one(folder: Path) -> None:
    unlike = {"some/one": {"weight": 0.25}, "some/two": {"weight": 0.75}}
    recipe = load(config("linear", unlike, parameters={"normalize": False}))
    assert weights(recipe) == {"one": 0.25, "two": 0.75}
    message = refusal(config("linear", parameters={"normalize": False}))
    assert "mk.yaml: parameters.normalize: false with weights that do not sum to 1" in message


def test_task_arithmetic_multiplies_by_weight_and_lambda(folder: Path) -> None:
    recipe = load(config("task_arithmetic"))
    assert recipe.method == TaskArithmetic(scaling=1.0)  # mergekit's lambda, not our default
    assert (recipe.base, weights(recipe)) == ("some/base", {"one": 0.5, "two": 1.5})
    assert load(config("task_arithmetic", parameters={"lambda": 0.7})).method == TaskArithmetic(scaling=0.7)


@pytest.mark.parametrize("method", ["task_arithmetic", "dare_linear"])
def test_normalize_divides_the_multipliers_by_their_sum(folder: Path, method: str) -> None:
    recipe = load(config(method, parameters={"normalize": True}))
    assert weights(recipe) == {"one": 0.25, "two": 0.75}
    opposed = {"some/one": {"weight": 1}, "some/two": {"weight": -1}}
    assert weights(load(config(method, opposed))) == {"one": 1, "two": -1}
    message = refusal(config(method, opposed, parameters={"normalize": True}))
    assert "mk.yaml: parameters.weight: the weights sum to 0, and normalize divides by that" in message


def test_ties_density_is_one_unless_given_and_normalize_is_its_own_division(folder: Path) -> None:
    assert load(config("ties")).method == Ties(density=1.0, scaling=1.0, trim_scope="tensor")
    given = load(config("ties", parameters={"density": 0.3, "lambda": 1.5, "normalize": True, "int8_mask": True}))
    assert given.method == Ties(density=0.3, scaling=1.5)
    assert weights(given) == {"one": 0.5, "two": 1.5}  # multipliers: the operator divides where tasks agree
    message = refusal(config("ties", parameters={"normalize": False}))
    assert "mk.yaml: parameters.normalize: ties always divides by the agreeing weights here" in message


def test_dare_linear_rescales_unless_told_otherwise_and_says_how_ours_differs(folder: Path) -> None:
    recipe = load(config("dare_linear", parameters={"density": 0.5, "lambda": 0.8}))
    assert recipe.method == Dare(density=0.5, scaling=0.8, then="task_arithmetic", rescale=True)
    assert len(recipe.notes) == 1 and "mergekit restores each L1 norm" in recipe.notes[0]
    plain = load(config("dare_linear", parameters={"density": 0.5, "rescale": False}))
    assert plain.method == Dare(density=0.5, scaling=1.0, then="task_arithmetic", rescale=False)
    assert plain.notes == ()
    assert load(config("dare_linear")).method == Dare(density=1.0, scaling=1.0)


def test_dare_ties_elects_signs_and_needs_normalize_said(folder: Path) -> None:
    recipe = load(config("dare_ties", parameters={"density": 0.5, "normalize": True}))
    assert recipe.method == Dare(density=0.5, scaling=1.0, then="ties", rescale=True)
    for parameters in ({"density": 0.5}, {"density": 0.5, "normalize": False}):
        assert "mk.yaml: parameters.normalize: dare_ties always divides" in refusal(
            config("dare_ties", parameters=parameters)
        )


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_parameters_of_a_model_come_before_those_of_the_file(folder: Path) -> None:
    models = {"some/one": {"weight": 0.5, "density": 0.3}, "some/two": {"density": 0.3}}
    recipe = load(config("ties", models, parameters={"weight": 2, "density": 0.9}))
    assert recipe.method == Ties(density=0.3)
    assert weights(recipe) == {"one": 0.5, "two": 2}


def test_overrides_of_the_command_line_apply_to_what_was_read(folder: Path) -> None:
    recipe = load(config("ties"), "operator.density=0.4", "seed=7", "experts.two.weight=3")
    assert recipe.method == Ties(density=0.4)
    assert recipe.seed == 7 and weights(recipe) == {"one": 0.5, "two": 3}


def test_out_dtype_is_the_merged_type_and_dtype_where_it_is_not_given(folder: Path) -> None:
    assert load(config("linear")).dtype is None
    assert load(config("linear", dtype="bfloat16")).dtype == "bfloat16"
    assert load(config("linear", dtype="float32", out_dtype="float16")).dtype == "float16"
    assert "mk.yaml:9: dtype: Input should be 'float32', 'bfloat16' or 'float16'" in refusal(
        config("linear", dtype="float64")
    )


# ---- models ----------------------------------------------------------------------------------------------------------


def test_base_among_the_models_means_nothing(folder: Path) -> None:
    models: dict[str, dict[str, Any]] = {"some/base": {}, "some/one": {"weight": 0.5}, "some/two": {"weight": 1.5}}
    assert load(config("ties", models)) == load(config("ties"))


def test_adapter_is_written_as_base_plus_adapter(folder: Path) -> None:
    (folder / "lora").mkdir()
    recipe = load(config("task_arithmetic", {"some/base+./lora": {"weight": 1}, "some/two": {"weight": 1}}))
    assert recipe.experts["lora"].path == str(folder / "lora")
    both = load(config("linear", {"some/base+./lora": {"weight": 1}, "some/base": {"weight": 1}}))
    assert both.base == "some/base" and weights(both) == {"lora": 0.5, "base": 0.5}
    message = refusal(config("ties", {"some/other+./lora": {"weight": 1}}))
    assert "models: 'some/other+./lora' is an adapter on another model than base_model 'some/base'" in message


def test_folder_with_a_plus_in_its_name_is_a_folder(folder: Path) -> None:
    (folder / "a+b").mkdir()
    recipe = load(config("ties", {"./a+b": {"weight": 1}}))
    assert [(name, spec.path) for name, spec in recipe.experts.items()] == [("a-b", str(folder / "a+b"))]


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["some/one", "some/two"], ["one", "two"]),
        (["a/model", "b/model"], ["a-model", "b-model"]),
        (["x/a/model", "y/a/model", "c"], ["x-a-model", "y-a-model", "c"]),
        (["/one", "./two", "../three"], ["one", "two", "three"]),
        (["same", "same"], ["same-1", "same-2"]),
        (["d/a b", "d/a-b"], ["d-a-b-1", "d-a-b-2"]),
        (["_a", "m_a"], ["m_a-1", "m_a-2"]),
        (["x/_a", "y/m_a"], ["x-_a", "y-m_a"]),
        ([".hidden", "ä", "."], ["m.hidden", "m-", "model"]),
    ],
)
def test_expert_names_are_short_and_tell_models_apart(paths: list[str], names: list[str]) -> None:
    assert expert_names(paths) == names


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (config("slerp"), "merge_method: 'slerp' cannot be taken; there are: linear, task_arithmetic, ties, dare_lin"),
        (config("ties", slices=[]), "slices: cannot be taken; of a mergekit file these can: merge_method, base_model"),
        (config("ties", tokenizer_source="union"), "tokenizer_source: cannot be taken"),
        (config("ties", tokenizer={"source": "union"}), "tokenizer: cannot be taken"),
        (config("ties", chat_template="auto"), "chat_template: cannot be taken"),
        (config("ties", modules={}), "modules: cannot be taken"),
        (config("ties", base_model=None), "base_model: is missing; ties needs it"),
        (config("ties", {}), "models: there is nothing to merge into the base"),
        (config("linear", {}), "models: is empty"),
        (config("ties", {"some/base": {"weight": 1}}), "models: there is nothing to merge into the base"),
        (config("linear", base_model="some/base"), "base_model: mergekit takes it as one more model of a linear merge"),
        (config("ties") | {"models": {"model": "x"}}, "models: needs a list of entries with 'model'"),
        (config("ties") | {"models": ["x"]}, "models: needs a list of entries with 'model'"),
        (config("ties") | {"models": [{"weight": 1}]}, "models: needs a list of entries with 'model'"),
        (config("ties", parameters=[1]), "parameters: parameters are a mapping, found list"),
        (config("ties", parameters={"gamma": 0.1}), "parameters.gamma: cannot be taken; there are: weight, density"),
        (config("ties", parameters={"density": [0.1, 0.9]}), "parameters.density: a gradient or filter cannot be take"),
        (
            config("ties", parameters={"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}),
            "parameters.weight: a gradient or filter cannot be taken; 'overrides' are for that here",
        ),
        (config("ties", {"some/one": {"weight": [0, 1]}}), "some/one.weight: a gradient or filter cannot be taken"),
        (
            config("ties", {"some/one": {"weight": 1, "normalize": True}}),
            "some/one.normalize: cannot be taken; there are: weight, density",
        ),
        (
            config("ties", {"some/one": {"weight": 1, "density": 0.2}, "some/two": {"weight": 1}}),
            "parameters.density: found [0.2, 1.0]; here all models share one",
        ),
        (config("ties", {"some/one": {"weight": 1}, "some/two": {}}), "parameters.weight: is missing; mergekit wants"),
        (config("ties", parameters={"density": 0}), "operator.density: Input should be greater than 0"),
        (config("ties", parameters={"lambda": 0}), "operator.scaling: Input should be greater than 0"),
        (
            config("linear", {"some/one": {"weight": 2}, "some/two": {"weight": -1}}),
            "experts.two.weight: -1 is negative, and mean takes shares",
        ),
        (
            config("linear", {"some/one": {"weight": 1}, "some/two": {"weight": -1}}),
            "experts.two.weight: -1 is negative, and mean takes shares",
        ),
    ],
)
def test_mergekit_file_that_cannot_be_taken_exactly_is_refused_by_key(
    folder: Path, raw: dict[str, Any], message: str
) -> None:
    assert f"mk.yaml: {message}" in refusal(raw)
