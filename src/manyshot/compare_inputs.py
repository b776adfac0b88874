"""Everything a comparison reads, loaded for real and checked before the first step; and what it warns of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from manyshot.compare_benchmarks import check_benchmarks
from manyshot.compare_plan import all_cells, places, tries
from manyshot.compare_recipe import CompareRecipe
from manyshot.errors import ManyshotError
from manyshot.inputs import Inputs, check_inputs, check_model
from manyshot.models import ModelState, meta_model, quiet_transformers
from manyshot.progress import Progress
from manyshot.recipe import LocalUpdate, Recipe, operator_warnings
from manyshot.rundir import require_space
from manyshot.tasks import check_batch, shared_rows
from manyshot.trainer import check_trainer_arguments


def trained_tasks(recipe: CompareRecipe) -> tuple[str, ...]:
    """Every task that is in a task set, once."""
    return tuple(dict.fromkeys(task for one in recipe.sets.values() for task in one.tasks))


def check_all_inputs(recipe: CompareRecipe, progress: Progress) -> dict[tuple[str, int], Inputs]:
    """Load and check data and model for every backbone and seed, before the first step."""
    names = trained_tasks(recipe)
    for warning in method_warnings(recipe):
        progress.message(f"warning: {warning}")
    found = {}
    for model, seed in dict.fromkeys((place.model, place.seed) for place in places(recipe)):
        progress.message(f"checking data and model: {model}, seed {seed}")
        run = recipe.run_recipe(model, names, seed, recipe.shared, "many_shot")
        found[model, seed] = check_inputs(with_tasks(run, recipe, (*names, *recipe.retention)))
        trained = [task for task in found[model, seed].tasks if task.name in names]
        for warning in shared_rows(trained):
            progress.message(f"warning: seed {seed}: {warning}")
    check_own_training(recipe, names, found)
    if recipe.benchmarks:
        progress.message("checking benchmarks: their data, resources and metrics")
        remote = recipe.trust_remote_code
        models = {model: ModelState(one.base.path, trust_remote_code=remote) for (model, _), one in found.items()}
        check_benchmarks(recipe.benchmarks, recipe.harness, models)
    return found


def check_space(
    recipe: CompareRecipe, folder: Path, found: Mapping[tuple[str, int], Inputs], *, workers: int, finished: int
) -> None:
    """Refuse what the disk cannot hold: the last task vector of every trial, of those that run one of every round.

    Where all weights are trained each shared local update is a model too, and so is each of a trial that runs.
    """
    sizes = {place: 4 * inputs.changed_entries for place, inputs in found.items()}
    trials = [sizes[cell.place.model, cell.place.seed] for cell in all_cells(recipe) for _ in tries(recipe, cell)]
    full = recipe.local_update.method == "full"
    shared = sum(2 * len(recipe.sets[one.task_set].tasks) * sizes[one.model, one.seed] for one in places(recipe))
    of_a_round = 1 + (max(len(one.tasks) for one in recipe.sets.values()) if full else 0)
    running = workers * recipe.protocol.rounds * of_a_round * max(sizes.values())
    left = max(0.0, 1 - finished / len(trials))
    needed = int(left * (sum(trials) + (shared if full else 0)) + (running if left else 0))
    require_space(folder, needed, f"what {len(trials) - min(finished, len(trials))} runs will write")


def runs_of(recipe: CompareRecipe, found: Mapping[tuple[str, int], Inputs]) -> Iterator[tuple[Recipe, Inputs]]:
    """One run for every backbone and way to train: what cells need memory for."""
    names = trained_tasks(recipe)
    ways = [recipe.shared, *(candidate for name in recipe.methods for candidate in recipe.possible(name))]
    for model, (seed, inputs) in {model: (seed, inputs) for (model, seed), inputs in found.items()}.items():
        seen: list[LocalUpdate] = []
        for way in ways:
            if way.local_update not in seen:
                seen.append(way.local_update)
                yield recipe.run_recipe(model, names, seed, way, "post_hoc"), inputs


def check_own_training(recipe: CompareRecipe, names: tuple[str, ...], found: Mapping[tuple[str, int], Inputs]) -> None:
    """What a method trains in its own way, as it is checked for all: trainer arguments, modules, batches.

    Raises ManyshotError naming the method.
    """
    seen = [recipe.local_update]
    for name in recipe.methods:
        for candidate in recipe.possible(name):
            update = candidate.local_update
            if update in seen:
                continue
            seen.append(update)
            try:
                check_trainer_arguments(update)
                for (model, seed), inputs in found.items():
                    with quiet_transformers():
                        empty = meta_model(inputs.base.path, trust_remote_code=recipe.trust_remote_code)
                    check_model(recipe.run_recipe(model, names, seed, candidate, "post_hoc"), inputs.base, empty)
                    for task in inputs.tasks:
                        check_batch(task, update.batch_size)
            except ManyshotError as error:
                raise type(error)(f"methods.{name}: {error}") from None


def method_warnings(recipe: CompareRecipe) -> list[str]:
    """What a run of a cell would warn of; once for each method, protocol and task set."""
    found = []
    for cell in all_cells(recipe):
        if recipe.methods[cell.method].operator is None:
            continue
        tasks = recipe.sets[cell.place.task_set].tasks
        for candidate in recipe.candidates(cell.method):
            run = recipe.run_recipe(cell.place.model, tasks, cell.place.seed, candidate, cell.protocol)
            where = f"methods.{cell.method}, {cell.protocol}, {len(tasks)} tasks"
            found += [f"{where}: {warning}" for warning in operator_warnings(run)]
    return list(dict.fromkeys(found))


def with_tasks(run: Recipe, recipe: CompareRecipe, names: tuple[str, ...]) -> Recipe:
    """A run's recipe with these tasks, trained or not."""
    known = recipe.tasks | recipe.retention
    return run.model_copy(update={"tasks": {name: known[name] for name in names}})
