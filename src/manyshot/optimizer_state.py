"""An optimizer's state as one safetensors file: every parameter's moments and step count, by the parameter's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from manyshot.errors import ModelError
from manyshot.rundir import atomic_file
from manyshot.tensor_writer import SafetensorsWriter
from manyshot.tensors import Checkpoint, TensorInfo

OPTIMIZER_NAME = "optimizer.safetensors"


def write_state(optimizer: Any, model: torch.nn.Module, file: Path, carried: Path | None = None) -> None:
    """Write `<parameter>.<entry>` for all that the optimizer has trained; `carried` says it of what was frozen now.

    Tensor by tensor: the moments of all weights are twice the model.
    Raises ModelError for NaN and Inf: a moment that overflowed stops its parameter for good, and no loss would tell.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stored = Checkpoint(carried) if carried is not None else None
    infos = {name: stored.info(name) for name in stored.names} if stored is not None else {}
    tensors: dict[str, torch.Tensor] = {}
    for parameter in _parameters(optimizer):
        for entry, value in optimizer.state[parameter].items():
            name = f"{names[id(parameter)]}.{entry}"
            if not torch.isfinite(value).all():
                raise ModelError(f"optimizer state '{name}' holds NaN or Inf; the local update diverged")
            tensors[name], infos[name] = value, TensorInfo.of(value.shape, value.dtype)
    infos = {name: infos[name] for name in sorted(infos)}
    with atomic_file(file) as stream, SafetensorsWriter(stream, infos) as writer:
        for name in infos:
            writer.write(name, tensors[name] if stored is None or name in tensors else stored.read(name))


def load_state(optimizer: Any, model: torch.nn.Module, file: Path) -> None:
    """Put the stored state into a fresh optimizer of the same parameters. What was never trained starts anew."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    stored = Checkpoint(file)
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for key in stored.names:
        name, _, entry = key.rpartition(".")
        entries.setdefault(name, {})[entry] = stored.read(key)
    owners = [names[id(parameter)] for parameter in _parameters(optimizer)]
    known = {position: entries[name] for position, name in enumerate(owners) if name in entries}
    # the optimizer's own loading puts each tensor where its parameter is, in its type
    optimizer.load_state_dict(optimizer.state_dict() | {"state": known})


def _parameters(optimizer: Any) -> list[torch.nn.Parameter]:
    """All parameters in the order in which the optimizer counts them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
