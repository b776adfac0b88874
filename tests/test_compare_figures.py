"""Figures of results made by hand, through matplotlib's own objects; and everything that a comparison writes."""

from __future__ import annotations

import copy
import math
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from compare_table_helpers import TASKS, make_results, unmade
from manyshot import compare_drawing
from manyshot.compare_figures import (
    FIGURES,
    ablation_figure,
    radar_figure,
    scaling_figure,
    transition_figure,
    worst_task_figure,
    write_figures,
)
from manyshot.compare_grid import Grid
from manyshot.compare_outputs import ABSENT, SECTIONS, TABLES, write_outputs
from manyshot.compare_round_figures import cosine_figure, drift_figure, kept_figure, loss_figure, weights_figure
from manyshot.errors import MissingExtraError

pytestmark = pytest.mark.skipif(find_spec("matplotlib") is None, reason="matplotlib (extra: report) is missing")

HOSTILE = "<b>a|b</b> &_% $x$ \\n ~^{#} *y* 中"


@pytest.fixture
def results() -> dict[str, Any]:
    return make_results()


@pytest.fixture
def grid(results: dict[str, Any]) -> Grid:
    return Grid(results)


def lines(axes: Any) -> dict[str, Any]:
    """Label -> line, of those that a legend names."""
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


# ---- the paper's figures ---------------------------------------------------------------------------------------------


def test_radar_has_a_polygon_per_method_and_the_experts_circle(grid: Grid) -> None:
    figure = radar_figure(grid)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["small", "large"]
    drawn = lines(figure.axes[1])
    labels = {"Task Arithmetic", "TIES", "Mean", "METIS", "Joint fine-tuning", "expert = 1"}
    assert set(drawn) == labels
    assert drawn["METIS"].get_ydata().tolist() == pytest.approx([1, 1, 1, 1.2, 1])  # closed
    assert set(drawn["expert = 1"].get_ydata()) == {1}


def test_radar_is_open_where_a_task_has_no_value(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        if cell["model"] == "small" and cell["status"] == "done":
            cell["normalized"]["tasks"]["math"] = None
    figure = radar_figure(Grid(results))
    assert figure is not None
    heights = lines(figure.axes[0])["METIS"].get_ydata()
    assert math.isnan(heights[1])
    assert not figure.axes[0].patches  # nothing is filled
    assert len(figure.axes[1].patches) == 1


def test_radar_draws_what_is_far_out_at_its_limit(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        if cell["status"] == "done":
            cell["normalized"]["tasks"]["safety"] = 40.0
    figure = radar_figure(Grid(results))
    assert figure is not None
    assert lines(figure.axes[0])["METIS"].get_ydata()[3] == 2


def test_radar_of_two_tasks_is_none(results: dict[str, Any]) -> None:
    results["task_sets"]["four"]["tasks"] = ["math", "safety"]
    assert radar_figure(Grid(results)) is None


def test_transition_has_an_arrow_per_operator(grid: Grid) -> None:
    figure = transition_figure(grid)
    assert figure is not None
    assert len(figure.axes) == 4  # loss and normalized average, of two models
    for axes in figure.axes:
        assert len(axes.texts) == 4  # arrows are annotations without text
        assert [label.get_text() for label in axes.get_yticklabels()] == ["Task Arithmetic", "TIES", "Mean", "METIS"]
    assert lines(figure.axes[0])["pretrained model"].get_xdata() == [3, 3]
    assert lines(figure.axes[0])["Joint fine-tuning"].get_xdata() == pytest.approx([1.35, 1.35])


def test_transition_of_a_loss_that_ran_away_has_a_logarithmic_axis(results: dict[str, Any]) -> None:
    for cell in results["cells"]:
        if cell["status"] == "done" and (cell["model"], cell["method"], cell["protocol"]) == (
            "small",
            "task_arithmetic",
            "many_shot",
        ):
            cell["multi_task_loss"] = 1e6
    figure = transition_figure(Grid(results))
    assert figure is not None
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "linear", "linear", "linear"]


def test_worst_task_has_a_bar_per_row(grid: Grid) -> None:
    figure = worst_task_figure(grid)
    assert figure is not None
    bars = [patch.get_width() for patch in figure.axes[1].patches]
    # Task Arithmetic, TIES, Mean, METIS post-hoc and many-shot, joint
    assert bars == pytest.approx([0.25, 0.5, 0.5, 0.75, 0.25, 0.75, 0.5, 1.0, 1.0])


def test_ablation_has_a_bar_per_part_with_its_number(grid: Grid) -> None:
    figure = ablation_figure(grid)
    assert figure is not None
    axes = figure.axes[1]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx([1.05, 0.725, 0.9375, 0.8875])
    assert [text.get_text() for text in axes.texts] == ["1.050", "0.725", "0.938", "0.887"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "METIS",
        "without many-shot merging",
        "without consensus mask",
        "without loss-gap weights",
    ]


def test_scaling_has_the_models_with_more_than_one_task_set(grid: Grid) -> None:
    figure = scaling_figure(grid)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_title() == "small"
    assert lines(axes)["METIS"].get_xdata().tolist() == [0, 1]
    assert lines(axes)["Mean"].get_xdata().tolist() == [0]


# ---- rounds ----------------------------------------------------------------------------------------------------------


def test_loss_per_round_by_hand(grid: Grid) -> None:
    figure = loss_figure(grid)
    assert figure is not None
    drawn = lines(figure.axes[1])
    assert set(drawn) == {"Task Arithmetic", "TIES", "Mean", "METIS"}
    assert drawn["METIS"].get_xdata().tolist() == [1, 2, 3]
    # 3/r + 0.01 · seed + 0.02 · 5
    assert drawn["METIS"].get_ydata().tolist() == pytest.approx([3.11, 1.61, 1.11])
    assert len(figure.axes[1].collections) >= 4  # bands, one per method
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["1", "2", "3", "post-hoc"]


def test_drift_and_distance_by_hand(grid: Grid) -> None:
    figure = drift_figure(grid)
    assert figure is not None
    drift, distance = figure.axes[2:]
    assert lines(drift)["METIS"].get_ydata().tolist() == pytest.approx([1 / r + 0.075 for r in (1, 2, 3)])
    assert lines(distance)["METIS"].get_ydata().tolist() == pytest.approx([0.4 * r + 0.05 for r in (1, 2, 3)])


def test_cosines_by_hand(grid: Grid) -> None:
    figure = cosine_figure(grid)
    assert figure is not None
    assert lines(figure.axes[0])["TIES"].get_ydata().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_weights_have_a_line_per_task_and_one_for_equal_weights(grid: Grid) -> None:
    figure = weights_figure(grid)
    assert figure is not None
    drawn = lines(figure.axes[0])
    assert set(drawn) == {*TASKS, "equal weights"}
    assert drawn["safety"].get_ydata().tolist() == pytest.approx([1 / 4, 4 / 10, 7 / 16])
    assert drawn["equal weights"].get_ydata() == [0.25, 0.25]


def test_kept_share_leaves_out_what_keeps_all(grid: Grid) -> None:
    figure = kept_figure(grid)
    assert figure is not None
    assert set(lines(figure.axes[0])) == {"METIS"}
    assert lines(figure.axes[0])["METIS"].get_ydata().tolist() == pytest.approx([0.55, 0.6, 0.65])


def test_rounds_without_a_finished_cell_are_no_figure(results: dict[str, Any]) -> None:
    results["cells"] = [unmade(cell, "missing") for cell in results["cells"]]
    assert all(picture.make(Grid(results)) is None for picture in FIGURES.values())


def test_styles_are_the_same_in_every_figure_and_differ_between_methods(grid: Grid) -> None:
    drawn = [figure.axes[0] for make in (radar_figure, loss_figure, scaling_figure) if (figure := make(grid))]
    for label in ("Task Arithmetic", "TIES", "Mean", "METIS"):
        assert len({lines(axes)[label].get_color() for axes in drawn}) == 1
    looks = compare_drawing.styles(grid)
    plain = [look for method, look in looks.items() if not method.startswith("metis_")]
    assert len({(look.colour, look.marker, look.line) for look in plain}) == len(plain)


def test_styles_of_many_methods_differ(results: dict[str, Any]) -> None:
    spec = results["methods"]["ties"]
    results["methods"] |= {f"operator_{i}": spec for i in range(16)}
    looks = [look for method, look in compare_drawing.styles(Grid(results)).items() if not method.startswith("metis_")]
    assert len({(look.colour, look.marker, look.line) for look in looks}) == len(looks)


# ---- all outputs -----------------------------------------------------------------------------------------------------


def hostile() -> dict[str, Any]:
    """Names of models, tasks, sets and methods that would break a page; a task without an expert, cells without end."""
    results = copy.deepcopy(make_results())
    for key in ("cells", "references"):
        results[key] = [entry for entry in results[key] if entry["model"] == "small"]
    results["models"] = [HOSTILE + "small"]
    results["name"] = HOSTILE
    for entry in (*results["cells"], *results["references"], *results["tuning"]):
        entry["model"] = HOSTILE + entry["model"]
    for method in results["methods"].values():
        method["label"] = HOSTILE + method["label"]
    for cell in results["cells"]:
        if cell["status"] == "failed":
            cell["error"] = f"{HOSTILE}\n<script>alert(1)</script>"
    return results


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("compare")
    return folder, write_outputs(hostile(), folder)


def test_outputs_are_all_there(written: tuple[Path, list[Path]]) -> None:
    folder, files = written
    names = {str(file.relative_to(folder)) for file in files}
    of_losses = {"share_kept", "per_task_shares", "bad_tasks"}  # which these results have none for
    assert names == {
        *(f"tables/{name}.{ending}" for name in set(TABLES) - of_losses for ending in ("md", "csv", "tex")),
        *(f"figures/{name}.{ending}" for name in FIGURES for ending in ("png", "svg")),
        "report.md",
    }
    assert {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()} == names
    for file in files:
        if file.suffix == ".png":
            assert file.read_bytes()[:4] == b"\x89PNG"
            assert file.stat().st_size > 5000
        if file.suffix == ".svg":
            assert "<svg" in file.read_text("utf-8")


def test_outputs_hold_no_nan_and_no_markup_of_others(written: tuple[Path, list[Path]]) -> None:
    for file in written[1]:
        if file.suffix == ".png":
            continue
        text = file.read_text("utf-8")
        assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", text), file.name
        if file.suffix == ".svg":
            ElementTree.fromstring(text)
        if file.suffix == ".tex":
            bare = re.sub(r"\\[\\{}$&%#_]", "", text)
            assert bare.count("{") == bare.count("}"), file.name
            assert bare.count("$") % 2 == 0, file.name
        if file.suffix == ".md":
            assert "<b>" not in text
            assert "<script" not in text


def test_outputs_of_a_report_name_every_table_and_figure(written: tuple[Path, list[Path]]) -> None:
    folder, _ = written
    text = (folder / "report.md").read_text("utf-8")
    for name in FIGURES:
        assert f"](figures/{name}.png)" in text
    named = {name for names in SECTIONS.values() for name in names}
    assert {name.removeprefix("figures/") for name in named if name.startswith("figures/")} == set(FIGURES)
    for name in TABLES:
        assert name in named or f"`tables/{name}.md`" in text
    assert set(ABSENT) <= set(TABLES)
    assert "33 done, 1 failed, 1 missing" in text


def test_outputs_of_the_same_results_are_the_same_bytes(grid: Grid, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        figure = radar_figure(grid)
        assert figure is not None
        compare_drawing.save(figure, tmp_path / folder / "radar")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_outputs_without_matplotlib_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_drawing, "find_spec", lambda name: None)
    results = make_results()
    with pytest.raises(MissingExtraError, match=r"pip install 'manyshot\[report\]'"):
        write_figures(Grid(results), tmp_path)
    files = write_outputs(results, tmp_path)
    assert not [file for file in files if file.suffix == ".png"]
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "- `figures/radar`: figures need the package matplotlib" in text
    assert "![" not in text


def test_outputs_remove_what_the_results_no_longer_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_drawing, "find_spec", lambda name: None)  # tables alone, which are quick
    results = make_results()
    write_outputs(results, tmp_path)
    results["retention"] = []
    files = write_outputs(results, tmp_path)
    assert tmp_path / "tables" / "table_4.md" not in files
    assert not (tmp_path / "tables" / "table_4.md").exists()
    assert "`tables/table_4`: there are no retention tasks" in (tmp_path / "report.md").read_text("utf-8")


def test_outputs_of_nothing_finished_are_tables_of_dashes(tmp_path: Path) -> None:
    results = make_results()
    results["cells"] = [unmade(cell, "missing") for cell in results["cells"]]
    results["references"], results["tuning"] = [], []
    write_outputs(results, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "experts are not measured" in text
    assert "– | – |" in text
    assert not re.search(r"\bnan\b", text)
