"""The paper's tables from results made by hand: every number, what is missing, and the three texts."""

from __future__ import annotations

import copy
import csv
import io
import math
import re
from statistics import fmean, stdev
from typing import Any

import pytest
from markdown_it import MarkdownIt

from compare_table_helpers import close, make_results, need, pick, unmade
from manyshot.compare_grid import Grid
from manyshot.compare_render import (
    Column,
    Row,
    Table,
    csv_text,
    escape_latex,
    escape_markdown,
    format_number,
    latex,
    markdown,
    rank,
)
from manyshot.compare_statistics import Estimate
from manyshot.compare_tables import ablation, table_1, table_2, table_3, table_4, table_5
from manyshot.errors import RunFolderError

HOSTILE = "<b>a|b</b> &_% $x$ \\n ~^{#} *y* `z` [q](u)"


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def grid(results: dict[str, Any]) -> Grid:
    return Grid(results)


# ---- Table 1 ---------------------------------------------------------------------------------------------------------


def test_table_1_by_hand(grid: Grid) -> None:
    row = pick(table_1(grid), "small", "Task Arithmetic")
    # losses 2.0, 2.1, 2.2: deviations ±0.1, standard error 0.1/√3
    close(row["loss_post_hoc"], 2.1, 0.1 / math.sqrt(3), 3)
    close(row["loss_many_shot"], 1.6, 0.1 / math.sqrt(3), 3)
    close(row["loss_difference"], -0.5, 0, 3)
    # 2, 1, 4, 3 of ten over experts of 5, 4, 5, 5; in seed 1 the expert of math scores 0
    whole, without = fmean([2 / 5, 1 / 4, 4 / 5, 3 / 5]), fmean([2 / 5, 4 / 5, 3 / 5])
    close(
        row["normalized_post_hoc"],
        fmean([whole, without, whole]),
        stdev([whole, without, whole]) / math.sqrt(3),
        3,
    )
    after = [fmean([4 / 5, 2 / 4, 5 / 5, 3 / 5]), fmean([4 / 5, 5 / 5, 3 / 5])]
    close(
        row["normalized_difference"],
        fmean([after[0] - whole, after[1] - without, after[0] - whole]),
        stdev([after[0] - whole, after[1] - without, after[0] - whole]) / math.sqrt(3),
        3,
    )


def test_table_1_names_what_is_missing_and_marks_its_means(grid: Grid) -> None:
    table = need(table_1(grid))
    row = pick(table, "small", "TIES")
    close(row["loss_post_hoc"], 2.05, 0.05, 2)
    close(row["loss_many_shot"], 1.6, 0.1, 2)
    close(row["loss_difference"], -0.5, None, 1)  # seed 0 alone has both
    text = markdown(table)
    assert "| 2.050 ± 0.050† | 1.600 ± 0.100† | −0.500† |" in text
    assert "small, four, seed 2 is missing for TIES, post-hoc." in text
    assert "TIES, many-shot, seed 1 failed (out of memory in round 2)" in text
    assert "small, four, seed 1: the expert scores 0 on math" in text
    assert "large, four, seed 1" not in text


def test_table_1_says_what_joint_training_and_no_training_reach(grid: Grid) -> None:
    notes = need(table_1(grid)).notes
    assert notes[0] == (
        "small, multi-task loss without merging: pretrained model 3.000 ± 0.000; experts, each on its own task "
        "1.000 ± 0.000; Joint fine-tuning 1.350 ± 0.058."
    )


def test_table_1_has_no_ablations_and_every_operator(grid: Grid) -> None:
    labels = [row.cells[1] for row in need(table_1(grid)).rows]
    assert labels == ["Task Arithmetic", "TIES", "Mean", "METIS"] * 2


def test_table_1_without_a_method_both_ways_is_no_table(results: dict[str, Any]) -> None:
    results["cells"] = [cell for cell in results["cells"] if cell["protocol"] != "post_hoc"]
    assert table_1(Grid(results)) is None


def test_table_1_of_one_seed_has_no_errors(results: dict[str, Any]) -> None:
    results["task_sets"]["four"]["seeds"] = [0]
    for key in ("cells", "references"):
        results[key] = [entry for entry in results[key] if entry["seed"] == 0]
    table = need(table_1(Grid(results)))
    assert "one seed, so no standard error" in table.caption
    assert "±" not in markdown(table)
    assert "†" not in markdown(table)


def test_table_1_does_not_hide_a_loss_that_is_not_finite(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        if (cell["model"], cell["method"], cell["protocol"], cell["seed"]) == ("large", "mean", "many_shot", 1):
            cell["multi_task_loss"] = None
    table = need(table_1(Grid(results)))
    close(pick(table, "large", "Mean")["loss_many_shot"], 1.6, 0.1, 2)
    assert "large, four: Mean, many-shot, seed 1: its loss is not a finite number." in table.notes


def test_table_1_of_cells_that_all_failed_shows_dashes(results: dict[str, Any]) -> None:
    results["cells"] = [unmade(cell, "failed", "no disk") for cell in results["cells"]]
    text = markdown(need(table_1(Grid(results))))
    assert "| small | Task Arithmetic | – | – | – | – | – | – |" in text


# ---- Tables 2 to 5, ablation -----------------------------------------------------------------------------------------


def test_table_2_by_hand(grid: Grid) -> None:
    table = need(table_2(grid))
    names = [column.name for column in table.columns]
    assert names == ["model", "method", "protocol", "multilingual", "following", "math", "average"]
    row = pick(table, "small", "METIS", "many-shot")
    close(row["following"], fmean([5 / 5, 6 / 5]), 0, 3)
    close(row["math"], 4 / 4, 0, 2)  # no ratio in seed 1
    # the average is that of four tasks, not of three categories
    close(pick(table, "large", "METIS", "many-shot")["average"], fmean([5 / 5, 4 / 4, 5 / 5, 6 / 5]), 0, 3)


def test_table_2_marks_best_and_second_per_model(grid: Grid) -> None:
    table = need(table_2(grid))
    marks, place = rank(table), [column.name for column in table.columns].index("average")
    found = {(*table.rows[i].cells[:3], mark) for (i, column), mark in marks.items() if column == place}
    assert found == {
        (model, label, protocol, mark)
        for model in ("small", "large")
        for label, protocol, mark in (("Joint fine-tuning", "joint", "best"), ("METIS", "many-shot", "second"))
    }


def test_table_2_without_categories_has_every_task(results: dict[str, Any]) -> None:
    results["categories"] = {}
    names = [column.name for column in need(table_2(Grid(results))).columns]
    assert names[3:] == ["instruction", "math", "m_arc", "safety", "average"]


def test_table_3_by_hand(grid: Grid) -> None:
    row = pick(table_3(grid), "small", "Task Arithmetic", "post-hoc")
    # worst: math 1/4, instruction 2/5 where math has no ratio, math
    close(row["worst"], fmean([0.25, 0.4, 0.25]), stdev([0.25, 0.4, 0.25]) / math.sqrt(3), 3)
    whole, without = fmean([2 / 5, 1 / 4, 4 / 5, 3 / 5]), fmean([2 / 5, 4 / 5, 3 / 5])
    drops = [whole - 0.25, without - 0.4, whole - 0.25]
    close(row["drop"], fmean(drops), stdev(drops) / math.sqrt(3), 3)
    assert row["worst_tasks"] == "math (2), instruction (1)"


def test_table_3_shows_no_infinity_where_no_expert_scores(results: dict[str, Any]) -> None:
    nothing = {"tasks": dict.fromkeys(("instruction", "math", "m_arc", "safety")), "worst_task": None}
    for cell in results["cells"]:
        if cell["status"] == "done" and cell["model"] == "small":
            cell["normalized"] = nothing | dict.fromkeys(("average", "worst", "drop"))
    table = need(table_3(Grid(results)))
    assert "| small | METIS | many-shot | – | – | – |  |" not in markdown(table)  # a repeated model is left empty
    assert "|  |  | many-shot | – | – | – |  |" in markdown(table)
    assert not re.search(r"nan|inf\b|∞", markdown(table).lower())


def test_table_4_by_hand(grid: Grid) -> None:
    table = need(table_4(grid))
    assert table.rows[0].reference
    assert table.rows[0].cells[:3] == ("small", "Pretrained model", "")
    row = pick(table, "small", "METIS", "many-shot")
    close(row["coqa_score"], 0.5, 0, 3)
    close(row["coqa_difference"], 0.5 - 0.6, 0, 3)
    close(row["mean_difference"], (-0.1 + 0) / 2, 0, 3)
    assert "coqa: exact_match; pubmedqa: choice" in table.caption


def test_table_4_without_retention_tasks_is_no_table(results: dict[str, Any]) -> None:
    results["retention"] = []
    assert table_4(Grid(results)) is None


def test_table_5_leaves_empty_what_is_not_part_of_the_study(grid: Grid) -> None:
    table = table_5(grid)
    row = pick(table, "small", "METIS", "many-shot")
    # 5, 4, 5, 6, 5, 4, 5 over 5, 4, 5, 5, 5, 4, 5
    close(row["seven_average"], (6 + 6 / 5) / 7, None, 1)
    assert pick(table, "large", "METIS", "many-shot")["seven_average"] == ""
    assert "METIS without mask" not in [row.cells[1] for row in need(table).rows]


def test_table_5_of_one_task_set_is_no_table(results: dict[str, Any]) -> None:
    del results["task_sets"]["seven"]
    results["cells"] = [cell for cell in results["cells"] if cell["task_set"] == "four"]
    assert table_5(Grid(results)) is None


def test_ablation_by_hand(grid: Grid) -> None:
    table = need(ablation(grid))
    assert [row.cells[2] for row in table.rows[:4]] == [
        "nothing (full)",
        "many-shot merging",
        "consensus mask",
        "loss-gap weights",
    ]
    row = pick(table, "large", "METIS", "consensus mask")
    # 5, 3, 5, 5 instead of 5, 4, 5, 6 over 5, 4, 5, 5
    assert row["difference"] == pytest.approx(-(1 / 4 + 1 / 5) / 4)
    assert row["low"] < row["difference"] < row["high"] <= 0
    assert pick(table, "large", "METIS", "nothing (full)")["difference"] == ""


def test_ablation_without_one_is_no_table(results: dict[str, Any]) -> None:
    results["cells"] = [cell for cell in results["cells"] if cell["protocol"] == "joint"]
    assert ablation(Grid(results)) is None


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_grid_refuses_another_format_and_missing_keys(results: dict[str, Any]) -> None:
    with pytest.raises(RunFolderError, match="format is 2"):
        Grid(results | {"format": 2})
    del results["tuning"]
    with pytest.raises(RunFolderError, match="nothing under tuning"):
        Grid(results)


def test_grid_names_the_cells_that_cannot_be_paired(results: dict[str, Any]) -> None:
    cells = {(cell["model"], cell["method"], cell["protocol"], cell["seed"]): cell for cell in results["cells"]}
    cells["large", "metis", "post_hoc", 1]["example_scores"]["math"].pop()
    with pytest.raises(RunFolderError, match="large, METIS, post-hoc and METIS, many-shot: seed 1, task 'math': 9 and"):
        ablation(Grid(results))


# ---- ranking and numbers ---------------------------------------------------------------------------------------------


def ranked(*cells: Any, better: Any = "higher") -> list[str]:
    table = Table("t", "t", "", (Column("x", "x", better=better),), tuple(Row((cell,)) for cell in cells))
    marks = rank(table)
    return [marks.get((i, 0), "") for i in range(len(cells))]


def at(mean: float | None, count: int = 3) -> Estimate:
    return Estimate(mean, 0.1, count, 3)


def test_rank_by_hand() -> None:
    assert ranked(at(0.5), at(0.9), at(0.7)) == ["", "best", "second"]
    assert ranked(at(0.5), at(0.9), at(0.7), better="lower") == ["best", "", "second"]


def test_rank_gives_values_that_look_equal_the_same_mark() -> None:
    assert ranked(at(0.9001), at(0.9), at(0.7), at(0.6)) == ["best", "best", "second", ""]


def test_rank_leaves_out_what_is_missing_incomplete_or_alone() -> None:
    assert ranked(at(0.9, count=1), at(0.5), at(None, count=0), at(0.7), at(0.6)) == ["", "", "", "best", "second"]
    assert ranked(at(0.9), at(None, count=0)) == ["", ""]
    assert ranked(at(0.9), at(0.8)) == ["best", ""]
    assert ranked(at(0.9), at(0.9), at(0.9)) == ["", "", ""]


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [
        (-0.0004, False, "0.000"),
        (-0.0004, True, "0.000"),
        (-1.5, False, "−1.500"),
        (0.25, True, "+0.250"),
        (1234567.0, False, "1.23e+06"),
    ],
)
def test_format_number(value: float, signed: bool, text: str) -> None:
    assert format_number(value, 3, signed=signed) == text


# ---- the three texts -------------------------------------------------------------------------------------------------


def hostile_results() -> dict[str, Any]:
    """Names, labels, parts and errors that would break a table."""
    results = copy.deepcopy(make_results())
    for method in results["methods"].values():
        method["label"] = HOSTILE + method["label"]
    for cell in results["cells"]:
        if cell["status"] == "failed":
            cell["error"] = HOSTILE
    results["categories"] = {HOSTILE: ["m_arc", "math"]}
    return results


def parsed_rows(text: str) -> list[list[str]]:
    """Cells of the tables in a Markdown text, as they are read."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and token.level == 4:
            rows[-1].append("".join(child.content for child in token.children or () if child.type == "text"))
    return rows


def test_markdown_shows_hostile_names_as_they_are() -> None:
    table = need(table_2(Grid(hostile_results())))
    text = markdown(table)
    rows = parsed_rows(text)
    assert len(rows) == 1 + len(table.rows)
    assert {len(row) for row in rows} == {len(table.columns)}
    assert rows[0][3] == HOSTILE
    assert rows[1][1] == HOSTILE + "Task Arithmetic"
    assert "<b>" not in text


def test_markdown_marks_best_and_second(grid: Grid) -> None:
    text = markdown(need(table_2(grid)))
    assert "| **1.111** ± 0.011 |" in text
    assert "| <ins>1.056</ins> ± 0.006 |" in text


def test_markdown_leaves_repeated_heads_empty(grid: Grid) -> None:
    rows = parsed_rows(markdown(need(table_2(grid))))
    assert [row[:3] for row in rows[1:4]] == [
        ["small", "Task Arithmetic", "post-hoc"],
        ["", "", "many-shot"],
        ["", "TIES", "post-hoc"],
    ]


def test_csv_has_every_digit_and_one_number_per_field(grid: Grid) -> None:
    table = need(table_1(grid))
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    row = pick(table, "small", "TIES")
    assert [(entry["model"], entry["method"]) for entry in rows] == [row.cells[:2] for row in table.rows]
    assert float(rows[1]["normalized_post_hoc"]) == row["normalized_post_hoc"].mean
    assert float(rows[1]["normalized_post_hoc_error"]) == row["normalized_post_hoc"].error
    assert (rows[1]["loss_difference_error"], rows[1]["loss_difference_seeds"]) == ("", "1")
    for entry in rows:
        for name, value in entry.items():
            assert name in ("model", "method") or value == "" or math.isfinite(float(value))


def test_csv_keeps_hostile_names() -> None:
    rows = list(csv.reader(io.StringIO(csv_text(need(table_2(Grid(hostile_results())))))))
    assert rows[0][3:6] == [HOSTILE, f"{HOSTILE}_error", f"{HOSTILE}_seeds"]
    assert {len(row) for row in rows} == {len(rows[0])}


def test_latex_escapes_what_tex_reads() -> None:
    assert escape_latex("&_%#${}") == r"\&\_\%\#\$\{\}"
    assert escape_latex("a~b^c\\d") == r"a\textasciitilde{}b\textasciicircum{}c\textbackslash{}d"
    assert escape_latex("1 ± 2 − 3 --") == r"1 $\pm$ 2 $-$ 3 -{}-"
    assert escape_latex("[2pt] *é中\u202e\n") == "{[}2pt{]} {*}é{[}U+4E2D{]}"


def test_latex_is_one_balanced_table() -> None:
    for table in (need(table_1(Grid(hostile_results()))), need(table_2(Grid(hostile_results())))):
        text = latex(table)
        assert text.startswith("\\documentclass{article}\n")
        assert text.rstrip().endswith("\\end{document}")
        for name in ("document", "table", "tabular"):
            assert text.count(f"\\begin{{{name}}}") == text.count(f"\\end{{{name}}}") == 1
        bare = re.sub(r"\\[\\{}$&%#_]", "", text)
        assert bare.count("{") == bare.count("}")
        assert bare.count("$") % 2 == 0
        body = text[text.index("\\toprule") : text.index("\\bottomrule")]
        rows = [line for line in body.splitlines() if line.endswith("\\\\")]
        assert len(rows) == 1 + len(table.rows)
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table.columns) - 1}
        assert body.count("\\midrule") == 2  # below the head, and between the models


def test_latex_marks_best_and_second(grid: Grid) -> None:
    text = latex(need(table_2(grid)))
    assert r"\textbf{1.111} $\pm$ 0.011" in text
    assert r"\underline{1.056} $\pm$ 0.006" in text


def test_escape_markdown_leaves_no_line_break() -> None:
    assert escape_markdown("a\n\n| b\u2028c\x00") == "a &#124; b c"
