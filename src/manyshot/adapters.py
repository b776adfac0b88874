"""Adapter folders made from others: the merged factors, and what the next round's adapters start from."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from manyshot.errors import MergeError
from manyshot.reading import check_updates
from manyshot.rundir import atomic_file, atomic_folder
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME, FACTORS_NAME, AdapterFactors, AdapterUpdate, StoredTaskVector
from manyshot.tensor_writer import SafetensorsWriter, write_tensors
from manyshot.tensors import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch


def write_adapter(output: Path, like: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter folder with these factors and the configuration of the adapter `like`."""
    with atomic_folder(output) as folder:
        for name in ("adapter_config.json", FACTORS_NAME):
            shutil.copyfile(like / name, folder / name)
        write_tensors(folder / ADAPTER_WEIGHTS_NAME, tensors)


def expand_adapter(
    pretrained: Checkpoint, adapter: Path, output: Path, start: StoredTaskVector | None = None
) -> dict[str, float]:
    """Write s·B·A of an adapter as a dense task vector, float32; returns its norm, and that of its part beyond `start`.

    Raises MergeError for a product that is not finite.
    """
    import torch

    factors = AdapterFactors(adapter)
    check_updates(pretrained, ["merged"], [AdapterUpdate(factors)])
    infos = {name: TensorInfo(factors.shape(name), "F32") for name in factors.names}
    merged = updated = 0.0
    with atomic_file(output) as stream, SafetensorsWriter(stream, infos) as writer:
        for name, info in infos.items():
            dense = factors.rows(name, 0, info.shape[0])
            if not torch.isfinite(dense).all():
                raise MergeError(f"tensor '{name}': the merged task vector holds NaN or Inf; an expert diverged")
            writer.write(name, dense)
            merged += float(dense.double().square().sum())
            update = dense - start.read(name).float() if start is not None and name in start else dense
            updated += float(update.double().square().sum())
    return {"merged_norm": math.sqrt(merged), "update_norm": math.sqrt(updated)}


def average_adapters(adapters: Sequence[Path], weights: Sequence[float], output: Path, *, frozen: bool = False) -> None:
    """Write Σα A and Σα B as an adapter folder: the start of the next round's adapters (`adapter_start: averaged`).

    The weights of an average sum to 1. With `frozen`, factors that all tasks have in common stay the same bits.
    """
    import torch

    sources = [AdapterFactors(adapter).weights for adapter in adapters]
    averaged = {}
    for name in sources[0].names:
        first = sources[0].read(name).float()
        total = torch.zeros(first.shape)
        for source, weight in zip(sources, weights, strict=True):
            total += source.read(name).float() * weight
        same = frozen and all(torch.equal(source.read(name).float(), first) for source in sources)
        averaged[name] = first if same else total
    write_adapter(output, adapters[0], averaged)


def truncate_to_adapter(task_vector: StoredTaskVector, like: Path, output: Path) -> None:
    """Write the top singular vectors of Θʳ − Θ⁰ as an adapter folder (`adapter_start: svd`), at the rank of `like`."""
    import torch

    shape_source = AdapterFactors(like)
    tensors = {}
    for name, factor in shape_source.factors.items():
        rank = shape_source.weights.info(factor.lora_a).shape[0]
        dense = task_vector.read(name).float()
        b_OR, a_RI = truncated(dense.T if factor.transposed else dense, rank, factor.scaling)
        # a rank above the tensor's own leaves the last factors zero
        missing = rank - len(a_RI)
        pad = torch.nn.functional.pad
        tensors[factor.lora_b] = pad(b_OR, (0, missing))
        tensors[factor.lora_a] = pad(a_RI, (0, 0, 0, missing))
    write_adapter(output, like, tensors)


def truncated(
    dense_OI: torch.Tensor, rank: int | Callable[[torch.Tensor], int], scaling: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, A) with s·B·A the best approximation of a float32 matrix at a rank, or at one chosen by its singular values.

    Eckart and Young: U_k Σ_k V_kᵀ, with √Σ_k/√s on either side. The values come in falling order.
    """
    import torch

    left, values, right = torch.linalg.svd(dense_OI, full_matrices=False)
    kept = rank if isinstance(rank, int) else rank(values)
    root = (values[:kept] / scaling).clamp(min=0).sqrt()
    return left[:, :kept] * root, right[:kept] * root[:, None]
