"""Files of a run that were changed, cut short or removed: a resume names them, --repair redoes just their steps."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from conftest import TASKS
from manyshot.errors import RunFolderError
from manyshot.manifest import MANIFEST, read_manifest
from manyshot.runner import run
from run_helpers import Runs, contents, phases, unlike

PAIR = TASKS[:2]
RUN = (
    *("protocol.rounds=2", "protocol.local_steps=2", "evaluation.experts=true", "evaluation.validation_examples=2"),
    *("evaluation.test_examples=2", "local_update.adapter_start=own", "local_update.optimizer_state=kept"),
    *("merge.reference=start", "merge.outer_optimizer=nesterov", "merge.outer_momentum=0.5"),
)


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("repair"), tasks=PAIR)


@pytest.fixture
def finished(runs: Runs) -> Path:
    done = runs.get(*RUN).folder
    folder = runs.new_folder()
    shutil.copytree(done, folder, symlinks=True)
    return folder


def flip(file: Path) -> None:
    """Change the last byte of a file, whose size and time of writing stay."""
    status, data = file.stat(), file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_run_names_every_file_in_manifests_but_those_that_tell_of_it(runs: Runs) -> None:
    folder = runs.get(*RUN).folder
    manifests = [file.parent for file in folder.rglob(MANIFEST)]
    named = {str((place / name).relative_to(folder)) for place in manifests for name in read_manifest(place)["files"]}
    assert contents(folder).keys() - named == {"recipe.yaml", "environment.json", MANIFEST, "merged"}
    assert named <= contents(folder).keys()


def test_repair_redoes_just_the_damaged_steps_and_comes_to_the_same_bytes(runs: Runs, finished: Path) -> None:
    first, second = PAIR
    flip(finished / "round_001" / first / "adapter" / "adapter_model.safetensors")
    os.truncate(finished / "round_001" / "outer_state.safetensors", 100)
    (finished / "round_002" / "scores.json").unlink()
    shutil.rmtree(finished / "experts" / second)
    (finished / "round_002" / "loss_gap.json").write_text("{}")
    before = contents(finished)
    with pytest.raises(RunFolderError) as caught:
        run(runs.recipe(*RUN), finished, resume=True)
    message = str(caught.value)
    for part in (
        f"round_001/{first}/adapter/adapter_model.safetensors was changed",
        "round_001/outer_state.safetensors has 100 bytes, and had ",
        "round_002/scores.json is gone",
        f"experts/{second}/manifest.json is gone",
        "round_002/loss_gap.json has 2 bytes",
        f"redoes just: experts, round_001/{first}: local update, round_001: merge, round_002: records, "
        "round_002: measurement",
    ):
        assert part in message
    assert contents(finished) == before
    trained, merged = len(phases(finished, "local_update")), len(phases(finished, "merge"))
    run(runs.recipe(*RUN), finished, repair=True)
    assert phases(finished, "local_update")[trained:] == [(1, second), (1, first)]  # the expert, and the update
    assert phases(finished, "merge")[merged:] == [(1, "")]
    assert unlike(runs.get(*RUN).folder, finished) == []
    run(runs.recipe(*RUN), finished, resume=True)


def test_repair_of_a_run_that_is_as_it_was_changes_nothing(runs: Runs, finished: Path) -> None:
    run(runs.recipe(*RUN), finished, repair=True)
    assert unlike(runs.get(*RUN).folder, finished) == []


def test_resume_makes_a_merged_model_anew_that_was_removed_to_save_space(runs: Runs, finished: Path) -> None:
    shutil.rmtree(finished / "round_001" / "merged")
    run(runs.recipe(*RUN), finished, resume=True)
    assert unlike(runs.get(*RUN).folder, finished) == []
