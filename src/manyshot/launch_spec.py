"""`local_update.launch`: what of accelerate's launcher a recipe may say, and the command line that comes of it.

Its own names, and nothing of ours beside them. What decides results, or is decided by the run, has its place elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from manyshot.errors import RecipeError, suggestion
from manyshot.training_spec import LocalUpdate
from manyshot.yaml_text import read_yaml

KEY = "local_update.launch"
OWN = (
    "num_processes",
    "config_file",
    "gpu_ids",
    "main_process_port",
    "num_cpu_threads_per_process",
    "enable_cpu_affinity",
)
SHARDED = ("use_fsdp", "use_deepspeed", "deepspeed_config_file", "zero_stage", "zero3_save_16bit_model")
PREFIXES = ("fsdp_", "offload_")
# what a configuration file of accelerate may say of itself, and the only value that it may have here
FIXED: Mapping[str, tuple[Any, ...]] = {
    "compute_environment": ("LOCAL_MACHINE",),
    "num_machines": (1, None),
    "machine_rank": (0, None),
    "mixed_precision": ("no", None),
}
WHY = {
    "num_machines": "a local update runs on one machine",
    "machine_rank": "a local update runs on one machine",
    "mixed_precision": "this is decided by local_update.dtype",
}
SHARDING = {"FSDP": "fsdp", "DEEPSPEED": "deepspeed"}
# what trains here on whole tensors, and its value without it
WHOLE_ONLY = {"optimizer_state": "restart", "proximal": 0.0}


@dataclass(frozen=True)
class Launch:
    """A launch that was checked: its processes, what shards the model, and the arguments in accelerate's words."""

    num_processes: int
    sharding: Literal["", "fsdp", "deepspeed"]
    arguments: Mapping[str, Any]

    @property
    def has_config(self) -> bool:
        return "config_file" in self.arguments


def read_launch(update: LocalUpdate) -> Launch:
    """The recipe's launch. Raises RecipeError for what it may not say, and for a batch that cannot be shared out."""
    told = dict(update.launch)
    for name, value in told.items():
        if name not in (*OWN, *SHARDED) and not name.startswith(PREFIXES):
            raise RecipeError(
                f"{KEY}.{name}: no argument that a launch may have{suggestion(name, (*OWN, *SHARDED))}, fsdp_…"
            )
        if not isinstance(value, bool | int | float | str):
            raise RecipeError(f"{KEY}.{name}: found {value!r}; allowed is one number, text, true or false")
    config = _read_config(told["config_file"]) if "config_file" in told else {}
    num_processes = told.get("num_processes", config.get("num_processes"))
    if not isinstance(num_processes, int) or num_processes < 2:
        found = "is missing" if num_processes is None else f"found {num_processes!r}"
        raise RecipeError(f"{KEY}.num_processes: {found}; allowed is a whole number from 2 on")
    launch = Launch(num_processes, _sharding(told, config), told)
    _check_fits(update, launch)
    return launch


def _read_config(file: Any) -> dict[str, Any]:
    """What a configuration file of accelerate says, where nothing of it is decided elsewhere."""
    where = f"{KEY}.config_file: {file}"
    try:
        config = read_yaml(Path(str(file)).read_text("utf-8"))
    except OSError as error:
        raise RecipeError(f"{where}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{where}: is no YAML ({error})") from None
    if not isinstance(config, dict):
        raise RecipeError(f"{where}: has no keys; it is made by `accelerate config --config_file …`")
    for name, allowed in FIXED.items():
        if name in config and config[name] not in allowed:
            why = WHY.get(name, "no other is run here")
            raise RecipeError(f"{where}, {name}: found {config[name]!r}; {why}, so leave it out or say {allowed[0]}")
    return config


def _sharding(told: Mapping[str, Any], config: Mapping[str, Any]) -> Literal["", "fsdp", "deepspeed"]:
    named = {"fsdp": bool(told.get("use_fsdp")), "deepspeed": bool(told.get("use_deepspeed"))}
    if all(named.values()):
        raise RecipeError(f"{KEY}: use_fsdp and use_deepspeed exclude each other")
    kind = next((name for name, said in named.items() if said), SHARDING.get(str(config.get("distributed_type")), ""))
    if kind == "fsdp":
        version = told.get("fsdp_version", config.get("fsdp_config", {}).get("fsdp_version", "2"))
        if str(version) != "2":
            raise RecipeError(f"{KEY}.fsdp_version: found {version}; FSDP of version 2 is run, version 1 is not")
        return "fsdp"
    stray = [name for name in told if name.startswith("fsdp_")]
    if stray:
        raise RecipeError(f"{KEY}.{stray[0]}: is for use_fsdp: true")
    return "deepspeed" if kind == "deepspeed" else ""


def _check_fits(update: LocalUpdate, launch: Launch) -> None:
    """The batch divides among the processes, and nothing is asked for that sharded tensors cannot give."""
    each = update.micro_batch_size or 1
    if update.batch_size % (launch.num_processes * each):
        micro = f" × micro_batch_size {each}" if update.micro_batch_size else ""
        raise RecipeError(
            f"local_update.batch_size: {update.batch_size} examples of an optimizer step cannot be shared out among "
            f"{launch.num_processes} processes{micro}; make it a multiple of {launch.num_processes * each}"
        )
    if update.device not in ("auto", "cpu", "cuda"):
        raise RecipeError(f"local_update.device: '{update.device}' is one device; a launch takes auto, cpu or cuda")
    for name, without in WHOLE_ONLY.items():
        if launch.sharding and getattr(update, name) != without:
            raise RecipeError(f"local_update.{name}: {getattr(update, name)} needs whole tensors; {KEY} shards them")


def command_line(launch: Launch, config_file: Path, threads: int, module: str, argument: Path) -> list[str]:
    """accelerate's launcher around a module of ours, no shell. `config_file` stands in where the recipe names none.

    Without any, accelerate would take the user's own default, which no recipe names.
    """
    options: dict[str, Any] = {
        "config_file": config_file,
        "num_processes": launch.num_processes,
        "num_machines": 1,
        "mixed_precision": "no",  # the trainer's own argument says it
        "main_process_port": 0,  # one that is free
        "num_cpu_threads_per_process": max(1, threads // launch.num_processes),
    }
    if launch.sharding == "fsdp":
        options |= {"use_fsdp": True, "fsdp_version": 2}
    elif launch.sharding == "deepspeed":
        options |= {"use_deepspeed": True}
    else:
        options |= {"multi_gpu": True}  # accelerate's word for processes of torchrun, on processors too
    options |= launch.arguments
    return [sys.executable, "-m", "accelerate.commands.launch", *_words(options), "--module", module, str(argument)]


def _words(options: Mapping[str, Any]) -> Sequence[str]:
    """As accelerate's parser reads them: a switch alone, everything else with its value."""
    switches = ("use_fsdp", "use_deepspeed", "multi_gpu", "enable_cpu_affinity")
    words = []
    for name, value in options.items():
        if name in switches:
            words += [f"--{name}"] if value else []
        else:
            words.append(f"--{name}={str(value).lower() if isinstance(value, bool) else value}")
    return words


def plain_config(launch: Launch) -> dict[str, Any]:
    """The configuration of a launch whose recipe names none."""
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}.get(launch.sharding, "MULTI_GPU"),
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": launch.num_processes,
        "use_cpu": False,
    }
