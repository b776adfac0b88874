"""One local update: its training is the one a textbook loop does, and its record says what it did."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manyshot.errors import ManyshotError, RecipeError
from manyshot.local_update import LocalUpdateJob, expert_state, finished_update, run_local_update
from manyshot.models import ModelState, Placement, load_model, load_tokenizer
from manyshot.progress import Event, Progress
from manyshot.rundir import read_json
from manyshot.seeding import preserved_random_state
from manyshot.tasks import encode_all, load_task, training_order
from run_helpers import Runs, Tensors, distance, load_tensors, uneven_rows

MakeJob = Callable[..., LocalUpdateJob]
ON_CPU = Placement("cpu", torch.float32)


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("updates"), uneven_rows)


@pytest.fixture
def make_job(runs: Runs, tmp_path: Path) -> MakeJob:
    """make_job("local_update.rank=3", name="x", steps=2): a job of the first task, from the pretrained model."""

    def make(*overrides: str, name: str = "job", steps: int = 3, before: int = 0, total: int = 4) -> LocalUpdateJob:
        recipe = runs.recipe(*overrides)
        base = Path(recipe.model)
        return LocalUpdateJob(
            recipe=recipe,
            task=load_task(recipe, "letters"),
            start=ModelState(base),
            base_name="tiny",
            folder=tmp_path / name,
            round_index=1,
            num_steps=steps,
            steps_before=before,
            total_steps=total,
            key=json.dumps([*overrides, name, steps]),
        )

    return make


def run_job(job: LocalUpdateJob) -> dict[str, Any]:
    with preserved_random_state():
        return run_local_update(job, Progress())


def factors(job: LocalUpdateJob) -> Tensors:
    return load_tensors(job.folder / "adapter" / "adapter_model.safetensors")


def batches(job: LocalUpdateJob) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ids, mask, labels) of every step, padded here and not by the code under test."""
    update = job.recipe.local_update
    tokenizer = load_tokenizer(job.start.pretrained)
    size = update.batch_size
    skip = job.steps_before * size
    order = training_order(len(job.task.train), job.num_steps * size, job.recipe.seed, job.task.name, skip=skip)
    examples = encode_all(
        [job.task.train[i] for i in order], tokenizer, job.task, "train", update.max_length, update.loss_on
    )
    found = []
    for begin in range(0, len(examples), size):
        part = examples[begin : begin + size]
        length = max(len(example.input_ids) for example in part)
        ids = torch.tensor([[*example.input_ids, *[0] * (length - len(example.input_ids))] for example in part])
        mask = torch.tensor([[i < len(example.input_ids) for i in range(length)] for example in part]).long()
        counted = torch.tensor([[e.num_context <= i < len(e.input_ids) for i in range(length)] for e in part])
        found.append((ids, mask, torch.where(counted, ids, -100)))
    return found


def textbook(job: LocalUpdateJob, rates: list[float], weight_decay: float = 0.0) -> tuple[Tensors, list[float]]:
    """The same training as a plain loop over a PEFT model: mean token loss, gradients clipped to norm 1, AdamW."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    first = run_adapter_start(job)
    model = AutoModelForCausalLM.from_pretrained(str(job.start.pretrained), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = PeftModel.from_pretrained(model, str(first), is_trainable=True)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1.0, weight_decay=weight_decay)
    losses = []
    for rate, (ids, mask, labels) in zip(rates, batches(job), strict=True):
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        losses.append(float(loss.detach()))
    return {name.replace(".default.", "."): p.detach() for name, p in trained.items()}, losses


def run_adapter_start(job: LocalUpdateJob) -> Path:
    """The adapter that the job starts from: what it leaves when its learning rate is as good as zero."""
    frozen = job.recipe.model_copy(
        update={"local_update": job.recipe.local_update.model_copy(update={"learning_rate": 1e-30, "trainer": {}})}
    )
    start = replace(job, recipe=frozen, folder=job.folder.with_name(f"{job.folder.name}_start"), num_steps=1)
    run_job(start)
    return start.folder / "adapter"


# ---- training --------------------------------------------------------------------------------------------------------


def test_local_update_is_the_textbook_loop(make_job: MakeJob) -> None:
    job = make_job()
    record = run_job(job)
    expected, losses = textbook(job, [0.01 / 3, 0.02 / 3, 0.01])  # two warm-up steps, then the full rate
    assert record["train_losses"] == pytest.approx(losses, abs=2e-6)
    assert distance(factors(job), expected) < 2e-6
    assert distance(factors(job), load_tensors(run_adapter_start(job) / "adapter_model.safetensors")) > 0.01


def test_local_update_passes_weight_decay_on_to_the_optimizer(make_job: MakeJob) -> None:
    job = make_job("local_update.trainer={weight_decay: 5.0}")
    run_job(job)
    rates = [0.01 / 3, 0.02 / 3, 0.01]
    assert distance(factors(job), textbook(job, rates, weight_decay=5.0)[0]) < 2e-6
    assert distance(factors(job), textbook(job, rates)[0]) > 1e-3


def test_local_update_decays_the_rate_over_its_round_or_over_the_run(make_job: MakeJob) -> None:
    """Two last steps of four, linear decay: in the round's own schedule 1, 1/2; in the run's 2/4, 1/4."""
    linear = ("local_update.lr_schedule=linear", "local_update.warmup_steps=0")
    own = make_job(*linear, name="own", steps=2, before=2)
    whole = make_job(*linear, "local_update.schedule_scope=run", name="whole", steps=2, before=2)
    for job, rates in ((own, [0.01, 0.005]), (whole, [0.005, 0.0025])):
        run_job(job)
        assert distance(factors(job), textbook(job, rates)[0]) < 2e-6


@pytest.mark.parametrize("micro", [1, 2])
def test_local_update_with_gradient_accumulation_is_the_same_training(make_job: MakeJob, micro: int) -> None:
    whole, parts = make_job(name="whole"), make_job(f"local_update.micro_batch_size={micro}", name="parts")
    losses = run_job(whole)["train_losses"]
    assert run_job(parts)["train_losses"] == pytest.approx(losses, abs=1e-5)
    assert distance(factors(whole), factors(parts)) < 1e-4
    lengths = {int((labels[:1] != -100).sum()) for _, _, labels in batches(whole)}
    assert len(lengths) > 1  # else a mean of means would pass


def test_local_update_with_all_weights_trains_them_from_the_start_model(make_job: MakeJob) -> None:
    job = make_job("local_update.method=full", "local_update.learning_rate=0.001")
    run_job(job)
    base, trained = load_tensors(job.start.pretrained), load_tensors(job.folder / "model")
    assert base.keys() == trained.keys()
    for name, tensor in base.items():
        moved = float((trained[name] - tensor).abs().max())
        assert 5e-4 < moved < 2.1e-3, name  # AdamW moves each weight by about the rate: (1/3 + 2/3 + 1) · 0.001


def test_local_update_on_the_whole_text_counts_every_token_but_the_first(make_job: MakeJob) -> None:
    completion, whole = make_job(name="c"), make_job("local_update.loss_on=whole_text", name="w")
    first, second = run_job(completion), run_job(whole)
    assert first["num_tokens"] == second["num_tokens"]
    assert second["num_counted_tokens"] == second["num_tokens"] - 3 * 4
    assert first["num_counted_tokens"] < second["num_counted_tokens"]
    assert second["train_losses"] == pytest.approx(textbook(whole, [0.01 / 3, 0.02 / 3, 0.01])[1], abs=2e-6)
    # the loss gap's evaluator stays as evaluation.loss_on says
    assert first["validation"]["num_tokens"] == second["validation"]["num_tokens"]


def test_local_update_with_dropout_depends_on_the_seed_and_on_no_global_state(make_job: MakeJob) -> None:
    jobs = [make_job("local_update.dropout=0.5", name=name) for name in ("a", "b")]
    jobs += [make_job(name="without"), make_job("local_update.dropout=0.5", "seed=1", name="seed")]
    for number, job in enumerate(jobs):
        torch.manual_seed(number)
        run_job(job)
    assert distance(factors(jobs[0]), factors(jobs[1])) == 0
    assert distance(factors(jobs[0]), factors(jobs[2])) > 1e-4
    assert distance(factors(jobs[0]), factors(jobs[3])) > 1e-4


# ---- records ---------------------------------------------------------------------------------------------------------


def test_local_update_records_what_it_did(make_job: MakeJob) -> None:
    job = make_job("local_update.max_length=9")
    record = run_job(job)
    assert record == read_json(job.folder / "local_update.json")
    tokens = [(int(mask.sum()), int((labels != -100).sum())) for _, mask, labels in batches(job)]
    assert record["num_tokens"] == sum(n for n, _ in tokens)
    assert record["num_counted_tokens"] == sum(n for _, n in tokens)
    assert (record["steps"], record["steps_before"], record["round"], record["task"]) == (3, 0, 1, "letters")
    assert len(record["train_losses"]) == 3
    assert 0 < record["truncated_share"] < 1


def test_local_update_validation_loss_is_that_of_the_saved_expert(make_job: MakeJob) -> None:
    job = make_job()
    record = run_job(job)
    model = load_model(expert_state(job.start, job.folder), ON_CPU)
    total = count = 0.0
    for encoded in encode_all(
        job.task.validation, load_tokenizer(job.start.pretrained), job.task, "validation", 32, "completion"
    ):
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            chances = model(input_ids=ids).logits[0].double().log_softmax(-1)
        for position in range(encoded.num_context, len(encoded.input_ids)):
            total -= float(chances[position - 1, ids[0, position]])
            count += 1
    assert record["validation"]["num_tokens"] == count
    assert record["validation"]["loss"] == pytest.approx(total / count, rel=1e-6)


def test_local_update_that_is_done_is_read_back_and_another_key_trains_again(make_job: MakeJob) -> None:
    job = make_job()
    events: list[Event] = []
    record = run_local_update(job, Progress())
    before = (job.folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert run_local_update(job, Progress(events.append)) == record == finished_update(job)
    assert events == [] and (job.folder / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    other = replace(job, key="other")
    assert finished_update(other) is None
    run_local_update(other, Progress(events.append))
    assert [event.phase for event in events if event.kind == "end"] == ["load", "local_update", "save", "validation"]


def test_local_update_tells_every_step_with_its_loss(make_job: MakeJob) -> None:
    events: list[Event] = []
    record = run_local_update(make_job(), Progress(events.append))
    steps = [event for event in events if event.kind == "advance" and event.phase == "local_update"]
    assert [(event.done, event.total) for event in steps] == [(1, 3), (2, 3), (3, 3)]
    assert [round(event.loss or 0.0, 6) for event in steps] == record["train_losses"]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_local_update_that_diverges_names_round_task_and_step(make_job: MakeJob) -> None:
    job = replace(make_job("local_update.learning_rate=1e30", "local_update.warmup_steps=0"), round_index=4)
    with pytest.raises(
        ManyshotError, match=r"round 4, task 'letters', step 2: the training loss is nan; lower local_u"
    ):
        run_local_update(job, Progress())
    assert not job.folder.exists() or not list(job.folder.iterdir())


@pytest.mark.parametrize(
    ("method", "rate", "message"),
    [
        ("lora", "1e30", r"round 1, task 'letters', .*loss is nan"),
        ("lora", "3e38", r"round 1, task 'letters': tensor '.*NaN or Inf"),
        ("full", "1e39", r"round 1, task 'letters': tensor '.*NaN or Inf"),
    ],
)
def test_local_update_that_diverges_in_its_last_step_names_round_and_task(
    make_job: MakeJob, method: str, rate: str, message: str
) -> None:
    settings = ("local_update.warmup_steps=0", f"local_update.method={method}")
    job = make_job(*settings, f"local_update.learning_rate={rate}", steps=1)
    with pytest.raises(ManyshotError, match=message):
        run_local_update(job, Progress())
    assert finished_update(job) is None


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{max_steps: 3}", r"trainer\.max_steps: this is decided by protocol\.local_steps"),
        ("{packing: true}", r"trainer\.packing: this is decided by nothing"),
        ("{weight_decai: 1}", r"trainer\.weight_decai: SFTConfig has no such argument; did you mean 'weight_decay'"),
        ("{optim: sgdx}", r"local_update\.trainer: .*sgdx"),
    ],
)
def test_local_update_refuses_trainer_arguments(make_job: MakeJob, argument: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        run_local_update(make_job(f"local_update.trainer={argument}"), Progress())
