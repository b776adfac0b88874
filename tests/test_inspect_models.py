"""Comparing task vectors: every quantity by hand, models, adapters and run folders, what is refused, what is shown."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from manyshot import cli_inspect_view as cli_inspect
from manyshot import kernels
from manyshot.cli_inspect_view import draw_inspection, layer_labels, plain, shorten, show_inspection
from manyshot.errors import ManyshotError, MergeError, MissingExtraError, ModelError, RecipeError, RunFolderError
from manyshot.inspect_input import name_models, open_inputs, open_models, open_round
from manyshot.inspect_models import (
    Inspection,
    InspectSettings,
    effective_rank,
    factor_values,
    inspect,
    layer_of,
    no_sums,
    singular_values,
    sum_tile,
)
from manyshot.rundir import write_json
from manyshot.task_vector import AdapterUpdate
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import dense, draw, make_adapter

Tensors = dict[str, torch.Tensor]
PNG = b"\x89PNG\r\n\x1a\n"
needs_matplotlib = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib (extra: report) is missing")

SHAPES = {
    "model.embed.weight": (5, 3),
    "model.layers.0.q.weight": (4, 3),
    "model.layers.1.q.weight": (4, 3),
    "model.layers.10.q.weight": (4, 3),
    "model.norm.weight": (4,),
}
# by hand: columns are the coordinates of model.norm.weight
X, Y = [4.0, 4.0, -1.0, 0.0], [4.0, -1.0, 0.0, 0.0]


def write_model(folder: Path, tensors: Tensors) -> Path:
    folder.mkdir(parents=True)
    write_tensors(folder / "model.safetensors", tensors)
    write_json(folder / "config.json", {"model_type": "none"})
    return folder


def zeros() -> Tensors:
    return {name: torch.zeros(shape) for name, shape in SHAPES.items()}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base", {name: draw("base", name, shape=shape) for name, shape in SHAPES.items()})


def model(base: Path, folder: Path, **changes: torch.Tensor) -> Path:
    """A model that differs from the base by `changes` (model__norm__weight=…)."""
    checkpoint = Checkpoint(base)
    tensors = {name: checkpoint.read(name) for name in checkpoint.names}
    for key, change in changes.items():
        tensors[key.replace("__", ".")] = tensors[key.replace("__", ".")] + change
    return write_model(folder, tensors)


@pytest.fixture
def zero_base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "zero", zeros())


@pytest.fixture
def by_hand(zero_base: Path, tmp_path: Path) -> Inspection:
    x = model(zero_base, tmp_path / "x", model__norm__weight=torch.tensor(X))
    layer = torch.diag(torch.tensor([3.0, 4.0, 0.0, 0.0]))[:, :3]
    y = model(zero_base, tmp_path / "y", model__norm__weight=torch.tensor(Y), model__layers__1__q__weight=layer)
    return inspect(open_inputs([x, y], zero_base), InspectSettings(threads=1))


# ---- quantities by hand ----------------------------------------------------------------------------------------------


def test_inspect_norms_and_changed_shares_by_hand(by_hand: Inspection) -> None:
    assert by_hand.tasks == ("x", "y")
    assert by_hand.total.num_coordinates == sum(math.prod(shape) for shape in SHAPES.values()) == 55
    assert by_hand.total.norms == pytest.approx((math.sqrt(33), math.sqrt(17 + 25)))
    assert by_hand.total.changed_shares == pytest.approx((3 / 55, 4 / 55))
    norm = by_hand.layers[-1]
    assert norm.name == "model.norm"
    assert norm.norms == pytest.approx((math.sqrt(33), math.sqrt(17)))
    assert norm.changed_shares == pytest.approx((3 / 4, 2 / 4))


def test_inspect_cosines_by_hand(by_hand: Inspection) -> None:
    assert by_hand.total.cosines[0][1] == by_hand.total.cosines[1][0] == pytest.approx(12 / math.sqrt(33 * 42))
    assert by_hand.total.cosines[0][0] == pytest.approx(1)
    assert by_hand.layers[2].name == "model.layers.10"
    assert by_hand.layers[2].cosines == ((0, 0), (0, 0))


def test_inspect_sign_conflicts_by_hand(by_hand: Inspection) -> None:
    # both changed the first and second entry of the norm, the second with opposite signs
    assert (by_hand.total.num_changed, by_hand.total.num_shared) == (5, 2)
    assert by_hand.total.sign_conflict == pytest.approx(1 / 2)
    assert by_hand.total.pair_sign_conflicts == ((0, 0.5), (0.5, 0))
    assert by_hand.layers[-1].sign_conflict == pytest.approx(1 / 2)
    assert by_hand.layers[1].sign_conflict is None  # y alone changed it


def test_inspect_masks_by_hand(by_hand: Inspection) -> None:
    # halves: |own| ≥ 0.3 · |rest|. Entry 1: 2 and 2, both. Entry 2: 2 and −0.5, x alone. Entry 3: x alone
    norm = by_hand.layers[-1]
    assert norm.vote_shares == pytest.approx((1, 1 / 3))
    assert norm.mask_overlaps[0][1] == norm.mask_overlaps[1][0] == pytest.approx(1 / 3)
    assert norm.kept_share == pytest.approx(1 / 3)
    assert norm.kept_vote_shares == (1, 1)
    assert by_hand.total.vote_shares == pytest.approx((3 / 5, 3 / 5))
    assert by_hand.total.mask_overlaps[0][1] == pytest.approx(1 / 5)
    assert by_hand.total.kept_share == pytest.approx(1 / 5)


def test_inspect_mask_with_a_low_threshold_and_one_vote_keeps_everything(zero_base: Path, tmp_path: Path) -> None:
    x = model(zero_base, tmp_path / "x", model__norm__weight=torch.tensor(X))
    y = model(zero_base, tmp_path / "y", model__norm__weight=torch.tensor(Y))
    found = inspect(open_inputs([x, y], zero_base), InspectSettings(mask_threshold=0.1, min_agreement=1))
    assert found.total.kept_share == 1
    assert found.total.vote_shares == pytest.approx((1, 2 / 3))
    assert found.total.kept_vote_shares == pytest.approx((1, 2 / 3))


def test_sum_tile_keeps_what_the_operator_keeps() -> None:
    rows_TP = draw("rows", shape=(3, 4000)) * (draw("holes", shape=(3, 4000)) > 0)
    sums = sum_tile(rows_TP, 0.3, 2)
    merged_P = kernels.consensus(rows_TP, torch.full((3,), 1 / 3), 0.3, 2, 1.0)
    assert int(sums.counts[3]) == int((merged_P != 0).sum())
    assert int(sums.counts[0]) == int((rows_TP != 0).any(0).sum())


def test_sum_tile_adds_up_over_tiles() -> None:
    rows_TP = draw("rows", shape=(4, 1000))
    whole, parts = sum_tile(rows_TP, 0.3, 2), no_sums(4)
    for piece_TP in rows_TP.split(300, dim=1):
        parts = parts + sum_tile(piece_TP, 0.3, 2)
    torch.testing.assert_close(parts.gram_TT, whole.gram_TT, rtol=1e-12, atol=1e-12)
    for name in ("changed_TT", "opposed_TT", "votes_TT", "kept_T", "counts"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))


def test_inspect_order_of_models_only_reorders(zero_base: Path, tmp_path: Path) -> None:
    x = model(zero_base, tmp_path / "x", model__norm__weight=torch.tensor(X))
    y = model(zero_base, tmp_path / "y", model__norm__weight=torch.tensor(Y))
    one, two = (inspect(open_inputs(order, zero_base)) for order in ([x, y], [y, x]))
    assert one.total.norms == two.total.norms[::-1]
    assert one.total.sign_conflict == two.total.sign_conflict
    assert one.total.kept_share == two.total.kept_share


# ---- effective ranks -------------------------------------------------------------------------------------------------


def test_effective_rank_by_hand() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0, 0.0])) == pytest.approx(1)
    shares = (3 / 4, 1 / 4)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert effective_rank(torch.tensor([3.0, 1.0], dtype=torch.float64)) == pytest.approx(expected)
    assert effective_rank(torch.zeros(3)) is None


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_singular_values_are_those_of_the_decomposition(shape: tuple[int, int]) -> None:
    matrix = draw("matrix", shape=shape)
    found = singular_values(matrix).sort(descending=True).values
    torch.testing.assert_close(found, torch.linalg.svdvals(matrix.double()), rtol=1e-9, atol=1e-12)


def test_singular_values_of_a_matrix_of_rank_one_are_one_number() -> None:
    matrix = torch.outer(draw("left", shape=(40,)), draw("right", shape=(30,)))
    assert effective_rank(singular_values(matrix)) == pytest.approx(1, abs=1e-4)


def test_factor_values_are_those_of_the_dense_update(tmp_path: Path) -> None:
    shapes = {"a": (6, 4), "b": (4, 6)}
    adapter = make_adapter(tmp_path / "t", "t", names=("a", "b"), shapes=shapes, transposed=("b",))
    started = make_adapter(tmp_path / "s", "s", names=("a", "b"), shapes=shapes, transposed=("b",))
    for name in shapes:
        for update, expected in (
            (AdapterUpdate(adapter), dense(adapter, name)),
            (AdapterUpdate(adapter, started), dense(adapter, name) - dense(started, name)),
        ):
            full = torch.linalg.svdvals(expected.double())
            found = factor_values(update, name)
            torch.testing.assert_close(found, full[: len(found)], rtol=1e-6, atol=1e-6)


def test_inspect_effective_ranks_by_hand(by_hand: Inspection) -> None:
    shares = (3 / 7, 4 / 7)
    expected = math.exp(-sum(p * math.log(p) for p in shares))
    assert by_hand.layers[1].effective_ranks == (None, pytest.approx(expected))
    assert by_hand.total.effective_ranks == (None, pytest.approx(expected))
    assert by_hand.skipped_ranks == {}


def test_inspect_leaves_out_large_dense_matrices_and_says_so(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = model(base, tmp_path / "large", model__embed__weight=draw("e", shape=(5, 3)))
    found = inspect(open_inputs([large], base), InspectSettings(rank_limit=12))
    assert found.skipped_ranks == {"model.embed.weight": (5, 3)}
    show_inspection(found, as_json=False)
    assert "model.embed.weight 5×3" in capsys.readouterr().out
    without = inspect(open_inputs([large], base), InspectSettings(ranks=False))
    assert without.skipped_ranks == {}
    assert without.total.effective_ranks == (None,)


# ---- what is inspected -----------------------------------------------------------------------------------------------


def peft_adapter(folder: Path, task: str, names: tuple[str, ...]) -> Tensors:
    """An adapter as PEFT saves it, rank 2, scaling 2; returns its dense updates."""
    tensors, updates = {}, {}
    for name in names:
        rows, columns = SHAPES[name]
        a, b = draw(task, name, "A", shape=(2, columns)), draw(task, name, "B", shape=(rows, 2))
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
        updates[name] = 2.0 * (b @ a)
    folder.mkdir(parents=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    write_json(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    return updates


def test_inspect_a_model_and_an_adapter_of_the_same_update_agree(base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.q.weight"
    update = peft_adapter(tmp_path / "adapter", "t", (name,))[name]
    same = model(base, tmp_path / "model", model__layers__0__q__weight=update)
    found = inspect(open_inputs([tmp_path / "adapter", same], base))
    assert found.total.norms == pytest.approx((float(update.norm()),) * 2, rel=1e-5)
    assert found.total.cosines[0][1] == pytest.approx(1)
    assert found.total.sign_conflict == 0
    assert found.total.effective_ranks[0] == pytest.approx(found.total.effective_ranks[1], rel=1e-3)
    assert [part.name for part in found.layers if part.num_changed] == ["model.layers.0"]


def test_inspect_skips_the_dense_model_and_ranks_the_adapter(base: Path, tmp_path: Path) -> None:
    name = "model.layers.0.q.weight"
    update = peft_adapter(tmp_path / "adapter", "t", (name,))[name]
    same = model(base, tmp_path / "model", model__layers__0__q__weight=update)
    found = inspect(open_inputs([tmp_path / "adapter", same], base), InspectSettings(rank_limit=1))
    assert found.total.effective_ranks[0] is not None
    assert found.total.effective_ranks[1] is None
    assert name in found.skipped_ranks


def test_inspect_one_model_that_is_the_base_itself(base: Path, tmp_path: Path) -> None:
    found = inspect(open_inputs([model(base, tmp_path / "same")], base))
    assert (found.total.norms, found.total.num_changed, found.total.kept_share) == ((0,), 0, None)
    json.dumps(found.to_json(), allow_nan=False)


def test_layers_are_named_after_the_first_number() -> None:
    assert layer_of("model.layers.3.mlp.experts.7.w1.weight") == ("model.layers.3", 3)
    assert layer_of("transformer.h.0.attn.weight") == ("transformer.h.0", 0)
    assert layer_of("model.embed_tokens.weight") == ("model.embed_tokens", -1)
    assert layer_of("scale") == ("scale", -1)


def test_layers_come_in_order_and_share_a_short_name(by_hand: Inspection) -> None:
    assert layer_labels(by_hand.layers) == ["layer 0", "layer 1", "layer 10", "model.embed", "model.norm"]


def test_name_models_uses_as_many_parts_as_it_takes(tmp_path: Path) -> None:
    paths = [tmp_path / "math" / "adapter", tmp_path / "code" / "adapter"]
    assert list(name_models(paths)) == ["math/adapter", "code/adapter"]
    assert list(name_models(paths[:1])) == ["adapter"]
    with pytest.raises(ModelError, match="given twice"):
        name_models([paths[0], paths[0]])


# ---- run folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(base: Path, tmp_path: Path) -> Path:
    """Two finished rounds of two tasks, as a run lays them out; task 'b' of round 2 has all its weights."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("tasks: {a: {}, b: {}}\nprotocol: {rounds: 3}\n", "utf-8")
    write_json(run / "environment.json", {"base_model": {"name": "base", "path": str(base)}})
    names = ("model.layers.0.q.weight", "model.layers.1.q.weight")
    for r in (1, 2):
        for task in ("a", "b"):
            place = run / f"round_00{r}" / task
            if (r, task) == (2, "b"):
                tensors = {name: draw("full", name, shape=shape) for name, shape in SHAPES.items()}
                write_tensors(place / "model" / "model.safetensors", tensors)
            else:
                make_adapter(place / "adapter", f"{task}{r}", names=names, shapes=SHAPES)
            write_json(place / "local_update.json", {"task": task})
        merged = {name: draw("merged", r, name, shape=SHAPES[name]) for name in names}
        write_tensors(run / f"round_00{r}" / "task_vector.safetensors", merged)
        write_json(run / f"round_00{r}" / "DONE.json", {"round": r})
    return run


def test_inspect_a_round_measures_from_the_pretrained_model(run_folder: Path, base: Path) -> None:
    found = inspect(open_inputs([run_folder], None))
    assert (found.round_index, found.tasks, found.reference) == (2, ("a", "b"), "pretrained")
    start = Checkpoint(run_folder / "round_001" / "task_vector.safetensors")
    adapter = run_folder / "round_002" / "a" / "adapter"
    a = torch.cat([(start.read(name) + dense(adapter, name)).flatten() for name in start.names])
    b = torch.cat([(draw("full", n, shape=s) - draw("base", n, shape=s)).flatten() for n, s in sorted(SHAPES.items())])
    assert found.total.norms == pytest.approx((float(a.norm()), float(b.norm())), rel=1e-5)
    rank = effective_rank(singular_values(start.read("model.layers.0.q.weight") + dense(adapter, start.names[0])))
    assert found.layers[0].effective_ranks[0] == pytest.approx(rank, rel=1e-4)


def test_inspect_a_round_against_its_start_leaves_the_common_part_out(run_folder: Path) -> None:
    found = inspect(open_round(run_folder, 2, "start"))
    adapter = run_folder / "round_002" / "a" / "adapter"
    expected = torch.cat([dense(adapter, name).flatten() for name in SHAPES if "layers.1." in name or ".0." in name])
    assert found.total.norms[0] == pytest.approx(float(expected.norm()), rel=1e-5)
    (run_folder / "recipe.yaml").write_text("tasks: {a: {}, b: {}}\nmerge: {reference: start}\n", "utf-8")
    assert inspect(open_round(run_folder)).total == found.total


def test_inspect_the_first_round_and_carried_adapters(run_folder: Path) -> None:
    first = inspect(open_inputs([run_folder], None, 1))
    assert first.round_index == 1
    assert first.total.norms[0] > 0
    names = ("model.layers.0.q.weight", "model.layers.1.q.weight")
    carried = make_adapter(run_folder / "round_001" / "carried_adapter", "carried", names=names, shapes=SHAPES)
    adapter = run_folder / "round_002" / "a" / "adapter"
    expected = torch.cat([(dense(adapter, name) - dense(carried, name)).flatten() for name in names])
    found = inspect(open_round(run_folder, 2, "start"))
    assert found.total.norms[0] == pytest.approx(float(expected.norm()), rel=1e-5)


def test_inspect_a_round_whose_adapters_go_on_from_each_tasks_own(run_folder: Path) -> None:
    (run_folder / "recipe.yaml").write_text("tasks: {a: {}, b: {}}\nlocal_update: {adapter_start: own}\n", "utf-8")
    before, after = (run_folder / f"round_00{r}" / "a" / "adapter" for r in (1, 2))
    names = ("model.layers.0.q.weight", "model.layers.1.q.weight")
    expected = torch.cat([(dense(after, name) - dense(before, name)).flatten() for name in names])
    assert inspect(open_round(run_folder, 2, "start")).total.norms[0] == pytest.approx(float(expected.norm()), rel=1e-5)
    # a merge that was taken back: round 2 goes on from what round 1 began with
    write_json(run_folder / "round_001" / "rollback.json", {})
    expected = torch.cat([dense(after, name).flatten() for name in names])
    assert inspect(open_round(run_folder, 2, "start")).total.norms[0] == pytest.approx(float(expected.norm()), rel=1e-5)


def test_inspect_a_round_with_an_expert_that_was_there_before(run_folder: Path, tmp_path: Path) -> None:
    update = peft_adapter(tmp_path / "older", "older", ("model.layers.0.q.weight",))["model.layers.0.q.weight"]
    write_json(run_folder / "round_001" / "a" / "local_update.json", {"expert": str(tmp_path / "older")})
    found = inspect(open_round(run_folder, 1))
    assert found.models["a"] == tmp_path / "older"
    assert found.total.norms[0] == pytest.approx(float(update.norm()), rel=1e-5)


def test_open_round_refuses_what_is_no_finished_round(run_folder: Path, base: Path) -> None:
    with pytest.raises(RunFolderError, match=r"base: not a run folder .* --base"):
        open_round(base)
    with pytest.raises(RunFolderError, match="round 0: rounds count from 1"):
        open_round(run_folder, 0)
    with pytest.raises(RunFolderError, match="round 3, task 'a': no expert there yet"):
        open_round(run_folder, 3)
    with pytest.raises(RunFolderError, match="round 9: round 8 is not finished"):
        open_round(run_folder, 9)
    (run_folder / "round_002" / "a" / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(RunFolderError, match="round 2, task 'a': its expert is gone"):
        open_round(run_folder)
    (run_folder / "round_001" / "DONE.json").unlink()
    with pytest.raises(RunFolderError, match="no round is finished; --round 1"):
        open_round(run_folder)


def test_open_round_refuses_a_damaged_description(run_folder: Path) -> None:
    write_json(run_folder / "environment.json", {})
    with pytest.raises(RunFolderError, match=r"environment\.json: does not say base_model\.path"):
        open_round(run_folder)
    (run_folder / "recipe.yaml").write_text("tasks: 3\n", "utf-8")
    with pytest.raises(RunFolderError, match=r"recipe\.yaml: damaged"):
        open_round(run_folder)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_inspect_refuses_nan_and_names_model_and_tensor(base: Path, tmp_path: Path) -> None:
    broken = model(base, tmp_path / "broken", model__norm__weight=torch.tensor([0.0, math.nan, 0.0, 0.0]))
    with pytest.raises(MergeError, match=r"task 'broken', tensor 'model\.norm\.weight'.*NaN or Inf"):
        inspect(open_inputs([broken], base))


def test_inspect_refuses_nan_in_a_round_and_names_it(run_folder: Path) -> None:
    start = {"model.layers.0.q.weight": torch.full((4, 3), math.inf)}
    write_tensors(run_folder / "round_001" / "task_vector.safetensors", start)
    with pytest.raises(ManyshotError, match=r"run, round 2: task 'a', tensor 'model\.layers\.0\.q\.weight'"):
        inspect(open_round(run_folder))


def test_open_inputs_refuses_what_does_not_go_together(base: Path, run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="--round and --reference start are for run folders"):
        open_inputs([base], base, 2)
    with pytest.raises(ModelError, match="2 paths without --base"):
        open_inputs([base, run_folder], None)
    with pytest.raises(ModelError, match="no model is given"):
        open_inputs([], base)
    with pytest.raises(ModelError, match=r"model 'missing': no such folder"):
        open_inputs([tmp_path / "missing"], base)
    other = write_model(tmp_path / "other", zeros() | {"model.norm.weight": torch.zeros(3)})
    with pytest.raises(ModelError, match=r"model\.norm\.weight.*\(3,\).*\(4,\)"):
        open_models(base, {"other": other})


def test_inspect_settings_refuse_values_out_of_range() -> None:
    for settings in ({"mask_threshold": -0.1}, {"mask_threshold": math.nan}, {"min_agreement": 0}):
        with pytest.raises(RecipeError, match=next(iter(settings))):
            InspectSettings(**settings)  # type: ignore[arg-type]


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_show_inspection_prints_one_json_object(by_hand: Inspection, capsys: pytest.CaptureFixture[str]) -> None:
    show_inspection(by_hand, as_json=True)
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    record = json.loads(output, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["tasks"] == ["x", "y"]
    assert record["total"]["norms"] == {"x": pytest.approx(math.sqrt(33)), "y": pytest.approx(math.sqrt(42))}
    assert record["total"]["pair_sign_conflicts"] == [[0, 0.5], [0.5, 0]]
    assert [layer["name"] for layer in record["layers"]][:2] == ["model.layers.0", "model.layers.1"]
    assert record["layers"][1]["sign_conflict"] is None
    assert (record["run"], record["round"], record["mask_threshold"], record["min_agreement"]) == (None, None, 0.3, 2)


def test_show_inspection_prints_names_as_they_are(
    zero_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        model(zero_base, tmp_path / name, model__norm__weight=torch.tensor(X)) for name in ("[bold]m", "[", "c$d_$")
    ]
    show_inspection(inspect(open_inputs(paths, zero_base)), as_json=False)
    output = capsys.readouterr().out
    assert "[bold]m" in output
    assert "norm: [bold]m" in output
    assert "signs conflict in 0.0% of the 3 coordinates" in output
    assert "keeps 100.0% of the changed coordinates" in output


@needs_matplotlib
@pytest.mark.parametrize("names", [("one",), ("[a]", "c$d_$"), tuple(f"task-number-{i}-of-many" for i in range(11))])
def test_draw_inspection_writes_a_png(zero_base: Path, tmp_path: Path, names: tuple[str, ...]) -> None:
    paths = [model(zero_base, tmp_path / n, model__norm__weight=torch.tensor(X) * (i + 1)) for i, n in enumerate(names)]
    draw_inspection(inspect(open_inputs(paths, zero_base)), tmp_path / "new" / "picture.png")
    content = (tmp_path / "new" / "picture.png").read_bytes()
    assert content.startswith(PNG)
    assert int.from_bytes(content[16:20]) > 1000  # pixels wide
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_draw_inspection_names_the_extra(by_hand: Inspection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_inspect, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'manyshot\[report\]'"):
        show_inspection(by_hand, as_json=True, png=tmp_path / "picture.png")
    assert not (tmp_path / "picture.png").exists()


def test_labels_of_a_picture() -> None:
    assert shorten("short") == "short"
    assert shorten("summarise-a-very-long-name-v2") == "summarise-…ong-name-v2"
    assert len(shorten("x" * 100)) == 22
    assert plain("a$b$") == r"a\$b\$"
