"""What to set where a guard has found something: overrides as the command line takes them, the first one first to try.

Each fits the recipe it is given for: a run with it begins. At most two, so that a finding stays one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from manyshot.gap_weights import EFFECTIVE_SHARE, needs_gaps
from manyshot.operators import BUILT_IN, Operator
from manyshot.recipe import Recipe

Suggestions = tuple[str, ...]
MOST_SUGGESTIONS = 2
# weights by gaps that count alike in all tasks, for who merged without looking at the losses
GAP_WEIGHTS = "operator={name: metis, gap: relative, mask: false}"
# a line search over the merged update's length
SEARCH = "operator.scaling=auto"


def clearer_weights(recipe: Recipe, num_tasks: int) -> Suggestions:
    """For weights that leave tasks out: gaps that count alike in all tasks, a λ that keeps most of them effective."""
    method = recipe.method
    if not needs_gaps(method):
        return (GAP_WEIGHTS,) if method.name == "mean" else ()
    found = []
    if getattr(method, "gap", None) not in (None, "relative"):
        found.append("operator.gap=relative")
    temperature, effective = getattr(method, "temperature", None), getattr(method, "effective_tasks", None)
    if temperature not in (None, "auto"):
        found.append("operator.temperature=auto")
    elif effective is not None and effective < EFFECTIVE_SHARE * num_tasks:
        found.append(f"operator.effective_tasks={EFFECTIVE_SHARE * num_tasks:g}")
    return tuple(found[:MOST_SUGGESTIONS])


def calmer_learning(recipe: Recipe, tasks: Iterable[str], round_index: int) -> Suggestions:
    """For local updates that overshoot."""
    return _adopted(recipe, tasks, round_index) or (_learning_rate(recipe, 0.5),)


def keener_learning(recipe: Recipe, tasks: Iterable[str], round_index: int) -> Suggestions:
    """For local updates that do not get anywhere."""
    steps = f"protocol.local_steps={2 * recipe.protocol.local_steps}"
    return _adopted(recipe, tasks, round_index) or (_learning_rate(recipe, 2), steps)


def looser_mask(recipe: Recipe, num_tasks: int, *, collapsed: bool) -> Suggestions:
    """For a mask, or a trim, that keeps next to nothing; `collapsed` weights leave nobody who could agree."""
    method, found = recipe.method, list[str]()
    if collapsed and (weights := clearer_weights(recipe, num_tasks)):
        return weights
    if (agreement := _largest(method, "min_agreement")) is not None and agreement > 2:
        found.append("operator.min_agreement=2")
    if (threshold := _largest(method, "mask_threshold")) is not None:
        # above 1/(T − 1) even what all tasks agree on alike is dropped
        found.append(f"operator.mask_threshold={_floor(min(threshold / 2, 1 / max(1, num_tasks - 1)))}")
    if getattr(method, "mask", False) in (True, "soft"):
        found.append("operator.mask=false")
    if (density := _largest(method, "density")) is not None:
        found.append(f"operator.density={min(1.0, 10 * density):g}")
    return tuple(found[:MOST_SUGGESTIONS])


def longer_step(recipe: Recipe, num_tasks: int) -> Suggestions:
    """For a merged update that is hardly there."""
    method, found = recipe.method, list[str]()
    if recipe.merge.reference == "start" and (step_size := _step_size(recipe)) < 1:
        adam = recipe.merge.outer_optimizer == "adam"  # its step size is about what every weight moves by
        found.append(f"merge.outer_step_size={10 * step_size if adam else 1:g}")
    harmless = 1 / num_tasks if method.sums else 1.0
    if (scaling := _largest(method, "scaling")) is not None and scaling < harmless:
        found.append(f"operator.scaling={_floor(harmless)}")
    if getattr(method, "mask", False) in (True, "soft"):
        found.append("operator.mask=false")
    if not found and _can_search(recipe):
        found.append(SEARCH)
    elif not found and method.name != "ties":
        found.append("operator=ties")  # elects a sign where the mean of two signs is nothing
    return tuple(found[:MOST_SUGGESTIONS])


def shorter_step(recipe: Recipe, num_tasks: int, round_index: int) -> Suggestions:
    """For a merged model that moves too far, or in a direction that helps nobody."""
    merge, method, found = recipe.merge, recipe.method, list[str]()
    # the first round starts from the pretrained model, and the two references are the same
    may_refer = merge.space == "weights" and round_index > 1
    if merge.reference == "start":
        last = round_index == recipe.protocol.rounds
        if merge.looks_ahead(last=last) and (momentum := merge.momentum_of(round_index)):
            found.append(f"merge.outer_momentum={momentum / 2:.3g}")
        found.append(f"merge.outer_step_size={_step_size(recipe) / 2:g}")
    elif method.growth(num_tasks) > 1 + 1e-9:
        found.append(f"operator.scaling={_floor(1 / num_tasks if method.sums else 1.0)}")
        found += ["merge.reference=start"] if may_refer else []
    elif getattr(method, "mask", False) in (True, "soft"):
        found.append("operator.mask=false")
    elif may_refer and _largest(method, "mask_threshold") is not None:
        found.append("merge.reference=start")  # a mask on what earlier rounds merged takes some of it away again
    if _can_search(recipe):
        found.append(SEARCH)
    return (*found, _learning_rate(recipe, 0.5))[:MOST_SUGGESTIONS]


def _can_search(recipe: Recipe) -> bool:
    """Whether the length of the step may be left to a line search over the operator's own scaling."""
    searches = recipe.merge.space == "weights" and recipe.merge.outer_optimizer != "adam"
    return searches and recipe.method.name in BUILT_IN and _largest(recipe.method, "scaling") is not None


def _learning_rate(recipe: Recipe, factor: float) -> str:
    return f"local_update.learning_rate={recipe.local_update.learning_rate * factor:g}"


def _adopted(recipe: Recipe, tasks: Iterable[str], round_index: int) -> Suggestions:
    """Experts of round 1 that were not trained here: training them here is what can be set."""
    adopted = [task for task in tasks if recipe.tasks[task].expert and round_index < 2 and "." not in task]
    return tuple(f"tasks.{task}.expert=null" for task in adopted)[:MOST_SUGGESTIONS]


def _step_size(recipe: Recipe) -> float:
    size = recipe.merge.outer_step_size
    return max(size) if isinstance(size, tuple) else size


def _largest(method: Operator, name: str) -> float | None:
    """A setting, or its largest value in any round; None where there is none, or it is found in the run."""
    value = getattr(method, name, None)
    value = max(value) if isinstance(value, tuple) else value
    return float(value) if isinstance(value, int | float) else None


def _floor(value: float) -> float:
    """Two digits at least, rounded down: 1/3 as 0.33, so that T times it is no more than 1."""
    digits = max(2, 1 - math.floor(math.log10(value))) if value > 0 else 2
    scale = 10.0**digits
    return math.floor(value * scale) / scale
