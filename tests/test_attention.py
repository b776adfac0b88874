"""The attention that a recipe names is that of every model of a run, trained or measured, and part of its identity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from conftest import MakeRecipe
from manyshot.allocation import Steps
from manyshot.errors import ModelError
from manyshot.executors import LocalExecutor
from manyshot.inputs import check_inputs
from manyshot.models import ModelState, Placement, check_attention, choose_placement, load_model, meta_model
from manyshot.progress import Progress
from manyshot.rundir import RunFolder
from manyshot.runner import run
from manyshot.steps import Run
from manyshot.steps_train import local_update_jobs


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_load_model_takes_the_attention_of_the_placement(base_folder: Path, name: str) -> None:
    model = load_model(ModelState(base_folder), Placement("cpu", torch.float32, name))
    assert model.config._attn_implementation == name


def test_choose_placement_says_the_attention(make_recipe: MakeRecipe) -> None:
    eager = choose_placement(
        make_recipe("local_update.attn_implementation=eager", "local_update.device=cpu").local_update
    )
    assert (eager.attention, eager.text) == ("eager", "float32 on cpu, eager attention")
    plain = choose_placement(make_recipe("local_update.device=cpu").local_update)
    assert (plain.attention, plain.text) == (None, "float32 on cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eagre", "'eagre' cannot be used .*eager.*sdpa"),
        ("owner/kernel", "'owner/kernel' cannot be used"),
        ("flash_attention_2", "'flash_attention_2' cannot be used"),
    ],
)
def test_check_inputs_refuses_an_attention_that_is_not_there(make_recipe: MakeRecipe, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"^local_update.attn_implementation: {message}"):
        check_inputs(make_recipe(f"local_update.attn_implementation={name}"))


def test_check_attention_takes_what_transformers_has(base_folder: Path) -> None:
    for name in (None, "eager", "sdpa"):
        check_attention(meta_model(base_folder), name)


def test_every_model_of_a_run_has_the_attention(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str | None] = []

    def noted(state: ModelState, placement: Placement) -> object:
        model = load_model(state, placement)
        loaded.append(model.config._attn_implementation)
        return model

    for module in ("local_update", "evaluate", "check_merged"):
        monkeypatch.setattr(f"manyshot.{module}.load_model", noted)
    run(make_recipe("local_update.attn_implementation=eager", "evaluation.experts=false"), tmp_path / "run")
    assert len(loaded) > 2 * 3 and set(loaded) == {"eager"}


def test_attention_is_part_of_what_a_local_update_depends_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    keys = []
    for options in ((), ("local_update.attn_implementation=eager",)):
        recipe = make_recipe(*options)
        inputs = check_inputs(recipe)
        made = Run(recipe, RunFolder(tmp_path), inputs.base, inputs.tasks, LocalExecutor(), Progress())
        folders = [tmp_path / name for name in made.names]
        keys += [job.key for job in local_update_jobs(made, [made.pretrained] * 3, 1, [Steps(2, 0)] * 3, folders)]
    assert len(set(keys)) == 6
