"""The short form of `make fuzz`, and whether the driver sees each kind of harm that it looks for."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import fuzz_driver
from fuzz_driver import Session, replay, slug, try_input
from fuzz_mutate import mutate_bytes, mutate_json, mutate_lines, mutate_safetensors, mutate_yaml
from fuzz_sweep import CHANGES, Sweep
from fuzz_targets import Arena, Target
from manyshot.errors import ModelError

# of all targets together; the long form has 100,000
INPUTS = 250


@pytest.fixture(scope="module")
def arena(tmp_path_factory: pytest.TempPathFactory) -> Arena:
    return Arena(tmp_path_factory.mktemp("fuzz") / "arena")


def test_every_input_that_others_are_made_from_is_accepted(arena: Arena) -> None:
    """Otherwise what is made of it would never get behind the first check."""
    for target in arena.targets():
        for data in target.seeds[:3]:
            assert try_input(arena, target, data) == ("accepted", ""), target.name


def test_changed_inputs_do_no_harm(arena: Arena) -> None:
    targets = arena.targets()
    parts = sum(target.part for target in targets)
    for target in targets:
        for index in range(-(-INPUTS * target.part // parts)):
            rng = random.Random(f"short/{target.name}/{index}")
            data = target.mutate(rng.choice(target.seeds), rng, target.seeds)
            kind, what = try_input(arena, target, data)
            assert kind != "harm", f"{target.name}, input {index}: {what}"


def test_a_sweep_has_every_change_of_every_place_once(arena: Arena) -> None:
    target = Target("t", (b'{"a": [{"b": 1}, {"b": 2}], "c": 3}', b'{"a": [], "d": 4}'), json.loads, mutate_json)
    places, found = ["", "a", "a.#", "a.#.b", "c", "d"], Sweep(target)
    assert len(found) == len(places) * len(CHANGES)
    made = [json.loads(data) for data in found]
    assert {"a": [{"b": 1}, {"b": 2}], "c": None} in made and {"a": [{"b": 1}, {"b": 2}]} in made
    assert {"a": [{"b": 1}, {"b": 2}], "../../outside": 3} in made and {"a": [{"b": 10**400}, {"b": 2}], "c": 3} in made
    assert {target.name for target in arena.targets() if not len(Sweep(target))} == {
        *("overrides", "data csv", "data tsv", "data parquet"),
    }


@pytest.mark.parametrize("name", ["recipe run", "run record", "factors", "tune journal", "safetensors"])
def test_a_slice_of_a_sweep_does_no_harm(arena: Arena, name: str) -> None:
    target = next(target for target in arena.targets() if target.name == name)
    sweep = Sweep(target)
    for index in range(7, len(sweep), len(sweep) // 20):
        kind, what = try_input(arena, target, sweep[index])
        assert kind != "harm", f"{target.name}, change {index}: {what}"


def test_targets_are_all_kinds_of_files_that_come_from_strangers(arena: Arena) -> None:
    assert {target.name for target in arena.targets()} == {
        *("recipe run", "recipe compare", "recipe tune", "recipe merge", "overrides"),
        *("data jsonl", "data json", "data csv", "data tsv", "data parquet"),
        *("safetensors", "shard index", "adapter config", "adapter weights", "factors"),
        *("model config", "tokenizer", "model card"),
        *("run record", "run metrics", "run recipe", "compare results", "tune journal"),
    }


@pytest.mark.parametrize("mutate", [mutate_bytes, mutate_json, mutate_lines, mutate_safetensors, mutate_yaml])
def test_changes_follow_the_seed_and_do_change(mutate: Callable[..., bytes]) -> None:
    data = b'{"a": [1, 2, {"b": "c"}], "d": null}'
    changed = [mutate(data, random.Random(i), [data]) for i in range(50)]
    assert changed == [mutate(data, random.Random(i), [data]) for i in range(50)]
    assert len(set(changed)) > 25 and sum(one != data for one in changed) > 40


# ---- what the driver sees --------------------------------------------------------------------------------------------


def harmful(kind: str, outside: Path) -> Callable[[bytes], object]:
    def spin(data: bytes) -> None:
        while True:
            pass

    def write(data: bytes) -> None:
        outside.unlink(missing_ok=True)

    acts: dict[str, Callable[[bytes], object]] = {
        "traceback": lambda data: {}["missing"],
        "recursion": lambda data: json.loads("[" * 100_000),
        "hang": spin,
        "write": write,
        "pickle": lambda data: pickle.loads(pickle.dumps(Path("a"))),
        "program": lambda data: subprocess.run(["true"], check=True),
        "memory": lambda data: bytearray(2 * 2**30),
        "death": lambda data: os._exit(9),
    }
    return acts[kind]


def target_of(read: Callable[[bytes], object]) -> Target:
    return Target("made up", (b"seed",), read, mutate_bytes)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("traceback", "KeyError: 'missing'"),
        ("recursion", "RecursionError"),
        ("hang", "more than 0.2 s of processor time"),
        ("write", "os.remove "),
        ("pickle", "pickle.find_class"),
        ("program", "subprocess.Popen"),
    ],
)
def test_driver_sees(arena: Arena, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, said: str) -> None:
    monkeypatch.setattr(fuzz_driver, "SECONDS", 0.2)
    found, what = try_input(arena, target_of(harmful(kind, tmp_path / "outside")), b"")
    assert found == "harm" and said in what
    assert (kind == "write") == (str(tmp_path / "outside") in what)


def test_driver_lets_errors_of_ours_and_writes_inside_pass(arena: Arena) -> None:
    def refuse(data: bytes) -> None:
        (arena.out / "written").write_bytes(data)
        raise ModelError("no")

    assert try_input(arena, target_of(refuse), b"") == ("refused", "no")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # it is multi-threaded, and forks
@pytest.mark.parametrize(("kind", "said"), [("memory", "MemoryError"), ("death", "its process ended with 9")])
def test_driver_keeps_what_ends_or_fills_a_process_and_goes_on(
    arena: Arena, tmp_path: Path, kind: str, said: str
) -> None:
    calls = {b"seed": lambda data: None}
    target = target_of(lambda data: calls.get(data, harmful(kind, tmp_path / "outside"))(data))
    session = Session(tmp_path / "session", seed=1)
    session.fuzz(arena, target, 3)
    counts = session.counts(target)
    assert counts["inputs"] == 3 and counts["harm"] >= 1
    kept = sorted(session.failures.glob("*.bin"))
    assert len(kept) == counts["harm"] and kept[0].name.startswith("made-up-0000000")
    text = kept[0].with_suffix(".txt").read_text("utf-8")
    assert said in text and f"--replay {kept[0]}" in text


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_driver_goes_on_where_it_was_and_does_the_same_as_without_a_stop(arena: Arena, tmp_path: Path) -> None:
    target = next(target for target in arena.targets() if target.name == "shard index")
    whole, parts = Session(tmp_path / "whole", seed=7), Session(tmp_path / "parts", seed=7)
    whole.fuzz(arena, target, 40)
    parts.fuzz(arena, target, 15)
    parts = Session(tmp_path / "parts", seed=7)
    assert parts.counts(target)["inputs"] == 15
    parts.fuzz(arena, target, 40)
    said = [{key: value for key, value in one.counts(target).items() if key != "slowest"} for one in (whole, parts)]
    assert said[0] == said[1] and said[0]["inputs"] == 40
    names = [[file.name for file in sorted((one.corpus / slug(target.name)).iterdir())] for one in (whole, parts)]
    assert names[0] == names[1] and names[0]
    with pytest.raises(SystemExit, match="was begun with seed 7"):
        Session(tmp_path / "parts", seed=8)


def test_replay_reads_a_kept_input_again(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz_driver, "bound_memory", lambda: None)  # the tests' own process
    file = tmp_path / "shard-index-00000003.bin"
    file.write_bytes(b'{"weight_map": {"a": "../outside.safetensors"}}')
    began = time.time()
    assert replay(file, arena) == 0 and time.time() - began < 60
    assert "shard index: refused" in capsys.readouterr().out
