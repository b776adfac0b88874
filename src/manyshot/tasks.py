"""A task: its examples, its splits, and how an example becomes tokens with the counted ones marked."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from manyshot.content import keyed
from manyshot.data_files import Row
from manyshot.errors import DataError
from manyshot.examples import Example, Message, to_example
from manyshot.recipe import Recipe, TaskSpec
from manyshot.seeding import permutation
from manyshot.sources import SPLITS, SourceRow, read_rows
from manyshot.task_spec import ELSEWHERE

# an example belongs to a task, whoever made it
__all__ = [
    "Encoded",
    "Example",
    "Task",
    "Tokenizer",
    "encode",
    "encode_all",
    "encode_prompt",
    "load_task",
    "to_example",
]

LossOn = Literal["completion", "whole_text"]

SOURCE_KEYS = {"data", "train", "validation", "test", "subset", "where", "columns"}


@dataclass(frozen=True)
class Encoded:
    """Token ids of one example; the first `num_context` of them are never counted in a loss."""

    index: int
    input_ids: tuple[int, ...]
    num_context: int
    truncated: bool

    @property
    def num_counted(self) -> int:
        return len(self.input_ids) - self.num_context


@dataclass(frozen=True)
class Task:
    """One task's examples. `splits` says which rows of which sources each split took."""

    name: str
    spec: TaskSpec
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    splits: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """What the recipe says of the task, but for where its examples are: what they are is in the digest."""
        return keyed("tasks", self.spec.model_dump(mode="json", exclude=SOURCE_KEYS))

    def digest(self) -> str:
        """SHA-256 over every example of every split: two tasks with equal digests train and score alike."""
        return self._digest

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Number and digest of every split's examples: what says which of them changed."""
        return {
            split: {"examples": len(part), "sha256": _digest_of([_of_digest(example) for example in part])}
            for split, part in (("train", self.train), ("validation", self.validation), ("test", self.test))
        }

    def without_test(self) -> Task:
        """The task without its test examples, under the same digest: for what must never see them."""
        blind = replace(self, test=())
        blind.__dict__["_digest"] = self.digest()
        return blind

    @cached_property
    def _digest(self) -> str:
        parts = [[_of_digest(example) for example in part] for part in (self.train, self.validation, self.test)]
        return _digest_of(parts)


def _of_digest(example: Example) -> dict[str, Any]:
    return {key: value for key, value in asdict(example).items() if key != "source"}


def _digest_of(parts: Any) -> str:
    blob = json.dumps(parts, default=str)  # `meta` may hold dates and the like
    return hashlib.sha256(blob.encode()).hexdigest()


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    chat_template: str | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> Any: ...


def load_task(recipe: Recipe, name: str) -> Task:
    """Read a task's data, cut the splits that are not given, and normalise every row.

    Raises DataError naming task, file, row and column.
    """
    spec, like = recipe.tasks[name], _first_alike(recipe, name)
    if spec.data == ELSEWHERE:
        raise DataError(
            f"task '{name}': its data is {ELSEWHERE}, with the team that trains it; `manyshot round` merges what teams "
            "send, and a run needs the data itself"
        )
    chosen, num_dropped = _choose_rows(read_rows(spec, recipe.seed, like), recipe, like)
    parts = {
        split: _shuffled(_examples(rows, spec, f"task '{name}', {split}"), rows, recipe.seed, name, split)
        for split, rows in chosen.items()
    }
    splits = {split: _places(rows) for split, rows in chosen.items()}
    return _checked(
        Task(name, spec, parts["train"], parts["validation"], parts["test"], splits | {"dropped": num_dropped}), recipe
    )


def _first_alike(recipe: Recipe, name: str) -> str:
    """The first task with the same data: what is drawn from it is drawn for both alike.

    So tasks that read the same rows, each in its own way, have the same splits, and none trains on another's test rows.
    """
    own = _data_of(recipe.tasks[name])
    return next(other for other, spec in recipe.tasks.items() if _data_of(spec) == own)


def _data_of(spec: TaskSpec) -> list[Any]:
    """Which rows a task reads, however it reads them."""
    read_as = {"columns": None, "shuffle_completions": False}
    sources = [[source.model_copy(update=read_as) for source in spec.sources(split)] for split in SPLITS]
    return [spec.data, spec.subset, spec.where, sources]


def _shuffled(
    examples: tuple[Example, ...], rows: Sequence[SourceRow], seed: int, name: str, split: str
) -> tuple[Example, ...]:
    """The examples of a source that says so, each with another's prompt: choices and answers stay with completions."""
    places = [place for place, row in enumerate(rows) if row.shuffled]
    order = permutation(len(places), seed, "shuffle", name, split)
    prompts = {place: examples[places[other]].prompt for place, other in zip(places, order, strict=True)}
    return tuple(replace(example, prompt=prompts.get(place, example.prompt)) for place, example in enumerate(examples))


def shared_rows(tasks: Sequence[Task]) -> list[str]:
    """A line for every pair of tasks of which one trains on examples that the other is tested on."""
    train, test = (
        {task.name: {(str(one.prompt), one.completion_text) for one in getattr(task, split)} for task in tasks}
        for split in ("train", "test")
    )
    return [
        f"tasks.{name}: is trained on {len(both)} of the {len(theirs)} test examples of {other}"
        for name, ours in train.items()
        for other, theirs in test.items()
        if other != name and (both := ours & theirs)
    ]


def _checked(task: Task, recipe: Recipe) -> Task:
    """The task, if every split has examples, and the training split a batch of them."""
    for split in SPLITS:
        if not getattr(task, split):
            raise DataError(f"task '{task.name}': the {split} split is empty")
    check_batch(task, recipe.local_update.batch_size)
    return task


def check_batch(task: Task, batch_size: int) -> None:
    """Raises DataError for a task that does not fill one batch."""
    if len(task.train) < batch_size:
        raise DataError(
            f"task '{task.name}': {len(task.train)} training examples are fewer than one batch "
            f"(local_update.batch_size is {batch_size})"
        )


def _examples(rows: Sequence[SourceRow], spec: TaskSpec, where: str) -> tuple[Example, ...]:
    several = len({found.source for found in rows}) > 1
    examples = []
    for found in rows:
        place = f"{where} row {found.index + 1}" + (f" of {found.source}" if several else "")
        example = to_example(found.row, found.index, spec, place, found.columns)
        examples.append(replace(example, source=found.source) if several else example)
    return tuple(examples)


def _places(rows: Sequence[SourceRow | Example]) -> list[dict[str, Any]]:
    """Every source of a split, and which of its rows were taken, in order."""
    places: dict[str, list[int]] = {}
    for row in rows:
        places.setdefault(row.source, []).append(row.index)
    return [{"source": source, "rows": indices} for source, indices in places.items()]


def _choose_rows(
    rows: Mapping[str, Sequence[SourceRow]], recipe: Recipe, name: str
) -> tuple[dict[str, list[SourceRow]], int]:
    """The rows of each split, and how many training rows were left out.

    A split that is not given is cut from the training rows by the seed (at most a fifth of them each); a given one
    that is larger than asked is sampled by the seed. Training rows whose text also stands in a cut split are left out.
    """
    wanted = {"validation": recipe.evaluation.validation_examples, "test": recipe.evaluation.test_examples}
    train = rows["train"]
    order = permutation(len(train), recipe.seed, "split", name)
    chosen: dict[str, list[SourceRow]] = {}
    held_out: set[str] = set()
    for split, size in wanted.items():
        if split in rows:
            picked = permutation(len(rows[split]), recipe.seed, "sample", name, split)[:size]
            chosen[split] = [rows[split][i] for i in sorted(picked)]
        else:
            cut = min(size, len(train) // 5)
            picked, order = order[:cut], order[cut:]
            chosen[split] = [train[i] for i in sorted(picked)]
            held_out |= {_row_key(row.row) for row in chosen[split]}
    kept = [i for i in order if _row_key(train[i].row) not in held_out] if held_out else order
    return {"train": [train[i] for i in sorted(kept)]} | chosen, len(order) - len(kept)


def drop_overlong(task: Task, tokenizer: Tokenizer, recipe: Recipe, names: Sequence[str]) -> Task:
    """The task without those examples of the splits `names` that are longer than max_length.

    Raises DataError where too few are left.
    """
    kept: dict[str, tuple[Example, ...]] = {split: getattr(task, split) for split in SPLITS}
    splits, dropped = dict(task.splits), {}
    for split in names:
        examples = kept[split]
        whole = encode_all(examples, tokenizer, task, split, sys.maxsize, "completion")
        fits = [len(encoded.input_ids) <= recipe.max_length_of(task.name) for encoded in whole]
        kept[split] = tuple(example for example, fit in zip(examples, fits, strict=True) if fit)
        dropped[split] = len(examples) - len(kept[split])
        only = splits[split][0]["source"]  # examples of a single source do not name it
        splits[split] = _places([replace(example, source=example.source or only) for example in kept[split]])
    splits["overlong"] = dropped
    return _checked(Task(task.name, task.spec, kept["train"], kept["validation"], kept["test"], splits), recipe)


def _row_key(row: Row) -> str:
    return json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)


def as_chat(example: Example, tokenizer: Tokenizer, spec: TaskSpec) -> bool:
    """Whether this example goes through the chat template."""
    if isinstance(example.completion, tuple):
        return True  # messages have no other form
    if spec.format == "auto":
        return tokenizer.chat_template is not None and example.prompt != ""
    return spec.format == "chat"


def as_row(example: Example, tokenizer: Tokenizer, spec: TaskSpec) -> dict[str, Any]:
    """An example as TRL reads it: `prompt` and `completion` (messages or texts), or `text` where there is no prompt."""
    if as_chat(example, tokenizer, spec):
        return {"prompt": list(_prompt_messages(example)), "completion": list(_answer_messages(example))}
    if example.prompt == "":
        return {"text": example.completion_text}
    return {"prompt": _plain_prompt(example), "completion": example.completion_text}


def encode_prompt(example: Example, tokenizer: Tokenizer, spec: TaskSpec, where: str) -> list[int]:
    """Token ids that generation starts from."""
    if as_chat(example, tokenizer, spec):
        return _apply_template(tokenizer, _prompt_messages(example), where, add_generation_prompt=True)
    return tokenizer.encode(_plain_prompt(example))


def encode(
    example: Example,
    tokenizer: Tokenizer,
    spec: TaskSpec,
    max_length: int,
    where: str,
    loss_on: LossOn = "completion",
    completion: str | None = None,
) -> Encoded:
    """Tokens of prompt and completion (or another `completion` text), cut to `max_length` at the end.

    Raises DataError when no token is left to count: such an example would train on, or report, nothing.
    """
    if as_chat(example, tokenizer, spec):
        prompt = _apply_template(tokenizer, _prompt_messages(example), where, add_generation_prompt=True)
        answer = (
            ({"role": "assistant", "content": completion},) if completion is not None else _answer_messages(example)
        )
        whole = _apply_template(tokenizer, (*_prompt_messages(example), *answer), where, add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            raise DataError(
                f"{where}: the chat template writes the prompt differently once the answer follows, so the "
                "answer's tokens cannot be told apart; give prompt and completion as texts and use format: plain"
            )
    else:
        text = completion if completion is not None else example.completion_text
        prompt = tokenizer.encode(_plain_prompt(example))
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        whole = prompt + tokenizer.encode(text, add_special_tokens=not prompt) + end
    # the first token of a text has no prediction, so it is context even where the whole text counts
    num_context = max(1, len(prompt)) if loss_on == "completion" else 1
    if len(whole[:max_length]) <= num_context:
        raise DataError(
            f"{where}: no token left to count: {len(prompt)} prompt tokens and {len(whole) - len(prompt)} completion "
            f"tokens, cut to max_length {max_length}; raise local_update.max_length or remove the example"
        )
    return Encoded(example.index, tuple(whole[:max_length]), num_context, len(whole) > max_length)


def encode_all(
    examples: Sequence[Example], tokenizer: Tokenizer, task: Task, split: str, max_length: int, loss_on: LossOn
) -> list[Encoded]:
    """Encode a split in its order; errors name task, split and row."""
    return [
        encode(example, tokenizer, task.spec, max_length, f"task '{task.name}', {split} {example.place}", loss_on)
        for example in examples
    ]


def _prompt_messages(example: Example) -> tuple[Message, ...]:
    return ({"role": "user", "content": example.prompt},) if isinstance(example.prompt, str) else example.prompt


def _answer_messages(example: Example) -> tuple[Message, ...]:
    if isinstance(example.completion, str):
        return ({"role": "assistant", "content": example.completion},)
    return example.completion


def _plain_prompt(example: Example) -> str:
    return example.prompt if isinstance(example.prompt, str) else "\n".join(m["content"] for m in example.prompt)


def _apply_template(
    tokenizer: Tokenizer, messages: Sequence[Message], where: str, *, add_generation_prompt: bool
) -> list[int]:
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: has chat messages, but the model's tokenizer has no chat template; give prompt and "
            "completion as texts"
        )
    encoded = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    ids: list[int] = list(encoded["input_ids"])
    return ids


def training_order(num_examples: int, num_needed: int, seed: int, task: str, skip: int) -> list[int]:
    """Positions of the next `num_needed` training examples after the first `skip`: one endless stream per task.

    The stream depends on the seed and the task only: round r continues where round r − 1 stopped, so post-hoc and
    many-shot see the same examples in the same order. It is reshuffled for every pass over the data.
    """
    order: list[int] = []
    epoch = skip // num_examples
    while len(order) < num_needed + skip % num_examples:
        order += permutation(num_examples, seed, "order", task, epoch)
        epoch += 1
    offset = skip % num_examples
    return order[offset : offset + num_needed]
