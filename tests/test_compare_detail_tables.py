"""What stands behind the paper's tables: every number by hand, and results whose keys a JSON file has sorted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from compare_table_helpers import TASKS, add_shares, close, make_results, need, pick
from manyshot.compare_detail_tables import (
    dynamics,
    dynamics_tasks,
    paired,
    per_task_losses,
    per_task_normalized,
    per_task_scores,
    settings_text,
    steps,
    tuning,
    tuning_candidates,
)
from manyshot.compare_grid import Grid
from manyshot.compare_outputs import TABLES
from manyshot.compare_render import csv_text
from manyshot.compare_statistics import Estimate


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def grid(results: dict[str, Any]) -> Grid:
    return Grid(results)


def test_per_task_scores_by_hand(grid: Grid) -> None:
    table = need(per_task_scores(grid))
    close(pick(table, "small", "four", "TIES", "post-hoc")["instruction"], 0.3, 0, 2)
    close(pick(table, "small", "four", "Experts, each on its own task")["math"], fmean([0.4, 0, 0.4]), 2 / 15, 3)
    close(pick(table, "large", "four", "Pretrained model")["safety"], 0.1, 0, 3)
    row = pick(table, "small", "seven", "METIS", "many-shot")
    close(row["reading"], 0.5, None, 1)
    assert pick(table, "small", "four", "METIS", "many-shot")["reading"] == ""  # no task of this set
    assert "math: exact_match, 10 examples" in table.caption


def test_per_task_losses_by_hand(grid: Grid) -> None:
    row = pick(per_task_losses(grid), "large", "four", "Mean", "post-hoc")
    close(row["m_arc"], 2.1, 0.1 / 3**0.5, 3)


def test_per_task_normalized_has_no_value_where_the_expert_scores_nothing(grid: Grid) -> None:
    table = need(per_task_normalized(grid))
    close(pick(table, "small", "four", "METIS", "many-shot")["math"], 1, 0, 2)
    assert "small, four, seed 1: the expert scores 0 on math" in "\n".join(table.notes)
    assert "Experts, each on its own task" not in [row.cells[2] for row in table.rows]


def test_paired_compares_protocols_and_the_full_method_with_all_others(grid: Grid) -> None:
    table = need(paired(grid))
    assert [row.cells[1:3] for row in table.rows if row.cells[0] == "large"] == [
        ("Task Arithmetic, many-shot", "Task Arithmetic, post-hoc"),
        ("TIES, many-shot", "TIES, post-hoc"),
        ("Mean, many-shot", "Mean, post-hoc"),
        ("METIS, many-shot", "METIS, post-hoc"),
        ("METIS, many-shot", "Task Arithmetic, many-shot"),
        ("METIS, many-shot", "TIES, many-shot"),
        ("METIS, many-shot", "Mean, many-shot"),
        ("METIS, many-shot", "Joint fine-tuning"),
    ]


def test_paired_by_hand(grid: Grid) -> None:
    row = pick(paired(grid), "large", "METIS, many-shot", "Joint fine-tuning")
    assert row["difference"] == pytest.approx(-(1 / 5) / 4)  # 5 instead of 6 of m_arc
    assert (row["seeds"], row["scores"]) == (3, 3 * 4 * 10)
    close(row["loss_difference"], 0.25, 0, 3)
    row = pick(paired(grid), "small", "TIES, many-shot", "TIES, post-hoc")
    assert (row["seeds"], row["scores"]) == (1, 40)  # seed 0 alone has both
    assert isinstance(row["loss_difference"], Estimate)
    assert row["loss_difference"].wanted == 3


def test_tuning_says_what_was_tried_and_what_was_chosen(grid: Grid) -> None:
    table = need(tuning(grid))
    row = pick(table, "small", "TIES", "many-shot")
    assert (row["tried"], row["not_finished"], row["seeds"]) == (3, 1, "0")
    assert (row["by"], row["chosen_value"], row["worst_value"]) == ("multi task loss", 1.5, 1.75)
    assert row["train_steps"] == 60
    assert pick(table, "small", "TIES", "post-hoc")["tried"] == ""
    assert "METIS without mask" in [row.cells[1] for row in table.rows]


def test_tuning_candidates_mark_the_chosen_one(grid: Grid, results: dict[str, Any]) -> None:
    rows = need(tuning_candidates(grid)).rows
    assert [row.cells[3:] for row in rows] == [
        ("density 0.1, scaling 1.0", 1.75, None, None, ""),
        ("density 0.2, scaling 1.0", 1.5, None, None, "yes"),
        ("density 0.4, scaling 1.0", None, None, None, ""),
    ]
    results["tuning"][0] |= {"chosen": None}
    assert {row.cells[7] for row in need(tuning_candidates(Grid(results))).rows} == {""}
    assert pick(tuning(Grid(results)), "small", "TIES", "many-shot")["chosen_value"] is None
    assert tuning_candidates(Grid(results | {"tuning": []})) is None


def test_settings_text_leaves_out_what_is_not_in_use() -> None:
    assert settings_text({"scaling": 1.0, "mask": True, "gap": "absolute", "other": None}) == (
        "gap absolute, mask true, scaling 1.0"
    )
    assert settings_text({}) == "none"


def test_steps_by_hand(grid: Grid) -> None:
    cells = dict(row.cells for row in need(steps(grid)).rows)
    assert cells["many shot"] == 4000
    assert (cells["all, shared"], cells["every cell on its own"]) == (7400, 19000)
    assert cells["saved: times as many"] == pytest.approx(2.5676, abs=1e-4)


def test_dynamics_by_hand(grid: Grid) -> None:
    table = need(dynamics(grid))
    row = pick(table, "large", "METIS", "many-shot", "2")
    close(row["validation_loss"], fmean([1.5 + 0.1 + 0.01 * seed for seed in (0, 1, 2)]), 0.01 / 3**0.5, 3)
    close(row["drift"], fmean([0.5, 0.55, 0.6, 0.65]), 0, 3)
    close(row["distance"], 0.8 + 0.05, 0, 3)
    close(row["cosine"], 0.2, 0, 3)  # the ones of the diagonal are no pairs
    close(row["kept_share"], 0.6, 0, 3)
    assert not [row for row in table.rows if row.cells[1] == "Joint fine-tuning"]


def test_dynamics_without_cosines_shows_none(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        for entry in cell.get("rounds", []):
            entry["cosines"] = None
    row = pick(dynamics(Grid(results)), "large", "METIS", "many-shot", "2")
    assert row["cosine"].mean is None


def test_dynamics_tasks_by_hand(grid: Grid) -> None:
    row = pick(dynamics_tasks(grid), "small", "METIS", "many-shot", "3", "safety")
    close(row["validation_loss"], 1.3, 0, 3)
    close(row["weight"], 7 / 16, 0, 3)
    close(row["loss_gap"], 1 / 3 - 0.3, 0, 3)
    close(row["drift"], 1 / 3 + 0.15, 0, 3)
    close(row["cosine"], 0.3, 0, 3)


def test_tables_keep_the_order_of_the_recipe_when_a_file_sorts_keys(results: dict[str, Any]) -> None:
    keys = ("methods", "task_sets", "categories")
    add_shares(results)["task_sets"]["seven"]["against"] = "four"
    results["order"] = {key: list(results[key]) for key in keys}
    assert any(results["order"][key] != sorted(results["order"][key]) for key in keys)
    reread = json.loads(json.dumps(results, sort_keys=True))
    for name, make in TABLES.items():
        if name != "steps":  # whose parts have no order
            assert csv_text(need(make(Grid(reread)))) == csv_text(need(make(Grid(results)))), name


def test_tables_of_tasks_follow_the_order_of_the_set(grid: Grid) -> None:
    names = [column.name for column in need(per_task_scores(grid)).columns]
    assert names[4:8] == list(TASKS)


def test_docs_name_every_table() -> None:
    text = (Path(__file__).parent.parent / "docs" / "compare_tables.md").read_text("utf-8")
    section = text[text.index("## Tables\n") : text.index("## What is missing")]
    assert set(re.findall("`([a-z_0-9]+)`", section)) == set(TABLES)
