"""Task vectors without dense experts: θ_τ − Θʳ⁻¹, some rows of one tensor at a time, in float32.

An expert is stored as what its local update changed: LoRA factors, or a whole model folder. Its update is exact:
s·B·A for an adapter that started from zero, s·B·A − s·B₀·A₀ for one that started from factors (B₀, A₀).
Names: O = output rows, I = input columns, R = rank, N = rows of the tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from manyshot.errors import ModelError
from manyshot.rundir import read_json
from manyshot.tensors import Checkpoint

FACTORS_NAME = "factors.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


class Update(Protocol):
    """What one expert adds to the model its round started from."""

    names: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor `name` of the base model that this expert changed."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of θ − Θʳ⁻¹ for tensor `name`, float32."""


@dataclass(frozen=True)
class Factor:
    """One low-rank update ΔW = scaling · B·A (transposed where the layer stores its weight as inputs × outputs)."""

    lora_a: str
    lora_b: str
    scaling: float
    transposed: bool


class AdapterFactors:
    """The low-rank factors of an adapter folder and which base tensor each belongs to (`factors.json`)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = Checkpoint(folder / ADAPTER_WEIGHTS_NAME)
        table = read_json(folder / FACTORS_NAME)
        self.factors = {name: Factor(**entry) for name, entry in sorted(table.items())}
        self.names = tuple(self.factors)
        for name, factor in self.factors.items():
            for key in (factor.lora_a, factor.lora_b):
                if key not in self.weights:
                    raise ModelError(f"{folder}: {FACTORS_NAME} names '{key}' for '{name}', the weights do not have it")

    def shape(self, name: str) -> tuple[int, ...]:
        factor = self.factors[name]
        outputs = self.weights.info(factor.lora_b).shape[0]
        inputs = self.weights.info(factor.lora_a).shape[1]
        return (inputs, outputs) if factor.transposed else (outputs, inputs)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of ΔW = s·B·A, float32 (N, I); for a transposed layer (N, O)."""
        factor = self.factors[name]
        a_RI = self.weights.read(factor.lora_a).float()
        b_OR = self.weights.read(factor.lora_b).float()
        if factor.transposed:
            return (a_RI[:, start:stop].T @ b_OR.T) * factor.scaling
        return (b_OR[start:stop] @ a_RI) * factor.scaling


class AdapterUpdate:
    """A LoRA expert: s·B·A, less the start's s·B₀·A₀ where its adapter did not start at zero."""

    def __init__(self, adapter: Path, start_adapter: Path | None = None) -> None:
        self.end = AdapterFactors(adapter)
        self.start = AdapterFactors(start_adapter) if start_adapter else None
        self.names = self.end.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.end.shape(name)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        rows_NI = self.end.rows(name, start, stop)
        if self.start is not None:
            rows_NI -= self.start.rows(name, start, stop)
        return rows_NI


class ModelUpdate:
    """An expert with all weights trained (in float32): its folder's tensors less the start's."""

    def __init__(self, model: Path, pretrained: Checkpoint, start: StoredTaskVector | None) -> None:
        self.model = Checkpoint(model)
        self.pretrained = pretrained
        self.start = start
        self.names = self.model.names

    def shape(self, name: str) -> tuple[int, ...]:
        return self.model.info(name).shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        before = self.pretrained.read_rows(name, start, stop).float()
        if self.start is not None and name in self.start:
            # not in place: for a float32 base this is the mapped file itself
            before = before + self.start.rows(name, start, stop)
        return self.model.read_rows(name, start, stop).float() - before


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

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.tensors.read_rows(name, start, stop)
