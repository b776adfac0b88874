"""Rounds whose experts come from clients that keep their data: what the server does, whatever carries the messages.

A client fine-tunes from Θʳ⁻¹ and sends its expert and its losses; the server weighs and merges as a run does, with the
same operators and the same code, and adds what adapters change as it is: s·B·A of each, never a mean of factors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from manyshot.base_model import find_base_model
from manyshot.errors import ManyshotError, MergeError, ModelError, RunFolderError, suggestion
from manyshot.export import export_model
from manyshot.federated_recipe import FederatedRecipe
from manyshot.gap_weights import TaskLosses, memory_of, needs_gaps, weigh_tasks
from manyshot.match import open_experts, refuse_quantized
from manyshot.outer import STATE_NAME, Outer
from manyshot.outer_choice import make_outer
from manyshot.peft_adapter import CONFIG_NAME
from manyshot.recipe_file import to_yaml
from manyshot.round_merge import merge_weights
from manyshot.rundir import RunFolder, remove, write_json, write_text
from manyshot.task_vector import ADAPTER_WEIGHTS_NAME, AdapterUpdate, StoredTaskVector, Update
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import SINGLE_NAME, Checkpoint, file_digest

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
TASK_VECTOR = "task_vector.safetensors"
# the types of arrays that clients may send; numpy has no bfloat16
SENT_TYPES = ("float32", "float16")
# losses of a client, by the names they are sent under
START, EXPERT, PRETRAINED = "start-loss", "expert-loss", "pretrained-loss"


@dataclass(frozen=True)
class Returned:
    """What a client sends: factors of a PEFT adapter (`adapter_config` is its configuration, JSON) or all its weights.

    `losses` are L_τ(Θʳ⁻¹) and L_τ(θ_τ) on the client's own validation data, and L_τ(Θ⁰) where the gap needs it.
    """

    task: str
    arrays: Mapping[str, Array]
    adapter_config: str | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    base_digest: str | None = None
    client: str = "client"


@dataclass(frozen=True)
class MergedRound:
    """What a round came to; `left_out` says why, by task, or by client where it named no task of the recipe."""

    weights: dict[str, float]
    loss_gaps: dict[str, float]
    kept_share: float
    left_out: dict[str, str]


class FederatedRun:
    """The rounds of a federation, in a folder: loss_gap.json, merge.json and the task vector of each."""

    def __init__(self, recipe: FederatedRecipe, output: Path) -> None:
        """Find the pretrained model and begin the folder. Raises ModelError, or RunFolderError for one in use."""
        self.recipe, self.folder = recipe, RunFolder(output)
        # a start that failed before the first round has left the recipe alone
        if output.exists() and (not output.is_dir() or {*output.iterdir()} - {self.folder.recipe}):
            raise RunFolderError(f"{output}: is there already and not empty; choose another folder, or remove it")
        self.base = find_base_model(recipe.model)
        self.pretrained = Checkpoint(self.base.path)
        refuse_quantized(self.base.path, self.pretrained, "the pretrained model")
        self.rounds_done = 0
        self._pretrained_losses: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        write_text(self.folder.recipe, to_yaml(recipe))

    @property
    def task_vector(self) -> StoredTaskVector | None:
        """Θʳ − Θ⁰ of the last round; None before the first."""
        return StoredTaskVector(self._file(self.rounds_done, TASK_VECTOR)) if self.rounds_done else None

    def start_arrays(self) -> Arrays:
        """What clients are sent, float32: Θʳ − Θ⁰ of the tensors that changed, or (`sends: weights`) all of Θʳ."""
        added = self.task_vector
        if self.recipe.sends == "delta":
            return {name: added.read(name).numpy() for name in added.names} if added else {}
        found = {}
        for name in self.pretrained.names:
            if self.pretrained.info(name).is_float:
                weights = self.pretrained.read(name).float()
                found[name] = (weights + added.read(name) if added and name in added else weights).numpy()
        return found

    def merge_round(self, returned: Sequence[Returned], failed: Mapping[str, str] | None = None) -> MergedRound:
        """Merge what clients sent for the next round. `failed` says of others, by any name, why nothing came of them.

        What cannot be used is left out or ends the run, as the recipe says; fewer than `min_tasks` always end it.
        Raises MergeError.
        """
        round_index = self.rounds_done + 1
        if round_index > self.recipe.rounds:
            raise MergeError(f"round {round_index} of {self.recipe.rounds}: the run has had all its rounds")
        folder = self.folder.round(round_index)
        updates, losses, left_out = self._open(returned, folder / "received", round_index)
        left_out = dict(failed or {}) | left_out
        silent = "no client sent its expert"
        left_out |= {name: silent for name in self.recipe.tasks if name not in updates and name not in left_out}
        self._refuse_too_few(round_index, updates, left_out)
        names = [name for name in self.recipe.tasks if name in updates]
        record = self._weigh(round_index, names, losses, left_out)
        report = self._merge(round_index, names, [updates[name] for name in names], record["weights"], left_out)
        write_json(folder / "merge.json", report | {"received_bytes": _bytes_of(returned)})
        remove(folder / "received")
        self.rounds_done, self._weights = round_index, self._weights | record["weights"]
        return MergedRound(record["weights"], record["loss_gaps"], report["kept_share"], left_out)

    def export(self) -> Path:
        """Write the merged model of the last round as an ordinary model folder; returns it."""
        task_vector = self.task_vector
        if task_vector is None:
            raise RunFolderError(f"{self.folder.path}: no round has been merged yet")
        export_model(self.pretrained, task_vector, self.folder.merged, dtype=self.recipe.merge.output_dtype)
        return self.folder.merged

    # ---- what came ---------------------------------------------------------------------------------------------------

    def _open(
        self, returned: Sequence[Returned], folder: Path, round_index: int
    ) -> tuple[dict[str, Update], dict[str, Mapping[str, float]], dict[str, str]]:
        """Updates and losses by task, of what can be used; and why the rest cannot."""
        updates: dict[str, Update] = {}
        losses: dict[str, Mapping[str, float]] = {}
        left_out: dict[str, str] = {}
        for one in returned:
            if one.task not in self.recipe.tasks:
                known = suggestion(one.task, self.recipe.tasks)
                left_out[one.client] = f"says that its task is '{one.task:.80}', and there is none of that name{known}"
                continue
            senders = [other.client for other in returned if other.task == one.task]
            try:
                if len(senders) > 1:
                    raise ModelError(f"several clients say that it is theirs: {', '.join(sorted(senders))}")
                losses[one.task] = self._check_losses(one, round_index)
                updates[one.task] = self._open_expert(one, folder / one.task)
            except ManyshotError as error:
                left_out[one.task] = str(error).partition("; --allow-copy")[0]
        return updates, losses, left_out

    def _check_losses(self, one: Returned, round_index: int) -> Mapping[str, float]:
        """The client's losses: finite, and those there that the operator's weights are made of."""
        for name, value in one.losses.items():
            if not math.isfinite(value):
                raise ModelError(f"{name} is {value}; a loss is a finite number")
        if round_index == 1 and START in one.losses:
            self._pretrained_losses.setdefault(one.task, one.losses[START])
        if PRETRAINED in one.losses:
            self._pretrained_losses[one.task] = one.losses[PRETRAINED]
        operator = self.recipe.method.at_round(round_index)
        if not needs_gaps(operator):
            return one.losses
        missing = [name for name in (START, EXPERT) if name not in one.losses]
        if getattr(operator, "gap", "absolute") == "relative" and one.task not in self._pretrained_losses:
            missing.append(PRETRAINED)  # a client that was there in round 1 has sent it as its start's
        if missing:
            raise ModelError(f"no {' and no '.join(missing)}, and {operator.name} weighs tasks by it")
        return one.losses

    def _open_expert(self, one: Returned, folder: Path) -> Update:
        """The update that a client's arrays make. Raises ModelError naming the tensor."""
        if one.base_digest is not None and one.base_digest != self.base.digest:
            raise ModelError(
                f"its pretrained model is another one: digest {one.base_digest[:12]}, here {self.base.digest[:12]}"
            )
        _check_arrays(one.arrays)
        adapter = one.adapter_config is not None
        own = {name: np.require(array, requirements=["C", "W"]) for name, array in one.arrays.items()}
        tensors = {name: torch.from_numpy(array) for name, array in own.items()}
        remove(folder)
        write_tensors(folder / (ADAPTER_WEIGHTS_NAME if adapter else SINGLE_NAME), tensors)
        if one.adapter_config is not None:
            write_json(folder / CONFIG_NAME, _parse_config(one.adapter_config))
        update = open_experts(self.pretrained, {one.task: folder})[0]
        if isinstance(update, AdapterUpdate):
            for name in update.end.factors:
                if update.end.wide(name)[2]:
                    raise ModelError(f"tensor '{name}': s·B·A is beyond float32")
        return update

    def _refuse_too_few(self, round_index: int, updates: Mapping[str, Update], left_out: Mapping[str, str]) -> None:
        reasons = "".join(f"\n  {name}: {why}" for name, why in sorted(left_out.items()))
        if left_out and self.recipe.on_failure == "stop":
            raise MergeError(f"round {round_index}: a client is left out, and on_failure is stop:{reasons}")
        if len(updates) < self.recipe.min_tasks:
            raise MergeError(
                f"round {round_index}: {len(updates)} of {len(self.recipe.tasks)} tasks can be merged, and min_tasks "
                f"is {self.recipe.min_tasks}:{reasons}"
            )

    # ---- weights and merge -------------------------------------------------------------------------------------------

    def _weigh(
        self,
        round_index: int,
        names: Sequence[str],
        losses: Mapping[str, Mapping[str, float]],
        left_out: Mapping[str, str],
    ) -> dict[str, Any]:
        """Loss gaps G_τ and weights α_τ of a round, written to loss_gap.json as a run does."""
        operator, num_tasks = self.recipe.method.at_round(round_index), len(self.recipe.tasks)
        found, before = None, None
        told: dict[str, Any] = {"start_losses": {}, "expert_losses": {}}
        if all(START in losses[name] and EXPERT in losses[name] for name in names):
            start, expert = (tuple(losses[name][which] for name in names) for which in (START, EXPERT))
            # only relative gaps look at the pretrained model's, and those have been asked for
            pretrained = tuple(self._pretrained_losses.get(name, losses[name][START]) for name in names)
            found = TaskLosses(start, expert, pretrained)
            for key, which in (("start_losses", START), ("expert_losses", EXPERT)):
                told[key] = {name: {"loss": losses[name][which]} for name in names}
            if memory_of(operator) and round_index > 1:
                before = [self._weights.get(name, 1 / num_tasks) for name in names]
        record = told | weigh_tasks(operator, names, found, num_tasks, before)
        if left_out:
            record["skipped"] = dict(left_out)
        write_json(self._file(round_index, "loss_gap.json"), record)
        return record

    def _merge(
        self,
        round_index: int,
        names: Sequence[str],
        updates: Sequence[Update],
        weights: Mapping[str, float],
        left_out: Mapping[str, str],
    ) -> dict[str, Any]:
        """Write the round's task vector; returns what merge.json says of it."""
        output, outer = self._file(round_index, TASK_VECTOR), self._outer(round_index)
        report = merge_weights(
            *(self.pretrained, self.task_vector, names, updates, self.recipe.plan.at_round(round_index)),
            [weights[name] for name in names],
            output,
            reference=self.recipe.merge.reference,
            outer=outer,
            seed_parts=(self.recipe.seed, "operator", round_index),
        )
        found = report.to_json() | {"digest": file_digest(output), "weights": dict(weights)}
        if outer.leaves is not None:
            found["outer_state_digest"] = file_digest(outer.leaves)
        return found | ({"left_out": dict(left_out)} if left_out else {})

    def _outer(self, round_index: int) -> Outer:
        """The outer optimizer of a round; it leaves its state where there is a next round."""
        return make_outer(
            self.recipe.merge,
            round_index,
            before=self._file(round_index - 2, TASK_VECTOR) if round_index > 2 else None,
            state=self._file(round_index - 1, STATE_NAME) if round_index > 1 else None,
            leaves=self._file(round_index, STATE_NAME) if round_index < self.recipe.rounds else None,
            last=round_index == self.recipe.rounds,
        )

    def _file(self, round_index: int, name: str) -> Path:
        return self.folder.round(round_index) / name


def _check_arrays(arrays: Mapping[str, Array]) -> None:
    """Arrays as they can be merged. Raises ModelError naming the first that cannot."""
    if not arrays:
        raise ModelError("it sent no arrays")
    for name, array in sorted(arrays.items()):
        if str(array.dtype) not in SENT_TYPES:
            raise ModelError(f"tensor '{name:.200}' is of type {array.dtype}; send {' or '.join(SENT_TYPES)}")
        if not np.isfinite(array).all():
            raise ModelError(f"tensor '{name:.200}' holds NaN or Inf; its training diverged")


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise ModelError(f"its adapter configuration is no JSON object: {text!r:.80}")
    return config


def _bytes_of(returned: Sequence[Returned]) -> dict[str, int]:
    """Bytes of the arrays that each client sent."""
    return {one.task: sum(array.nbytes for array in one.arrays.values()) for one in returned}
