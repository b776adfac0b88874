"""examples/flower as its README runs it: a SuperLink, Flower's simulation of three clients, a merged model."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
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

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TASKS = ("first", "last", "count")
# the simulation starts half a dozen processes that load torch, on cores that others may use too
PATIENCE = 1500

pytestmark = pytest.mark.timeout(2 * PATIENCE)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A SuperLink that simulates, for this test alone; the environment in which `flwr` finds it."""
    http, control = free_port(), free_port()
    environment = os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "MANYSHOT_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }
    command = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    command += ["--control-api-address", f"127.0.0.1:{control}", "--port", http]
    with open(tmp_path / "superlink.log", "wb") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    try:
        _wait_until_there(f"http://127.0.0.1:{http}/health", process, tmp_path / "superlink.log")
        yield environment
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_until_there(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text("utf-8")
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text("utf-8"))


def test_flower_app_merges_three_clients_of_a_simulation(tmp_path: Path, superlink: dict[str, str]) -> None:
    output = tmp_path / "run"
    settings = f"output='{output}' rounds=2 steps=10"
    federation = "num-supernodes=3 client-resources-num-cpus=1 init-args-num-cpus=2"
    app = shutil.copytree(ROOT / "examples" / "flower", tmp_path / "app", ignore=shutil.ignore_patterns(".venv"))
    command = ["flwr", "run", str(app), "local", "--stream", "--run-config", settings]
    done = subprocess.run(
        [*command, "--federation-config", federation],
        env=superlink,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    said = done.stdout + done.stderr + (tmp_path / "superlink.log").read_text("utf-8")
    assert (output / "merged" / "model.safetensors").is_file(), said
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
