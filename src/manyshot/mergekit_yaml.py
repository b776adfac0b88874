"""mergekit's YAML (0.1.5) for the operators that both have; what cannot be taken exactly is refused by key.

Arithmetic is float32 here whatever its `dtype` says; the merged model gets `out_dtype`, or else `dtype`.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyshot.errors import RecipeError

METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties")
TOP_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype", "name")
PARAMETERS = ("weight", "density", "normalize", "lambda", "rescale", "int8_mask")
# a model of its own has these; mergekit reads the others at the top only
MODEL_PARAMETERS = ("weight", "density")
# mergekit's own defaults where they differ by method
NORMALIZES = {"linear": True, "ties": True}


def is_mergekit(raw: Mapping[str, Any]) -> bool:
    """Whether a YAML file is mergekit's."""
    return "merge_method" in raw


def from_mergekit(raw: Mapping[str, Any], file: str) -> dict[str, Any]:
    """The merge recipe (as raw values) that does what a mergekit file says. Raises RecipeError naming the key."""
    method = raw["merge_method"]
    if method not in METHODS:
        raise RecipeError(f"{file}: merge_method: '{method}' cannot be taken; there are: {', '.join(METHODS)}")
    for key in raw:
        if key not in TOP_KEYS:
            raise RecipeError(f"{file}: {key}: cannot be taken; of a mergekit file these can: {', '.join(TOP_KEYS)}")
    models = raw.get("models")
    if not isinstance(models, list) or not all(isinstance(one, dict) and one.get("model") for one in models):
        raise RecipeError(f"{file}: models: needs a list of entries with 'model'")
    shared = _parameters(raw.get("parameters"), PARAMETERS, f"{file}: parameters")
    base = _base(raw.get("base_model"), [str(one["model"]) for one in models], method, shared, file)
    own = []
    for one in models:
        model, where = str(one["model"]), f"{file}: {one['model']}"
        parameters = _parameters(one.get("parameters"), MODEL_PARAMETERS, where)
        # the base has no task vector; listing it is allowed there and means nothing
        if method == "linear" or model != base:
            own.append((_adapter(model, base, file), shared | parameters))
    if not own:
        raise RecipeError(f"{file}: models: there is nothing to merge into the base")
    notes = []
    if method.startswith("dare") and shared.get("rescale", True):
        notes.append("rescale: kept entries are divided by the density (the paper); mergekit restores each L1 norm")
    return {
        "base": base,
        "experts": _experts(own, str(method), shared, file),
        "operator": _operator(str(method), [parameters for _, parameters in own], shared, file),
        "notes": notes,
        **({"dtype": raw.get("out_dtype") or raw["dtype"]} if raw.get("out_dtype") or raw.get("dtype") else {}),
    }


def _base(named: object, models: list[str], method: str, shared: Mapping[str, Any], file: str) -> str:
    """The model that task vectors are seen from; for a linear merge without one, the first."""
    if named:
        if method == "linear" and str(named) not in models:
            raise RecipeError(
                f"{file}: base_model: mergekit takes it as one more model of a linear merge; list it under models"
            )
        return str(named)
    if method != "linear" or not models:
        missing = "models: is empty" if not models else f"base_model: is missing; {method} needs it"
        raise RecipeError(f"{file}: {missing}")
    return models[0] if os.path.exists(models[0]) else models[0].partition("+")[0]


def _parameters(found: object, allowed: tuple[str, ...], where: str) -> dict[str, Any]:
    """Parameters as plain numbers; gradients and filters are refused."""
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RecipeError(f"{where}: parameters are a mapping, found {type(found).__name__}")
    for key, value in found.items():
        if key not in allowed:
            raise RecipeError(f"{where}.{key}: cannot be taken; there are: {', '.join(allowed)}")
        if not isinstance(value, int | float | bool):
            raise RecipeError(f"{where}.{key}: a gradient or filter cannot be taken; 'overrides' are for that here")
        if not abs(value) <= sys.float_info.max:
            raise RecipeError(f"{where}.{key}: is beyond the numbers that a merge can hold")
    return dict(found)


def _adapter(model: str, base: str, file: str) -> str:
    """mergekit writes an adapter as base+adapter."""
    name, plus, adapter = model.partition("+")
    if not plus or os.path.exists(model):
        return model
    if name != base:
        raise RecipeError(f"{file}: models: '{model}' is an adapter on another model than base_model '{base}'")
    return adapter


def _experts(
    own: list[tuple[str, dict[str, Any]]], method: str, shared: Mapping[str, Any], file: str
) -> dict[str, dict[str, Any]]:
    """Names made from the models' paths, and their weights, divided by their sum where mergekit divides."""
    if any("weight" not in parameters for _, parameters in own):
        raise RecipeError(f"{file}: parameters.weight: is missing; mergekit wants one for every model")
    weights = [float(parameters["weight"]) for _, parameters in own]
    normalize = bool(shared.get("normalize", NORMALIZES.get(method, False)))
    if method == "linear" and not normalize and abs(sum(weights) - 1) > 1e-6:
        raise RecipeError(f"{file}: parameters.normalize: false with weights that do not sum to 1 is no mean of models")
    if method in ("ties", "dare_ties") and not normalize:
        raise RecipeError(f"{file}: parameters.normalize: {method} always divides by the agreeing weights here")
    if method in ("task_arithmetic", "dare_linear") and normalize:
        if sum(weights) == 0:
            raise RecipeError(f"{file}: parameters.weight: the weights sum to 0, and normalize divides by that")
        weights = [weight / sum(weights) for weight in weights]
    names = expert_names([path for path, _ in own])
    return {name: {"path": path, "weight": weight} for name, (path, _), weight in zip(names, own, weights, strict=True)}


def _operator(method: str, own: list[dict[str, Any]], shared: Mapping[str, Any], file: str) -> dict[str, Any]:
    if method == "linear":
        return {"name": "mean"}
    scaling = {"scaling": shared.get("lambda", 1.0)}
    if method == "task_arithmetic":
        return {"name": "task_arithmetic"} | scaling
    densities = {parameters.get("density", 1.0) for parameters in own}
    if len(densities) > 1:
        raise RecipeError(f"{file}: parameters.density: found {sorted(densities)}; here all models share one")
    density = {"density": densities.pop()}
    if method == "ties":
        return {"name": "ties"} | density | scaling
    rescale = bool(shared.get("rescale", True))
    then = "ties" if method == "dare_ties" else "task_arithmetic"
    return {"name": "dare", "then": then, "rescale": rescale} | density | scaling


def expert_names(paths: list[str]) -> list[str]:
    """Short unlike names for models: the last part of each path, with as many parts before it as tell them apart."""
    parts = [[part for part in Path(path).parts if part not in ("/", ".", "..")] or ["model"] for path in paths]
    for length in range(1, max(len(one) for one in parts) + 1):
        names = [_clean("-".join(one[-length:])) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{i + 1}" for i, name in enumerate(names)]


def _clean(name: str) -> str:
    """What a name may hold; it starts with a letter or digit."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", name)
    return name if re.match("[A-Za-z0-9]", name) else f"m{name}"
