"""Task vectors without dense experts: θ_τ − Θʳ⁻¹, some entries of one tensor at a time, in float32.

An expert is stored as what its local update changed: LoRA factors, or a whole model folder. Its update is exact:
s·B·A for an adapter that started from zero, s·B·A − s·B₀·A₀ for one that started from factors (B₀, A₀).
Names: O = output rows, I = input columns, R = rank, N = rows, P = entries of a tile.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from manyshot import kernels
from manyshot.errors import ModelError
from manyshot.kernels import Source, pieces
from manyshot.rundir import read_json
from manyshot.tensors import Checkpoint

if TYPE_CHECKING:
    import torch

FACTORS_NAME = "factors.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
# tensors whose factors are kept in float32 at once: those that the threads are at
CACHED_FACTORS = 4


class Scratch:
    """Buffers of one thread, by name; used again for every tile, so that no tile pays for fresh memory."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray[Any, Any]] = {}
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._views: dict[tuple[str, int, torch.dtype], torch.Tensor] = {}

    def array(self, name: str, count: int, dtype: str = "float32") -> np.ndarray[Any, Any]:
        """(count,) numpy entries of the buffer `name`, with whatever was in it."""
        found = self._arrays.get(name)
        if found is None or len(found) < count or found.dtype != dtype:
            found = self._arrays[name] = np.empty(count, dtype)
        return found[:count]

    def take(self, name: str, count: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """(count,) entries of the buffer `name`, float32 when no type is given, with whatever was in it."""
        import torch

        dtype = dtype or torch.float32
        view = self._views.get((name, count, dtype))
        if view is None:
            buffer = self._buffers.get((name, dtype))
            if buffer is None or len(buffer) < count:
                buffer = self._buffers[name, dtype] = torch.empty(count, dtype=dtype)
                self._views.clear()
            view = self._views[name, count, dtype] = buffer[:count]
        return view


@dataclass(frozen=True)
class TileSource:
    """Where the compiled kernels read a tensor, and the object that must live as long as they do."""

    source: Source
    owner: object


def stored_source(checkpoint: Checkpoint, name: str) -> TileSource | None:
    """A stored tensor as the compiled kernels read it; None where they cannot."""
    kind = checkpoint.info(name).kind
    if kind not in pieces.STORED:
        return None
    return TileSource(pieces.stored(kind, checkpoint.descriptor(name), checkpoint.offset(name)), checkpoint)


class Update(Protocol):
    """What one expert adds to the model its round started from."""

    names: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name` of the base model that this expert changed."""

    def is_dense(self, name: str) -> bool:
        """Whether the update is a difference of stored weights, so that `read` needs `before_P`."""

    def read(self, name: str, start: int, before_P: torch.Tensor | None, out_P: torch.Tensor, scratch: Scratch) -> bool:
        """Entries start… of θ − Θʳ⁻¹ into `out_P`; `before_P` is Θʳ⁻¹ there. True when θ holds NaN or Inf there."""

    def source(self, name: str) -> TileSource | None:
        """The same for the compiled kernels; None where only `read` can do it."""

    def norm(self) -> float | None:
        """‖θ − Θʳ⁻¹‖ over all tensors; None where the update is a difference of stored weights."""


@dataclass(frozen=True)
class Factor:
    """One low-rank update ΔW = scaling · B·A (transposed where the layer stores its weight as inputs × outputs)."""

    lora_a: str
    lora_b: str
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class FactorTable:
    """What an adapter changes: low-rank updates by base tensor, and tensors that it holds whole (base name -> key)."""

    factors: Mapping[str, Factor]
    whole: Mapping[str, str] = field(default_factory=dict)


# of float32
LARGEST = 3.4e38


class AdapterFactors:
    """The low-rank factors of an adapter folder and which base tensor each belongs to.

    `table` says so, or else the folder's `factors.json`.
    """

    def __init__(self, folder: Path, table: FactorTable | None = None) -> None:
        self.folder = folder
        self.weights = Checkpoint(folder / ADAPTER_WEIGHTS_NAME)
        if table is None:
            table = FactorTable(_read_factors(folder / FACTORS_NAME))
        self.factors = dict(sorted(table.factors.items()))
        self.whole = dict(table.whole)
        self.names = tuple(sorted({*self.factors, *self.whole}))
        self._cache: dict[str, tuple[torch.Tensor, torch.Tensor, bool]] = {}
        for name, factor in self.factors.items():
            for key in (factor.lora_a, factor.lora_b):
                if key not in self.weights:
                    raise ModelError(f"{folder}: {FACTORS_NAME} names '{key}' for '{name}', the weights do not have it")
            a_shape, b_shape = (self.weights.info(key).shape for key in (factor.lora_a, factor.lora_b))
            if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1]:
                raise ModelError(f"{folder}: the factors of '{name}' have shapes {a_shape} and {b_shape}")

    def shape(self, name: str) -> tuple[int, ...]:
        if name in self.whole:
            return self.weights.info(self.whole[name]).shape
        factor = self.factors[name]
        outputs = self.weights.info(factor.lora_b).shape[0]
        inputs = self.weights.info(factor.lora_a).shape[1]
        return (inputs, outputs) if factor.transposed else (outputs, inputs)

    def read_product(self, name: str, start: int, out_P: torch.Tensor) -> bool:
        """Entries start… of ΔW = s·B·A, row by row, float32; the sum over R runs in order. True for NaN or Inf."""
        b_NR, a_RI, bad = self.wide(name)
        kernels.low_rank(b_NR, a_RI, self.factors[name].scaling, start, out_P)
        return bad

    def source(self, name: str) -> TileSource | None:
        """ΔW as the compiled kernels form it."""
        b_NR, a_RI, bad = self.wide(name)
        return TileSource(pieces.factors(b_NR, a_RI, self.factors[name].scaling, nonfinite=bad), (b_NR, a_RI))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of ΔW, float32."""
        columns = self.shape(name)[1]
        import torch

        out_P = torch.empty((stop - start) * columns)
        self.read_product(name, start * columns, out_P)
        return out_P.reshape(stop - start, columns)

    def wide(self, name: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """The factors of a tensor in float32, as the two matrices whose product is ΔW/s in its stored layout."""
        found = self._cache.get(name)
        if found is None:
            import torch

            factor = self.factors[name]
            a_RI = self.weights.read(factor.lora_a).float()
            b_OR = self.weights.read(factor.lora_b).float()
            finite = bool(torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all())
            # a product that float32 cannot hold is Inf, or NaN where two of them meet; none is larger than this
            largest = [float(one.abs().max()) if one.numel() else 0.0 for one in (a_RI, b_OR)]
            scaling = abs(factor.scaling)
            finite &= max(scaling, largest[0] * largest[1] * len(a_RI) * max(scaling, 1.0)) < LARGEST
            left, right = (a_RI.T, b_OR.T.contiguous()) if factor.transposed else (b_OR, a_RI)
            found = left, right, not finite
            self._cache[name] = found
            for old in list(self._cache)[:-CACHED_FACTORS]:
                self._cache.pop(old, None)
        return found


def _read_factors(file: Path) -> dict[str, Factor]:
    """factors.json, as models.save_adapter writes it. Raises ModelError for anything else."""
    found = {}
    for name, entry in read_json(file).items():
        try:
            factor = Factor(**entry)
        except TypeError:
            raise ModelError(f"{file}: '{name}' is no pair of factors: {entry!r}") from None
        types = [type(value) for value in vars(factor).values()]
        if (
            types not in ([str, str, float, bool], [str, str, int, bool])
            or not abs(factor.scaling) <= sys.float_info.max
        ):
            raise ModelError(f"{file}: '{name}' is no pair of factors: {entry!r}")
        found[name] = factor
    return found


class AdapterUpdate:
    """A LoRA expert: s·B·A, less the start's s·B₀·A₀ where its adapter did not start at zero.

    Tensors that the adapter holds whole (`modules_to_save`, trained biases) are differences like a dense expert's.
    """

    def __init__(self, adapter: Path | AdapterFactors, start_adapter: Path | None = None) -> None:
        self.end = adapter if isinstance(adapter, AdapterFactors) else AdapterFactors(adapter)
        self.start = AdapterFactors(start_adapter) if start_adapter else None
        self.names = self.end.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.end.shape(name)

    def is_dense(self, name: str) -> bool:
        return name in self.end.whole

    def read(self, name: str, start: int, before_P: torch.Tensor | None, out_P: torch.Tensor, scratch: Scratch) -> bool:
        if name in self.end.whole:
            return read_difference(self.end.weights, self.end.whole[name], start, before_P, out_P, scratch)
        bad = self.end.read_product(name, start, out_P)
        if self.start is not None:
            started_P = scratch.take("start product", len(out_P))
            bad |= self.start.read_product(name, start, started_P)
            out_P -= started_P
        return bad

    def source(self, name: str) -> TileSource | None:
        if name in self.end.whole:
            return stored_source(self.end.weights, self.end.whole[name])
        return self.end.source(name) if self.start is None else None

    def norm(self) -> float | None:
        """√Σ ‖s·B·A − s·B₀·A₀‖², from the factors alone: with B̂ = [sB, −s₀B₀] and Â = [A; A₀] it is ⟨B̂ᵀB̂, ÂÂᵀ⟩."""
        import torch

        if self.end.whole:
            return None
        total = 0.0
        for name in self.names:
            parts = [(self.end, 1.0)] if self.start is None else [(self.end, 1.0), (self.start, -1.0)]
            wide = [(side.wide(name), sign * side.factors[name].scaling) for side, sign in parts]
            left_NR = torch.cat([b.double() * scale for (b, _, _), scale in wide], dim=1)
            right_RI = torch.cat([a.double() for (_, a, _), _ in wide])
            total += float(((left_NR.T @ left_NR) * (right_RI @ right_RI.T)).sum())
        return math.sqrt(max(total, 0.0))


class ModelUpdate:
    """An expert with all weights: its folder's tensors less those its round started from.

    `stored_as` names tensors that the folder holds under another name (tied weights written once).
    """

    def __init__(self, model: Path | Checkpoint, stored_as: Mapping[str, str] | None = None) -> None:
        self.model = model if isinstance(model, Checkpoint) else Checkpoint(model)
        self._stored_as = {name: name for name in self.model.names} if stored_as is None else dict(stored_as)
        self.names = tuple(sorted(self._stored_as))

    def stored_name(self, name: str) -> str:
        """What the folder calls a tensor of the base."""
        return self._stored_as[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.model.info(self._stored_as[name]).shape

    def is_dense(self, name: str) -> bool:
        return True

    def read(self, name: str, start: int, before_P: torch.Tensor | None, out_P: torch.Tensor, scratch: Scratch) -> bool:
        return read_difference(self.model, self._stored_as[name], start, before_P, out_P, scratch)

    def source(self, name: str) -> TileSource | None:
        return stored_source(self.model, self._stored_as[name])

    def norm(self) -> float | None:
        return None


def read_difference(
    checkpoint: Checkpoint, name: str, start: int, before_P: torch.Tensor | None, out_P: torch.Tensor, scratch: Scratch
) -> bool:
    """out = float32(stored) − before, or float32(stored) where there is no `before_P`; True for NaN or Inf."""
    stored_P = scratch.take("stored", len(out_P), checkpoint.info(name).dtype)
    checkpoint.read_entries(name, start, stored_P)
    if before_P is None:
        return kernels.widen(stored_P, out_P)
    return kernels.subtract(stored_P, before_P, out_P)


def read_wide(checkpoint: Checkpoint, name: str, start: int, out_P: torch.Tensor, scratch: Scratch) -> bool:
    """out = float32 of entries start… of a stored tensor; True for NaN or Inf."""
    return read_difference(checkpoint, name, start, None, out_P, scratch)


def read_dense(update: Update, name: str, before: torch.Tensor | None = None) -> torch.Tensor:
    """The whole update of one tensor, float32, in its shape: for a look at it, not for merging."""
    import torch

    shape = update.shape(name)
    out_P = torch.empty(math.prod(shape))
    update.read(name, 0, None if before is None else before.float().reshape(-1), out_P, Scratch())
    return out_P.reshape(shape)


class StoredTaskVector:
    """Θʳ − Θ⁰ in float32, as one safetensors file that holds only the tensors that changed: the fp32 master."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.tensors = Checkpoint(file)
        self.names = self.tensors.names

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def read(self, name: str) -> torch.Tensor:
        return self.tensors.read(name)

    def read_entries(self, name: str, start: int, out_P: torch.Tensor) -> None:
        """Fill `out_P` (float32) with entries start… of the flattened tensor."""
        self.tensors.read_entries(name, start, out_P)


class StoredUpdate:
    """An update that is stored as it is, tensor by tensor."""

    def __init__(self, file: Path) -> None:
        self.weights = Checkpoint(file)
        self.names = self.weights.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights.info(name).shape

    def is_dense(self, name: str) -> bool:
        return False

    def read(self, name: str, start: int, before_P: torch.Tensor | None, out_P: torch.Tensor, scratch: Scratch) -> bool:
        return read_wide(self.weights, name, start, out_P, scratch)

    def source(self, name: str) -> TileSource | None:
        return stored_source(self.weights, name)

    def norm(self) -> float | None:
        return None


class FactorEntries(StoredUpdate):
    """An adapter's factors as they are, A and B: the vectors of `space: factors`, where Θ⁰ counts as zero."""

    def __init__(self, adapter: Path) -> None:
        super().__init__(AdapterFactors(adapter).weights.path)
