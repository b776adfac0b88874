"""The safetensors reader and writer: what they read and write, and what they refuse."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from manyshot import tensor_writer
from manyshot.errors import ModelError
from manyshot.tensor_writer import (
    PositionedWriter,
    SafetensorsWriter,
    plan_shards,
    shard_name,
    write_index,
    write_tensors,
)
from manyshot.tensors import INDEX_NAME, KINDS, SINGLE_NAME, Checkpoint, TensorInfo

ONE = torch.ones(2, 3)
DTYPES = {kind: TensorInfo((), kind).dtype for kind in KINDS}


def write_folder_index(folder: Path, weight_map: object) -> None:
    folder.mkdir(exist_ok=True)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


# ---- writer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", sorted(DTYPES))
def test_writer_output_is_read_by_safetensors_with_equal_bits(stored: str, tmp_path: Path) -> None:
    dtype = DTYPES[stored]
    values = torch.arange(-6, 6).reshape(3, 4).clamp(min=0 if stored in ("U8", "BOOL") else -6).to(dtype)
    tensors = {"x": values, "empty": torch.zeros(0, 4).to(dtype), "scalar": values[2, 3].clone()}
    write_tensors(tmp_path / "f.safetensors", tensors)
    found = load_file(tmp_path / "f.safetensors")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    ours = Checkpoint(tmp_path / "f.safetensors")
    assert ours.info("x") == TensorInfo.of((3, 4), dtype)
    assert ours.num_bytes == 13 * dtype.itemsize


def test_writer_output_is_read_by_safetensors_for_tensors_that_are_not_contiguous(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    write_tensors(tmp_path / "f.safetensors", {"x": tensor})
    assert torch.equal(load_file(tmp_path / "f.safetensors")["x"], tensor)


def test_writer_aligns_the_data_to_eight_bytes() -> None:
    for name in ("x", "xy", "xyz", "a much longer name of a tensor"):
        stream = io.BytesIO()
        SafetensorsWriter(stream, {name: TensorInfo.of((2, 3), torch.float32)})
        assert struct.unpack("<Q", stream.getvalue()[:8])[0] % 8 == 0
        assert len(stream.getvalue()) % 8 == 0


def test_writer_refuses_another_order_shape_or_type_and_a_tensor_that_is_missing(tmp_path: Path) -> None:
    infos = {"a": TensorInfo.of((2, 3), torch.float32), "b": TensorInfo.of((2, 3), torch.float32)}
    for name, tensor in (("b", ONE), ("a", ONE.T), ("a", ONE.double())):
        with pytest.raises(ModelError, match=rf"tensor '{name}' .* was written where 'a' .* belongs"):
            SafetensorsWriter(io.BytesIO(), infos).write(name, tensor)
    with (
        pytest.raises(ModelError, match="tensor 'b' was never written"),
        SafetensorsWriter(io.BytesIO(), infos) as writer,
    ):
        writer.write("a", ONE)


PAIR = {"a": TensorInfo((2, 3), "F32"), "b": TensorInfo((4,), "BF16")}


def test_positioned_writer_takes_entries_in_any_order_from_any_thread(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4).bfloat16()}
    files = {tmp_path / "1": {"a": PAIR["a"]}, tmp_path / "2": {"b": PAIR["b"]}}
    with PositionedWriter(files) as writer:
        parts = [("b", 3, 4), ("a", 4, 6), ("a", 0, 1), ("b", 0, 3), ("a", 1, 4)]
        threads = [
            threading.Thread(target=writer.write, args=(name, i, tensors[name].reshape(-1)[i:j]))
            for name, i, j in parts
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(load_file(tmp_path / "1")["a"], tensors["a"])
    assert torch.equal(load_file(tmp_path / "2")["b"], tensors["b"])
    write_tensors(tmp_path / "3", {"a": tensors["a"]})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "3").read_bytes()


def test_positioned_writer_lets_others_write_into_its_file(tmp_path: Path) -> None:
    with PositionedWriter({tmp_path / "f": PAIR}) as writer:
        writer.write("a", 0, torch.zeros(6))
        file, begin, kind = writer.place("b")
        os.pwrite(file, torch.ones(4).bfloat16().view(torch.uint8).numpy().tobytes(), begin)
        writer.wrote("b", 4)
    assert kind == "BF16"
    assert load_file(tmp_path / "f")["b"].tolist() == [1.0] * 4


def test_positioned_writer_refuses_other_types_and_positions_and_entries_never_written(tmp_path: Path) -> None:
    with PositionedWriter({tmp_path / "f": PAIR}) as writer:
        for name, start, entries in (("a", 0, torch.zeros(6).double()), ("b", 0, torch.zeros(4).half())):
            with pytest.raises(ModelError, match=rf"tensor '{name}': .*float.* not belong into .*shape="):
                writer.write(name, start, entries)
        for start, count in ((0, 7), (5, 2), (6, 1)):
            with pytest.raises(ModelError, match=r"tensor 'a': entries .* do not belong into"):
                writer.write("a", start, torch.zeros(count))
        writer.write("a", 0, torch.ones(6))
        writer.write("b", 0, torch.ones(4).bfloat16())
    assert load_file(tmp_path / "f")["a"].sum() == 6
    with pytest.raises(ModelError, match="tensor 'b': 3 entries were never written"):
        write_first_of_b(tmp_path)
    with pytest.raises(KeyError, match="own error"), PositionedWriter({tmp_path / "f": PAIR}):
        raise KeyError("own error")  # and not that entries are missing


def write_first_of_b(folder: Path) -> None:
    with PositionedWriter({folder / "f": PAIR}) as writer:
        writer.write("a", 0, torch.ones(6))
        writer.write("b", 0, torch.ones(1).bfloat16())


def test_positioned_writer_names_the_file_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/f'"):
        PositionedWriter({tmp_path / "f.partial": PAIR})
    monkeypatch.setattr(os, "pwrite", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(OSError, match=r"No space left: '.*/out/g'") as caught:
        (tmp_path / "out.partial").mkdir()
        PositionedWriter({tmp_path / "out.partial" / "g": PAIR})
    assert caught.value.errno == errno.ENOSPC


def test_positioned_writer_keeps_an_error_of_the_disk_that_came_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system tells of it once, to whoever asks first."""
    asked = threading.Event()

    def fail(descriptor: int) -> None:
        asked.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(tensor_writer, "FLUSH_BYTES", 1)
    monkeypatch.setattr(os, "fdatasync", fail)
    with (
        pytest.raises(OSError, match=r"Input/output error: '.*/f'"),
        PositionedWriter({tmp_path / "f": PAIR}) as writer,
    ):
        writer.write("a", 0, torch.ones(6))
        assert asked.wait(5)
        writer.write("b", 0, torch.ones(4).bfloat16())


def test_write_tensors_leaves_nothing_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"torch\.complex64 cannot be stored"):
        write_tensors(tmp_path / "f.safetensors", {"x": torch.zeros(2, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, database=None, derandomize=True, max_examples=50)
@given(st.lists(st.integers(0, 40), max_size=12), st.integers(1, 100))
def test_plan_shards_keeps_order_and_limit(sizes: list[int], limit: int) -> None:
    infos = {f"t{i:02d}": TensorInfo.of((size,), torch.uint8) for i, size in enumerate(sizes)}
    shards = plan_shards(infos, limit)
    assert [name for shard in shards for name in shard] == list(infos)
    for shard in shards:
        assert len(shard) == 1 or sum(info.num_bytes for info in shard.values()) <= limit


def test_plan_shards_by_hand() -> None:
    infos = {name: TensorInfo.of((size,), torch.uint8) for name, size in (("a", 4), ("b", 5), ("c", 20), ("d", 1))}
    assert [list(shard) for shard in plan_shards(infos, 10)] == [["a", "b"], ["c"], ["d"]]
    assert [list(shard) for shard in plan_shards(infos, 9)] == [["a", "b"], ["c"], ["d"]]
    assert [list(shard) for shard in plan_shards(infos, 8)] == [["a"], ["b"], ["c"], ["d"]]
    assert [shard_name(i, 2) for i in (1, 2)] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


def test_write_index_is_there_for_several_shards_only(tmp_path: Path) -> None:
    one, two = {"a": TensorInfo.of((4,), torch.float32)}, {"b": TensorInfo.of((3,), torch.float32)}
    write_index(tmp_path, [one])
    assert list(tmp_path.iterdir()) == []
    write_index(tmp_path, [one, two])
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    assert index["metadata"] == {"total_size": 28}
    assert index["weight_map"] == {"a": shard_name(1, 2), "b": shard_name(2, 2)}


# ---- reader ----------------------------------------------------------------------------------------------------------


def test_checkpoint_names_are_sorted_and_entries_are_slices(tmp_path: Path) -> None:
    tensors = {"z": torch.arange(12.0).reshape(4, 3), "a": torch.tensor(7.0), "m": torch.arange(3)}
    save_file(tensors, tmp_path / SINGLE_NAME)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == ("a", "m", "z")
    assert "z" in checkpoint
    assert "y" not in checkpoint
    for start, stop in ((0, 12), (3, 9), (4, 5), (11, 12), (5, 5)):
        checkpoint.read_entries("z", start, entries := torch.empty(stop - start))
        assert torch.equal(entries, torch.arange(float(start), float(stop)))
    checkpoint.read_entries("a", 0, scalar := torch.empty(1))
    assert scalar.item() == 7.0
    assert checkpoint.read("m").dtype == torch.int64


def test_checkpoint_follows_the_index_and_ignores_other_files(tmp_path: Path) -> None:
    save_file({"a": ONE}, tmp_path / "one.safetensors")
    save_file({"b": ONE * 2}, tmp_path / "two.safetensors")
    save_file({"junk": ONE}, tmp_path / "other.safetensors")
    write_folder_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == ("a", "b")
    assert checkpoint.read("b").sum() == 12


def test_checkpoint_without_index_is_the_single_file_as_for_transformers(tmp_path: Path) -> None:
    save_file({"a": ONE}, tmp_path / SINGLE_NAME)
    save_file({"layers.0.a": ONE}, tmp_path / "consolidated.safetensors")
    assert Checkpoint(tmp_path).names == ("a",)


@pytest.mark.parametrize("stored", sorted(DTYPES))
def test_checkpoint_entries_have_the_stored_bits(stored: str, tmp_path: Path) -> None:
    values = torch.arange(48, dtype=torch.uint8)[: 5 * DTYPES[stored].itemsize] % 2
    tensors = {"before": torch.ones(3, dtype=torch.uint8), "x": values.view(DTYPES[stored])}
    write_tensors(tmp_path / SINGLE_NAME, tensors)  # x does not begin at a multiple of its width
    out = torch.empty(3, dtype=DTYPES[stored])
    Checkpoint(tmp_path).read_entries("x", 2, out)
    assert torch.equal(out.view(torch.uint8), tensors["x"][2:].view(torch.uint8))


def test_checkpoint_names_a_file_that_was_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / SINGLE_NAME)
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / SINGLE_NAME).write_bytes((tmp_path / SINGLE_NAME).read_bytes()[:2000])
    with pytest.raises(ModelError, match=r"model\.safetensors: ends within tensor 'a'; it was changed meanwhile"):
        checkpoint.read_entries("a", 0, torch.empty(1000))


def test_checkpoint_refuses_a_truncated_file_and_names_it(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000)}, tmp_path / SINGLE_NAME)
    blob = (tmp_path / SINGLE_NAME).read_bytes()
    for size in (0, 4, 20, len(blob) // 2, len(blob) - 1):
        (tmp_path / SINGLE_NAME).write_bytes(blob[:size])
        with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file"):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "blob",
    [
        b"\xff" * 64,
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 8) + b"not json",
        b"GGUF" + b"\0" * 60,
        b"\x80\x02}q\x00." * 4,
    ],
)
def test_checkpoint_refuses_a_header_that_is_garbage(blob: bytes, tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).write_bytes(blob)
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint(tmp_path)


def test_checkpoint_refuses_a_header_whose_offsets_do_not_fit(tmp_path: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [10], "data_offsets": [0, 4]}}
    blob = json.dumps(header).encode()
    (tmp_path / SINGLE_NAME).write_bytes(struct.pack("<Q", len(blob)) + blob + b"\0" * 4)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        Checkpoint(tmp_path)


def test_checkpoint_refuses_a_missing_shard_and_names_it(tmp_path: Path) -> None:
    write_folder_index(tmp_path, {"a": "gone.safetensors"})
    with pytest.raises(ModelError, match=r"names the shard 'gone.safetensors', which is missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../evil.safetensors", "/etc/evil.safetensors", "sub/evil.safetensors", "..", ""])
def test_checkpoint_refuses_an_index_that_leaves_the_folder(shard: str, tmp_path: Path) -> None:
    save_file({"a": ONE}, tmp_path / "evil.safetensors")
    folder = tmp_path / "model"
    write_folder_index(folder, {"a": shard})
    with pytest.raises(ModelError, match="which is not a file of this folder"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"])
def test_checkpoint_refuses_a_damaged_index(text: str, tmp_path: Path) -> None:
    save_file({"a": ONE}, tmp_path / SINGLE_NAME)
    (tmp_path / INDEX_NAME).write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        Checkpoint(tmp_path)


def test_checkpoint_refuses_a_tensor_that_only_the_index_knows(tmp_path: Path) -> None:
    save_file({"a": ONE}, tmp_path / "one.safetensors")
    write_folder_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(ModelError, match=r"tensor 'b' is in 'one\.safetensors', which lacks it"):
        Checkpoint(tmp_path)


def test_checkpoint_refuses_a_tensor_that_stands_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": ONE, name: ONE + 1}, tmp_path / f"{name}.safetensors")
    write_folder_index(tmp_path, {"a": "one.safetensors", "one": "one.safetensors", "two": "two.safetensors"})
    with pytest.raises(ModelError, match=r"two\.safetensors: tensor 'a' is also in one\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_checkpoint_refuses_pickles_and_says_how_to_convert(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match=rf"holds {name} but no safetensors; .*save_pretrained\(new_folder\)"):
        Checkpoint(tmp_path)


def test_checkpoint_refuses_a_folder_without_weights_and_a_missing_one(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a model folder without weights"):
        Checkpoint(tmp_path)
    with pytest.raises(ModelError, match="no such model folder"):
        Checkpoint(tmp_path / "nowhere")


def test_checkpoint_refuses_a_type_it_does_not_know(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, dtype=torch.complex64)}, tmp_path / SINGLE_NAME)
    with pytest.raises(ModelError, match="tensor 'a' has type C64; known are F64, F32"):
        Checkpoint(tmp_path)
