"""Measure a model: validation losses and test scores of tasks.

Every model of a run is measured by the same code, batch sizes and decoding (greedy), so that differences are the
model's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from manyshot.examples import Message
from manyshot.local_update import Split, held_out_sums
from manyshot.loss_gap import TokenSums, mean_loss, token_sums
from manyshot.manifest import files_in, seal
from manyshot.metrics import find_metric
from manyshot.models import ModelState, choose_placement, load_model, load_tokenizer, quiet_transformers
from manyshot.progress import Progress
from manyshot.recipe import Recipe
from manyshot.rundir import read_json, write_json
from manyshot.tasks import Encoded, Task, encode, encode_all, encode_prompt

# test examples of a task that a report can show, and how much of a long text
NUM_SHOWN, LONGEST_SHOWN = 4, 4000


@dataclass(frozen=True)
class MeasureJob:
    """Measure one model on some tasks: losses on the validation (or test) split, test scores, or both.

    Writes losses.json, outputs.json and scores.json (last) into `folder`, or what of these is asked for; with the
    scores of the pretrained model also examples.json, which says what the first of the outputs answer.
    """

    recipe: Recipe
    tasks: tuple[Task, ...]
    state: ModelState
    folder: Path
    round_index: int
    losses: bool = True
    scores: bool = True
    split: Split = "validation"

    @property
    def label(self) -> str:
        tasks = ", ".join(task.name for task in self.tasks)
        return f"round {self.round_index}, {tasks}: measurement"

    @property
    def record(self) -> Path:
        """What is there when it is done."""
        return self.folder / ("scores.json" if self.scores else "losses.json")


def is_measured(job: MeasureJob) -> bool:
    return job.record.exists()


def run_measure(job: MeasureJob, progress: Progress) -> dict[str, Any]:
    """{"losses": {task: …}, "scores": {task: …}}; what was measured before is read back."""
    scores_path, losses_path = job.folder / "scores.json", job.folder / "losses.json"
    if is_measured(job):
        seal_measurement(job)
        losses = read_json(losses_path) if job.losses else {}
        return {"losses": losses} | ({"scores": read_json(scores_path)} if job.scores else {})
    with quiet_transformers():
        placement = choose_placement(job.recipe.local_update)
        with progress.timed("load", job.round_index):
            tokenizer = load_tokenizer(job.state.pretrained, trust_remote_code=job.state.trust_remote_code)
            model = load_model(job.state, placement)
        losses, known, read = {}, {}, {}
        if job.losses:
            for task in job.tasks:
                losses[task.name], known[task.name], read[task.name] = _task_loss(model, tokenizer, task, job, progress)
            write_json(losses_path, losses)
        if not job.scores:
            seal_measurement(job)
            return {"losses": losses}
        scores, outputs = {}, {}
        for task in job.tasks:
            scores[task.name], said = _task_score(model, tokenizer, task, job, progress, known.get(task.name))
            nats = read.get(task.name) or [{} for _ in said]
            outputs[task.name] = [one | more for one, more in zip(said, nats, strict=True)]
    write_json(job.folder / "outputs.json", outputs)
    if job.state.is_pretrained:
        write_json(job.folder / "examples.json", {task.name: shown_examples(task) for task in job.tasks})
    write_json(scores_path, scores)
    seal_measurement(job)
    return {"losses": losses, "scores": scores}


def seal_measurement(job: MeasureJob) -> None:
    """Name what was measured in its folder's manifest."""
    names = ("losses.json", "outputs.json", "examples.json", "scores.json") if job.scores else ("losses.json",)
    seal(job.folder, "measurement" if job.scores else "losses", files_in(*(job.folder / name for name in names)))


def _task_loss(
    model: Any, tokenizer: Any, task: Task, job: MeasureJob, progress: Progress
) -> tuple[dict[str, Any], list[str] | None, list[dict[str, Any]]]:
    """The loss; and, where the test completions were read for it, what a teacher-forced metric asks about them, and
    what each example adds to the loss: Σ −log p of its tokens, and how many they are.
    """
    which = "pretrained or merged model"
    encoded, sums = held_out_sums(
        *(model, tokenizer, task, job.recipe, progress), round_index=job.round_index, which=which, split=job.split
    )
    loss = mean_loss(encoded, sums, task.spec.loss_scale).to_json()
    if job.split != "test":
        return loss, None, []
    each = [
        {"nats": task.spec.loss_scale * one.nats, "num_tokens": example.num_counted}
        for example, one in zip(encoded, sums, strict=True)
    ]
    return loss, correct_shares(encoded, sums) if job.recipe.evaluation.loss_on == "completion" else None, each


def _task_score(
    model: Any, tokenizer: Any, task: Task, job: MeasureJob, progress: Progress, known: list[str] | None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Mean score with its standard error, and what the model said to every test example."""
    metric = find_metric(task.spec.metric, task.name)
    with progress.timed("score", job.round_index, task.name, total=len(task.test)) as timed:
        if metric.kind == "teacher_forced" and known is not None:
            outputs = known
        else:
            outputs = ANSWERS[metric.kind](model, tokenizer, task, job.recipe, timed.tick)
    values = [metric.score(output, example) for output, example in zip(outputs, task.test, strict=True)]
    score = {
        "metric": metric.name,
        "score": fmean(values),
        "stderr": stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
        "num_examples": len(values),
    }
    said = [
        {"row": example.index, "output": output, "score": value}
        | ({"source": example.source} if example.source else {})
        for example, output, value in zip(task.test, outputs, values, strict=True)
    ]
    return score, said


def shown_examples(task: Task) -> dict[str, Any]:
    """The task's first test examples as people read them, for reports: what is asked, and what the data answers."""
    return {
        "kind": find_metric(task.spec.metric, task.name).kind,
        "examples": [
            {
                "row": example.index,
                "prompt": _shown(example.prompt),
                "reference": _shown(example.completion_text),
                "choices": [_shown(choice) for choice in example.choices],
            }
            for example in task.test[:NUM_SHOWN]
        ],
    }


def _shown(text: str | Sequence[Message]) -> Any:
    """A text, or messages by role, each no longer than a person reads."""
    if not isinstance(text, str):
        return [{"role": message["role"], "content": _shown(message["content"])} for message in text]
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} … ({len(text)} characters)"


def generate_answers(model: Any, tokenizer: Any, task: Task, recipe: Recipe, tick: Any = None) -> list[str]:
    """Greedy continuations of every test prompt, special tokens removed, in order."""
    from transformers import GenerationConfig

    prompts = [
        encode_prompt(example, tokenizer, task.spec, f"task '{task.name}', test {example.place}")
        for example in task.test
    ]
    config = GenerationConfig(
        max_new_tokens=task.spec.max_new_tokens or recipe.evaluation.max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_end_tokens(model, tokenizer),
    )
    outputs = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    size = recipe.evaluation.batch_size
    with torch.inference_mode():
        for positions in (order[i : i + size] for i in range(0, len(order), size)):
            length = max(len(prompts[i]) for i in positions)
            padding = [length - len(prompts[i]) for i in positions]
            ids_BL = torch.tensor(
                [[tokenizer.pad_token_id] * pad + prompts[i] for pad, i in zip(padding, positions, strict=True)]
            )
            mask_BL = torch.tensor([[0] * pad + [1] * (length - pad) for pad in padding])
            done = model.generate(
                input_ids=ids_BL.to(model.device), attention_mask=mask_BL.to(model.device), generation_config=config
            )
            for i, text in zip(
                positions, tokenizer.batch_decode(done[:, length:], skip_special_tokens=True), strict=True
            ):
                outputs[i] = text
            if tick is not None:
                tick(len(positions))
    return outputs


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Everything that ends an answer: the generation config's tokens and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*ids, tokenizer.eos_token_id) if token is not None})


def choose_answers(model: Any, tokenizer: Any, task: Task, recipe: Recipe, tick: Any = None) -> list[str]:
    """The index (as text) of the most likely choice of every test example, by total log-likelihood."""
    encoded = encode_choices(task, tokenizer, recipe)
    found = token_sums(
        model,
        encoded,
        pad_id=tokenizer.pad_token_id,
        batch_size=recipe.evaluation.batch_size,
        where=f"task '{task.name}', test choices",
    )
    sums = [one.nats for one in found]
    outputs, begin = [], 0
    for example in task.test:
        own = sums[begin : begin + len(example.choices)]
        begin += len(example.choices)
        outputs.append(str(own.index(min(own))))
    if tick is not None:
        tick(len(outputs))
    return outputs


def encode_choices(task: Task, tokenizer: Any, recipe: Recipe) -> list[Encoded]:
    """Every choice of every test example as the answer to its prompt, in order."""
    return [
        encode(
            example,
            tokenizer,
            task.spec,
            recipe.max_length_of(task.name),
            f"task '{task.name}', test {example.place}",
            completion=choice,
        )
        for example in task.test
        for choice in example.choices
    ]


def predict_tokens(model: Any, tokenizer: Any, task: Task, recipe: Recipe, tick: Any = None) -> list[str]:
    """The share (as text) of every test completion's tokens, its end included, that the model finds most likely."""
    encoded = encode_references(task, tokenizer, recipe)
    sums = token_sums(
        model,
        encoded,
        pad_id=tokenizer.pad_token_id,
        batch_size=recipe.evaluation.batch_size,
        where=f"task '{task.name}', test completions",
        tick=tick,
    )
    return correct_shares(encoded, sums)


def correct_shares(encoded: Sequence[Encoded], sums: Sequence[TokenSums]) -> list[str]:
    """The share of each example's counted tokens that the model would have chosen itself, as text."""
    return [str(one.num_correct / example.num_counted) for one, example in zip(sums, encoded, strict=True)]


def encode_references(task: Task, tokenizer: Any, recipe: Recipe) -> list[Encoded]:
    """Every test example with its own completion, in order."""
    return encode_all(task.test, tokenizer, task, "test", recipe.max_length_of(task.name), "completion")


# how a model answers the test examples, by what the metric needs
ANSWERS: dict[str, Callable[..., list[str]]] = {
    "generate": generate_answers,
    "likelihood": choose_answers,
    "teacher_forced": predict_tokens,
}
