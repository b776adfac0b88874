"""Model folders as tensors: a lazy reader and a streaming writer of safetensors. Never pickle.

The reader opens files on demand and reads one tensor, or some rows of one, at a time. The writer knows every name,
type and shape before the first byte, so it writes header and data in one pass and holds one tensor at most.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from manyshot.errors import ModelError, RunFolderError
from manyshot.rundir import atomic_file, read_json, write_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DEFAULT_SHARD_BYTES = 5_000_000_000

# name in the safetensors header -> torch type
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_elements(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


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
        self._handles: dict[Path, Any] = {}
        for file in find_weight_files(path):
            self._read_header(file)
        for name, shard in (_weight_map(path) or {}).items():
            if name not in self._infos:
                raise ModelError(f"{path / INDEX_NAME}: says that tensor '{name}' is in '{shard}', which lacks it")
        self.names: tuple[str, ...] = tuple(sorted(self._infos))

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a dict
                    view = handle.get_slice(name)
                    if name in self._file_of:
                        raise ModelError(f"{file}: tensor '{name}' is also in {self._file_of[name].name}")
                    self._file_of[name] = file
                    self._infos[name] = TensorInfo(tuple(view.get_shape()), _dtype_of(file, name, view.get_dtype()))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: not a readable safetensors file ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored type."""
        tensor: torch.Tensor = self._open(name).get_tensor(name)
        return tensor

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the first dimension, in the stored type; a scalar is one row."""
        if not self._infos[name].shape:
            return self.read(name)
        tensor: torch.Tensor = self._open(name).get_slice(name)[start:stop]
        return tensor

    def _open(self, name: str) -> Any:
        """The memory-mapped file of a tensor, opened once: parsing its header costs more than reading a tile."""
        file = self._file_of[name]
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self._infos.values())

    def digest(self) -> str:
        """SHA-256 over the weight files' contents, in the order of their names."""
        digest = hashlib.sha256()
        for file in sorted(set(self._file_of.values())):
            digest.update(file.name.encode())
            digest.update(file_digest(file).encode())
        return digest.hexdigest()


def find_weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, from its index where it has one."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ModelError(f"{path}: no such model folder")
    index, weight_map = path / INDEX_NAME, _weight_map(path)
    if weight_map is not None:
        files = []
        for shard in sorted(set(weight_map.values())):
            file = path / shard
            if Path(shard).name != shard or shard in ("", ".."):
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
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _dtype_of(file: Path, name: str, stored: str) -> torch.dtype:
    if stored not in DTYPES:
        raise ModelError(f"{file}: tensor '{name}' has type {stored}; known are {', '.join(DTYPES)}")
    return DTYPES[stored]


def file_digest(file: Path) -> str:
    """SHA-256 of a file, read in blocks."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class SafetensorsWriter:
    """Writes one safetensors file in one pass; `write` must be called once per tensor, in the order of `infos`."""

    def __init__(self, stream: IO[bytes], infos: Mapping[str, TensorInfo]) -> None:
        self._stream = stream
        self._pending = list(infos.items())
        offset = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, info in infos.items():
            header[name] = {
                "dtype": DTYPE_NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.num_bytes],
            }
            offset += info.num_bytes
        blob = json.dumps(header, separators=(",", ":")).encode()
        blob += b" " * (-len(blob) % 8)  # the format aligns the data to 8 bytes
        stream.write(struct.pack("<Q", len(blob)) + blob)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        expected, info = self._pending.pop(0)
        found = TensorInfo(tuple(tensor.shape), tensor.dtype)
        if (name, found) != (expected, info):
            raise ModelError(f"tensor '{name}' ({found}) was written where '{expected}' ({info}) belongs")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._stream.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._pending:
            raise ModelError(f"tensor '{self._pending[0][0]}' was never written")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file atomically, tensors sorted by name."""
    infos = {name: TensorInfo(tuple(tensors[name].shape), tensors[name].dtype) for name in sorted(tensors)}
    with atomic_file(path) as stream, SafetensorsWriter(stream, infos) as writer:
        for name in infos:
            writer.write(name, tensors[name])


def plan_shards(infos: Mapping[str, TensorInfo], shard_bytes: int = DEFAULT_SHARD_BYTES) -> list[dict[str, TensorInfo]]:
    """Cut tensors, in order, into shards of at most `shard_bytes` (one larger tensor gets a shard of its own)."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if shards[-1] and size + info.num_bytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.num_bytes
    return shards


def shard_name(number: int, total: int) -> str:
    """The file name of a shard, numbered from 1, as transformers expects it."""
    return SINGLE_NAME if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def write_index(folder: Path, shards: Iterable[Mapping[str, TensorInfo]]) -> None:
    """Write the shard index; a single shard needs none."""
    shards = list(shards)
    if len(shards) == 1:
        return
    weight_map = {name: shard_name(i + 1, len(shards)) for i, shard in enumerate(shards) for name in shard}
    total = sum(info.num_bytes for shard in shards for info in shard.values())
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
