"""Merge models that exist already, once: Θ = Θ⁰ + M(v), in one pass from the inputs' files to the output's.

Shapes: T = models, P = entries of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manyshot import kernels
from manyshot.engine import Piece, TilePool, cut, tile_entries
from manyshot.errors import MergeError, RunFolderError
from manyshot.export import copy_piece, open_model_folder, output_info
from manyshot.kernels.pieces import ADD_TO_BASE, STORED, Target
from manyshot.match import open_experts, refuse_untied, tied_duplicates
from manyshot.merge_report import MergeReport
from manyshot.operators import OperatorPlan
from manyshot.reading import TaskVectorReader, TileData
from manyshot.round_merge import refuse_empty
from manyshot.rundir import write_json
from manyshot.stream import MergeStream
from manyshot.task_vector import Scratch
from manyshot.tensor_writer import DEFAULT_SHARD_BYTES, PositionedWriter
from manyshot.tensors import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

RECORD_NAME = "merge.json"


@dataclass(frozen=True)
class MergeSettings:
    """How to merge and write; nothing in it changes the merged values but `dtype`, `seed` and the two permissions."""

    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    device: str = "cpu"
    threads: int | None = None
    seed: int = 0
    allow_copy: bool = False
    allow_nonfinite: bool = False
    force: bool = False


def check_output(output: Path, inputs: Sequence[Path], *, force: bool) -> None:
    """Refuse an output that is there (unless `force`) or that is one of the inputs. Nothing is changed yet."""
    for path in inputs:
        if output.resolve() == path.resolve() or path.resolve().is_relative_to(output.resolve()):
            raise RunFolderError(f"{output}: is, or holds, one of the models to merge ({path})")
    if output.exists() and not force:
        raise RunFolderError(f"{output}: is there already; --force replaces it")
    if output.exists() and not (output / RECORD_NAME).is_file():
        raise RunFolderError(f"{output}: --force replaces merged models only, and this holds no {RECORD_NAME} of one")


def merge_models(
    base: Path,
    experts: Mapping[str, Path],
    plan: OperatorPlan,
    weights: Sequence[float],
    output: Path,
    settings: MergeSettings,
    *,
    record: Mapping[str, object] | None = None,
    tick: Callable[[int, int], None] | None = None,
    finish: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Write the merged model folder `output`, complete or not at all, with what was done in merge.json.

    The sum is float32 and cast once to the base's types (or `settings.dtype`).
    `tick(done, total)` counts entries; `finish` may add files before the folder gets its name.
    """
    check_output(output, [base, *experts.values()], force=settings.force)
    pretrained = Checkpoint(base)
    updates = open_experts(pretrained, experts, allow_copy=settings.allow_copy)
    reader = TaskVectorReader(
        *(pretrained, None, tuple(experts), updates), allow_nonfinite=settings.allow_nonfinite, keep_base=True
    )
    tied = tied_duplicates(pretrained)
    refuse_untied(tied, tuple(experts), updates)
    reader = reader.without(tied)
    if unused := plan.unused(reader.names()):
        raise MergeError(f"overrides: the pattern '{unused[0]}' fits no tensor that is merged")
    names = [name for name in pretrained.names if name not in tied]
    infos = {name: output_info(pretrained.info(name), settings.dtype) for name in names}
    progress = _Count(sum(info.num_elements for info in infos.values()), tick)
    pool = TilePool(settings.threads, progress.add)

    def finish_folder(folder: Path) -> None:
        done = report.to_json() | {"tied": tied, "copied": copied, "weights": dict(zip(experts, weights, strict=True))}
        write_json(folder / RECORD_NAME, dict(record or {}) | done)
        if finish is not None:
            finish(folder)

    with open_model_folder(base, output, infos, settings.dtype, settings.shard_bytes, finish_folder) as writer:
        sink = _ModelSink(writer, infos, settings.allow_nonfinite)
        parts = (settings.seed, "operator", 1)
        report = MergeStream(reader, plan, weights, parts, sink, pool, device=settings.device, pairs=False).run()
        refuse_empty(report, weights)
        copied = sorted(set(names) - set(reader.names()))
        copy_tensors(pretrained, {name: infos[name] for name in copied}, writer, pool)
    return report


def copy_tensors(
    checkpoint: Checkpoint, infos: Mapping[str, TensorInfo], writer: PositionedWriter, pool: TilePool
) -> None:
    """Hand tensors on as they are, cast where `infos` says another type."""
    pieces = [piece for name, info in infos.items() for piece in cut(name, info.shape, tile_entries(1))]
    pool.map(lambda piece, scratch: copy_piece(checkpoint, piece, infos[piece.name], writer, scratch), pieces)


class _ModelSink:
    """Adds what the operator gave to the base and writes it, cast once."""

    def __init__(self, writer: PositionedWriter, infos: Mapping[str, TensorInfo], allow_nonfinite: bool) -> None:
        self.writer, self.infos, self.allow_nonfinite = writer, infos, allow_nonfinite

    def target(self, name: str) -> Target | None:
        file, begin, kind = self.writer.place(name)
        return Target(ADD_TO_BASE, kind, file, begin) if kind in STORED else None

    def wrote(self, piece: Piece, bad: bool) -> None:
        self.writer.wrote(piece.name, piece.count)
        self._check(piece, bad)

    def write(self, piece: Piece, data: TileData, kept_P: torch.Tensor, scratch: Scratch) -> tuple[float, float]:
        assert data.before_P is not None  # the reader keeps the base
        out_P = scratch.take("out", piece.count, self.infos[piece.name].dtype)
        self._check(piece, kernels.add_to(data.before_P, kept_P, out_P))
        self.writer.write(piece.name, piece.start, out_P)
        square = kernels.square_sum(kept_P)
        return square, square

    def _check(self, piece: Piece, bad: bool) -> None:
        if bad and not self.allow_nonfinite:
            raise MergeError(
                f"tensor '{piece.name}': the merged model holds NaN or Inf in {self.infos[piece.name].kind}; "
                "--dtype float32 has a wider range, --allow-nonfinite writes it all the same"
            )


class _Count:
    def __init__(self, total: int, tick: Callable[[int, int], None] | None) -> None:
        self.done, self.total, self.tick = 0, total, tick

    def add(self, count: int) -> None:
        self.done += count
        if self.tick is not None:
            self.tick(self.done, self.total)
