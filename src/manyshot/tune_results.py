"""tune.json: every trial of a search, what was chosen, and what the settings mattered. No times, so equal searches
give equal bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from manyshot.tune_folder import Trial, TuneFolder, read_end, read_trials
from manyshot.tune_recipe import TuneRecipe, own_settings
from manyshot.tune_sampler import importances
from manyshot.tune_space import Settings, same_settings

FORMAT = 1
Json = dict[str, Any]


def collect(
    recipe: TuneRecipe,
    folder: TuneFolder,
    pretrained_losses: Mapping[str, float],
    expert_losses: Mapping[str, float] | None,
    settings: Settings,
) -> Json:
    """What tune.json says; `settings` are those of best.yaml."""
    search = recipe.search
    searches = [_search(recipe, folder, index) for index in recipe.searched_rounds]
    return {
        "format": FORMAT,
        "name": folder.path.resolve().name,
        "tasks": list(recipe.tasks),
        "rounds": search.rounds,
        "objective": search.objective,
        "better": "higher" if search.maximize else "lower",
        "sampler": search.sampler,
        "parameters": recipe.model_dump(mode="json")["search"]["parameters"],
        "pretrained_losses": dict(pretrained_losses),
        "expert_losses": dict(expert_losses or {}),
        "searches": searches,
        "best": {"settings": settings, "trial": searches[-1]["trials"][searches[-1]["chosen"]]},
    }


def _search(recipe: TuneRecipe, folder: TuneFolder, index: int) -> Json:
    """One search: of the merge of a round, or of whole runs (round 0)."""
    trials, end = read_trials(folder, index), read_end(folder, index)
    assert end is not None  # results are written when all searches are over
    own = own_settings(recipe.base_recipe, recipe.dimensions, index)
    is_own = own is not None and same_settings(trials[0].settings, own)
    tried = [trial.tried for trial in trials]
    return {
        "round": index,
        "ended_by": end["why"],
        "chosen": end["chosen"],
        "own": 0 if is_own else None,
        "importances": importances(recipe.dimensions, tried, maximize=recipe.search.maximize),
        "trials": [_trial(trial) for trial in trials],
    }


def _trial(trial: Trial) -> Json:
    return {
        "number": trial.number,
        "settings": trial.settings,
        "value": trial.value,
        "multi_task_loss": trial.multi_task_loss,
        "losses": trial.losses,
        "shares": trial.shares,
        "error": trial.error,
    }
