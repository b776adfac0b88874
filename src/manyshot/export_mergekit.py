"""`--format mergekit`: a round as a mergekit file (0.1.5) that makes it again from the experts, where mergekit can.

What mergekit has no operator for becomes a file that adds the merged model's own task vector to the base.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from manyshot.errors import RunFolderError
from manyshot.export import copy_side_files, export_model
from manyshot.export_folder import copy_weights
from manyshot.export_lora import LowRank, write_lora
from manyshot.export_source import ExportSource
from manyshot.local_update import RECORD, expert_state
from manyshot.models import ModelState
from manyshot.operators import Dare, Mean, Metis, TaskArithmetic, Ties
from manyshot.peft_adapter import CONFIG_NAME
from manyshot.removed import refuse_removed
from manyshot.rundir import atomic_folder, read_json, write_text
from manyshot.start_adapters import start_factors
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME, AdapterFactors, StoredTaskVector
from manyshot.tensors import Checkpoint

if TYPE_CHECKING:
    import torch

FILE_NAME = "mergekit.yml"
Json = dict[str, Any]


@dataclass(frozen=True)
class MergekitMethod:
    """A merge in mergekit's words; `differences` is where its result is not ours to the bit."""

    name: str
    parameters: Json
    differences: tuple[str, ...] = ()
    per_model: Json = field(default_factory=dict)


DRAWS = (
    "DARE draws other entries: ours come from the run's seed, mergekit's from --random-seed",
    "kept entries are divided by the density (in lambda), as in the paper and here; mergekit's own rescale would "
    "restore each tensor's L1 norm instead",
)
TIED_MAGNITUDES = (
    "of equal magnitudes at TIES' threshold mergekit keeps what its sort puts first, here the first in order",
)


def to_mergekit(source: ExportSource) -> MergekitMethod | str:
    """The method and parameters that do what the round did, or in words why mergekit has none."""
    recipe, operator = source.recipe, source.operator
    if reason := _beyond_mergekit(source):
        return reason
    step = recipe.merge.outer_step_size
    step = step[source.round_index - 1] if isinstance(step, tuple) else step
    scale = (float(getattr(operator, "scaling", 1.0)) if not isinstance(operator, Mean) else 1.0) * (
        step if recipe.merge.reference == "start" else 1.0
    )
    if isinstance(operator, Mean | TaskArithmetic) or (isinstance(operator, Metis) and not operator.mask):
        return MergekitMethod("task_arithmetic", {"normalize": False, "lambda": scale})
    if isinstance(operator, Ties) and operator.trim_scope == "tensor":
        density = {"density": operator.density}
        return MergekitMethod("ties", {"normalize": True, "lambda": scale}, TIED_MAGNITUDES, density)
    if isinstance(operator, Dare):
        name = "dare_ties" if operator.then == "ties" else "dare_linear"
        divisor = float(operator.density) if operator.rescale and not isinstance(operator.density, tuple) else 1.0
        shared = {"normalize": operator.then == "ties", "rescale": False, "lambda": scale / divisor}
        return MergekitMethod(name, shared, DRAWS, {"density": operator.density})
    what = "ties with trim_scope: model" if isinstance(operator, Ties) else operator.name
    what = "metis with a mask" if isinstance(operator, Metis) else what
    return f"mergekit has no operator that does what {what} does"


def _beyond_mergekit(source: ExportSource) -> str | None:
    """What a recipe says about its merges that a mergekit file cannot say."""
    recipe = source.recipe
    if "rolled_back" in source.merge_record:
        return "the round's merge was taken back, so the experts had no part in its model"
    if recipe.overrides:
        return "the recipe has other operators by tensor name (overrides)"
    if recipe.merge.space == "factors":
        return "the round merged LoRA factors (space: factors), mergekit merges weights"
    if recipe.merge.outer_optimizer != "sgd" or recipe.merge.outer_momentum:
        return "the round took an outer optimizer's step, which depends on the rounds before it"
    return None


def write_mergekit_folder(source: ExportSource, folder: Path, dtype: str | None, say: Callable[[str], None]) -> Json:
    """Write the mergekit file and the models that it names into `folder`; returns what there is to say of them."""
    _check_path(source.base)
    method = to_mergekit(source)
    out_dtype = dtype or source.dtype or stored_dtype(source.base)
    if isinstance(method, str):
        say("writing the merged model in float32")
        export_model(Checkpoint(source.base), StoredTaskVector(source.task_vector), folder / "merged", dtype="float32")
        models = {"merged": ("./merged", 1.0)}
        chosen = MergekitMethod("task_arithmetic", {"normalize": False, "lambda": 1.0})
        base = str(source.base)
    else:
        chosen, start = method, _start(source, folder, say)
        models = _experts(source, folder, start, say)
        base = start if source.recipe.merge.reference == "start" else str(source.base)
    config = {
        "merge_method": chosen.name,
        "base_model": base,
        "models": [
            {"model": path, "parameters": {"weight": weight} | chosen.per_model} for path, weight in models.values()
        ],
        "parameters": chosen.parameters,
        "dtype": "float32",
        "out_dtype": out_dtype,
    }
    differences = _differences(chosen, out_dtype)
    reason = method if isinstance(method, str) else None
    write_text(folder / FILE_NAME, _header(source, reason, differences) + yaml.safe_dump(config, sort_keys=False))
    return {"method": chosen.name, "config": config, "differences": differences, "why_not_from_experts": reason}


def _check_path(base: Path) -> None:
    """mergekit takes `+` in a path for an adapter and `@` for a revision."""
    if signs := [sign for sign in "+@" if sign in str(base)]:
        raise RunFolderError(
            f"{base}: mergekit cannot be given a path with '{signs[0]}', which it reads as a sign of its own; put the "
            "base model elsewhere and make a link to it under the old name"
        )


def stored_dtype(model: Path) -> str:
    """The type in which most of a model's weights are stored."""
    checkpoint = Checkpoint(model)
    sizes: dict[str, int] = {}
    for name in checkpoint.names:
        info = checkpoint.info(name)
        if info.is_float:
            dtype = str(info.dtype).removeprefix("torch.")
            sizes[dtype] = sizes.get(dtype, 0) + info.num_elements
    return max(sizes, key=lambda dtype: sizes[dtype])


def _differences(method: MergekitMethod, out_dtype: str) -> list[str]:
    return [
        f"computed in float32 (dtype) and stored as {out_dtype} (out_dtype): equal up to the rounding of float32 sums "
        "that are added in another order; without dtype mergekit would compute in the models' own type",
        "adapters are merged into a model folder first, which needs --lora-merge-cache, in float32 with "
        "--lora-merge-dtype float32; without that in the start model's type",
        *method.differences,
    ]


def _header(source: ExportSource, reason: str | None, differences: list[str]) -> str:
    what = f"round {source.round_index} of a many-shot merge, operator {source.recipe.method.name}"
    lines = [f"Written by manyshot: {what}.", f"Base model: {source.base_name}"]
    if reason:
        lines += [
            f"Not made from the experts: {reason}.",
            "This adds the merged model's own task vector to the base: the same model, ready to be merged with others.",
        ]
    else:
        lines.append("The experts are those of this round; paths are relative, so run mergekit in this folder.")
    lines += ["What differs from manyshot's own merge:", *(f"- {one}" for one in differences)]
    return "".join(f"# {' '.join(line.split())}\n" for line in lines)


# ---- the models that a file names ------------------------------------------------------------------------------------


def _start(source: ExportSource, folder: Path, say: Callable[[str], None]) -> str:
    """The model that the round's experts started from, as mergekit finds it: the base, or a folder written here."""
    if source.round_index == 1:
        return str(source.base)
    before = source.folder.round(source.round_index - 1) / "task_vector.safetensors"
    if not before.is_file():
        raise RunFolderError(
            f"{source.folder.path}: {before} is missing, and with it the model that round {source.round_index} started "
            "from"
        )
    say(f"writing the model that round {source.round_index} started from, in float32")
    export_model(Checkpoint(source.base), StoredTaskVector(before), folder / "start", dtype="float32")
    return "./start"


def _experts(
    source: ExportSource, folder: Path, start: str, say: Callable[[str], None]
) -> dict[str, tuple[str, float]]:
    """Every merged task's expert as mergekit finds it, and its weight; adapters are on the start model."""
    weights: Mapping[str, float] = source.merge_record["weights"]
    found = {}
    for task in (name for name in source.recipe.tasks if name in weights):  # a round may go on without a task
        say(f"expert {task}")
        state = _state(source, task)
        target = folder / "experts" / task
        if state.full is not None:
            with atomic_folder(target) as partial:
                copy_side_files(state.full, partial, None)
                copy_weights(state.full, partial)
            found[task] = (f"./experts/{task}", float(weights[task]))
            continue
        assert state.adapter is not None  # an expert is an adapter or a full model
        if state.start_adapter is None:
            target.mkdir(parents=True)
            for name in (CONFIG_NAME, ADAPTER_WEIGHTS_NAME):
                shutil.copyfile(state.adapter / name, target / name)
        else:
            _write_difference(source, state, target)
        found[task] = (f"{start}+./experts/{task}", float(weights[task]))
    return found


def _state(source: ExportSource, task: str) -> ModelState:
    """The files of a task's expert of the round."""
    folder = source.folder.local_update(source.round_index, task)
    if not (folder / RECORD).is_file():
        raise RunFolderError(f"{folder}: the expert of task '{task}' is missing")
    for part in ("adapter", "model"):
        wanted = f"round {source.round_index}: an export with its experts"
        refuse_removed(source.folder.path, folder / part, wanted)
    state = expert_state(ModelState(source.base), folder)
    if state.adapter is None or "expert" in read_json(folder / RECORD):
        return state
    how = source.recipe.local_update.adapter_start
    return replace(state, start_adapter=start_factors(how, source.folder, source.round_index, task))


def _write_difference(source: ExportSource, state: ModelState, target: Path) -> None:
    """s·B·A − s·B₀·A₀ as one adapter, with the factors side by side: B̂ = [sB, −s₀B₀], Â = [A; A₀]."""
    import torch

    assert state.adapter is not None
    assert state.start_adapter is not None
    end, began = AdapterFactors(state.adapter), AdapterFactors(state.start_adapter)
    layers = {}
    for name in end.names:
        sides = [(end, 1.0), (began, -1.0)]
        b_OR = torch.cat([sign * one.factors[name].scaling * _part(one, name, "b") for one, sign in sides], dim=1)
        a_RI = torch.cat([_part(one, name, "a") for one, _ in sides])
        layers[name.removesuffix(".weight")] = LowRank(b_OR, a_RI, end.factors[name].transposed)
    target.mkdir(parents=True)
    write_lora(target, layers, source.base_name, read_json(state.adapter / CONFIG_NAME)["target_modules"])


def _part(adapter: AdapterFactors, name: str, which: str) -> torch.Tensor:
    factor = adapter.factors[name]
    return adapter.weights.read(factor.lora_a if which == "a" else factor.lora_b).float()
