"""PEFT adapter folders as exact updates of a base checkpoint, read without PEFT and without making the model.

Plain LoRA, rsLoRA, rank and alpha patterns, unlike ranks, embeddings, transposed layers, `modules_to_save` and trained
biases are exact. Everything else (DoRA, a LoRA bias, initialisations that change the base, …) is refused by name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from manyshot.errors import ModelError
from manyshot.folder_links import refuse_links_out
from manyshot.misshapen import misshapen
from manyshot.rundir import read_json
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME, AdapterFactors, AdapterUpdate, Factor, FactorTable
from manyshot.tensors import Checkpoint

CONFIG_NAME = "adapter_config.json"
PREFIX = "base_model.model."
# settings that do not change what s·B·A means, whatever their value; any other that is set is refused
HARMLESS = {
    *{"alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out"},
    *{"inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout"},
    *{"loftq_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version", "r"},
    *{"qalora_group_size", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora"},
    *{"eva_config", "ensure_weight_tying"},
}
# no group is repeated, and at most two other things are: a pattern that a regular expression takes ages for needs more
PATTERN = re.compile(r"[^*+{}]*(?:[^)*+{}][*+][^*+{}]*){0,2}", re.ASCII)
MAX_ALPHA = 1e6
# initialisations that leave the base's weights as they were
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
LOW_RANK = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(\.default)?(\.weight)?$")
WRAPPERS = re.compile(r"\.(base_layer|modules_to_save|original_module)(\.default)?(?=\.)")
REFUSED_PARTS = {
    "lora_magnitude_vector": "DoRA rescales whole rows, which s·B·A does not describe",
    "trainable_tokens": "trained tokens change single rows of the embeddings",
    "lora_variant": "it is a LoRA variant",
}


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter rather than a model."""
    return (path / CONFIG_NAME).is_file()


@misshapen(ModelError, "its adapter_config.json holds a value that it cannot have")
def read_adapter(folder: Path, base: Checkpoint, task: str) -> AdapterUpdate:
    """The update that a PEFT adapter makes to the tensors of `base`.

    Raises ModelError, naming task and tensor, for an adapter of another base and for what is not exact.
    """
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise ModelError(_missing(folder, task))
    refuse_links_out(folder)
    config = _read_config(folder, task)
    weights = Checkpoint(folder / ADAPTER_WEIGHTS_NAME)
    where = f"model '{task}' ({folder})"
    sides: dict[tuple[str, str], dict[str, str]] = {}
    held: dict[str, str] = {}
    for key in weights.names:
        name = key.removeprefix(PREFIX)
        for part, reason in REFUSED_PARTS.items():
            if part in name:
                raise ModelError(f"{where}: tensor '{key}' is refused: {reason}")
        if name.endswith(("lora_B.bias", "lora_A.bias")):
            raise ModelError(f"{where}: tensor '{key}' is refused: a LoRA bias changes the layer's bias too")
        if match := LOW_RANK.match(name):
            sides.setdefault((match["module"], match["kind"] or ""), {})[match["side"]] = key
        else:
            held[WRAPPERS.sub("", name)] = key
    factors = {}
    for (module, kind), pair in sides.items():
        if len(pair) != 2:
            raise ModelError(f"{where}: '{module}' has only one of the factors A and B")
        name = _base_name(f"{module}.weight", base, where)
        factors[name] = _factor(module, bool(kind), pair, weights, base.info(name).shape, config, f"{where}: {name}")
    whole = _match_whole(held, set(factors), weights, base, where)
    return AdapterUpdate(AdapterFactors(folder, FactorTable(factors, whole)))


def _missing(folder: Path, task: str) -> str:
    if (folder / "adapter_model.bin").exists():
        return (
            f"model '{task}': {folder} holds adapter_model.bin, a pickle, which is never read since it can run code. "
            "Convert it once where you trust it: PeftModel.from_pretrained(base, folder).save_pretrained(new_folder)"
        )
    return f"model '{task}': {folder} has no {ADAPTER_WEIGHTS_NAME}"


def _read_config(folder: Path, task: str) -> dict[str, Any]:
    """The adapter's configuration; refuses every setting that is not known to leave s·B·A exact."""
    config = read_json(folder / CONFIG_NAME)
    where = f"model '{task}' ({folder / CONFIG_NAME})"
    if config.get("peft_type") not in ("LORA", None):
        raise ModelError(f"{where}: peft_type is {config['peft_type']}; LoRA adapters can be merged")
    for key, value in sorted(config.items()):
        if key not in HARMLESS and value:
            hint = "; DoRA is not of the form s·B·A" if key == "use_dora" else ""
            raise ModelError(f"{where}: {key} is {value!r}, and merging it would not be exact; it is refused{hint}")
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        raise ModelError(
            f"{where}: init_lora_weights is {config['init_lora_weights']!r}, which changes the base's own weights; "
            "save the adapter with path_initial_model_for_weight_conversion, which makes a plain one of it"
        )
    _check_number(config.get("lora_alpha"), f"{where}: lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        _check_number(value, f"{where}: alpha_pattern.{pattern}")
        if not _is_pattern(pattern):
            raise ModelError(
                f"{where}: alpha_pattern.{pattern}: is no pattern for names of modules; it may have letters, digits, "
                "'_', '.', '|', '^', '$', '\\\\' and brackets, and repeat what is no group"
            )
    return config


def _is_pattern(text: str) -> bool:
    """Whether it is a regular expression, of those that do not take ages."""
    try:
        return re.compile(text) is not None and PATTERN.fullmatch(text) is not None
    except re.error:
        return False


def _check_number(value: object, where: str) -> None:
    """It is a finite number."""
    if value is None:
        raise ModelError(f"{where} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < MAX_ALPHA:
        raise ModelError(f"{where} must be a number of at most {MAX_ALPHA:g}, found {value!r}")


def _base_name(name: str, base: Checkpoint, where: str) -> str:
    """The base's tensor of that name; a checkpoint may have or lack a prefix such as `model.`."""
    if name in base:
        return name
    found = [other for other in base.names if other.endswith(f".{name}") or name.endswith(f".{other}")]
    if len(found) != 1:
        raise ModelError(
            f"{where}: it changes '{name}', and the base {base.path} has no such tensor; it was trained on another "
            "model, or the tensor is tied to another one"
        )
    return found[0]


def _factor(
    module: str,
    embedding: bool,
    pair: dict[str, str],
    weights: Checkpoint,
    shape: tuple[int, ...],
    config: dict[str, Any],
    where: str,
) -> Factor:
    """Scaling and layout of one low-rank update; both shapes must fit the base's tensor."""
    a_shape, b_shape = weights.info(pair["A"]).shape, weights.info(pair["B"]).shape
    if len(a_shape) != 2 or len(b_shape) != 2 or a_shape[0] != b_shape[1] or len(shape) != 2:
        raise ModelError(f"{where}: factors of shapes {a_shape} and {b_shape} do not make an update of shape {shape}")
    rank, product = a_shape[0], (b_shape[0], a_shape[1])
    # a square matrix fits both ways; only the configuration tells
    transposed = embedding or (bool(config.get("fan_in_fan_out")) if shape[0] == shape[1] else product != shape)
    if (product[::-1] if transposed else product) != shape:
        raise ModelError(f"{where}: the adapter's update has shape {product}, the base's tensor {shape}")
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Factor(pair["A"], pair["B"], scaling, transposed)


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _match_whole(
    held: dict[str, str], adapted: set[str], weights: Checkpoint, base: Checkpoint, where: str
) -> dict[str, str]:
    """Tensors that the adapter holds whole, by the base's names.

    Where the base ties its head to the embedding, an adapter trains both as one and then holds both; or else it unties
    them, which the base's configuration would undo.
    """
    config = read_json(base.path / "config.json") if (base.path / "config.json").is_file() else {}
    tied = bool(config.get("tie_word_embeddings"))
    whole: dict[str, str] = {}
    twins: set[str] = set()
    for name, key in held.items():
        same = [other for other in held.values() if other != key and _equal(weights, key, weights, other)]
        if tied and name not in base and same:
            twins |= {key, *same}
        else:
            whole[_base_name(name, base, where)] = key
    for name, key in list(whole.items()):
        shape = weights.info(key).shape
        if shape != base.info(name).shape:
            raise ModelError(
                f"{where}: tensor '{name}' has shape {shape}, the base {base.path} has {base.info(name).shape}"
            )
        if name in adapted:  # PEFT saves what lies below an adapted embedding or head
            if not _equal(weights, key, base, name):
                raise ModelError(f"{where}: it was trained on a base whose '{name}' is not that of {base.path}")
            del whole[name]
        elif tied and len(shape) == 2 and shape[0] == config.get("vocab_size") and key not in twins:
            raise ModelError(
                f"{where}: tensor '{name}' was trained apart from the output head, and the base ties both into one "
                "tensor; train with ensure_weight_tying"
            )
    return whole


def _equal(one: Checkpoint, name: str, two: Checkpoint, other: str) -> bool:
    """Whether two tensors have the same values, in the type of the first."""
    if one.info(name).shape != two.info(other).shape:
        return False
    first = one.read(name)
    return bool((first == two.read(other).to(first.dtype)).all())
