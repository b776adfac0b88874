"""The recipe's own arithmetic and limits: steps per round, defaults, frozen sections, settings that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from conftest import MakeRecipe
from manyshot.errors import RecipeError
from manyshot.operators import Dare, Mean, Metis, Ties
from manyshot.recipe import LocalUpdate, Protocol, Recipe, TaskSpec
from manyshot.recipe_file import load_recipe

TWO = {"a": {"data": "demo:math"}, "b": {"data": "demo:safety"}}


@settings(deadline=None, database=None, derandomize=True, max_examples=60)
@given(st.integers(1, 20), st.integers(0, 200))
def test_protocol_steps_add_up_and_differ_by_one_at_most(rounds: int, more: int) -> None:
    protocol = Protocol(rounds=rounds, local_steps=rounds + more)
    steps = [protocol.steps_in_round(r) for r in range(1, rounds + 1)]
    assert sum(steps) == rounds + more
    assert max(steps) - min(steps) <= 1
    assert min(steps) >= 1
    assert steps == sorted(steps, reverse=True)
    for round_index in range(1, rounds + 2):
        assert protocol.steps_before_round(round_index) == sum(steps[: round_index - 1])


def test_protocol_steps_by_hand() -> None:
    protocol = Protocol(rounds=3, local_steps=8)
    assert [protocol.steps_in_round(r) for r in (1, 2, 3)] == [3, 3, 2]
    assert [protocol.steps_before_round(r) for r in (1, 2, 3)] == [0, 3, 6]


def test_recipe_defaults_are_the_papers() -> None:
    recipe = Recipe.model_validate({"model": "some/model", "tasks": TWO, "preset": "paper"})
    assert recipe.protocol.rounds == 5
    assert recipe.method == Metis(temperature=2.0, mask_threshold=0.3, min_agreement=2, scaling=1.0)
    assert (recipe.method.gap, recipe.method.mask) == ("absolute", True)  # type: ignore[attr-defined]
    update = recipe.local_update
    assert (update.rank, update.alpha, update.dropout, update.learning_rate) == (16, 16, 0.0, 3e-4)
    assert (update.batch_size, update.max_length) == (8, 512)
    assert update.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert (update.adapter_start, update.optimizer_state) == ("fresh", "restart")
    assert (recipe.merge.space, recipe.merge.reference) == ("weights", "pretrained")
    outer = (recipe.merge.outer_optimizer, recipe.merge.outer_step_size, recipe.merge.outer_momentum)
    assert outer == ("sgd", 1.0, 0.0)


def test_recipe_is_frozen_in_every_section() -> None:
    recipe = Recipe.model_validate({"model": "some/model", "tasks": TWO})
    for section in (recipe, recipe.protocol, recipe.merge, recipe.local_update, recipe.evaluation, recipe.tasks["a"]):
        name = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, getattr(section, name))
    with pytest.raises(AttributeError):
        recipe.method.temperature = 1.0  # type: ignore[attr-defined]


def test_recipe_operator_may_be_a_name_or_a_mapping() -> None:
    short = Recipe.model_validate({"model": "m", "tasks": TWO, "operator": "mean"})
    assert short.operator == Recipe.model_validate({"model": "m", "tasks": TWO, "operator": {"name": "mean"}}).operator
    values = {"name": "metis", "scaling": [1, 0.5, 0.5, 0.5, 0.25]}
    per_round = Recipe.model_validate({"model": "m", "tasks": TWO, "operator": values})
    assert per_round.method.at_round(5).scaling == 0.25  # type: ignore[attr-defined]


def test_recipe_rank_and_alpha_of_a_task_override_the_local_update() -> None:
    tasks = {"a": {"data": "demo:math", "rank": 4}, "b": {"data": "demo:math", "alpha": 2}}
    recipe = Recipe.model_validate({"model": "m", "tasks": tasks, "local_update": {"rank": 8, "alpha": 32}})
    assert (recipe.rank_of("a"), recipe.alpha_of("a")) == (4, 32)
    assert (recipe.rank_of("b"), recipe.alpha_of("b")) == (8, 2)


def test_task_spec_needs_data_or_train_and_not_both() -> None:
    TaskSpec(data="x")
    TaskSpec(train="x")
    for both in ({}, {"data": "x", "train": "y"}):
        with pytest.raises(ValidationError, match="give either 'data' or 'train'"):
            TaskSpec.model_validate(both)


def test_local_update_needs_batches_that_divide() -> None:
    assert LocalUpdate(batch_size=8, micro_batch_size=2).micro_batch_size == 2
    with pytest.raises(ValidationError, match="batch_size 8 is not a multiple of micro_batch_size 3"):
        LocalUpdate(batch_size=8, micro_batch_size=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("operator.scaling=[1, 0.5, 0.25]", "operator.scaling: has 3 values for 2 rounds; give one, or one per round"),
        ("operator.min_agreement=4", "operator.min_agreement: 4 tasks can never agree among 3"),
        ("operator.temperature=0", "operator.temperature: Input should be greater than 0"),
        ("operator.mask_threshold=-0.1", "operator.mask_threshold: Input should be greater than or equal to 0"),
        ("protocol.local_steps=1", "protocol: local_steps is 1 for 2 rounds; every round needs at least one step"),
        ("protocol.rounds=0", "protocol.rounds: Input should be greater than or equal to 1"),
        ("tasks.letters.rank=3", "tasks: "),
        ("local_update.method=full", "local_update.method: full needs space: weights"),
        ("merge.reference=start", "merge.reference: space: factors merges the adapters themselves"),
        ("local_update.adapter_start=svd", "local_update.adapter_start: space: factors always goes on"),
        ("evaluation.experts=false", "evaluation.post_hoc: needs evaluation.experts: true"),
        ("local_update.dropout=1", "local_update.dropout: Input should be less than 1"),
        ("local_update.max_length=1", "local_update.max_length: Input should be greater than or equal to 2"),
        ("local_update.target_modules=[]", "local_update.target_modules: "),
        ("seed=-1", "seed: Input should be greater than or equal to 0"),
    ],
)
def test_recipe_refuses_what_does_not_fit_and_names_the_key(
    make_recipe: MakeRecipe, override: str, message: str
) -> None:
    with_factors = ("merge.space=factors", "evaluation.post_hoc=true")
    make_recipe(*with_factors)
    with pytest.raises(RecipeError) as caught:
        make_recipe(*with_factors, override)
    assert f"command line: {message}" in str(caught.value) or f"recipe: {message}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["merged", "merged.partial", "carried_adapter", "scores.json", "task_vector.safetensors", "x.partial"]
)
def test_recipe_refuses_task_names_that_are_files_of_the_run(name: str) -> None:
    tasks = {name: {"data": "demo:math"}, "b": {"data": "demo:math"}}
    with pytest.raises(ValidationError, match=f"tasks.{name}: this name is taken"):
        Recipe.model_validate({"model": "m", "tasks": tasks})


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "-a", "a b", "ä", "a\n", "x" * 65])
def test_recipe_refuses_task_names_that_are_no_plain_file_names(name: str) -> None:
    tasks = {name: {"data": "demo:math"}, "b": {"data": "demo:math"}}
    with pytest.raises(ValidationError):
        Recipe.model_validate({"model": "m", "tasks": tasks})


def test_recipe_refuses_a_single_task() -> None:
    with pytest.raises(ValidationError, match="only one task; merging needs at least two"):
        Recipe.model_validate({"model": "m", "tasks": {"a": {"data": "x"}}, "operator": "mean"})


# ---- operators by tensor, and the outer optimizer --------------------------------------------------------------------


def test_recipe_override_keeps_the_operators_other_settings_unless_it_names_another() -> None:
    operator = {"name": "ties", "density": 0.25, "scaling": 0.5}
    overrides = {"*.mlp.*": {"density": 0.75}, "*norm*": {"name": "mean"}, "*.q_proj.*": {"name": "dare"}}
    recipe = Recipe.model_validate({"model": "m", "tasks": TWO, "operator": operator, "overrides": overrides})
    assert recipe.plan.for_tensor("a.mlp.up.weight") == Ties(density=0.75, scaling=0.5)
    assert recipe.plan.for_tensor("a.norm.weight") == Mean()
    assert recipe.plan.for_tensor("a.q_proj.weight") == Dare()
    assert recipe.plan.for_tensor("a.k_proj.weight") == recipe.method == Ties(density=0.25, scaling=0.5)


def test_recipe_overrides_take_a_value_per_round() -> None:
    raw = {"model": "m", "tasks": TWO, "protocol": {"rounds": 2}, "operator": "ties"}
    recipe = Recipe.model_validate(raw | {"overrides": {"*": {"density": [0.5, 0.25]}}})
    assert [recipe.plan.at_round(r).for_tensor("x") for r in (1, 2)] == [Ties(density=0.5), Ties(density=0.25)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{densty: 0.5}", "overrides.*.mlp.*: densty: unknown key; there are: density, name, scaling, trim_scope"),
        ("{density: 2}", "overrides.*.mlp.*: density: Input should be less than or equal to 1, found 2"),
        (
            "{name: tise}",
            "overrides.*.mlp.*: name: unknown operator; there are: consensus_ta, dare, iso_c, mean, metis",
        ),
        ("{scaling: [1, 1, 1]}", "overrides.*.mlp.*.scaling: has 3 values for 2 rounds; give one, or one per round"),
        ("{name: consensus_ta, min_agreement: 3}", "overrides.*.mlp.*.min_agreement: 3 tasks can never agree among 2"),
        ("{name: metis}", "overrides.*.mlp.*: metis takes its weights from loss gaps; make it the operator itself"),
        ("0.5", "overrides.*.mlp.*: Input should be a valid dictionary"),
    ],
)
def test_recipe_override_that_does_not_fit_is_refused_with_file_and_line(
    tmp_path: Path, line: str, message: str
) -> None:
    text = "model: some/model\ntasks: {a: {data: demo:math}, b: {data: demo:math}}\noperator: ties\n"
    text += f'protocol: {{rounds: 2}}\noverrides:\n  "*norm*": {{scaling: 0.5}}\n  "*.mlp.*": {line}\n'
    (tmp_path / "r.yaml").write_text(text, "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert f"r.yaml:7: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["temperature: 1.0", "gap: relative", "temperature: auto"])
def test_recipe_override_may_not_decide_the_weights(setting: str) -> None:
    key, value = setting.split(": ")
    raw = {"model": "m", "tasks": TWO, "overrides": {"*norm*": {key: float(value) if value == "1.0" else value}}}
    with pytest.raises(
        ValidationError, match=rf"overrides\.\*norm\*\.{key}: decides the weights, of which a merge has"
    ):
        Recipe.model_validate(raw)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("merge.outer_step_size=0.5",),
            "merge.outer_step_size: is part of the outer optimizer, which needs reference",
        ),
        (("merge.outer_momentum=0.5",), "merge.outer_momentum: is part of the outer optimizer, which needs reference"),
        (
            ("merge.reference=start", "merge.outer_step_size=[1, 1, 1]"),
            "merge.outer_step_size: has 3 values for 2 rounds; give one, or one per round",
        ),
        (("merge.reference=start", "merge.outer_step_size=0"), "merge.outer_step_size: Input should be greater than 0"),
        (("merge.reference=start", "merge.outer_momentum=1"), "merge.outer_momentum: Input should be less than 1"),
        (("operator.effective_tasks=2",), "operator.effective_tasks: is what temperature: auto aims at"),
        (
            ("operator.temperature=auto", "operator.effective_tasks=3.5"),
            "operator.effective_tasks: 3.5 of 3 tasks; give 1 … 3",
        ),
        (("operator.temperature=automatic",), "operator.temperature: "),
        (
            ("operator.gap=relativ",),
            "operator.gap: Input should be 'absolute', 'relative', 'over_expert', 'over_start' or",
        ),
        (("operator.weight_memory=1",), "operator.weight_memory: Input should be less than 1, found 1"),
        (("operator.mask=hard",), "operator.mask: Input should be a valid boolean"),
        (("operator.temperature=[1, 2, 3]",), "operator.temperature: has 3 values for 2 rounds"),
        (
            ("operator=iso_c", "merge.space=factors"),
            "operator.name: iso_c merges whole weight matrices; use merge.spac",
        ),
    ],
)
def test_recipe_refuses_knobs_that_do_not_fit_and_names_the_key(
    make_recipe: MakeRecipe, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(*overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)
