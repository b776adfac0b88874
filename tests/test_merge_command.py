"""`manyshot merge` as its users call it: what it writes, and what it refuses before it writes anything."""

from __future__ import annotations

import json
import math
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from conftest import make_rows
from manyshot import gap_weights
from manyshot.__main__ import main
from manyshot.cli import app
from manyshot.merge_models import RECORD_NAME
from manyshot.rundir import read_json
from manyshot.seeding import make_generator
from merge_helpers import same_bits

Tensors = dict[str, torch.Tensor]
OPTIONS = {
    *("--output", "--base", "--operator", "--weights", "--scaling", "--density", "--trim-scope", "--mask-threshold"),
    *(
        "--min-agreement",
        "--preset",
        "--temperature",
        "--set",
        "--validation",
        "--dtype",
        "--shard-size",
        "--device",
        "--threads",
    ),
    *("--seed", "--allow-copy", "--allow-nonfinite", "--force", "--quiet", "--json"),
}


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Done]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Call]:
    """Call `manyshot merge …` in tmp_path, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    handler = signal.getsignal(signal.SIGTERM)

    def run_main(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["manyshot", "merge", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        code = exit_.value.code
        return Done(code if isinstance(code, int) else 0, *capfd.readouterr())

    yield run_main
    signal.signal(signal.SIGTERM, handler)


def read(folder: Path) -> Tensors:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_like(base: Path, folder: Path, tensors: Tensors) -> Path:
    """A model folder with the base's files and other weights."""
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def models(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama and three small perturbed copies of it: base, one, two, three."""
    folder, base = tmp_path_factory.mktemp("models"), read(base_folder)
    found = {"base": base_folder}
    for name in ("one", "two", "three"):
        generator = make_generator("merge command", name)
        moved = {
            key: tensor + 0.02 * torch.randn(tensor.shape, generator=generator) for key, tensor in sorted(base.items())
        }
        found[name] = write_like(base_folder, folder / name, moved)
    return found


@pytest.fixture(scope="module")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT adapter on the base, saved by PEFT itself, with drawn factors."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapters") / "lora"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # a property that peft asks transformers for by its old name
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(str(base_folder)),
            LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
        )
        generator = make_generator("merge command", "adapter")
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(str(folder))
    return folder


def close(found: Tensors, expected: Tensors, atol: float = 1e-6) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].shape == expected[name].shape
        and torch.allclose(found[name].double(), expected[name].double(), rtol=0, atol=atol)
        for name in found
    )


def combined(models: dict[str, Path], coefficients: dict[str, float]) -> Tensors:
    """Θ⁰ + Σ c_τ (θ_τ − Θ⁰), in float64."""
    base = {name: tensor.double() for name, tensor in read(models["base"]).items()}
    total = {name: tensor.clone() for name, tensor in base.items()}
    for model, coefficient in coefficients.items():
        for name, tensor in read(models[model]).items():
            total[name] += coefficient * (tensor.double() - base[name])
    return total


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


# ---- what it merges --------------------------------------------------------------------------------------------------


def test_merge_adds_task_vectors_at_the_default_scaling(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    done = call(models["one"], models["two"], "--base", models["base"], "-o", "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert close(read(tmp_path / "out"), combined(models, {"one": 0.4, "two": 0.4}))
    assert done.stdout.splitlines()[-1] == "out"
    assert done.stdout.startswith("one: weight 1, task vector norm ")
    assert "100.0% of the changed coordinates kept" in done.stdout


@pytest.mark.parametrize(
    ("flags", "coefficients"),
    [
        (("--operator", "mean"), {"one": 1 / 3, "two": 1 / 3, "three": 1 / 3}),
        (("--operator", "mean", "--weights", "1,2,5"), {"one": 0.125, "two": 0.25, "three": 0.625}),
        (("--operator", "mean", "--weights", "0,0,1"), {"one": 0, "two": 0, "three": 1}),
        (("--weights", "1,-0.5,2", "--scaling", "0.5"), {"one": 0.5, "two": -0.25, "three": 1}),
        (("--weights", "1,0,2", "--set", "scaling=1"), {"one": 1, "two": 0, "three": 2}),
        (
            ("--operator", "metis", "--weights", "1,1,2", "--set", "mask=false"),
            {"one": 0.25, "two": 0.25, "three": 0.5},
        ),
        (("--operator", "dare", "--density", "1", "--scaling", "0.3"), {"one": 0.3, "two": 0.3, "three": 0.3}),
    ],
)
def test_merge_weights_are_shares_for_means_and_multipliers_for_sums(
    call: Call, models: dict[str, Path], tmp_path: Path, flags: tuple[str, ...], coefficients: dict[str, float]
) -> None:
    done = call(models["one"], models["two"], models["three"], "--base", models["base"], "-o", "out", *flags)
    assert done.returncode == 0, done.stderr
    assert close(read(tmp_path / "out"), combined(models, coefficients))


def test_merge_ties_density_keeps_exactly_that_many_of_each_tensor(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    done = call(models["one"], "--base", models["base"], "-o", "out", "--operator", "ties", "--density", "0.3")
    assert done.returncode == 0, done.stderr
    merged, base, one = read(tmp_path / "out"), read(models["base"]), read(models["one"])
    for name, before in base.items():
        change = one[name] - before
        kept = change.flatten().abs().argsort(descending=True, stable=True)[: max(1, int(0.3 * before.numel()))]
        expected = before.flatten().clone()
        expected[kept] = (before.flatten() + change.flatten())[kept]
        assert torch.equal(merged[name].flatten(), expected), name


def test_merge_takes_adapters_and_folders_together(
    call: Call, models: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    done = call(adapter, models["one"], "--base", models["base"], "-o", "out", "--operator", "mean")
    assert done.returncode == 0, done.stderr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        model = AutoModelForCausalLM.from_pretrained(str(models["base"]))
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    tuned, one = {name: tensor.detach() for name, tensor in merged.state_dict().items()}, read(models["one"])
    expected = {name: (tuned[name].double() + one[name].double()) / 2 for name in one}
    assert close(read(tmp_path / "out"), expected)


def test_merge_result_loads_in_plain_transformers_with_the_base_files(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert call(models["one"], "--base", models["base"], "-o", "out", "--scaling", "1").returncode == 0
    model, report = AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = torch.tensor([AutoTokenizer.from_pretrained(str(tmp_path / "out")).encode("a b c")])
    plain = AutoModelForCausalLM.from_pretrained(str(models["one"]))
    with torch.no_grad():  # one model with weight 1 is that model
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-4)
    for file in models["base"].iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes(), file.name


# ---- what it says ----------------------------------------------------------------------------------------------------


def test_merge_record_and_card_say_what_was_merged(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    flags = ("--operator", "mean", "--weights", "1,3", "--seed", "5", "--quiet")
    done = call(models["one"], models["two"], "--base", models["base"], "-o", "out", *flags)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "")
    record = read_json(tmp_path / "out" / RECORD_NAME)
    assert record["weights"] == {"one": 0.25, "two": 0.75}
    assert record["base"] == record["recipe"]["base"] == str(models["base"])
    assert record["recipe"]["experts"]["two"]["path"] == str(models["two"])
    assert record["recipe"]["operator"] == {"name": "mean"} and record["recipe"]["seed"] == 5
    assert (record["copied"], record["tied"], record["kept_share"]) == ([], {}, 1.0)
    num_all = sum(tensor.numel() for tensor in read(models["base"]).values())
    assert num_all - 5 <= record["num_kept"] <= record["num_changed"] <= num_all
    base, one = read(models["base"]), read(models["one"])
    norm = math.sqrt(sum(float((one[name] - base[name]).double().square().sum()) for name in base))
    assert record["task_vector_norms"]["one"] == pytest.approx(norm, rel=1e-6)
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    metadata = yaml.safe_load(text.split("---")[1])
    assert ("base_model" not in metadata, metadata["base_model_relation"]) == (True, "merge")
    assert models["base"].name in text and str(tmp_path) not in text
    assert {"merge", "manyshot-mean"} <= set(metadata["tags"])
    assert "| one | 0.25 |\n| two | 0.75 |" in text
    shown = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert shown["experts"]["two"]["path"] == models["two"].name and shown["operator"] == record["recipe"]["operator"]


def test_merge_json_is_one_line_with_folder_weights_and_kept_share(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    flags = ("--operator", "ties", "--density", "0.25", "--json")
    done = call(models["one"], models["two"], "--base", models["base"], "-o", "out", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["merged"], found["weights"]) == ("out", {"one": 1.0, "two": 1.0})
    assert 0.25 < found["kept_share"] < 0.5  # two independent quarters


def test_merge_names_models_of_one_name_by_the_folders_above(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "final").symlink_to(models[name])
    done = call("one/final", "two/final", "--base", models["base"], "-o", "out", "--operator", "mean", "--json")
    assert list(json.loads(done.stdout)["weights"]) == ["one-final", "two-final"]


def test_merge_help_lists_every_option() -> None:
    shown = CliRunner().invoke(app, ["merge", "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert {word.strip(",.") for word in shown.output.split() if word.startswith("--")} - {"--help"} == OPTIONS


# ---- how it writes ---------------------------------------------------------------------------------------------------


def test_merge_dtype_and_shard_size_change_files_and_not_values(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    inputs = (models["one"], models["two"], "--base", models["base"], "--operator", "ties")
    assert call(*inputs, "-o", "plain").returncode == 0
    assert call(*inputs, "-o", "small", "--shard-size", "10KB", "--threads", "2").returncode == 0
    assert call(*inputs, "-o", "half", "--dtype", "bfloat16", "--threads", "1").returncode == 0
    plain, small, half = read(tmp_path / "plain"), read(tmp_path / "small"), read(tmp_path / "half")
    assert same_bits(small, plain)
    assert len(list((tmp_path / "small").glob("model-*.safetensors"))) > 3
    index = read_json(tmp_path / "small" / "model.safetensors.index.json")
    assert set(index["weight_map"]) == set(plain)
    assert same_bits(half, {name: tensor.bfloat16() for name, tensor in plain.items()})
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"


def test_merge_seed_decides_what_dare_drops(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    inputs = (models["one"], models["two"], "--base", models["base"], "--operator", "dare")
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(*inputs, "-o", folder, "--seed", seed).returncode == 0
    first, again, other = (read(tmp_path / folder) for folder in "abc")
    assert same_bits(first, again)
    assert not same_bits(first, other)


def test_merge_force_replaces_a_merged_model_and_nothing_else(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    inputs = (models["one"], "--base", models["base"], "-o", "out")
    assert call(*inputs, "--scaling", "1").returncode == 0
    before = read(tmp_path / "out")
    refused = call(*inputs, "--scaling", "0.5")
    assert (refused.returncode, refused.stderr) == (
        2,
        "manyshot: error: out: is there already; --force replaces it\n",
    )
    assert same_bits(read(tmp_path / "out"), before)
    assert call(*inputs, "--scaling", "0.5", "--force").returncode == 0
    assert close(read(tmp_path / "out"), combined(models, {"one": 0.5}))
    (tmp_path / "out" / RECORD_NAME).unlink()
    kept = call(*inputs, "--force")
    assert kept.returncode == 2 and "--force replaces merged models only" in kept.stderr


# ---- recipe files ----------------------------------------------------------------------------------------------------


def write_recipe(folder: Path, models: dict[str, Path], **more: Any) -> str:
    raw = {"base": str(models["base"]), "experts": {name: {"path": str(models[name])} for name in ("one", "two")}}
    (folder / "merge.yaml").write_text(yaml.safe_dump(raw | more, sort_keys=False), "utf-8")
    return "merge.yaml"


def test_merge_recipe_file_gives_what_the_same_flags_give(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models, operator={"name": "ties", "density": 0.3}, seed=4)
    flags = ("--operator", "ties", "--density", "0.3", "--seed", "4")
    assert call(recipe, "-o", "a").returncode == 0
    assert call(models["one"], models["two"], "--base", models["base"], *flags, "-o", "b").returncode == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for name in files(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (("--set", "density=0.5"), "density", 0.5),
        (("--density", "0.00001"), "density", 1e-05),
        (("--set", "density=[0.5]"), "density", [0.5]),
        (("--scaling", "2"), "scaling", 2.0),
        (("--trim-scope", "model"), "trim_scope", "model"),
        (("--density", "0.1", "--set", "density=0.5"), "density", 0.5),
    ],
)
def test_merge_flags_override_settings_of_a_recipe_file(
    call: Call, models: dict[str, Path], tmp_path: Path, flags: tuple[str, ...], key: str, value: object
) -> None:
    recipe = write_recipe(tmp_path, models, operator={"name": "ties", "density": 0.3})
    done = call(recipe, "-o", "out", *flags)
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "out" / RECORD_NAME)["recipe"]["operator"][key] == value


def test_merge_seed_dtype_and_shard_size_override_a_recipe_file(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, models, seed=4, dtype="float16", shard_size="1GB")
    flags = ("--seed", "0", "--dtype", "bfloat16", "--shard-size", "20KB")
    assert call(recipe, "-o", "out", *flags).returncode == 0
    found = read_json(tmp_path / "out" / RECORD_NAME)["recipe"]
    assert (found["seed"], found["dtype"], found["shard_size"]) == (0, "bfloat16", 20_000)


def test_merge_overrides_of_a_recipe_file_reach_the_tensors_they_name(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    overrides = {"*norm*": {"name": "mean"}, "*.mlp.*": {"scaling": 1.0}}
    recipe = write_recipe(tmp_path, models, operator={"name": "task_arithmetic", "scaling": 0.25}, overrides=overrides)
    assert call(recipe, "-o", "out").returncode == 0
    sums = {factor: combined(models, {"one": factor, "two": factor}) for factor in (0.25, 0.5, 1.0)}
    factors = {name: 0.5 if "norm" in name else 1.0 if ".mlp." in name else 0.25 for name in sums[1.0]}
    assert set(factors.values()) == {0.25, 0.5, 1.0}
    assert close(read(tmp_path / "out"), {name: sums[factor][name] for name, factor in factors.items()})


def test_merge_of_a_mergekit_file_says_what_it_means_here(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    listed = [{"model": str(models[name]), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    raw = {"merge_method": "dare_linear", "base_model": str(models["base"]), "models": listed, "dtype": "bfloat16"}
    (tmp_path / "mk.yaml").write_text(yaml.safe_dump(raw | {"parameters": {"density": 0.5}}), "utf-8")
    done = call("mk.yaml", "-o", "out")
    assert done.returncode == 0, done.stderr
    assert "note: rescale: kept entries are divided by the density (the paper)" in done.stdout
    merged = read(tmp_path / "out")
    assert {tensor.dtype for tensor in merged.values()} == {torch.bfloat16}
    assert "L1 norm" in read_json(tmp_path / "out" / RECORD_NAME)["recipe"]["notes"][0]


def documented(language: str) -> list[str]:
    text = (Path(__file__).parent.parent / "docs" / "merge.md").read_text("utf-8")
    return [part.split("```", 1)[0] for part in text.split(f"```{language}\n")[1:]]


@pytest.mark.parametrize("position", [0, 1])
def test_merge_recipes_of_the_documentation_run(
    call: Call, models: dict[str, Path], adapter: Path, tmp_path: Path, position: int
) -> None:
    (tmp_path / "models").mkdir()
    for name, folder in (("base", models["base"]), ("math", models["one"]), ("code-lora", adapter)):
        (tmp_path / "models" / name).symlink_to(folder)
    blocks = documented("yaml")
    assert len(blocks) == 2
    (tmp_path / "merge.yaml").write_text(blocks[position], "utf-8")
    assert call("merge.yaml", "-o", "merged").returncode == 0
    assert call("merge.yaml", "-o", "other", "--density", "0.5", "--set", "scaling=0.8").returncode == 0
    assert {tensor.dtype for tensor in read(tmp_path / "merged").values()} == {torch.bfloat16}
    operator = read_json(tmp_path / "other" / RECORD_NAME)["recipe"]["operator"]
    assert (operator["name"], operator["density"], operator["scaling"]) == ("ties", 0.5, 0.8)


# ---- loss gaps -------------------------------------------------------------------------------------------------------


def mean_loss(folder: Path, rows: list[dict[str, Any]]) -> float:
    """Mean cross-entropy over completion tokens, from the full logits of one example at a time, in float64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        prompt = f"<user> {row['prompt']} <end> <assistant> "
        ids = tokenizer.encode(prompt + f"{row['completion']} <end>")
        start = len(tokenizer.encode(prompt))
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double()
        for position in range(start, len(ids)):
            total -= float(torch.log_softmax(logits[position - 1], 0)[ids[position]])
            count += 1
    return total / count


def write_rows(folder: Path, names: tuple[str, ...]) -> dict[str, list[dict[str, Any]]]:
    rows = {name: make_rows(task, 6) for name, task in zip(names, ("letters", "numbers", "words"), strict=True)}
    for name, own in rows.items():
        kept = [{"prompt": row["prompt"], "completion": row["completion"]} for row in own]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in kept) + "\n", "utf-8")
    return rows


def test_merge_metis_weights_are_the_softmax_of_gaps_measured_independently(
    call: Call, models: dict[str, Path], adapter: Path, tmp_path: Path
) -> None:
    paths = {"one": models["one"], "two": models["two"], "lora": adapter}
    rows = write_rows(tmp_path, tuple(paths))
    validation = [part for name in paths for part in ("--validation", f"{name}={name}.jsonl")]
    flags = ("--operator", "metis", "--preset", "paper", "--temperature", "0.5", "--device", "cpu", "--json")
    done = call(*paths.values(), "--base", models["base"], "-o", "out", *flags, *validation)
    assert (done.returncode, done.stderr) == (0, "")
    # the adapter's model as PEFT merges it
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(str(models["base"])), str(adapter))
        tuned.merge_and_unload().save_pretrained(str(tmp_path / "tuned"))
    for file in models["base"].glob("tokenizer*"):
        (tmp_path / "tuned" / file.name).write_bytes(file.read_bytes())
    folders = paths | {"lora": tmp_path / "tuned"}
    gaps = {name: mean_loss(models["base"], own) - mean_loss(folders[name], own) for name, own in rows.items()}
    raised = {name: math.exp(gap / 0.5) for name, gap in gaps.items()}
    record = read_json(tmp_path / "out" / RECORD_NAME)
    assert record["loss_gaps"] == pytest.approx(gaps, abs=1e-5)
    assert min(abs(gap) for gap in gaps.values()) > 1e-3  # not all alike
    expected = {name: value / sum(raised.values()) for name, value in raised.items()}
    assert json.loads(done.stdout)["weights"] == pytest.approx(expected, abs=1e-5)
    assert record["effective_tasks"] == pytest.approx(gap_weights.effective_tasks(list(expected.values())), abs=1e-4)
    assert record["temperature"] == 0.5


def test_merge_metis_with_given_weights_needs_no_validation_data(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    flags = ("--operator", "metis", "--weights", "3,1", "--mask-threshold", "0", "--json")
    done = call(models["one"], models["two"], "--base", models["base"], "-o", "out", *flags)
    assert json.loads(done.stdout)["weights"] == {"one": 0.75, "two": 0.25}
    assert close(read(tmp_path / "out"), combined(models, {"one": 0.75, "two": 0.25}))


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(call: Call, tmp_path: Path, *arguments: object) -> str:
    """The one message of a call that is refused and writes nothing."""
    before = files(tmp_path)
    done = call(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert files(tmp_path) == before
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{one} {two} -o out", "--base is missing: the model that the others were trained from"),
        ("--base {base} -o out", "MODELS"),
        ("{one} --base {base}", "--output"),
        ("{one} --base {base} -o out --operator tise", "operator: unknown operator 'tise'; did you mean 'ties'?"),
        ("{one} --base {base} -o out --set scalng=1", "operator.scalng: unknown key; did you mean 'scaling'?"),
        ("{one} --base {base} -o out --set scaling", "--set scaling: not of the form key=value"),
        ("{one} --base {base} -o out --set scaling=[", "--set scaling=[: the value is not valid YAML"),
        ("{one} --base {base} -o out --density 0.5", "operator.density: unknown key"),
        ("{one} --base {base} -o out --operator ties --density 0", "operator.density: Input should be greater than 0"),
        ("{one} --base {base} -o out --operator ties --density 1.5", "operator.density: Input should be less than or"),
        (
            "{one} --base {base} -o out --operator ties --trim-scope row",
            "operator.trim_scope: Input should be 'tensor'",
        ),
        ("{one} {two} --base {base} -o out --weights 1", "--weights has 1 values for 2 models"),
        ("{one} {two} --base {base} -o out --weights 1,x", "--weights 1,x: not numbers with commas between them"),
        ("{one} {two} --base {base} -o out --weights 1,nan", "experts.two.weight: Input should be a finite number"),
        ("{one} {two} --base {base} -o out --weights 0,0", "experts: every weight is 0, so nothing would be merged"),
        (
            "{one} {two} --base {base} -o out --operator mean --weights 0,0",
            "experts: the weights sum to 0; mean divides by their sum",
        ),
        (
            "{one} {two} --base {base} -o out --operator mean --weights 1,-1",
            "experts.two.weight: -1 is negative, and mean takes shares",
        ),
        (
            "{one} --base {base} -o out --validation four=x.jsonl",
            "--validation four=…: no model of that name; there are: one",
        ),
        ("{one} --base {base} -o out --validation one", "--validation one: not of the form name=value"),
        (
            "{one} --base {base} -o out --validation one=x.jsonl",
            "experts.one.validation: no such file or folder: x.jso",
        ),
        (
            "{one} {two} --base {base} -o out --operator metis",
            "experts.one.validation: metis weighs by loss gaps: give each expert validation data, or each a weight",
        ),
        (
            "{one} {two} --base {base} -o out --operator metis --validation one={file}",
            "experts.two.validation: metis weighs by loss gaps",
        ),
        ("{one} --base ./nowhere -o out", "base: no such file or folder: ./nowhere"),
        ("./nowhere --base {base} -o out", "experts.nowhere.path: no such file or folder: ./nowhere"),
        ("{one} --base {file} -o out", "is a file; give a model folder, a .gguf file or a Hub id"),
        ("{file} --base {base} -o out", "is a file; give a model folder, a .gguf file or a Hub id"),
        ("{one} --base {empty} -o out", "has no config.json"),
        ("{empty} --base {base} -o out", "a model folder without weights (no *.safetensors file)"),
        ("nobody/nothing --base {base} -o out", "'nobody/nothing' is no local folder, and it could not be loaded"),
        ("{one} --base {base} -o {one}", "is, or holds, one of the models to merge"),
        ("{one} --base {base} -o {base} --force", "is, or holds, one of the models to merge"),
        ("{one} --base {base} -o {above} --force", "is, or holds, one of the models to merge"),
        ("{one} --base {base} -o {empty}", "is there already; --force replaces it"),
        ("{one} --base {base} -o {empty} --force", "--force replaces merged models only"),
        ("{one} --base {base} -o {file}/out", "nothing was left under"),
        ("{one} --base {base} -o out --dtype int4", "dtype: Input should be 'float32', 'bfloat16' or 'float16'"),
        ("{one} --base {base} -o out --shard-size big", "shard_size: "),
        ("{one} --base {base} -o out --shard-size 0", "shard_size: Input should be greater than or equal to 1"),
        ("{one} --base {base} -o out --threads 0", "--threads"),
        ("{one} --base {base} -o out --seed -1", "--seed"),
        ("{one} --base {base} -o out --device tpu", "--device tpu: there are auto, cpu, cuda, cuda:<number>"),
        ("{recipe} {one} -o out", "give either a recipe file, with key=value in --set, or --base and models"),
        ("{recipe} --base {base} -o out", "give either a recipe file"),
        ("{recipe} --operator ties -o out", "give either a recipe file"),
        ("{recipe} --weights 1,1 -o out", "give either a recipe file"),
        ("{recipe} --validation one=x -o out", "give either a recipe file"),
        ("{recipe} {recipe} -o out", "give either a recipe file"),
        ("{recipe} -o out --density 2", "command line: operator.density: Input should be less than or equal to 1"),
        ("{recipe} -o out --set densty=0.5", "command line: operator.densty: unknown key; did you mean 'density'?"),
        ("nowhere.yaml -o out", "nowhere.yaml: no such recipe file"),
    ],
)
def test_merge_refuses_bad_input_with_one_message_and_writes_nothing(
    call: Call, models: dict[str, Path], tmp_path: Path, arguments: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    recipe = write_recipe(tmp_path, models, operator={"name": "ties", "density": 0.3})
    places = {"empty": tmp_path / "empty", "file": tmp_path / "file.jsonl", "recipe": recipe}
    places |= {"above": models["one"].parent}
    shown = refused(call, tmp_path, *arguments.format(**models, **places).split())
    assert message in shown


def test_merge_refuses_a_model_of_another_shape_and_names_the_tensor(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    wide = {name: torch.cat([tensor, tensor]) for name, tensor in read(models["one"]).items()}
    write_like(models["base"], tmp_path / "wide", wide)
    shown = refused(call, tmp_path, models["one"], "wide", "--base", models["base"], "-o", "out")
    assert "model 'wide'" in shown and "has shape (" in shown and shown.count("\n") == 1
    write_rows(tmp_path, ("one", "wide", "spare"))
    gaps = ("--operator", "metis", "--validation", "one=one.jsonl", "--validation", "wide=wide.jsonl")
    shown = refused(call, tmp_path, models["one"], "wide", "--base", models["base"], "-o", "out", *gaps)
    assert "model 'wide'" in shown and "has shape (" in shown and shown.count("\n") == 1


def test_merge_refuses_validation_data_that_cannot_be_used(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n', "utf-8")
    (tmp_path / "none.jsonl").write_text("", "utf-8")
    for file in ("bad.jsonl", "none.jsonl"):
        gaps = ("--operator", "metis", "--validation", f"one={file}", "--validation", f"two={file}")
        shown = refused(call, tmp_path, models["one"], models["two"], "--base", models["base"], "-o", "out", *gaps)
        assert "task 'one'" in shown or "one" in shown
        assert shown.count("\n") == 1


def test_merge_refuses_a_merge_that_keeps_nothing_and_leaves_nothing(
    call: Call, models: dict[str, Path], tmp_path: Path
) -> None:
    flags = ("--operator", "metis", "--weights", "1,1", "--mask-threshold", "1000000")
    shown = refused(call, tmp_path, models["one"], models["two"], "--base", models["base"], "-o", "out", *flags)
    assert "the operator's mask keeps no coordinate at all" in shown


def test_merge_refuses_an_override_that_fits_no_tensor(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, models, overrides={"*.nothing.*": {"scaling": 1.0}})
    assert "the pattern '*.nothing.*' fits no tensor" in refused(call, tmp_path, recipe, "-o", "out")


def write_broken(models: dict[str, Path], folder: Path, name: str) -> None:
    broken = read(models["one"])
    broken[name][3] = float("nan")
    write_like(models["base"], folder, broken)


def test_merge_refuses_nan_and_names_model_and_tensor(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    write_broken(models, tmp_path / "broken", "model.norm.weight")
    shown = refused(call, tmp_path, "broken", "--base", models["base"], "-o", "out")
    assert "'broken'" in shown and "model.norm.weight" in shown and "NaN" in shown


def test_merge_allow_nonfinite_keeps_nan_where_it_was(call: Call, models: dict[str, Path], tmp_path: Path) -> None:
    write_broken(models, tmp_path / "broken", "model.norm.weight")
    assert call("broken", "--base", models["base"], "-o", "out", "--allow-nonfinite").returncode == 0
    assert {name: int(tensor.isnan().sum()) for name, tensor in read(tmp_path / "out").items()} == {
        name: int(name == "model.norm.weight") for name in read(models["base"])
    }
