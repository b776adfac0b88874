"""Guards in whole runs on the tiny model: silent where all is well, in time where not, the same after a resume."""

from __future__ import annotations

import json
import shutil
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TASKS
from manyshot.cli_view import show_status
from manyshot.errors import MergeError
from manyshot.guards import describe
from manyshot.progress import Event
from manyshot.rundir import read_json, remove
from manyshot.runner import run
from manyshot.status import run_status
from run_helpers import Runs, load_tensors, round_folder, unlike

FOUR = (*TASKS, "more")
# next to nothing is measured: guards need losses, not scores
CHEAP = ("local_update.warmup_steps=0", "evaluation.validation_examples=3", "evaluation.test_examples=1")
HEALTHY = ("evaluation.experts=true", "evaluation.post_hoc=true")
DIVERGES = ("operator={name: task_arithmetic, scaling: 1.0}", "protocol.rounds=3", "protocol.local_steps=3", *CHEAP)
# as if the losses of one task were counted in other units
COLLAPSES = ("tasks.words.loss_scale=100", "operator.temperature=0.1", "protocol.local_steps=2", *CHEAP)
EMPTY = ("operator.mask_threshold=12", "protocol.rounds=1", "protocol.local_steps=2", *CHEAP)


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("guards"))


@pytest.fixture(scope="module")
def four(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("four"), tasks=FOUR)


def kinds(folder: Path) -> list[str]:
    return [finding["kind"] for finding in read_json(folder / "guards.json")["findings"]]


def test_guards_are_silent_on_a_healthy_run_and_write_its_measures(runs: Runs) -> None:
    result = runs.get(*HEALTHY)
    for name, entry in (("post_hoc", result.scores["post_hoc"]), *_rounds(result)):
        record = read_json(result.folder / name / "guards.json")
        assert record["findings"] == entry["guards"] == []
        merge = read_json(result.folder / name / "merge.json")
        assert record["measures"]["update_norm"] == merge["update_norm"]
        assert record["measures"]["kept_share"] == entry["kept_share"]
        assert record["measures"]["effective_tasks"] == pytest.approx(entry["effective_tasks"])
    before, after = (result.scores["rounds"][r] for r in ("1", "2"))
    changed = read_json(round_folder(result, 2) / "guards.json")["measures"]["realised_change"]
    assert changed == {task: after["losses"][task]["loss"] - before["losses"][task]["loss"] for task in TASKS}
    assert run_status(result.folder)["findings"] == []


def _rounds(result: Any) -> list[tuple[str, Any]]:
    return [(f"round_00{r}", result.scores["rounds"][str(r)]) for r in (1, 2)]


def test_guards_measure_the_cosines_of_updates_as_the_adapters_have_them(runs: Runs) -> None:
    result = runs.get(*HEALTHY)
    for r in (1, 2):
        vectors = []
        for task in TASKS:
            adapter = round_folder(result, r) / task / "adapter"
            stored, table = load_tensors(adapter / "adapter_model.safetensors"), read_json(adapter / "factors.json")
            parts = [
                stored[one["lora_b"]].double() @ stored[one["lora_a"]].double() for _, one in sorted(table.items())
            ]
            vectors.append(torch.cat([part.flatten() for part in parts]))
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in combinations(vectors, 2)]
        found = read_json(round_folder(result, r) / "guards.json")["measures"]["mean_cosine"]
        assert found == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_guards_find_a_sum_that_diverges_in_its_second_round(four: Runs) -> None:
    result = four.get(*DIVERGES)
    assert [kinds(round_folder(result, r)) for r in (1, 2, 3)] == [[], ["divergence"], ["divergence"]]
    suggestions = result.scores["rounds"]["2"]["guards"][0]["suggestions"]
    assert suggestions == ["operator.scaling=0.25", "merge.reference=start"]
    assert [finding["round"] for finding in run_status(result.folder)["findings"]] == [2, 3]


def test_guards_say_that_weights_collapse_before_the_merge_that_fails_of_it(
    runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, events = runs.new_folder(), list[Event]()
    folder.mkdir()
    with pytest.raises(MergeError, match="keeps no coordinate"):
        run(runs.recipe(*COLLAPSES), folder, listener=events.append)
    (finding,) = run_status(folder)["findings"]
    assert (finding["kind"], finding["round"], finding["tasks"]) == ("weights_collapse", 1, ["words"])
    (told,) = [event for event in events if event.values.get("kind") == "weights_collapse"]
    assert told.text == describe(finding)
    json.dumps(told.to_json())  # what --json prints
    show_status(run_status(folder))
    assert "round 1: warning: 'words' has 1.000 of the weight" in capsys.readouterr().out


def test_guards_say_that_a_mask_keeps_next_to_nothing(runs: Runs) -> None:
    result = runs.get(*EMPTY)
    assert 0 < result.scores["rounds"]["1"]["kept_share"] < 0.01
    (finding,) = result.scores["rounds"]["1"]["guards"]
    assert finding["kind"] == "mask_keeps_nothing"
    assert finding["suggestions"] == ["operator.mask_threshold=0.5", "operator.mask=false"]


def test_guards_find_the_same_after_a_resume_and_tell_it_once(four: Runs) -> None:
    whole, folder = four.get(*DIVERGES), four.new_folder()
    shutil.copytree(whole.folder, folder, symlinks=True)
    for name in ("scores.json", "merged", "round_002/guards.json", "round_003"):
        remove(folder / name)
    told: list[str] = []
    run(
        four.recipe(*DIVERGES),
        folder,
        resume=True,
        repair=True,
        listener=lambda event: told.append(event.text) if "suggestions" in event.values else None,
    )
    assert unlike(whole.folder, folder) == []
    assert [line.split(":")[0] for line in told] == ["round 2", "round 3"]
