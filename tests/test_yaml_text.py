"""YAML from anyone: what would not end, not fit or not be plain values is an error, and nothing else reads YAML."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml

from manyshot.yaml_text import MAX_CHARACTERS, MAX_DEPTH, read_yaml

SOURCE = Path(__file__).parent.parent / "src" / "manyshot"


def message(text: str) -> str:
    began = time.process_time()
    with pytest.raises(yaml.YAMLError) as caught:
        read_yaml(text)
    assert time.process_time() - began < 2
    return str(caught.value)


def test_read_yaml_gives_what_safe_load_gives() -> None:
    text = "a: {b: [1, 2.5, true, null, x]}\nbase: &one {k: v}\nmore: {<<: *one, l: *one}\n"
    assert read_yaml(text) == yaml.safe_load(text)
    assert read_yaml("") is None and read_yaml("auto") == "auto"


@pytest.mark.parametrize("text", ["x: &x [*x]", "x: &x {y: {z: *x}}"])
def test_read_yaml_refuses_an_alias_inside_of_what_it_names(text: str) -> None:
    assert message(text) == "an alias stands inside of what it names, line 1"


@pytest.mark.parametrize("value", ["[{}]", "{{<<: [{}]}}"])
def test_read_yaml_refuses_aliases_and_merge_keys_that_multiply(value: str) -> None:
    """Thirty lines that stand for 9³⁰ values: PyYAML's merge keys would make them all."""
    lines = ["x0: &x0 {a: b}"]
    lines += [f"x{i}: &x{i} {value.format(', '.join([f'*x{i - 1}'] * 9))}" for i in range(1, 31)]
    assert message("\n".join(lines)).startswith("its aliases stand for more than 100000 values, line ")


@pytest.mark.parametrize(
    "text", ["[" * 3000, "{a: " * 200 + "b" + "}" * 200, "- " * 5000, '"' + "]" * 9000 + '": ' + "[" * 9000]
)
def test_read_yaml_refuses_what_nests_without_end_in_no_time(text: str) -> None:
    assert message(text).startswith(f"nested more than {MAX_DEPTH} levels deep")


@pytest.mark.parametrize("text", ['a:\n  b: "x\\ud800"', 'a: 1\n"\\udfff": 2'])
def test_read_yaml_refuses_half_a_character(text: str) -> None:
    assert message(text) == "holds half a character (\\ud800 to \\udfff), which no file can, line 2"


def test_read_yaml_takes_what_nests_as_deep_as_a_recipe_may() -> None:
    assert read_yaml("[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)) is not None


def test_read_yaml_refuses_a_text_that_takes_seconds_to_parse() -> None:
    assert message("a: b\n" * MAX_CHARACTERS).startswith(f"the text has {5 * MAX_CHARACTERS} characters; at most")


@pytest.mark.parametrize(
    "value",
    ["2023-13-45", "1" * 5000, "0x_", "0b_", "!!int abc", "!!float z", "!!bool maybe", "!!timestamp soon"],
)
def test_read_yaml_refuses_a_value_that_its_type_cannot_hold(value: str) -> None:
    assert message(f"seed: {value}").startswith("holds a value that cannot be read (")


def test_read_yaml_is_the_only_reader() -> None:
    for file in SOURCE.rglob("*.py"):
        found = re.findall(r"yaml\.\w*load\w*\(|FullLoader|UnsafeLoader|SafeLoader\(", file.read_text("utf-8"))
        assert found == (["SafeLoader("] if file.name == "yaml_text.py" else []), file
