"""Everything a run reads, loaded for real and checked before the first step: data, tokenizer, model, disk.

A mistake found here costs seconds; the same one found in the last round costs the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from manyshot.allocation import MOST_TIMES_EVEN
from manyshot.base_model import BaseModel, find_base_model
from manyshot.errors import DataError, ModelError
from manyshot.evaluate import encode_choices, encode_references
from manyshot.export import side_files
from manyshot.launcher import check_launch
from manyshot.local_update import encode_held_out
from manyshot.match import open_experts
from manyshot.metrics import check_metric, find_metric
from manyshot.models import (
    check_attention,
    check_target_modules,
    choose_placement,
    load_tokenizer,
    meta_model,
    quiet_transformers,
)
from manyshot.quantized import check_quantization
from manyshot.recipe import Recipe
from manyshot.rundir import RunFolder, require_space
from manyshot.sizes import Sizes, left_after, peak, sizes_of
from manyshot.tasks import Encoded, Task, drop_overlong, encode_all, encode_prompt, load_task, training_order
from manyshot.tensors import Checkpoint
from manyshot.trainer import check_trainer_arguments


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, loaded and checked. `changed_entries` counts the weights that training may change,
    `mean_tokens` the tokens of a training example, by task; `sizes` are those of the files that it will write.
    """

    base: BaseModel
    tasks: tuple[Task, ...]
    changed_entries: int
    mean_tokens: Mapping[str, float]
    sizes: Sizes


def check_inputs(recipe: Recipe) -> Inputs:
    """Load tasks, tokenizer and model config for real, and check them against the recipe and each other.

    Raises DataError for every task that cannot be used, all at once, then ModelError for the model.
    """
    check_trainer_arguments(recipe.local_update)
    placement = choose_placement(recipe.local_update)
    if recipe.local_update.launcher == "accelerate":
        check_launch(recipe.local_update, placement.device)
    check_quantization(recipe.local_update.quantization)
    tasks = check_tasks(recipe)
    base = find_base_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    with quiet_transformers():
        tokenizer = load_tokenizer(base.path, trust_remote_code=recipe.trust_remote_code)
        model = meta_model(base.path, trust_remote_code=recipe.trust_remote_code)
        check_attention(model, recipe.local_update.attn_implementation)
    changed = {*check_model(recipe, base, model), *check_experts(recipe, base)}
    tasks = without_overlong(recipe, tasks, tokenizer)
    mean_tokens = check_texts(recipe, tasks, tokenizer, model.get_input_embeddings().weight.shape[0])
    checkpoint = Checkpoint(base.path)
    infos = {name: checkpoint.info(name) for name in checkpoint.names}
    entries = sum(infos[name].num_elements for name in changed)
    side = sum(file.stat().st_size for file in side_files(base.path))
    sizes = sizes_of(recipe, infos, changed, adapted_layers(recipe, model), side)
    return Inputs(base, tasks, entries, mean_tokens, sizes)


def adapted_layers(recipe: Recipe, model: Any) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every module that gets an adapter; none where all weights are trained."""
    if recipe.local_update.method == "full":
        return {}
    try:
        names = check_target_modules(model, recipe.local_update)
    except ModelError:  # of a command, which need not train these; for all others it was raised before
        return {}
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in names}
    return {name: (shape[0], shape[1]) for name, shape in shapes.items()}


def check_experts(recipe: Recipe, base: BaseModel) -> set[str]:
    """Open the experts that exist already. Returns what they change. Raises ModelError naming the task."""
    experts = {name: Path(spec.expert) for name, spec in recipe.tasks.items() if spec.expert}
    if not experts:
        return set()
    return {name for update in open_experts(Checkpoint(base.path), experts) for name in update.names}


def check_tasks(recipe: Recipe) -> tuple[Task, ...]:
    """Load every task. Raises DataError with one line for each that cannot be used."""
    tasks, problems = [], []
    for name in recipe.tasks:
        try:
            task = load_task(recipe, name)
            check_metric(find_metric(task.spec.metric, name), task.test, name)
            tasks.append(task)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return tuple(tasks)


def check_model(recipe: Recipe, base: BaseModel, model: Any) -> list[str]:
    """Check that training can change, and merging can find, every tensor that it means to.

    Returns their names. Raises ModelError naming the tensor or the target module.
    """
    checkpoint = Checkpoint(base.path)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    for name in checkpoint.names:
        if name in expected and checkpoint.info(name).shape != expected[name]:
            raise ModelError(
                f"{base.path}: tensor '{name}' has shape {checkpoint.info(name).shape}, "
                f"its config asks for {expected[name]}"
            )
    if recipe.local_update.method == "command":
        return _changed_by_command(recipe, checkpoint, model)
    if recipe.local_update.method == "full":
        changed = list(checkpoint.names)
    else:
        changed = [f"{module}.weight" for module in check_target_modules(model, recipe.local_update)]
    for name in changed:
        if name not in expected or name not in checkpoint:
            lacking = "the checkpoint" if name not in checkpoint else "the model that its config describes"
            raise ModelError(
                f"{base.path}: tensor '{name}' would be trained, but {lacking} has none of that name (it may be tied "
                "to another); choose other local_update.target_modules"
            )
    _check_overrides(recipe, changed)
    return changed


def _changed_by_command(recipe: Recipe, checkpoint: Checkpoint, model: Any) -> list[str]:
    """What a trainer of the user's own changes is not known before: the adapted layers, where the recipe names such."""
    layers = [f"{module}.weight" for module in adapted_layers(recipe, model)]
    return [name for name in layers if name in checkpoint] or list(checkpoint.names)


def _check_overrides(recipe: Recipe, changed: Sequence[str]) -> None:
    """Every override's pattern fits a tensor that training changes. Experts that exist already may change others."""
    if recipe.merge.space == "factors" or any(spec.expert for spec in recipe.tasks.values()):
        return
    if unused := recipe.plan.unused(changed):
        raise ModelError(
            f"overrides: the pattern '{unused[0]}' fits none of the {len(changed)} tensors that are trained, such as "
            f"'{changed[0]}'"
        )


def without_overlong(recipe: Recipe, tasks: tuple[Task, ...], tokenizer: Any) -> tuple[Task, ...]:
    """The tasks as they will be used: those with `overlong: drop` lose their examples that are too long.

    A test example whose answer is generated needs no room for one, and stays. Raises DataError with the first problem
    of every task, one line each.
    """
    kept, problems = [], []
    for task in tasks:
        try:
            generated = find_metric(task.spec.metric, task.name).kind == "generate"
            names = ("train", "validation") if generated else ("train", "validation", "test")
            kept.append(drop_overlong(task, tokenizer, recipe, names) if task.spec.overlong == "drop" else task)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return tuple(kept)


def check_texts(recipe: Recipe, tasks: tuple[Task, ...], tokenizer: Any, vocabulary: int) -> dict[str, float]:
    """Turn every example that the run will use into tokens once. Returns the mean length of each task's training texts.

    Raises DataError with the first problem of every task, one line each.
    """
    problems, mean_tokens = [], {}
    for task in tasks:
        try:
            training = _training_texts(recipe, task, tokenizer)
            mean_tokens[task.name] = fmean(len(encoded.input_ids) for encoded in training)
            for encoded in (*training, *encode_held_out(task, tokenizer, recipe)):
                _check_ids(encoded.input_ids, vocabulary, f"task '{task.name}', row {encoded.index + 1}")
            kind = find_metric(task.spec.metric, task.name).kind
            if kind == "likelihood":
                encode_choices(task, tokenizer, recipe)
            elif kind == "teacher_forced":
                encode_references(task, tokenizer, recipe)
            else:
                for example in task.test:
                    encode_prompt(example, tokenizer, task.spec, f"task '{task.name}', test {example.place}")
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return mean_tokens


def _training_texts(recipe: Recipe, task: Task, tokenizer: Any) -> list[Encoded]:
    """The training examples that all rounds together will see, each once."""
    update = recipe.local_update
    # how the steps are shared out is not known yet: a task may take up to twice its even share
    most = MOST_TIMES_EVEN if recipe.protocol.allocation == "gap" else 1
    needed = most * recipe.protocol_of(task.name).local_steps * update.batch_size
    order = training_order(len(task.train), needed, recipe.seed, task.name, skip=0)
    examples = [task.train[position] for position in sorted(set(order))]
    return encode_all(examples, tokenizer, task, "train", recipe.max_length_of(task.name), update.loss_on)


def _check_ids(ids: tuple[int, ...], vocabulary: int, where: str) -> None:
    if max(ids) >= vocabulary:
        raise DataError(
            f"{where}: the tokenizer gives token {max(ids)}, the model's embedding has {vocabulary} rows; "
            "they do not belong together"
        )


def check_space(recipe: Recipe, folder: RunFolder, inputs: Inputs) -> None:
    """Refuse what the disk cannot hold: the most that there will be beside what finished rounds have left."""
    rounds, done = recipe.protocol.rounds, 0
    while done < rounds and (folder.round(done + 1) / "DONE.json").exists():
        done += 1
    num_left = rounds - done
    needed = peak(recipe, inputs.sizes, done) - sum(left_after(recipe, inputs.sizes, done).values())
    require_space(folder.path, needed, f"what {num_left} rounds will write")
