"""What a recipe means before it runs: `validate` loads everything for real, `plan` says what it will cost."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from manyshot.errors import ModelError
from manyshot.inputs import Inputs, check_inputs
from manyshot.line_search import MOST_TRIES
from manyshot.models import (
    check_target_modules,
    choose_placement,
    load_config,
    load_tokenizer,
    meta_model,
    quiet_transformers,
)
from manyshot.recipe import Recipe, operator_warnings
from manyshot.sizes import disk_plan
from manyshot.tasks import Encoded, Task, encode_all
from manyshot.tensors import Checkpoint
from manyshot.trainer import learning_rate_multipliers

# Fewer full-rate steps than this in a round and its experts have hardly moved before they are merged.
STARVED_STEPS = 6.0
SAMPLE = 200


def validate_recipe(recipe: Recipe) -> dict[str, Any]:
    """Sizes, token counts and one formatted example per task; raises ManyshotError for what cannot be used."""
    inputs = check_inputs(recipe)
    with quiet_transformers():
        tokenizer = load_tokenizer(inputs.base.path, trust_remote_code=recipe.trust_remote_code)
        tasks = {task.name: _describe_task(recipe, task, tokenizer) for task in inputs.tasks}
    return {
        "model": {"name": inputs.base.name, "path": str(inputs.base.path), "digest": inputs.base.digest},
        "placement": choose_placement(recipe.local_update).text,
        "tasks": tasks,
        "warnings": warnings(recipe),
    }


def _describe_task(recipe: Recipe, task: Task, tokenizer: Any) -> dict[str, Any]:
    update = recipe.local_update
    encoded = {
        "train": encode_all(task.train, tokenizer, task, "train", recipe.max_length_of(task.name), update.loss_on),
        "validation": encode_all(
            task.validation, tokenizer, task, "validation", recipe.max_length_of(task.name), recipe.evaluation.loss_on
        ),
        "test": encode_all(task.test, tokenizer, task, "test", recipe.max_length_of(task.name), update.loss_on),
    }
    return {
        "metric": task.spec.metric,
        "splits": {split: _describe_split(examples) for split, examples in encoded.items()},
        "dropped": task.splits["dropped"],
        "overlong": task.splits.get("overlong"),
        "example": _marked(encoded["train"][0], tokenizer),
    }


def _describe_split(encoded: list[Encoded]) -> dict[str, float]:
    return {
        "examples": len(encoded),
        "mean_tokens": fmean(len(example.input_ids) for example in encoded),
        "mean_counted_tokens": fmean(example.num_counted for example in encoded),
        "truncated_share": fmean(example.truncated for example in encoded),
    }


def _marked(example: Encoded, tokenizer: Any) -> dict[str, str]:
    """The text of an example, cut where counting begins."""
    ids = list(example.input_ids)
    return {
        "context": tokenizer.decode(ids[: example.num_context]),
        "counted": tokenizer.decode(ids[example.num_context :]),
    }


def warnings(recipe: Recipe) -> list[str]:
    """What is allowed and still likely to disappoint."""
    found = operator_warnings(recipe)
    protocol, update = recipe.protocol, recipe.local_update
    for r in range(1, protocol.rounds + 1):
        steps, before = protocol.steps_in_round(r), protocol.steps_before_round(r)
        full_rate = math.fsum(learning_rate_multipliers(update, steps, before, protocol.local_steps))
        if protocol.rounds > 1 and full_rate < STARVED_STEPS and update.method != "command":
            found.append(
                f"round {r} is starved: its {steps} steps amount to {full_rate:.1f} steps at the full learning rate "
                f"(warm-up and decay included), and fewer than {STARVED_STEPS:g} hardly move an expert before it is "
                "merged; use fewer rounds, more protocol.local_steps, or local_update.lr_schedule: constant"
            )
            break
    if recipe.merge.space == "factors":
        found.append(
            "merge.space: factors merges A and B themselves, the form of the paper's released script; "
            "(ΣαB)(ΣαA) is not Σα·B·A, so the result is not the weighted mean of the experts"
        )
    return found


def plan_recipe(recipe: Recipe) -> dict[str, Any]:
    """Steps, examples, tokens, disk and memory of a run; sizes in bytes."""
    inputs = check_inputs(recipe)
    with quiet_transformers():
        tokenizer = load_tokenizer(inputs.base.path, trust_remote_code=recipe.trust_remote_code)
        lengths = {task.name: _mean_length(recipe, task, tokenizer) for task in inputs.tasks}
    protocol, evaluation = recipe.protocol, recipe.evaluation
    num_tasks, rounds = len(inputs.tasks), protocol.rounds
    trainings = 1 + (1 if evaluation.experts and rounds > 1 else 0)  # with one round the experts are the round
    steps = {name: trainings * recipe.protocol_of(name).local_steps for name in recipe.tasks}
    size = recipe.local_update.batch_size
    return {
        "starts": ["round 1 starts from the pretrained model"]
        + (["every later round starts from the merged model of the round before"] if rounds > 1 else []),
        "rounds": [
            {"round": r, "steps_per_task": protocol.steps_in_round(r)} | _own_steps(recipe, r)
            for r in range(1, rounds + 1)
        ],
        "allocation": protocol.allocation,
        "optimizer_steps": sum(steps.values()),
        "training_examples": sum(steps.values()) * size,
        "training_tokens": round(sum(lengths[name] * steps[name] * size for name in steps)),
        "mean_tokens_per_example": lengths,
        "validation_passes": num_tasks * _validation_passes(recipe),
        "test_passes": num_tasks * (1 + rounds + (1 if evaluation.experts else 0) + (1 if evaluation.post_hoc else 0)),
        "disk_bytes": disk_plan(recipe, inputs.sizes),
        "memory_bytes": estimate_memory(recipe, inputs, max(lengths.values())),
        "placement": choose_placement(recipe.local_update).text,
        "warnings": warnings(recipe),
    }


def _own_steps(recipe: Recipe, round_index: int) -> dict[str, dict[str, int]]:
    """The steps of those tasks that take a share of the protocol's."""
    own = [name for name, spec in recipe.tasks.items() if spec.steps_share != 1]
    return {"own_steps": {name: recipe.protocol_of(name).steps_in_round(round_index) for name in own}} if own else {}


def _validation_passes(recipe: Recipe) -> int:
    """How often every task's validation data is read, at most."""
    rounds, evaluation = recipe.protocol.rounds, recipe.evaluation
    merges = rounds + (1 if evaluation.post_hoc else 0)
    searched = MOST_TRIES * merges if recipe.method.searches_scaling else 0
    return 2 * rounds + 1 + (1 if evaluation.experts else 0) + 1 + searched


def _mean_length(recipe: Recipe, task: Task, tokenizer: Any) -> float:
    update = recipe.local_update
    sample = encode_all(task.train[:SAMPLE], tokenizer, task, "train", recipe.max_length_of(task.name), update.loss_on)
    return fmean(len(example.input_ids) for example in sample)


def _adapter_entries(recipe: Recipe, inputs: Inputs) -> int:
    """LoRA parameters of the largest task's adapter; 0 where all weights are trained."""
    if recipe.local_update.method == "full":
        return 0
    model = meta_model(inputs.base.path, trust_remote_code=recipe.trust_remote_code)
    try:
        names = check_target_modules(model, recipe.local_update)
    except ModelError:  # otherwise refused before: a command need not train these
        return 0
    rank = max(recipe.rank_of(task) for task in recipe.tasks)
    return sum(rank * sum(model.get_submodule(name).weight.shape) for name in names)


def estimate_memory(recipe: Recipe, inputs: Inputs, mean_length: float) -> dict[str, int]:
    """Peak of a local update: weights, trainable state, activations, logits. An estimate from the model's shape."""
    config = load_config(inputs.base.path, trust_remote_code=recipe.trust_remote_code).get_text_config()
    checkpoint = Checkpoint(inputs.base.path)
    total = sum(checkpoint.info(name).num_elements for name in checkpoint.names)
    trained = _adapter_entries(recipe, inputs) or inputs.changed_entries
    return memory_parts(recipe, config, total, trained, mean_length)


def memory_parts(recipe: Recipe, config: Any, total: int, trained: int, mean_length: float) -> dict[str, int]:
    """The same for a model of `total` weights, described by its configuration, of which `trained` entries train."""
    update = recipe.local_update
    full, width = update.method == "full", choose_placement(update).dtype.itemsize
    micro = update.micro_batch_size or update.batch_size
    tokens = micro * min(update.max_length, 2 * mean_length)
    # per token and layer: about 16 hidden-sized and 4 MLP-sized values are kept for the backward pass
    per_token = config.num_hidden_layers * (16 * config.hidden_size + 4 * getattr(config, "intermediate_size", 0))
    parts = {
        "weights": total * (4 if full else width),  # all weights train in float32: they are their own master
        "optimizer": trained * (12 if full else 16),  # gradient and two moments, and an adapter's float32 weights
        "activations": int(tokens * per_token * width),
        "logits": int(tokens * config.vocab_size * 4 * 2),
    }
    return parts | {"total": sum(parts.values())}
