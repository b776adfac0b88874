"""What a run of a large model costs in disk, memory and network, from the formulas of `manyshot plan`, without weights.

    python benchmarks/scaling.py                 # the plan: 70 B, 32 tasks, 8 nodes
    python benchmarks/scaling.py --measure       # the same formulas beside small runs on this machine

Prints the Markdown tables of docs/scaling.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NODES, GPUS = 8, 8
TASKS, ROUNDS, MEAN_TOKENS = 32, 5, 512
# Llama 3.1 70B, as its config.json says
SHAPE = {
    **{"vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
    **{"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072},
}
KEEPS = (("all", "all"), ("last", "last"), ("none", "last"))


def recipe_of(method: str, tasks: Mapping[str, Any], model: str = "none", **sections: Mapping[str, Any]) -> Any:
    from manyshot.recipe_file import recipe_from_mapping

    update = {"method": method, "batch_size": 8, "micro_batch_size": 1, "max_length": 2 * MEAN_TOKENS}
    mapping = {
        "model": model,
        "tasks": dict(tasks),
        "protocol": {"rounds": ROUNDS, "local_steps": 50},
        "local_update": update | dict(sections.pop("local_update", {})),
        **sections,
    }
    return recipe_from_mapping(mapping)


def shapes_of(recipe: Any) -> tuple[Any, Any, int]:
    """Sizes, configuration and number of weights of a bfloat16 base of the shape above, of which there are no files."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from manyshot.inputs import adapted_layers
    from manyshot.sizes import sizes_of
    from manyshot.tensors import TensorInfo

    config = LlamaConfig(**SHAPE, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    infos = {name: TensorInfo(tuple(one.shape), "BF16") for name, one in sorted(model.named_parameters())}
    layers = adapted_layers(recipe, model)
    changed = [f"{module}.weight" for module in layers] or list(infos)
    return sizes_of(recipe, infos, changed, layers), config, sum(info.num_elements for info in infos.values())


def traffic(recipe: Any, sizes: Any, base: int, nodes: int) -> dict[str, int]:
    """Bytes over the network in one round with everything on a shared folder, and each node reading a file once.

    A node's page cache, or a copy of the base on its own disk, is what makes it once: each task's process reads again.
    """
    from manyshot.sizes import round_writes

    written = round_writes(recipe, sizes, 2)
    experts = sum(sizes.expert(task) for task in recipe.tasks)
    start = nodes * (base + sizes.dense)  # the model that local updates start from
    merge = experts + sizes.dense + sizes.changed + sizes.unchanged  # experts, start, base: by the one that merges
    return {
        "base and task vector to every node": start,
        "experts from the nodes": written["experts"] + written["optimizer_states"],
        "read by the merge": merge,
        "written by the merge": sum(written.values()) - written["experts"] - written["optimizer_states"],
    }


def plan_tables() -> None:
    from manyshot.inspect_recipe import memory_parts
    from manyshot.sizes import disk_plan

    tasks = {f"task_{number:02d}": {"data": "demo:math"} for number in range(TASKS)}
    print(f"\n{TASKS} tasks, {ROUNDS} rounds; GB = 10⁹ bytes.\n")
    print("| method | keep: adapters, merged | experts | task vectors | merged models | in all | at most on the way |")
    print("|---|---|---|---|---|---|---|")
    for method in ("lora", "full"):
        for adapters, merged in KEEPS:
            recipe = recipe_of(method, tasks, keep={"adapters": adapters, "merged": merged})
            sizes, _, _ = shapes_of(recipe)
            found = disk_plan(recipe, sizes)
            columns = ("experts", "task_vectors", "merged_models", "total", "peak")
            cells = " | ".join(f"{found[name] / 1e9:,.0f} GB" for name in columns)
            print(f"| {method} | {adapters}, {merged} | {cells} |")
    print(f"\nMemory of one local update, one sequence of {2 * MEAN_TOKENS} tokens at a time.\n")
    shards = f"a GPU of {GPUS} | a GPU of {NODES * GPUS}"
    print(f"| method | weights | optimizer | activations | logits | in all | {shards} |")
    print("|---|---|---|---|---|---|---|---|")
    for method in ("lora", "full"):
        recipe = recipe_of(method, tasks, local_update={"dtype": "bfloat16"})
        sizes, config, total = shapes_of(recipe)
        trained = total if method == "full" else max(sum(one) for one in sizes.experts.values()) // 4
        found = memory_parts(recipe, config, total, trained, MEAN_TOKENS)
        cells = " | ".join(f"{size / 1e9:,.1f} GB" for size in found.values())
        whole, own = found["weights"] + found["optimizer"], found["activations"] + found["logits"]
        print(
            f"| {method} | {cells} | {' | '.join(f'{(whole / n + own) / 1e9:,.0f} GB' for n in (GPUS, NODES * GPUS))} |"
        )
    print(f"\nNetwork of one round, {NODES} nodes.\n")
    print("| method | " + " | ".join(traffic_rows()) + " | in all | at 25 Gbit/s of the shared folder |")
    print("|---|---|---|---|---|---|---|")
    for method in ("lora", "full"):
        recipe = recipe_of(method, tasks)
        sizes, _, total = shapes_of(recipe)
        found = traffic(recipe, sizes, 2 * total, NODES)
        in_all = sum(found.values())
        cells = " | ".join(f"{size / 1e9:,.0f} GB" for size in found.values())
        print(f"| {method} | {cells} | {in_all / 1e9:,.0f} GB | {in_all * 8 / 25e9 / 60:,.0f} min |")


def traffic_rows() -> tuple[str, ...]:
    return (
        *("base and task vector to every node", "experts from the nodes"),
        *("read by the merge", "written by the merge"),
    )


# ---- small runs ------------------------------------------------------------------------------------------------------


def make_small(folder: Path) -> dict[str, Any]:
    """A model of 35 million weights, most of them in an embedding, and data of two tasks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<end>", "<unk>", *(f"w{number}" for number in range(49_997))]
    backend = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", eos_token="<end>"
    )
    tokenizer.save_pretrained(str(folder / "base"))
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(folder / "base"))
    tasks = {}
    for task in ("one", "two"):
        rng = random.Random(task)
        rows = [{"prompt": _words(rng, 24), "completion": _words(rng, 8)} for _ in range(64)]
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
        tasks[task] = {"data": str(folder / f"{task}.jsonl"), "metric": "token_accuracy"}
    return tasks


def _words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(2000)}" for _ in range(count))


def used(folder: Path) -> int:
    """Bytes on disk, a file of several names once, without reports."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.is_symlink()]
    return sum({file.stat().st_ino: file.stat().st_size for file in files if "report." not in file.name}.values())


def measure(method: str, base: Path, tasks: Mapping[str, Any], keep: tuple[str, str], folder: Path) -> None:
    """A row for each of: disk in the end, most disk, bytes written in round 2, memory of a local update."""
    from manyshot.inputs import check_inputs
    from manyshot.inspect_recipe import estimate_memory
    from manyshot.memory import resident
    from manyshot.rundir import read_lines
    from manyshot.runner import run
    from manyshot.sizes import disk_plan, round_writes

    recipe = recipe_of(
        method, tasks, str(base), protocol={"rounds": 2, "local_steps": 2},
        keep={"adapters": keep[0], "merged": keep[1]},
        evaluation={"experts": False, "validation_examples": 4, "test_examples": 4},
        local_update={"max_length": 64, "device": "cpu", "batch_size": 2},
    )  # fmt: skip
    inputs = check_inputs(recipe)
    planned, written, most, before = disk_plan(recipe, inputs.sizes), [0, 0, 0], 0, resident() or 0

    def look(event: Any) -> None:
        nonlocal most
        most = max(most, used(folder))
        if event.kind == "round":
            written[event.round_index] = _written()

    run(recipe, folder, listener=look)
    phases = [line for line in read_lines(folder / "metrics.jsonl") if line.get("phase") == "local_update"]
    memory = max(line.get("memory", 0) for line in phases) - before
    estimated = estimate_memory(recipe, inputs, max(inputs.mean_tokens.values()))["total"]
    for what, computed, found in (
        ("disk in the end", planned["total"], used(folder)),
        ("most disk on the way", planned["peak"], most),
        ("written in round 2", sum(round_writes(recipe, inputs.sizes, 2).values()), written[2] - written[1]),
        ("memory of a local update", estimated, memory),
    ):
        print(
            f"| {method} | {', '.join(keep)} | {what} | {computed / 1e6:,.1f} MB | {found / 1e6:,.1f} MB "
            f"| {computed / found:.2f} |"
        )


def _written() -> int:
    """Bytes that this process has handed to write()."""
    lines = Path(f"/proc/{os.getpid()}/io").read_text("ascii").splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="run small runs and compare")
    if not parser.parse_args().measure:
        plan_tables()
        return
    print("| method | keep: adapters, merged | what | computed | measured | computed / measured |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        tasks = in_child(make_small, Path(scratch))
        base = Path(scratch) / "base"
        for method, keep in (("lora", KEEPS[0]), ("lora", KEEPS[2]), ("full", KEEPS[2])):
            in_child(measure, method, base, tasks, keep, Path(scratch) / f"{method}_{keep[0]}")


def in_child(work: Any, *arguments: Any) -> Any:
    """Do it in a process that has imported everything and done nothing yet, so that memory can be told apart."""
    import torch  # noqa: F401
    import trl  # noqa: F401

    import manyshot.runner  # noqa: F401

    sys.stdout.flush()
    read, write = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            with os.fdopen(write, "w") as answer:
                json.dump(work(*arguments), answer)
            sys.stdout.flush()
        except BaseException:  # noqa: BLE001 - told, and the end of this process
            traceback.print_exc()
            os._exit(1)  # what the parent has open is the parent's
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        text = answer.read()
    if os.waitpid(pid, 0)[1]:
        raise SystemExit(f"{work.__name__} failed")
    return json.loads(text)


if __name__ == "__main__":
    main()
