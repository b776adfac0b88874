"""The model folder that a merge writes: every base tensor, one cast, the base's own side files; complete or absent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyshot import export
from manyshot.errors import RunFolderError
from manyshot.export import copy_side_files, export_model
from manyshot.rundir import write_json
from manyshot.task_vector import StoredTaskVector
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import draw, make_base


@pytest.fixture
def changed(base_folder: Path, tmp_path: Path) -> StoredTaskVector:
    """A task vector on one projection of the tiny Llama."""
    name = "model.layers.0.self_attn.q_proj.weight"
    write_tensors(tmp_path / "v.safetensors", {name: draw("export", shape=(32, 32)) * 0.01})
    return StoredTaskVector(tmp_path / "v.safetensors")


def test_export_model_accounts_for_every_base_tensor(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    base = Checkpoint(base_folder)
    export_model(base, changed, tmp_path / "out")
    found = Checkpoint(tmp_path / "out")
    assert found.names == base.names
    assert "lm_head.weight" not in found.names  # tied: stored once, as in the base
    for name in base.names:
        expected = base.read(name) + changed.read(name) if name in changed else base.read(name)
        assert torch.equal(found.read(name), expected), name


def test_export_model_is_read_by_transformers_and_ties_embeddings(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    export_model(Checkpoint(base_folder), changed, tmp_path / "out", shard_bytes=10_000)
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    plain = AutoModelForCausalLM.from_pretrained(str(base_folder))
    name = changed.names[0]
    assert torch.equal(model.get_parameter(name), plain.get_parameter(name) + changed.read(name))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(str(base_folder)).chat_template


def test_export_model_writes_shards_and_their_index(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    base = Checkpoint(base_folder)
    export_model(base, changed, tmp_path / "out", shard_bytes=10_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert sorted(index["weight_map"]) == list(base.names)
    assert index["metadata"]["total_size"] == base.num_bytes
    for name, shard in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / shard)


def test_export_model_copies_side_files_byte_for_byte_and_no_weights(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in base_folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    for name in ("pytorch_model.bin", "model.gguf", "README.md", ".hidden", "pytorch_model.bin.index.json"):
        (source / name).write_bytes(b"not to be copied")
    (source / "added_tokens.json").write_bytes(b'{ "odd" :\t1}\r\n')
    (source / "model.safetensors.index.json").unlink(missing_ok=True)
    export_model(Checkpoint(source), changed, tmp_path / "out")
    kept = {file.name for file in base_folder.iterdir()} | {"added_tokens.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == kept
    for name in kept - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name


def test_copy_side_files_takes_subfolders_whole_or_not_at_all(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = ("config.json", "additional_chat_templates/tool_use.jinja", "code/deep/model.py", "code/README.md")
    left_out = ("original/consolidated.00.pth", "original/params.json", "onnx/model.onnx", "onnx/config.json")
    left_out += (".cache/x.json", "checkpoint-10/config.json", "code/__pycache__/model.pyc", "code/.hidden/x")
    left_out += ("export.json", "merge.json", "Modelfile", "README.md")  # what the folder says of itself
    for name in (*kept, *left_out):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name, "utf-8")
    target.mkdir()
    copy_side_files(source, target, None)
    found = {file.relative_to(target).as_posix(): file.read_text() for file in target.rglob("*") if file.is_file()}
    assert found == {name: name for name in kept}


def test_export_model_casts_floats_once_and_says_so_in_the_config(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    base = Checkpoint(base_folder)
    export_model(base, changed, tmp_path / "out", dtype="bfloat16")
    found = Checkpoint(tmp_path / "out")
    name = changed.names[0]
    assert {found.info(name).dtype for name in found.names} == {torch.bfloat16}
    assert torch.equal(found.read(name), (base.read(name) + changed.read(name)).bfloat16())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), dtype="auto").dtype == torch.bfloat16


def test_export_model_adds_in_float32_to_a_bfloat16_base(tmp_path: Path) -> None:
    # the bfloat16 neighbours 1 and 1 + 2⁻⁷ meet at 1 + 2⁻⁸: a sum just above goes up, but with the task vector cast to
    # bfloat16 first (2⁻⁸ exactly) it would be a tie and go down to the even 1
    (tmp_path / "base").mkdir()
    write_tensors(tmp_path / "base" / "model.safetensors", {"w": torch.ones(4).bfloat16()})
    write_json(tmp_path / "base" / "config.json", {})
    write_tensors(tmp_path / "v.safetensors", {"w": torch.full((4,), 2**-8 + 2**-18)})
    export_model(Checkpoint(tmp_path / "base"), StoredTaskVector(tmp_path / "v.safetensors"), tmp_path / "out")
    assert Checkpoint(tmp_path / "out").read("w").tolist() == [1 + 2**-7] * 4


def test_export_model_copies_tensors_that_are_not_floats(tmp_path: Path) -> None:
    extra = {"ids": torch.arange(5), "flags": torch.tensor([True, False]), "scalar": torch.tensor(3.0)}
    base = make_base(tmp_path / "base", extra)
    write_tensors(tmp_path / "v.safetensors", {"norm.weight": torch.ones(4)})
    export_model(base, StoredTaskVector(tmp_path / "v.safetensors"), tmp_path / "out", dtype="float16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["ids"], extra["ids"])
    assert torch.equal(found["flags"], extra["flags"])
    assert found["scalar"].dtype == torch.float16
    assert set(found) == set(base.names)


def test_export_model_leaves_nothing_when_it_fails(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file()
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        export_model(Checkpoint(base_folder), changed, tmp_path / "out", finish=fail)
    monkeypatch.setattr(export, "require_space", lambda *args: (_ for _ in ()).throw(RunFolderError("disk full")))
    with pytest.raises(RunFolderError, match="disk full"):
        export_model(Checkpoint(base_folder), changed, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["v.safetensors"]


def test_export_model_refuses_what_the_disk_cannot_hold(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("manyshot.rundir.shutil.disk_usage", lambda path: Usage)
    with pytest.raises(RunFolderError, match=r"the merged model needs 0\.00 GB, the disk has 0\.00 GB free"):
        export_model(Checkpoint(base_folder), changed, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_export_model_twice_gives_equal_bytes(base_folder: Path, changed: StoredTaskVector, tmp_path: Path) -> None:
    for name in ("1", "2"):
        export_model(Checkpoint(base_folder), changed, tmp_path / name, shard_bytes=20_000)
    for file in (tmp_path / "1").iterdir():
        assert file.read_bytes() == (tmp_path / "2" / file.name).read_bytes()


# ---- unchanged tensors in files of their own -------------------------------------------------------------------------


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unchanged tensors get files of their own however small they are."""
    monkeypatch.setattr(export, "WORTH_APART", 1)


def export_two(base: Checkpoint, changed: StoredTaskVector, folder: Path) -> tuple[Path, Path]:
    """The models of two rounds, the second beside the first."""
    later = folder / "later.safetensors"
    write_tensors(later, {name: changed.read(name) * 3 for name in changed.names})
    export_model(base, changed, folder / "one", apart=True)
    export_model(base, StoredTaskVector(later), folder / "two", apart=True, earlier=folder / "one")
    return folder / "one", folder / "two"


@pytest.mark.usefixtures("apart")
def test_export_model_links_what_no_round_changes(base_folder: Path, changed: StoredTaskVector, tmp_path: Path) -> None:
    base = Checkpoint(base_folder)
    one, two = export_two(base, changed, tmp_path)
    shards = sorted(file.name for file in two.glob("*.safetensors"))
    assert [sorted(load_file(two / shard)) for shard in shards] == [
        list(changed.names),
        [name for name in base.names if name not in changed],
    ]
    assert [(one / shard).samefile(two / shard) for shard in shards] == [False, True]
    model = AutoModelForCausalLM.from_pretrained(str(two))
    plain = AutoModelForCausalLM.from_pretrained(str(base_folder))
    for name in base.names:
        added = changed.read(name) * 3 if name in changed else 0.0
        assert torch.equal(model.get_parameter(name), plain.get_parameter(name) + added), name


@pytest.mark.usefixtures("apart")
def test_export_model_copies_what_cannot_be_linked(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Checkpoint(base_folder)
    _, linked = export_two(base, changed, tmp_path / "with")

    def refuse(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("manyshot.rundir.os.link", refuse)
    one, two = export_two(base, changed, tmp_path / "without")
    for file in sorted(linked.glob("*.safetensors")):
        assert (two / file.name).read_bytes() == file.read_bytes()
        assert not (one / file.name).samefile(two / file.name)


@pytest.mark.usefixtures("apart")
def test_export_model_links_no_file_of_other_tensors(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    """An earlier folder of another type has files of the same names, and they are other files."""
    base = Checkpoint(base_folder)
    export_model(base, changed, tmp_path / "one", dtype="bfloat16", apart=True)
    export_model(base, changed, tmp_path / "two", apart=True, earlier=tmp_path / "one")
    found = Checkpoint(tmp_path / "two")
    assert {name: found.info(name) for name in found.names} == {name: base.info(name) for name in base.names}


def test_export_model_keeps_one_file_where_little_is_unchanged(
    base_folder: Path, changed: StoredTaskVector, tmp_path: Path
) -> None:
    export_model(Checkpoint(base_folder), changed, tmp_path / "out", apart=True)
    assert [file.name for file in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]
