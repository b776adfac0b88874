"""`manyshot round`: rounds by hand, for teams that cannot share their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from manyshot.progress import Listener

app = typer.Typer(
    name="round",
    help="Rounds by hand: teams that keep their data send experts and losses; a coordinator merges.",
    no_args_is_help=True,
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The coordinator's run folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def start(
    run_folder: RunPath,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe whose tasks say data: elsewhere.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="Overrides, such as protocol.rounds=3.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Begin a run, or go on with it, and say which model the teams train."""
    from manyshot.by_hand import start as begin
    from manyshot.recipe_file import load_recipe

    _show_status(begin(load_recipe(recipe, overrides or []), run_folder, _listener(as_json)), as_json)


@app.command()
def add(
    run_folder: RunPath,
    task: Annotated[str, typer.Argument(metavar="TASK", help="Name of the team's task.")],
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="What it trained: a PEFT adapter or a model folder.")
    ],
    loss_merged: Annotated[float, typer.Option("--loss-merged", help="Its validation loss of the round's model.")],
    loss_expert: Annotated[float, typer.Option("--loss-expert", help="Its validation loss of what it trained.")],
    loss_pretrained: Annotated[
        float | None, typer.Option("--loss-pretrained", help="Of the pretrained model, if it was not in round 1.")
    ] = None,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="Steps taken (default: the recipe's).")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Put it in the place of what was sent before.")] = False,
    as_json: Json = False,
) -> None:
    """Take what a team has sent into the current round."""
    from manyshot.by_hand import Sent
    from manyshot.by_hand import add as take

    sent = Sent(task, folder, loss_merged, loss_expert, steps, loss_pretrained)
    told = take(run_folder, sent, replace=replace, listener=_listener(as_json))
    print(json.dumps({"task": task, "told": told}) if as_json else told)


@app.command()
def merge(
    run_folder: RunPath,
    without: Annotated[
        list[str] | None, typer.Option("--without", metavar="TASK", help="Go on without a task that sent nothing.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Merge the round when every task has sent its expert, and begin the next."""
    from manyshot.by_hand_merge import merge as merge_round

    found = merge_round(run_folder, without or [], _listener(as_json))
    if as_json:
        print(json.dumps(found))
        return
    for task, weight in found["weights"].items():
        print(f"{task}: loss gap {found['loss_gaps'][task]:.4f}, weight {weight:.4f}")
    more = "the last one" if found["round"] == found["rounds"] else "what teams train next"
    print(f"round {found['round']} of {found['rounds']} is merged; its model, {more}:")
    print(found["merged"])


@app.command()
def finish(
    run_folder: RunPath,
    losses: Annotated[list[str], typer.Argument(metavar="TASK=LOSS…", help="Validation losses of the last model.")],
    as_json: Json = False,
) -> None:
    """Tell the teams' losses of the last merged model, for the report. The model is complete without."""
    from manyshot.by_hand_merge import tell_losses
    from manyshot.errors import RecipeError

    told = {}
    for text in losses:
        name, _, value = text.partition("=")
        try:
            told[name] = float(value)
        except ValueError:
            raise RecipeError(f"'{text}': expected TASK=LOSS, such as math=1.73") from None
    found = tell_losses(run_folder, told, _listener(as_json))
    last = found["rounds"][str(len(found["rounds"]))]
    print(json.dumps(found) if as_json else f"multi-task loss {last['multi_task_loss']:.4f}")


@app.command()
def status(run_folder: RunPath, as_json: Json = False) -> None:
    """Say which model teams train, who has sent an expert, and who has not."""
    from manyshot.by_hand import round_status

    _show_status(round_status(run_folder), as_json)


def _listener(as_json: bool) -> Listener:
    from manyshot.cli_view import PlainView, QuietView

    return (QuietView() if as_json else PlainView()).listen


def _show_status(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    if found["finished"]:
        print(f"{found['folder']}: all {found['rounds']} rounds are merged; the model:")
        print(found["merged"])
        return
    print(f"{found['folder']}: round {found['round']} of {found['rounds']}; teams train this model:")
    print(found["model"])
    for task, steps in found["steps"].items():
        one = found["sent"].get(task)
        if one is None:
            print(f"  {task}: nothing yet ({steps} steps)")
        else:
            before, after = one["loss_merged"], one["loss_expert"]
            print(f"  {task}: {one['returned']}, loss {before:.4f} -> {after:.4f} (gap {before - after:.4f})")
