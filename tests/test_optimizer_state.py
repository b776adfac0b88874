"""Moments that go on from round to round: rounds are then one training, interrupted or not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TASKS
from manyshot.adapters import expand_adapter
from manyshot.errors import RecipeError
from manyshot.local_update import LocalUpdateJob, run_local_update
from manyshot.models import ModelState
from manyshot.optimizer_state import OPTIMIZER_NAME, load_state, write_state
from manyshot.progress import Progress
from manyshot.recipe import LocalUpdate
from manyshot.rundir import read_json
from manyshot.runner import run
from manyshot.seeding import preserved_random_state
from manyshot.tasks import load_task
from manyshot.tensors import Checkpoint, file_digest
from manyshot.trainer import learning_rate_multipliers
from run_helpers import Runs, distance, load_tensors, phases, round_folder, unlike

PAIR = TASKS[:2]
KEPT = ("local_update.adapter_start=own", "local_update.optimizer_state=kept")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("kept"), tasks=PAIR)


# ---- the file --------------------------------------------------------------------------------------------------------


def steps(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *numbers: int) -> None:
    for number in numbers:
        optimizer.zero_grad()
        sum((p.square() * (number + 1)).sum() + p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()


def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.fill_(number + 0.5)
    names = dict(model.named_parameters())
    groups = [{"params": [names[name] for name in names if kind in name]} for kind in ("weight", "bias")]
    return model, torch.optim.AdamW(groups, lr=0.1)


def test_optimizer_state_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole, optimizer = made()
    steps(whole, optimizer, 1, 2, 3)
    parts, first = made()
    steps(parts, first, 1, 2)
    write_state(first, parts, tmp_path / OPTIMIZER_NAME)
    _, second = made()
    second = torch.optim.AdamW(
        [{"params": [p for p in parts.parameters() if p.dim() == dim]} for dim in (2, 1)], lr=0.1
    )
    load_state(second, parts, tmp_path / OPTIMIZER_NAME)
    steps(parts, second, 3)
    for left, right in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(left, right)
    fresh, third = made()
    steps(fresh, third, 1, 2)
    steps(fresh, torch.optim.AdamW(fresh.parameters(), lr=0.1), 3)
    assert not torch.equal(next(fresh.parameters()), next(whole.parameters()))


def test_optimizer_state_names_its_entries_and_carries_what_was_frozen(tmp_path: Path) -> None:
    model, optimizer = made()
    steps(model, optimizer, 1)
    write_state(optimizer, model, tmp_path / "first")
    names = {f"{layer}.{kind}.{entry}" for layer in "01" for kind in ("weight", "bias") for entry in ENTRIES}
    assert set(Checkpoint(tmp_path / "first").names) == names
    only = torch.optim.AdamW([model.get_parameter("0.weight")], lr=0.1)
    load_state(only, model, tmp_path / "first")
    only.step()
    write_state(only, model, tmp_path / "second", tmp_path / "first")
    first, second = (load_tensors(tmp_path / name) for name in ("first", "second"))
    changed = {name for name in names if not torch.equal(first[name], second[name])}
    assert changed == {f"0.weight.{entry}" for entry in ENTRIES}
    assert float(second["0.weight.step"]) == 2


ENTRIES = ("exp_avg", "exp_avg_sq", "step")


# ---- one training in two rounds --------------------------------------------------------------------------------------


def job_of(runs: Runs, folder: Path, num_steps: int, before: int, *overrides: str, **more: Any) -> LocalUpdateJob:
    recipe = runs.recipe(*KEPT, *overrides)
    return LocalUpdateJob(
        recipe=recipe,
        task=load_task(recipe, PAIR[0]),
        start=more.pop("start", ModelState(Path(recipe.model))),
        base_name="tiny",
        folder=folder,
        round_index=2 if before else 1,
        num_steps=num_steps,
        steps_before=before,
        total_steps=4,
        key=folder.name,
        **more,
    )


def train(job: LocalUpdateJob) -> dict[str, torch.Tensor]:
    with preserved_random_state():
        run_local_update(job, Progress())
    return load_tensors(job.folder / "adapter" / "adapter_model.safetensors")


def test_two_updates_with_own_adapter_and_kept_moments_are_one_training(runs: Runs, tmp_path: Path) -> None:
    whole = train(job_of(runs, tmp_path / "whole", 4, 0))
    first = job_of(runs, tmp_path / "first", 2, 0)
    train(first)
    # the model after two steps, as the merge of that one expert would write it
    task_vector, adapter = tmp_path / "task_vector.safetensors", first.folder / "adapter"
    expand_adapter(Checkpoint(first.start.pretrained), adapter, task_vector)
    start = ModelState(first.start.pretrained, task_vector, adapter)
    second = job_of(runs, tmp_path / "second", 2, 2, start=start, optimizer_state=first.folder / OPTIMIZER_NAME)
    assert distance(train(second), whole) < 2e-5
    assert distance(train(replace(second, folder=tmp_path / "anew", optimizer_state=None)), whole) > 1e-3


def test_warm_up_happens_once_where_moments_are_kept() -> None:
    restart, kept = LocalUpdate(warmup_steps=3), LocalUpdate(warmup_steps=3, optimizer_state="kept")
    assert learning_rate_multipliers(restart, 2, 2, 6) == [0.25, 0.5]
    assert [learning_rate_multipliers(kept, 2, before, 6) for before in (0, 2, 4)] == [[0.25, 0.5], [0.75, 1], [1, 1]]


# ---- in a run --------------------------------------------------------------------------------------------------------


def test_kept_state_is_in_the_record_and_in_the_next_rounds_key(runs: Runs) -> None:
    result = runs.get(*KEPT)
    for task in PAIR:
        folder = round_folder(result, 1) / task
        assert read_json(folder / "local_update.json")["optimizer_state"] == file_digest(folder / OPTIMIZER_NAME)
        assert not (round_folder(result, 2) / task / OPTIMIZER_NAME).exists()  # nothing follows
        stored = load_tensors(folder / OPTIMIZER_NAME)
        assert {float(value) for name, value in stored.items() if name.endswith(".step")} == {2.0}
    assert not list(runs.get("local_update.adapter_start=own").folder.rglob(OPTIMIZER_NAME))


def interrupted(result_folder: Path, folder: Path) -> None:
    """What a kill in the middle of round 2 leaves: its first update is done, the second is not."""
    shutil.copytree(result_folder, folder, symlinks=True)
    for path in (folder / "round_002").iterdir():
        if path.name != PAIR[0]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in ("scores.json", "merged"):
        (folder / name).unlink()


def test_resume_in_round_two_gives_the_unbroken_bytes(runs: Runs) -> None:
    whole = runs.get(*KEPT)
    folder = runs.new_folder()
    interrupted(whole.folder, folder)
    before = len(phases(folder, "local_update"))
    run(runs.recipe(*KEPT), folder, resume=True, repair=True)
    assert unlike(whole.folder, folder) == []
    assert phases(folder, "local_update")[before:] == [(2, PAIR[1])]


def test_another_state_makes_another_update(runs: Runs) -> None:
    """An update that went on from other moments is not taken for this one."""
    whole = runs.get(*KEPT)
    folder = runs.new_folder()
    interrupted(whole.folder, folder)
    other, state = folder / "round_001" / PAIR[1], folder / "round_001" / PAIR[0] / OPTIMIZER_NAME
    shutil.copyfile(other / OPTIMIZER_NAME, state)
    for manifest in folder.rglob("manifest.json"):  # nothing says that it was changed
        manifest.unlink()
    before = len(phases(folder, "local_update"))
    run(runs.recipe(*KEPT), folder, resume=True)
    assert phases(folder, "local_update")[before:] == [(2, PAIR[0]), (2, PAIR[1])]
    assert f"round_002/{PAIR[0]}/adapter/adapter_model.safetensors" in unlike(whole.folder, folder)


def test_kept_state_of_a_full_update_is_of_every_weight(runs: Runs) -> None:
    settings = ("local_update.method=full", "local_update.learning_rate=0.001", "local_update.optimizer_state=kept")
    result = runs.get(*settings)
    stored = Checkpoint(round_folder(result, 1) / PAIR[0] / OPTIMIZER_NAME)
    weights = Checkpoint(Path(runs.recipe().model))
    assert set(stored.names) == {f"{name}.{entry}" for name in weights.names for entry in ENTRIES}
    restarted = runs.get(*settings[:2])
    name = "task_vector.safetensors"
    first = [load_tensors(round_folder(one, 1) / name) for one in (result, restarted)]
    second = [load_tensors(round_folder(one, 2) / name) for one in (result, restarted)]
    assert distance(*first) == 0 and distance(*second) > 1e-5


# ---- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "kept needs parameters that mean the same in every round, and fresh makes another A"),
        (("local_update.adapter_start=svd",), "and svd makes another A"),
        (("local_update.adapter_start=own", "local_update.trainer={optim: sgd}"), "not for trainer.optim: sgd"),
    ],
)
def test_kept_state_is_refused_where_it_means_nothing(runs: Runs, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"local_update\.optimizer_state: .*{message}"):
        runs.recipe("local_update.optimizer_state=kept", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ("local_update.adapter_start=averaged",),
        ("local_update.train_factors=b",),
        ("merge.space=factors",),
        ("local_update.adapter_start=own", "local_update.trainer={optim: adamw_torch}"),
    ],
)
def test_kept_state_is_allowed_where_parameters_mean_the_same(runs: Runs, overrides: tuple[str, ...]) -> None:
    assert runs.recipe("local_update.optimizer_state=kept", *overrides).local_update.optimizer_state == "kept"
