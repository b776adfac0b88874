"""A tiny random Llama, a tokenizer made here, and small data files: everything the fast tests need, in milliseconds."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyshot import compare_outputs
from manyshot.errors import MissingExtraError
from manyshot.recipe import Recipe
from manyshot.recipe_file import recipe_from_mapping

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
WORDS = [*"abcdefghijklmnopqrstuvwxyz", *(str(i) for i in range(10)), "yes", "no", "####", "=", "+"]
TASKS = ("letters", "numbers", "words")

TRAINING_IMPORTS = ("accelerate", "datasets", "peft", "trl.trainer.sft_trainer")

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_not_garbage() -> None:
    """Every training collects garbage, and looking at all that was imported takes most of a small run's time."""
    for name in TRAINING_IMPORTS:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def write_base(folder: Path) -> Path:
    """A model folder: 2 layers, width 32, tied embeddings, a word tokenizer with a chat template."""
    specials = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>"]
    vocab = {word: i for i, word in enumerate([*specials, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>", chat_template=CHAT_TEMPLATE
    )
    tokenizer.save_pretrained(str(folder))
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    generator = torch.Generator().manual_seed(0)  # a generator of its own
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(str(folder))
    return folder


def make_rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows that differ between tasks: each task answers the same kind of prompt in its own way."""
    rng = random.Random(f"{task}/{seed}")
    rows = []
    for _ in range(count):
        letters = rng.choices("abcdefghij", k=3)
        answer = {"letters": letters[0], "numbers": str("abcdefghij".index(letters[1])), "words": "yes"}.get(task, "no")
        choices = [answer, "z"]
        rows.append({"prompt": " ".join(letters), "completion": answer, "choices": choices, "answer": 0, "meta": {}})
    return rows


@pytest.fixture
def data_folder(tmp_path: Path) -> Path:
    """train, validation and test jsonl for three tasks: letters.train.jsonl, …"""
    folder = tmp_path / "data"
    folder.mkdir()
    for task in TASKS:
        for seed, (split, count) in enumerate((("train", 24), ("validation", 6), ("test", 6))):
            lines = [json.dumps(row) for row in make_rows(task, count, seed)]
            (folder / f"{task}.{split}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe_mapping(base_folder: Path, data_folder: Path) -> dict[str, Any]:
    """A recipe as plain data, for the tiny model and the three tasks, small enough to run in about a second."""
    return {
        "model": str(base_folder),
        "tasks": {
            task: {
                "train": str(data_folder / f"{task}.train.jsonl"),
                "validation": str(data_folder / f"{task}.validation.jsonl"),
                "test": str(data_folder / f"{task}.test.jsonl"),
                "metric": "choice_accuracy",
            }
            for task in TASKS
        },
        "protocol": {"rounds": 2, "local_steps": 4},
        "preset": "paper",
        "operator": {"name": "metis"},
        "local_update": {"rank": 2, "alpha": 4, "batch_size": 4, "learning_rate": 0.01, "max_length": 32},
        "evaluation": {"validation_examples": 6, "test_examples": 6, "max_new_tokens": 4},
        "seed": 0,
    }


@pytest.fixture
def make_recipe(recipe_mapping: dict[str, Any]) -> MakeRecipe:
    """make_recipe("protocol.rounds=1", …): the small recipe with overrides."""
    return lambda *overrides: recipe_from_mapping(recipe_mapping, overrides)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real task data, where MANYSHOT_REAL_DATA names one."""
    folder = os.environ.get("MANYSHOT_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MANYSHOT_REAL_DATA names no folder with real task data")
    return Path(folder)


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Comparisons end without figures, as where matplotlib is missing: drawing them takes longer than running them."""

    def missing(*args: Any) -> None:
        raise MissingExtraError("figures are not drawn here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_outputs, "write_figures", missing)
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all pages of a module; see browser_helpers.py for what such a module needs."""
    from playwright.sync_api import sync_playwright

    from browser_helpers import CHROMIUM, PATIENCE

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, timeout=PATIENCE)
        yield browser
        browser.close()
