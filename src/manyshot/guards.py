"""Guards: what is wrong with a round, from its records and those of the rounds before. Pure functions, no torch.

A guard looks at a history of rounds (the last one may be unfinished) and finds nothing, or a Finding: what was found in
numbers, what it means, and which recipe keys to set. docs/guards.md is the table of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import fmean
from typing import Any, Literal

from manyshot.gap_weights import effective_tasks
from manyshot.guard_advice import (
    calmer_learning,
    clearer_weights,
    keener_learning,
    longer_step,
    looser_mask,
    shorter_step,
)
from manyshot.recipe import Recipe
from manyshot.round_record import RoundRecord, growth, predicted_changes

Kind = Literal[
    "weights_collapse",
    "expert_worse",
    "expert_learned_nothing",
    "mask_keeps_nothing",
    "update_vanishes",
    "divergence",
    "loss_rises",
    "task_worsens",
    "task_skipped",
    "rolled_back",
]
History = Sequence[RoundRecord]

# below this many effective tasks one task has 0.85 of the weight or more (T = 3), the others next to none
FEWEST_EFFECTIVE = 1.5
# with two tasks an uneven pair is not a collapse: the weights may say no more than that one is nearly learned
FEWEST_TASKS = 3
# below this share a mask has thrown away nearly everything the tasks learned
LOW_KEPT_SHARE = 0.01
# a merged update this far below that of the mean of unrelated updates, 1/√T of their own length, moves nothing
VANISHING = 0.1
# losses differ by this share, or by this many nats, from one round to the next for no reason at all: by the rounding of
# bfloat16, by which of two like minima the updates found
RISE_SHARE, RISE_NATS = 0.02, 0.01
# an expert that gained less than this share of the pretrained model's loss has learned nothing: two steps at a usual
# rate already bring more
LEAST_GAIN = 0.005
# constant updates with momentum m < 1 grow by 1 + m < 2 in the second round and by (1 + m + m²)/(1 + m) < 1.5 in the
# third: what grows by more in one round, or by as much in two rounds running, has something else behind it
GROWTH_ONCE, GROWTH_TWICE = 2.0, 1.5


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a round (0: the post-hoc merge).

    `suggestions` are overrides as the command line takes them, `operator.gap=relative`, the first one to try first.
    """

    kind: Kind
    round_index: int
    tasks: tuple[str, ...]
    found: str
    means: str
    suggestions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        record = asdict(self) | {"round": self.round_index, "tasks": [*self.tasks], "suggestions": [*self.suggestions]}
        del record["round_index"]
        return record


def describe(finding: Mapping[str, Any]) -> str:
    """One line for people, of a finding as it is in guards.json."""
    where = f"round {finding['round']}" if finding["round"] else "post-hoc"
    advice = " or ".join(finding["suggestions"])
    return f"{where}: warning: {finding['found']}; {finding['means']}" + (f"; set {advice}" if advice else "")


def examine(history: History, recipe: Recipe) -> list[Finding]:
    """What all guards find in the last round of `history`, those that need no merge first."""
    found = [finding for guard in WEIGHT_GUARDS for finding in guard(history, recipe)]
    if history[-1].rejected_losses:
        found += guard_rollback(history, recipe)
    elif history[-1].merged_losses:
        found += [finding for guard in MERGE_GUARDS for finding in guard(history, recipe)]
    return found


# ---- before the merge: experts and weights ---------------------------------------------------------------------------


def guard_weights(history: History, recipe: Recipe) -> Iterable[Finding]:
    """One task has taken nearly all weight."""
    now = history[-1]
    effective = effective_tasks(list(now.weights.values()))
    if len(now.weights) < FEWEST_TASKS or effective >= FEWEST_EFFECTIVE:
        return
    largest = max(now.weights, key=lambda task: now.weights[task])
    share = now.weights[largest] / math.fsum(now.weights.values())
    yield Finding(
        "weights_collapse",
        now.round_index,
        (largest,),
        f"'{largest}' has {share:.3f} of the weight ({effective:.2f} effective tasks of {len(now.weights)})",
        "the other tasks are hardly merged, and a consensus mask finds none that agree with it",
        clearer_weights(recipe, len(now.weights)),
    )


def guard_experts(history: History, recipe: Recipe) -> Iterable[Finding]:
    """Experts that lost by their local update."""
    now = history[-1]
    worse = tuple(task for task, gap in now.gaps.items() if -gap > tolerance(now.start_losses[task]))
    if worse:
        yield Finding(
            "expert_worse",
            now.round_index,
            worse,
            f"experts fit their own tasks worse than what they started from: "
            f"{_all_moved(worse, now.start_losses, now.expert_losses)}",
            "their local updates overfit or overshoot, and gap weights take that for a task that needs nothing",
            calmer_learning(recipe, worse, now.round_index),
        )


def guard_gains(history: History, recipe: Recipe) -> Iterable[Finding]:
    """Experts that gained nothing on the pretrained model, from there or from where rounds had taken their tasks."""
    now, pretrained = history[-1], _pretrained(history)
    nothing = [
        task
        for task, loss in now.expert_losses.items()
        if pretrained[task] - loss < LEAST_GAIN * pretrained[task]
        and now.start_losses[task] - loss >= -tolerance(now.start_losses[task])  # guard_experts speaks of the others
    ]
    taken = tuple(task for task in nothing if now.start_losses[task] - pretrained[task] > tolerance(pretrained[task]))
    idle = tuple(task for task in nothing if task not in taken)
    found = "experts fit their own tasks no better than the pretrained model: "
    if idle:
        yield Finding(
            "expert_learned_nothing",
            now.round_index,
            idle,
            found + _all_moved(idle, pretrained, now.expert_losses),
            "there is nothing of them to merge, and a gap as a share of that gain says nothing; their data may be "
            "noise, or nothing new to the model",
            keener_learning(recipe, idle, now.round_index),
        )
    if taken:
        yield Finding(
            "expert_learned_nothing",
            now.round_index,
            taken,
            found + _all_moved(taken, pretrained, now.expert_losses),
            "the rounds before took more from their tasks than they could bring back, and a gap as a share of that "
            "gain says nothing",
            shorter_step(recipe, len(now.weights), now.round_index),
        )


def _pretrained(history: History) -> dict[str, float]:
    """The pretrained model's losses; for a task that was added to the run, what its first round began with."""
    return {task: loss for record in reversed(history) for task, loss in record.start_losses.items()}


def guard_skipped(history: History, recipe: Recipe) -> Iterable[Finding]:
    """Tasks whose local update failed, so that the round goes on without them (`on_failure`)."""
    now = history[-1]
    if now.skipped:
        yield Finding(
            "task_skipped",
            now.round_index,
            tuple(now.skipped),
            f"left out of the round: {'; '.join(now.skipped.values())}",
            "the other tasks are merged without it, and the merged model is measured on it all the same",
            (),
        )


# ---- after it: the merged model --------------------------------------------------------------------------------------


def guard_mask(history: History, recipe: Recipe) -> Iterable[Finding]:
    """The operator keeps next to no coordinate."""
    now = history[-1]
    if now.kept_share is not None and now.kept_share < LOW_KEPT_SHARE:
        yield Finding(
            "mask_keeps_nothing",
            now.round_index,
            (),
            f"the mask kept {now.kept_share:.2%} of the coordinates that tasks changed",
            "the merged model is all but the pretrained model"
            if recipe.merge.reference == "pretrained"
            else "the merged model is all but the one that the round began with",
            looser_mask(recipe, len(now.weights), collapsed=any(guard_weights(history, recipe))),
        )


def guard_update(history: History, recipe: Recipe) -> Iterable[Finding]:
    """The merged update is far shorter than the updates that it is made of; where a mask did it, guard_mask says so."""
    now, num_tasks = history[-1], len(history[-1].weights)
    if now.reach is None or now.reach >= VANISHING / math.sqrt(num_tasks) or any(guard_mask(history, recipe)):
        return
    yield Finding(
        "update_vanishes",
        now.round_index,
        (),
        f"the merged update is {now.reach:.2g} times as long as the tasks' own, where the mean of unrelated updates "
        f"would be {1 / math.sqrt(num_tasks):.2g} times",
        "the tasks' updates cancel each other out or are scaled away, so rounds train without moving the merged model",
        longer_step(recipe, num_tasks),
    )


def guard_losses(history: History, recipe: Recipe) -> Iterable[Finding]:
    """The run diverges, or at least this round took the merged model back."""
    now = history[-1]
    start, end = fmean(now.start_losses.values()), fmean(now.merged_losses.values())
    pretrained = fmean(loss for task, loss in _pretrained(history).items() if task in now.start_losses)
    signs, means = [], []
    if end - pretrained > tolerance(pretrained):
        signs.append(f"multi-task loss {end:.3f} is above the pretrained model's {pretrained:.3f}")
        means.append("the rounds so far have done more harm than good")
    if grown := _growing(history, recipe):
        signs.append(grown)
        means.append("what grows like this carries the model away, and the losses follow")
    if not signs and end - start <= tolerance(start):
        return
    promised = predicted_changes(now)
    change = f"multi-task loss {_moved(start, end)}" + (
        f", where a mean of the experts with these weights promised {fmean(promised.values()):+.3f}" if promised else ""
    )
    yield Finding(
        "divergence" if signs else "loss_rises",
        now.round_index,
        tuple(task for task, more in now.changes.items() if more > tolerance(now.start_losses[task])),
        "; ".join([*signs, change]),
        f"the run diverges: {'; '.join(means)}"
        if signs
        else "the round took back some of what earlier ones had gained, and a run that diverges begins like this",
        shorter_step(recipe, len(now.weights), now.round_index),
    )


def guard_tasks(history: History, recipe: Recipe) -> Iterable[Finding]:
    """Tasks that got worse in this round and in the one before; where all goes wrong, guard_losses says so."""
    if len(history) < 2 or any(one.kind == "divergence" for one in guard_losses(history, recipe)):
        return
    now = history[-1]
    worse = tuple(
        task
        for task in now.merged_losses
        if all(task in one.changes and one.changes[task] > tolerance(one.start_losses[task]) for one in history[-2:])
    )
    if worse:
        paths = [
            f"'{task}' {history[-2].start_losses[task]:.3f} → {_moved(now.start_losses[task], now.merged_losses[task])}"
            for task in worse
        ]
        yield Finding(
            "task_worsens",
            now.round_index,
            worse,
            f"tasks got worse in two rounds in a row: {', '.join(paths)}",
            "the other tasks' updates crowd them out",
            clearer_weights(recipe, len(now.weights)) or shorter_step(recipe, len(now.weights), now.round_index),
        )


def guard_rollback(history: History, recipe: Recipe) -> Iterable[Finding]:
    """A merge that was taken back (`on_regression: rollback`)."""
    now = history[-1]
    start, rejected = fmean(now.start_losses.values()), fmean(now.rejected_losses.values())
    yield Finding(
        "rolled_back",
        now.round_index,
        tuple(task for task, loss in now.rejected_losses.items() if loss > now.start_losses[task]),
        f"the merged model's multi-task loss was {_moved(start, rejected)}",
        "the merge was taken back, and the round ends with the model that it began with",
        shorter_step(recipe, len(now.weights), now.round_index),
    )


# ---- what they share -------------------------------------------------------------------------------------------------


def tolerance(loss: float) -> float:
    """By how much a loss may differ from another before that means anything."""
    return max(RISE_SHARE * loss, RISE_NATS)


def _growing(history: History, recipe: Recipe) -> str | None:
    """How the merged update grew, where it grows geometrically and out of the tasks' reach.

    The average of updates is never longer than the longest of them, and the sum of T unrelated ones √T times as long:
    up to there growth is harmless. A line search over the scaling stops where losses rise, so its steps may differ.
    """
    if len(history) < 2 or (reach := history[-1].reach) is None or recipe.method.searches_scaling:
        return None
    by = [growth(now, before) or 0.0 for before, now in pairwise(history[-3:])]
    twice = len(by) == 2 and min(by) >= GROWTH_TWICE and reach > 1
    if not twice and not (by[-1] >= GROWTH_ONCE and reach > math.sqrt(len(history[-1].weights))):
        return None
    grown = " and then ".join(f"{one:.3g}-fold" for one in by)
    return f"the merged update grew {grown}, to {reach:.3g} times the tasks' own"


def _moved(before: float, after: float) -> str:
    return f"{before:.3f} → {after:.3f}"


def _all_moved(tasks: Iterable[str], before: Mapping[str, float], after: Mapping[str, float]) -> str:
    return ", ".join(f"'{task}' {_moved(before[task], after[task])}" for task in tasks)


Guard = Callable[[History, Recipe], Iterable[Finding]]
# those that ask for experts and weights alone, and can speak before the merge; and those that ask for the merged model
WEIGHT_GUARDS: tuple[Guard, ...] = (guard_skipped, guard_weights, guard_experts, guard_gains)
MERGE_GUARDS: tuple[Guard, ...] = (guard_mask, guard_update, guard_losses, guard_tasks)
BEFORE_MERGE: tuple[Kind, ...] = ("task_skipped", "weights_collapse", "expert_worse", "expert_learned_nothing")
