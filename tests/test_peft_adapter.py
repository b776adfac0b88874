"""PEFT adapters: exact against PEFT's own merge_and_unload, and refused by name where they could not be."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from manyshot.errors import ModelError
from manyshot.merge_models import MergeSettings, merge_models
from manyshot.operators import Mean, OperatorPlan
from manyshot.peft_adapter import is_adapter, read_adapter
from manyshot.rundir import write_json
from manyshot.seeding import make_generator
from manyshot.task_vector import read_dense
from manyshot.tensor_writer import write_tensors
from manyshot.tensors import Checkpoint
from merge_helpers import read_model

Tensors = dict[str, torch.Tensor]


def randomize(model: torch.nn.Module, *parts: str) -> None:
    """Draw every parameter that can be trained; PEFT's B would be zero."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=make_generator(*parts, name)) * 0.3)


def llama(*, tied: bool = False, vocab_size: int = 40) -> PreTrainedModel:
    config = LlamaConfig(
        **{"vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32},
        **{"tie_word_embeddings": tied, "attention_bias": True, "bos_token_id": None, "eos_token_id": None},
    )
    return LlamaForCausalLM(config)


def gpt2() -> PreTrainedModel:
    """Its layers store inputs × outputs; attn.c_proj is square, so only the configuration tells."""
    ids = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32, **ids))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "tied": lambda: llama(tied=True),
    "gpt2": gpt2,
    "wide": lambda: llama(vocab_size=44),
}


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns about tied and saved embeddings, and about names of its own and of transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for name, make in MODELS.items():
        model = make()
        randomize(model, "base", name)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(str(folders[name]))
    return folders


def train(base: Path, folder: Path, *, seed: str = "adapter", **settings: Any) -> tuple[Path, Tensors]:
    """An adapter with drawn weights, saved by PEFT, and the tensors that PEFT itself merges it to."""
    from transformers import AutoModelForCausalLM

    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    with quiet():
        adapted = get_peft_model(model, LoraConfig(**settings))
        randomize(adapted, seed)
        adapted.save_pretrained(str(folder))
        merged = adapted.merge_and_unload()
        merged.save_pretrained(str(folder / "merged"))
    return folder, read_model(folder / "merged")


def ours(base: Path, adapter: Path, output: Path) -> Tensors:
    merge_models(base, {"x": adapter}, OperatorPlan(Mean()), [1.0], output, MergeSettings(threads=1))
    return read_model(output)


CASES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    # name: (base, LoraConfig, endings of the tensors that change)
    "plain": ("llama", {}, {"q_proj.weight"}),
    "every projection": ("llama", {"target_modules": "all-linear"}, {"_proj.weight"}),
    "rslora": ("llama", {"use_rslora": True, "r": 5}, {"q_proj.weight"}),
    "rank and alpha patterns": (
        "llama",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 1, "layers.1.self_attn.q_proj": 7, r"^model\.layers\.0\.mlp\..*": 2},
            "alpha_pattern": {"layers.1.self_attn.v_proj": 9.0, r".*\.0\.mlp\.down_proj": 2.5},
        },
        {"q_proj.weight", "v_proj.weight", "down_proj.weight"},
    ),
    "rslora with patterns": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"layers.0.self_attn.q_proj": 8}, "alpha_pattern": {"q_proj": 3}},
        {"q_proj.weight"},
    ),
    "gaussian start": ("llama", {"init_lora_weights": "gaussian"}, {"q_proj.weight"}),
    "one layer": (
        "llama",
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"layers.1.self_attn.q_proj.weight"},
    ),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}, {"q_proj.weight", "embed_tokens.weight"}),
    "tied embedding": ("tied", {"target_modules": ["embed_tokens"]}, {"embed_tokens.weight"}),
    "head": ("llama", {"target_modules": ["lm_head"]}, {"lm_head.weight"}),
    "modules_to_save": (
        "llama",
        {"modules_to_save": ["lm_head", "input_layernorm", "norm"]},
        {"q_proj.weight", "lm_head.weight", "norm.weight"},
    ),
    "saved tied embedding": (
        "tied",
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"q_proj.weight", "embed_tokens.weight"},
    ),
    "every bias": ("llama", {"bias": "all"}, {"q_proj.weight", "_proj.bias"}),
    "biases of adapted layers": ("llama", {"bias": "lora_only"}, {"q_proj.weight", "q_proj.bias"}),
    "inputs × outputs": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"c_attn.weight", "c_proj.weight"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_read_adapter_is_what_peft_merges(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    kind, settings, endings = CASES[case]
    adapter, expected = train(bases[kind], tmp_path / "adapter", **settings)
    found = ours(bases[kind], adapter, tmp_path / "out")
    base = read_model(bases[kind])
    assert found.keys() == expected.keys()
    changed = {name for name in base if not torch.equal(found[name], base[name])}
    assert changed == {name for name in base if name.endswith(tuple(endings))}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)  # PEFT sums over the rank in BLAS' order
        if name not in changed:
            assert torch.equal(found[name], tensor), name
    update = read_adapter(adapter, Checkpoint(bases[kind]), "x")
    for name in update.names:  # what the adapter holds whole is the expert, to the bit that float32 leaves
        if update.is_dense(name):
            difference = read_dense(update, name, base[name])
            assert torch.equal(difference, expected[name] - base[name]), name


def test_read_adapter_differs_from_peft_where_the_scaling_is_changed(bases: dict[str, Path], tmp_path: Path) -> None:
    """So the comparison above would see a wrong scaling or a wrong transpose."""
    adapter, expected = train(bases["gpt2"], tmp_path / "a", target_modules=["c_proj"], fan_in_fan_out=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for key, value in (("lora_alpha", 6), ("fan_in_fan_out", False), ("use_rslora", True)):
        write_json(adapter / "adapter_config.json", config | {key: value})
        found = ours(bases["gpt2"], adapter, tmp_path / key)
        off = [name for name in expected if not torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)]
        assert "transformer.h.0.attn.c_proj.weight" in off, key


def test_read_adapter_of_a_bfloat16_base_and_adapter_adds_in_float32(bases: dict[str, Path], tmp_path: Path) -> None:
    base = {name: tensor.bfloat16() for name, tensor in read_model(bases["llama"]).items()}
    write_tensors(tmp_path / "base" / "model.safetensors", base)
    write_json(tmp_path / "base" / "config.json", {})
    settings: dict[str, Any] = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    adapter, _ = train(bases["llama"], tmp_path / "adapter", **settings)
    file = adapter / "adapter_model.safetensors"
    write_tensors(file, {name: tensor.bfloat16() for name, tensor in load_file(file).items()})
    factors = {name: tensor.float() for name, tensor in load_file(file).items()}
    prefix, name = "base_model.model.", "model.layers.0.self_attn.q_proj"
    product = factors[f"{prefix}{name}.lora_B.weight"] @ factors[f"{prefix}{name}.lora_A.weight"] * (5 / 3)
    found = ours(tmp_path / "base", adapter, tmp_path / "out")
    exact = base[f"{name}.weight"].float() + product
    # the sum over the rank may round otherwise, and then a value near the middle goes to the other neighbour
    assert (found[f"{name}.weight"] == exact.bfloat16()).float().mean() > 0.99
    assert torch.equal(found["model.norm.weight"].float(), factors[f"{prefix}model.norm.weight"])


def test_read_adapter_finds_a_tensor_that_the_base_names_with_or_without_a_prefix(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    adapter, expected = train(bases["llama"], tmp_path / "adapter")
    for number, (old, new) in enumerate((("model.layers", "layers"), ("model.layers", "language_model.model.layers"))):
        renamed = {name.replace(old, new): tensor for name, tensor in read_model(bases["llama"]).items()}
        folder = tmp_path / f"base{number}"
        write_tensors(folder / "model.safetensors", renamed)
        write_json(folder / "config.json", {})
        found = ours(folder, adapter, tmp_path / f"out{number}")
        name = "model.layers.1.self_attn.q_proj.weight"
        torch.testing.assert_close(found[name.replace(old, new)], expected[name], rtol=1e-5, atol=1e-6)


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"use_dora is True, .*refused; DoRA is not of the form s·B·A"),
    "lora_bias": ({"lora_bias": True}, r"lora_bias is True"),
    "pissa": ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', which changes the base's own weights"),
    "olora": ({"init_lora_weights": "olora"}, r"init_lora_weights is 'olora'"),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices is .*1, 2"),
    "target_parameters": ({"target_parameters": ["q_proj.weight"], "target_modules": []}, r"target_parameters is \["),
}


@pytest.mark.parametrize("case", REFUSED)
def test_read_adapter_refuses_what_is_not_exact_by_name(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    adapter, _ = train(bases["llama"], tmp_path / "adapter", **settings)
    with pytest.raises(ModelError, match=rf"model 'x' \(.*adapter_config\.json\): {message}"):
        read_adapter(adapter, Checkpoint(bases["llama"]), "x")


@pytest.fixture
def adapter(bases: dict[str, Path], tmp_path: Path) -> Path:
    return train(bases["llama"], tmp_path / "adapter")[0]


def refused(bases: dict[str, Path], adapter: Path, message: str, base: str = "llama") -> None:
    with pytest.raises(ModelError, match=message):
        read_adapter(adapter, Checkpoint(bases[base]), "x")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"a_setting_of_tomorrow": 3}, r"a_setting_of_tomorrow is 3, and merging it would not be exact; it is refused"),
        ({"peft_type": "LOHA"}, r"peft_type is LOHA; LoRA adapters can be merged"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication is \[\[0, 2\], \[1, 2\]\]"),
        ({"lora_alpha": None}, r"lora_alpha is missing"),
        ({"init_lora_weights": "loftq"}, r"init_lora_weights is 'loftq'.*path_initial_model_for_weight_conversion"),
    ],
)
def test_read_adapter_refuses_settings_it_does_not_know(
    setting: dict[str, Any], message: str, bases: dict[str, Path], adapter: Path
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", config | setting)
    refused(bases, adapter, rf"model 'x' \(.*adapter_config\.json\): {message}")
    write_json(adapter / "adapter_config.json", config | {"a_setting_of_tomorrow": None})  # one that is not set
    assert read_adapter(adapter, Checkpoint(bases["llama"]), "x").names


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("lora_magnitude_vector", r"tensor '.*lora_magnitude_vector' is refused: DoRA rescales whole rows"),
        ("lora_B.bias", r"tensor '.*lora_B\.bias' is refused: a LoRA bias changes the layer's bias too"),
        ("token_adapter.trainable_tokens_delta", r"is refused: trained tokens change single rows of the embeddings"),
    ],
)
def test_read_adapter_refuses_tensors_that_its_configuration_hides(
    key: str, message: str, bases: dict[str, Path], adapter: Path
) -> None:
    file = adapter / "adapter_model.safetensors"
    write_tensors(file, load_file(file) | {f"base_model.model.model.layers.0.self_attn.q_proj.{key}": torch.ones(16)})
    refused(bases, adapter, message)


def test_read_adapter_refuses_an_adapter_of_another_base(bases: dict[str, Path], tmp_path: Path) -> None:
    refused(
        bases,
        train(bases["gpt2"], tmp_path / "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)[0],
        r"model 'x' .*: it changes 'transformer\.h\.0\.attn\.c_attn\.weight', and the base .* has no such tensor",
    )
    wide = train(bases["wide"], tmp_path / "wide", modules_to_save=["lm_head"])[0]
    refused(bases, wide, r"tensor 'lm_head\.weight' has shape \(44, 16\), the base .* has \(40, 16\)")
    wide = train(bases["wide"], tmp_path / "factors", target_modules=["lm_head"])[0]
    refused(bases, wide, r"lm_head\.weight: the adapter's update has shape \(44, 16\), the base's tensor \(40, 16\)")
    # the same shapes, but the embedding below the adapted one is another
    embedded = train(bases["tied"], tmp_path / "embedded", target_modules=["embed_tokens"])[0]
    refused(bases, embedded, r"it was trained on a base whose 'model\.embed_tokens\.weight' is not that of")
    # an embedding that was trained while the head stayed, in a base that has one tensor for both
    apart = train(bases["tied"], tmp_path / "apart", modules_to_save=["embed_tokens"])[0]
    refused(bases, apart, r"'model\.embed_tokens\.weight' was trained apart from the output head", base="tied")
    # a head in a base that has no tensor of its own for it
    head = train(bases["llama"], tmp_path / "head", modules_to_save=["lm_head"])[0]
    refused(bases, head, r"it changes 'lm_head\.weight', .* or the tensor is tied to another one", base="tied")


def test_read_adapter_refuses_half_a_pair_and_factors_that_do_not_fit(bases: dict[str, Path], adapter: Path) -> None:
    file, name = adapter / "adapter_model.safetensors", "base_model.model.model.layers.0.self_attn.q_proj"
    stored = load_file(file)
    write_tensors(file, {key: tensor for key, tensor in stored.items() if key != f"{name}.lora_A.weight"})
    refused(bases, adapter, r"'model\.layers\.0\.self_attn\.q_proj' has only one of the factors A and B")
    write_tensors(file, stored | {f"{name}.lora_A.weight": torch.ones(2, 16)})
    refused(bases, adapter, r"factors of shapes \(2, 16\) and \(16, 3\) do not make an update of shape \(16, 16\)")


def test_read_adapter_refuses_a_pickle_and_says_how_to_convert_it(bases: dict[str, Path], adapter: Path) -> None:
    assert is_adapter(adapter)
    assert not is_adapter(bases["llama"])
    (adapter / "adapter_model.safetensors").unlink()
    refused(bases, adapter, r"model 'x': .*adapter has no adapter_model\.safetensors")
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    refused(
        bases, adapter, r"adapter_model\.bin, a pickle, .*PeftModel\.from_pretrained\(base, folder\)\.save_pretrained"
    )


def test_read_adapter_refuses_a_damaged_file(bases: dict[str, Path], adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    blob = file.read_bytes()
    for size in (0, 6, 100, len(blob) - 1):
        file.write_bytes(blob[:size])
        refused(bases, adapter, r"adapter_model\.safetensors: not a readable safetensors file")
