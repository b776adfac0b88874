"""Which tensor of an expert belongs to which of the base: ties by their bytes, and every mismatch by name and shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from manyshot.errors import ModelError
from manyshot.match import match_model, open_experts, refuse_untied, same_bytes, tied_duplicates
from manyshot.task_vector import ModelUpdate, read_dense
from manyshot.tensors import Checkpoint
from merge_helpers import draw, write_model

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def tensors(seed: str, *, head: str | None = None, rows: int = 7) -> dict[str, torch.Tensor]:
    """An embedding, a norm, and a head: `own`, `tied` (the embedding's bytes) or None."""
    found = {EMBED: draw(seed, EMBED, shape=(rows, 4)), NORM: draw(seed, NORM, shape=(4,))}
    if head is not None:
        found[HEAD] = found[EMBED].clone() if head == "tied" else draw(seed, HEAD, shape=(rows, 4))
    return found


def model(folder: Path, values: Mapping[str, torch.Tensor], **config: object) -> Checkpoint:
    return write_model(folder, values, **config)


def matched(
    tmp_path: Path, expert: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], *, allow_copy: bool = False
) -> ModelUpdate:
    return match_model("x", model(tmp_path / "expert", expert), model(tmp_path / "base", base), allow_copy=allow_copy)


def test_match_model_takes_equal_names_and_leaves_integers_to_the_base(tmp_path: Path) -> None:
    ids = {"position_ids": torch.arange(4)}
    update = matched(tmp_path, tensors("x") | {"position_ids": torch.arange(4) + 1}, tensors("base") | ids)
    assert update.names == (EMBED, NORM)
    update = matched(tmp_path, tensors("x"), tensors("base") | ids)  # newer files do not have such buffers
    assert update.names == (EMBED, NORM)
    update = matched(tmp_path, tensors("x") | ids, tensors("base"))
    assert update.names == (EMBED, NORM)


@pytest.mark.parametrize(("base_head", "expert_head"), [(None, "tied"), ("tied", None), ("tied", "tied"), (None, None)])
def test_match_model_finds_a_tied_head_stored_once_or_twice(
    base_head: str | None, expert_head: str | None, tmp_path: Path
) -> None:
    base, expert = tensors("base", head=base_head), tensors("x", head=expert_head)
    update = matched(tmp_path, expert, base)
    assert update.names == tuple(sorted(base))
    for name in update.names:
        assert torch.equal(read_dense(update, name), expert[EMBED if name == HEAD else name])


def test_match_model_finds_an_embedding_that_is_stored_as_the_head(tmp_path: Path) -> None:
    expert = tensors("x")
    expert[HEAD] = expert.pop(EMBED)
    update = matched(tmp_path, expert, tensors("base", head="tied"))
    assert torch.equal(read_dense(update, EMBED), expert[HEAD])


def test_match_model_does_not_take_equal_vectors_for_tied_matrices(tmp_path: Path) -> None:
    """Two norms of ones are equal by chance."""
    ones = {"a.norm": torch.ones(4), "b.norm": torch.ones(4)}
    with pytest.raises(ModelError, match=r"tensor 'b\.norm' of the base .*, shape \(4,\), is missing"):
        matched(tmp_path, {"a.norm": torch.ones(4)}, ones)
    base = model(tmp_path / "base", ones | {"a.w": torch.ones(2, 2), "b.w": torch.ones(2, 2), "c.w": torch.ones(2, 3)})
    assert same_bytes(base, "a.w", "b.w")
    assert not same_bytes(base, "a.w", "c.w")
    assert not same_bytes(base, "a.norm", "b.norm")


def test_match_model_tells_bits_apart_and_not_values(tmp_path: Path) -> None:
    zeros = {"a": torch.zeros(3, 4), "b": -torch.zeros(3, 4), "nan": torch.full((3, 4), torch.nan)}
    base = model(tmp_path / "b", zeros | {"also nan": zeros["nan"].clone(), "late": torch.zeros(3, 4)})
    assert not same_bytes(base, "a", "b")
    assert same_bytes(base, "nan", "also nan")
    assert same_bytes(base, "a", "late")


MISMATCHES = {
    "vocabulary": (
        tensors("x", rows=8),
        tensors("base"),
        r"'model\.embed_tokens\.weight' has shape \(8, 4\), the base .*base has \(7, 4\)",
    ),
    "missing": (
        {NORM: torch.ones(4)},
        tensors("base"),
        r"'model\.embed_tokens\.weight' of the base .*, shape \(7, 4\), is missing",
    ),
    "untied head": (
        tensors("x", head="own"),
        tensors("base"),
        r"'lm_head\.weight' of shape \(7, 4\) has no counterpart in the base",
    ),
    "no head": (
        tensors("x"),
        tensors("base", head="own"),
        r"'lm_head\.weight' of the base .*, shape \(7, 4\), is missing",
    ),
    "extra": (
        tensors("x") | {"adapter": torch.ones(2)},
        tensors("base"),
        r"'adapter' of shape \(2,\) has no counterpart",
    ),
    "integers": (
        tensors("x") | {NORM: torch.ones(4).int()},
        tensors("base"),
        r"'model\.norm\.weight' is of type .*32, in the base of .*32",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_match_model_refuses_by_name_and_shapes_unless_copies_are_allowed(case: str, tmp_path: Path) -> None:
    expert, base, message = MISMATCHES[case]
    with pytest.raises(ModelError, match=rf"model 'x' \(.*expert\): tensor {message}.*--allow-copy"):
        matched(tmp_path, expert, base)
    update = matched(tmp_path, expert, base, allow_copy=True)
    fitting = [n for n in base if n in expert and expert[n].shape == base[n].shape and expert[n].is_floating_point()]
    assert update.names == tuple(sorted(fitting))


def test_tied_duplicates_are_heads_with_the_embeddings_bytes_where_the_configuration_ties(tmp_path: Path) -> None:
    tied, own = tensors("base", head="tied"), tensors("base", head="own")
    assert tied_duplicates(model(tmp_path / "1", tied, tie_word_embeddings=True)) == {HEAD: EMBED}
    assert tied_duplicates(model(tmp_path / "2", tied, tie_word_embeddings=False)) == {}
    assert tied_duplicates(model(tmp_path / "3", tied)) == {}
    assert tied_duplicates(model(tmp_path / "4", own, tie_word_embeddings=True)) == {}
    assert tied_duplicates(model(tmp_path / "5", tensors("base"), tie_word_embeddings=True)) == {}


def test_refuse_untied_refuses_a_head_that_left_its_embedding(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tensors("base", head="tied"), tie_word_embeddings=True)
    tied = tied_duplicates(base)
    for head in (None, "tied"):
        refuse_untied(tied, ["x"], [match_model("x", model(tmp_path / f"{head}", tensors("x", head=head)), base)])
    own = match_model("y", model(tmp_path / "own", tensors("x", head="own")), base)
    with pytest.raises(ModelError, match=r"model 'y': it changes 'lm_head\.weight' apart from 'model\.embed_tokens"):
        refuse_untied(tied, ["y"], [own])
    refuse_untied({}, ["y"], [own])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_open_experts_refuses_quantised_models_by_tensor_or_configuration(dtype: torch.dtype, tmp_path: Path) -> None:
    plain = tensors("x")
    base = model(tmp_path / "base", plain)
    model(tmp_path / "narrow", plain | {EMBED: plain[EMBED].to(dtype)})
    with pytest.raises(
        ModelError, match=rf"model 'x': .*narrow is quantised \(tensor '{EMBED}' has type .*8_?e?.*\); merge"
    ):
        open_experts(base, {"x": tmp_path / "narrow"})
    with pytest.raises(ModelError, match=r"the base: .*narrow is quantised"):
        open_experts(Checkpoint(tmp_path / "narrow"), {"x": tmp_path / "base"})
    model(tmp_path / "said", plain, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"model 'x': .*said is quantised \(it says quantization_config\)"):
        open_experts(base, {"x": tmp_path / "said"})


def test_open_experts_names_a_folder_that_is_missing_or_no_model(tmp_path: Path) -> None:
    base = model(tmp_path / "base", tensors("base"))
    with pytest.raises(ModelError, match=r"model 'x': no such folder: .*gone"):
        open_experts(base, {"x": tmp_path / "gone"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty: a model folder without weights"):
        open_experts(base, {"x": tmp_path / "empty"})
    (tmp_path / "empty" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ModelError, match=r"AutoModelForCausalLM\.from_pretrained\(folder\)\.save_pretrained"):
        open_experts(base, {"x": tmp_path / "empty"})
