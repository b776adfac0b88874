"""What each client has: examples of its own task, made here; and the tiny model for those who name no other."""

import os
import random
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manyshot.base_model import cache_folder

LETTERS = "abcdefgh"
TASKS = {
    "first": lambda letters: letters[0],
    "last": lambda letters: letters[-1],
    "count": lambda letters: str(len(letters)),
}
SPECIALS = ["<pad>", "<end>", "<unk>"]


def make_examples(task: str, count: int, seed: str) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of a task, drawn by the seed."""
    if task not in TASKS:
        raise ValueError(f"no examples for the task '{task}'; there are {', '.join(TASKS)}")
    draw = random.Random(f"{task}/{seed}")
    rows = [draw.choices(LETTERS, k=draw.randint(2, 5)) for _ in range(count)]
    return [(f"{task} : {' '.join(letters)} =", f" {TASKS[task](letters)}") for letters in rows]


def find_model(name: str) -> str:
    """The folder or id of a model; "tiny" is made once, the same on every machine."""
    if name != "tiny":
        return name
    folder = cache_folder() / "examples" / "tiny-llama"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            made = Path(partial) / "model"
            _make_tiny_model(made)
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.is_dir():  # another process was not first
                    raise
    return str(folder)


def _make_tiny_model(folder: Path) -> None:
    """A Llama of 2 layers and width 64 with drawn weights, and a tokenizer of whole words."""
    words = [*SPECIALS, *TASKS, *LETTERS, *"0123456789", ":", "="]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.15)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
