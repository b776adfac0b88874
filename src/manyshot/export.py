"""Write model folders: the base's own files around tensors that come tile by tile, complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from manyshot import kernels
from manyshot.engine import Piece, TilePool, cut, tile_entries
from manyshot.folder_links import refuse_links_out
from manyshot.rundir import atomic_folder, link_or_copy, require_space, write_json
from manyshot.task_vector import Scratch, StoredTaskVector, read_wide
from manyshot.tensor_writer import (
    DEFAULT_SHARD_BYTES,
    PositionedWriter,
    make_header,
    plan_shards,
    shard_name,
    write_index,
)
from manyshot.tensors import Checkpoint, TensorInfo, kind_of

Shard = Mapping[str, TensorInfo]
# bytes of unchanged tensors from which on they get files of their own, which later rounds share
WORTH_APART = 100_000_000
WEIGHT_FILE_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".ckpt", ".onnx", ".onnx_data", ".tflite"),
    *(".ot", ".npz", ".mlmodel"),
)
# what a folder says of itself, not of the model that is made from it
OWN_FILES = ("README.md", "MANIFEST.json", "merge.json", "export.json", "Modelfile")


def export_model(
    pretrained: Checkpoint,
    task_vector: StoredTaskVector,
    output: Path,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
    threads: int | None = None,
    apart: bool = False,
    earlier: Path | None = None,
) -> None:
    """Write Θ⁰ + (Θʳ − Θ⁰) as a model folder: the sum in float32, one cast to the stored type (or `dtype`).

    Every base tensor is accounted for: merged where the task vector has it, else copied. With `apart`, tensors that it
    has not are in files of their own; where a folder `earlier` of the same base has such a file, it is hard linked.
    """
    infos = {name: output_info(pretrained.info(name), dtype) for name in pretrained.names}
    changed = set(task_vector.names)
    shards = plan_apart(infos, changed, shard_bytes) if apart else plan_shards(infos, shard_bytes)
    unchanged = [number for number, shard in enumerate(shards, start=1) if changed.isdisjoint(shard)]
    shared = {} if earlier is None else _shared_files(earlier, shards, unchanged)
    with _open_shards(pretrained.path, output, shards, dtype, finish, shared) as writer:
        pieces = [piece for name in writer.names for piece in cut(name, infos[name].shape, tile_entries(1))]

        def work(piece: Piece, scratch: Scratch) -> None:
            if piece.name not in task_vector:
                copy_piece(pretrained, piece, infos[piece.name], writer, scratch)
                return
            before_P, added_P = scratch.take("before", piece.count), scratch.take("added", piece.count)
            read_wide(pretrained, piece.name, piece.start, before_P, scratch)
            task_vector.read_entries(piece.name, piece.start, added_P)
            out_P = scratch.take("out", piece.count, infos[piece.name].dtype)
            kernels.add_to(before_P, added_P, out_P)
            writer.write(piece.name, piece.start, out_P)

        TilePool(threads).map(work, pieces)


def copy_piece(
    checkpoint: Checkpoint, piece: Piece, info: TensorInfo, writer: PositionedWriter, scratch: Scratch
) -> None:
    """Hand a piece of a stored tensor on unchanged, or cast once."""
    stored = checkpoint.info(piece.name)
    if stored.kind == info.kind:
        data = scratch.array("bytes", piece.count * info.itemsize, "uint8").data
        checkpoint.read_bytes(piece.name, piece.start, data)
        writer.write_bytes(piece.name, piece.start, data)
        return
    stored_P = scratch.take("stored", piece.count, stored.dtype)
    checkpoint.read_entries(piece.name, piece.start, stored_P)
    writer.write(piece.name, piece.start, stored_P.to(info.dtype))


@contextmanager
def open_model_folder(
    base: Path,
    output: Path,
    infos: Mapping[str, TensorInfo],
    dtype: str | None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    finish: Callable[[Path], None] | None = None,
) -> Iterator[PositionedWriter]:
    """A writer for the tensors of a new model folder, which gets its name when all of them have been written.

    Tokenizer, chat template, config and generation config are the base's own files. `finish` may add more.
    """
    with _open_shards(base, output, plan_shards(infos, shard_bytes), dtype, finish, {}) as writer:
        yield writer


@contextmanager
def _open_shards(
    base: Path,
    output: Path,
    shards: Sequence[Shard],
    dtype: str | None,
    finish: Callable[[Path], None] | None,
    shared: Mapping[str, Path],
) -> Iterator[PositionedWriter]:
    """The same for given shards; what is `shared` with another folder, by file name, is linked and not written."""
    named = {shard_name(number, len(shards)): shard for number, shard in enumerate(shards, start=1)}
    written = [shard for name, shard in named.items() if name not in shared]
    require_space(
        output.parent, sum(info.num_bytes for shard in written for info in shard.values()), "the merged model"
    )
    with atomic_folder(output) as folder:
        for name, source in shared.items():
            link_or_copy(source, folder / name)
        files = {folder / name: shard for name, shard in named.items() if name not in shared}
        copy_side_files(base, folder, dtype)
        write_index(folder, shards)
        with PositionedWriter(files) as writer:
            yield writer
        if finish is not None:
            finish(folder)


def plan_apart(
    infos: Shard, changed: Container[str], shard_bytes: int = DEFAULT_SHARD_BYTES
) -> list[dict[str, TensorInfo]]:
    """Shards of the tensors that change, then of the others, so that the latter need not be stored again.

    Where those are few bytes, or all there is, the shards are as ever: one file is handier than two.
    """
    rest = {name: info for name, info in infos.items() if name not in changed}
    if len(rest) == len(infos) or sum(info.num_bytes for info in rest.values()) < WORTH_APART:
        return plan_shards(infos, shard_bytes)
    own = {name: info for name, info in infos.items() if name in changed}
    return plan_shards(own, shard_bytes) + plan_shards(rest, shard_bytes)


def _shared_files(earlier: Path, shards: Sequence[Shard], unchanged: Sequence[int]) -> dict[str, Path]:
    """The files of an earlier folder, by name, that hold just what unchanged shards (by number) are to hold."""
    found = {}
    for number in unchanged:
        name, shard = shard_name(number, len(shards)), shards[number - 1]
        header, file = make_header(shard)[0], earlier / shard_name(number, len(shards))
        if file.is_file() and file.stat().st_size == len(header) + sum(info.num_bytes for info in shard.values()):
            with open(file, "rb") as stream:
                if stream.read(len(header)) == header:
                    found[name] = file
    return found


def check_space(base: Checkpoint, output: Path, dtype: str | None) -> None:
    """Refuse a merged model of the base's size that the disk cannot hold."""
    infos = [output_info(base.info(name), dtype) for name in base.names]
    require_space(output.parent, sum(info.num_bytes for info in infos), "the merged model")


def output_info(info: TensorInfo, dtype: str | None) -> TensorInfo:
    return TensorInfo(info.shape, kind_of(f"torch.{dtype}")) if dtype is not None and info.is_float else info


def copy_side_files(source: Path, folder: Path, dtype: str | None) -> None:
    """Copy everything of a model folder that is not weights; a changed output type is said in config.json.

    A subfolder comes along whole (further chat templates, code of the model), or not at all where weights lie in it: it
    is then another form of the model, with the base's weights.
    """
    refuse_links_out(source)
    for file in side_files(source):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if dtype is not None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        write_json(folder / "config.json", config)


def side_files(source: Path) -> list[Path]:
    """The files of a model folder that are not weights, those of its subfolders included."""
    found = [file for file in sorted(source.iterdir()) if file.is_file() and _is_side_file(file)]
    for part in sorted(source.iterdir()):
        if part.is_dir() and not part.name.startswith((".", "checkpoint-")):
            files = [file for file in sorted(part.rglob("*")) if file.is_file()]
            if not any(file.name.endswith(WEIGHT_FILE_SUFFIXES) for file in files):
                found += [file for file in files if not _is_hidden(file.relative_to(source))]
    return found


def _is_side_file(file: Path) -> bool:
    weights = file.name.endswith((*WEIGHT_FILE_SUFFIXES, ".index.json"))
    return not weights and file.name not in OWN_FILES and not file.name.startswith(".")


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)
