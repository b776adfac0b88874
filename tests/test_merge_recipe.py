"""The merge recipe: sizes, weights, and every combination that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from manyshot.errors import RecipeError
from manyshot.merge_recipe import MergeRecipe, parse_size
from manyshot.operators import OPERATORS
from manyshot.recipe_file import load_merge_recipe, merge_recipe_from_mapping, to_yaml

quick = settings(deadline=None, database=None, derandomize=True, max_examples=60)


def mapping(*weights: float | None, **more: Any) -> dict[str, Any]:
    """A recipe of as many experts as weights; None is no weight."""
    given = {f"e{i}": {"path": f"some/model{i}"} for i in range(len(weights))}
    experts = {
        name: spec | ({} if weight is None else {"weight": weight})
        for (name, spec), weight in zip(given.items(), weights, strict=True)
    }
    return {"base": "some/base", "experts": experts} | more


def build(*weights: float | None, **more: Any) -> MergeRecipe:
    return merge_recipe_from_mapping(mapping(*weights, **more))


def refusal(*weights: float | None, **more: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        build(*weights, **more)
    return str(caught.value)


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kb", 1500), ("2T", 2 * 10**12), ("77", 77), ("8B", 8), (12, 12)],
)
def test_parse_size_counts_in_powers_of_ten(text: object, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes
    assert build(None, shard_size=text).shard_size == num_bytes


@pytest.mark.parametrize("text", ["5 apples", "", "GB", "-1GB", "5GiB", "1e9", 0, "0", "nan", None])
def test_merge_recipe_refuses_what_is_no_size(text: object) -> None:
    assert "merge: shard_size: " in refusal(None, shard_size=text)


# ---- defaults --------------------------------------------------------------------------------------------------------


def test_merge_recipe_defaults() -> None:
    recipe = build(None, None)
    assert recipe.method.name == "task_arithmetic" and recipe.method == OPERATORS["task_arithmetic"]()
    assert (recipe.dtype, recipe.shard_size, recipe.seed) == (None, 5_000_000_000, 0)
    assert (recipe.max_length, recipe.batch_size, recipe.loss_on) == (512, 8, "completion")
    assert recipe.notes == () and recipe.overrides == {}


def test_merge_recipe_written_out_reads_back_as_itself(tmp_path: Path) -> None:
    operator = {"name": "ties", "density": 0.5}
    recipe = build(0.5, 2.0, operator=operator, overrides={"*.mlp.*": {"density": 0.25}}, shard_size="2GB", seed=3)
    file = tmp_path / "merge.yaml"
    file.write_text(to_yaml(recipe), "utf-8")
    assert load_merge_recipe(file) == recipe


# ---- weights ---------------------------------------------------------------------------------------------------------


@quick
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=6))
def test_merge_recipe_shares_sum_to_one_and_keep_their_ratios(weights: list[float]) -> None:
    found = build(*weights, operator="mean").given_weights()
    assert sum(found) == pytest.approx(1, rel=1e-12)
    assert found == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-12)


@quick
@given(st.lists(st.floats(-1000, 1000).filter(bool), min_size=1, max_size=6))
def test_merge_recipe_multipliers_are_taken_as_they_are(weights: list[float]) -> None:
    assert build(*weights, operator="task_arithmetic").given_weights() == weights


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_merge_recipe_equal_weights_where_none_are_given(name: str) -> None:
    recipe = build(None, None, None, None, operator=name) if name != "metis" else build(1, 1, 1, 1, operator=name)
    share = OPERATORS[name].weighting == "normalized"
    assert recipe.given_weights() == [0.25 if share else 1.0] * 4
    assert not recipe.needs_gaps


def test_merge_recipe_metis_needs_gaps_only_without_weights() -> None:
    experts = {name: {"path": f"some/{name}", "validation": f"some/{name}"} for name in ("a", "b")}
    assert merge_recipe_from_mapping({"base": "some/base", "experts": experts, "operator": "metis"}).needs_gaps
    assert not build(1, 3, operator="metis").needs_gaps
    alike = merge_recipe_from_mapping(
        {"base": "some/base", "experts": {"a": {"path": "some/a"}, "b": {"path": "some/b"}}}
        | {"operator": {"name": "metis", "gap": "none"}}
    )
    assert not alike.needs_gaps
    assert alike.given_weights() == [0.5, 0.5]
    assert build(1, 3, operator="metis").given_weights() == [0.25, 0.75]


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "more", "message"),
    [
        ((1, None, 2), {}, "merge: experts.e1.weight: is missing; give every expert a weight, or none"),
        ((1, -2), {"operator": "mean"}, "merge: experts.e1.weight: -2 is negative, and mean takes shares"),
        ((1, -2), {"operator": "metis"}, "merge: experts.e1.weight: -2 is negative, and metis takes shares"),
        ((0, 0), {"operator": "mean"}, "merge: experts: the weights sum to 0; mean divides by their sum"),
        ((0, 0), {}, "merge: experts: every weight is 0, so nothing would be merged"),
        ((float("nan"), 1), {}, "merge: experts.e0.weight: Input should be a finite number"),
        ((float("inf"), 1), {}, "merge: experts.e0.weight: Input should be a finite number"),
        (
            (None, None),
            {"operator": "metis"},
            "merge: experts.e0.validation: metis weighs by loss gaps: give each expert validation data, or each a",
        ),
        ((None, None), {"operator": {"name": "ties", "density": 0}}, "merge: operator.density: Input should be gr"),
        ((None, None), {"operator": {"name": "ties", "density": 1.5}}, "merge: operator.density: Input should be le"),
        ((None, None), {"operator": "tise"}, "merge: operator: unknown operator 'tise'; did you mean 'ties'?"),
        (
            (None, None),
            {"operator": {"name": "ties", "densty": 1}},
            "merge: operator.densty: unknown key; did you mean 'density'?",
        ),
        ((None, None), {"operator": {"density": 0.5}}, "merge: operator: needs 'name'; there are: consensus_ta"),
        (
            (None, None),
            {"operator": {"name": "consensus_ta", "min_agreement": 3}},
            "merge: operator.min_agreement: 3 tasks can never agree among 2",
        ),
        (
            (None, None),
            {"operator": {"name": "task_arithmetic", "scaling": [1, 0.5]}},
            "merge: operator.scaling: has 2 values for 1 rounds; give one, or one per round",
        ),
        ((None,), {"dtype": "int8"}, "merge: dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ((None,), {"seed": -1}, "merge: seed: Input should be greater than or equal to 0"),
        ((None,), {"max_length": 1}, "merge: max_length: Input should be greater than or equal to 2"),
        ((None,), {"bas": "x"}, "merge: bas: unknown key; did you mean 'base'?"),
        ((), {}, "merge: experts: Dictionary should have at least 1 item"),
        ((None,), {"base": "./nowhere"}, "merge: base: no such file or folder: ./nowhere"),
        ((None,), {"experts": {"a": {"path": "./none"}}}, "merge: experts.a.path: no such file or folder: ./none"),
        ((None,), {"experts": {"a": {"pth": "x"}}}, "merge: experts.a.pth: unknown key; did you mean 'path'?"),
        ((None,), {"experts": {"a b": {"path": "x"}}}, "a name starts with a letter or digit and holds only"),
        (
            (None, None),
            {"overrides": {"*norm*": {"scaling": -1}}},
            "merge: overrides.*norm*: scaling: Input should be greater than 0, found -1",
        ),
        (
            (None, None),
            {"overrides": {"*norm*": {"name": "metis"}}},
            "merge: overrides.*norm*: metis takes its weights from loss gaps; make it the operator itself",
        ),
    ],
)
def test_merge_recipe_refuses_what_does_not_fit_and_names_the_key(
    weights: tuple[float | None, ...], more: dict[str, Any], message: str
) -> None:
    assert message in refusal(*weights, **more)


def test_merge_recipe_allows_zero_beside_other_weights_and_negative_multipliers() -> None:
    assert build(0, 2, operator="mean").given_weights() == [0, 1]
    assert build(0, -2).given_weights() == [0, -2]


def test_merge_recipe_errors_name_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "merge.yaml"
    raw = mapping(1, 2, operator={"name": "mean"})
    raw["experts"]["e1"]["weight"] = -2
    file.write_text(yaml.safe_dump(raw, sort_keys=False), "utf-8")
    line = file.read_text("utf-8").splitlines().index("    weight: -2") + 1
    with pytest.raises(RecipeError, match=rf"merge.yaml:{line}: experts.e1.weight: -2 is negative"):
        load_merge_recipe(file)
    with pytest.raises(RecipeError, match=r"command line: experts.e1.weight: -3 is negative"):
        load_merge_recipe(file, ["experts.e1.weight=-3"])
    assert load_merge_recipe(file, ["experts.e1.weight=3"]).given_weights() == [0.25, 0.75]


def test_merge_recipe_relative_paths_are_seen_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "one").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    file = tmp_path / "here" / "merge.yaml"
    file.write_text("base: ./one\nexperts: {a: {path: one}}\n", "utf-8")
    recipe = load_merge_recipe(file)
    assert recipe.base == recipe.experts["a"].path == str((tmp_path / "here" / "one").resolve())


def test_merge_recipe_plan_gives_a_tensor_the_last_override_that_fits() -> None:
    overrides = {"*.mlp.*": {"density": 0.5}, "*norm*": {"name": "mean"}}
    plan = build(None, None, operator={"name": "ties", "density": 0.25}, overrides=overrides).plan
    assert plan.for_tensor("x.mlp.up.weight") == OPERATORS["ties"](density=0.5)
    assert plan.for_tensor("x.mlp.norm") == OPERATORS["mean"]()
    assert plan.for_tensor("x.attn") == OPERATORS["ties"](density=0.25)
