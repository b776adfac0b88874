"""What a client of a federation does between Θʳ⁻¹ and its expert, whatever carries the messages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manyshot.models import find_parameter
from manyshot.peft_adapter import CONFIG_NAME, is_adapter
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME
from manyshot.tensors import Checkpoint

if TYPE_CHECKING:
    import torch

Arrays = Mapping[str, np.ndarray[Any, Any]]


def add_start(model: torch.nn.Module, arrays: Arrays, *, whole: bool) -> None:
    """Make Θʳ⁻¹ of a model that was loaded with Θ⁰: W ← cast(Θ⁰ + (Θʳ⁻¹ − Θ⁰)), or (`whole`) W ← cast(Θʳ⁻¹).

    The sum is float32 and exact where the model holds Θ⁰ as it is stored, or wider. Raises ModelError for a tensor that
    the model lacks.
    """
    import torch

    with torch.no_grad():
        for name, array in arrays.items():
            parameter, sent = find_parameter(model, name), torch.from_numpy(array).to(model_device(model))
            parameter.copy_((sent if whole else parameter.float() + sent).to(parameter.dtype))


def model_device(model: torch.nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


def read_expert(folder: Path) -> tuple[dict[str, np.ndarray[Any, Any]], str | None]:
    """(arrays, adapter_config.json) of an adapter as PEFT saves it, or (arrays, None) of a model folder.

    float32, or float16 where it is stored so: numpy has no bfloat16, which float32 holds exactly. Raises ModelError for
    a folder without safetensors.
    """
    adapter = is_adapter(folder)
    stored = Checkpoint(folder / ADAPTER_WEIGHTS_NAME if adapter else folder)
    arrays = {}
    for name in stored.names:
        if (info := stored.info(name)).is_float:
            tensor = stored.read(name)
            arrays[name] = (tensor if info.kind == "F16" else tensor.float()).numpy()
    return arrays, (folder / CONFIG_NAME).read_text("utf-8") if adapter else None
