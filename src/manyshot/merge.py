"""Stream task vectors through an operator: tensor by tensor, tile by tile, float32 in, float32 master out.

Two steps, each complete or absent: `merge_weights` (or `merge_factors`) writes the merged task vector Θʳ − Θ⁰, and
`export_model` adds it to the pretrained weights and writes a normal model folder, cast once.
Shapes: T = tasks, P = entries of a tile.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from manyshot.errors import MergeError, ModelError
from manyshot.operators import Operator
from manyshot.rundir import atomic_file, atomic_folder, require_space, write_json
from manyshot.seeding import make_generator
from manyshot.task_vector import (
    ADAPTER_WEIGHTS_NAME,
    FACTORS_NAME,
    AdapterFactors,
    StoredTaskVector,
    Update,
)
from manyshot.tensors import (
    DEFAULT_SHARD_BYTES,
    Checkpoint,
    SafetensorsWriter,
    TensorInfo,
    plan_shards,
    shard_name,
    write_index,
    write_tensors,
)

Reference = Literal["pretrained", "start"]

# A tile's rows depend on the tensor alone, never on the tasks or the machine: low-rank products of a tile then have
# the same bits wherever they are computed.
TILE_ENTRIES = 1 << 20
WEIGHT_FILE_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt")


@dataclass
class MergeReport:
    """What a merge did. Norms are Frobenius norms over all merged tensors; counts are coordinates."""

    tasks: list[str]
    num_changed: int = 0
    num_kept: int = 0
    kept_by_tensor: dict[str, float] = field(default_factory=dict)
    merged_norm: float = 0.0
    update_norm: float = 0.0
    gram_TT: list[list[float]] = field(default_factory=list)

    @property
    def kept_share(self) -> float:
        """Share of the coordinates that some task changed which the merged task vector keeps."""
        return self.num_kept / self.num_changed if self.num_changed else 0.0

    def to_json(self) -> dict[str, Any]:
        norms = [math.sqrt(self.gram_TT[i][i]) for i in range(len(self.tasks))]
        cosines = [
            [dot / (norms[i] * norms[j]) if norms[i] * norms[j] > 0 else 0.0 for j, dot in enumerate(row)]
            for i, row in enumerate(self.gram_TT)
        ]
        record = {key: value for key, value in asdict(self).items() if key != "gram_TT"}
        return record | {
            "kept_share": self.kept_share,
            "task_vector_norms": dict(zip(self.tasks, norms, strict=True)),
            "task_vector_cosines": cosines,
        }


class _Tally:
    """Sums over tiles, in float64, that become a MergeReport."""

    def __init__(self, tasks: Sequence[str]) -> None:
        self.report = MergeReport(list(tasks))
        self.gram_TT = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
        self.merged_square = 0.0
        self.update_square = 0.0
        self._tensor = (0, 0)

    def add(
        self, task_vectors_TP: torch.Tensor, kept_P: torch.Tensor, merged_P: torch.Tensor, start_P: torch.Tensor
    ) -> None:
        changed, kept = int((task_vectors_TP != 0).any(0).sum()), int((kept_P != 0).sum())
        self._tensor = (self._tensor[0] + changed, self._tensor[1] + kept)
        wide_TP = task_vectors_TP.double()
        self.gram_TT += wide_TP @ wide_TP.T
        self.merged_square += float(merged_P.double().square().sum())
        self.update_square += float((merged_P - start_P).double().square().sum())

    def close_tensor(self, name: str) -> None:
        changed, kept = self._tensor
        self._tensor = (0, 0)
        self.report.num_changed += changed
        self.report.num_kept += kept
        self.report.kept_by_tensor[name] = kept / changed if changed else 0.0
        for task, square in zip(self.report.tasks, self.gram_TT.diagonal().tolist(), strict=True):
            if not math.isfinite(square):  # a mask may hide a NaN from the merged tensor, never from its norm
                raise MergeError(f"task '{task}', tensor '{name}': the expert holds NaN or Inf; it diverged")

    def close(self) -> MergeReport:
        self.report.gram_TT = self.gram_TT.tolist()
        self.report.merged_norm = math.sqrt(self.merged_square)
        self.report.update_norm = math.sqrt(self.update_square)
        return self.report


def tiles(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, stop) rows of the first dimension, TILE_ENTRIES entries or one row at a time; a scalar is one row."""
    num_rows = shape[0] if shape else 1
    row_entries = max(1, math.prod(shape[1:]))
    step = max(1, TILE_ENTRIES // row_entries)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def check_updates(pretrained: Checkpoint, tasks: Sequence[str], updates: Sequence[Update]) -> tuple[str, ...]:
    """Every changed tensor is a float tensor of the base with the base's shape. Returns their sorted names."""
    names: set[str] = set()
    for task, update in zip(tasks, updates, strict=True):
        for name in update.names:
            if name not in pretrained:
                raise ModelError(
                    f"task '{task}': its expert changes tensor '{name}', which {pretrained.path} does not have"
                )
            info = pretrained.info(name)
            if update.shape(name) != info.shape:
                raise ModelError(
                    f"task '{task}': tensor '{name}' has shape {update.shape(name)}, "
                    f"the base {pretrained.path} has {info.shape}"
                )
            if info.dtype.is_floating_point:
                names.add(name)
    return tuple(sorted(names))


def merge_weights(
    pretrained: Checkpoint,
    start: StoredTaskVector | None,
    tasks: Sequence[str],
    updates: Sequence[Update],
    operator: Operator,
    weights: Sequence[float],
    output: Path,
    *,
    reference: Reference = "pretrained",
    seed_parts: Sequence[str | int] = (0,),
) -> MergeReport:
    """Write the merged task vector Θʳ − Θ⁰ to `output`, float32.

    With reference `pretrained` (the paper), v_τ = (Θʳ⁻¹ − Θ⁰) + u_τ and Θʳ − Θ⁰ = M(v); with `start` (ATM, arXiv
    2411.03055), v_τ = u_τ and Θʳ − Θ⁰ = (Θʳ⁻¹ − Θ⁰) + M(u); u_τ = θ_τ − Θʳ⁻¹ are the `updates`.
    Raises ModelError for tensors that do not fit the base, MergeError for a merge that keeps nothing.
    """
    changed = set(check_updates(pretrained, tasks, updates)) | set(start.names if start else ())
    infos = {name: TensorInfo(pretrained.info(name).shape, torch.float32) for name in sorted(changed)}
    weights_T = torch.tensor(list(weights), dtype=torch.float32)
    tally = _Tally(tasks)

    def merge_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        generator = make_generator(*seed_parts, name)
        parts = []
        for begin, stop in tiles(shape):
            rows = (stop - begin, *shape[1:])
            start_P = (
                start.rows(name, begin, stop).reshape(-1) if start and name in start else torch.zeros(math.prod(rows))
            )
            update_TP = torch.stack([_rows_or_zero(update, name, begin, stop, start_P) for update in updates])
            task_vectors_TP = update_TP + start_P if reference == "pretrained" else update_TP
            kept_P = operator.merge(task_vectors_TP, weights_T, generator)
            merged_P = kept_P if reference == "pretrained" else start_P + kept_P
            tally.add(task_vectors_TP, kept_P, merged_P, start_P)
            parts.append(merged_P.reshape(rows))
        tally.close_tensor(name)
        return torch.cat(parts).reshape(shape) if parts else torch.zeros(shape)

    with atomic_file(output) as stream, SafetensorsWriter(stream, infos) as writer:
        for name, info in infos.items():
            writer.write(name, _finite(merge_tensor(name, info.shape), name))
        report = tally.close()
        _refuse_empty(report, weights)
    return report


def _rows_or_zero(update: Update, name: str, begin: int, stop: int, like_P: torch.Tensor) -> torch.Tensor:
    return update.rows(name, begin, stop).reshape(-1) if name in update.names else torch.zeros_like(like_P)


def _finite(merged: torch.Tensor, name: str) -> torch.Tensor:
    if not torch.isfinite(merged).all():
        raise MergeError(f"tensor '{name}': the merged task vector holds NaN or Inf; an expert of this round diverged")
    return merged


def _refuse_empty(report: MergeReport, weights: Sequence[float]) -> None:
    if report.num_changed and not report.num_kept:
        shown = ", ".join(f"{task} {weight:.3f}" for task, weight in zip(report.tasks, weights, strict=True))
        raise MergeError(
            "the operator's mask keeps no coordinate at all, so the merged model would be the pretrained model. "
            f"Weights: {shown}. Where one task takes nearly all weight, raise operator.temperature; otherwise lower "
            "operator.mask_threshold or operator.min_agreement"
        )


def merge_factors(
    tasks: Sequence[str],
    adapters: Sequence[Path],
    operator: Operator,
    weights: Sequence[float],
    output: Path,
    *,
    seed_parts: Sequence[str | int] = (0,),
) -> MergeReport:
    """Merge the factors A and B themselves, entry by entry, into the adapter folder `output`.

    The released script's form, kept for comparison: s·(ΣαB)(ΣαA) is not Σα s·B·A, and the cross terms are an error.
    Θ⁰ counts as zero, so the vectors are the entries of A and B. All adapters must have the same shapes.
    """
    sources = [AdapterFactors(adapter) for adapter in adapters]
    names = sources[0].weights.names
    for task, source in zip(tasks, sources, strict=True):
        for name in sorted({*names, *source.weights.names}):
            if not all(name in one.weights and one.weights.info(name) == source.weights.info(name) for one in sources):
                raise ModelError(
                    f"task '{task}': factor '{name}' differs in shape from task '{tasks[0]}'; "
                    "space: factors needs equal ranks"
                )
    weights_T = torch.tensor(list(weights), dtype=torch.float32)
    tally = _Tally(tasks)
    merged = {}
    for name in names:
        factors_TP = torch.stack([source.weights.read(name).float().reshape(-1) for source in sources])
        merged_P = operator.merge(factors_TP, weights_T, make_generator(*seed_parts, name))
        tally.add(factors_TP, merged_P, merged_P, torch.zeros_like(merged_P))
        tally.close_tensor(name)
        merged[name] = _finite(merged_P, name).reshape(sources[0].weights.info(name).shape)
    report = tally.close()
    _refuse_empty(report, weights)
    write_adapter(output, adapters[0], merged)
    return report


def write_adapter(output: Path, like: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write an adapter folder with these factors and the configuration of the adapter `like`."""
    with atomic_folder(output) as folder:
        for name in ("adapter_config.json", FACTORS_NAME):
            shutil.copyfile(like / name, folder / name)
        write_tensors(folder / ADAPTER_WEIGHTS_NAME, tensors)


def expand_adapter(pretrained: Checkpoint, adapter: Path, output: Path) -> None:
    """Write s·B·A of an adapter as a dense task vector, float32."""
    factors = AdapterFactors(adapter)
    names = check_updates(pretrained, ["merged"], [factors])
    infos = {name: TensorInfo(factors.shape(name), torch.float32) for name in names}
    with atomic_file(output) as stream, SafetensorsWriter(stream, infos) as writer:
        for name, info in infos.items():
            rows = [factors.rows(name, begin, stop) for begin, stop in tiles(info.shape)]
            writer.write(name, _finite(torch.cat(rows), name))


def average_adapters(adapters: Sequence[Path], weights: Sequence[float], output: Path) -> None:
    """Write Σα A and Σα B as an adapter folder: the start of the next round's adapters (`adapter_start: averaged`)."""
    sources = [AdapterFactors(adapter).weights for adapter in adapters]
    averaged = {}
    for name in sources[0].names:
        total = torch.zeros(sources[0].info(name).shape)
        for source, weight in zip(sources, weights, strict=True):
            total += source.read(name).float() * weight
        averaged[name] = total
    write_adapter(output, adapters[0], averaged)


def truncate_to_adapter(task_vector: StoredTaskVector, like: Path, output: Path) -> None:
    """Write the top singular vectors of Θʳ − Θ⁰ as an adapter folder (`adapter_start: svd`), at the rank of `like`."""
    shape_source = AdapterFactors(like)
    tensors = {}
    for name, factor in shape_source.factors.items():
        rank = shape_source.weights.info(factor.lora_a).shape[0]
        dense = task_vector.read(name).float()
        left, values, right = torch.linalg.svd(dense.T if factor.transposed else dense, full_matrices=False)
        root = (values[:rank] / factor.scaling).clamp(min=0).sqrt()
        # a rank above the tensor's own leaves the last factors zero
        missing = rank - len(root)
        pad = torch.nn.functional.pad
        tensors[factor.lora_b] = pad(left[:, :rank] * root, (0, missing))
        tensors[factor.lora_a] = pad(right[:rank] * root[:, None], (0, 0, 0, missing))
    write_adapter(output, like, tensors)


def export_model(
    pretrained: Checkpoint,
    task_vector: StoredTaskVector,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write Θ⁰ + (Θʳ − Θ⁰) as a model folder: the sum in float32, one cast to the stored type (or `dtype`).

    Every base tensor is accounted for: merged where the task vector has it, else copied. Tokenizer, chat template,
    config and generation config are the base's own files. `finish` may add files before the folder gets its name.
    """
    infos = {name: _output_info(pretrained.info(name), dtype) for name in pretrained.names}
    require_space(output.parent, sum(info.num_bytes for info in infos.values()), "the merged model")
    shards = plan_shards(infos, shard_bytes)
    with atomic_folder(output) as folder:
        copy_side_files(pretrained.path, folder, dtype)
        write_index(folder, shards)
        for number, shard in enumerate(shards, start=1):
            with ExitStack() as stack:
                stream = stack.enter_context(open(folder / shard_name(number, len(shards)), "wb"))
                writer = stack.enter_context(SafetensorsWriter(stream, shard))
                for name, info in shard.items():
                    tensor = pretrained.read(name)
                    if name in task_vector:
                        tensor = tensor.float() + task_vector.read(name)
                    writer.write(name, tensor.to(info.dtype))
        if finish is not None:
            finish(folder)


def _output_info(info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype) if dtype is not None and info.dtype.is_floating_point else info


def copy_side_files(source: Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Copy everything of a model folder that is not weights; a changed output type is said in config.json."""
    for file in sorted(source.iterdir()):
        skipped = file.name.endswith((*WEIGHT_FILE_SUFFIXES, ".index.json")) or file.name in (
            "README.md",
            "MANIFEST.json",
        )
        if file.is_file() and not skipped and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        write_json(folder / "config.json", config)


__all__ = [
    "MergeReport",
    "average_adapters",
    "expand_adapter",
    "export_model",
    "merge_factors",
    "merge_weights",
    "truncate_to_adapter",
]
