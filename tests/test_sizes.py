"""What a run's folder holds, at its end and on the way, is what `plan` says beforehand, whatever the recipe keeps."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from conftest import TASKS
from manyshot import export, sizes
from manyshot.inputs import check_inputs
from manyshot.progress import Event
from manyshot.recipe import Recipe
from manyshot.runner import run
from manyshot.sizes import disk_plan
from run_helpers import Runs

PAIR = TASKS[:2]
SMALL = (
    "protocol.local_steps=3",
    "protocol.rounds=3",
    "evaluation.validation_examples=2",
    "evaluation.test_examples=2",
)
# everything that takes room, of both kinds of local update
LORA = (
    *(*SMALL, "local_update.rank=16", "local_update.adapter_start=own", "local_update.optimizer_state=kept"),
    *("merge.reference=start", "merge.outer_optimizer=nesterov", "merge.outer_momentum=0.5"),
)
FULL = (
    *(*SMALL, "local_update.method=full", "local_update.optimizer_state=kept", "evaluation.experts=true"),
    "evaluation.post_hoc=true",
)
KEEPS = (("last", "all"), ("none", "last"))


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """Runs of a model that is not dwarfed by its records: 9 MB, most of it an embedding, which LoRA leaves as it is."""
    folder = tmp_path_factory.mktemp("larger")
    config = LlamaConfig.from_pretrained(str(base_folder))
    config.update({"vocab_size": 12_000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4})
    LlamaForCausalLM(config).save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(base_folder)).save_pretrained(str(folder))
    with pytest.MonkeyPatch.context() as patch:
        for module in (export, sizes):
            patch.setattr(module, "WORTH_APART", 1)
        yield Runs(folder, tmp_path_factory.mktemp("sizes"), tasks=PAIR)


def used(folder: Path) -> int:
    """Bytes on disk, a file of several names once, as du counts; without the report, and what vanishes meanwhile."""
    found = {}
    for file in folder.rglob("*"):
        try:
            status = file.lstat()
        except FileNotFoundError:
            continue
        if file.is_file() and not file.is_symlink() and not file.name.startswith("report."):
            found[status.st_ino] = status.st_size
    return sum(found.values())


def run_and_watch(recipe: Recipe, folder: Path) -> tuple[int, int]:
    """What a run leaves, and the most that it held, looked at after everything that it did."""
    most = 0

    def look(event: Event) -> None:
        nonlocal most
        most = max(most, used(folder))

    run(recipe, folder, listener=look)
    return used(folder), most


@pytest.mark.parametrize("overrides", [LORA, FULL], ids=["lora", "full"])
def test_sizes_are_what_a_run_leaves_for_every_keep(runs: Runs, overrides: tuple[str, ...]) -> None:
    folder, recipe = runs.new_folder(), runs.recipe(*overrides)
    planned = disk_plan(recipe, check_inputs(recipe).sizes)
    left, most = run_and_watch(recipe, folder)
    assert planned["total"] == pytest.approx(left, rel=0.1)
    assert planned["peak"] == pytest.approx(most, rel=0.1)
    for adapters, merged in KEEPS:
        copy, kept = runs.new_folder(), runs.recipe(*overrides, f"keep.adapters={adapters}", f"keep.merged={merged}")
        shutil.copytree(folder, copy, symlinks=True, copy_function=os.link)  # files of several names stay such
        run(kept, copy, resume=True)
        less = disk_plan(kept, check_inputs(kept).sizes)["total"]
        assert less < planned["total"]
        assert less == pytest.approx(used(copy), rel=0.1)


@pytest.mark.slow  # a whole run more, for the figure on the way; what it leaves is tested above
def test_sizes_are_the_most_that_a_run_holds_where_it_removes_what_it_can(runs: Runs) -> None:
    least = runs.recipe(*FULL, "keep.adapters=none", "keep.merged=last")
    _, most = run_and_watch(least, runs.new_folder())
    planned = disk_plan(least, check_inputs(least).sizes)
    assert planned["peak"] == pytest.approx(most, rel=0.1)
    assert planned["peak"] < 0.7 * disk_plan(runs.recipe(*FULL), check_inputs(runs.recipe(*FULL)).sizes)["peak"]
