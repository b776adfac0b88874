"""What a comparison consists of: its cells in the order in which they run, and what they cost. Reads no data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from manyshot.compare_recipe import Candidate, CompareRecipe
from manyshot.line_search import MOST_TRIES
from manyshot.recipe import Protocol
from manyshot.rundir import content_key


@dataclass(frozen=True, order=True)
class Place:
    """One backbone, one task set, one seed: the cells of a place share their experts and are compared in pairs."""

    model: str
    task_set: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One number of a table before the mean over seeds: a method, once or in rounds, at a place."""

    place: Place
    method: str
    protocol: str  # post_hoc, many_shot or joint

    @property
    def name(self) -> str:
        return f"{self.place.model}/{self.place.task_set}/seed {self.place.seed}/{self.method}/{self.protocol}"


def places(recipe: CompareRecipe) -> list[Place]:
    """Every place, in the order in which they run: first those where the grids are searched."""
    sets = sorted(recipe.sets, key=lambda name: name != recipe.tuning_set)
    return [Place(model, name, seed) for model in recipe.models for name in sets for seed in _seeds(recipe, name)]


def _seeds(recipe: CompareRecipe, task_set: str) -> list[int]:
    """A task set's seeds, those of the tuning first."""
    first = recipe.tuning_seeds if task_set == recipe.tuning_set else ()
    return [*first, *(seed for seed in recipe.seeds_of(task_set) if seed not in first)]


def cells_at(recipe: CompareRecipe, place: Place) -> list[Cell]:
    """The cells of a place, in recipe order."""
    return [
        Cell(place, name, protocol)
        for name, method in recipe.methods.items()
        if method.task_sets is None or place.task_set in method.task_sets
        for protocol in recipe.protocols(name)
    ]


def all_cells(recipe: CompareRecipe) -> list[Cell]:
    return [cell for place in places(recipe) for cell in cells_at(recipe, place)]


def is_tuned_at(recipe: CompareRecipe, cell: Cell) -> bool:
    """Whether the grid of the cell's method is searched at its place."""
    place = cell.place
    here = place.task_set == recipe.tuning_set and place.seed in recipe.tuning_seeds
    return here and bool(recipe.methods[cell.method].grid)


def tries(recipe: CompareRecipe, cell: Cell) -> list[Candidate]:
    """What a cell runs: the candidates of its grid where that is searched; elsewhere one, as which the first counts."""
    possible = recipe.possible(cell.method)
    return possible if is_tuned_at(recipe, cell) else possible[:1]


@dataclass(frozen=True)
class Update:
    """A local update from the pretrained model, by all that tells it from others: equal ones are done once."""

    model: str
    task: str
    seed: int
    settings: str
    num_steps: int
    batch_size: int


def first_updates(recipe: CompareRecipe, place: Place, candidate: Candidate, shot: str) -> set[Update]:
    """The local updates from the pretrained model that a candidate asks for: all steps, or the first round's."""
    update, protocols = candidate.local_update, _protocols(recipe, place, candidate, shot)
    # of all inputs of its key (steps_train), those that methods may have otherwise
    settings = content_key(update.model_dump(mode="json"), candidate.merge.space)
    return {
        Update(place.model, task, place.seed, settings, protocol.steps_in_round(1), update.batch_size)
        for task, protocol in protocols.items()
    }


def _protocols(recipe: CompareRecipe, place: Place, candidate: Candidate, shot: str) -> dict[str, Protocol]:
    """Task -> the rounds and steps that it takes part in."""
    protocol = candidate.protocol
    if shot == "post_hoc":
        protocol = Protocol(rounds=1, local_steps=protocol.local_steps)
    tasks = recipe.sets[place.task_set].tasks
    return {task: protocol.share(recipe.tasks[task].steps_share) for task in tasks}


def num_steps(recipe: CompareRecipe, cell: Cell) -> int:
    """Optimizer steps of one cell, over all its tasks and rounds."""
    protocols = _protocols(recipe, cell.place, tries(recipe, cell)[0], cell.protocol)
    return sum(protocol.local_steps for protocol in protocols.values())


def count_steps(recipe: CompareRecipe) -> dict[str, Any]:
    """Optimizer steps of the whole comparison: as shared here, and with every cell as a run of its own.

    A cell on its own trains its experts too, since normalized performance divides by their scores (post-hoc merges
    the same experts, unless its method trains in its own way; other candidates need no training). Shared, local
    updates from the pretrained model are trained once per backbone, task, seed and settings, whatever the operator:
    the experts, and the first round. An expert that exists already is not trained.
    """
    later, joint, alone, examples = 0, 0, 0, 0
    experts: set[Update] = set()
    begun: set[Update] = set()
    for cell in all_cells(recipe):
        place, shot = cell.place, cell.protocol
        needed = first_updates(recipe, place, recipe.shared, "post_hoc")
        for candidate in tries(recipe, cell):
            size = candidate.local_update.batch_size
            if shot == "joint":
                steps = num_steps(recipe, cell)
                joint, alone, examples = joint + steps, alone + steps, examples + steps * size
                continue
            asked = first_updates(recipe, place, candidate, shot)
            if shot == "post_hoc":
                needed |= asked
                continue
            begun |= asked
            steps = sum(one.local_steps for one in _protocols(recipe, place, candidate, shot).values())
            steps -= sum(update.num_steps for update in asked)
            later, examples = later + steps, examples + steps * size
            alone += steps + _num_steps(recipe, asked)
        experts |= needed
        alone += _num_steps(recipe, needed)
    parts = {
        "experts": _num_steps(recipe, experts),
        "first_rounds": _num_steps(recipe, begun - experts),  # with one round they are the experts
        "later_rounds": later,
        "joint": joint,
    }
    shared = sum(parts.values())
    examples += sum(update.num_steps * update.batch_size for update in _trained(recipe, experts | begun))
    ratio = alone / shared if shared else None
    return {"shared": shared, "one_by_one": alone, "ratio": ratio, "by_part": parts, "examples": examples}


def _num_steps(recipe: CompareRecipe, updates: Iterable[Update]) -> int:
    return sum(update.num_steps for update in _trained(recipe, updates))


def _trained(recipe: CompareRecipe, updates: Iterable[Update]) -> list[Update]:
    return [update for update in updates if recipe.tasks[update.task].expert is None]


def count_evaluations(recipe: CompareRecipe) -> tuple[int, int]:
    """How many times a model is measured on a task's validation split, and on its test split, at most."""
    losses, tests = 0, 0
    pairs: set[tuple[str, str, int]] = set()
    updates: set[Update] = set()
    for cell in all_cells(recipe):
        place, tasks = cell.place, recipe.sets[cell.place.task_set].tasks
        pairs |= {(place.model, task, place.seed) for task in tasks}
        updates |= first_updates(recipe, place, recipe.shared, "post_hoc")
        tests += len(tasks) + len(recipe.retention)
        for candidate in tries(recipe, cell) if cell.protocol != "joint" else ():  # which is not asked for its losses
            updates |= first_updates(recipe, place, candidate, cell.protocol)
            rounds = 1 if cell.protocol == "post_hoc" else candidate.protocol.rounds
            # every merged model, and the local updates of the later rounds
            losses += len(tasks) * (2 * rounds - 1)
            losses += len(tasks) * rounds * MOST_TRIES if candidate.operator.searches_scaling else 0
    # the pretrained model on every task, each expert on its own
    kept = len(recipe.retention) * len({(model, seed) for model, _, seed in pairs})
    return losses + len(pairs) + len(updates), tests + 2 * len(pairs) + kept


def count_benchmarks(recipe: CompareRecipe) -> int:
    """How many times a model is asked a benchmark, at most."""
    cells = all_cells(recipe)
    once = {(cell.place.model, name) for cell in cells for name in recipe.asked(cell.place.task_set)}
    experts = {
        (cell.place.model, cell.place.seed, name)
        for cell in cells
        for name, one in recipe.asked(cell.place.task_set).items()
        if one.task is not None
    }
    return len(once) + len(experts) + sum(len(recipe.asked(cell.place.task_set)) for cell in cells)


def plan_compare(recipe: CompareRecipe) -> dict[str, Any]:
    """Cells, steps and evaluations, before anything is loaded."""
    cells = all_cells(recipe)
    losses, tests = count_evaluations(recipe)
    steps = count_steps(recipe)
    return {
        "cells": [
            {
                "place": vars(cell.place),
                "method": cell.method,
                "protocol": cell.protocol,
                "tries": len(tries(recipe, cell)),
            }
            for cell in cells
        ],
        "steps": steps,
        "benchmarks": count_benchmarks(recipe),
        "train_examples": steps["examples"],
        "validation_examples": losses * recipe.evaluation.validation_examples,
        "test_examples": tests * recipe.evaluation.test_examples,
    }
