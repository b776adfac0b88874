"""Model folders as tensors: a lazy reader of safetensors, tensor by tensor or entry by entry. Never pickle."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from manyshot.errors import ModelError, RunFolderError
from manyshot.rundir import read_json

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_NAME = 200  # of a shard, in characters; file systems end at 255 bytes

# name in the safetensors header -> torch's name, bytes, whether it is a float
KINDS: dict[str, tuple[str, int, bool]] = {
    "F64": ("float64", 8, True),
    "F32": ("float32", 4, True),
    "F16": ("float16", 2, True),
    "BF16": ("bfloat16", 2, True),
    "F8_E4M3": ("float8_e4m3fn", 1, True),
    "F8_E5M2": ("float8_e5m2", 1, True),
    "F8_E8M0": ("float8_e8m0fnu", 1, True),
    "I64": ("int64", 8, False),
    "I32": ("int32", 4, False),
    "I16": ("int16", 2, False),
    "I8": ("int8", 1, False),
    "U64": ("uint64", 8, False),
    "U32": ("uint32", 4, False),
    "U16": ("uint16", 2, False),
    "U8": ("uint8", 1, False),
    "BOOL": ("bool", 1, False),
}
_BY_TORCH_NAME = {f"torch.{name}": kind for kind, (name, _, _) in KINDS.items()}


def kind_of(dtype: torch.dtype | str) -> str:
    """The header's name of a torch type (`torch.float32` or its text -> F32). Raises ModelError for one it lacks."""
    kind = _BY_TORCH_NAME.get(str(dtype))
    if kind is None:
        raise ModelError(f"tensors of type {dtype} cannot be stored in safetensors")
    return kind


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor. `kind` is the header's name of its type, such as BF16."""

    shape: tuple[int, ...]
    kind: str

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype | str) -> TensorInfo:
        """From a torch type, or its text."""
        return cls(tuple(shape), kind_of(dtype))

    @property
    def dtype(self) -> torch.dtype:
        """The torch type. Torch takes seconds to load, so what only moves bytes asks for `kind`."""
        import torch

        dtype: torch.dtype = getattr(torch, KINDS[self.kind][0])
        return dtype

    @property
    def itemsize(self) -> int:
        return KINDS[self.kind][1]

    @property
    def is_float(self) -> bool:
        return KINDS[self.kind][2]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.itemsize


class Checkpoint:
    """A model folder (or one safetensors file), read lazily.

    `names` are sorted. What is read is the mapped file itself, so never change it in place. Raises ModelError for a
    folder without weights, a missing or unreadable shard, an index that names a file outside the folder, and a pickle
    checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file_of: dict[str, Path] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        self._handles: dict[Path, Any] = {}
        self._descriptors: dict[Path, int] = {}
        for file in find_weight_files(path):
            self._read_header(file)
        for name, shard in (_weight_map(path) or {}).items():
            if name not in self._infos:
                raise ModelError(f"{path / INDEX_NAME}: says that tensor '{name}' is in '{shard}', which lacks it")
        self.names: tuple[str, ...] = tuple(sorted(self._infos))

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="numpy") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    view = handle.get_slice(name)
                    if name in self._file_of:
                        raise ModelError(f"{file}: tensor '{name}' is also in {self._file_of[name].name}")
                    self._file_of[name] = file
                    self._infos[name] = TensorInfo(tuple(view.get_shape()), _known_kind(file, name, view.get_dtype()))
            self._offsets |= _data_offsets(file)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error})") from None

    def __reduce__(self) -> tuple[type[Checkpoint], tuple[Path]]:
        """To another process goes the path; what is there is opened there."""
        return Checkpoint, (self.path,)

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored type."""
        tensor: torch.Tensor = self._open(name).get_tensor(name)
        return tensor

    def read_entries(self, name: str, start: int, out_P: torch.Tensor) -> None:
        """Fill `out_P` (of the stored type) with entries start… of the flattened tensor. Threads may do so at once."""
        import torch

        self.read_bytes(name, start, out_P.view(torch.uint8).numpy().data)

    def read_bytes(self, name: str, start: int, left: memoryview) -> None:
        """Fill a buffer of bytes with entries start… as they are stored."""
        offset = self._offsets[name] + start * self._infos[name].itemsize
        while left.nbytes:
            count = os.preadv(self.descriptor(name), [left], offset)
            if not count:
                raise ModelError(f"{self._file_of[name]}: ends within tensor '{name}'; it was changed meanwhile")
            left, offset = left[count:], offset + count

    def offset(self, name: str) -> int:
        """The byte of its file at which a tensor begins."""
        return self._offsets[name]

    def descriptor(self, name: str) -> int:
        """A file descriptor of a tensor's file, open as long as this object lives."""
        file = self._file_of[name]
        if file not in self._descriptors:
            descriptor = os.open(file, os.O_RDONLY)
            if self._descriptors.setdefault(file, descriptor) != descriptor:
                os.close(descriptor)  # another thread was first
            else:
                weakref.finalize(self, os.close, descriptor)
        return self._descriptors[file]

    def _open(self, name: str) -> Any:
        """The memory-mapped file of a tensor, opened once: parsing its header costs more than reading a tensor."""
        file = self._file_of[name]
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self._infos.values())


def find_weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, from its index where it has one."""
    # os.path says of a name that no system can have that nothing is there, and pathlib raises
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ModelError(f"{path}: no such model folder")
    index, weight_map = path / INDEX_NAME, _weight_map(path)
    if weight_map is not None:
        files = []
        for shard in sorted(set(weight_map.values())):
            file = path / shard
            if Path(shard).name != shard or shard in ("", "..") or len(shard) > MAX_NAME:
                raise ModelError(f"{index}: names '{shard}', which is not a file of this folder")
            if not file.exists():
                raise ModelError(f"{index}: names the shard '{shard}', which is missing from {path}")
            files.append(file)
        return files
    if (path / SINGLE_NAME).exists():
        return [path / SINGLE_NAME]  # what else lies there (an adapter, a second format) is not this model
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted([*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
        if pickles:
            raise ModelError(
                f"{path}: holds {pickles[0].name} but no safetensors; such files are never read, since they can run "
                "code. Convert once where you trust the file: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
            )
        raise ModelError(f"{path}: a model folder without weights (no *.safetensors file)")
    return files


def _weight_map(path: Path) -> dict[str, str] | None:
    """Tensor name -> shard, from the index of a model folder; None where it has no index."""
    index = path / INDEX_NAME
    if not index.exists():
        return None
    try:
        weight_map = read_json(index).get("weight_map")
    except RunFolderError as error:
        raise ModelError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: has no 'weight_map'")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ModelError(f"{index}: says that tensor '{name}' is in {shard!r:.80}, which is no name of a file")
    return dict(weight_map)


def _data_offsets(file: Path) -> dict[str, int]:
    """Where each tensor's bytes begin in a file whose header safetensors has found to be sound."""
    with open(file, "rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _known_kind(file: Path, name: str, stored: str) -> str:
    if stored not in KINDS:
        raise ModelError(f"{file}: tensor '{name}' has type {stored}; known are {', '.join(KINDS)}")
    return stored


def file_digest(file: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
