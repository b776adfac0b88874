"""Merge the experts of one round: task vectors in, the merged task vector Θʳ − Θ⁰ out, float32, complete or absent.

Shapes: T = tasks, P = entries of a tile.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from manyshot import kernels
from manyshot.adapters import write_adapter
from manyshot.engine import Piece, TilePool
from manyshot.errors import MergeError, ModelError
from manyshot.kernels.pieces import ADD_TO_START, AS_IT_IS, Target
from manyshot.merge_report import MergeReport, TileSums, add_up
from manyshot.operators import Operator, OperatorPlan, TaskArithmetic
from manyshot.outer import Outer
from manyshot.progress import Progress
from manyshot.reading import Reference, TaskVectorReader, TileData, check_updates
from manyshot.rundir import PARTIAL, atomic_file
from manyshot.stream import MergeStream
from manyshot.task_vector import AdapterFactors, FactorEntries, Scratch, StoredTaskVector, StoredUpdate, Update
from manyshot.tensor_writer import PositionedWriter, plan_shards, start_files
from manyshot.tensors import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

# bytes of a merged task vector that are worth a process elsewhere
PART_BYTES = 2_000_000_000


def merge_weights(
    pretrained: Checkpoint,
    start: StoredTaskVector | None,
    tasks: Sequence[str],
    updates: Sequence[Update],
    operator: Operator | OperatorPlan,
    weights: Sequence[float],
    output: Path,
    *,
    reference: Reference = "pretrained",
    outer: Outer | None = None,
    seed_parts: Sequence[str | int] = (0,),
    threads: int | None = None,
    elsewhere: Elsewhere | None = None,
) -> MergeReport:
    """Write the merged task vector Θʳ − Θ⁰ to `output`, float32.

    With reference `pretrained` (the paper), v_τ = (Θʳ⁻¹ − Θ⁰) + u_τ and Θʳ − Θ⁰ = M(v); with `start` (ATM, arXiv
    2411.03055), v_τ = u_τ and Θʳ − Θ⁰ = (Θʳ⁻¹ − Θ⁰) + M(u), or what `outer` makes of M(u); u_τ = θ_τ − Θʳ⁻¹ are the
    `updates`. What `outer` leaves for the next round is written together with it. `elsewhere` does the parts of a large
    merge, to the same bits. Raises ModelError for tensors that do not fit the base, MergeError for a merge that keeps
    nothing.
    """
    check_updates(pretrained, tasks, updates)
    reader = TaskVectorReader(pretrained, start, tuple(tasks), tuple(updates), reference)
    return _merge_into(reader, operator, weights, output, outer or Outer(), seed_parts, threads, elsewhere)


def write_update(
    pretrained: Checkpoint,
    start: StoredTaskVector | None,
    tasks: Sequence[str],
    updates: Sequence[Update],
    plan: OperatorPlan,
    weights: Sequence[float],
    output: Path,
    *,
    reference: Reference = "pretrained",
    seed_parts: Sequence[str | int] = (0,),
) -> None:
    """Write D, the M(v) of merge_weights() with 1 for `scaling: auto`, to `output`: M(v) = β D for every other β."""
    check_updates(pretrained, tasks, updates)
    reader = TaskVectorReader(pretrained, start, tuple(tasks), tuple(updates), reference)
    _merge_into(reader, plan.with_scaling(1.0), weights, output, None, seed_parts, None)


def scale_update(
    pretrained: Checkpoint,
    start: StoredTaskVector | None,
    update: Path,
    plan: OperatorPlan,
    scaling: float,
    output: Path,
    *,
    reference: Reference = "pretrained",
    outer: Outer | None = None,
) -> None:
    """Write the task vector that merge_weights() gives with β = `scaling`, from the D of write_update().

    To the bit for operators that multiply by β last, as all do that are merged elementwise.
    """
    factors = OperatorPlan(
        TaskArithmetic(scaling=scaling),
        tuple(
            (pattern, TaskArithmetic(scaling=scaling if operator.searches_scaling else 1.0))
            for pattern, operator in plan.overrides
        ),
    )
    from_start = start if reference == "start" else None  # else it is in D
    merged = (StoredUpdate(update),)
    merge_weights(pretrained, from_start, ("D",), merged, factors, (1.0,), output, reference=reference, outer=outer)


def merge_factors(
    tasks: Sequence[str],
    adapters: Sequence[Path],
    operator: Operator | OperatorPlan,
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
    for task, source in zip(tasks, sources, strict=True):
        for name in sorted({*sources[0].weights.names, *source.weights.names}):
            if not all(name in one.weights and one.weights.info(name) == source.weights.info(name) for one in sources):
                raise ModelError(
                    f"task '{task}': factor '{name}' differs in shape from task '{tasks[0]}'; "
                    "space: factors needs equal ranks"
                )
    reader = TaskVectorReader(None, None, tuple(tasks), tuple(FactorEntries(adapter) for adapter in adapters))
    merged = output.with_name(f"{output.name}.safetensors")
    report = _merge_into(reader, operator, weights, merged, Outer(), seed_parts, None)
    found = Checkpoint(merged)
    write_adapter(output, adapters[0], {name: found.read(name) for name in found.names})
    merged.unlink()
    return report


def _merge_into(
    reader: TaskVectorReader,
    operator: Operator | OperatorPlan,
    weights: Sequence[float],
    output: Path,
    outer: Outer | None,
    seed_parts: Sequence[str | int],
    threads: int | None,
    elsewhere: Elsewhere | None = None,
) -> MergeReport:
    """Stream a merge into one float32 file: Θʳ − Θ⁰, or (without `outer`) M(v) as it is."""
    if len(weights) != len(reader.tasks):
        raise MergeError(f"{len(weights)} weights for {len(reader.tasks)} tasks")
    plan = operator if isinstance(operator, OperatorPlan) else OperatorPlan(operator)
    infos = {name: TensorInfo(reader.shape(name), "F32") for name in reader.names()}
    files = {output: infos}
    if outer is not None and outer.leaves is not None:
        files[outer.leaves] = outer.state_infos(infos)
    with ExitStack() as stack:
        for file in files:
            stack.enter_context(atomic_file(file))
        partial = {file.with_name(file.name + PARTIAL): tensors for file, tensors in files.items()}
        parts = cut_names(infos, plan, len(reader.tasks)) if elsewhere is not None else []
        if elsewhere is not None and len(parts) > 1:
            start_files(partial)
            given = (reader, plan, tuple(weights), tuple(seed_parts), partial, outer or Outer())
            jobs = [MergePart(*given, tuple(names), f"{i} of {len(parts)}") for i, names in enumerate(parts, start=1)]
            report = add_up(reader.tasks, [tile for tiles in elsewhere(jobs) for tile in tiles])
            refuse_empty(report, weights)
            return report
        writer = stack.enter_context(PositionedWriter(partial))
        sink = _TaskVectorSink(writer, reader.reference if outer else "pretrained", outer or Outer())
        report = MergeStream(reader, plan, weights, seed_parts, sink, TilePool(threads)).run()
        refuse_empty(report, weights)
    return report


# ---- parts of a large merge ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MergePart:
    """The tensors `names` of a merge, for a process that shares the files: their headers are written already."""

    reader: TaskVectorReader
    plan: OperatorPlan
    weights: tuple[float, ...]
    seed_parts: tuple[str | int, ...]
    files: Mapping[Path, Mapping[str, TensorInfo]]
    outer: Outer
    names: tuple[str, ...]
    number: str  # 1 of 3

    @property
    def label(self) -> str:
        return f"merge, part {self.number}"


Elsewhere: TypeAlias = Callable[[list[MergePart]], list[list[TileSums]]]


def merge_part(job: MergePart, progress: Progress) -> list[TileSums]:
    """Merge and write one part; what the report is made of. Done again, it writes the same bytes to the same places."""
    others = set(job.reader.names()) - set(job.names)
    infos = {name: TensorInfo(job.reader.shape(name), "F32") for name in job.names}
    threads = int(os.environ.get("OMP_NUM_THREADS", "0")) or None  # what the executor gives a job
    with PositionedWriter(job.files, only={*infos, *job.outer.state_infos(infos)}) as writer:
        sink = _TaskVectorSink(writer, job.reader.reference, job.outer)
        reader = job.reader.without(others)
        return MergeStream(reader, job.plan, job.weights, job.seed_parts, sink, TilePool(threads)).tiles()


def cut_names(infos: Mapping[str, TensorInfo], plan: OperatorPlan, num_tasks: int) -> list[list[str]]:
    """The tensors in parts of about PART_BYTES; those whose operator looks at all of them together stay together."""
    together: dict[Operator, list[str]] = {}
    alone = {}
    for name, info in infos.items():
        operator = plan.for_tensor(name)
        if operator.scan_scope == "model" and operator.start_scan(num_tasks, 1) is not None:
            together.setdefault(operator, []).append(name)
        else:
            alone[name] = info
    parts = [list(part) for part in plan_shards(alone, PART_BYTES) if part]
    return [*parts, *together.values()]


class _TaskVectorSink:
    """Turns what the operator gave into Θʳ − Θ⁰ and writes it."""

    def __init__(self, writer: PositionedWriter, reference: Reference, outer: Outer) -> None:
        self.writer, self.reference, self.outer = writer, reference, outer

    def target(self, name: str) -> Target | None:
        if not self.outer.plain:
            return None
        file, begin, kind = self.writer.place(name)
        return Target(AS_IT_IS if self.reference == "pretrained" else ADD_TO_START, kind, file, begin)

    def wrote(self, piece: Piece, bad: bool) -> None:
        self.writer.wrote(piece.name, piece.count)
        self._check(piece, bad)

    def write(self, piece: Piece, data: TileData, kept_P: torch.Tensor, scratch: Scratch) -> tuple[float, float]:
        start_P = data.start_P
        merged_P, update_P = scratch.take("merged", piece.count), scratch.take("update", piece.count)
        if self.reference == "pretrained":
            bad = kernels.widen(kept_P, merged_P)
            if start_P is not None:
                kernels.subtract(merged_P, start_P, update_P)
        else:
            kernels.widen(kept_P, update_P)
            self.outer.step(piece, start_P, update_P, scratch, self.writer)
            bad = (
                kernels.add_to(start_P, update_P, merged_P)
                if start_P is not None
                else kernels.widen(update_P, merged_P)
            )
        self._check(piece, bad)
        self.writer.write(piece.name, piece.start, merged_P)
        merged = kernels.square_sum(merged_P)
        return merged, merged if start_P is None else kernels.square_sum(update_P)

    def _check(self, piece: Piece, bad: bool) -> None:
        if bad:
            raise MergeError(f"tensor '{piece.name}': the merged task vector holds NaN or Inf; an expert diverged")


def refuse_empty(report: MergeReport, weights: Sequence[float]) -> None:
    """A merge that keeps nothing is a mistake, not a result."""
    if report.num_changed and not report.num_kept:
        shown = ", ".join(f"{task} {weight:.3f}" for task, weight in zip(report.tasks, weights, strict=True))
        raise MergeError(
            "the operator's mask keeps no coordinate at all, so the merged model would be the pretrained model. "
            f"Weights: {shown}. Where one task takes nearly all weight, raise operator.temperature; otherwise lower "
            "operator.mask_threshold or operator.min_agreement"
        )


__all__ = ["MergeReport", "merge_factors", "merge_weights", "refuse_empty", "scale_update", "write_update"]
