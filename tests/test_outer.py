"""The outer optimizer: its steps are those of torch's own optimizers, and what it leaves is all that it needs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import TASKS
from manyshot import kernels, stream
from manyshot.errors import MergeError
from manyshot.operators import Mean, Metis, Operator
from manyshot.outer import MEMORIES, STATE_NAME, Outer
from manyshot.outer_choice import make_outer
from manyshot.recipe import Merge
from manyshot.round_merge import merge_weights
from manyshot.rundir import read_json, remove
from manyshot.runner import run
from manyshot.task_vector import AdapterUpdate, StoredTaskVector
from manyshot.tensors import Checkpoint, file_digest
from merge_helpers import SHAPES, Dense, draw, make_adapter, make_base
from run_helpers import Runs, load_tensors, round_folder, uneven_rows, unlike

Tensors = dict[str, torch.Tensor]
PAIR = ("x", "y")
ROUNDS = 4
HEAVY_BALL = Outer(0.6, 0.7)
NESTEROV = Outer(0.6, 0.7, optimizer="nesterov")
ADAM = Outer(3e-3, optimizer="adam", betas=(0.8, 0.95), epsilon=1e-3)
every_optimizer = pytest.mark.parametrize("outer", [HEAVY_BALL, NESTEROV, ADAM], ids=["sgd", "nesterov", "adam"])


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return make_base(tmp_path / "base")


def drawn_updates(r: int) -> list[Dense]:
    """Both tasks' updates of a round: `norm.weight` moves from the second round on, `b.weight` not in the third."""
    names = ["a.weight", *(["b.weight"] if r != 3 else []), *(["norm.weight"] if r > 1 else [])]
    return [
        Dense(**{name.replace(".", "_"): draw("update", r, task, name, shape=SHAPES[name]) for name in names})
        for task in PAIR
    ]


def merge_rounds(base: Checkpoint, outer: Outer, folder: Path, rounds: int = ROUNDS) -> list[Tensors]:
    """Θʳ − Θ⁰ of every round, as a run chains them: by the files of the rounds before."""
    vectors: list[Path] = []
    for r in range(1, rounds + 1):
        place = folder / f"round_{r}"
        remembers = bool(MEMORIES[outer.optimizer])
        now = replace(
            outer,
            round_index=r,
            before=StoredTaskVector(vectors[-2]) if r > 2 else None,
            state=StoredTaskVector(folder / f"round_{r - 1}" / STATE_NAME) if r > 1 and remembers else None,
            leaves=place / STATE_NAME if remembers else None,
        )
        start = StoredTaskVector(vectors[-1]) if vectors else None
        output = place / "task_vector.safetensors"
        merge_weights(base, start, PAIR, drawn_updates(r), Mean(), [0.5, 0.5], output, reference="start", outer=now)
        vectors.append(output)
    return [load_file(vector) for vector in vectors]


def torch_rounds(outer: Outer, rounds: int = ROUNDS) -> list[Tensors]:
    """The same by torch.optim on float64 parameters, with minus the mean update as the gradient."""
    parameters = {name: torch.zeros(shape, dtype=torch.float64, requires_grad=True) for name, shape in SHAPES.items()}
    values = list(parameters.values())
    optimizer: torch.optim.Optimizer = torch.optim.Adam(values, outer.step_size, betas=outer.betas, eps=outer.epsilon)
    if outer.optimizer != "adam":
        optimizer = torch.optim.SGD(
            values, outer.step_size, momentum=outer.momentum, nesterov=outer.optimizer == "nesterov"
        )
    found = []
    for r in range(1, rounds + 1):
        updates = drawn_updates(r)
        for name, parameter in parameters.items():
            moved = [one.tensors[name].double() for one in updates if name in one.tensors]
            parameter.grad = -sum(moved, torch.zeros(SHAPES[name], dtype=torch.float64)) / len(PAIR)
        optimizer.step()
        found.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
    return found


# ---- the formulas ----------------------------------------------------------------------------------------------------


@every_optimizer
def test_outer_takes_the_steps_of_torchs_own_optimizer(outer: Outer, base: Checkpoint, tmp_path: Path) -> None:
    found, expected = merge_rounds(base, outer, tmp_path), torch_rounds(outer)
    for r in range(ROUNDS):
        for name, tensor in expected[r].items():
            if name not in found[r]:
                assert (name, r) == ("norm.weight", 0)  # nobody has changed it yet
                assert not tensor.any()
                continue
            torch.testing.assert_close(found[r][name].double(), tensor, rtol=2e-6, atol=2e-6 * outer.step_size)
    moved = found[3]["a.weight"] - found[2]["a.weight"]
    assert float(moved.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("outer", "expected"),
    [
        (Outer(0.5, 0.9), [0.0, 0.5, 1.0, 0.0]),  # η d with d = (0, 1, 2, 0)
        (Outer(0.5, 0.5, optimizer="nesterov"), [0.0, 0.75, 1.5, 0.0]),  # η (1 + μ) d
        (Outer(0.5, optimizer="adam", epsilon=1.0), [0.0, 0.25, 1 / 3, 0.0]),  # η d/(|d| + ε)
    ],
    ids=["sgd", "nesterov", "adam"],
)
def test_outer_first_round_starts_from_rest(
    outer: Outer, expected: list[float], base: Checkpoint, tmp_path: Path
) -> None:
    updates = [Dense(norm_weight=torch.tensor(values)) for values in ([1.0, 1.0, 1.0, 0.0], [-1.0, 1.0, 3.0, 0.0])]
    merge_weights(base, None, PAIR, updates, Mean(), [0.5, 0.5], tmp_path / "v", reference="start", outer=outer)
    torch.testing.assert_close(load_file(tmp_path / "v")["norm.weight"], torch.tensor(expected), rtol=1e-6, atol=1e-7)


def test_outer_adam_does_not_ask_how_large_updates_are(base: Checkpoint, tmp_path: Path) -> None:
    small = Outer(1e-3, optimizer="adam", epsilon=1e-12)
    for scale in (1e-4, 1.0):
        update = Dense(norm_weight=torch.tensor([2.0, -1.0, 0.5, 0.0]) * scale)
        merge_weights(base, None, ("x",), [update], Mean(), [1.0], tmp_path / "v", reference="start", outer=small)
        found = load_file(tmp_path / "v")["norm.weight"]
        torch.testing.assert_close(found, torch.tensor([1e-3, -1e-3, 1e-3, 0.0]), rtol=1e-5, atol=0)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_outer_state_holds_what_the_optimizer_remembers_of_every_merged_tensor(
    base: Checkpoint, tmp_path: Path
) -> None:
    for outer in (HEAVY_BALL, NESTEROV, ADAM):
        folder = tmp_path / outer.optimizer
        merge_rounds(base, outer, folder, rounds=2)
        for r, names in ((1, {"a.weight", "b.weight"}), (2, set(SHAPES))):
            memories = MEMORIES[outer.optimizer]
            assert (folder / f"round_{r}" / STATE_NAME).exists() == bool(memories)
            if memories:
                stored = load_file(folder / f"round_{r}" / STATE_NAME)
                assert set(stored) == {f"{memory}:{name}" for memory in memories for name in names}
                assert all(tensor.dtype == torch.float32 for tensor in stored.values())


@every_optimizer
@pytest.mark.parametrize("entries", [1, 5, 9])
def test_outer_bits_do_not_depend_on_tiles(
    outer: Outer, entries: int, base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge_rounds(base, outer, tmp_path / "whole", rounds=3)
    monkeypatch.setattr(stream, "tile_entries", lambda num_tasks: entries)
    merge_rounds(base, outer, tmp_path / "tiles", rounds=3)
    assert unlike(tmp_path / "whole", tmp_path / "tiles") == []


def test_outer_leaves_both_files_or_none(base: Checkpoint, tmp_path: Path) -> None:
    broken = Dense(norm_weight=torch.tensor([3e38, 0.0, 0.0, 0.0]))  # too large to be doubled
    outer = Outer(2.0, 0.5, optimizer="nesterov", leaves=tmp_path / "out" / STATE_NAME)
    with pytest.raises(MergeError, match=r"'norm\.weight': the merged task vector holds NaN or Inf"):
        merge_weights(
            base, None, ("x",), [broken], Mean(), [1.0], tmp_path / "out" / "v", reference="start", outer=outer
        )
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("operator", [Mean(), Metis(mask_threshold=0.1)], ids=["mean", "metis"])
def test_outer_plain_step_goes_through_the_compiled_kernels_to_the_bits_of_the_sum(
    operator: Operator, base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """η = 1 and μ = 0: Θʳ − Θ⁰ = (Θʳ⁻¹ − Θ⁰) + M(u), rounded once."""
    updates = [AdapterUpdate(make_adapter(tmp_path / task, task)) for task in PAIR]

    def merge(name: str, reference: str, start: Path | None, outer: Outer | None) -> Tensors:
        stored = StoredTaskVector(start) if start else None
        options = {"reference": reference, "outer": outer}
        merge_weights(base, stored, PAIR, updates, operator, [0.5, 0.5], tmp_path / name, **options)  # type: ignore[arg-type]
        return load_file(tmp_path / name)

    update = merge("update", "pretrained", None, None)
    found = merge("found", "start", tmp_path / "update", Outer())
    assert all(torch.equal(found[name], update[name] + update[name]) for name in update)
    assert merge("default", "start", tmp_path / "update", None).keys() == found.keys()
    monkeypatch.setattr(kernels, "compiled", lambda: False)
    merge("torch", "start", tmp_path / "update", Outer())
    digests = {file_digest(tmp_path / name) for name in ("found", "default", "torch")}
    assert len(digests) == 1
    assert Outer().plain and not any(one.plain for one in (HEAVY_BALL, NESTEROV, ADAM, Outer(0.5)))


def test_outer_momentum_ramps_up_and_begins_again_after_a_rollback() -> None:
    merge = Merge(reference="start", outer_momentum=0.7, outer_momentum_schedule="ramp")

    def momenta(anew: int) -> list[float]:
        rounds = range(anew + 1, anew + 13)
        return [make_outer(merge, r, before=None, state=None, leaves=None, anew=anew).momentum for r in rounds]

    assert momenta(0) == momenta(4) == [*(r / (r + 3) for r in range(7)), 0.7, 0.7, 0.7, 0.7, 0.7]
    plain = merge.model_copy(update={"outer_momentum_schedule": "constant"})
    assert {plain.momentum_of(r) for r in range(1, 9)} == {0.7}
    assert make_outer(merge, 0, before=None, state=None, leaves=None).momentum == 0  # post-hoc is as a first round


# ---- runs ------------------------------------------------------------------------------------------------------------

RUNS = {
    "nesterov": ("merge.outer_optimizer=nesterov", "merge.outer_momentum=0.6", "merge.outer_step_size=[0.5, 1.5, 0.7]"),
    "ramp": ("merge.outer_optimizer=nesterov", "merge.outer_momentum=0.3", "merge.outer_momentum_schedule=ramp"),
    "arrives": (
        *("merge.outer_optimizer=nesterov", "merge.outer_momentum=0.6", "merge.outer_step_size=[0.5, 1.5, 0.7]"),
        "merge.outer_look_ahead=between_rounds",
    ),
    "adam": ("merge.outer_optimizer=adam", "merge.outer_step_size=0.002", "merge.outer_epsilon=1e-4"),
}
# step sizes and momenta of rounds 1 to 3: the ramp is 0, 1/4, 2/5, and at most 0.3
NESTEROVS = {
    "nesterov": ((0.5, 1.5, 0.7), (0.6, 0.6, 0.6)),
    "ramp": ((1.0, 1.0, 1.0), (0.0, 0.25, 0.3)),
    "arrives": ((0.5, 1.5, 0.7), (0.6, 0.6, 0.0)),
}


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """One step per round, measured on next to nothing: what is looked at here are merges."""
    found = Runs(base_folder, tmp_path_factory.mktemp("outer"), uneven_rows, TASKS[:2])
    found.mapping["protocol"] = {"rounds": 3, "local_steps": 3}
    found.mapping["operator"] = {"name": "mean"}
    found.mapping["merge"] = {"reference": "start"}
    found.mapping["local_update"]["warmup_steps"] = 0
    found.mapping["evaluation"] |= {"validation_examples": 2, "test_examples": 1}
    return found


def mean_update(folder: Path) -> Tensors:
    """M(u) of a round, in float64 from the adapters' files."""
    total: Tensors = {}
    for task in TASKS[:2]:
        adapter = folder / task / "adapter"
        stored, table = load_tensors(adapter / "adapter_model.safetensors"), read_json(adapter / "factors.json")
        for name, entry in table.items():
            product = stored[entry["lora_b"]].double() @ stored[entry["lora_a"]].double() * entry["scaling"]
            total[name] = total.get(name, torch.zeros(())) + product / 2
    return total


def by_hand(updates: Iterable[Tensors], optimizer: str) -> list[Tensors]:
    """Θʳ − Θ⁰ of every round, with the settings of RUNS."""
    last: Tensors = {}
    first: Tensors = {}
    second: Tensors = {}
    found = []
    for r, update in enumerate(updates, start=1):
        for name, d in update.items():
            zero = torch.zeros((), dtype=torch.float64)
            if optimizer in NESTEROVS:
                step_size, momentum = (values[r - 1] for values in NESTEROVS[optimizer])
                first[name] = momentum * first.get(name, zero) + d
                step = step_size * (d + momentum * first[name])
            else:
                first[name] = 0.9 * first.get(name, zero) + 0.1 * d
                second[name] = 0.99 * second.get(name, zero) + 0.01 * d**2
                step = 0.002 * (first[name] / (1 - 0.9**r)) / ((second[name] / (1 - 0.99**r)).sqrt() + 1e-4)
            last[name] = last.get(name, zero) + step
        found.append(dict(last))
    return found


@pytest.mark.parametrize("optimizer", RUNS)
def test_outer_run_steps_resumes_and_says_what_it_left(runs: Runs, optimizer: str) -> None:
    result = runs.get(*RUNS[optimizer])
    expected = by_hand([mean_update(round_folder(result, r)) for r in (1, 2, 3)], optimizer)
    for r in (1, 2, 3):
        folder = round_folder(result, r)
        found, files = load_tensors(folder / "task_vector.safetensors"), read_json(folder / "DONE.json")["files"]
        for name, tensor in expected[r - 1].items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=2e-7)
        assert set(files) == {"task_vector.safetensors", *([STATE_NAME] if r < 3 else [])}  # nobody reads the last one
        assert files == {name: file_digest(folder / name) for name in files}
        assert read_json(folder / "merge.json").get("outer_state_digest") == files.get(STATE_NAME)
    folder = runs.new_folder()
    run(runs.recipe(*RUNS[optimizer]), folder)
    for name in ("scores.json", "merged", "round_003", *(f"round_002/{n}" for n in ("merge.json", STATE_NAME))):
        remove(folder / name)
    run(runs.recipe(*RUNS[optimizer]), folder, resume=True, repair=True)
    assert unlike(result.folder, folder) == []
