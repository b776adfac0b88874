"""Loss gaps of experts that exist already: how much worse the base fits each one's validation data than it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manyshot.base_model import BaseModel
from manyshot.data_files import read_file
from manyshot.gap_weights import TaskLosses, choose_weights, effective_tasks
from manyshot.local_update import adopted_state, task_loss
from manyshot.merge_recipe import MergeRecipe
from manyshot.models import ModelState, choose_placement, load_model, load_tokenizer, quiet_transformers
from manyshot.progress import Progress
from manyshot.recipe import Evaluation, LocalUpdate, Recipe, TaskSpec
from manyshot.tasks import Task, to_example


def weigh_experts(
    recipe: MergeRecipe, base: BaseModel, progress: Progress, *, device: str = "auto"
) -> tuple[list[float], dict[str, Any]]:
    """The experts' weights from their loss gaps G_τ = L_τ(Θ⁰) − L_τ(θ_τ), and everything they were made from.

    Raises DataError for validation data that cannot be used.
    """
    tasks = {name: _load(recipe, name) for name in recipe.experts}
    settings = _settings(recipe, base, device)
    placement = choose_placement(settings.local_update)
    start = ModelState(base.path)

    def loss(state: ModelState, names: list[str], which: str) -> dict[str, float]:
        model = load_model(state, placement)
        return {
            name: task_loss(model, tokenizer, tasks[name], settings, progress, round_index=0, which=which).loss
            for name in names
        }

    with quiet_transformers():
        tokenizer = load_tokenizer(base.path)
        before = loss(start, list(tasks), "base")
        after = {
            name: loss(adopted_state(start, Path(expert.path)), [name], "expert")[name]
            for name, expert in recipe.experts.items()
        }
    losses = TaskLosses(tuple(before.values()), tuple(after.values()), tuple(before.values()))
    weights, details = choose_weights(recipe.method.at_round(1), losses)
    record = {
        "base_losses": before,
        "expert_losses": after,
        "loss_gaps": dict(zip(tasks, losses.gaps, strict=True)),
        "effective_tasks": effective_tasks(weights),
    }
    return weights, record | details


def _load(recipe: MergeRecipe, name: str) -> Task:
    """An expert's validation data as a task without training or test examples."""
    spec = recipe.experts[name]
    assert spec.validation is not None  # the recipe checked it
    task = TaskSpec(train=spec.validation, columns=spec.columns, format=spec.format, system_prompt=spec.system_prompt)
    rows = read_file(Path(spec.validation), name)
    examples = tuple(to_example(row, i, task, f"task '{name}', validation row {i + 1}") for i, row in enumerate(rows))
    return Task(name, task, (), examples, (), {})


def _settings(recipe: MergeRecipe, base: BaseModel, device: str) -> Recipe:
    """The recipe that the evaluator reads its settings from; nothing of it is run."""
    names = [*recipe.experts, "other"] if len(recipe.experts) == 1 else list(recipe.experts)
    return Recipe(
        model=str(base.path),
        tasks={name: TaskSpec(train="validation") for name in names},
        operator="mean",
        local_update=LocalUpdate(max_length=recipe.max_length, device=device),
        evaluation=Evaluation(batch_size=recipe.batch_size, loss_on=recipe.loss_on),
        seed=recipe.seed,
    )
