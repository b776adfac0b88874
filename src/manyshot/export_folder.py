"""`--format model`: a round's merged model as a model folder of its own, with everything that the base's folder has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manyshot.errors import ModelError
from manyshot.export import copy_side_files, export_model, output_info
from manyshot.export_card import model_card
from manyshot.export_source import ExportSource
from manyshot.rundir import atomic_folder, link_or_copy, require_space, write_text
from manyshot.task_vector import StoredTaskVector
from manyshot.tensors import INDEX_NAME, Checkpoint, TensorInfo, find_weight_files

Json = dict[str, Any]


def write_model_folder(
    source: ExportSource,
    output: Path,
    dtype: str | None,
    shard_bytes: int,
    finish: Callable[[Path, Json], None],
) -> None:
    """Write the model folder `output`, complete or not at all; `finish(folder, what there is to say)` may add to it.

    Where the run's own folder has these types and file sizes already, its weights are taken as they are (hard links on
    one disk, else copies); otherwise they are made again from the float32 master, cast once.
    """
    base = Checkpoint(source.base)
    dtype = dtype or source.dtype
    wanted = {name: output_info(base.info(name), dtype) for name in base.names}

    def complete(folder: Path, how: str) -> None:
        _write_readme(source, folder)
        check_written(folder, wanted)
        finish(folder, {"weights": how, "dtype": dtype or "as in the base", "tensors": len(wanted)})

    merged = source.merged
    if merged is not None and _fits(merged, wanted, shard_bytes):
        if not _same_disk(merged, output):
            require_space(output.parent, sum(info.num_bytes for info in wanted.values()), "the model")
        with atomic_folder(output) as folder:
            copy_side_files(source.base, folder, dtype)
            linked = copy_weights(merged, folder)
            complete(folder, "hard links to the run's own files" if linked else "copies of the run's own files")
        return
    export_model(
        *(base, StoredTaskVector(source.task_vector), output),
        dtype=dtype,
        shard_bytes=shard_bytes,
        finish=lambda folder: complete(folder, "written from the float32 task vector, cast once"),
    )


def _fits(folder: Path, wanted: dict[str, TensorInfo], shard_bytes: int) -> bool:
    """Whether a model folder's weights are of these names, types and shapes, in files no larger than asked for."""
    checkpoint = Checkpoint(folder)
    if {name: checkpoint.info(name) for name in checkpoint.names} != wanted:
        return False
    files = [Checkpoint(file) for file in find_weight_files(folder)]
    # a tensor that is larger than a file should be has one of its own
    return all(file.num_bytes <= shard_bytes or len(file.names) == 1 for file in files)


def _same_disk(one: Path, other: Path) -> bool:
    while not other.exists():
        other = other.parent
    return one.stat().st_dev == other.stat().st_dev


def copy_weights(source: Path, folder: Path) -> bool:
    """Put a model folder's weights, and the index of its shards, into another one; True where all are hard links."""
    index = [source / INDEX_NAME] if (source / INDEX_NAME).is_file() else []
    linked = [link_or_copy(file.resolve(), folder / file.name) for file in find_weight_files(source)]
    for file in index:
        shutil.copyfile(file, folder / file.name)
    return all(linked)


def check_written(folder: Path, wanted: dict[str, TensorInfo]) -> None:
    """Read the folder again: every tensor is there, with its type and shape, and nothing else."""
    checkpoint = Checkpoint(folder)
    for name in sorted({*checkpoint.names, *wanted}):
        found = checkpoint.info(name) if name in checkpoint else None
        if found != wanted.get(name):
            raise ModelError(f"{folder}: tensor '{name}' should be {wanted.get(name)}, written is {found}")


def _write_readme(source: ExportSource, folder: Path) -> None:
    """The card that the run wrote; where that is gone, one that says what this is."""
    if source.merged is not None and (source.merged / "README.md").is_file():
        shutil.copyfile(source.merged / "README.md", folder / "README.md")
        return
    write_text(folder / "README.md", model_card(source))
