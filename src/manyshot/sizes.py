"""What a run writes, in bytes, from its recipe and its model's shapes: for `plan`, and the check of the disk.

Counted are tensors, their headers, and the files beside a merged model's weights. Records, logs and the report come to
a few megabytes more, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from manyshot.export import WORTH_APART, output_info
from manyshot.models import matches_module
from manyshot.outer import MEMORIES
from manyshot.recipe import Recipe
from manyshot.tensor_writer import make_header
from manyshot.tensors import TensorInfo

Parts = dict[str, int]


@dataclass(frozen=True)
class Sizes:
    """Bytes of one of each kind of file.

    `experts` are an adapter's A and B, or 0 and all weights, by task; `dense` is a float32 tensor for every one that is
    trained; a merged model is `changed` + `unchanged` + `side` (tokenizer, configuration, …). Tasks in `adopted` bring
    the expert of round 1 with them.
    """

    experts: Mapping[str, tuple[int, int]]
    dense: int
    changed: int
    unchanged: int
    side: int = 0
    adopted: frozenset[str] = frozenset()

    def expert(self, task: str) -> int:
        return sum(self.experts[task])


def sizes_of(
    recipe: Recipe,
    infos: Mapping[str, TensorInfo],
    changed: Iterable[str],
    layers: Mapping[str, tuple[int, int]],
    side: int = 0,
) -> Sizes:
    """Sizes for a base's tensors, those that change, and (rows, columns) of adapted modules: none where all train."""
    names = set(changed)
    outputs = {name: output_info(info, recipe.merge.output_dtype) for name, info in infos.items()}
    whole = {name: TensorInfo(info.shape, "F32") for name, info in infos.items() if name in names}
    dense = _file(whole)
    ranks = {task: recipe.rank_of(task) for task in recipe.tasks}
    experts = {task: _adapter(recipe, layers, rank) if layers else (0, dense) for task, rank in ranks.items()}
    return Sizes(
        experts=experts,
        dense=dense,
        changed=sum(info.num_bytes for name, info in outputs.items() if name in names),
        unchanged=sum(info.num_bytes for name, info in outputs.items() if name not in names),
        side=side + len(make_header(outputs)[0]),
        adopted=frozenset(name for name, spec in recipe.tasks.items() if spec.expert),
    )


def _adapter(recipe: Recipe, layers: Mapping[str, tuple[int, int]], rank: int) -> tuple[int, int]:
    """Bytes of the factors A and B of an adapter, float32."""
    a, b = {}, {}
    for module, (rows, columns) in layers.items():
        patterns = recipe.local_update.rank_pattern.items()
        own = next((one for pattern, one in patterns if matches_module(pattern, module)), rank)
        a[f"base_model.model.{module}.lora_A.weight"] = TensorInfo((own, columns), "F32")
        b[f"base_model.model.{module}.lora_B.weight"] = TensorInfo((rows, own), "F32")
    return _file(a), _file(b)


def _file(infos: Mapping[str, TensorInfo]) -> int:
    return len(make_header(infos)[0]) + sum(info.num_bytes for info in infos.values())


# ---- a run -----------------------------------------------------------------------------------------------------------


def disk_plan(recipe: Recipe, sizes: Sizes) -> Parts:
    """What the run folder holds in the end, by kind and in all, and the most that it holds on the way (`peak`)."""
    left = left_after(recipe, sizes, recipe.protocol.rounds)
    return left | {"total": sum(left.values()), "peak": peak(recipe, sizes)}


def left_after(recipe: Recipe, sizes: Sizes, done: int) -> Parts:
    """What there is when round `done` is over and `keep` is obeyed; 0: before round 1."""
    rounds, keep = recipe.protocol.rounds, recipe.keep
    experts, carried, states = _rounds_kept(recipe, done)
    alone = keep.adapters != "none" or not (done or rounds > 1)
    if alone and rounds == 1 and recipe.evaluation.experts:
        experts = []  # the same files
    parts = {
        "experts": (_alone(recipe, sizes) if alone else 0) + sum(_experts(recipe, sizes, r) for r in experts),
        "task_vectors": sizes.dense * (done + (1 if recipe.evaluation.post_hoc else 0)),
        "merged_models": _merged(sizes, done if keep.merged == "all" else min(done, 1)),
    }
    parts["experts"] += len(carried) * _carried(recipe, sizes)
    if recipe.local_update.optimizer_state == "kept":
        parts["optimizer_states"] = sum(_states(recipe, sizes, r) for r in states)
    if MEMORIES[recipe.merge.outer_optimizer]:
        parts["outer_states"] = sum(_outer(recipe, sizes, r) for r in range(1, done + 1))
    return parts


def peak(recipe: Recipe, sizes: Sizes, done: int = 0) -> int:
    """The most that there is at once from the end of round `done` on."""
    found = [sum(left_after(recipe, sizes, done).values())]
    if not done:
        post_hoc = sizes.dense if recipe.evaluation.post_hoc else 0
        found.append(_alone(recipe, sizes) + post_hoc)
    for r in range(done + 1, recipe.protocol.rounds + 1):
        before = sum(left_after(recipe, sizes, r - 1).values())
        written = round_writes(recipe, sizes, r)
        shared = recipe.protocol.rounds == 1 and recipe.evaluation.experts
        trained = 0 if shared else written["experts"] + written["optimizer_states"]
        merging = written["task_vectors"] + written["outer_states"]
        aside = 2 * sizes.dense if recipe.method.searches_scaling else 0  # the update, and a model to measure
        aside += sizes.dense if recipe.merge.on_regression == "rollback" else 0
        merged = written["merged_models"] + written["carried_adapter"]
        found.append(before + trained + merging + max(aside, merged))
    return max(found)


def round_writes(recipe: Recipe, sizes: Sizes, round_index: int) -> Parts:
    """What one round adds, before anything is removed."""
    return {
        "experts": _experts(recipe, sizes, round_index),
        "optimizer_states": _states(recipe, sizes, round_index),
        "task_vectors": sizes.dense,
        "outer_states": _outer(recipe, sizes, round_index),
        "merged_models": _merged(sizes, round_index) - _merged(sizes, round_index - 1),
        "carried_adapter": _carried(recipe, sizes),
    }


def _rounds_kept(recipe: Recipe, done: int) -> tuple[list[int], list[int], list[int]]:
    """The rounds whose experts, carried adapters and optimizers' states are there when round `done` is over."""
    over, how = range(1, done + 1), recipe.keep.adapters
    if how == "all":
        return list(over), list(over), list(over)
    follows, own = done < recipe.protocol.rounds, recipe.local_update.adapter_start == "own"
    last = {done} if how == "last" or follows else set()
    before = {done - 1} if how == "last" else set()
    experts = (last if how == "last" or own else set()) | (before if own else set())
    return [r for r in over if r in experts], [r for r in over if r in last | before], [r for r in over if r in last]


def _alone(recipe: Recipe, sizes: Sizes) -> int:
    """The experts that are trained alone."""
    return _experts(recipe, sizes, 1) if recipe.evaluation.experts else 0


def _experts(recipe: Recipe, sizes: Sizes, round_index: int) -> int:
    """The experts of one round."""
    there = [task for task in recipe.tasks if round_index > 1 or task not in sizes.adopted]
    return sum(sizes.expert(task) for task in there)


def _states(recipe: Recipe, sizes: Sizes, round_index: int) -> int:
    """Two moments of all that a round and those before it trained; the last round leaves none."""
    update = recipe.local_update
    if update.optimizer_state == "restart" or round_index == recipe.protocol.rounds:
        return 0
    only_b = update.train_factors == "b" or (update.train_factors == "alternate" and round_index == 1)
    return sum(2 * (b if only_b else a + b) for a, b in sizes.experts.values())


def _carried(recipe: Recipe, sizes: Sizes) -> int:
    """The adapter that a round hands on to all tasks."""
    averaged = recipe.merge.space == "factors" or recipe.local_update.adapter_start in ("averaged", "svd")
    return max(map(sizes.expert, recipe.tasks)) if averaged else 0


def _outer(recipe: Recipe, sizes: Sizes, round_index: int) -> int:
    """What the outer optimizer leaves for the round after."""
    memories = MEMORIES[recipe.merge.outer_optimizer]
    return len(memories) * sizes.dense if round_index < recipe.protocol.rounds else 0


def _merged(sizes: Sizes, count: int) -> int:
    """Merged models of so many rounds; tensors that no round changes are stored once where that is worth it."""
    once = sizes.unchanged if sizes.unchanged >= WORTH_APART and sizes.changed else 0
    return count * (sizes.changed + sizes.unchanged + sizes.side - once) + (once if count else 0)
