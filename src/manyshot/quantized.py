"""A base whose weights are 4- or 8-bit numbers while an adapter trains on it, and nowhere else (the door to
bitsandbytes).

The start model is made in full precision, then its linear layers are rounded; what the adapter has learned is added to
the full weights, and every model that is measured has those.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from manyshot.errors import MissingExtraError, ModelError
from manyshot.models import Placement
from manyshot.training_spec import Quantization


def check_quantization(quantization: Quantization) -> None:
    """Raises MissingExtraError where it is asked for and bitsandbytes is not there."""
    if quantization != "none" and find_spec("bitsandbytes") is None:
        raise MissingExtraError(
            f"local_update.quantization: {quantization} needs the package bitsandbytes; run: pip install "
            "'manyshot[quantization]'"
        )


@contextmanager
def quantized(model: Any, quantization: Quantization, placement: Placement) -> Iterator[None]:
    """Round the linear layers of a model that is on the processor, all but the output head, and move it to its place.

    4bit: NF4 with constants quantised again, as QLoRA (arXiv 2305.14314); 8bit: LLM.int8() (arXiv 2208.07339). Within,
    PEFT takes the layers for what they are. Nothing says so afterwards: TRL would round the adapters to bfloat16.
    Raises ModelError for a model without such layers.
    """
    if quantization == "none":
        yield
        return
    head, count = model.get_output_embeddings(), 0
    for path, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and layer is not head:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _rounded(layer, quantization, placement))
            count += 1
    if not count:
        raise ModelError(f"local_update.quantization: {type(model).__name__} has no linear layers that can be rounded")
    model.to(placement.device)
    mark = f"is_loaded_in_{quantization}"
    setattr(model, mark, True)
    try:
        yield
    finally:
        delattr(model, mark)


def _rounded(layer: torch.nn.Linear, quantization: Quantization, placement: Placement) -> Any:
    """The layer with its weight rounded where it will compute; a bias stays as it is."""
    import bitsandbytes

    shape, weight = (layer.in_features, layer.out_features), layer.weight.detach()
    bias = layer.bias is not None
    if quantization == "4bit":
        kind = {"compress_statistics": True, "quant_type": "nf4"}
        rounded = bitsandbytes.nn.Linear4bit(*shape, bias=bias, compute_dtype=placement.dtype, device="meta", **kind)
        rounded.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **kind)
    else:
        rounded = bitsandbytes.nn.Linear8bitLt(*shape, bias=bias, has_fp16_weights=False, threshold=6.0, device="meta")
        rounded.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    rounded.bias = layer.bias
    return rounded.to(placement.device)  # which rounds it
