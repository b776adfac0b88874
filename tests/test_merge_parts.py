"""A large merge in parts, each by a process that shares the files: the same bytes, the same report, all or nothing."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from manyshot import round_merge
from manyshot.errors import MergeError, ModelError
from manyshot.merge_report import TileSums
from manyshot.operators import Mean, Metis, OperatorPlan, Ties, TsvM
from manyshot.outer import STATE_NAME, Outer
from manyshot.progress import Progress
from manyshot.round_merge import MergePart, cut_names, merge_part, merge_weights
from manyshot.task_vector import AdapterUpdate, StoredTaskVector
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint, TensorInfo
from merge_helpers import draw, make_adapter, write_model

SHAPES = {"a.weight": (6, 4), "b.weight": (4, 6), "c.weight": (5, 5), "d.weight": (3, 7)}
TASKS = ("x", "y", "z")
WEIGHTS = (0.5, 0.3, 0.2)
MIXED = OperatorPlan(Ties(density=0.5, trim_scope="model"), (("c.*", Mean()), ("d.*", TsvM())))


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(round_merge, "PART_BYTES", 150)  # one matrix or two
    return write_model(tmp_path / "base", {name: draw("base", name, shape=shape) for name, shape in SHAPES.items()})


@pytest.fixture
def merge(base: Checkpoint, tmp_path: Path) -> Callable[..., round_merge.MergeReport]:
    """merge(plan, outer, output): the merge of three adapters, from a start of two tensors."""
    write_tensors(
        tmp_path / "start.safetensors", {n: draw("start", n, shape=SHAPES[n]) for n in ("a.weight", "d.weight")}
    )
    adapters = [make_adapter(tmp_path / task, task, names=tuple(SHAPES), shapes=SHAPES) for task in TASKS]

    def merged(plan: OperatorPlan, outer: Outer, output: Path, elsewhere: round_merge.Elsewhere | None = None):
        start, updates = StoredTaskVector(tmp_path / "start.safetensors"), [AdapterUpdate(one) for one in adapters]
        sources, reference = (base, start, TASKS, updates), "pretrained" if outer.plain else "start"
        outer = replace(outer, leaves=output.parent / STATE_NAME) if outer.optimizer == "adam" else outer
        output.parent.mkdir(exist_ok=True)
        return merge_weights(*sources, plan, WEIGHTS, output, reference=reference, outer=outer, elsewhere=elsewhere)

    return merged


def in_turn(parts: list[MergePart]) -> list[list[TileSums]]:
    """Each part as another process gets it; the last one first, and the first one twice, as after a kill."""
    sent = [pickle.loads(pickle.dumps(part)) for part in parts]
    merge_part(sent[0], Progress())
    return [merge_part(part, Progress()) for part in reversed(sent)][::-1]


@pytest.mark.parametrize(
    ("plan", "outer", "count"),
    [
        (OperatorPlan(Metis()), Outer(), 4),
        (OperatorPlan(Metis(rescale="norm")), Outer(), 4),
        (MIXED, Outer(), 3),
        (OperatorPlan(Mean()), Outer(1e-3, optimizer="adam"), 4),
    ],
    ids=["metis", "norm", "ties of all, mean, tsv_m", "adam"],
)
def test_merge_in_parts_gives_the_bytes_and_the_report_of_the_whole(
    merge: Callable[..., round_merge.MergeReport], tmp_path: Path, plan: OperatorPlan, outer: Outer, count: int
) -> None:
    whole, given = tmp_path / "whole" / "v.safetensors", list[MergePart]()

    def elsewhere(parts: list[MergePart]) -> list[list[TileSums]]:
        given.extend(parts)
        return in_turn(parts)

    alone = merge(plan, outer, whole)
    parted = merge(plan, outer, tmp_path / "parts" / "v.safetensors", elsewhere)
    assert [part.label for part in given] == [f"merge, part {i} of {count}" for i in range(1, count + 1)]
    assert parted.to_json() == alone.to_json()
    files = sorted(file.name for file in whole.parent.iterdir())
    assert files == sorted(file.name for file in (tmp_path / "parts").iterdir())
    for name in files:
        assert (whole.parent / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_merge_in_parts_leaves_nothing_where_one_fails(
    merge: Callable[..., round_merge.MergeReport], tmp_path: Path
) -> None:
    def elsewhere(parts: list[MergePart]) -> list[list[TileSums]]:
        in_turn(parts[:1])
        raise MergeError("tensor 'b.weight': its node is gone")

    with pytest.raises(MergeError, match="its node is gone"):
        merge(OperatorPlan(Metis()), Outer(), tmp_path / "parts" / "v.safetensors", elsewhere)
    assert list((tmp_path / "parts").iterdir()) == []


def test_merge_of_one_part_stays_here(merge: Callable[..., round_merge.MergeReport], tmp_path: Path) -> None:
    def elsewhere(parts: list[MergePart]) -> list[list[TileSums]]:
        raise AssertionError("sent away")

    # all tensors are looked at together
    output = tmp_path / "one" / "v.safetensors"
    merge(OperatorPlan(Ties(density=0.5, trim_scope="model")), Outer(), output, elsewhere)
    assert output.is_file()


def test_cut_names_keeps_together_what_is_looked_at_together(base: Checkpoint) -> None:
    infos = {name: TensorInfo(shape, "F32") for name, shape in SHAPES.items()}
    assert cut_names(infos, OperatorPlan(Mean()), 3) == [[name] for name in SHAPES]
    assert cut_names(infos, MIXED, 3) == [["c.weight"], ["d.weight"], ["a.weight", "b.weight"]]


def test_a_part_that_is_not_all_written_is_an_error(base: Checkpoint, tmp_path: Path) -> None:
    infos = {"a.weight": TensorInfo((6, 4), "F32"), "b.weight": TensorInfo((4, 6), "F32")}
    file = tmp_path / "v.safetensors"
    round_merge.start_files({file: infos})
    with (
        pytest.raises(ModelError, match=r"'b\.weight': 24 entries were never written"),
        round_merge.PositionedWriter({file: infos}, only={"b.weight"}),
    ):
        pass
