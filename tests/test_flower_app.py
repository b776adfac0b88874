"""examples/flower in Flower's simulation: three clients, two at once, and the model that their adapters make."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

pytest.importorskip("flwr", reason="Flower is not installed; make test-flower installs it and runs this")
pytest.importorskip("ray", reason="Flower's simulation is not installed; make test-flower installs it and runs this")

from manyshot.gap_weights import TaskLosses, choose_weights
from manyshot.operators import Metis
from manyshot.rundir import read_json
from manyshot.tensors import Checkpoint

APP = Path(__file__).parent.parent / "examples" / "flower"
TASKS = ("first", "last", "count")
# seconds: half a dozen processes start and load torch, on cores that others may use too
PATIENCE = 1500
# Ray gives up on processes that are slow to start, too
RAY = {
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_USAGE_STATS_ENABLED": "0",
}

pytestmark = pytest.mark.timeout(PATIENCE + 300)


def simulate(folder: Path, *settings: str) -> str:
    """What the simulation says; it and all that it starts has ended then."""
    own = {"FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "MANYSHOT_CACHE": str(folder / "cache")}
    with open(folder / "simulation.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(APP / "simulate.py"), *settings],
            env=os.environ | RAY | own | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            process.wait(PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    said = (folder / "simulation.log").read_text("utf-8", "replace")
    assert process.returncode == 0, said
    return said


def test_flower_app_merges_three_clients_of_a_simulation(tmp_path: Path) -> None:
    output = tmp_path / "run"
    said = simulate(tmp_path, f'output="{output}"', "rounds=2", "steps=5")
    assert f"merged model: {output / 'merged'}" in said
    for round_index in (1, 2):
        record = read_json(output / f"round_{round_index:03d}" / "loss_gap.json")
        start, expert = (
            tuple(record[which][task]["loss"] for task in TASKS) for which in ("start_losses", "expert_losses")
        )
        assert all(one > two for one, two in zip(start, expert, strict=True))
        weights, _ = choose_weights(Metis(temperature=0.5), TaskLosses(start, expert, start))
        assert [record["weights"][task] for task in TASKS] == weights
        assert "skipped" not in record
    base = Checkpoint(next((tmp_path / "cache").rglob("tiny-llama")))
    merged = AutoModelForCausalLM.from_pretrained(str(output / "merged"), dtype=torch.float32)
    delta = Checkpoint(output / "round_002" / "task_vector.safetensors")
    assert len(delta.names) == 8  # q, k, v, o of two layers
    for name in delta.names:
        assert torch.equal(merged.get_parameter(name), base.read(name) + delta.read(name))
