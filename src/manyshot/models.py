"""The only importer of transformers and peft: find, load, adapt and save models.

A model at any point of a run is a ModelState: pretrained weights on disk, plus the fp32 task vector of the round it
starts from, plus (for an expert) an adapter or a fully trained folder. Loading adds in float32 and casts once.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manyshot.errors import ModelError, suggestion
from manyshot.launch_spec import read_launch
from manyshot.model_guard import as_one_error, refuse_endless
from manyshot.recipe import LocalUpdate, Recipe
from manyshot.remote_code import consented
from manyshot.rundir import atomic_folder, write_json
from manyshot.seeding import make_generator
from manyshot.spread import move_to
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME, FACTORS_NAME, AdapterFactors, StoredTaskVector
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint, file_digest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "default"  # PEFT's own name for a model's only adapter


@dataclass(frozen=True)
class ModelState:
    """One model of a run, as paths. `start_adapter` is what the round's adapters began from, where not from zero."""

    pretrained: Path
    task_vector: Path | None = None
    start_adapter: Path | None = None
    adapter: Path | None = None
    full: Path | None = None
    trust_remote_code: bool = False

    @property
    def is_pretrained(self) -> bool:
        return not (self.task_vector or self.start_adapter or self.adapter or self.full)


@dataclass(frozen=True)
class Placement:
    """Where, in what type and with which attention a model computes."""

    device: str
    dtype: torch.dtype
    attention: str | None = None  # transformers' own choice
    spread: bool = False  # over all GPUs, as what trains in shards is too large for one

    @property
    def text(self) -> str:
        attention = f", {self.attention} attention" if self.attention else ""
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}{attention}"


def choose_placement(update: LocalUpdate) -> Placement:
    """Resolve `device: auto` and `dtype: auto`: bfloat16 only on a GPU that has it, float32 elsewhere."""
    device = update.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    _check_device(device)
    good = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = getattr(torch, update.dtype) if update.dtype != "auto" else torch.bfloat16 if good else torch.float32
    sharded = device == "cuda" and update.launcher == "accelerate" and bool(read_launch(update).sharding)
    return Placement(device, dtype, update.attn_implementation, sharded)


def _check_device(device: str) -> None:
    """The device is of a kind that is supported, and there."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in device and not index.isdecimal()):
        raise ModelError(
            f"local_update.device: unknown device '{device}'; there are auto, cpu, cuda, cuda:<number>, mps"
        )
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(index or 0) >= there:
        raise ModelError(
            f"local_update.device is '{device}', but this machine has {there or 'no'} {kind.upper()} device that torch "
            "can use"
        )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with a padding token. One of the same content is not loaded twice in a row."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".jinja", ".model", ".txt")]
    return _load_tokenizer(folder, trust_remote_code, tuple(file_digest(file) for file in files if file.is_file()))


@lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, trust_remote_code: bool, digests: tuple[str, ...]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    with as_one_error(f"{folder}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=consented(trust_remote_code))
        tokenizer.encode("a")  # some settings of another kind show only here
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{folder}: its tokenizer has neither a padding token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder."""
    from transformers import AutoConfig

    refuse_endless(folder / "config.json")
    with as_one_error(f"{folder}: its config.json cannot be used"):
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=consented(trust_remote_code))


def meta_model(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model's modules without weights, to check names and shapes."""
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code=trust_remote_code)
    with as_one_error(f"{folder}: no causal language model can be made from its config.json"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=consented(trust_remote_code))


def load_model(state: ModelState, placement: Placement) -> PreTrainedModel:
    """A plain transformers model in eval mode: Θ⁰ + task vector, then an expert's adapter or full weights on top.

    Sums are made in float32 and cast once to the placement's type.
    """
    folder = state.full or state.pretrained
    model = _from_pretrained(folder, placement, state.trust_remote_code)
    if state.full is None and (state.task_vector is not None or state.start_adapter is not None):
        _add_to_weights(model, state)
    move_to(model, placement.device, spread=placement.spread)
    if state.adapter is not None:
        model.load_adapter(str(state.adapter), adapter_name=ADAPTER, low_cpu_mem_usage=False)
    return model.eval()


def check_attention(model: PreTrainedModel, attention: str | None) -> None:
    """Raises ModelError with what transformers says where the model has no attention of that name, or not here."""
    try:
        model.get_correct_attn_implementation(attention)
    except (ValueError, ImportError) as error:
        raise ModelError(f"local_update.attn_implementation: '{attention}' cannot be used ({error})") from None


def _from_pretrained(folder: Path, placement: Placement, trust_remote_code: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    attention = {"attn_implementation": placement.attention} if placement.attention else {}  # None is a choice too
    with as_one_error(f"{folder}: the model cannot be loaded"):
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            **attention,
            dtype=placement.dtype,
            trust_remote_code=consented(trust_remote_code),
            use_safetensors=True,
            output_loading_info=True,
        )
    if report["missing_keys"]:
        names = ", ".join(sorted(report["missing_keys"])[:5])
        raise ModelError(f"{folder}: weights are missing for {len(report['missing_keys'])} tensors, among them {names}")
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(f"{folder}: tensor '{name}' has shape {tuple(found)}, the config asks for {tuple(expected)}")
    return model


def _add_to_weights(model: PreTrainedModel, state: ModelState) -> None:
    """W ← cast(Θ⁰ + (Θʳ⁻¹ − Θ⁰) − s·B₀·A₀): the frozen base that the round's adapters sit on."""
    pretrained = Checkpoint(state.pretrained)
    task_vector = StoredTaskVector(state.task_vector) if state.task_vector else None
    start = AdapterFactors(state.start_adapter) if state.start_adapter else None
    for name in sorted({*(task_vector.names if task_vector else ()), *(start.names if start else ())}):
        added = (
            task_vector.read(name) if task_vector and name in task_vector else torch.zeros(pretrained.info(name).shape)
        )
        if start is not None and name in start.names:
            added = added - start.rows(name, 0, added.shape[0])
        parameter = find_parameter(model, name)
        with torch.no_grad():
            parameter.copy_((pretrained.read(name).float() + added).to(parameter.dtype))


def find_parameter(model: torch.nn.Module, name: str) -> torch.nn.Parameter:
    """The parameter that a tensor of the base checkpoint was loaded into."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        raise ModelError(
            f"tensor '{name}' of the checkpoint has no parameter of that name in {type(model).__name__}"
        ) from None


# ---- adapters --------------------------------------------------------------------------------------------------------


def check_target_modules(model: torch.nn.Module, update: LocalUpdate) -> tuple[str, ...]:
    """The modules that get an adapter, sorted. Every target must name linear layers, every pattern some of them.

    Raises ModelError that lists what there is.
    """
    from transformers.pytorch_utils import Conv1D

    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    suffixes = {name.rsplit(".", 1)[-1] for name in linear}
    chosen: set[str] = set()
    for target in update.target_modules:
        found = {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")}
        if not found:
            raise ModelError(
                f"local_update.target_modules: the model has no module '{target}'{suggestion(target, suffixes)}"
            )
        for name, module in found.items():
            if name not in linear:
                raise ModelError(
                    f"local_update.target_modules: '{target}' is no linear layer, but a {type(module).__name__} "
                    f"({name}){suggestion(target, suffixes)}"
                )
        chosen |= found.keys()
    for key, patterns in (("rank_pattern", update.rank_pattern), ("alpha_pattern", update.alpha_pattern)):
        for pattern in patterns:
            if not any(matches_module(pattern, name) for name in chosen):
                raise ModelError(
                    f"local_update.{key}: '{pattern}' matches no adapted module"
                    f"{suggestion(pattern, update.target_modules)}"
                )
    return tuple(sorted(chosen))


def matches_module(pattern: str, name: str) -> bool:
    """Whether PEFT applies a rank or alpha pattern to a module: a regular expression for the end of its name."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        return False


def add_adapter(
    model: PreTrainedModel, recipe: Recipe, task: str, seed_parts: tuple[str | int, ...], start: Path | None
) -> PeftModel:
    """Put LoRA on the model: A from a generator named by `seed_parts` and the tensor, B zero; or both from `start`.

    PEFT's own initialisation draws from global state, so the same values are drawn again here, tensor by tensor.
    """
    from peft import LoraConfig, get_peft_model

    update = recipe.local_update
    check_target_modules(model, update)
    config = LoraConfig(
        r=recipe.rank_of(task),
        lora_alpha=recipe.alpha_of(task),
        lora_dropout=update.dropout,
        use_rslora=update.rslora,
        rank_pattern=dict(update.rank_pattern),
        alpha_pattern=dict(update.alpha_pattern),
        target_modules=list(update.target_modules),
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    adapted = get_peft_model(model, config)
    started = AdapterFactors(start) if start is not None else None
    with torch.no_grad():
        for name, layer in _lora_layers(adapted):
            a_RI, b_OR = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
            if started is not None:
                factor = started.factors[name]
                a_RI.copy_(started.weights.read(factor.lora_a))
                b_OR.copy_(started.weights.read(factor.lora_b))
            else:
                drawn_RI = torch.empty(a_RI.shape)
                torch.nn.init.kaiming_uniform_(drawn_RI, a=math.sqrt(5), generator=make_generator(*seed_parts, name))
                a_RI.copy_(drawn_RI)
                b_OR.zero_()
    return adapted


def _lora_layers(adapted: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """(name of the base tensor, PEFT's layer) for every adapted module; refuses what is not a plain low-rank update."""
    from peft.tuners.lora import LoraLayer

    for path, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name = f"{path.removeprefix('base_model.model.')}.weight"
        if layer.use_dora.get(ADAPTER) or ADAPTER in getattr(layer, "lora_variant", {}):
            raise ModelError(f"tensor '{name}': DoRA and other LoRA variants are not of the form s·B·A and are refused")
        if layer.lora_bias.get(ADAPTER):
            raise ModelError(f"tensor '{name}': a LoRA bias changes the layer's bias too and is refused")
        if ADAPTER not in layer.lora_A:
            raise ModelError(f"tensor '{name}': adapters on embeddings are refused; use linear layers")
        yield name, layer


def save_adapter(adapted: PeftModel, folder: Path, base: str) -> None:
    """Save a PEFT adapter and `factors.json`: which base tensor each factor pair changes, and its exact scaling.

    The scaling is read from PEFT's own layers, and s·B·A is compared with PEFT's own ΔW before anything is written.
    """
    table = {}
    for name, layer in _lora_layers(adapted):
        a_RI, b_OR = layer.lora_A[ADAPTER].weight.detach().float(), layer.lora_B[ADAPTER].weight.detach().float()
        scaling = float(layer.scaling[ADAPTER])
        if not (torch.isfinite(a_RI).all() and torch.isfinite(b_OR).all()):
            raise ModelError(f"tensor '{name}': the trained adapter holds NaN or Inf; the local update diverged")
        theirs = layer.get_delta_weight(ADAPTER).detach().float()
        theirs = theirs.T if layer.fan_in_fan_out else theirs
        off = torch.addmm(theirs, b_OR, a_RI, alpha=-scaling).abs_().max()
        if not off <= 1e-5 * theirs.abs().max():
            raise ModelError(f"tensor '{name}': s·B·A differs from PEFT's own ΔW; such adapters are not supported")
        module = f"base_model.model.{name.removesuffix('.weight')}"
        table[name] = {
            "lora_a": f"{module}.lora_A.weight",
            "lora_b": f"{module}.lora_B.weight",
            "scaling": scaling,
            "transposed": bool(layer.fan_in_fan_out),
        }
    with atomic_folder(folder) as partial:
        adapted.save_pretrained(str(partial), safe_serialization=True)
        (partial / "README.md").unlink(missing_ok=True)  # PEFT's empty card
        _normalise_adapter_config(partial / "adapter_config.json", base)
        write_json(partial / FACTORS_NAME, table)
        saved = Checkpoint(partial / ADAPTER_WEIGHTS_NAME)
        if set(saved.names) != {key for entry in table.values() for key in (entry["lora_a"], entry["lora_b"])}:
            raise ModelError("the adapter trains more than low-rank factors (modules_to_save?), which is refused")


def _normalise_adapter_config(path: Path, base: str) -> None:
    """PEFT writes target_modules from a set, in any order, and a local path as the base; make both stable."""
    config = json.loads(path.read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])
    config["base_model_name_or_path"] = base
    write_json(path, config)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no notices from transformers and datasets; ours say what matters."""
    import datasets
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def save_full(model: PreTrainedModel, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Save every trained tensor of a fully fine-tuned model in its training type, under the base checkpoint's names."""
    with atomic_folder(folder) as partial:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ModelError(f"tensor '{name}': holds NaN or Inf after training; the local update diverged")
        write_tensors(partial / "model.safetensors", tensors)
        model.config.save_pretrained(str(partial))


def convert_gguf(file: Path, folder: Path) -> None:
    """De-quantise a GGUF file into a float32 model folder with its tokenizer (float32 holds the values exactly)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # the de-quantisation draws a progress bar that cannot be turned off
    with as_one_error(f"{file}: cannot be read as GGUF"), quiet_transformers(), redirect_stderr(io.StringIO()):
        options = {"gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **options)
        model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **options)
    # the weights are plain floats now; with the quantisation still noted, save_pretrained refuses
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
