"""The federation in Flower's simulation, started from Python: python simulate.py rounds=2 output='"runs/second"'."""

import json
import os
import sys

from federation.client_app import app as client_app
from federation.server_app import app as server_app
from flwr.simulation import run_simulation


def main(overrides: list[str]) -> None:
    """Simulate three clients, two at once; `overrides` are settings of pyproject.toml as key=JSON."""
    pairs = [one.split("=", 1) for one in overrides]
    os.environ["FEDERATION_SETTINGS"] = json.dumps({key: json.loads(value) for key, value in pairs})
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(server_app=server_app, client_app=client_app, num_supernodes=3, backend_config=backend)


if __name__ == "__main__":
    main(sys.argv[1:])
