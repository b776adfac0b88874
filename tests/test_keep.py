"""What a run leaves of its earlier rounds (`keep`): it decides no result, and what is gone is known to be gone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import TASKS
from manyshot import export, removed
from manyshot.errors import ManyshotError, RunFolderError
from manyshot.eval_model import find_model
from manyshot.export_mergekit import write_mergekit_folder
from manyshot.export_source import open_source
from manyshot.extend_command import extend
from manyshot.inspect_input import open_round
from manyshot.manifest import find_damages
from manyshot.removed import REMOVED, finish_removing, made_again, read_removed, refuse_removed, remove_places
from manyshot.rundir import remove
from manyshot.runner import run
from manyshot.status import run_status
from run_helpers import Runs, contents, phases, unlike

PAIR = TASKS[:2]
# rounds that go on from adapters and optimizers' states of the round before; experts that are merged once
WHOLE = (
    *("protocol.rounds=3", "protocol.local_steps=3", "evaluation.experts=true", "evaluation.post_hoc=true"),
    *("local_update.adapter_start=own", "local_update.optimizer_state=kept", "evaluation.validation_examples=2"),
    *("evaluation.test_examples=2", "operator.mask=false"),
)
LEAST = ("keep.adapters=none", "keep.merged=last")


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "WORTH_APART", 1)  # rounds share files, as those of larger models do
        yield Runs(base_folder, tmp_path_factory.mktemp("keep"), tasks=PAIR)


@pytest.fixture
def least(runs: Runs, tmp_path: Path) -> Path:
    """A copy of the finished run that keeps least."""
    shutil.copytree(runs.get(*WHOLE, *LEAST).folder, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


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
    gone = contents(whole).keys() - contents(least).keys()
    places = read_removed(least)
    assert gone
    assert all(any(name.startswith(place) for place in places) for name in gone)
    assert not list(least.rglob("adapter"))
    assert not list(least.rglob("optimizer.safetensors"))
    assert [file.parent.name for file in least.glob("round_*/merged")] == ["round_003"]
    assert (least / "merged").resolve() == (least / "round_003" / "merged").resolve()
    assert set(places.values()) == {"keep.adapters: none", "keep.merged: last"}
    # manifests still name what was removed, with its hash
    name = "round_001/letters/manifest.json"
    assert contents(whole)[name] == contents(least)[name]


def test_keep_resumes_a_run_whose_files_it_removed(runs: Runs, least: Path) -> None:
    before = contents(least)
    trained = phases(least, "local_update")
    assert find_damages(least, quiet) == []
    run(runs.recipe(*WHOLE, *LEAST), least, resume=True)
    assert contents(least) == before
    assert phases(least, "local_update") == trained


def test_keep_may_change_when_a_run_goes_on(runs: Runs, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(runs.get(*WHOLE).folder, folder, symlinks=True)
    run(runs.recipe(*WHOLE, "keep.adapters=last", "keep.merged=last"), folder, resume=True)
    assert {place for place in read_removed(folder) if "round_003" in place or "experts" in place} == set()
    # the last round's adapters are of use with those that they began with
    assert sorted(file.relative_to(folder).parts[0] for file in folder.rglob("round_*/*/adapter")) == [
        *["round_002"] * 2,
        *["round_003"] * 2,
    ]
    assert open_round(folder).round_index == 3
    run(runs.recipe(*WHOLE), folder, resume=True)  # what is gone stays gone
    assert not (folder / "round_001" / "merged").exists()


def test_keep_finishes_removing_after_a_kill(runs: Runs, least: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = least.with_name("killed")
    shutil.copytree(runs.get(*WHOLE).folder, folder, symlinks=True)

    class Killed(BaseException):
        pass

    def kill(place: Path) -> None:
        if place.name == "adapter":  # half of it is gone
            (place / "adapter_model.safetensors").unlink()
            raise Killed
        rest(place)

    rest = remove
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(removed, "remove", kill)
        run(runs.recipe(*WHOLE, *LEAST), folder, resume=True)
    assert find_damages(folder, quiet) == []
    run(runs.recipe(*WHOLE, *LEAST), folder, resume=True)
    assert unlike(least, folder) == ["recipe.yaml"]  # as the run was begun


def test_keep_says_what_is_gone_and_which_key_had_it_removed(runs: Runs, least: Path, tmp_path: Path) -> None:
    with pytest.raises(ManyshotError, match=r"inspecting .* needs round_003/letters/adapter.*keep\.adapters: none"):
        open_round(least)
    with pytest.raises(ManyshotError, match=r"needs round_002/letters/adapter.*keep\.adapters: none"):
        find_model(str(least / "round_002" / "letters"))
    with pytest.raises(ManyshotError, match=r"needs experts/letters/adapter.*keep\.adapters: none"):
        find_model(str(least / "experts" / "letters" / "adapter"))
    with pytest.raises(ManyshotError, match=r"export .* needs round_002/letters/adapter.*keep\.adapters: none"):
        write_mergekit_folder(open_source(least, 2), tmp_path / "out", None, quiet)
    with pytest.raises(ManyshotError, match=r"adding rounds needs round_003/letters/adapter.*keep\.adapters: none"):
        extend(least)
    # what needs no adapters is there
    assert find_model(str(least), round_index=1).kind == "round 1"
    assert run_status(least)["next"] is None


def test_keep_redoes_nothing_that_needs_what_is_gone(runs: Runs, least: Path) -> None:
    (least / "round_002" / "task_vector.safetensors").write_bytes(b"damaged")
    with pytest.raises(RunFolderError, match=r"round 2: its merge needs round_002/letters/adapter, which the run rem"):
        run(runs.recipe(*WHOLE, *LEAST), least, repair=True)


# ---- the record ------------------------------------------------------------------------------------------------------


def test_removed_notes_places_before_they_go(tmp_path: Path) -> None:
    place = tmp_path / "round_001" / "math" / "adapter"
    place.mkdir(parents=True)
    (place / "weights").write_text("w")
    refuse_removed(tmp_path, place, "this")
    remove_places(tmp_path, {place: "keep.adapters: last"})
    assert not place.exists()
    with pytest.raises(RunFolderError, match=r"this needs round_001/math/adapter, .*\(keep\.adapters: last\)"):
        refuse_removed(tmp_path, place, "this")
    assert finish_removing(tmp_path) == []
    place.mkdir()
    assert finish_removing(tmp_path) == ["round_001/math/adapter"]
    made_again(tmp_path, place.parent)
    assert read_removed(tmp_path) == {}


@pytest.mark.parametrize("name", ["recipe.yaml", "../other/run", "round_001/../../x", "/etc/passwd", "round_001"])
def test_removed_refuses_a_record_of_other_places(name: str, tmp_path: Path) -> None:
    (tmp_path / REMOVED).write_text(json.dumps({"removed": {name: "keep.merged: last"}}))
    with pytest.raises(RunFolderError, match=r"removed\.json: is damaged"):
        finish_removing(tmp_path)
