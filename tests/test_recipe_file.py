"""Recipe files: every problem at once, each with file, line and key; and back to YAML without a loss."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyshot.errors import RecipeError
from manyshot.recipe import Recipe
from manyshot.recipe_file import load_recipe, recipe_from_mapping, to_yaml

GOOD = """\
model: ./model
tasks:
  math:
    train: math.jsonl
  safety:
    train: safety.jsonl
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    for name in ("math", "safety"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    return tmp_path


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    (folder / "recipe.yaml").write_text(text, "utf-8")
    return load_recipe(folder / "recipe.yaml", overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the one RecipeError, with the file's path cut to its name."""
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(f"{folder}/", "").split("\n")


# ---- what is accepted ------------------------------------------------------------------------------------------------


def test_load_recipe_sees_paths_from_the_recipes_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe = load(folder, GOOD)
    assert recipe.model == str(folder / "model")
    assert recipe.tasks["math"].train == str(folder / "math.jsonl")
    assert list(recipe.tasks) == ["math", "safety"]


def test_load_recipe_keeps_task_order_of_the_file(folder: Path) -> None:
    text = "model: ./model\ntasks:\n  safety: {train: safety.jsonl}\n  math: {train: math.jsonl}\n"
    assert list(load(folder, text).tasks) == ["safety", "math"]


def test_load_recipe_applies_overrides_in_order(folder: Path) -> None:
    overrides = (
        "protocol.rounds=3",
        "protocol.rounds=4",
        "operator=mean",
        "tasks.math.metric=refusal",
        "local_update.learning_rate=3e-4",
        "local_update.target_modules=[q_proj]",
        "tasks.third={data: 'demo:math'}",
    )
    recipe = load(folder, GOOD, *overrides)
    assert recipe.protocol.rounds == 4
    assert recipe.method.name == "mean"
    assert recipe.tasks["math"].metric == "refusal"
    assert recipe.local_update.learning_rate == 3e-4
    assert recipe.local_update.target_modules == ("q_proj",)
    assert list(recipe.tasks) == ["math", "safety", "third"]


def test_load_recipe_overrides_reach_into_the_operator_that_is_there_unasked(folder: Path) -> None:
    text = "".join(line + "\n" for line in GOOD.splitlines() if not line.startswith("operator"))
    assert "operator" not in text
    recipe = load(folder, text, "operator.gap=relative")
    assert (recipe.method.name, recipe.operator.gap) == ("metis", "relative")
    assert load(folder, text, "operator.name=ties").method.name == "ties"


def test_load_recipe_overrides_reach_into_a_short_operator(folder: Path) -> None:
    recipe = load(folder, GOOD + "operator: metis\n", "operator.temperature=0.5")
    assert recipe.method.temperature == 0.5  # type: ignore[attr-defined]


def test_recipe_from_mapping_does_not_change_the_mapping(recipe_mapping: dict[str, Any]) -> None:
    before = copy.deepcopy(recipe_mapping)
    recipe = recipe_from_mapping(recipe_mapping, ["protocol.rounds=1", "tasks.letters.metric=exact_match"])
    assert recipe.protocol.rounds == 1
    assert recipe_mapping == before


def test_to_yaml_round_trips_to_an_equal_recipe(folder: Path) -> None:
    text = GOOD + (
        "protocol: {rounds: 3, local_steps: 7}\n"
        "operator: {name: metis, scaling: [1.0, 0.5, 0.25], temperature: 1e-3}\n"
        "local_update: {trainer: {weight_decay: 0.1, optim_args: null}, rank_pattern: {q_proj: 4}}\n"
    )
    recipe = load(folder, text, 'tasks.math.system_prompt="Réponds: «yes»\\n# no"', 'tasks.math.columns={"prompt": q}')
    (folder / "resolved.yaml").write_text(to_yaml(recipe), "utf-8")
    again = load_recipe(folder / "resolved.yaml")
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)
    for default in ("learning_rate: 0.0003", "test_examples: 200", "mask_threshold: 0.3", "space: weights"):
        assert default in to_yaml(recipe)


SOURCES = """\
model: ./model
tasks:
  math:
    train:
      - {data: math.jsonl, where: {kind: [a, b], meta.level: 3}, examples: 5}
      - {data: owner/name, subset: main, split: train_sft, columns: {prompt: question}}
    validation: {data: safety.jsonl, where: {ok: true}}
    test: owner/name
    where: {kind: null}
    overlong: drop
  safety: {train: safety.jsonl}
"""


def test_load_recipe_reads_sources_and_resolves_their_paths(folder: Path, tmp_path: Path) -> None:
    recipe = load(folder, SOURCES)
    task = recipe.tasks["math"]
    first, second = task.sources("train")
    assert (first.data, second.data, second.split) == (str(folder / "math.jsonl"), "owner/name", "train_sft")
    assert first.where == {"kind": ("a", "b"), "meta.level": 3}
    assert (second.where, second.columns) == ({"kind": None}, {"prompt": "question"})
    assert [source.data for source in task.sources("validation")] == [str(folder / "safety.jsonl")]
    assert [source.data for source in task.sources("test")] == ["owner/name"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "resolved.yaml").write_text(to_yaml(recipe), "utf-8")
    assert load_recipe(tmp_path / "elsewhere" / "resolved.yaml") == recipe


def test_load_recipe_overrides_reach_into_a_source(folder: Path) -> None:
    recipe = load(folder, SOURCES, "tasks.math.validation.where.ok=[true, false]", "tasks.math.validation.examples=7")
    (source,) = recipe.tasks["math"].sources("validation")
    assert (source.where, source.examples) == ({"ok": (True, False)}, 7)


@settings(
    deadline=None,
    database=None,
    derandomize=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(st.text("aZ09_.-", max_size=8), min_size=2, max_size=4, unique=True),
    prompt=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=20),
    rate=st.floats(1e-9, 1, exclude_min=True),
    seed=st.integers(0, 2**40),
)
def test_to_yaml_round_trips_whatever_the_names_and_texts(
    tmp_path: Path, names: list[str], prompt: str | None, rate: float, seed: int
) -> None:
    tasks = {f"t{name}": {"data": "demo:math", "system_prompt": prompt} for name in names}
    tasks = {name: spec for name, spec in tasks.items() if not name.endswith((".partial", ".json", ".safetensors"))}
    raw = {"model": "owner/name", "tasks": {"on": {"data": "demo:math"}, "1": {"data": "demo:math"}, **tasks}}
    recipe = recipe_from_mapping(raw | {"local_update": {"learning_rate": rate}, "seed": seed})
    (tmp_path / "r.yaml").write_text(to_yaml(recipe), "utf-8")
    assert load_recipe(tmp_path / "r.yaml") == recipe


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("examples: 5", "exampels: 5", "5: tasks.math.train.0.exampels: unknown key; did you mean 'examples'?"),
        ("split: train_sft", "splits: x", "6: tasks.math.train.1.splits: unknown key; did you mean 'split'?"),
        ("{ok: true}}", "{ok: true}, wher: 1}", "7: tasks.math.validation.wher: unknown key; did you mean 'where'?"),
        ("examples: 5", "examples: 0", "5: tasks.math.train.0.examples: Input should be greater than or equal to 1"),
        ("data: math.jsonl, ", "", "5: tasks.math.train.0.data: Field required"),
        ("math.jsonl", "maths.jsonl", "5: tasks.math.train.0.data: no such file or folder: maths.jsonl"),
        ("safety.jsonl, where", "./nothing, where", "7: tasks.math.validation.data: no such file or folder: ./nothing"),
        ("[a, b]", "[]", "5: tasks.math.train.0.where.kind: give the value that rows must have, or a list"),
        ("kind: [a, b]", "kind: {a: b}", "5: tasks.math.train.0.where.kind: give the value that rows must have"),
        ("test: owner/name", "test: 3", "8: tasks.math.test: Input should be a valid string, found 3"),
        ("test: owner/name", "test: []", "8: tasks.math.test: "),
        ("overlong: drop", "overlong: dorp", "10: tasks.math.overlong: Input should be 'truncate' or 'drop'"),
    ],
)
def test_load_recipe_names_the_line_of_a_mistake_in_a_source(folder: Path, old: str, new: str, expected: str) -> None:
    assert old in SOURCES
    (found,) = problems(folder, SOURCES.replace(old, new))
    assert found.startswith(f"recipe.yaml:{expected}")


def test_load_recipe_names_an_unknown_key_with_file_line_and_suggestion(folder: Path) -> None:
    text = GOOD + "protocol:\n  rounds: 2\n  local_stepz: 10\n"
    assert problems(folder, text) == [
        "recipe.yaml:9: protocol.local_stepz: unknown key; did you mean 'local_steps'? there are: allocation, "
        "local_steps, on_failure, rounds"
    ]


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("protocal: {}\n", "recipe.yaml:7: protocal: unknown key; did you mean 'protocol'?"),
        ("operator: metiss\n", "recipe.yaml:7: operator: unknown operator 'metiss'; did you mean 'metis'?"),
        ("operator: {temperature: 1}\n", "recipe.yaml:7: operator: needs 'name'; there are: consensus_ta, dare,"),
        ("operator: {name: mean, scaling: 1}\n", "recipe.yaml:7: operator.scaling: unknown key"),
        ("operator: {name: metis, temprature: 1}\n", "recipe.yaml:7: operator.temprature: unknown key; did you mean"),
        ("operator:\n  name: metis\n  temperature: -1\n", "recipe.yaml:9: operator.temperature: Input should be great"),
        ("operator: {name: metis, temperature: .nan}\n", "recipe.yaml:7: operator.temperature: Input should be less"),
        ("operator: {name: metis, temperature: .inf}\n", "recipe.yaml:7: operator.temperature: Input should be less"),
        ("operator: {name: metis, scaling: [1, 2]}\n", "recipe.yaml:7: operator.scaling: has 2 values for 5 rounds"),
        (
            "local_update:\n  method: loar\n",
            "recipe.yaml:8: local_update.method: Input should be 'lora', 'full' or 'command'",
        ),
        ("local_update: 5\n", "recipe.yaml:7: local_update: "),
        ("merge:\n", "recipe.yaml:7: merge: "),
        ("seed: 1.5\n", "recipe.yaml:7: seed: Input should be a valid integer"),
        ("1: 2\n", "recipe.yaml: 1: Keys should be strings"),
    ],
)
def test_load_recipe_says_where_and_what(folder: Path, text: str, start: str) -> None:
    (line,) = problems(folder, GOOD + text)
    assert line.startswith(start)


def test_load_recipe_reports_every_problem_at_once(folder: Path) -> None:
    text = """\
model: ./nowhere
tasks:
  a: {train: gone.jsonl, metrik: x}
  b: {data: math.jsonl, train: safety.jsonl}
protocol: {rounds: 2, local_stepz: 3}
operator: {name: metis, scaling: [1, 2, 3], min_agreement: 9}
evaluation: {experts: false, post_hoc: true}
local_update: {batch_size: 5, micro_batch_size: 2}
seed: x
"""
    found = problems(folder, text)
    for start in (
        "recipe.yaml:1: model: no such file or folder: ./nowhere",
        "recipe.yaml:3: tasks.a.train: no such file or folder: gone.jsonl",
        "recipe.yaml:3: tasks.a.metrik: unknown key; did you mean 'metric'?",
        "recipe.yaml:4: tasks.b: give either 'data' or 'train'",
        "recipe.yaml:5: protocol.local_stepz: unknown key",
        "recipe.yaml:6: operator.scaling: has 3 values for 2 rounds",
        "recipe.yaml:6: operator.min_agreement: 9 tasks can never agree among 2",
        "recipe.yaml:7: evaluation.post_hoc: needs evaluation.experts: true",
        "recipe.yaml:8: local_update: batch_size 5 is not a multiple of micro_batch_size 2",
        "recipe.yaml:9: seed: Input should be a valid integer",
    ):
        assert sum(line.startswith(start) for line in found) == 1, start
    assert len(found) == 10


@pytest.mark.parametrize(
    "text",
    [
        # two values fit the two rounds that were meant; a default of five must not be held against them
        "protocol: {rounds: 2, local_stepz: 3}\noperator: {name: metis, scaling: [1, 2]}\n",
        "protocol: {rounds: two}\noperator: {name: metis, scaling: [1, 2]}\n",
        "protocol: {rounds: 60}\noperator: {name: metis, scaling: [1, 2]}\n",
        # a broken task is still a task: two can agree among two
        "tasks: {a: {data: 'demo:x', metrik: y}, b: {}}\noperator: {name: metis, min_agreement: 2}\n",
    ],
)
def test_load_recipe_invents_no_problem_from_a_default(folder: Path, text: str) -> None:
    found = problems(folder, text if text.startswith("tasks") else GOOD + text)
    assert not any("operator" in line for line in found)
    assert len(found) in (1, 3)


def test_load_recipe_names_the_command_line_for_overrides(folder: Path) -> None:
    assert problems(folder, GOOD, "protocol.roundz=2")[0].startswith("command line: protocol.roundz: unknown key")
    assert problems(folder, GOOD, "protocol.rounds=0")[0].startswith("command line: protocol.rounds: Input should be")
    assert problems(folder, GOOD, "rounds")[0] == "command line: 'rounds' is not of the form key.sub=value"
    assert problems(folder, GOOD, "=2")[0].startswith("command line: '=2' is not of the form")
    assert "is not a section" in problems(folder, GOOD, "model.x=2")[0]
    assert "not valid YAML" in problems(folder, GOOD, "seed=[1")[0]
    assert problems(folder, GOOD, "tasks.math.train=gone.jsonl") == [
        "command line: tasks.math.train: no such file or folder: gone.jsonl"
    ]


def test_load_recipe_refuses_two_tasks_of_one_name_and_keys_that_stand_twice(folder: Path) -> None:
    text = GOOD + "  math:\n    train: safety.jsonl\nseed: 1\nseed: 2\n"
    assert problems(folder, text) == [
        "recipe.yaml:7: tasks.math: two tasks have the same name; first on line 3",
        "recipe.yaml:10: seed: the same key twice; first on line 9",
    ]


def test_load_recipe_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: no such recipe file"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1\n", "recipe.yaml: not valid YAML: while parsing a flow sequence"),
        ("a: b: c\n", "recipe.yaml: not valid YAML: mapping values are not allowed here"),
        ("\tmodel: x\n", "recipe.yaml: not valid YAML: while scanning"),
        ("", "recipe.yaml: a recipe is a mapping of keys; found NoneType"),
        ("- a\n- b\n", "recipe.yaml: a recipe is a mapping of keys; found list"),
        ("just words\n", "recipe.yaml: a recipe is a mapping of keys; found str"),
        ("a: 1\n---\nb: 2\n", "recipe.yaml: not valid YAML: expected a single document"),
        ("seed: \x00\n", "recipe.yaml: not valid YAML: unacceptable character"),
    ],
)
def test_load_recipe_refuses_what_is_no_yaml_mapping(folder: Path, text: str, message: str) -> None:
    assert problems(folder, text)[0].startswith(message)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch pwned']", "!!python/name:os.system", "!include other.yaml"]
)
def test_load_recipe_refuses_yaml_tags(folder: Path, tag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    found = problems(folder, GOOD + f"seed: {tag}\n")
    assert "could not determine a constructor for the tag" in found[0]
    assert not (folder / "pwned").exists()


def test_load_recipe_refuses_bytes_that_are_no_text(folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(GOOD.encode() + b"seed: \xff\n")
    with pytest.raises(RecipeError, match=r"recipe\.yaml: not UTF-8 text"):
        load_recipe(folder / "recipe.yaml")


def test_load_recipe_refuses_an_alias_of_itself_and_a_billion_laughs(folder: Path) -> None:
    assert "an alias stands inside of what it names" in problems(folder, GOOD + "x: &a {b: *a}\n")[0]
    laughs = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 30))
    assert "its aliases stand for more than" in problems(folder, GOOD + "x0: &x0 [1]\n" + laughs)[0]


def test_load_recipe_takes_a_hub_id_and_refuses_a_path_that_is_not_there(folder: Path) -> None:
    assert load(folder, GOOD, "model=owner/name").model == "owner/name"
    assert load(folder, GOOD, "tasks.math={data: owner/name}").tasks["math"].data == "owner/name"
    for path in ("./x", "/x", "~/x", "a/b/c", "x.gguf"):
        assert problems(folder, GOOD, f"model={path}") == [f"command line: model: no such file or folder: {path}"]
