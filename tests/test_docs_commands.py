"""Every page is followed: its commands run, its Python runs, its YAML loads; what cannot be run here is named with why.

On a tiny model: a page's own names for models, files and runs are there, what they hold is small.
"""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from docs_helpers import PAGES, ROOT, add_models, commands, dump, make_world, parse, steps, tiny_recipe, write_rows
from manyshot import harness
from manyshot.__main__ import main
from manyshot.recipe_file import (
    compare_recipe_from_mapping,
    load_merge_recipe,
    merge_recipe_from_mapping,
    recipe_from_mapping,
    tune_recipe_from_mapping,
)

# what the tests take as its program does and do not run: a pattern of the command, and why
NOT_RUN = {
    r"manyshot demo": "minutes of a 135M model; tests/test_demo_model.py (make test-slow) runs it",
    r"manyshot serve .*": "runs until it is stopped; tests/test_serve.py asks its server",
    r"manyshot --trust-remote-code .*": "code that a model brings along; tests/test_security.py",
    r"manyshot --allow-command run .*": "minutes of a 135M model; tests/test_command_trainer.py runs its trainer",
    r"manyshot round .*": "merges what teams send; tests/test_by_hand.py follows the example",
    r"manyshot push .*": "uploads; tests/test_push.py has a Hub of its own",
    r"manyshot eval .*--preset metis.*": "data sets of the Hub; tests/test_harness.py has local ones",
    r"manyshot eval .*--tasks .*": "data sets of the Hub; tests/test_harness.py has local ones",
    r"manyshot .* recipes/paper/.*": "models and data of the Hub; tests/test_paper_recipes.py has stand-ins for both",
    r"manyshot run .*trackers\.names=.*": "a run like the others; tests/test_trackers.py has it with each tracker",
    r"manyshot extend .*": "goes on with a run that a page before has finished; tests/test_extend.py",
    r"manyshot compare '<project>/recipes/study/.*": "hours, and data that is not part of the project",
}
# the same for other programs; what they name has to be there
NOT_RUN_ELSEWHERE = {
    r"make [\w-]+( [A-Z]+=\w+)*": "installs and tests the project; the target is in the Makefile",
    r"pip install .*": "the extra is in pyproject.toml, a version that is named in constraints.txt",
    r"python tests/crash_harness\.py .*": "minutes; tests/test_crash.py kills a few",
    r"python tests/fuzz_driver\.py .*": "an input that a long search has found; tests/test_fuzz.py searches briefly",
    r"python examples/any_trainer/team\.py .*": "a team's training; tests/test_by_hand.py has two of them",
    r"python benchmarks/(scaling|full_merge_memory|executors)\.py.*": "the page's own figures; its formulas are tested",
    r"tensorboard --logdir .*": "runs until it is stopped",
    r"cd .*": "where the reader's own data are",
}
# a page's command, and what is run in its place
INSTEAD = {
    "manyshot init": "manyshot init elsewhere.yaml",  # recipe.yaml is there already, and is the tiny one
    # the tiny run has two rounds
    "manyshot run recipe.yaml protocol.rounds=4 --output runs/first": "manyshot plan recipe.yaml protocol.rounds=4",
    "manyshot compare grid.yaml --workers 2": "manyshot compare grid.yaml",  # two more processes load torch
    # the tiny model's matrices have no such ranks
    "manyshot export runs/first --format adapter --rank 64 -o exports/lora": (
        "manyshot export runs/first --format adapter --rank 8 -o exports/lora"
    ),
    "manyshot export runs/first --format adapter --rank 32 -o exports/adapter": (
        "manyshot export runs/first --format adapter --rank 8 -o exports/adapter"
    ),
}
# the tutorial has a folder of its own
FOLLOWED = [page for page in PAGES if page.name != "tutorial.md"]
Call = Callable[[str], None]


def reason(command: str, table: dict[str, str]) -> str | None:
    return next((why for pattern, why in table.items() if re.fullmatch(pattern, command)), None)


# ---- what is not run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_its_program_takes(page: Path) -> None:
    for command in commands(page):
        words = shlex.split(command)
        if words[0] == "manyshot":
            parse(command)
        else:
            assert reason(command, NOT_RUN_ELSEWHERE), f"{page.name}: {command}: run it, or say why not"
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text("utf-8"), re.M), command
        if words[:2] == ["pip", "install"]:
            names_are_there(words[2:])
        if words[0] == "python":
            assert (ROOT / words[1]).is_file(), command


def names_are_there(words: list[str]) -> None:
    project, pins = (ROOT / "pyproject.toml").read_text("utf-8"), (ROOT / "constraints.txt").read_text("utf-8")
    for word in words:
        if extra := re.fullmatch(r"manyshot\[(\w+)\]", word):
            assert re.search(rf"^{extra[1]} = \[", project, re.M), word
        elif "==" in word:
            assert f"\n{word}\n" in pins, word


def test_every_exemption_is_needed() -> None:
    shown = [command for page in PAGES for command in commands(page)]
    for pattern in (*NOT_RUN, *NOT_RUN_ELSEWHERE):
        assert any(re.fullmatch(pattern, command) for command in shown), f"no page has {pattern}"
    assert set(INSTEAD) <= set(shown)


# ---- YAML ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_yaml_block_loads(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for step in steps(page):
        if step.kind == "yaml":
            for name in re.findall(r"[\w./-]+\.(?:jsonl|parquet)", step.text):
                Path(name).parent.mkdir(exist_ok=True)
                write_rows(Path(name), "letters")
            load_block(yaml.safe_load(step.text))


def load_block(block: dict[str, Any]) -> None:
    """A whole recipe as it is, a part of one beside what it leaves out; raises RecipeError."""
    tasks = ("instruction", "math", "multilingual", "safety")
    whole = tiny_recipe("owner/model", tasks) | {"protocol": {"rounds": 5, "local_steps": 60}}
    for task in tasks:
        Path("data").mkdir(exist_ok=True)
        write_rows(Path(f"data/{task}.jsonl"), "letters")
    if "merge_method" in block:
        dump(Path("mergekit.yml"), block)
        load_merge_recipe(Path("mergekit.yml"))
    elif "base" in block:
        merge_recipe_from_mapping(block)
    elif "search" in block:
        tune_recipe_from_mapping(block)
    elif {"methods", "benchmarks", "models"} & set(block):
        shared = {key: value for key, value in whole.items() if key not in ("model", "operator")}
        shared |= {"models": {"tiny": "owner/model"}, "methods": {"mean": {"operator": "mean"}}}
        compare_recipe_from_mapping(block if "models" in block else shared | block)
    else:
        recipe_from_mapping(whole | block)


# ---- pages, from top to end ------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Run a `manyshot` command in the current folder, in this process; anything but success fails."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(harness, "hub_answers", lambda: False)
    handler = signal.getsignal(signal.SIGTERM)

    def run_command(command: str) -> None:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            signal.signal(signal.SIGTERM, handler)
        shown = capfd.readouterr()
        assert not ended.value.code, f"{command}: {shown.err or shown.out}"

    return run_command


def clear_output(command: str) -> None:
    """A folder that a command begins anew is not there yet, as its reader's is not."""
    words = shlex.split(command)
    if {"--resume", "--extend", "--repair", "--plan"} & set(words):
        return
    for flag, path in itertools.pairwise(words):
        if flag in ("--output", "-o") and Path(path).is_dir():
            shutil.rmtree(path)


def test_every_page_can_be_followed(
    base_folder: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_world(tmp_path, base_folder)
    monkeypatch.chdir(tmp_path)
    done = ["manyshot run recipe.yaml --output runs/first", "manyshot compare grid.yaml", "manyshot tune search.yaml"]
    for command in done:
        call(command)
    add_models(tmp_path)
    for page in FOLLOWED:
        names: dict[str, object] = {}
        for step in steps(page):
            if step.kind == "python":
                exec(compile(step.text, page.name, "exec"), names)
            if step.kind != "shell" or not step.text.startswith("manyshot ") or reason(step.text, NOT_RUN):
                continue
            command = INSTEAD.get(step.text, step.text)
            if command not in done:
                clear_output(command)
                call(command)
                done.append(command)


SMALLER = {
    "model: demo:smollm2-135m-instruct": "model: base",
    "{rounds: 3, local_steps: 24}": "{rounds: 2, local_steps: 2}",
    "validation_examples: 16, test_examples: 32": "validation_examples: 2, test_examples: 2",
    "batch_size: 4,": "batch_size: 2, rank: 2,",
}


def test_the_tutorial_leads_from_an_empty_folder_to_an_export(
    base_folder: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(base_folder)
    names: dict[str, object] = {}
    for step in steps(ROOT / "docs" / "tutorial.md"):
        text = step.text
        if step.kind == "yaml":
            for shown, small in SMALLER.items():
                assert text.count(shown) == 1, shown
                text = text.replace(shown, small)
            Path("recipe.yaml").write_text(text, "utf-8")
        elif step.kind == "python":
            exec(compile(text, "tutorial.md", "exec"), names)
        elif text.startswith("manyshot ") and not reason(text, NOT_RUN):
            call(INSTEAD.get(text, text))
    for made in ("runs/first/report.html", "both/report.html", "exports/model/config.json"):
        assert Path(made).is_file(), made
    assert Path("exports/adapter/adapter_config.json").is_file()
