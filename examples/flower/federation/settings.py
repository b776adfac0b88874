"""Settings of a run: those of pyproject.toml, and what the command line or FEDERATION_SETTINGS puts in their place."""

import json
import os
import tomllib
from pathlib import Path

from flwr.app import Context


def settings_of(context: Context) -> dict:
    """`flwr run` hands all settings over; a simulation that Python starts hands none, so they are looked up."""
    if context.run_config:
        return dict(context.run_config)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
    return project["tool"]["flwr"]["app"]["config"] | json.loads(os.environ.get("FEDERATION_SETTINGS", "{}"))
