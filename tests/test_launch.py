"""A local update in several processes is the one of a single process; what ends a launch is told by rank and task."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manyshot import launcher
from manyshot.content import keyed
from manyshot.errors import ModelError, RecipeError, TrainingError
from manyshot.inputs import check_inputs
from manyshot.launch_files import MARK
from manyshot.launch_spec import command_line, read_launch
from manyshot.local_failure import Attempt, try_local_update
from manyshot.local_update import LocalUpdateJob, run_local_update
from manyshot.loss_gap import counted_logits
from manyshot.models import ModelState, Placement, choose_placement, load_model
from manyshot.process_mark import is_alive
from manyshot.progress import Event, Progress
from manyshot.recipe_file import to_yaml
from manyshot.run_identity import as_begun, differences, may_change, recipe_of
from manyshot.rundir import RunFolder, read_json, write_text
from manyshot.seeding import preserved_random_state
from manyshot.spread import spread_over
from manyshot.tasks import load_task
from manyshot.yaml_text import read_yaml
from run_helpers import Runs, distance, load_tensors, uneven_rows

HERE = Path(__file__).parent
TWO = ("local_update.launcher=accelerate", "local_update.launch={num_processes: 2}")
FSDP = (
    TWO[0],
    "local_update.launch={num_processes: 2, use_fsdp: true, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}",
)
MakeJob = Callable[..., LocalUpdateJob]


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("launches"), uneven_rows)


@pytest.fixture
def make_job(runs: Runs, tmp_path: Path) -> MakeJob:
    def make(*overrides: str, name: str = "job") -> LocalUpdateJob:
        recipe = runs.recipe(*overrides)
        return LocalUpdateJob(
            recipe=recipe,
            task=load_task(recipe, "letters"),
            start=ModelState(Path(recipe.model)),
            base_name="tiny",
            folder=tmp_path / name,
            round_index=1,
            num_steps=3,
            steps_before=2,
            total_steps=5,
            key="k",
        )

    return make


def run_job(job: LocalUpdateJob, progress: Progress | None = None) -> dict[str, Any]:
    with preserved_random_state():
        return run_local_update(job, progress or Progress())


def assert_same(one: LocalUpdateJob, launched: LocalUpdateJob, *, within: float) -> None:
    """Two local updates that differ by the order of sums: records, and every tensor of every file."""
    ours, theirs = read_json(one.folder / "local_update.json"), read_json(launched.folder / "local_update.json")
    assert ours.pop("train_losses") == pytest.approx(theirs.pop("train_losses"), abs=5e-6)
    assert ours["validation"].pop("loss") == pytest.approx(theirs["validation"].pop("loss"), abs=5e-6)
    assert ours == theirs
    names = {str(file.relative_to(one.folder)) for file in one.folder.rglob("*")}
    assert names == {str(file.relative_to(launched.folder)) for file in launched.folder.rglob("*")}
    files = [name for name in names if name.endswith(".safetensors")]
    assert files
    for name in files:
        left, right = load_tensors(one.folder / name), load_tensors(launched.folder / name)
        assert {key: tensor.dtype for key, tensor in left.items()} == {key: t.dtype for key, t in right.items()}
        assert distance(left, right) < within
    for name in names - set(files):
        if name.endswith(".json") and Path(name).name not in ("local_update.json", "manifest.json"):
            assert (one.folder / name).read_bytes() == (launched.folder / name).read_bytes()


# ---- the same training -----------------------------------------------------------------------------------------------


def test_launch_on_two_ranks_is_the_training_of_one_process(make_job: MakeJob) -> None:
    one, two = make_job(name="one"), make_job(*TWO, "local_update.micro_batch_size=1", name="two")
    run_job(one)
    events: list[Event] = []
    record = run_job(two, Progress(events.append))
    assert record == read_json(two.folder / "local_update.json")
    assert_same(one, two, within=5e-6)
    steps = [event for event in events if event.kind == "advance" and event.phase == "local_update"]
    assert [(event.done, event.total) for event in steps] == [(1, 3), (2, 3), (3, 3)]
    assert [event.phase for event in events if event.kind == "end"] == ["load", "local_update", "save", "validation"]


@pytest.mark.slow  # a launch takes 20 s of processor time: three interpreters load torch
@pytest.mark.parametrize("method", ["lora", "full"])
def test_launch_in_shards_leaves_one_normal_checkpoint(
    method: str, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE / "fsdp_on_cpu"))
    same = (f"local_update.method={method}", f"local_update.learning_rate={0.01 if method == 'lora' else 0.001}")
    one, shards = make_job(*same, name="one"), make_job(*same, *FSDP, name="shards")
    run_job(one)
    run_job(shards)
    assert_same(one, shards, within=5e-6)


@pytest.mark.slow  # a launch, as above
def test_launch_whose_shards_are_refused_says_so(make_job: MakeJob) -> None:
    job = make_job(*FSDP)
    with pytest.raises(ModelError, match="round 1, task 'letters': accelerate cannot shard with fsdp on cpu"):
        run_job(job)


@pytest.mark.slow  # four launches
@pytest.mark.timeout(1200)
def test_launches_of_all_weights_go_on_with_moments_through_a_run(base_folder: Path, tmp_path: Path) -> None:
    pair = Runs(base_folder, tmp_path, uneven_rows, tasks=("letters", "numbers"))
    same = ("local_update.method=full", "local_update.optimizer_state=kept", "local_update.learning_rate=0.001")
    one, two = pair.get(*same), pair.get(*same, *TWO)
    for name in ("round_001/letters/optimizer.safetensors", "round_002/merged/model.safetensors"):
        assert distance(load_tensors(one.folder / name), load_tensors(two.folder / name)) < 2e-5
    weights = [read_json(done.folder / "round_002" / "loss_gap.json")["weights"] for done in (one, two)]
    assert weights[0] == pytest.approx(weights[1], abs=1e-4)
    assert not list(two.folder.rglob("launch.log"))


@pytest.mark.slow  # a launch, as above
def test_launch_that_loses_a_rank_names_it(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import os, threading\n"
        "if os.environ.get('RANK') == '1':\n"
        "    threading.Timer(2.0, lambda: os.kill(os.getpid(), 9)).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = make_job(*TWO)
    with pytest.raises(
        TrainingError, match=r"round 1, task 'letters': rank 1 of 2 was ended by signal SIGKILL.*memory"
    ):
        run_job(job)
    assert "rank      : 1" in (job.folder / "launch.log").read_text()


# ---- its end ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def launch_fake(make_job: MakeJob, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalUpdateJob]:
    """launch_fake("hang"): a job whose launcher is fake_launch.py."""

    def make(how: str, *overrides: str) -> LocalUpdateJob:
        line = [sys.executable, str(HERE / "fake_launch.py"), how]
        monkeypatch.setattr(launcher, "command_line", lambda *given: [*line, str(given[-1])])
        return make_job(*TWO, *overrides)

    return make


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("ValueError", TrainingError, r"^round 1, task 'letters': rank 1 of 2 failed \(ValueError: said by 1\); .*log"),
        ("ModelError", ModelError, "^said by 1\nand more$"),
        ("OutOfMemoryError", MemoryError, "^rank 1 of 2: said by 1"),
        ("OSError", OSError, "rank 1 of 2: No space left on device: 'full.bin'"),
        ("killed", TrainingError, "^round 1, task 'letters': rank 1 of 2 was ended by signal SIGKILL; most often"),
        (
            "nothing",
            TrainingError,
            "^round 1, task 'letters': accelerate launch ended with exit code 1, and no rank says why",
        ),
    ],
)
def test_launch_that_fails_tells_of_the_first_rank_that_did(
    how: str, kind: type[Exception], message: str, launch_fake: Callable[..., LocalUpdateJob]
) -> None:
    job = launch_fake(how)
    with pytest.raises(kind, match=message):
        run_job(job)
    log = job.folder / "launch.log"
    assert log.exists() == (how != "ModelError")  # which says everything
    assert how == "ModelError" or "print" in log.read_text() or how == "killed"


def test_launch_out_of_memory_is_told_as_in_one_process(launch_fake: Callable[..., LocalUpdateJob]) -> None:
    with pytest.raises(TrainingError, match=r"task 'letters': the local update ran out of memory \(rank 1 of 2: said"):
        try_local_update(Attempt(launch_fake("OutOfMemoryError")), Progress())


@pytest.mark.parametrize("ended", ["time limit", "interrupt"])
def test_launch_that_is_ended_leaves_no_process(
    ended: str, launch_fake: Callable[..., LocalUpdateJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    marks: list[str] = []
    follow = launcher._follow

    def once_they_run(process: Any, told: Path, time_limit: float | None, progress: Progress) -> bool:
        wanted = [told.with_name(MARK.format(rank)) for rank in (0, 1)]
        end = time.monotonic() + 60
        while not all(file.exists() and file.read_text() for file in wanted):
            assert time.monotonic() < end
            time.sleep(0.05)
        marks.extend(file.read_text() for file in wanted)
        if ended == "interrupt":
            raise KeyboardInterrupt
        return follow(process, told, time_limit, progress)

    monkeypatch.setattr(launcher, "_follow", once_they_run)
    monkeypatch.setattr(launcher, "GRACE", 0.2)
    job = launch_fake("hang", *(["local_update.time_limit=0.2"] if ended == "time limit" else []))
    kind, message = (
        (TrainingError, r"running after 0\.2 seconds") if ended == "time limit" else (KeyboardInterrupt, None)
    )
    with pytest.raises(kind, match=message):
        run_job(job)
    end = time.monotonic() + 20
    while any(is_alive(mark) for mark in marks):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert len(marks) == 2


# ---- what a recipe says ----------------------------------------------------------------------------------------------


def config_file(folder: Path, **told: Any) -> str:
    file = folder / "accelerate.yaml"
    file.write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", "num_processes": 2, "num_machines": 1} | told))
    return str(file)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launch={}"], r"launch\.num_processes: is missing; allowed is a whole number from 2 on"),
        (["launch={num_processes: 1}"], r"launch\.num_processes: found 1; allowed"),
        (["launch={num_process: 2}"], r"launch\.num_process: .*did you mean 'num_processes'"),
        (
            ["launch={num_processes: 2, mixed_precision: bf16}"],
            r"launch\.mixed_precision: no argument that a launch may",
        ),
        (["launch={num_processes: 2, gpu_ids: [0, 1]}"], r"launch\.gpu_ids: found \[0, 1\]; allowed is one number"),
        (["launch={num_processes: 3}"], "batch_size: 4 .* 3 processes; make it a multiple of 3"),
        (["micro_batch_size=4"], "batch_size: 4 .* 2 processes × micro_batch_size 4; make it a multiple of 8"),
        (["device=cuda:1"], "device: 'cuda:1' is one device; a launch takes auto, cpu or cuda"),
        (["launch={num_processes: 2, fsdp_offload_params: true}"], "fsdp_offload_params: is for use_fsdp: true"),
        (["launch={num_processes: 2, use_fsdp: true, fsdp_version: 1}"], "fsdp_version: found 1; FSDP of version 2"),
        (["launch={num_processes: 2, use_fsdp: true, use_deepspeed: true}"], "exclude each other"),
        (["launch={num_processes: 2, use_fsdp: true}", "proximal=0.1"], r"proximal: 0\.1 needs whole tensors"),
        (["launch={config_file: none.yaml}"], r"config_file: none\.yaml: No such file"),
    ],
)
def test_launch_refuses_what_it_cannot_run(overrides: list[str], message: str, runs: Runs) -> None:
    recipe = runs.recipe(*TWO, *(f"local_update.{one}" for one in overrides))
    with pytest.raises(RecipeError, match=message):
        read_launch(recipe.local_update)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"num_machines": 2}, "num_machines: found 2; a local update runs on one machine"),
        ({"mixed_precision": "bf16"}, r"mixed_precision: found 'bf16'; this is decided by local_update\.dtype"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}, "fsdp_version: found 1"),
        ({"num_processes": "two"}, r"num_processes: found 'two'; allowed"),
    ],
)
def test_launch_refuses_a_configuration_that_decides_what_is_decided(
    told: dict[str, Any], message: str, runs: Runs, tmp_path: Path
) -> None:
    recipe = runs.recipe(TWO[0], f"local_update.launch={{config_file: {config_file(tmp_path, **told)}}}")
    with pytest.raises(RecipeError, match=message):
        read_launch(recipe.local_update)


def test_launch_takes_processes_and_shards_from_a_configuration(runs: Runs, tmp_path: Path) -> None:
    file = config_file(tmp_path, distributed_type="FSDP", fsdp_config={"fsdp_version": 2})
    launch = read_launch(runs.recipe(TWO[0], f"local_update.launch={{config_file: {file}}}").local_update)
    assert (launch.num_processes, launch.sharding) == (2, "fsdp")
    line = command_line(launch, Path("ours.json"), 4, "module", Path("folder"))
    assert line[1:3] == ["-m", "accelerate.commands.launch"] and line[-3:] == ["--module", "module", "folder"]
    assert f"--config_file={file}" in line and "--config_file=ours.json" not in line
    assert {"--num_processes=2", "--num_cpu_threads_per_process=2", "--use_fsdp", "--fsdp_version=2"} <= set(line)
    assert "--multi_gpu" not in line


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (
            "{num_processes: 2, fsdp_offload: true, use_fsdp: true}",
            r"fsdp_offload: accelerate launch has no such argument",
        ),
        ("{num_processes: 2, use_fsdp: true, fsdp_version: '2'}", "accelerate shards a model among GPUs only"),
        ("{num_processes: 2, use_deepspeed: true, offload_optimizer_device: tape}", "launch"),
    ],
)
def test_launch_is_checked_before_a_run_begins(launch: str, message: str, runs: Runs) -> None:
    recipe = runs.recipe(TWO[0], f"local_update.launch={launch}", "local_update.device=cpu")
    with pytest.raises(RecipeError, match=message):
        check_inputs(recipe)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("launch={num_processes: 2}", "launch is for launcher: accelerate"),
        ("time_limit=3", "time_limit is for method: command and launcher: accelerate"),
        ("method=command launch={num_processes: 2}", "launch is for launcher: accelerate"),
        ("method=command launcher=accelerate", "a command starts its processes itself"),
    ],
)
def test_recipe_without_a_launcher_has_nothing_to_launch(override: str, message: str, runs: Runs) -> None:
    command = "local_update.command='x {start} {output}'"
    given = [f"local_update.{one}" for one in re.split(" (?=l)", override)]
    with pytest.raises(RecipeError, match=message):
        runs.recipe(*given, *([command] if "command" in override else []))


def test_launch_is_part_of_the_names_of_finished_work_only_where_there_is_one(runs: Runs) -> None:
    plain, launched = runs.recipe(), runs.recipe(*TWO)
    names = keyed("local_update", plain.local_update.model_dump(mode="json"))
    assert not names.keys() & {"launcher", "launch"}
    assert keyed("local_update", launched.local_update.model_dump(mode="json"))["launcher"] == "accelerate"


def test_launch_may_be_another_when_a_run_goes_on(runs: Runs, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    write_text(folder.recipe, to_yaml(runs.recipe()))
    assert as_begun(runs.recipe(*TWO), folder) == runs.recipe()
    changed = differences(recipe_of(folder), read_yaml(to_yaml(runs.recipe(*TWO))))
    assert changed and all(may_change(line) for line in changed)
    rounded = differences(recipe_of(folder), read_yaml(to_yaml(runs.recipe("local_update.quantization=4bit"))))
    assert [may_change(line) for line in rounded] == [False]


def test_models_that_train_in_shards_are_measured_over_all_gpus(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **given: True)
    gpu = "local_update.device=cuda"
    assert choose_placement(runs.recipe(gpu, *FSDP).local_update).spread
    assert not choose_placement(runs.recipe(gpu, *TWO).local_update).spread
    assert not choose_placement(runs.recipe("local_update.device=cpu", *FSDP).local_update).spread


def test_spread_model_computes_as_it_did(base_folder: Path) -> None:
    state, ids = ModelState(base_folder), torch.arange(12).reshape(2, 6)
    whole, spread = (load_model(state, Placement("cpu", torch.float32)) for _ in range(2))
    spread_over(spread, {"cpu": 10**9})  # the only device that there is everywhere
    assert spread.hf_device_map == {"": torch.device("cpu")} or set(spread.hf_device_map.values()) == {"cpu"}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        ours, theirs = (counted_logits(model, model.get_output_embeddings(), batch)[0] for model in (spread, whole))
    assert torch.equal(ours, theirs)


def test_launch_takes_the_seat_of_more_gpus_than_there_are(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RecipeError, match=r"num_processes: 2, and torch can use 1 GPUs here"):
        launcher.check_launch(runs.recipe(*TWO).local_update, "cuda")
