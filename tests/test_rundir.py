"""The run folder's files: complete or absent, equal values in equal bytes, readable after a crash."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manyshot import rundir
from manyshot.errors import RunFolderError
from manyshot.rundir import (
    RunFolder,
    append_line,
    atomic_file,
    atomic_folder,
    content_key,
    link_atomically,
    read_json,
    read_lines,
    remove,
    require_space,
    write_json,
    write_text,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    LEAVES | TEXTS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=8
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=4)
quick = settings(deadline=None, database=None, derandomize=True, max_examples=25)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_run_folder_names_are_those_of_the_docs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    found = [
        folder.recipe,
        folder.environment,
        folder.splits,
        folder.metrics,
        folder.scores,
        folder.merged,
        folder.post_hoc,
        folder.round(0),
        folder.round(12),
        folder.local_update(3, "math"),
        folder.expert("math"),
    ]
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "recipe.yaml",
        "environment.json",
        "splits.json",
        "metrics.jsonl",
        "scores.json",
        "merged",
        "post_hoc",
        "round_000",
        "round_012",
        "round_003/math",
        "experts/math",
    ]


# ---- atomic writes ---------------------------------------------------------------------------------------------------


def test_atomic_file_appears_complete_and_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_file(path) as stream:
        stream.write(b"one")
        stream.flush()
        assert names(tmp_path / "new") == ["file.partial"]
    assert names(tmp_path / "new") == ["file"]
    assert path.read_bytes() == b"one"


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_file_keeps_the_older_file_when_writing_fails(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(failure), atomic_file(path) as stream:
        stream.write(b"half")
        raise failure
    assert names(tmp_path) == ["file"]
    assert path.read_bytes() == b"old"


def test_atomic_file_syncs_the_data_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), sync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda old, new: (calls.append("replace"), replace(old, new)))
    write_text(tmp_path / "file", "x")
    assert calls == ["fsync", "replace", "fsync"]  # the file, the rename, the folder


def test_atomic_folder_appears_complete_and_replaces_an_older_one(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    (path / "stale").write_text("old")
    (tmp_path / "folder.partial").mkdir()
    (tmp_path / "folder.partial" / "crash").write_text("left by a crash")
    with atomic_folder(path) as partial:
        assert names(partial) == []
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("new")
        assert names(path) == ["stale"]
    assert names(tmp_path) == ["folder"]
    assert names(path) == ["inner"]


def test_atomic_folder_leaves_the_older_one_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path) as partial:
        (partial / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as partial:
        (partial / "file").write_text("new")
        raise KeyboardInterrupt
    assert names(tmp_path) == ["folder"]
    assert (path / "file").read_text() == "old"


def test_a_write_that_fails_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_file(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file")


def test_remove_takes_files_folders_links_and_nothing(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "nothing"):
        remove(tmp_path / name)
    assert names(tmp_path) == ["kept"]
    assert names(tmp_path / "kept") == ["file"]  # the link went, not what it points at
    remove(tmp_path / "kept")
    assert names(tmp_path) == []


def test_link_atomically_moves_a_link_and_survives_moving_the_run(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "name").write_text(name)
    link = tmp_path / "run" / "merged"
    link_atomically(link, tmp_path / "run" / "one")
    (tmp_path / "run" / "merged.partial").symlink_to("left by a crash")
    link_atomically(link, tmp_path / "run" / "two")
    assert names(tmp_path / "run") == ["merged", "one", "two"]
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert (tmp_path / "moved" / "merged" / "name").read_text() == "two"


# ---- JSON ------------------------------------------------------------------------------------------------------------


@quick
@given(OBJECTS)
def test_write_json_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, value: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("json") / "file.json"
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_bytes().endswith(b"}\n")


def test_write_json_gives_equal_bytes_for_equal_values(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"x": 1, "ä": [1.5, None]})
    write_json(tmp_path / "b", {"ä": [1.5, None], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert "ä" in (tmp_path / "a").read_text("utf-8")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_cannot_say_and_leaves_no_file(tmp_path: Path, bad: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"x": bad})
    assert names(tmp_path) == []


@pytest.mark.parametrize("blob", [b"", b'{"a": 1', b"\xff{}", b'{"a": 1}}'])
def test_read_json_names_a_damaged_file(tmp_path: Path, blob: bytes) -> None:
    (tmp_path / "file.json").write_bytes(blob)
    with pytest.raises(RunFolderError, match=r"file\.json: damaged JSON .*remove it to redo the step"):
        read_json(tmp_path / "file.json")


def test_read_json_names_a_missing_file_and_another_kind_of_value(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"gone\.json: no such file"):
        read_json(tmp_path / "gone.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(RunFolderError, match=r"list\.json: expected a JSON object, found list"):
        read_json(tmp_path / "list.json")


def test_content_key_follows_content_not_order_of_keys() -> None:
    assert content_key({"a": 1, "b": 2}, "x") == content_key({"b": 2, "a": 1}, "x")
    assert len({content_key("x", "y"), content_key("xy"), content_key("y", "x"), content_key(["x", "y"])}) == 4
    assert len(content_key()) == 64


# ---- lines -----------------------------------------------------------------------------------------------------------


def test_append_line_closes_a_line_that_a_crash_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"n": 1})
    with open(path, "ab") as stream:
        stream.write(b'{"n": 2, "text": "ha')
    append_line(path, {"n": 3})
    append_line(path, {"n": 4})
    assert read_lines(path) == [{"n": 1}, {"n": 3}, {"n": 4}]
    assert path.read_text().count("\n") == 4


def test_read_lines_leaves_out_what_is_no_object(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "gone.jsonl") == []
    (tmp_path / "m.jsonl").write_bytes(b'{"n": 1}\n[2]\n\n\xff\xfe\n{"n": "\xff"}\n{"n": 3}')
    assert [line["n"] for line in read_lines(tmp_path / "m.jsonl")][0::2] == [1, 3]


@example([{"a line separator": "\u2028", "\x85": "\r\n"}])
@quick
@given(st.lists(OBJECTS, max_size=4))
def test_read_lines_gives_back_what_was_appended(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]
) -> None:
    path = tmp_path_factory.mktemp("lines") / "m.jsonl"
    for value in values:
        append_line(path, value)
    assert read_lines(path) == values


# ---- space -----------------------------------------------------------------------------------------------------------


def test_require_space_compares_with_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 3_000_000_000

    monkeypatch.setattr(rundir.shutil, "disk_usage", lambda path: Usage)
    require_space(tmp_path / "not" / "yet", 3_000_000_000, "a model")
    with pytest.raises(RunFolderError) as caught:
        require_space(tmp_path / "not" / "yet", 3_000_000_001, "a model")
    assert "a model needs 3.00 GB, the disk has 3.00 GB free" in str(caught.value)
    assert json.dumps(str(tmp_path / "not" / "yet"))[1:-1] in str(caught.value)
