"""A PEFT adapter folder out of factors that were made here, of one rank and with scaling 1.

Readers do not agree on what unlike ranks mean: PEFT scales each module by its own alpha/r, vLLM all of them by the
adapter's alpha/r, llama.cpp by the adapter's alpha over each matrix' rank. With one rank all three give alpha/r = 1.
Names: O = output rows, I = input columns, R = rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyshot.peft_adapter import CONFIG_NAME, PREFIX
from manyshot.rundir import write_json
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME
from manyshot.tensor_writer import write_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRank:
    """ΔW = B·A of one linear layer, transposed where the layer stores its weight as inputs × outputs."""

    b_OR: torch.Tensor
    a_RI: torch.Tensor
    transposed: bool = False

    @property
    def rank(self) -> int:
        return len(self.a_RI)


def write_lora(folder: Path, layers: Mapping[str, LowRank], base_name: str, targets: Sequence[str]) -> None:
    """Write adapter_config.json, with `targets` as its target_modules, and the weights of `layers` (module -> factors).

    Factors of a lower rank than the largest are filled up with zeros.
    """
    import torch

    rank = max(layer.rank for layer in layers.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": list(targets),
        "fan_in_fan_out": any(layer.transposed for layer in layers.values()),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors, pad = {}, torch.nn.functional.pad
    for name, layer in layers.items():
        missing = rank - layer.rank
        tensors[f"{PREFIX}{name}.lora_A.weight"] = pad(layer.a_RI, (0, 0, 0, missing)).contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = pad(layer.b_OR, (0, missing)).contiguous()
    write_tensors(folder / ADAPTER_WEIGHTS_NAME, tensors)
    write_json(folder / CONFIG_NAME, config)


def target_modules(chosen: Sequence[str], modules: Sequence[str]) -> list[str]:
    """How PEFT is told which modules: by the last parts of their names where that means these alone, else by name."""
    ends = {name.rsplit(".", 1)[-1] for name in chosen}
    meant = {name for name in modules if name.rsplit(".", 1)[-1] in ends}
    return sorted(ends) if meant == set(chosen) else sorted(chosen)
