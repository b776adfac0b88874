"""`manyshot extend`: more rounds for a run that has finished, and tasks that come with them.

What the run has done stays as it is, under the recipe that it was done with; the rounds that are added have their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from manyshot.disk import disk_errors
from manyshot.errors import RecipeError, RunFolderError
from manyshot.executors import Executor
from manyshot.inputs import check_inputs
from manyshot.manifest import unseal
from manyshot.outer import MEMORIES, STATE_NAME
from manyshot.progress import Listener
from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping, to_yaml
from manyshot.removed import refuse_removed
from manyshot.run_identity import differences, may_change, recipe_of
from manyshot.run_lock import one_writer
from manyshot.rundir import RunFolder, remove, write_text
from manyshot.runner import RunResult
from manyshot.runner import run as run_recipe
from manyshot.segments import Segment, read_segments, write_segments
from manyshot.start_adapters import own_adapter
from manyshot.status import resume_command

# keys that more rounds change
LONGER = ("protocol.rounds", "protocol.local_steps")
# settings with one value per round: those of rounds that are over must be what they were
PER_ROUND = ("operator", "overrides", "merge.outer_step_size")


def extend(
    path: Path,
    rounds: int = 1,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    *,
    listener: Listener | None = None,
    executor: Executor | None = None,
) -> RunResult:
    """Add so many rounds of `steps` local steps (default: as many as a round had so far), and tasks (`tasks.<name>.…`).

    Raises ManyshotError for a run that is not finished, and for overrides that would change what it has done.
    """
    folder = RunFolder(path)
    recipe = longer_recipe(folder, rounds, steps, overrides)
    with disk_errors(path):
        check_inputs(recipe)  # before anything is written
        with one_writer(path):
            begun = _finished(folder)
            _note(folder, begun, recipe)
    return run_recipe(recipe, path, resume=True, listener=listener, executor=executor, command="manyshot extend")


def longer_recipe(folder: RunFolder, rounds: int, steps: int | None, overrides: Sequence[str]) -> Recipe:
    """The recipe of the run with more rounds. Raises RecipeError for what may not change."""
    begun = _finished(folder)
    if given := [one for one in overrides if one.partition("=")[0].strip() in LONGER]:
        raise RecipeError(
            f"{given[0]}: --rounds says how many rounds are added, --steps with how many local steps each"
        )
    before = begun.protocol
    each = steps if steps is not None else before.local_steps // before.rounds
    longer = (f"protocol.rounds={before.rounds + rounds}", f"protocol.local_steps={before.local_steps + rounds * each}")
    recipe = recipe_from_mapping(begun.model_dump(mode="json"), [*overrides, *longer])
    refuse_changes(begun, recipe)
    _refuse_removed_start(folder, begun, recipe)
    return recipe


def _refuse_removed_start(folder: RunFolder, begun: Recipe, recipe: Recipe) -> None:
    """Raise RunFolderError where added rounds go on from what `keep` had removed."""
    last, wanted = begun.protocol.rounds, "adding rounds"
    refuse_removed(folder.path, folder.round(last) / "carried_adapter", wanted)
    for name in begun.tasks:
        if (own := own_adapter(begun, folder, last + 1, name)) is not None:
            refuse_removed(folder.path, own, wanted)
        if _merges_again(folder, begun, recipe):
            for part in ("adapter", "model"):
                refuse_removed(folder.path, folder.local_update(last, name) / part, wanted)


def _merges_again(folder: RunFolder, begun: Recipe, recipe: Recipe) -> bool:
    """Whether the last merge is to be repeated: no round was to follow, so that it did not leave the outer state."""
    place = folder.round(begun.protocol.rounds)
    return bool(MEMORIES[recipe.merge.outer_optimizer]) and not (place / STATE_NAME).exists()


def refuse_changes(begun: Recipe, recipe: Recipe) -> None:
    """Raise RecipeError for everything that would make another run of what has been done."""
    found = differences(begun.model_dump(mode="json"), recipe.model_dump(mode="json"))
    wrong = [line for line in found if not _may_differ(line, begun, recipe)]
    if begun.local_update.schedule_scope == "run":
        wrong.append("local_update.schedule_scope: run has decayed the learning rate to its end; nothing follows that")
    if wrong:
        raise RecipeError("an extended run goes on as it was begun:\n" + "\n".join(wrong))


def _may_differ(line: str, begun: Recipe, recipe: Recipe) -> bool:
    key = line.split(":", maxsplit=1)[0]
    parts = key.split(".")
    if key in LONGER or may_change(line):
        return True
    if parts[0] == "tasks" and len(parts) > 1:
        return parts[1] not in begun.tasks
    if not any(key == one or key.startswith(f"{one}.") for one in PER_ROUND):
        return False
    over = range(1, begun.protocol.rounds + 1)
    return all(
        begun.plan.at_round(r) == recipe.plan.at_round(r) and _step_size(begun, r) == _step_size(recipe, r)
        for r in over
    )


def _step_size(recipe: Recipe, round_index: int) -> float:
    size = recipe.merge.outer_step_size
    return size[round_index - 1] if isinstance(size, tuple) else size


def _finished(folder: RunFolder) -> Recipe:
    """The recipe of a run that has finished. Raises RunFolderError for one that has not, or for no run."""
    if not folder.recipe.exists():
        raise RunFolderError(f"{folder.path}: holds no run (no recipe.yaml)")
    recipe = recipe_from_mapping(recipe_of(folder))
    rounds = recipe.protocol.rounds
    if any(segment.rounds == rounds for segment in read_segments(folder.path)):
        return recipe  # it had: a kill came while _note made a part of it, before the recipe was the longer one
    done = [r for r in range(1, rounds + 1) if (folder.round(r) / "DONE.json").exists()]
    if len(done) < rounds or not folder.scores.exists():
        raise RunFolderError(
            f"{folder.path}: has finished {len(done)} of {rounds} rounds; first finish it by "
            f"{resume_command(folder.path)}"
        )
    return recipe


def _note(folder: RunFolder, begun: Recipe, recipe: Recipe) -> None:
    """Write down what the run was until now, then what it is to be."""
    last = begun.protocol.rounds
    segment = Segment(last, list(begun.tasks), begun.model_dump(mode="json"))
    # a kill may have come between the two files
    earlier = [one for one in read_segments(folder.path) if one.rounds < last]
    write_segments(folder.path, [*earlier, segment])
    unseal(folder.path, "scores")
    place = folder.round(last)
    if _merges_again(folder, begun, recipe):
        for where, step in ((folder.path, f"round {last}"), (place, "records"), (place, "merge")):
            unseal(where, step)
        for name in ("DONE.json", "merge.json"):
            remove(place / name)
    write_text(folder.recipe, to_yaml(recipe))
