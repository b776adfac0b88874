"""The share of the gain kept: by hand, with its intervals, and what a bad task costs the others."""

from __future__ import annotations

import random
from statistics import fmean, stdev
from typing import Any

import pytest

from compare_table_helpers import MODELS, SEEDS, TASKS, add_shares, close, make_results, need, pick, told
from manyshot.compare_detail_tables import per_task_shares, tuning
from manyshot.compare_gain import example_losses, share, shares
from manyshot.compare_gain_tables import bad_tasks, share_kept
from manyshot.compare_grid import Grid, Group
from manyshot.compare_render import markdown
from manyshot.gap_weights import SMALLEST_GAIN


@pytest.fixture
def results() -> dict[str, Any]:
    return add_shares(make_results())


# ---- numbers ---------------------------------------------------------------------------------------------------------


def test_share_is_the_part_of_the_gain() -> None:
    assert share(3.0, 1.5, 1.0) == 0.75
    assert share(3.0, 3.5, 1.0) == -0.25
    assert share(3.0, 0.5, 1.0) == 1.25


def test_share_is_not_defined_where_the_expert_gained_nothing_whatever_the_scale() -> None:
    for scale in (1.0, 100.0):
        assert share(2.0 * scale, 1.0 * scale, 2.0 * scale * (1 - 0.999 * SMALLEST_GAIN)) is None
        assert share(2.0 * scale, 1.0 * scale, 2.5 * scale) is None
        assert share(2.0 * scale, 1.0 * scale, 1.9 * scale) == pytest.approx(10)


def test_shares_leave_what_is_not_defined_out_of_the_mean() -> None:
    found = shares({"a": 2.0, "b": 2.0, "c": 2.0}, {"a": 1.5, "b": 1.0, "c": 1.75}, {"a": 1.0, "b": 2.0, "c": 1.0})
    assert found["tasks"] == {"a": 0.5, "b": None, "c": 0.25}
    assert (found["average"], found["worst"], found["worst_task"]) == (0.375, 0.25, "c")
    assert shares({"a": None}, {"a": 1.0}, {"a": 1.0})["average"] is None


def test_example_losses_have_the_loss_as_their_mean() -> None:
    said = [told(4.0, 2), told(9.0, 10), told(1.0, 1)]
    found = example_losses(said)
    assert found is not None
    assert fmean(found) == pytest.approx(14 / 13)
    assert example_losses([*said, {"score": 1.0}]) is None
    assert example_losses([]) is None


def test_example_losses_vary_as_the_loss_of_drawn_examples_does() -> None:
    rng = random.Random(0)
    said = [told(rng.uniform(0.5, 1.5) * tokens, tokens) for tokens in (rng.randint(1, 60) for _ in range(40))]
    contributions = example_losses(said)
    assert contributions is not None
    drawn = [rng.choices(range(40), k=40) for _ in range(4000)]
    exact = [sum(said[i]["nats"] for i in draw) / sum(said[i]["num_tokens"] for i in draw) for draw in drawn]
    linear = [fmean(contributions[i] for i in draw) for draw in drawn]
    assert stdev(linear) == pytest.approx(stdev(exact), rel=0.1)
    # a mean over examples that forgets how long they are would say three times as much
    assert stdev(fmean(said[i]["nats"] for i in draw) for draw in drawn) > 3 * stdev(exact)


# ---- the table of shares ---------------------------------------------------------------------------------------------


def test_share_kept_by_hand(results: dict[str, Any]) -> None:
    table = need(share_kept(Grid(results)))
    row = pick(table, "large", "four", "METIS", "many-shot")
    # shares 1, 0.9, 0.8, 0.9; in seed 1 the first is 0.9
    averages = [0.9, 0.875, 0.9]
    close(row["average"], fmean(averages), stdev(averages) / 3**0.5, 3)
    close(row["worst"], 0.8, 0, 3)
    assert row["worst_tasks"] == TASKS[2]
    close(row["joint_average"], fmean(averages) / 0.95, stdev(averages) / 0.95 / 3**0.5, 3)
    # the mean keeps 0.8, 0.8, 0.6, 0.8, and in seed 1 0.7 of the first
    assert row["difference"] == pytest.approx(0.15)
    close(row["worst_difference"], 0.2, 0, 3)
    joint = pick(table, "large", "four", "Joint fine-tuning", "joint")
    assert (joint["joint_average"], joint["difference"]) == ("", pytest.approx(0.225))
    own = pick(table, "large", "four", "Mean", "many-shot")
    assert (own["difference"], own["low"], own["worst_difference"]) == ("", "", "")


def test_share_kept_has_an_interval_of_seeds_and_examples(results: dict[str, Any]) -> None:
    """Two examples, the second three times as long, and all of whose tokens lose alike: there is no spread in them."""
    row = pick(share_kept(Grid(results)), "large", "four", "METIS", "many-shot")
    assert row["low"] == pytest.approx(row["high"]) == pytest.approx(0.15)
    for cell in results["cells"]:
        if (cell["model"], cell["method"], cell["seed"]) == ("large", "metis", 0) and cell["status"] == "done":
            said = [told(2.0, 5), told(15 * 1.2, 15)]  # an easy example, beside one that is as before
            cell["example_losses"][TASKS[1]] = example_losses(said)
    grid = Grid(results)
    first, second = (Group("large", "four", method, "many_shot") for method in ("metis", "mean"))
    found = grid.compare_shares(first, second)
    assert found.low is not None
    assert found.high is not None
    assert found.difference is not None
    assert found.low < found.difference < found.high
    assert (found.num_seeds, found.num_scores) == (3, 3 * 4 * 2)
    assert grid.compare_shares(first, second) == found  # the same draws


def test_share_kept_of_older_measurements_has_no_interval_and_says_so() -> None:
    table = need(share_kept(Grid(add_shares(make_results(), examples=False))))
    row = pick(table, "large", "four", "METIS", "many-shot")
    assert (row["difference"], row["low"], row["high"]) == (pytest.approx(0.15), None, None)
    assert "large, four: METIS, many-shot: was measured before losses of examples were kept" in "\n".join(table.notes)


def test_share_kept_names_the_expert_that_gained_nothing(results: dict[str, Any]) -> None:
    for reference in results["references"]:
        if (reference["model"], reference["seed"]) == ("large", 2):
            reference["experts"]["losses"] = reference["experts"]["losses"] | {"math": 2.99}
    table = need(share_kept(Grid(results)))
    (note,) = [note for note in table.notes if "math" in note and "gains" in note]
    assert note.startswith("large, four, seed 2: the expert of math gains 0.01 on a loss of 3, no more than 1%")


def test_share_kept_without_a_mean_has_no_differences(results: dict[str, Any]) -> None:
    table = need(share_kept(Grid(results | {"baseline": None})))
    assert {row.cells[9] for row in table.rows} == {""}
    assert "reference row, of which there is none" in table.caption


def test_results_without_shares_have_none_of_these_tables() -> None:
    grid = Grid(make_results())
    assert share_kept(grid) is None
    assert per_task_shares(grid) is None
    assert bad_tasks(grid) is None


def test_per_task_shares_has_neither_pretrained_model_nor_experts(results: dict[str, Any]) -> None:
    table = need(per_task_shares(Grid(results)))
    close(pick(table, "large", "four", "METIS", "many-shot")["math"], 0.9, 0, 3)
    assert not any(row.reference for row in table.rows)
    assert "| math |" in markdown(table)


# ---- what a bad task costs -------------------------------------------------------------------------------------------


def test_bad_tasks_cost_the_others_by_hand(results: dict[str, Any]) -> None:
    """`seven` has the four tasks of `four`, one by another name, and METIS keeps less of one there."""
    results["task_sets"]["seven"]["against"] = "four"
    both = [task for task in results["task_sets"]["seven"]["tasks"] if task in TASKS]
    for cell in results["cells"]:
        if cell["task_set"] == "seven" and cell["status"] == "done" and cell["method"] == "metis":
            cell["share"]["tasks"] |= {"math": 0.5}
    table = need(bad_tasks(Grid(results)))
    row = pick(table, "small", "seven", "METIS", "many-shot")
    clean, stressed = {"instruction": 1.0, "math": 0.9, "m_arc": 0.8, "safety": 0.9}, {"math": 0.5}
    stressed = clean | stressed
    close(row["without"], fmean(clean[task] for task in both), None, 1)
    close(row["with"], fmean(stressed[task] for task in both), None, 1)
    close(row["cost"], 0.4 / len(both), None, 1)
    close(row["most"], 0.4, None, 1)
    assert row["which"] == "math"
    assert "seven: four with code, science, reading" in table.caption


def test_bad_tasks_leave_out_what_has_no_share_in_both(results: dict[str, Any]) -> None:
    results["task_sets"]["seven"]["against"] = "four"
    for cell in results["cells"]:
        if cell["task_set"] == "seven" and cell.get("share"):
            cell["share"]["tasks"] |= {"math": None}
    row = pick(bad_tasks(Grid(results)), "small", "seven", "METIS", "many-shot")
    close(row["without"], (1.0 + 0.8 + 0.9) / 3, None, 1)
    close(row["cost"], 0, None, 1)


# ---- the choice by shares --------------------------------------------------------------------------------------------


def test_tuning_shows_the_number_that_decided(results: dict[str, Any]) -> None:
    (entry,) = results["tuning"]
    entry |= {"choose_by": "worst_share", "chosen": 0}
    for candidate, worst in zip(entry["candidates"], (0.75, 0.5, None), strict=True):
        candidate |= {"validation_share": 0.9, "worst_validation_share": worst}
    row = pick(tuning(Grid(results)), "small", "TIES", "many-shot")
    assert (row["by"], row["chosen_value"], row["worst_value"]) == ("worst share", 0.75, 0.5)
    assert (row["tried"], row["not_finished"]) == (3, 1)


def test_helpers_have_the_seeds_and_models_that_these_tests_speak_of() -> None:
    assert (MODELS, SEEDS) == (("small", "large"), (0, 1, 2))
