"""Write model folders: the base's own files around tensors that come tile by tile, complete or absent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from manyshot import kernels
from manyshot.engine import Piece, TilePool, cut, tile_entries
from manyshot.folder_links import refuse_links_out
from manyshot.rundir import atomic_folder, require_space, write_json
from manyshot.task_vector import Scratch, StoredTaskVector, read_wide
from manyshot.tensor_writer import DEFAULT_SHARD_BYTES, PositionedWriter, plan_shards, shard_name, write_index
from manyshot.tensors import Checkpoint, TensorInfo, kind_of

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
) -> None:
    """Write Θ⁰ + (Θʳ − Θ⁰) as a model folder: the sum in float32, one cast to the stored type (or `dtype`).

    Every base tensor is accounted for: merged where the task vector has it, else copied.
    """
    infos = {name: output_info(pretrained.info(name), dtype) for name in pretrained.names}
    with open_model_folder(pretrained.path, output, infos, dtype, shard_bytes, finish) as writer:
        pieces = [piece for name in infos for piece in cut(name, infos[name].shape, tile_entries(1))]

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
    require_space(output.parent, sum(info.num_bytes for info in infos.values()), "the merged model")
    shards = plan_shards(infos, shard_bytes)
    with atomic_folder(output) as folder:
        copy_side_files(base, folder, dtype)
        write_index(folder, shards)
        files = {folder / shard_name(number, len(shards)): shard for number, shard in enumerate(shards, start=1)}
        with PositionedWriter(files) as writer:
            yield writer
        if finish is not None:
            finish(folder)


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
