"""Bad input: one clear ManyshotError that names the place, what was found and what is allowed. Never a traceback."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from conftest import TASKS
from manyshot import rundir
from manyshot.errors import DataError, ManyshotError, ModelError, RecipeError, RunFolderError
from manyshot.progress import Event
from manyshot.recipe_file import load_recipe
from manyshot.runner import check_inputs, run
from run_helpers import Runs, load_tensors, phases, unlike

PAIR = TASKS[:2]
ONE_STEP = ("protocol.rounds=1", "protocol.local_steps=1")


@pytest.fixture(scope="module")
def runs(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(base_folder, tmp_path_factory.mktemp("bad"), tasks=PAIR)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def message_of(kind: type[ManyshotError], runs: Runs, *overrides: str) -> str:
    """The message of a run that must fail before its folder is made."""
    folder = runs.new_folder()
    with pytest.raises(kind) as caught:
        run(runs.recipe(*overrides), folder)
    assert not folder.exists()
    return str(caught.value)


# ---- data ------------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "a b c", "completion": "a", "choices": ["a", "z"], "answer": 0}


def rows_text(count: int, **changes: Any) -> bytes:
    """Good rows, the third of them with changes; None takes a column away."""
    rows = [dict(GOOD) for _ in range(count)]
    rows[2] = {key: value for key, value in (GOOD | changes).items() if value is not None}
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


BAD_DATA: dict[str, tuple[str, bytes, tuple[str, ...]]] = {
    "empty": ("validation", b"", ("is empty",)),
    "blank": ("test", b"\n\n", ("is empty",)),
    "few": ("train", rows_text(3), ("3 training examples are fewer than one batch", "local_update.batch_size is 4")),
    "utf8": ("train", rows_text(3) + b'{"prompt": "\xff"}\n', ("line 4: not UTF-8", "0xff")),
    "cut": ("train", rows_text(9)[:-20], ("line 9: not valid JSON", "is the line cut off?")),
    "list": ("train", rows_text(3) + b"[1]\n", ("line 4: expected an object with columns, found list",)),
    "columns": ("train", rows_text(9, prompt=None), ("train row 3: no usable columns", "answer, choices, completion")),
    "answer": ("test", rows_text(6, answer=2), ("test row 3: 'answer' must be an index into the 2 choices, found 2",)),
    "negative": ("test", rows_text(6, answer=-1), ("test row 3", "2 choices, found -1")),
    "letter": ("test", rows_text(6, answer="A"), ("test row 3", "2 choices, found 'A'")),
    "choices": ("test", rows_text(6, choices=None), ("test row 3: metric choice_accuracy needs 'choices' and",)),
    "number": ("test", rows_text(6, choices=5), ("test row 3: 'choices' must be a list, found int",)),
    "long": ("train", rows_text(9, prompt="a " * 40), ("train row 3: no token left to count", "cut to max_length 32")),
    "choice": ("test", rows_text(6, prompt="a " * 40), ("test row 3: no token left to count",)),
}


@pytest.mark.parametrize("name", BAD_DATA)
def test_data_that_cannot_be_used_names_task_and_place(runs: Runs, tmp_path: Path, name: str) -> None:
    split, content, parts = BAD_DATA[name]
    file = tmp_path / f"own.{split}.jsonl"
    file.write_bytes(content)
    message = message_of(DataError, runs, f"tasks.numbers.{split}={file}", "protocol.local_steps=8")
    for part in ("task 'numbers'", *parts):
        assert part in message
    assert "letters" not in message and len(message.splitlines()) == 1


def test_data_problems_of_all_tasks_come_at_once(runs: Runs, tmp_path: Path) -> None:
    for task, content in (("letters", b""), ("numbers", rows_text(3))):
        (tmp_path / f"{task}.jsonl").write_bytes(content)
    overrides = [f"tasks.{task}.train={tmp_path / f'{task}.jsonl'}" for task in PAIR]
    first, second = message_of(DataError, runs, *overrides).splitlines()
    assert "task 'letters'" in first and "is empty" in first
    assert "task 'numbers'" in second and "fewer than one batch" in second


def test_text_problems_of_all_tasks_come_at_once(runs: Runs) -> None:
    first, second = message_of(DataError, runs, "local_update.max_length=4").splitlines()
    assert first.startswith("task 'letters', train row") and second.startswith("task 'numbers', train row")
    assert "raise local_update.max_length" in first


def test_a_split_too_small_to_cut_is_refused(runs: Runs, tmp_path: Path) -> None:
    file = tmp_path / "few.jsonl"
    file.write_bytes(rows_text(4))
    overrides = ("tasks.letters={}", f"tasks.letters.data={file}", "local_update.batch_size=1")
    assert "task 'letters': the validation split is empty" in message_of(DataError, runs, *overrides)


def test_missing_files_are_all_named_with_their_keys(runs: Runs) -> None:
    with pytest.raises(RecipeError) as caught:
        runs.recipe("tasks.letters.train=nowhere/a.jsonl", "tasks.numbers.test=./b.csv", "model=./no_model")
    text = str(caught.value)
    for key, value in (
        ("tasks.letters.train", "nowhere/a.jsonl"),
        ("tasks.numbers.test", "./b.csv"),
        ("model", "./no_model"),
    ):
        assert f"{key}: no such file or folder: {value}" in text
    assert len(text.splitlines()) == 3


def test_data_on_the_hub_without_a_network_says_what_to_do(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    overrides = ("tasks.letters={}", "tasks.letters.data=nobody/nothing")
    message = message_of(DataError, runs, *overrides)
    assert "task 'letters': data 'nobody/nothing' is no local file and could not be loaded from the Hub" in message
    assert "give a local file" in message


def test_unknown_metric_lists_what_there_is(runs: Runs) -> None:
    message = message_of(DataError, runs, "tasks.numbers.metric=exact_mach")
    assert "task 'numbers': unknown metric 'exact_mach'; did you mean 'exact_match'? there are: " in message
    assert "refusal" in message


def test_messages_without_a_chat_template_are_refused_before_training(runs: Runs, base_folder: Path) -> None:
    base, data = copy_base(runs, base_folder, "no_template"), runs.folder / "messages.jsonl"
    (base / "chat_template.jinja").unlink()
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "a"}]
    data.write_text((json.dumps({"messages": turns}) + "\n") * 8, "utf-8")
    overrides = (f"model={base}", f"tasks.letters.train={data}")
    message = message_of(DataError, runs, *overrides)
    assert "task 'letters', train row 1: has chat messages, but the model's tokenizer has no chat template" in message


# ---- recipe ----------------------------------------------------------------------------------------------------------

BAD_RECIPES: dict[str, tuple[str, tuple[str, ...]]] = {
    "operator": (
        "operator=metsi",
        ("operator: unknown operator 'metsi'; did you mean 'metis'? there are: consensus_ta,",),
    ),
    "parameter": ("operator.temprature=1", ("operator.temprature: unknown key; did you mean 'temperature'?",)),
    "cold": ("operator.temperature=0", ("operator.temperature", "greater than 0", "found 0")),
    "colder": ("operator.temperature=-1.5", ("operator.temperature", "greater than 0", "found -1.5")),
    "agreement": ("operator.min_agreement=3", ("operator.min_agreement: 3 tasks can never agree among 2",)),
    "starved": ("protocol.rounds=9", ("protocol", "local_steps is 4 for 9 rounds", "at least one step per task")),
    "none": ("protocol.rounds=0", ("protocol.rounds", "greater than or equal to 1", "found 0")),
    "batch": ("local_update.micro_batch_size=3", ("batch_size 4 is not a multiple of micro_batch_size 3",)),
    "key": ("local_update.lerning_rate=1", ("unknown key; did you mean 'learning_rate'?",)),
    "scalings": ("operator.scaling=[1.0, 1.0, 1.0]", ("operator.scaling", "has 3 values for 2 rounds")),
}


@pytest.mark.parametrize("name", BAD_RECIPES)
def test_recipe_that_cannot_be_meant_names_key_value_and_what_is_allowed(runs: Runs, name: str) -> None:
    override, parts = BAD_RECIPES[name]
    with pytest.raises(RecipeError) as caught:
        runs.recipe(override)
    for part in parts:
        assert part in str(caught.value)


def test_recipe_with_one_task_is_refused(base_folder: Path, tmp_path: Path) -> None:
    alone = Runs(base_folder, tmp_path, tasks=TASKS[:1])
    with pytest.raises(RecipeError, match="tasks: only one task; merging needs at least two"):
        alone.recipe("operator=mean")


def test_recipe_with_two_tasks_of_one_name_is_refused_with_both_lines(runs: Runs, tmp_path: Path) -> None:
    text = yaml.safe_dump(runs.mapping, sort_keys=False)
    task = yaml.safe_dump({"letters": runs.mapping["tasks"]["letters"]})
    indented = "".join(f"  {line}\n" for line in task.splitlines())
    text = text.replace("tasks:\n", f"tasks:\n{indented}")
    file = tmp_path / "recipe.yaml"
    file.write_text(text, "utf-8")
    lines = [number for number, line in enumerate(text.splitlines(), start=1) if line == "  letters:"]
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    expected = f"{file}:{lines[1]}: tasks.letters: two tasks have the same name; first on line {lines[0]}"
    assert expected in str(caught.value)


@pytest.mark.parametrize("name", ["merged", "carried_adapter", "scores.json", "task_vector.safetensors", "a.partial"])
def test_task_named_like_a_file_of_the_run_is_refused(runs: Runs, name: str) -> None:
    mapping = runs.mapping | {"tasks": runs.mapping["tasks"] | {name: runs.mapping["tasks"]["letters"]}}
    with pytest.raises(RecipeError, match="this name is taken by a f"):
        Runs.recipe(_with_mapping(runs, mapping))


def test_task_named_much_like_a_file_of_the_run_is_fine(runs: Runs) -> None:
    names = ("merged_data", "scores", "v1.5")
    mapping = runs.mapping | {"tasks": dict.fromkeys(names, runs.mapping["tasks"]["letters"])}
    assert tuple(Runs.recipe(_with_mapping(runs, mapping)).tasks) == names


def _with_mapping(runs: Runs, mapping: dict[str, Any]) -> Runs:
    other = Runs.__new__(Runs)
    other.mapping = mapping
    return other


# ---- target modules --------------------------------------------------------------------------------------------------

BAD_TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "unknown": ("target_modules=[q_prj]", ("no module 'q_prj'; did you mean 'q_proj'? there are: ", "down_proj")),
    "block": ("target_modules=[q_proj, self_attn]", ("'self_attn' is no linear layer, but a LlamaAttention",)),
    "embedding": ("target_modules=[embed_tokens]", ("'embed_tokens' is no linear layer, but a Embedding",)),
    "tied": ("target_modules=[lm_head]", ("tensor 'lm_head.weight' would be trained, but the checkpoint has none",)),
    "rank": ("rank_pattern={q_prj: 3}", ("rank_pattern: 'q_prj' matches no adapted module; did you mean 'q_proj'?",)),
    "alpha": ("alpha_pattern={down_proj: 3}", ("alpha_pattern: 'down_proj' matches no adapted module",)),
    "regex": ("rank_pattern={'q(': 3}", ("rank_pattern: 'q(' matches no adapted module",)),
}


@pytest.mark.parametrize("name", BAD_TARGETS)
def test_target_modules_that_cannot_be_trained_are_refused_before_the_run(runs: Runs, name: str) -> None:
    override, parts = BAD_TARGETS[name]
    message = message_of(ModelError, runs, f"local_update.{override}")
    for part in parts:
        assert part in message


# ---- models ----------------------------------------------------------------------------------------------------------


def copy_base(runs: Runs, base: Path, name: str) -> Path:
    folder = runs.folder / name
    shutil.copytree(base, folder, dirs_exist_ok=True)
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


def _without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _without_shard(folder: Path) -> None:
    tensors = load_tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    save_file({n: tensors[n] for n in names[::2]}, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}), "utf-8")


def _without_tensor(folder: Path) -> None:
    tensors = load_tensors(folder)
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _other_shape(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=50)


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{'model_type'", "utf-8")


def _unknown_type(folder: Path) -> None:
    edit_json(folder / "config.json", model_type="telepathy")


def _no_language_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}), "utf-8")


def _without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", "utf-8")


def _nameless_ends(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    kept = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({k: v for k, v in kept.items() if not k.endswith("_token")}), "utf-8")
    for extra in folder.glob("special_tokens_map.json"):
        extra.unlink()


BAD_MODELS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "weights": (_without_weights, ("a model folder without weights (no *.safetensors file)",)),
    "pickles": (_only_pickles, ("holds pytorch_model.bin but no safetensors", "save_pretrained(new_folder)")),
    "config": (_without_config, ("has no config.json",)),
    "shard": (_without_shard, ("model-00002-of-00002.safetensors", "is missing from")),
    "cut": (_cut, ("model.safetensors: not a readable safetensors file",)),
    "shape": (_other_shape, ("mlp.", "has shape (", "its config asks for (")),
    "json": (_no_json, ("config.json",)),
    "type": (_unknown_type, ("telepathy",)),
    "kind": (_no_language_model, ("no causal language model can be made from its config.json",)),
    "tokenizer": (_without_tokenizer, ("its tokenizer cannot be loaded",)),
    "broken": (_broken_tokenizer, ("its tokenizer cannot be loaded",)),
    "ends": (_nameless_ends, ("its tokenizer has neither a padding token nor an end token",)),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_model_that_cannot_be_used_is_refused_before_the_run(runs: Runs, base_folder: Path, name: str) -> None:
    spoil, parts = BAD_MODELS[name]
    folder = copy_base(runs, base_folder, f"model_{name}")
    spoil(folder)
    message = message_of(ModelError, runs, f"model={folder}")
    for part in (str(folder), *parts):
        assert part in message


def test_model_that_lacks_a_tensor_is_refused_when_it_is_first_loaded(runs: Runs, base_folder: Path) -> None:
    model, folder = copy_base(runs, base_folder, "model_tensor"), runs.new_folder()
    _without_tensor(model)
    with pytest.raises(ModelError, match=r"weights are missing for 1 tensors, among them model\.norm\.weight"):
        run(runs.recipe(f"model={model}"), folder)
    assert not list(folder.glob("round_001/*"))


def test_model_whose_tokenizer_is_another_models_is_refused(runs: Runs, base_folder: Path) -> None:
    folder = copy_base(runs, base_folder, "small_vocabulary")
    tensors = load_tensors(folder)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:10].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", vocab_size=10)
    message = message_of(DataError, runs, f"model={folder}")
    assert "the model's embedding has 10 rows" in message and "task 'letters'" in message


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_model_on_the_hub_without_a_network_says_what_to_do(runs: Runs, name: str) -> None:
    message = message_of(ModelError, runs, f"model={name}")
    assert f"model: '{name}' is no local folder, and it could not be loaded from the Hub" in message
    assert "give a local folder" in message


def test_unknown_demo_model_lists_what_there_is(runs: Runs) -> None:
    assert "there is demo:smollm2-135m-instruct" in message_of(ModelError, runs, "model=demo:llama")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_device_that_is_not_there_is_refused(runs: Runs) -> None:
    assert "this machine has no CUDA device" in message_of(ModelError, runs, "local_update.device=cuda:1")


def test_device_and_type_that_do_not_exist_are_refused(runs: Runs) -> None:
    for device in ("gpu", "cuda:", "cuda:one", "meta"):
        message = message_of(ModelError, runs, f"local_update.device='{device}'")
        assert (
            f"local_update.device: unknown device '{device}'; there are auto, cpu, cuda, cuda:<number>, mps" in message
        )
    with pytest.raises(RecipeError, match=r"local_update\.dtype"):
        runs.recipe("local_update.dtype=int8")


def test_check_inputs_accepts_the_good_recipe(runs: Runs) -> None:
    inputs = check_inputs(runs.recipe())
    assert [task.name for task in inputs.tasks] == list(PAIR)
    assert inputs.changed_entries == 2 * (32 * 32 + 16 * 32 + 16 * 32 + 32 * 32)  # q, k, v, o of two layers


# ---- the disk --------------------------------------------------------------------------------------------------------


def test_disk_too_small_is_refused_before_the_run(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    message = message_of(RunFolderError, runs)
    assert "what 2 rounds will write needs 0.00 GB, the disk has 0.00 GB free" in message


def test_disk_too_small_for_the_rounds_left_is_all_that_counts(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    done = runs.get(*ONE_STEP).folder
    folder = runs.new_folder()
    shutil.copytree(done, folder, symlinks=True)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
    result = run(runs.recipe(*ONE_STEP), folder, resume=True)
    assert result.scores == runs.get(*ONE_STEP).scores  # nothing is left to write but what small files hold


def full_pwrite(file: int, data: bytes, offset: int, write: Any = os.pwrite) -> int:
    if bytes(data[:1]) == b"{":  # who holds the lock
        return int(write(file, data, offset))
    raise OSError(errno.ENOSPC, "No space left on device")


class FullDisk:
    """A file on a disk that is full after ten more bytes."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def write(self, blob: Any) -> int:
        self.stream.write(bytes(blob)[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()


def test_disk_that_fills_up_names_the_file_and_the_run_can_go_on(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Full at one file after another, in the order in which a run writes them, each time going on where it was."""
    names = [
        *("recipe.yaml", "environment.json", "losses.json", "scores.json", "factors.json", "local_update.json"),
        *("loss_gap.json", "guards.json", "task_vector.safetensors", "merge.json", "README.md", "DONE.json"),
    ]
    done, opened = runs.get(*ONE_STEP).folder, open
    folder = runs.new_folder()
    for name in names:

        def full_open(path: Any, mode: str = "r", *args: Any, full: str = f"{name}.partial", **options: Any) -> Any:
            stream = opened(path, mode, *args, **options)
            return FullDisk(stream) if "w" in mode and Path(path).name == full else stream

        with monkeypatch.context() as patch:
            patch.setattr(rundir, "open", full_open, raising=False)
            if name == "task_vector.safetensors":  # written at positions, not as a stream
                patch.setattr(os, "pwrite", full_pwrite)
            with pytest.raises(RunFolderError) as caught:
                run(runs.recipe(*ONE_STEP), folder, resume=True)
        message = str(caught.value)
        assert f"/{name}: No space left on device" in message and "--resume goes on" in message
        assert isinstance(caught.value.__cause__, OSError)
        assert (
            not list(folder.rglob("*.partial*")) and not list(folder.rglob(name))[1 if name == "scores.json" else 0 :]
        )
    run(runs.recipe(*ONE_STEP), folder, resume=True)
    assert unlike(done, folder) == []


def test_disk_that_fills_up_inside_a_library_is_a_clear_error_too(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors has an error of its own for a failed write; the merged model's shards are written by open()."""
    from peft import PeftModel
    from safetensors import SafetensorError

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    folder = runs.new_folder()
    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", full)
        with pytest.raises(RunFolderError, match=rf"{folder}: .*No space left on device .*--resume goes on"):
            run(runs.recipe(*ONE_STEP), folder)
    run(runs.recipe(*ONE_STEP), folder, resume=True)
    assert unlike(runs.get(*ONE_STEP).folder, folder) == []


def test_output_that_cannot_be_made_names_it(runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(RunFolderError, match=rf"{tmp_path / 'file'}"):
        run(runs.recipe(*ONE_STEP), tmp_path / "file" / "run")


def test_listener_that_lost_its_pipe_is_no_disk_error(runs: Runs) -> None:
    def gone(event: Event) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(runs.recipe(*ONE_STEP), runs.new_folder(), listener=gone)


# ---- training --------------------------------------------------------------------------------------------------------


def test_training_that_diverges_names_round_task_and_step_and_keeps_what_was_done(runs: Runs) -> None:
    folder = runs.new_folder()
    with pytest.raises(ManyshotError, match=r"round 1, task 'letters', step 2: the training loss is nan; lower"):
        run(runs.recipe("local_update.learning_rate=1e30", "local_update.warmup_steps=0"), folder)
    assert (folder / "round_000" / "scores.json").is_file()
    assert not list(folder.rglob("adapter*")) and not list(folder.rglob("*.partial*"))


def test_interrupt_in_training_leaves_a_run_that_goes_on(runs: Runs) -> None:
    def interrupt(event: Event) -> None:
        if (event.kind, event.phase, event.task) == ("advance", "local_update", "numbers"):
            raise KeyboardInterrupt

    folder = runs.new_folder()
    with pytest.raises(KeyboardInterrupt):
        run(runs.recipe(*ONE_STEP), folder, listener=interrupt)
    assert phases(folder, "local_update") == [(1, "letters")]
    run(runs.recipe(*ONE_STEP), folder, resume=True)
    assert phases(folder, "local_update") == [(1, "letters"), (1, "numbers")]
    assert unlike(runs.get(*ONE_STEP).folder, folder) == []


def test_mask_that_keeps_nothing_says_which_knob_to_turn(runs: Runs) -> None:
    with pytest.raises(ManyshotError, match=r"keeps no coordinate at all.*raise operator\.temperature; otherwise"):
        run(runs.recipe(*ONE_STEP, "operator.mask_threshold=1e9"), runs.new_folder())
