"""What a run leaves of its earlier rounds (`keep`): it decides no result, and what is gone is known to be gone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import TASKS
from manyshot.errors import ManyshotError
from manyshot.removed import REMOVED, finish_removing, read_removed, refuse_removed, remove_places
from manyshot.rundir import read_json
from manyshot.runner import run
from run_helpers import Runs, contents, phases

PAIR = TASKS[:2]
# rounds that go on from adapters and optimizers' states of the round before; experts that are merged once
WHOLE = (
    *("protocol.rounds=3", "protocol.local_steps=3", "evaluation.experts=true", "evaluation.post_hoc=true"),
    *("local_update.adapter_start=own", "local_update.optimizer_state=kept", "evaluation.validation_examples=2"),
    "evaluation.test_examples=2",
)
LEAST = ("keep.adapters=none", "keep.merged=last")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("keep"), tasks=PAIR)


def results(folder: Path) -> dict[str, bytes]:
    """What a run came to: losses, scores, weights, task vectors, and the records of its steps with their keys."""
    names = ("losses.json", "scores.json", "loss_gap.json", "merge.json", "DONE.json", "local_update.json")
    return {
        name: data
        for name, data in contents(folder).items()
        if Path(name).name in (*names, "task_vector.safetensors") or name.startswith("round_003/merged/model")
    }


def test_keep_decides_no_result_and_removes_what_it_says(runs: Runs) -> None:
    whole, least = runs.get(*WHOLE).folder, runs.get(*WHOLE, *LEAST).folder
    assert results(whole) == results(least)
    gone = {name for name in contents(whole).keys() - contents(least).keys() if "manifest" not in name}
    places = read_removed(least)
    assert all(any(name.startswith(place) for place in places) for name in gone)
    assert not list(least.glob("*/*/adapter")) and not list(least.rglob("optimizer.safetensors"))
    assert [file.parent.name for file in least.glob("round_*/merged")] == ["round_003"]
    assert (least / "merged").resolve() == (least / "round_003" / "merged").resolve()
    assert set(places.values()) == {"keep.adapters: none", "keep.merged: last"}
    # manifests still name what was removed
    assert contents(whole)["round_001/letters/manifest.json"] == contents(least)["round_001/letters/manifest.json"]
