"""`--format adapter`: Θʳ − Θ⁰ as one LoRA adapter, module by module the best there is at its rank, and what that costs.

Names: O = output rows, I = input columns, R = rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyshot.adapters import truncated
from manyshot.errors import ModelError
from manyshot.export_lora import LowRank, target_modules, write_lora
from manyshot.export_source import ExportSource
from manyshot.models import meta_model
from manyshot.rundir import require_space
from manyshot.task_vector import StoredTaskVector

if TYPE_CHECKING:
    import torch

Json = dict[str, Any]
DEFAULT_ENERGY = 0.99
LISTED = 8


@dataclass(frozen=True)
class Truncation:
    """At which rank: `rank` for every module; or the least that keeps the share `energy` of Σσ², at most `rank`."""

    rank: int | None = None
    energy: float | None = None
    drop_rest: bool = False


@dataclass(frozen=True)
class Changed:
    """Which tensors of a task vector are linear layers (whether transposed), and why each other one is none.

    `linear_modules` are all linear layers of the model. Tensors that hold zeros alone are in neither.
    """

    linear: Mapping[str, bool]
    rest: Mapping[str, str]
    linear_modules: tuple[str, ...]


def write_adapter_folder(
    source: ExportSource,
    folder: Path,
    truncation: Truncation,
    dtype: str | None,
    say: Callable[[str], None],
) -> Json:
    """Write the adapter into `folder` and return what there is to say of it: rank and error of every module.

    Raises ModelError for a rank that no matrix has, and for changes that LoRA cannot express, unless `drop_rest`.
    """
    import torch

    vector = StoredTaskVector(source.task_vector)
    changed = find_changed(vector, source.base, trust_remote_code=source.recipe.trust_remote_code)
    _check(source, vector, changed, truncation)
    kept_type = getattr(torch, dtype or "float32")
    layers: dict[str, LowRank] = {}
    modules: Json = {}
    lost = total = 0.0
    for number, (name, transposed) in enumerate(changed.linear.items(), start=1):
        say(f"decomposing {number} of {len(changed.linear)}: {name}")
        stored = vector.read(name).float()
        dense_OI = stored.T if transposed else stored
        b_OR, a_RI = (part.to(kept_type) for part in truncated(dense_OI, _rank_chooser(truncation)))
        square = float(dense_OI.double().square().sum())
        off = float((dense_OI.double() - b_OR.double() @ a_RI.double()).square().sum())
        lost, total = lost + off, total + square
        modules[name] = {"rank": len(a_RI), "relative_error": math.sqrt(off / square)}
        layers[name.removesuffix(".weight")] = LowRank(b_OR, a_RI, transposed)
    dropped = {name: math.sqrt(_square(vector.read(name))) for name in changed.rest}
    total_and_rest = total + sum(norm**2 for norm in dropped.values())
    rank = max(layer.rank for layer in layers.values())
    entries = sum(rank * (len(layer.b_OR) + layer.a_RI.shape[1]) for layer in layers.values())
    require_space(folder.parent, entries * kept_type.itemsize, "the adapter")
    write_lora(folder, layers, source.base_name, target_modules(list(layers), changed.linear_modules))
    return {
        "rank": rank,
        "alpha": rank,
        "dtype": str(kept_type).removeprefix("torch."),
        "modules": modules,
        "relative_error": math.sqrt(lost / total),
        "dropped": {name: {"reason": changed.rest[name], "norm": norm} for name, norm in dropped.items()},
        "relative_error_with_dropped": math.sqrt((lost + total_and_rest - total) / total_and_rest),
    }


def find_changed(vector: StoredTaskVector, base: Path, *, trust_remote_code: bool = False) -> Changed:
    """Sort the tensors of a task vector into what LoRA expresses and what it does not."""
    import torch

    model = meta_model(base, trust_remote_code=trust_remote_code)
    modules = dict(model.named_modules())
    # transformers' Conv1D is linear as well, with its weight the other way round
    linear = {
        name: type(module).__name__ == "Conv1D"
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"
    }
    found, rest = {}, {}
    for name in vector.names:
        if not bool(vector.read(name).any()):
            continue
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in linear:
            found[name] = linear[module]
        else:
            rest[name] = _reason(name, modules)
    return Changed(found, rest, tuple(linear))


def _reason(name: str, modules: Mapping[str, torch.nn.Module]) -> str:
    """Why LoRA has no place for a tensor."""
    owner, _, parameter = name.rpartition(".")
    if owner not in modules:
        return "no layer of that name"
    kind = type(modules[owner]).__name__
    return kind if parameter == "weight" else f"{parameter} of a {kind}"


def _check(source: ExportSource, vector: StoredTaskVector, changed: Changed, truncation: Truncation) -> None:
    """Refuse what cannot be expressed, before the first matrix is decomposed."""
    where = f"{source.folder.path}, round {source.round_index}"
    if not changed.linear:
        raise ModelError(f"{where}: no linear layer was changed, so there is nothing that an adapter could hold")
    if changed.rest and not truncation.drop_rest:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(changed.rest.items())[:LISTED])
        more = f" and {len(changed.rest) - LISTED} more" if len(changed.rest) > LISTED else ""
        raise ModelError(
            f"{where}: LoRA cannot express the change of {len(changed.rest)} tensors: {named}{more}. --drop-rest "
            "leaves them out (the measured losses then say what that costs); --format model has everything"
        )
    if truncation.rank is None or truncation.energy is not None:
        return
    for name in changed.linear:
        shape = vector.tensors.info(name).shape
        if truncation.rank > min(shape):
            raise ModelError(
                f"--rank {truncation.rank}: '{name}' is {shape[0]} × {shape[1]}, so its rank is at most {min(shape)}; "
                f"give --rank {min(shape)} or less, or --energy, which finds each module's own rank"
            )


def _rank_chooser(truncation: Truncation) -> int | Callable[[torch.Tensor], int]:
    """The rank of a module, from its singular values where a share of Σσ² is asked for."""
    if truncation.energy is None and truncation.rank is not None:
        return truncation.rank
    share = DEFAULT_ENERGY if truncation.energy is None else truncation.energy

    def choose(values: torch.Tensor) -> int:
        squares = values.double().square()
        kept = squares.cumsum(0) / squares.sum()
        needed = int((kept < share).sum()) + 1
        return min(needed, len(values), truncation.rank or len(values))

    return choose


def _square(tensor: torch.Tensor) -> float:
    return float(tensor.double().square().sum())
