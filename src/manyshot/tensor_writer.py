"""Writers of safetensors: one file in one pass, or the shards of a model folder at once, at any position.

Both know every name, type and shape before the first byte.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from manyshot.errors import ModelError
from manyshot.fault_points import passing
from manyshot.rundir import PARTIAL, atomic_file, name_file, write_json
from manyshot.tensors import INDEX_NAME, SINGLE_NAME, TensorInfo, kind_of

if TYPE_CHECKING:
    import torch

DEFAULT_SHARD_BYTES = 5_000_000_000
FLUSH_BYTES = 1 << 27


def make_header(infos: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor begins."""
    offset = 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins = {}
    for name, info in infos.items():
        header[name] = {
            "dtype": info.kind,
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.num_bytes],
        }
        begins[name] = offset
        offset += info.num_bytes
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(blob)) + blob, {name: 8 + len(blob) + begin for name, begin in begins.items()}


class SafetensorsWriter:
    """Writes one safetensors file in one pass; `write` must be called once per tensor, in the order of `infos`."""

    def __init__(self, stream: IO[bytes], infos: Mapping[str, TensorInfo]) -> None:
        self._stream = stream
        self._pending = list(infos.items())
        stream.write(make_header(infos)[0])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        expected, info = self._pending.pop(0)
        found = TensorInfo.of(tensor.shape, tensor.dtype)
        if (name, found) != (expected, info):
            raise ModelError(f"tensor '{name}' ({found}) was written where '{expected}' ({info}) belongs")
        import torch

        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._stream.write(flat.view(torch.uint8).numpy().data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._pending:
            raise ModelError(f"tensor '{self._pending[0][0]}' was never written")


class PositionedWriter:
    """Writes safetensors files entry by entry, in any order and from several threads at once.

    `files` maps each file to its tensors. On leaving, every entry must have been written once. With `only`, files that
    start_files() has made get these tensors, while others may get the rest from elsewhere.
    """

    def __init__(self, files: Mapping[Path, Mapping[str, TensorInfo]], only: Collection[str] | None = None) -> None:
        self._place: dict[str, tuple[Path, int, TensorInfo]] = {}
        self._descriptors: dict[Path, int] = {}
        self._left = {
            name: info.num_elements
            for infos in files.values()
            for name, info in infos.items()
            if only is None or name in only
        }
        self._shared = only is not None
        self._lock = threading.Lock()
        self._unflushed = 0
        self._wanted, self._closing = threading.Event(), False
        self._failed: OSError | None = None
        self._flusher = threading.Thread(target=self._flush, daemon=True)
        try:
            for file, infos in files.items():
                made = 0 if self._shared else os.O_CREAT | os.O_TRUNC
                self._descriptors[file] = os.open(file, os.O_WRONLY | made, 0o666)
                header, begins = make_header(infos)
                if not self._shared:
                    self._write(file, header, 0)
                self._place |= {name: (file, begins[name], infos[name]) for name in infos if name in self._left}
        except BaseException:
            self._close()
            raise
        self._flusher.start()

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that belong into the files, in order."""
        return tuple(self._place)

    def write(self, name: str, start: int, entries_P: torch.Tensor) -> None:
        """Put entries (CPU, of the tensor's type) at position `start` of the flattened tensor."""
        import torch

        if kind_of(entries_P.dtype) != self._place[name][2].kind:
            raise ModelError(f"tensor '{name}': {entries_P.dtype} does not belong into {self._place[name][2]}")
        self.write_bytes(name, start, entries_P.view(torch.uint8).numpy().data)

    def write_bytes(self, name: str, start: int, data: memoryview) -> None:
        """Put the bytes of entries at position `start` of the flattened tensor."""
        file, begin, info = self._place[name]
        count = data.nbytes // info.itemsize
        if start + count > info.num_elements:
            raise ModelError(f"tensor '{name}': entries {start} … {start + count} do not belong into {info}")
        self._write(file, data, begin + start * info.itemsize)
        self.wrote(name, count)

    def place(self, name: str) -> tuple[int, int, str]:
        """File descriptor, byte at which the tensor begins, and type, for who writes there himself and then says so."""
        file, begin, info = self._place[name]
        return self._descriptors[file], begin, info.kind

    def wrote(self, name: str, entries: int) -> None:
        """Note that so many entries of a tensor have been written."""
        passing("piece", self._place[name][0])
        with self._lock:
            self._left[name] -= entries
            self._unflushed += entries * self._place[name][2].itemsize
            wanted = self._unflushed >= FLUSH_BYTES
            if wanted:
                self._unflushed = 0
        if wanted:
            self._wanted.set()

    def _flush(self) -> None:
        """Send to the disk what has been written, while more is being computed.

        The system tells of a failure once, so it is kept here: the last fsync may find nothing wrong.
        """
        while True:
            self._wanted.wait()
            if self._closing:
                return
            self._wanted.clear()
            for file, descriptor in list(self._descriptors.items()):
                try:
                    os.fdatasync(descriptor)
                except OSError as error:
                    name_file(error, final_name(file))
                    self._failed = self._failed or error

    def _write(self, file: Path, data: bytes | memoryview, offset: int) -> None:
        try:
            while len(data):
                count = os.pwrite(self._descriptors[file], data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            name_file(error, final_name(file))
            raise

    def _close(self) -> None:
        self._closing = True
        self._wanted.set()
        if self._flusher.is_alive():
            self._flusher.join()
        for descriptor in self._descriptors.values():
            if self._shared:
                os.fsync(descriptor)  # nobody else can do it for what was written here
            os.close(descriptor)
        self._descriptors.clear()

    def __enter__(self) -> PositionedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if error is None and self._failed is not None:
            raise self._failed
        if error is None and (wrong := [name for name, left in self._left.items() if left]):
            raise ModelError(f"tensor '{wrong[0]}': {self._left[wrong[0]]} entries were never written")


def start_files(files: Mapping[Path, Mapping[str, TensorInfo]]) -> None:
    """Make files that hold their headers, for writers that each get only some of the tensors."""
    for file, infos in files.items():
        header, _ = make_header(infos)
        with open(file, "wb") as stream:
            stream.write(header)
            stream.truncate(len(header) + sum(info.num_bytes for info in infos.values()))


def final_name(file: Path) -> Path:
    """The name that a file gets when it is complete."""
    return Path(str(file).replace(PARTIAL, ""))


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file atomically, tensors sorted by name."""
    infos = {name: TensorInfo.of(tensors[name].shape, tensors[name].dtype) for name in sorted(tensors)}
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
