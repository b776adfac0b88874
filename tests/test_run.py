"""Whole runs on the tiny model."""

from __future__ import annotations

from pathlib import Path

from conftest import MakeRecipe

from manyshot.rundir import read_json
from manyshot.run import run


def test_run_leaves_every_file_of_the_run_folder(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = run(make_recipe("evaluation.post_hoc=true"), tmp_path / "run")
    for name in ("recipe.yaml", "environment.json", "splits.json", "metrics.jsonl", "scores.json"):
        assert (tmp_path / "run" / name).is_file(), name
    for name in ("loss_gap.json", "merge.json", "scores.json", "losses.json", "DONE.json", "merged/config.json"):
        assert (tmp_path / "run" / "round_002" / name).is_file(), name
    assert result.merged.resolve() == tmp_path / "run" / "round_002" / "merged"
    assert set(read_json(tmp_path / "run" / "scores.json")["rounds"]) == {"1", "2"}
