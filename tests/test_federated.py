"""The server of a federation: the core's weights, masks and merges to the bit, and clients that cannot be used."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import manyshot
from federated_helpers import LOSSES, TASKS, adapter_of, make_federation, model_of, told
from manyshot.errors import ManyshotError, MergeError, MissingExtraError, RecipeError, RunFolderError
from manyshot.federated import EXPERT, PRETRAINED, START, Array, FederatedRun, Returned
from manyshot.federated_client import add_start, read_expert
from manyshot.federated_recipe import FederatedRecipe
from manyshot.gap_weights import TaskLosses, choose_weights
from manyshot.match import open_experts
from manyshot.operators import OPERATORS, OperatorPlan
from manyshot.outer import STATE_NAME, Outer
from manyshot.recipe_file import federated_recipe_from_mapping, load_federated_recipe
from manyshot.round_merge import merge_weights
from manyshot.rundir import read_json
from manyshot.task_vector import StoredTaskVector
from manyshot.tensors import Checkpoint
from manyshot.yaml_text import read_yaml
from merge_helpers import make_base, make_peft_adapter, read_model, write_model

# the factors of one tensor, as PEFT calls them
A, B = "base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"
OPERATOR_SETTINGS: list[dict[str, Any]] = [{"name": name} for name in OPERATORS]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


def begin(base: Path, **settings: Any) -> FederatedRun:
    return FederatedRun(make_federation(base, **settings), base.parent / "run")


# ---- as in the core --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATOR_SETTINGS, ids=lambda operator: operator["name"])
def test_federation_merges_two_rounds_to_the_bytes_of_the_core(tmp_path: Path, base: Path, operator: Any) -> None:
    run = begin(base, operator=operator, seed=3)
    start = None
    for round_index in (1, 2):
        sent = [adapter_of(tmp_path / f"sent{round_index}", task) for task in TASKS]
        merged = run.merge_round(sent[::-1])  # in whatever order they come
        pretrained, experts = Checkpoint(base), {task: tmp_path / f"sent{round_index}" / task for task in TASKS}
        method = run.recipe.method
        losses = TaskLosses(*(tuple(LOSSES[task][which] for task in TASKS) for which in (0, 1, 0)))
        weights, _ = choose_weights(method, losses)
        wanted = tmp_path / f"wanted{round_index}.safetensors"
        updates = open_experts(pretrained, experts)
        parts = (3, "operator", round_index)
        merge_weights(pretrained, start, TASKS, updates, OperatorPlan(method), weights, wanted, seed_parts=parts)
        assert list(merged.weights.values()) == weights
        assert (run.folder.round(round_index) / "task_vector.safetensors").read_bytes() == wanted.read_bytes()
        start = StoredTaskVector(wanted)


def test_federation_ends_where_a_run_does_whose_experts_it_is_sent(
    recipe_mapping: dict[str, Any], tmp_path: Path
) -> None:
    recipe_mapping["evaluation"]["experts"] = False
    folder = manyshot.run(recipe_mapping, tmp_path / "run").folder
    recipe = read_yaml((folder / "recipe.yaml").read_text("utf-8"))
    settings = {key: recipe[key] for key in ("model", "operator", "seed")}
    tasks, rounds = list(recipe["tasks"]), recipe["protocol"]["rounds"]
    federation = make_federation(tmp_path, **settings, tasks=tasks, rounds=rounds)
    run = FederatedRun(federation, tmp_path / "federation")
    for round_index in range(1, rounds + 1):
        there = folder / f"round_{round_index:03d}"
        record = read_json(there / "loss_gap.json")
        sent = []
        for task in tasks:
            which = ((START, "start_losses"), (EXPERT, "expert_losses"))
            losses = {name: record[key][task]["loss"] for name, key in which}
            sent.append(Returned(task, *read_expert(there / task / "adapter"), losses))
        merged = run.merge_round(sent)
        assert merged.weights == record["weights"] and merged.loss_gaps == record["loss_gaps"]
        ours, theirs = (path / "task_vector.safetensors" for path in (run.folder.round(round_index), there))
        assert ours.read_bytes() == theirs.read_bytes()
    exported = run.export()
    assert (exported / "model.safetensors").read_bytes() == (folder / "merged" / "model.safetensors").read_bytes()


def test_federation_merges_full_weights_as_the_core_does(tmp_path: Path, base: Path) -> None:
    run = begin(base)
    merged = run.merge_round([model_of(tmp_path / "sent", task, base) for task in TASKS])
    pretrained, wanted = Checkpoint(base), tmp_path / "wanted.safetensors"
    updates = open_experts(pretrained, {task: tmp_path / "sent" / task for task in TASKS})
    weights = list(merged.weights.values())
    merge_weights(pretrained, None, TASKS, updates, run.recipe.plan, weights, wanted, seed_parts=(0, "operator", 1))
    assert (run.folder.round(1) / "task_vector.safetensors").read_bytes() == wanted.read_bytes()


def test_federation_keeps_adapters_exact_where_averaged_factors_are_not(tmp_path: Path, base: Path) -> None:
    run = begin(base, operator="mean", tasks=["letters", "numbers"])
    sent = [adapter_of(tmp_path / "sent", task) for task in ("letters", "numbers")]
    run.merge_round(sent)
    factors = [
        [torch.from_numpy(one.arrays[f"base_model.model.a.lora_{side}.weight"]) for one in sent] for side in "BA"
    ]
    exact = sum(2.0 * b @ a for b, a in zip(*factors, strict=True)) / 2
    averaged = 2.0 * (sum(factors[0]) / 2) @ (sum(factors[1]) / 2)
    found = torch.from_numpy(run.start_arrays()["a.weight"])
    torch.testing.assert_close(found, exact)
    assert (averaged - exact).norm() > 0.3 * exact.norm()


def test_federation_takes_the_outer_steps_of_the_core(tmp_path: Path, base: Path) -> None:
    merge = {"reference": "start", "outer_optimizer": "nesterov", "outer_momentum": 0.7, "outer_step_size": [0.7, 0.5]}
    run = begin(base, merge=merge)
    start = state = None
    for round_index, step_size in ((1, 0.7), (2, 0.5)):
        merged = run.merge_round([adapter_of(tmp_path / f"sent{round_index}", task) for task in TASKS])
        pretrained, folder = Checkpoint(base), tmp_path / f"wanted{round_index}"
        leaves = folder / STATE_NAME if round_index == 1 else None
        outer = Outer(step_size, 0.7, None, "nesterov", round_index=round_index, state=state, leaves=leaves)
        updates = open_experts(pretrained, {task: tmp_path / f"sent{round_index}" / task for task in TASKS})
        merge_weights(
            *(pretrained, start, TASKS, updates, run.recipe.plan, list(merged.weights.values()), folder / "wanted"),
            reference="start",
            outer=outer,
            seed_parts=(0, "operator", round_index),
        )
        found = run.folder.round(round_index) / "task_vector.safetensors"
        assert found.read_bytes() == (folder / "wanted").read_bytes()
        start, state = StoredTaskVector(folder / "wanted"), StoredTaskVector(leaves) if leaves else None


def test_federation_keeps_weights_of_the_round_before_where_the_operator_does(tmp_path: Path, base: Path) -> None:
    run = begin(base, operator={"name": "metis", "weight_memory": 0.5})
    first = run.merge_round([adapter_of(tmp_path / "one", task) for task in TASKS]).weights
    second = run.merge_round([adapter_of(tmp_path / "two", task) for task in TASKS]).weights
    losses = TaskLosses(*(tuple(LOSSES[task][which] for task in TASKS) for which in (0, 1, 0)))
    assert list(second.values()) == choose_weights(run.recipe.method, losses, list(first.values()))[0]
    assert second != first


# ---- what clients are sent -------------------------------------------------------------------------------------------


def test_federation_sends_a_delta_or_weights_that_make_the_same_model(tmp_path: Path, base: Path) -> None:
    models = []
    for sends in ("delta", "weights"):
        run = FederatedRun(make_federation(base, sends=sends), tmp_path / sends)
        assert bool(run.start_arrays()) == (sends == "weights")  # nothing has changed yet
        run.merge_round([adapter_of(tmp_path / f"sent-{sends}" / "r1", task) for task in TASKS])
        model = _Module(read_model(base))
        add_start(model, run.start_arrays(), whole=sends == "weights")
        models.append({name: parameter.detach() for name, parameter in model.named_parameters()})
        exported = read_model(run.export())
        assert all(torch.equal(models[-1][name], exported[name]) for name in exported)
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


class _Module(torch.nn.Module):
    """Parameters of these names."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            module, last = name.rsplit(".", 1)
            self.add_module(module, torch.nn.Module())
            self.get_submodule(module).register_parameter(last, torch.nn.Parameter(tensor.clone()))


def test_client_reads_bfloat16_weights_as_float32_and_an_adapter_with_its_configuration(tmp_path: Path) -> None:
    write_model(tmp_path / "model", {"a.weight": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)})
    arrays, config = read_expert(tmp_path / "model")
    assert config is None and arrays["a.weight"].dtype == np.float32 and arrays["a.weight"].tolist() == [[1.5, -2.0]]
    arrays, config = read_expert(make_peft_adapter(tmp_path / "adapter", "x"))
    assert config is not None and json.loads(config)["lora_alpha"] == 4.0 and len(arrays) == 4


def test_federation_counts_what_was_sent(tmp_path: Path, base: Path) -> None:
    run = begin(base)
    run.merge_round([adapter_of(tmp_path / "sent", task) for task in TASKS])
    # a: 2·(4 + 6), b: 2·(6 + 4) float32
    assert read_json(run.folder.round(1) / "merge.json")["received_bytes"] == dict.fromkeys(TASKS, 160)
    assert sum(array.nbytes for array in run.start_arrays().values()) == 4 * 48


# ---- clients that cannot be used -------------------------------------------------------------------------------------


def _change(one: Returned, name: str, change: Callable[[Array], Array]) -> Returned:
    return replace(one, arrays=dict(one.arrays) | {name: change(one.arrays[name])})


UNUSABLE: dict[str, tuple[Callable[[Returned], Returned], str]] = {
    "nan loss": (lambda one: replace(one, losses={START: 1.0, EXPERT: float("nan")}), "expert-loss is nan"),
    "no loss": (lambda one: replace(one, losses={START: 1.0}), "no expert-loss, and metis weighs tasks by it"),
    "nan weight": (lambda one: _change(one, A, lambda a: a * np.float32("nan")), f"'{A}' holds NaN or Inf"),
    "too large": (
        lambda one: _change(_change(one, A, lambda a: a + np.float32(1e30)), B, lambda b: b + np.float32(1e30)),
        "tensor 'a.weight': s·B·A is beyond float32",
    ),
    "type": (lambda one: _change(one, A, lambda a: a.astype(np.float64)), f"'{A}' is of type float64; send float32"),
    "shape": (lambda one: _change(one, B, lambda b: b[:3]), "the adapter's update has shape (3, 4), the base's tensor"),
    "ranks": (lambda one: _change(one, B, lambda b: b[:, :1]), "factors of shapes (2, 4) and (6, 1)"),
    "half": (lambda one: replace(one, arrays={A: one.arrays[A]}), "'a' has only one of the factors A and B"),
    "nothing": (lambda one: replace(one, arrays={}), "it sent no arrays"),
    "other base": (lambda one: replace(one, base_digest="0" * 64), "its pretrained model is another one"),
    "unlike model": (
        lambda one: replace(one, arrays={key.replace(".a.", ".q."): value for key, value in one.arrays.items()}),
        "it was trained on another model",
    ),
    "config": (lambda one: replace(one, adapter_config="[1]"), "its adapter configuration is no JSON object: '[1]'"),
    "dora": (
        lambda one: replace(one, adapter_config='{"peft_type": "LORA", "lora_alpha": 4, "use_dora": true}'),
        "DoRA is not of the form s·B·A",
    ),
    "whole lacks a tensor": (
        lambda one: replace(one, adapter_config=None, arrays={"a.weight": np.zeros((6, 4), np.float32)}),
        "tensor 'b.weight' of the base",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_federation_leaves_an_unusable_client_out_and_says_why(tmp_path: Path, base: Path, what: str) -> None:
    spoil, message = UNUSABLE[what]
    sent = [adapter_of(tmp_path / "sent", task) for task in TASKS]
    run = begin(base)
    merged = run.merge_round([sent[0], spoil(sent[1]), sent[2]])
    assert list(merged.weights) == ["letters", "words"]
    assert message in merged.left_out["numbers"] and "--allow-copy" not in merged.left_out["numbers"]
    assert read_json(run.folder.round(1) / "merge.json")["left_out"] == merged.left_out
    assert not (run.folder.round(1) / "received").exists()
    strict = FederatedRun(make_federation(base, on_failure="stop"), tmp_path / "strict")
    with pytest.raises(MergeError, match="on_failure is stop") as found:
        strict.merge_round([sent[0], spoil(sent[1]), sent[2]])
    assert message in str(found.value)


def test_federation_leaves_out_unknown_clients_twins_and_the_silent(tmp_path: Path, base: Path) -> None:
    sent = [adapter_of(tmp_path / "sent", task) for task in ("letters", "numbers", "wrods")]
    twin = replace(sent[0], client="node 9")
    with pytest.raises(MergeError, match="1 of 3 tasks can be merged, and min_tasks is 2") as found:
        begin(base).merge_round([*sent, twin], {"node 4": "its ClientApp failed: out of memory"})
    message = str(found.value)
    assert "node of wrods: says that its task is 'wrods', and there is none of that name; did you mean" in message
    assert "letters: several clients say that it is theirs: node 9, node of letters" in message
    assert "words: no client sent its expert" in message and "node 4: its ClientApp failed: out of memory" in message


def test_federation_gives_sums_their_full_weight_without_a_client(tmp_path: Path, base: Path) -> None:
    run = begin(base, operator={"name": "task_arithmetic", "scaling": 0.3})
    merged = run.merge_round([adapter_of(tmp_path / "sent", task, losses={}) for task in TASKS[:2]])
    assert merged.weights == {"letters": 1.5, "numbers": 1.5} and not merged.loss_gaps


def test_federation_asks_a_late_client_for_its_loss_of_the_pretrained_model(tmp_path: Path, base: Path) -> None:
    run = begin(base, operator={"name": "metis", "gap": "relative"}, rounds=3)
    run.merge_round([adapter_of(tmp_path / "one", task) for task in TASKS[:2]])
    merged = run.merge_round([adapter_of(tmp_path / "two", task) for task in TASKS])
    assert merged.left_out == {"words": "no pretrained-loss, and metis weighs tasks by it"}
    sent = [adapter_of(tmp_path / "three", task) for task in TASKS[:2]]
    late = adapter_of(tmp_path / "three", "words", told("words") | {PRETRAINED: 2.0})
    assert set(run.merge_round([*sent, late]).weights) == set(TASKS)


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["one"]}, "tasks: Tuple should have at least 2 items"),
        ({"tasks": ["one", "one"]}, "tasks: 'one' stands there twice"),
        ({"tasks": ["one", "../two"]}, "tasks.1: "),
        ({"merge": {"space": "factors"}}, "merge.space: factors that are averaged are not ΔW"),
        ({"merge": {"on_regression": "stop"}}, "merge.on_regression: needs measurements of merged models"),
        ({"merge": {"outer_momentum": 0.5}}, "merge.outer_momentum: is part of the outer optimizer"),
        (
            {"merge": {"reference": "start", "outer_step_size": [1.0]}},
            "outer_step_size: has 1 values for 2 rounds",
        ),
        ({"operator": {"name": "metis", "scaling": "auto"}}, "operator.scaling: auto measures merged models"),
        ({"operator": {"name": "metis", "min_agreement": 4}}, "operator.min_agreement: 4 tasks can never agree"),
        ({"operatr": "metis"}, "operatr: unknown key; did you mean 'operator'?"),
        ({"min_tasks": 4}, "min_tasks: 4 of 3 tasks; give 1 … 3"),
        ({"sends": "adapter"}, "sends: Input should be 'delta' or 'weights', found 'adapter'"),
    ],
)
def test_federated_recipe_refuses_what_cannot_be_meant(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as found:
        make_federation(tmp_path, **settings)
    assert message in str(found.value)


def test_federations_page_shows_a_recipe_that_loads_and_has_every_key() -> None:
    page = (Path(__file__).parents[1] / "docs" / "federated.md").read_text("utf-8")
    shown = re.search(r"recipe = (\{.*?\n    \})\n", page, re.DOTALL)
    assert shown is not None
    recipe = federated_recipe_from_mapping(ast.literal_eval(shown[1]))
    assert (recipe.tasks, recipe.method.name) == (("math", "safety", "code"), "metis")
    keys = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE))))
    assert set(FederatedRecipe.model_fields) <= keys


def test_federated_recipe_reads_a_file_and_its_overrides(tmp_path: Path, base: Path) -> None:
    (tmp_path / "metis.yaml").write_text("model: base\ntasks: [one, two]\noperator: metis\n", "utf-8")
    recipe = load_federated_recipe(tmp_path / "metis.yaml", ["operator.temperature=0.5", "rounds=1"])
    assert recipe.model == str(base.resolve()) and recipe.tasks == ("one", "two")
    assert recipe.method == OPERATORS["metis"](name="metis", temperature=0.5)  # type: ignore[call-arg]


def test_federation_refuses_a_folder_in_use_a_round_too_many_and_an_empty_export(tmp_path: Path, base: Path) -> None:
    run = begin(base, rounds=1)
    with pytest.raises(RunFolderError, match="no round has been merged yet"):
        run.export()
    run = begin(base, rounds=1)  # nothing but the recipe is there yet
    run.merge_round([adapter_of(tmp_path / "sent", task) for task in TASKS])
    with pytest.raises(RunFolderError, match="is there already and not empty"):
        begin(base)
    with pytest.raises(ManyshotError, match="round 2 of 1: the run has had all its rounds"):
        run.merge_round([])


def test_flower_missing_is_one_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr.app", None)
    monkeypatch.delitem(sys.modules, "manyshot.flower", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'manyshot\[flower\]'"):
        import_module("manyshot.flower")
