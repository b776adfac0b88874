"""The server: the pretrained model, the names of the tasks, an operator. It never sees an example."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from federation.data import find_model
from federation.settings import settings_of
from manyshot.flower import ManyShot

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; the merged model is in `merged/` of the output folder then."""
    settings = settings_of(context)
    operator = {"name": settings["operator"]}
    if settings["operator"] == "metis":
        operator["temperature"] = settings["temperature"]
    recipe = {
        "model": find_model(settings["model"]),
        "tasks": settings["tasks"].split(","),
        "rounds": settings["rounds"],
        "operator": operator,
        "sends": settings["sends"],
        "seed": settings["seed"],
    }
    ManyShot(recipe, settings["output"]).start(grid)
