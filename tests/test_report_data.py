"""Numbers of a report by hand: intervals, shares, layers, costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyshot.report_data import Model, Score, beside_experts, example_score, interval, number
from manyshot.report_read import kept_by_layer, read_cosines
from manyshot.report_resources import disk_use, read_phases, seconds_in_all


def test_interval_of_right_and_wrong_is_wilsons() -> None:
    # 8 of 10: (0.8 + 1.92073/10 ± 1.95996 √(0.016 + 3.84146/400)) / 1.384146, and √(0.2·0.8/9) is its standard error
    low, high = interval(0.8, (0.16 / 9) ** 0.5, 10)
    assert low == pytest.approx(0.4902, abs=1e-4)
    assert high == pytest.approx(0.9433, abs=1e-4)


@pytest.mark.parametrize(("score", "low", "high"), [(0.0, 0.0, 0.0741), (1.0, 0.9259, 1.0)])
def test_interval_of_none_or_all_right_is_not_empty(score: float, low: float, high: float) -> None:
    assert interval(score, 0.0, 48) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_interval_of_scores_in_between_is_that_of_the_mean() -> None:
    assert interval(0.5, 0.1, 20) == (pytest.approx(0.304, abs=1e-3), pytest.approx(0.696, abs=1e-3))
    assert interval(0.95, 0.045, 20)[1] == 1.0


@pytest.mark.parametrize("found", [(None, 0.1, 20), (0.5, None, 1), (0.5, None, 20)])
def test_interval_needs_a_score_and_two_examples(found: tuple[float | None, float | None, int]) -> None:
    assert interval(*found) == (None, None)


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), 10**400, [1]])
def test_number_is_finite_or_not_there(value: object) -> None:
    assert number(value) is None


def test_example_score_of_something_else_is_none() -> None:
    assert example_score({"metric": "exact_match"}) is None
    assert example_score([1]) is None
    assert example_score({"score": float("nan")}) == Score("", None, None, 0)


def model(role: str, losses: dict[str, float | None], scores: dict[str, float | None]) -> Model:
    return Model(role, role, dict(losses), {task: Score("m", one, None, 9) for task, one in scores.items()})  # type: ignore[arg-type]


def test_beside_experts_divides_scores_and_gains() -> None:
    pretrained = model("pretrained", {"a": 4.0, "b": 2.0, "c": 1.0}, {"a": 0.1, "b": 0.0, "c": 0.1})
    experts = model("experts", {"a": 2.0, "b": 1.0, "c": 1.0}, {"a": 0.8, "b": 0.0, "c": 0.4})
    found = beside_experts(model("merged", {"a": 2.5, "b": 2.0, "c": None}, {"a": 0.6, "b": 0.5}), pretrained, experts)
    assert found.normalized is not None and found.gain is not None
    assert found.normalized.tasks == {"a": pytest.approx(0.75), "b": None, "c": None}  # 0 of an expert is no measure
    assert (found.normalized.average, found.normalized.worst_task) == (pytest.approx(0.75), "a")
    assert found.gain.tasks == {"a": 0.75, "b": 0.0, "c": None}
    assert found.gain.average == 0.375
    assert found.multi_task_loss is None


def test_kept_by_layer_is_a_mean_in_the_order_of_layers() -> None:
    found = kept_by_layer(
        {
            "model.layers.10.mlp.experts.3.up_proj.weight": 0.5,
            "model.layers.2.q_proj.weight": 0.2,
            "model.layers.2.k_proj.weight": 0.4,
            "lm_head.weight": 1.0,
            "model.layers.3.q_proj.weight": "no number",
        }
    )
    assert found == {"lm_head": 1.0, "2": pytest.approx(0.3), "10": 0.5}
    assert list(found) == ["lm_head", "2", "10"]


def test_kept_by_layer_keeps_two_stacks_apart() -> None:
    found = kept_by_layer({"vision.blocks.0.w.weight": 0.1, "text.layers.0.w.weight": 0.3})
    assert found == {"text.layers.0": 0.3, "vision.blocks.0": 0.1}


@pytest.mark.parametrize("merge", [{}, {"tasks": ["a"], "task_vector_cosines": [[1.0], [1.0]]}, {"tasks": "a"}])
def test_read_cosines_of_anything_else_are_none(merge: dict[str, object]) -> None:
    assert read_cosines(merge) == {}


def test_costs_are_summed_by_phase_and_pauses_do_not_count(tmp_path: Path) -> None:
    lines = [
        {"kind": "begin", "began": 100.0, "time": 101.0},
        {"kind": "phase", "phase": "save", "seconds": 1.0, "time": 105.0, "memory": 7},
        {"kind": "phase", "phase": "local_update", "seconds": 4.0, "tokens": 10, "time": 110.0, "memory": 5},
        {"kind": "begin", "began": 900.0, "time": 901.0},
        {"kind": "advance", "phase": "local_update", "time": 902.0},
        {"kind": "phase", "phase": "local_update", "seconds": 6.0, "tokens": 30, "time": 907.0, "memory": 9},
        {"kind": "phase", "phase": "of_a_newer_version", "seconds": "?", "time": 908.0},
    ]
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"kind": "phase", "pha', "utf-8")
    training, saving, other = read_phases([metrics])
    assert (training.name, training.seconds, training.tokens, training.count) == ("training", 10.0, 40, 2)
    assert (training.memory, saving.memory, saving.tokens) == (9, 7, None)
    assert (other.name, other.seconds) == ("of a newer version", 0.0)
    assert seconds_in_all(metrics) == 10.0 + 8.0
    assert seconds_in_all(tmp_path / "missing.jsonl") is None


def test_disk_use_tells_what_is_what_and_follows_no_link(tmp_path: Path) -> None:
    for name, size in {
        "round_001/merged/model.safetensors": 50,
        "round_001/a/adapter/x.safetensors": 20,
        "x.json": 3,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * size)
    (tmp_path / "merged").symlink_to("round_001/merged")
    (tmp_path / "report.html").write_bytes(b"0" * 999)
    assert disk_use(tmp_path) == {"merged models": 50, "adapters": 20, "records": 3}
