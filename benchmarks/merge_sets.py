"""Checkpoints to merge, made here: Llama layout, bfloat16, seeded noise on seeded weights; and LoRA adapters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from manyshot.tensor_writer import SafetensorsWriter, write_tensors
from manyshot.tensors import TensorInfo


@dataclass(frozen=True)
class Layout:
    """The sizes of a Llama model."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    key_values: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, self.hidden),
            "lm_head.weight": (self.vocabulary, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            for name, rows in (("q", self.hidden), ("k", self.key_values), ("v", self.key_values), ("o", self.hidden)):
                found[f"{at}self_attn.{name}_proj.weight"] = (rows, self.hidden)
            found[f"{at}mlp.gate_proj.weight"] = found[f"{at}mlp.up_proj.weight"] = (self.inner, self.hidden)
            found[f"{at}mlp.down_proj.weight"] = (self.hidden, self.inner)
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"{at}{name}.weight"] = (self.hidden,)
        return dict(sorted(found.items()))

    @property
    def num_parameters(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes().values())


MEDIUM = Layout(hidden=1024, inner=3552, layers=24, vocabulary=32000, key_values=1024)  # 428 M
SMALL = Layout(hidden=1024, inner=3552, layers=6, vocabulary=8000, key_values=1024)
DEEPER = Layout(hidden=1024, inner=3552, layers=18, vocabulary=8000, key_values=1024)  # SMALL, three times as deep
LARGE = Layout(hidden=2048, inner=8192, layers=16, vocabulary=32000, key_values=512)  # 1.1 G


def draw(shape: tuple[int, ...], scale: float, *seeds: int) -> torch.Tensor:
    seed = 0
    for one in seeds:
        seed = seed * 1_000_003 + one
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_model(folder: Path, layout: Layout, model: int) -> Path:
    """Model 0 is the base; the others are the base plus noise of a tenth of its scale. Made once."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: TensorInfo(shape, "BF16") for name, shape in layout.shapes().items()}
    with open(folder / "model.safetensors", "wb") as stream, SafetensorsWriter(stream, infos) as writer:
        for number, (name, info) in enumerate(infos.items()):
            tensor = draw(info.shape, 0.02, number)
            if model:
                tensor += draw(info.shape, 0.002, number, model)
            writer.write(name, tensor.bfloat16())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": layout.hidden,
        "intermediate_size": layout.inner,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": layout.hidden // 64,
        "num_key_value_heads": layout.key_values // 64,
        "vocab_size": layout.vocabulary,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer()))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _tokenizer() -> dict[str, object]:
    """The smallest tokenizer that loads; mergekit wants one."""
    model = {"type": "WordLevel", "vocab": {"a": 0, "[UNK]": 1}, "unk_token": "[UNK]"}
    return {"version": "1.0", "added_tokens": [], "model": model} | dict.fromkeys(
        ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    )


def make_adapter(folder: Path, layout: Layout, model: int, rank: int = 16) -> Path:
    """A PEFT adapter on every linear layer. Made once."""
    if (folder / "adapter_config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for number, (name, shape) in enumerate(layout.shapes().items()):
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = draw((rank, shape[1]), 0.02, number, model, 1).bfloat16()
            tensors[f"{module}.lora_B.weight"] = draw((shape[0], rank), 0.02, number, model, 2).bfloat16()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_models(root: str, layout: Layout, count: int) -> None:
    for model in range(count):
        make_model(Path(root) / f"m{model}", layout, model)


def make_adapters(root: str, layout: Layout, count: int) -> None:
    for model in range(count):
        make_adapter(Path(root) / f"a{model}", layout, model)
