"""`manyshot tune`: settings of the merge, searched on the validation splits alone.

Experts are trained once and shared by every trial. A trial is one merge and one evaluation of it (`rounds: post_hoc`,
`first`, `each`), or a run of all rounds as in a comparison (`rounds: all`). The tasks that it is given have no test
examples, so nothing here can look at one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from manyshot.compare_gain import shares
from manyshot.compare_jobs import FAILURES, TRIAL, TrialJob, failed, run_trial
from manyshot.disk import disk_errors
from manyshot.errors import MergeError, RunFolderError
from manyshot.executor_choice import computing_threads, open_executor
from manyshot.inputs import check_inputs
from manyshot.manifest import MANIFEST, check_files
from manyshot.models import ModelState
from manyshot.progress import Listener, Progress
from manyshot.recipe import operator_warnings
from manyshot.recipe_file import to_yaml
from manyshot.rounds import merge_round, run_round
from manyshot.run_identity import describe as describe_run
from manyshot.run_lock import clear, one_writer
from manyshot.rundir import read_json, remove, require_space, write_json, write_text
from manyshot.seeding import derive_seed, preserved_random_state
from manyshot.steps import Expert, Run, measure
from manyshot.steps_merge import seal_merge
from manyshot.steps_train import all_steps_alone, update_locally
from manyshot.tune_folder import (
    Trial,
    TuneFolder,
    claim,
    describe,
    link_updates,
    read_end,
    read_trials,
    write_end,
    write_trial,
)
from manyshot.tune_outputs import write_outputs
from manyshot.tune_recipe import TuneRecipe, own_settings, per_round, with_settings
from manyshot.tune_results import collect
from manyshot.tune_sampler import require_optuna, suggest
from manyshot.tune_space import Settings, same_settings, shown_value

Json = dict[str, Any]
# what a trial finds: {"losses": {task: …}, "multi_task_loss": …} of the model that it ends with, in files of the folder
Attempt = Callable[[Settings, Path], Json]


@dataclass(frozen=True)
class TuneResult:
    """What a search left: `best` is best.yaml, `results` tune.json, `files` the report and its figures."""

    folder: Path
    best: Path
    results: Json
    files: list[Path]


@dataclass(frozen=True)
class Tuning:
    """A search that is running. `run` holds what all trials share; `losses` are by task."""

    recipe: TuneRecipe
    folder: TuneFolder
    run: Run
    pretrained: Json
    expert_losses: dict[str, float] | None = None

    @property
    def pretrained_losses(self) -> dict[str, float]:
        return {task: entry["loss"] for task, entry in self.pretrained["losses"].items()}


def tune(
    recipe: TuneRecipe,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    repair: bool = False,
    listener: Listener | None = None,
    command: str | None = None,
) -> TuneResult:
    """Search into the folder `output`; write tune.json, best.yaml, report and figures.

    A folder that is not empty is refused unless `resume` (go on from the last finished trial) or `force` (start over);
    `repair` resumes, and redoes what was changed or removed. Raises ManyshotError for inputs that cannot be used, and
    where no settings could be merged; a trial that fails is recorded, and the search goes on.
    """
    require_optuna()
    if recipe.executor.name == "ray":
        output = output.absolute()  # tasks on other nodes begin in another folder
    folder, resume = TuneFolder(output), resume or repair
    claim(folder, recipe, resume=resume, force=force)
    with disk_errors(output), preserved_random_state(), one_writer(output), ExitStack() as stack:
        claim(folder, recipe, resume=resume, force=force)  # now that nobody else changes it
        progress = Progress(listener)
        progress.message("checking data and model")
        inputs = check_inputs(recipe.trial_recipe)
        reused = _reused(recipe, output)
        if force and not resume:
            clear(output)
        # a float32 task vector for every round that is searched, and one for the trial
        num_kept = len(recipe.searched_rounds) + 1
        require_space(output, 4 * inputs.changed_entries * num_kept, f"{num_kept} task vectors")
        describe(folder, recipe, inputs, command)
        check_files(output, progress.message, repair=repair, how="--resume --repair")
        stack.enter_context(one_writer(folder.run.path))  # which is a run that others may go on with
        stack.enter_context(computing_threads(recipe))
        executor = stack.enter_context(open_executor(recipe, folder.run.path, inputs, progress))
        progress.metrics = folder.metrics
        for warning in operator_warnings(recipe.trial_recipe):
            progress.message(f"warning: {warning}")
        tasks = tuple(task.without_test() for task in inputs.tasks)
        run = Run(
            *(recipe.trial_recipe, folder.run, inputs.base, tasks, executor, progress),
            trial=True,
            shared=folder.updates,
        )
        if reused is not None:
            found = link_updates(folder, reused)
            progress.message(f"{reused}: {len(found)} local updates, taken where nothing about them differs")
        tuning = prepare(recipe, folder, run)
        settings = search_runs(tuning) if recipe.search.rounds == "all" else search_rounds(tuning)
        best = with_settings(recipe.base_recipe, settings)
        write_text(folder.best, f"# in this folder: manyshot run best.yaml --output run --resume\n{to_yaml(best)}")
        describe_run(best, folder.run, inputs, command)
        results = collect(recipe, folder, tuning.pretrained_losses, tuning.expert_losses, settings)
        write_json(folder.results, results)
        return TuneResult(output, folder.best, results, write_outputs(results, output))


def _reused(recipe: TuneRecipe, output: Path) -> Path | None:
    """The folder whose local updates are taken. Raises RunFolderError where there are none."""
    if recipe.search.reuse is None:
        return None
    folder = Path(recipe.search.reuse)
    if not any(folder.rglob("local_update.json")):
        raise RunFolderError(f"search.reuse: {folder}: is no folder of a run or comparison with local updates in it")
    if folder.resolve() == output.resolve() or output.resolve() in folder.resolve().parents:
        raise RunFolderError(f"search.reuse: {folder}: is part of the search's own folder; choose another --output")
    return folder


def prepare(recipe: TuneRecipe, folder: TuneFolder, run: Run) -> Tuning:
    """Measure the pretrained model, and the experts where the objective or the merge asks for them."""
    pretrained = measure(run, run.pretrained, run.folder.round(0), 0)
    tuning = Tuning(recipe, folder, run, pretrained)
    if not recipe.needs_experts:
        return tuning
    experts = {expert.task: expert.loss for expert in all_steps_alone(run)}
    if recipe.search.maximize and shares(tuning.pretrained_losses, experts, experts)["average"] is None:
        raise MergeError(
            "no task's expert gained enough on the pretrained model for a share of it to be kept: "
            f"losses {tuning.pretrained_losses}, experts' {experts}; search for objective: multi_task_loss"
        )
    return replace(tuning, expert_losses=experts)


# ---- what is searched ------------------------------------------------------------------------------------------------


def search_rounds(tuning: Tuning) -> Settings:
    """The merges of rounds, one after the other, each on the experts of its round; the best one is gone on with."""
    recipe, run = tuning.recipe, tuning.run
    chosen: dict[int, Settings] = {}
    summary: Json = {"pretrained": tuning.pretrained, "rounds": {}}
    start = run.pretrained
    for index in recipe.searched_rounds:
        # the settings that are tried may ask for the experts' losses, whatever the recipe's own do
        experts = update_locally(replace(run, trial=False), start, index)
        attempt = partial(try_merge, run, recipe, chosen, index, start, experts, summary)
        chosen[index] = search(tuning, index, attempt).settings
        run = replace(run, recipe=with_settings(run.recipe, all_rounds(recipe, chosen, chosen[index])))
        start = run_round(run, index, start, summary)
        merged = run.folder.round(index)
        seal_merge(replace(run, trial=False), merged, read_json(merged / "merge.json"))
    return all_rounds(recipe, chosen, chosen[index])


def try_merge(
    run: Run,
    recipe: TuneRecipe,
    chosen: Mapping[int, Settings],
    index: int,
    start: ModelState,
    experts: Sequence[Expert],
    summary: Json,
    settings: Settings,
    folder: Path,
) -> Json:
    """One merge of a round's experts, measured."""
    tried = with_settings(run.recipe, all_rounds(recipe, chosen, settings))
    quiet = replace(run, recipe=tried, progress=Progress(metrics=run.progress.metrics))
    return merge_round(quiet, folder, index, start, experts, summary)[1]


def all_rounds(recipe: TuneRecipe, chosen: Mapping[int, Settings], settings: Settings) -> Settings:
    """The settings as a run takes them: where rounds are searched one by one, with what was chosen before."""
    return per_round(chosen, settings, recipe.protocol.rounds) if recipe.search.rounds == "each" else settings


def search_runs(tuning: Tuning) -> Settings:
    """Whole runs, as the cells of a comparison; they share the local updates of round 1."""
    run = tuning.run
    update_locally(run, run.pretrained, 1)
    link_updates(tuning.folder, run.folder.path)
    return search(tuning, 0, partial(try_run, tuning)).settings


def try_run(tuning: Tuning, settings: Settings, folder: Path) -> Json:
    """One run of all rounds, measured."""
    run = tuning.run
    job = TrialJob(
        label=f"trial {folder.name}",
        recipe=with_settings(run.recipe, settings),
        base=run.base,
        tasks=run.tasks,
        retention=(),
        folder=folder,
        shared=tuning.folder.updates,
        pretrained_losses=tuning.pretrained["losses"],
        scored=False,
    )
    outcome = run_trial(job, Progress(metrics=run.progress.metrics))
    if outcome["status"] == "failed":
        raise MergeError(outcome["error"])
    last = read_json(folder / TRIAL)["rounds"][-1]
    losses = {task: {"loss": loss} for task, loss in last["validation_losses"].items()}
    return {"losses": losses, "multi_task_loss": last["multi_task_validation_loss"]}


# ---- the search ------------------------------------------------------------------------------------------------------


def search(tuning: Tuning, index: int, attempt: Attempt) -> Trial:
    """Try settings until the budget ends; the best trial, the first of equals. What the journal holds is not redone."""
    recipe, folder, progress = tuning.recipe, tuning.folder, tuning.run.progress
    trials = read_trials(folder, index)
    for trial in trials:
        tidy(folder.trial(index, trial.number))  # where a kill came before
    end = read_end(folder, index)
    while end is None:
        why = spent(recipe, trials)
        settings = next_settings(recipe, index, trials) if why is None else None
        if settings is None:
            end = write_end(folder, index, why or "grid", best_of(recipe, trials).number)
        else:
            trials.append(try_settings(tuning, index, trials, settings, attempt))
            write_trial(folder, trials[-1])
            progress.message(_line(recipe, index, trials))
            tidy(folder.trial(index, trials[-1].number))
    chosen: Trial = trials[end["chosen"]]
    where = f"round {index}" if index else "whole runs"
    progress.message(f"{where}: trial {chosen.number + 1} is the best of {len(trials)}: {_shown(chosen)}")
    return chosen


def spent(recipe: TuneRecipe, trials: Sequence[Trial]) -> str | None:
    """Which budget a search has used up: its trials, its seconds, or none."""
    if recipe.num_trials is not None and len(trials) >= recipe.num_trials:
        return "trials"
    seconds = sum(trial.seconds for trial in trials)
    return "seconds" if trials and recipe.search.seconds is not None and seconds >= recipe.search.seconds else None


def next_settings(recipe: TuneRecipe, index: int, trials: Sequence[Trial]) -> Settings | None:
    """The recipe's own settings first, where the space holds them; then what the sampler suggests."""
    if not trials and (own := own_settings(recipe.base_recipe, recipe.dimensions, index)) is not None:
        return own
    return suggest(
        recipe.dimensions,
        [trial.tried for trial in trials],
        sampler=recipe.search.sampler,
        maximize=recipe.search.maximize,
        num_trials=recipe.num_trials,
        seed=derive_seed(recipe.seed, "tune", index, len(trials)),
    )


def try_settings(tuning: Tuning, index: int, trials: Sequence[Trial], settings: Settings, attempt: Attempt) -> Trial:
    """One trial; settings that were tried before are not merged again."""
    number, began = len(trials), time.monotonic()
    for other in trials:
        if same_settings(other.settings, settings):
            return replace(other, number=number, settings=settings, seconds=0.0)
    folder = tuning.folder.trial(index, number)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with preserved_random_state():
            measured = attempt(settings, folder)
        trial = judged(tuning, Trial(index, number, settings), measured)
    except FAILURES as error:
        trial = Trial(index, number, settings, error=failed(error)["error"])
    return replace(trial, seconds=round(time.monotonic() - began, 3))


def tidy(folder: Path) -> None:
    """Remove models of a trial that is over. What was measured stays, for people: the journal has it all."""
    for file in sorted(folder.rglob(MANIFEST)):  # first: they name what goes
        remove(file)
    for file in sorted(folder.glob("*")):
        if file.suffix not in (".json", ".jsonl"):
            remove(file)


def judged(tuning: Tuning, trial: Trial, measured: Json) -> Trial:
    """The trial with its losses, the shares of the experts' gains where those are known, and the objective's value."""
    losses = {task: entry["loss"] for task, entry in measured["losses"].items()}
    trial = replace(trial, losses=losses, multi_task_loss=measured["multi_task_loss"])
    if tuning.expert_losses is None:
        return replace(trial, value=trial.multi_task_loss)
    kept = shares(tuning.pretrained_losses, losses, tuning.expert_losses)
    values = {"multi_task_loss": trial.multi_task_loss, "share": kept["average"], "worst_share": kept["worst"]}
    return replace(trial, value=values[tuning.recipe.search.objective], shares=kept["tasks"])


def best_of(recipe: TuneRecipe, trials: Sequence[Trial]) -> Trial:
    """The trial with the best value, the first of equals. Raises MergeError where none has one."""
    sign = -1 if recipe.search.maximize else 1
    finished = [(sign * trial.value, trial.number) for trial in trials if trial.value is not None]
    if not finished:
        raise MergeError(f"none of {len(trials)} settings could be merged; the first: {trials[0].error}")
    return trials[min(finished)[1]]


def _line(recipe: TuneRecipe, index: int, trials: Sequence[Trial]) -> str:
    """One line on the last trial."""
    trial = trials[-1]
    of = f" of {recipe.num_trials}" if recipe.num_trials is not None else ""
    where = f"round {index}, trial" if index else "trial"
    if trial.value is None:
        return f"{where} {trial.number + 1}{of}: failed: {trial.error}"
    best = " (the best so far)" if best_of(recipe, trials) is trial else ""
    return f"{where} {trial.number + 1}{of}: {_shown(trial)}{best}"


def _shown(trial: Trial) -> str:
    settings = ", ".join(f"{name} {shown_value(value)}" for name, value in trial.settings.items())
    return f"{trial.value:.4f} with {settings}"
