"""A local update on several ranks: the same job, examples and steps as in one process, the model whole or in shards.

Every optimizer step has the same `batch_size` examples of the task's stream, dealt out among the ranks; losses and
gradients are means over the counted tokens of all of them, so training differs by the order of sums alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import TypeAdapter

from manyshot.errors import ModelError
from manyshot.launch_spec import read_launch
from manyshot.local_update import (
    RECORD,
    LocalUpdateJob,
    encode_held_out,
    make_record,
    start_model,
    train,
    training_examples,
)
from manyshot.loss_gap import TokenSums, ValidationLoss, batch_sums, evaluating, make_batches, mean_loss
from manyshot.models import (
    add_adapter,
    choose_placement,
    find_parameter,
    load_tokenizer,
    meta_model,
    quiet_transformers,
    save_adapter,
    save_full,
)
from manyshot.optimizer_state import OPTIMIZER_NAME, write_state
from manyshot.progress import Progress
from manyshot.rundir import write_json
from manyshot.start_adapters import adapter_seed
from manyshot.tasks import Encoded
from manyshot.tensors import Checkpoint, file_digest
from manyshot.trainer import CompletionTrainer


def update_on_ranks(text: str, progress: Progress, rank: int, ranks: int) -> None:
    """This rank's part of a job given as JSON. Rank 0 leaves the expert and, last of all, its record.

    Raises ManyshotError naming round and task as a local update in one process does.
    """
    job = TypeAdapter(LocalUpdateJob).validate_json(text)
    job = job if rank == 0 else replace(job, tracked=None)
    placement = choose_placement(job.recipe.local_update)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed arguments inside trl and transformers
        tokenizer = load_tokenizer(job.start.pretrained, trust_remote_code=job.start.trust_remote_code)
        examples = training_examples(job, tokenizer)
        with progress.timed("load", job.round_index, job.task.name):
            # accelerate takes it from there to the ranks' devices, whole or in shards
            model = start_model(job, replace(placement, device="cpu", spread=False))
        trainer = train(model, tokenizer, examples, job, placement, progress, ranks)
        _check_sharded(trainer, job)
        record = make_record(job, examples, trainer.finite_losses(job.where))
        with progress.timed("save", job.round_index, job.task.name):
            _save(trainer, job, rank)
            if job.keeps_optimizer and rank == 0:  # on whole tensors, which every rank has
                write_state(trainer.optimizer, trainer.model, job.folder / OPTIMIZER_NAME, job.optimizer_state)
                record["optimizer_state"] = file_digest(job.folder / OPTIMIZER_NAME)
        if job.validated:
            record["validation"] = _validate(trainer, tokenizer, job, progress, rank, ranks).to_json()
    if rank == 0:
        write_json(job.folder / RECORD, record)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def _check_sharded(trainer: CompletionTrainer, job: LocalUpdateJob) -> None:
    """accelerate trains copies, without a word, where it does not know how to shard."""
    asked = read_launch(job.recipe.local_update).sharding
    sharded = any(hasattr(parameter, "full_tensor") for parameter in trainer.model.parameters())
    if {"": False, "fsdp": not sharded, "deepspeed": not trainer.is_deepspeed_enabled}[asked]:
        raise ModelError(f"{job.where}: accelerate cannot shard with {asked} on {trainer.args.device.type}")


# ---- one normal checkpoint -------------------------------------------------------------------------------------------


def _save(trainer: CompletionTrainer, job: LocalUpdateJob, rank: int) -> None:
    """Write the adapter or the model folder on rank 0; shards are put together there, one tensor after the other."""
    try:
        if job.recipe.local_update.method == "full":
            names = Checkpoint(job.start.pretrained).names
            model = trainer.accelerator.unwrap_model(trainer.model)
            whole = {name: _whole(find_parameter(model, name), rank) for name in names}
            if rank == 0:
                save_full(model, job.folder / "model", whole)
        else:
            trained = _adapter_tensors(trainer, rank)
            if rank == 0:
                save_adapter(_plain_adapted(job, trained), job.folder / "adapter", job.base_name)
    except ModelError as error:
        raise ModelError(f"{job.where}: {error}") from None


def _adapter_tensors(trainer: CompletionTrainer, rank: int) -> dict[str, torch.Tensor]:
    """The factors of all adapters by their names in PEFT's model, trained and frozen ones."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    named = [(name, parameter) for name, parameter in model.named_parameters() if ".lora_" in name]
    return {name.replace("_checkpoint_wrapped_module.", ""): _whole(parameter, rank) for name, parameter in named}


def _whole(parameter: torch.Tensor, rank: int) -> torch.Tensor:
    """All of a tensor, on rank 0; every rank has to ask for it where it is in shards."""
    tensor = parameter.detach()
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.cpu() if rank == 0 else torch.empty(0)


def _plain_adapted(job: LocalUpdateJob, tensors: dict[str, torch.Tensor]) -> Any:
    """The adapted model as PEFT would have it in one process, with nothing in it but the adapters' values."""
    base = meta_model(job.start.pretrained, trust_remote_code=job.start.trust_remote_code)
    seed_parts = adapter_seed(job.recipe, job.round_index, job.task.name)
    adapted = add_adapter(base, job.recipe, job.task.name, seed_parts, None)
    adapted.load_state_dict(tensors, strict=False, assign=True)
    return adapted


# ---- the validation loss, where the model is -------------------------------------------------------------------------


def _validate(
    trainer: CompletionTrainer, tokenizer: Any, job: LocalUpdateJob, progress: Progress, rank: int, ranks: int
) -> ValidationLoss:
    """The expert's validation loss: batches as in one process, dealt out among the ranks."""
    encoded = encode_held_out(job.task, tokenizer, job.recipe)
    model = trainer.accelerator.unwrap_model(trainer.model) if not trainer.is_fsdp_enabled else trainer.model
    if hasattr(model, "get_base_model") and not trainer.is_fsdp_enabled:
        model = model.get_base_model()
    where = f"{job.where}, expert, validation"
    with progress.timed("validation", job.round_index, job.task.name, total=len(encoded)) as timed:
        sums = sums_on_ranks(
            model,
            trainer.output_head,
            encoded,
            pad_id=tokenizer.pad_token_id,
            batch_size=job.recipe.evaluation.batch_size,
            device=trainer.args.device,
            where=where,
            rank=rank,
            ranks=ranks,
        )
        timed.tick(len(encoded))
    return mean_loss(encoded, sums, job.task.spec.loss_scale)


def sums_on_ranks(
    model: Any,
    head: torch.nn.Module,
    encoded: Sequence[Encoded],
    *,
    pad_id: int,
    batch_size: int,
    device: torch.device,
    where: str,
    rank: int,
    ranks: int,
) -> list[TokenSums]:
    """Both sums for each example, in the order given, on every rank.

    A rank that has no batch left takes the last one again, since shards are put together by all ranks or by none.
    """
    batches = list(make_batches(encoded, batch_size))
    mine: dict[int, TokenSums] = {}
    with evaluating(model), torch.no_grad():  # inference_mode would make tensors that shards cannot be put back into
        for first in range(0, len(batches), ranks):
            positions = batches[min(first + rank, len(batches) - 1)]
            examples = [encoded[i] for i in positions]
            found = batch_sums(model, head, examples, pad_id=pad_id, device=device, where=where)
            mine |= zip(positions, found, strict=True)
    gathered: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(gathered, [(i, one.nats, one.num_correct) for i, one in mine.items()])
    sums = {i: TokenSums(nats, num_correct) for part in gathered for i, nats, num_correct in part}
    return [sums[i] for i in range(len(encoded))]
