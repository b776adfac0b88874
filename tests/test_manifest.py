"""Manifests: what a step left is named, what was changed is found, and a step that is redone comes to the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from manyshot.errors import RunFolderError
from manyshot.manifest import MANIFEST, check_files, files_in, find_damages, read_manifest, seal, undo, unseal
from manyshot.rundir import PARTIAL


def quiet(text: str) -> None:
    pass


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with one local update in one round."""
    update = tmp_path / "run" / "round_001" / "math"
    (update / "adapter").mkdir(parents=True)
    (update / "adapter" / "weights").write_text("0123456789")
    (update / "local_update.json").write_text("{}")
    seal(update, "local update", files_in(update / "adapter", update / "local_update.json"))
    (update.parent / "task_vector.safetensors").write_text("abc")
    (update.parent / "merge.json").write_text("{}")
    names = ("task_vector.safetensors", "merge.json", f"math/{MANIFEST}")
    seal(update.parent, "merge", files_in(*(update.parent / name for name in names)))
    seal(tmp_path / "run", "round 1", [update.parent / MANIFEST])
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): file.read_text() for file in files_in(folder)}


def test_manifest_names_step_size_and_hash(run_folder: Path) -> None:
    entries = read_manifest(run_folder / "round_001" / "math")["files"]
    assert entries["adapter/weights"] == {
        "step": "local update",
        "bytes": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",  # printf 0123456789 | sha256sum
    }
    assert find_damages(run_folder, quiet) == []


def test_manifest_takes_a_hash_that_is_known_and_seals_a_step_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    seal(tmp_path, "merge", [tmp_path / "a"], {"a": "known"})
    assert read_manifest(tmp_path)["files"]["a"]["sha256"] == "known"
    seal(tmp_path, "merge", [tmp_path / "a"])
    assert read_manifest(tmp_path)["files"]["a"]["sha256"] == "known"
    unseal(tmp_path, "merge")
    assert read_manifest(tmp_path) == {"files": {}}


def measured(folder: Path, step: str) -> None:
    """What a search (losses alone) and a run (scores too) do with a model of one folder."""
    names = ("losses.json",) if step == "losses" else ("losses.json", "scores.json")
    for name in names:
        if not (folder / name).exists():
            (folder / name).write_text(name)
    seal(folder, step, [folder / name for name in names])


def test_manifest_keeps_an_entry_of_the_same_bytes_whatever_step_names_it(tmp_path: Path) -> None:
    measured(tmp_path, "losses")
    measured(tmp_path, "measurement")
    both = read_manifest(tmp_path)
    assert {entry["step"] for entry in both["files"].values()} == {"measurement"}
    measured(tmp_path, "losses")  # the search is resumed
    assert read_manifest(tmp_path) == both
    (tmp_path / "losses.json").write_text("other bytes")
    measured(tmp_path, "losses")
    assert read_manifest(tmp_path) != both


@pytest.mark.parametrize("order", [("losses", "measurement"), ("measurement", "losses", "measurement")])
def test_repair_compares_what_another_step_left(order: tuple[str, ...], tmp_path: Path) -> None:
    measured(tmp_path, order[0])
    before = read_manifest(tmp_path)
    for again in ("losses.json", "other bytes"):
        (tmp_path / "losses.json").unlink()
        undo(find_damages(tmp_path, quiet))
        if again == "other bytes":
            (tmp_path / "losses.json").write_text(again)
            with pytest.raises(RunFolderError, match=r"losses\.json: was redone"):
                measured(tmp_path, order[1])
            return
        for step in order[1:]:
            measured(tmp_path, step)
        found = read_manifest(tmp_path)
        assert "expected" not in found
        assert found["files"]["losses.json"]["sha256"] == before["files"]["losses.json"]["sha256"]


@pytest.mark.parametrize(
    ("damage", "name", "what"),
    [
        (lambda file: file.write_text("0123456780"), "adapter/weights", "was changed"),
        (lambda file: file.write_text("01234"), "adapter/weights", "has 5 bytes, and had 10"),
        (lambda file: file.unlink(), "adapter/weights", "is gone"),
    ],
)
def test_manifest_finds_what_was_changed_cut_short_or_removed(
    damage: object, name: str, what: str, run_folder: Path
) -> None:
    update = run_folder / "round_001" / "math"
    damage(update / name)  # type: ignore[operator]
    (found,) = find_damages(run_folder, quiet)
    assert (found.folder, found.step, found.name, found.what) == (update, "local update", name, what)
    with pytest.raises(RunFolderError) as caught:
        check_files(run_folder, quiet, repair=False, how="--resume --repair")
    assert f"round_001/math/{name} {what}" in str(caught.value)
    assert "--resume --repair, which redoes just: round_001/math: local update" in str(caught.value)


def test_manifest_of_the_folder_around_misses_a_removed_folder(run_folder: Path) -> None:
    shutil.rmtree(run_folder / "round_001" / "math")
    assert [(one.name, one.what) for one in find_damages(run_folder, quiet)] == [(f"math/{MANIFEST}", "is gone")]
    shutil.rmtree(run_folder / "round_001")
    assert [(one.name, one.step) for one in find_damages(run_folder, quiet)] == [(f"round_001/{MANIFEST}", "round 1")]


def test_repair_removes_just_the_damaged_steps_record_and_file(run_folder: Path) -> None:
    update, before, told = run_folder / "round_001" / "math", contents(run_folder), []
    (update / "adapter" / "weights").write_text("")
    check_files(run_folder, told.append, repair=True, how="")
    left = contents(run_folder)
    gone = {"round_001/math/adapter/weights", "round_001/math/local_update.json"}
    assert before.keys() - left.keys() == gone
    assert "round_001/math: local update" in told[-1]
    assert find_damages(run_folder, quiet) == []  # a repair that is interrupted here is gone on with by --resume
    (update / "adapter" / "weights").write_text("0123456789")
    (update / "local_update.json").write_text("{}")
    seal(update, "local update", files_in(update / "adapter", update / "local_update.json"))
    assert contents(run_folder) == before


def test_repair_that_comes_to_something_else_is_refused(run_folder: Path) -> None:
    update = run_folder / "round_001" / "math"
    (update / "adapter" / "weights").unlink()
    undo(find_damages(run_folder, quiet))
    (update / "adapter" / "weights").write_text("other bits")
    (update / "local_update.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"adapter/weights: was redone \(local update\) and is not what it was"):
        seal(update, "local update", files_in(update / "adapter", update / "local_update.json"))


def test_manifest_lets_a_merged_model_be_removed_as_a_whole_but_not_in_part(tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "merged" / name).write_text(name)
    seal(tmp_path, "merged model", files_in(tmp_path / "merged"))
    (tmp_path / "merged" / "model.safetensors").unlink()
    (found,) = find_damages(tmp_path, quiet)
    shutil.rmtree(tmp_path / "merged")
    assert found.step == "merged model" and find_damages(tmp_path, quiet) == []


def test_manifest_in_what_is_half_written_does_not_count(run_folder: Path) -> None:
    shutil.copytree(run_folder / "round_001", run_folder / f"round_002{PARTIAL}")
    (run_folder / f"round_002{PARTIAL}" / "merge.json").unlink()
    assert find_damages(run_folder, quiet) == []


@pytest.mark.parametrize(
    "files",
    [
        [],
        {"a": {}},
        {"a": {"step": "merge", "bytes": "1", "sha256": ""}},
        {"a": {"step": "merge", "bytes": -1, "sha256": ""}},
        {"a": {"step": "merge", "bytes": 10**400, "sha256": ""}},
        {"/etc/passwd": {"step": "merge", "bytes": 1, "sha256": ""}},
        {"b/../../a": {"step": "merge", "bytes": 1, "sha256": ""}},
        {"": {"step": "merge", "bytes": 1, "sha256": ""}},
    ],
)
def test_manifest_that_is_damaged_or_leads_out_of_its_folder_is_refused(files: object, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"files": files}))
    with pytest.raises(RunFolderError, match=r"manifest\.json: is damaged"):
        find_damages(tmp_path, quiet)
