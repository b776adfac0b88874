"""A model over all GPUs of this machine, its layers one after the other: what measures models that train in shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def move_to(model: Any, device: str, *, spread: bool) -> None:
    """Move a model from the processor to a device, or over all GPUs."""
    if spread:
        spread_over(model, None)
    else:
        model.to(device)


def spread_over(model: Any, room: Mapping[int | str, int] | None) -> None:
    """Move a model from the processor to devices with so much room each; to all GPUs, in even parts, without any said.

    What the GPUs cannot hold stays, and is lent to them. One process computes with it as with any other model:
    accelerate's hooks carry values from device to device.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(model._no_split_modules or ())  # layers with residual connections stay on one device
    given = room or get_balanced_memory(model, no_split_module_classes=whole)
    dispatch_model(model, infer_auto_device_map(model, dict(given), no_split_module_classes=whole), force_hooks=True)
