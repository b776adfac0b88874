"""A trainer for tests that loads neither torch nor transformers: an adapter of random numbers, or some mishap.

python tests/fake_trainer.py <mishap> {config}
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

LAYER = "base_model.model.model.layers.{}.self_attn.q_proj"


def write_adapter(config, output, *, width=32, layers=2, value=None, said=None):
    """Rank 2 on the query projections, drawn from the seed that it was given."""
    rng = np.random.default_rng(config["seed"])
    tensors = {}
    for layer in range(layers):
        for side, shape in (("A", (2, width)), ("B", (width, 2))):
            drawn = rng.normal(size=shape).astype("float32") * 0.1
            if value is not None:
                drawn[0, 0] = value
            tensors[f"{LAYER.format(layer)}.lora_{side}.weight"] = drawn
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    settings["base_model_name_or_path"] = config["start"] if said is None else said
    (output / "adapter_config.json").write_text(json.dumps(settings))


def write_model(config, output, *, add=0.01):
    """The whole start model, with something added to one of its matrices."""
    tensors = load_file(Path(config["start"]) / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name] + np.float32(add)
    save_file(tensors, output / "model.safetensors")
    (output / "config.json").write_text((Path(config["start"]) / "config.json").read_text())


def fail(config, output):
    """End with an error, as a trainer does that finds no device."""
    sys.stderr.write("no GPU was found\n")
    sys.exit(3)


def hang(config, output):
    """Go on without an end, in two processes, and take no notice of being asked to stop."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    sys.stdout.write(f"child {child.pid}\n")
    sys.stdout.flush()
    time.sleep(600)


def write_pickle(config, output):
    """An adapter in a form that is never read."""
    write_adapter(config, output)
    (output / "adapter_model.safetensors").rename(output / "adapter_model.bin")


MISHAPS = {
    "none": write_adapter,
    "fails": fail,
    "hangs": hang,
    "killed": lambda config, output: os.kill(os.getpid(), signal.SIGKILL),
    "nothing": lambda config, output: None,
    "only a checkpoint": lambda config, output: write_adapter(config, output / "checkpoint-10"),
    "two results": lambda config, output: [write_adapter(config, output / name) for name in ("one", "two")],
    "one folder deeper": lambda config, output: write_adapter(config, output / "epoch_0"),
    "wrong shapes": lambda config, output: write_adapter(config, output, width=64),
    "other base": lambda config, output: write_adapter(config, output, layers=3),
    "from elsewhere": lambda config, output: write_adapter(config, output, said="meta-llama/Llama-3.2-3B"),
    "nan": lambda config, output: write_adapter(config, output, value=np.nan),
    "pickle": write_pickle,
    "whole model": write_model,
    "infinite model": lambda config, output: write_model(config, output, add=np.inf),
}


def main() -> None:
    mishap, config = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    told = {"rows": len(Path(config["data"]).read_text().splitlines()), "steps": config["steps"]}
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    name, _, only = mishap.partition(":")  # of one task only
    MISHAPS[name if only in ("", config["task"]) else "none"](config, Path(config["output"]))


if __name__ == "__main__":
    main()
