"""The command line: arguments in, one call, its result shown. No logic, and no heavy import before it is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyshot.cli_compare import compare
from manyshot.cli_eval import evaluate
from manyshot.cli_export import export
from manyshot.cli_inspect import inspect
from manyshot.cli_merge import merge
from manyshot.cli_report import report
from manyshot.cli_round import app as round_app
from manyshot.cli_runs import push, serve, status
from manyshot.cli_tune import tune

if TYPE_CHECKING:
    from collections.abc import Callable

    from manyshot.progress import Listener
    from manyshot.recipe import Recipe
    from manyshot.runner import RunResult

app = typer.Typer(
    name="manyshot",
    help="One model out of many fine-tunes: train, merge and score language models in rounds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file (YAML).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as protocol.rounds=3.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder (default: in runs/).")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that is in the folder.")]
Force = Annotated[bool, typer.Option("--force", help="Delete the run that is in the folder first.")]
Repair = Annotated[
    bool, typer.Option("--repair", help="As --resume; steps whose files were changed or removed are redone.")
]
VerifyDeterminism = Annotated[
    bool, typer.Option("--verify-determinism", help="Only run the first round twice, and say which step differs.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print the merged model's path and nothing else.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        import manyshot

        print(f"manyshot {manyshot.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let a recipe run the Python code that came with its model.")
    ] = False,
    allow_command: Annotated[
        bool, typer.Option("--allow-command", help="Let a recipe run the trainer that its local_update.command says.")
    ] = False,
) -> None:
    if trust_remote_code:
        from manyshot.remote_code import allow

        allow()
    if allow_command:
        from manyshot.trainer_command import allow as allow_commands

        allow_commands()


@app.command()
def run(
    recipe: RecipePath,
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    force: Force = False,
    repair: Repair = False,
    verify_determinism: VerifyDeterminism = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train, merge and score in rounds, as the recipe says.

    With --verify-determinism, exit code 0 says that the first round is the same twice, 1 that it is not.
    """
    from manyshot.recipe_file import load_recipe

    folder = output or Path("runs") / recipe.stem
    if verify_determinism:
        _verify_determinism(load_recipe(recipe, overrides or []), folder, quiet, as_json)
        return
    _run(load_recipe(recipe, overrides or []), folder, resume, force, repair, quiet, as_json)


def _verify_determinism(recipe: Recipe, output: Path, quiet: bool, as_json: bool) -> None:
    import json

    from manyshot.cli_view import PlainView, open_view

    with open_view(quiet=quiet, as_json=as_json, on_terminal=lambda console: PlainView()) as view:
        from manyshot.determinism import verify_determinism

        found = verify_determinism(recipe, output, view.listen)
    print(json.dumps(found.to_json()) if as_json else "\n".join(found.lines()))
    if found.differences:
        raise typer.Exit(1)


@app.command()
def extend(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has finished.")],
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option("--rounds", "-r", min=1, help="How many more.")] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Local steps of each task in each (default: as so far).")
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Add rounds to a run that has finished, and tasks with them (tasks.poems.data=poems.jsonl)."""

    def start(listen: Listener) -> RunResult:
        from manyshot.extend_command import extend as extend_run

        return extend_run(run_folder, rounds, steps, overrides or [], listener=listen)

    recipe = run_folder / "recipe.yaml"
    before = recipe.read_bytes() if recipe.is_file() else None

    def again() -> str:
        if recipe.is_file() and recipe.read_bytes() != before:  # the run is the longer one now
            return f"manyshot run {recipe} --resume --output {run_folder}"
        return "the same command"

    _watch(start, run_folder, again, quiet, as_json)


@app.command()
def demo(
    overrides: Overrides = None,
    output: Output = None,
    resume: Resume = False,
    force: Force = False,
    repair: Repair = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Run the embedded example: a real 135M language model, four tasks, METIS in rounds beside METIS post-hoc."""
    from manyshot.demo import RECIPE_FILE
    from manyshot.recipe_file import load_recipe

    _run(load_recipe(RECIPE_FILE, overrides or []), output or Path("runs/demo"), resume, force, repair, quiet, as_json)


def _run(recipe: Recipe, output: Path, resume: bool, force: bool, repair: bool, quiet: bool, as_json: bool) -> None:
    def start(listen: Listener) -> RunResult:
        from manyshot.runner import run as run_recipe

        return run_recipe(recipe, output, resume=resume, force=force, repair=repair, listener=listen)

    _watch(start, output, lambda: f"--resume --output {output}", quiet, as_json)


def _watch(
    start: Callable[[Listener], RunResult], output: Path, again: Callable[[], str], quiet: bool, as_json: bool
) -> None:
    """Start a run and show how it goes, and what came of it; `again`: how to go on with one that was interrupted."""
    from manyshot.cli_live import LiveView
    from manyshot.cli_view import open_view, show_result

    with open_view(quiet=quiet, as_json=as_json, on_terminal=lambda console: LiveView(console, output)) as view:
        try:
            view.say("loading torch, transformers and trl, then data and model …")
            result = start(view.listen)
        except KeyboardInterrupt:
            view.close()
            print(f"manyshot: interrupted; go on with {again()}", file=sys.stderr)
            raise typer.Exit(130) from None
    show_result(result, quiet=quiet, as_json=as_json)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    preset: Annotated[str, typer.Option("--preset", help="Its settings of METIS: default, or paper.")] = "default",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from manyshot.errors import RunFolderError
    from manyshot.starter import starter_recipe

    if path.exists() and not force:
        raise RunFolderError(f"{path}: is there already; --force replaces it")
    text = starter_recipe(preset)
    path.write_text(text, "utf-8")
    print(f"wrote {path}; next: manyshot validate {path}")


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Load data, tokenizer and model config for real, and show one example per task with its counted tokens."""
    from manyshot.cli_view import show_validation
    from manyshot.inspect_recipe import validate_recipe
    from manyshot.recipe_file import load_recipe

    show_validation(validate_recipe(load_recipe(recipe, overrides or [])), as_json=as_json)


@app.command()
def plan(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Say what a run would do and cost: steps, examples, tokens, disk, memory."""
    from manyshot.cli_view import show_plan
    from manyshot.inspect_recipe import plan_recipe
    from manyshot.recipe_file import load_recipe

    show_plan(plan_recipe(load_recipe(recipe, overrides or [])), as_json=as_json)


app.command()(compare)
app.command()(tune)
app.command("eval")(evaluate)
app.command()(merge)
app.command()(inspect)
app.command()(export)
app.command()(report)
app.command()(status)
app.command()(serve)
app.command()(push)
app.add_typer(round_app)
