"""What a search will train and evaluate, before anything is loaded."""

from __future__ import annotations

from typing import Any

from manyshot.tune_recipe import TuneRecipe


def plan_tune(recipe: TuneRecipe) -> dict[str, Any]:
    """Trials, optimizer steps and evaluations. Where only time ends a search, `trials` is null, and counts that grow
    with them are those of one trial.
    """
    base, searches = recipe.trial_recipe, recipe.searched_rounds
    # an expert that exists already is not trained, where it takes the place of a first update
    protocols = {name: base.protocol_of(name) for name in base.tasks}
    trained = [protocols[name] for name, spec in base.tasks.items() if spec.expert is None]
    rounds, whole = base.protocol.rounds, recipe.search.rounds == "all"
    trials = recipe.num_trials
    experts = sum(one.local_steps for one in trained) if recipe.needs_experts else 0
    first = sum(one.steps_in_round(1) for one in trained) if rounds > 1 or not recipe.needs_experts else 0
    later = sum(one.local_steps - one.steps_in_round(1) for one in protocols.values())
    steps = {"experts": experts, "first_round": first}
    if recipe.search.rounds in ("each", "all"):
        steps["later_rounds"] = later * (trials or 1) if whole else later
    num_tasks, tried = len(base.tasks), (trials or 1) * len(searches)
    # the pretrained model; experts and local updates on their own task; then every merged model on all tasks
    updates = num_tasks * ((1 if recipe.needs_experts else 0) + (len(searches) if rounds > 1 or not experts else 0))
    if whole:
        merges = tried * rounds
        updates += num_tasks * tried * (rounds - 1)
    else:
        merges = tried + len(searches)  # the chosen settings are merged once more, where the run goes on
    return {
        "searches": [{"round": index, "trials": trials} for index in searches],
        "seconds": recipe.search.seconds,
        "parameters": [one.name for one in recipe.dimensions],
        "objective": recipe.search.objective,
        "steps": steps,
        "train_examples": sum(steps.values()) * base.local_update.batch_size,
        "merges": merges,
        "validation_examples": (num_tasks + updates + num_tasks * merges) * base.evaluation.validation_examples,
        "test_examples": 0,
    }
