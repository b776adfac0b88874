"""What a run was begun with, and what is told or refused when something of it differs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import MakeRecipe
from manyshot import run_identity
from manyshot.content import LATER
from manyshot.errors import RunFolderError
from manyshot.inputs import Inputs, check_inputs
from manyshot.older_recipe import run_as_now, with_later_keys
from manyshot.recipe_file import to_yaml
from manyshot.run_identity import as_begun, changed_inputs, describe, differences, may_change
from manyshot.rundir import RunFolder, read_json, write_text
from manyshot.yaml_text import read_yaml


@pytest.fixture
def inputs(make_recipe: MakeRecipe) -> Inputs:
    return check_inputs(make_recipe())


@pytest.fixture
def folder(make_recipe: MakeRecipe, inputs: Inputs, tmp_path: Path) -> RunFolder:
    """A run that has just begun."""
    begun = RunFolder(tmp_path / "run")
    assert describe(make_recipe(), begun, inputs, None) == []
    return begun


def older(recipe: dict[str, Any]) -> dict[str, Any]:
    """A resolved recipe as it was before the keys of LATER had come."""
    found = json.loads(json.dumps(recipe))
    for section, later in LATER.items():
        for part in found[section].values() if section == "tasks" else [found[section]]:
            for key in later:
                part.pop(key, None)
    return found


def test_identity_reads_a_recipe_of_an_older_version_as_this_one(make_recipe: MakeRecipe) -> None:
    now = read_yaml(to_yaml(make_recipe()))
    before = older(now)
    assert before != now and len(differences(before, now)) > 5
    assert run_as_now(before) == now


def test_differences_name_every_leaf_of_objects_and_lists() -> None:
    old = {"seed": 0, "tasks": {"a": {"data": "x"}}, "sizes": [1, 2], "rounds": [0.5]}
    new = {"seed": 0, "tasks": {"a": {"data": "y", "rank": 3}}, "sizes": [1, 4], "rounds": [0.5, 0.25]}
    assert differences(old, new) == [
        *("rounds: [0.5] -> [0.5, 0.25]", "sizes.1: 2 -> 4"),
        *("tasks.a.data: x -> y", "tasks.a.rank: None -> 3"),
    ]
    assert differences(old, old) == []


def test_identity_fills_in_what_was_done_before_there_was_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LATER, "merge", {"lookahead": 0})
    raw = {"merge": {"space": "weights"}, "operator": {"name": "mean"}, "seed": 3}
    assert with_later_keys(raw, ["merge", "protocol"]) == raw | {"merge": {"space": "weights", "lookahead": 0}}
    assert with_later_keys({"operator": {"name": "of another package"}}, [])["operator"]["name"] == "of another package"


def test_identity_lets_a_run_of_an_older_version_go_on(
    make_recipe: MakeRecipe, inputs: Inputs, folder: RunFolder
) -> None:
    write_text(folder.recipe, json.dumps(older(read_yaml(folder.recipe.read_text("utf-8")))))
    assert describe(make_recipe(), folder, inputs, None) == []


def test_identity_refuses_another_recipe_with_every_difference(
    make_recipe: MakeRecipe, inputs: Inputs, folder: RunFolder
) -> None:
    with pytest.raises(RunFolderError) as caught:
        describe(make_recipe("seed=7", "protocol.rounds=3"), folder, inputs, None)
    assert "protocol.rounds: 2 -> 3; seed: 0 -> 7" in str(caught.value)
    assert "manyshot extend" in str(caught.value)


def test_identity_says_what_of_data_and_model_changed(
    make_recipe: MakeRecipe, inputs: Inputs, folder: RunFolder
) -> None:
    letters, *others = inputs.tasks
    fewer = replace(letters, train=letters.train[1:], validation=letters.validation[::-1])
    base = replace(inputs.base, digest="other", files=dict(inputs.base.files) | {"config.json": "0", "extra.json": "1"})
    with pytest.raises(RunFolderError) as caught:
        describe(make_recipe(), folder, replace(inputs, base=base, tasks=(fewer, *others)), None)
    message = str(caught.value)
    assert "the content of model, tasks.letters changed since the run began" in message
    for part in (
        "config.json of the model was changed",
        "extra.json of the model is new",
        "letters, train: 24 -> 23 examples",
        "letters, validation: 6 examples, some of them others",
    ):
        assert part in message


def test_identity_of_a_run_that_wrote_no_parts_names_just_what_changed() -> None:
    now = {"model": {"a": "1"}, "tasks": {"math": {"train": {"examples": 1, "sha256": "x"}}}}
    assert changed_inputs({}, now) == []
    assert changed_inputs({"model": {"b": "1"}}, now) == ["a of the model is new", "b of the model is gone"]


def test_identity_tells_another_machine_once_and_writes_it_down(
    make_recipe: MakeRecipe, inputs: Inputs, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = run_identity.package_version
    monkeypatch.setattr(run_identity, "package_version", lambda name: "9.9" if name == "torch" else version(name))
    (told,) = describe(make_recipe(), folder, inputs, None)
    assert told == f"packages.torch: {version('torch')} -> 9.9"
    assert read_json(folder.environment)["resumed_with"] == [{"packages.torch": "9.9"}]
    assert describe(make_recipe(), folder, inputs, None) == []
    monkeypatch.undo()
    assert describe(make_recipe(), folder, inputs, None) == [f"packages.torch: 9.9 -> {version('torch')}"]
    assert read_json(folder.environment)["packages"]["torch"] == version("torch")  # what it was begun with


def test_identity_keeps_the_names_of_finished_work_on_another_device(
    make_recipe: MakeRecipe, inputs: Inputs, folder: RunFolder
) -> None:
    elsewhere = make_recipe("local_update.device=cpu")
    describe(elsewhere, folder, inputs, None)
    assert as_begun(elsewhere, folder) == make_recipe()


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("trackers.names: [] -> ['wandb']", True),
        ("trackers: None -> {}", True),
        ("local_update.device: auto -> cuda", True),
        ("local_update.dtype: auto -> bfloat16", False),
        ("tasks.trackers.data: a -> b", False),
    ],
)
def test_identity_may_change_in_what_decides_nothing(line: str, allowed: bool) -> None:
    assert may_change(line) == allowed
