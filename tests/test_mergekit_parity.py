"""The same mergekit file through mergekit's own methods and through ours, on real weights in bfloat16.

mergekit 0.1.5 computes in the tensors' type unless told otherwise; here it gets float32. Two results are *equal up to
one rounding* where their float32 values differ by no more than SLACK float32 roundings of what was added up, |Θ⁰| +
Σ |w_τ v_τ|, and each is rounded to bfloat16 once. Where nothing is divided, and so nothing can be divided in another
order, they are equal bit by bit.
Shapes: T = models, P = entries of a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from manyshot.base_model import DEMO_MODEL, find_base_folder
from manyshot.errors import MissingExtraError
from manyshot.merge_command import merge
from manyshot.operators import Dare, Tile, merge_whole
from manyshot.recipe_file import load_merge_recipe
from manyshot.seeding import make_generator
from manyshot.tensors import Checkpoint
from merge_helpers import read_model, same_bits, write_model

pytest.importorskip("mergekit", reason="mergekit is not installed: pip install --no-deps mergekit==0.1.5 immutables")

from mergekit import sparsify
from mergekit.merge_methods import merge_tensors

Tensors = dict[str, torch.Tensor]
SLACK = 4
NAMES = (
    "model.layers.0.input_layernorm.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.3.self_attn.q_proj.weight",
    "model.layers.7.mlp.down_proj.weight",
    "model.norm.weight",
)
WEIGHTS = {"one": 0.5, "two": 0.8, "three": 1.2}
# most of what the smallest noise moves is rounded away again
NOISE = {"one": 0.01, "two": 0.03, "three": 0.001}


@pytest.fixture(scope="session")
def demo() -> Checkpoint:
    """The real weights: SmolLM2-135M-Instruct, out of the demo's data package."""
    try:
        return Checkpoint(find_base_folder(DEMO_MODEL).path)
    except MissingExtraError as error:
        pytest.skip(str(error))


def write_models(folder: Path, demo: Checkpoint, names: tuple[str, ...]) -> dict[str, Path]:
    """base, one, two, three: bfloat16 folders with these tensors; the experts are the base with noise, rounded."""
    base = {name: demo.read(name).bfloat16() for name in names}
    write_model(folder / "base", base)
    for task, scale in NOISE.items():
        moved = {}
        for name, tensor in base.items():
            noise = torch.randn(tensor.shape, generator=make_generator("parity", task, name))
            moved[name] = (tensor.float() + scale * noise).bfloat16()
        write_model(folder / task, moved)
    return {name: folder / name for name in ("base", *NOISE)}


@pytest.fixture(scope="module")
def models(demo: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("parity"), demo, NAMES)


@pytest.fixture(scope="module")
def stored(models: dict[str, Path]) -> dict[str, Tensors]:
    return {name: read_model(folder) for name, folder in models.items()}


def write_config(folder: Path, models: Mapping[str, Path], method: str, **parameters: Any) -> Path:
    """A mergekit file for the three experts."""
    listed = [{"model": str(models[task]), "parameters": {"weight": WEIGHTS[task]}} for task in NOISE]
    raw: dict[str, Any] = {"merge_method": method, "models": listed, "parameters": parameters}
    if method != "linear":
        raw["base_model"] = str(models["base"])
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump(raw), "utf-8")
    return file


def ours(folder: Path, config: Path, dtype: str, *overrides: str) -> Path:
    output = folder / f"{config.stem}-{dtype}"
    merge(load_merge_recipe(config, [f"dtype={dtype}", *overrides]), output, threads=1)
    return output


def theirs(method: str, base: torch.Tensor, experts: list[torch.Tensor], **parameters: Any) -> torch.Tensor:
    """mergekit's own method in float32; what is not given has mergekit's default."""
    before = {} if method == "linear" else {"base": base}  # the base is no model of a linear merge
    tensors = before | dict(zip(NOISE, experts, strict=True))
    result: torch.Tensor = merge_tensors(
        list(tensors.values()),
        method,
        ids=list(tensors),
        base_index=0 if before else None,
        parameters={"weight": WEIGHTS} | parameters,
        dtype=torch.float32,
    )
    return result


def roundings(one: torch.Tensor, two: torch.Tensor, scale: torch.Tensor) -> float:
    """Largest difference in float32 roundings of `scale`."""
    return float(((one.double() - two.double()).abs() / (scale.double() * torch.finfo(torch.float32).eps)).max())


def compare(narrow: Tensors, wide: Tensors, expected: Tensors, scales: Tensors, least: float) -> None:
    """Our bfloat16 and float32 results against theirs in float32; `least` is the share that must be bit-equal."""
    assert same_bits(narrow, {name: tensor.bfloat16() for name, tensor in wide.items()})
    num_all = sum(value.numel() for value in expected.values())
    num_equal = sum(int((narrow[name] == value.bfloat16()).sum()) for name, value in expected.items())
    worst = max(roundings(wide[name], value, scales[name]) for name, value in expected.items())
    report = f"{num_equal} of {num_all} entries bit-equal in bfloat16, {worst:.2f} float32 roundings apart at most"
    assert worst <= SLACK, report
    assert num_equal >= least * num_all, report


def scale_of(base: torch.Tensor, experts: list[torch.Tensor], factor: float = 1.0) -> torch.Tensor:
    """|Θ⁰| + Σ |w_τ v_τ|: what was added up."""
    moved = [w * (e.float() - base.float()).abs() for w, e in zip(WEIGHTS.values(), experts, strict=True)]
    return base.float().abs() + factor * sum(moved, torch.zeros_like(base, dtype=torch.float32)) + 1e-30


def check(
    folder: Path,
    models: Mapping[str, Path],
    stored: dict[str, Tensors],
    method: str,
    least: float,
    **parameters: Any,
) -> None:
    """The same mergekit file through both."""
    config = write_config(folder, models, method, **parameters)
    narrow, wide = (read_model(ours(folder, config, dtype)) for dtype in ("bfloat16", "float32"))
    expected, scales = {}, {}
    for name, base in stored["base"].items():
        experts = [stored[task][name] for task in NOISE]
        expected[name] = theirs(method, base, experts, **parameters)
        scales[name] = scale_of(base, experts, parameters.get("lambda", 1.0) / parameters.get("density", 1.0))
    compare(narrow, wide, expected, scales, least)


@pytest.fixture
def stable_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's trim keeps what an unstable sort puts first among equal magnitudes; now the first in order."""
    argsort = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda tensor, **options: argsort(tensor, **options, stable=True))


# ---- equal -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters", "least"),
    [
        ("linear", {}, 0.999),
        ("task_arithmetic", {}, 1.0),
        ("task_arithmetic", {"lambda": 0.4}, 1.0),
        ("task_arithmetic", {"normalize": True}, 0.999),
        ("ties", {"density": 1.0, "normalize": True}, 1.0),
    ],
)
def test_parity_methods_without_a_choice_are_equal_up_to_one_rounding(
    models: dict[str, Path],
    stored: dict[str, Tensors],
    tmp_path: Path,
    method: str,
    parameters: dict[str, Any],
    least: float,
) -> None:
    check(tmp_path, models, stored, method, least, **parameters)


def test_parity_models_have_many_equal_magnitudes(stored: dict[str, Tensors]) -> None:
    name = "model.layers.3.self_attn.q_proj.weight"
    for task in NOISE:
        magnitudes = (stored[task][name].float() - stored["base"][name].float()).abs().flatten()
        assert len(magnitudes.unique()) < 0.05 * magnitudes.numel()


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.usefixtures("stable_order")
def test_parity_ties_is_bit_equal_where_equal_magnitudes_stay_in_order(
    models: dict[str, Path], stored: dict[str, Tensors], tmp_path: Path, density: float
) -> None:
    check(tmp_path, models, stored, "ties", 1.0, density=density, normalize=True)


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_parity_ties_as_mergekit_sorts_differs_only_in_which_equal_magnitudes_stay(
    stored: dict[str, Tensors], density: float
) -> None:
    for name, base in stored["base"].items():
        for task in NOISE:
            change_P = (stored[task][name].float() - base.float()).flatten()
            magnitudes_P = change_P.abs()
            k = max(1, int(density * len(change_P)))
            threshold = magnitudes_P.sort(descending=True).values[k - 1]
            kept_P = sparsify.magnitude(change_P, density) != 0
            above_P = magnitudes_P > threshold
            assert bool((kept_P[above_P]).all()) and not bool(kept_P[magnitudes_P < threshold].any()), (name, task)
            if threshold > 0:
                assert int(kept_P.sum()) == k, (name, task)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [False, True])
def test_parity_dare_with_the_same_draws_is_bit_equal(
    models: dict[str, Path],
    stored: dict[str, Tensors],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    rescale: bool,
) -> None:
    """Our division by the density is mergekit's lambda; its own `rescale` restores each L1 norm instead."""
    density, normalize = 0.25, method == "dare_ties"
    masks: list[torch.Tensor] = []
    for name, base in stored["base"].items():
        for task in NOISE:
            ones_TP, tile = torch.ones(1, base.numel()), Tile.of([task], name, seed=5)
            dare = Dare(density=density, scaling=1.0, rescale=False)
            masks.append(merge_whole(dare, ones_TP, torch.ones(1), tile).reshape(base.shape))
    drawn = iter(masks)

    def drop(tensor: torch.Tensor, density: float, rescale_norm: object = None) -> torch.Tensor:
        assert rescale_norm is None
        return tensor * next(drawn)

    monkeypatch.setattr(sparsify, "bernoulli", drop)
    share = sum(float(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert share == pytest.approx(density, abs=0.002)
    config = write_config(
        tmp_path, models, method, density=density, rescale=rescale, normalize=normalize, **{"lambda": 0.5}
    )
    narrow, wide = (read_model(ours(tmp_path, config, dtype, "seed=5")) for dtype in ("bfloat16", "float32"))
    expected, scales = {}, {}
    for name, base in stored["base"].items():
        experts = [stored[task][name] for task in NOISE]
        factor = 0.5 / density if rescale else 0.5
        expected[name] = theirs(
            method, base, experts, density=density, normalize=normalize, rescale=False, **{"lambda": factor}
        )
        scales[name] = scale_of(base, experts, factor)
    compare(narrow, wide, expected, scales, least=1.0)


# ---- a whole model ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("stable_order")
def test_parity_whole_model_is_equal_up_to_one_rounding(demo: Checkpoint, tmp_path: Path) -> None:
    models = write_models(tmp_path, demo, demo.names)
    stored = {name: read_model(folder) for name, folder in models.items()}
    for method, parameters, least in (
        ("linear", {}, 0.999),
        ("task_arithmetic", {"lambda": 0.4}, 1.0),
        ("ties", {"density": 0.2, "normalize": True}, 1.0),
    ):
        check(tmp_path, models, stored, method, least, **parameters)
