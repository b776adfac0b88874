"""Which tensor of an expert's checkpoint belongs to which tensor of the base: every one is accounted for, by name.

No list of architectures: names, shapes and, for tied weights, the bytes themselves say it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from manyshot.errors import ModelError
from manyshot.folder_links import refuse_links_out
from manyshot.peft_adapter import is_adapter, read_adapter
from manyshot.rundir import read_json
from manyshot.task_vector import ModelUpdate, Update
from manyshot.tensors import Checkpoint

EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E5M2", "F8_E8M0")


def open_experts(base: Checkpoint, experts: Mapping[str, Path], *, allow_copy: bool = False) -> tuple[Update, ...]:
    """Each expert as an update of the base: a model folder, or a PEFT adapter. Raises ModelError naming the model."""
    refuse_quantized(base.path, base, "the base")
    updates: list[Update] = []
    for task, path in experts.items():
        if not path.is_dir():
            raise ModelError(f"model '{task}': no such folder: {path}")
        if is_adapter(path):
            updates.append(read_adapter(path, base, task))
        else:
            refuse_links_out(path)
            expert = Checkpoint(path)
            refuse_quantized(path, expert, f"model '{task}'")
            updates.append(match_model(task, expert, base, allow_copy=allow_copy))
    return tuple(updates)


def match_model(task: str, expert: Checkpoint, base: Checkpoint, *, allow_copy: bool = False) -> ModelUpdate:
    """The update that a dense expert makes to the base's float tensors.

    A tensor that the expert wrote once because it is tied to another (same bytes in the base) is found under that
    other's name. Raises ModelError, with the tensor's name and both shapes, for what differs in shape, is missing, or
    has no counterpart in the base; with `allow_copy` such a tensor stays as it is in the base.
    """
    where = f"model '{task}' ({expert.path})"
    stored_as: dict[str, str] = {}
    for name in base.names:
        info = base.info(name)
        if not info.is_float:
            continue  # copied from the base
        source = name if name in expert else _tied_to(base, name, expert)
        if source is not None and expert.info(source).shape == info.shape and _is_float(expert, source):
            stored_as[name] = source
        elif not allow_copy:
            raise ModelError(f"{where}: {_difference(name, source, expert, base)}; --allow-copy takes the base's")
    for name in expert.names:
        if name not in base and _is_float(expert, name) and not allow_copy and _tied_to(expert, name, base) is None:
            raise ModelError(
                f"{where}: tensor '{name}' of shape {expert.info(name).shape} has no counterpart in the base "
                f"{base.path}; --allow-copy leaves it out"
            )
    return ModelUpdate(expert, stored_as)


def _is_float(checkpoint: Checkpoint, name: str) -> bool:
    return checkpoint.info(name).is_float


def _difference(name: str, source: str | None, expert: Checkpoint, base: Checkpoint) -> str:
    if source is None:
        return f"tensor '{name}' of the base {base.path}, shape {base.info(name).shape}, is missing"
    if not _is_float(expert, source):
        return f"tensor '{name}' is of type {expert.info(source).kind}, in the base of {base.info(name).kind}"
    return f"tensor '{name}' has shape {expert.info(source).shape}, the base {base.path} has {base.info(name).shape}"


def _tied_to(checkpoint: Checkpoint, name: str, other: Checkpoint) -> str | None:
    """A tensor with the same bytes as `name` in the same checkpoint, which `other` has."""
    for twin in checkpoint.names:
        if twin != name and twin in other and same_bytes(checkpoint, name, twin):
            return twin
    return None


def same_bytes(checkpoint: Checkpoint, one: str, two: str) -> bool:
    """Whether two tensors of a checkpoint are the same matrix: type, shape and every bit."""
    info = checkpoint.info(one)
    if info != checkpoint.info(two) or len(info.shape) != 2:
        return False
    import torch

    first, second = checkpoint.read(one), checkpoint.read(two)
    # one row tells nearly every pair apart
    return bool(
        torch.equal(first[:1].view(torch.uint8), second[:1].view(torch.uint8))
        and torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    )


def tied_duplicates(base: Checkpoint) -> dict[str, str]:
    """Output heads that a base with tied embeddings stores a second time: name -> the embedding it equals.

    The merged model has the embedding alone, which is where transformers looks for both.
    """
    if not _config(base.path).get("tie_word_embeddings"):
        return {}
    heads = [name for name in base.names if "head" in name.rsplit(".", 2)[-2:][0] and len(base.info(name).shape) == 2]
    found = {}
    for head in heads:
        twins = [name for name in base.names if name != head and same_bytes(base, head, name)]
        if twins:
            found[head] = twins[0]
    return found


def refuse_untied(tied: Mapping[str, str], tasks: Sequence[str], updates: Sequence[Update]) -> None:
    """Refuse a model whose output head is not its embedding where the base ties both (`tied`: head -> embedding)."""
    for task, update in zip(tasks, updates, strict=True):
        for head, embedding in tied.items():
            if head not in update.names:
                continue
            if isinstance(update, ModelUpdate) and embedding in update.names:
                names = update.stored_name(head), update.stored_name(embedding)
                if names[0] == names[1] or same_bytes(update.model, *names):
                    continue
            raise ModelError(
                f"model '{task}': it changes '{head}' apart from '{embedding}', and the base ties both into one tensor"
            )


def refuse_quantized(path: Path, base: Checkpoint, what: str) -> None:
    """A quantised checkpoint's integers cannot be added to; merge the full-precision model it was made from."""
    config = _config(path).get("quantization_config")
    narrow = [name for name in base.names if base.info(name).kind in EIGHT_BIT_FLOATS]
    if config or narrow:
        found = (
            f"tensor '{narrow[0]}' has type {base.info(narrow[0]).kind}" if narrow else "it says quantization_config"
        )
        raise ModelError(f"{what}: {path} is quantised ({found}); merge the full-precision model it was made from")


def _config(path: Path) -> dict[str, object]:
    file = path / "config.json"
    return dict(read_json(file)) if file.is_file() else {}
