"""What is fuzzed: kinds of files that come from strangers, what reads them, and inputs to begin with.

An Arena is a folder with a tiny model, an adapter, data, a finished run, a comparison and a search, made here. A target
puts an input where such a file stands in it and lets the product read it. Nothing is trained.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import torch
import yaml
from pyarrow import parquet

import manyshot
from compare_table_helpers import add_shares, make_results
from conftest import TASKS, make_rows, write_base
from fuzz_mutate import (
    Mutator,
    headed,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_safetensors,
    mutate_yaml,
)
from manyshot.compare_plan import plan_compare
from manyshot.errors import ManyshotError
from manyshot.eval_model import find_model
from manyshot.export_source import open_source
from manyshot.inspect_input import open_models, open_round
from manyshot.live_state import LiveRun
from manyshot.live_state import to_json as live_json
from manyshot.live_text import totals, troubles
from manyshot.manifest import check_files
from manyshot.metrics import check_metric, find_metric
from manyshot.models import load_config, load_tokenizer, meta_model
from manyshot.peft_adapter import read_adapter
from manyshot.push import plan_upload
from manyshot.recipe import operator_warnings
from manyshot.recipe_file import (
    load_compare_recipe,
    load_merge_recipe,
    load_recipe,
    load_tune_recipe,
    recipe_from_mapping,
    to_yaml,
)
from manyshot.report_build import build_report
from manyshot.report_command import to_json as report_json
from manyshot.report_html import render
from manyshot.report_markdown import render_markdown
from manyshot.rundir import write_json
from manyshot.runner import run
from manyshot.status import run_status
from manyshot.task_vector import AdapterFactors
from manyshot.tasks import encode_all, encode_prompt, load_task
from manyshot.tensors import Checkpoint
from manyshot.tune_folder import TuneFolder, read_end, read_trials
from manyshot.tune_plan import plan_tune
from manyshot.yaml_text import read_yaml
from run_helpers import small_mapping, write_data

PAIR = TASKS[:2]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
RECIPES = Path(__file__).parent.parent / "recipes" / "paper"


@dataclass(frozen=True)
class Target:
    """One kind of input. `part` says how much of all inputs it gets; `read(arena, data)` may raise ManyshotError."""

    name: str
    seeds: tuple[bytes, ...]
    read: Callable[[bytes], object]
    mutate: Mutator
    part: int = 1


class Arena:
    """The folder that inputs are put into, and the targets. Making it trains a run of seconds, once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, self.data = folder / "base", folder / "data"
        self.adapter, self.run = folder / "adapter", folder / "run"
        self.out = folder / "out"
        if not (folder / "MADE").exists():
            shutil.rmtree(folder, ignore_errors=True)
            self._make()
            (folder / "MADE").touch()
        self.tokenizer = load_tokenizer(self.base)

    def _make(self) -> None:
        self.folder.mkdir(parents=True)
        self.out.mkdir()
        write_base(self.base)
        for task in PAIR:
            write_data(self.data, task)
        mapping = small_mapping(self.base, self.data, PAIR)
        mapping["evaluation"] |= {"experts": True, "post_hoc": True}
        mapping["protocol"]["local_steps"] = 2
        run(recipe_from_mapping(mapping), self.run, command="manyshot run recipe.yaml")
        shutil.copytree(self.run / "round_001" / PAIR[0] / "adapter", self.adapter)
        (self.adapter / "factors.json").unlink()
        (self.folder / "compare").mkdir()
        (self.folder / "compare" / "compare.yaml").write_text(self.compare_recipe(), "utf-8")
        (self.folder / "tune").mkdir()

    # ---- inputs to begin with ----------------------------------------------------------------------------------------

    def recipe(self, **more: Any) -> dict[str, Any]:
        return small_mapping(self.base, self.data, PAIR) | more

    def compare_recipe(self) -> str:
        mapping = self.recipe(
            methods={
                "metis": {"operator": {"name": "metis"}, "grid": {"temperature": [1.0, 2.0]}},
                "mean": {"operator": {"name": "mean"}},
            },
            seeds=[0, 1],
        )
        mapping["models"] = {"tiny": str(self.base)}
        del mapping["model"], mapping["seed"], mapping["operator"]
        return yaml.safe_dump(mapping, sort_keys=False)

    def recipes(self, suffix: str) -> tuple[bytes, ...]:
        """The project's own recipe files of a kind."""
        found = sorted(RECIPES.glob("*.yaml"))
        kinds = {"methods": b"\nmethods:", "search": b"\nsearch:"}
        blobs = [file.read_bytes() for file in found]
        if suffix in kinds:
            return tuple(blob for blob in blobs if kinds[suffix] in blob)[:4]
        return tuple(blob for blob in blobs if not any(mark in blob for mark in kinds.values()))[:4]

    def write(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    # ---- targets -----------------------------------------------------------------------------------------------------

    def targets(self) -> list[Target]:
        return [*self._recipes(), *self._data(), *self._models(), *self._records()]

    def _recipes(self) -> list[Target]:
        whole = yaml.safe_dump(self.recipe(), sort_keys=False).encode()
        written = to_yaml(recipe_from_mapping(self.recipe())).encode()
        search = {"parameters": {"operator.temperature": {"low": 0.1, "high": 10.0, "log": True}}, "trials": 4}
        tune = yaml.safe_dump(self.recipe(search=search), sort_keys=False).encode()
        merge = {
            "base": str(self.base),
            "experts": {
                "one": {"path": str(self.adapter), "weight": 0.5},
                "two": {"path": str(self.adapter), "weight": 0.5},
            },
            "operator": {"name": "ties", "density": 0.5},
        }
        models = [
            {"model": str(self.adapter), "parameters": {"weight": 1.0}},
            {"model": "b/c", "parameters": {"weight": 0.5}},
        ]
        kit = {"merge_method": "task_arithmetic", "base_model": str(self.base), "models": models}
        overrides = b"protocol.rounds=3\noperator.temperature=2.0\ntasks.letters.train={data: x/y, examples: 4}"
        compare = (self.compare_recipe().encode(), *self.recipes("methods"))
        return [
            Target("recipe run", (whole, written, *self.recipes("")), self.read_recipe, mutate_yaml, 10),
            Target("recipe compare", compare, self.read_compare, mutate_yaml, 6),
            Target("recipe tune", (tune, *self.recipes("search")), self.read_tune, mutate_yaml, 5),
            Target("recipe merge", (_yaml(merge), _yaml(kit)), self.read_merge, mutate_yaml, 6),
            Target("overrides", (overrides,), self.read_overrides, mutate_bytes, 5),
        ]

    def _data(self) -> list[Target]:
        rows = [row | {"meta": {"level": 1}} for row in make_rows("letters", 12)]
        texts = [f"{one} {two}" for one in "abc" for two in "wxyz"]
        chat = [
            {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "c"}]} for text in texts
        ]
        alpaca = [{"instruction": text, "input": "b", "output": "c d"} for text in texts]
        lines = tuple("\n".join(map(json.dumps, found)).encode() for found in (rows, chat, alpaca))
        table = io.BytesIO()
        parquet.write_table(pyarrow.Table.from_pylist(alpaca), table)
        cells = b"prompt,completion\n" + b"".join(f'{text},"c, d"\n'.encode() for text in texts)
        return [
            Target("data jsonl", lines, self.read_data("jsonl"), mutate_lines, 8),
            Target("data json", tuple(_json(found) for found in (rows, chat)), self.read_data("json"), mutate_json, 4),
            Target("data csv", (cells,), self.read_data("csv"), mutate_bytes, 5),
            Target("data tsv", (cells.replace(b",", b"\t"),), self.read_data("tsv"), mutate_bytes, 2),
            Target("data parquet", (table.getvalue(),), self.read_data("parquet"), mutate_bytes, 4),
        ]

    def _models(self) -> list[Target]:
        weights = (self.base / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", weights[:8])
        tiny = _safetensors({"a": ("F32", [2, 3]), "b": ("BF16", [4]), "c": ("BOOL", [])})
        names = [name for name in json.loads(weights[8 : 8 + length]) if name != "__metadata__"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "one.safetensors")}
        card = b"---\nlicense: mit\nlanguage: [en]\ntags: [a]\n---\n# A model\n"
        lora = (self.adapter / "adapter_model.safetensors").read_bytes()
        factors = next(self.run.glob("round_001/*/adapter/factors.json"))
        tokenizer = tuple(name.encode() + b"\n" + (self.base / name).read_bytes() for name in TOKENIZER)
        sharded = self.folder / "sharded"
        sharded.mkdir(exist_ok=True)
        shutil.copy(self.base / "model.safetensors", sharded / "one.safetensors")

        config, adapter = (self.base / "config.json").read_bytes(), (self.adapter / "adapter_config.json").read_bytes()
        return [
            Target("safetensors", (tiny, weights), self.read_weights, mutate_safetensors, 8),
            Target("shard index", (_json(index),), self.read_index, mutate_json, 5),
            Target("adapter config", (adapter,), self.read_adapter_config, mutate_json, 6),
            Target("adapter weights", (lora,), self.read_adapter_weights, mutate_safetensors, 3),
            Target("factors", (factors.read_bytes(),), self.read_factors(factors.parent), mutate_json, 3),
            Target("model config", (config,), self.read_config, mutate_json, 3),
            Target("tokenizer", tokenizer, self.read_tokenizer, headed(mutate_json), 2),
            Target("model card", (card,), self.read_card, mutate_yaml, 2),
        ]

    def _records(self) -> list[Target]:
        found = sorted(file for file in self.run.rglob("*.json") if not file.is_symlink())
        own = [file for file in found if not {"merged", "adapter"} & set(file.relative_to(self.run).parts[:-1])]
        own = [file for file in own if file.name != "report.json"]
        heads = {file.relative_to(self.run).as_posix(): file.read_bytes() for file in own}
        self.records = heads | {name: (self.run / name).read_bytes() for name in ("metrics.jsonl", "recipe.yaml")}
        of_json = tuple(name.encode() + b"\n" + blob for name, blob in heads.items())
        results = tuple(_json(one) for one in (make_results(), add_shares(make_results())))
        trial = {"kind": "trial", "search": 1, "number": 0, "settings": {"operator.temperature": 1.0}, "value": 1.5}
        end = {"kind": "end", "search": 1, "why": "trials", "chosen": 0}
        journal = b"\n".join(_json(line) for line in (trial, trial | {"number": 1}, end))
        return [
            Target("run record", of_json, self.read_record, headed(mutate_json), 3),
            Target("run metrics", (self.records["metrics.jsonl"],), self.read_named("metrics.jsonl"), mutate_lines, 1),
            Target("run recipe", (self.records["recipe.yaml"],), self.read_named("recipe.yaml"), mutate_yaml, 1),
            Target("compare results", results, self.read_results, mutate_json, 2),
            Target("tune journal", (journal,), self.read_journal, mutate_lines, 2),
        ]

    # ---- readers -----------------------------------------------------------------------------------------------------

    def read_recipe(self, data: bytes) -> None:
        """What is accepted can also be written, and says the same when it is read again."""
        recipe = load_recipe(self.write("recipes/recipe.yaml", data))
        operator_warnings(recipe)
        assert recipe_from_mapping(read_yaml(to_yaml(recipe))) == recipe

    def read_compare(self, data: bytes) -> None:
        plan_compare(load_compare_recipe(self.write("recipes/compare.yaml", data)))

    def read_tune(self, data: bytes) -> None:
        plan_tune(load_tune_recipe(self.write("recipes/tune.yaml", data)))

    def read_merge(self, data: bytes) -> None:
        load_merge_recipe(self.write("recipes/merge.yaml", data))

    def read_overrides(self, data: bytes) -> None:
        path = self.write("recipes/good.yaml", yaml.safe_dump(self.recipe()).encode())
        load_recipe(path, data.decode("utf-8", "surrogateescape").split("\n"))

    def read_data(self, ending: str) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            path = self.write(f"inputs/rows.{ending}", data)
            mapping = self.recipe()
            mapping["tasks"]["letters"] = {"data": str(path)}
            recipe = recipe_from_mapping(mapping)
            task = load_task(recipe, "letters")
            task.digest()
            write_json(self.out / "splits.json", task.splits)
            check_metric(find_metric("exact_match", "letters"), task.test, "letters")
            encode_all(task.train, self.tokenizer, task, "train", 32, "completion")
            for example in task.test:
                encode_prompt(example, self.tokenizer, task.spec, "here")
            write_json(self.out / "examples.json", {"prompts": [example.prompt for example in task.test]})

        return read

    def read_weights(self, data: bytes) -> None:
        checkpoint = Checkpoint(self.write("inputs/one.safetensors", data))
        for name in checkpoint.names:
            info = checkpoint.info(name)
            if info.num_bytes:
                out_P = torch.empty(min(info.num_elements, 4), dtype=info.dtype)
                checkpoint.read_entries(name, info.num_elements - len(out_P), out_P)
            assert checkpoint.read(name).shape == info.shape

    def read_index(self, data: bytes) -> None:
        self.write("sharded/model.safetensors.index.json", data)
        Checkpoint(self.folder / "sharded").read("model.norm.weight")

    def _other_adapter(self, name: str, data: bytes) -> Path:
        place = self.folder / "other_adapter"
        if not place.exists():
            shutil.copytree(self.adapter, place)
        for file in self.adapter.iterdir():
            shutil.copy(file, place / file.name)
        (place / name).write_bytes(data)
        return place

    def read_adapter_config(self, data: bytes) -> None:
        self._read_adapter(self._other_adapter("adapter_config.json", data))

    def read_adapter_weights(self, data: bytes) -> None:
        self._read_adapter(self._other_adapter("adapter_model.safetensors", data))

    def _read_adapter(self, place: Path) -> None:
        update = read_adapter(place, Checkpoint(self.base), "one")
        for name in update.names:
            assert update.shape(name) == Checkpoint(self.base).info(name).shape

    def read_factors(self, place: Path) -> Callable[[bytes], None]:
        def read(data: bytes) -> None:
            other = self.folder / "factors"
            if not other.exists():
                shutil.copytree(place, other)
            (other / "factors.json").write_bytes(data)
            factors = AdapterFactors(other)
            for name in factors.names:
                shape = factors.shape(name)
                assert factors.rows(name, 0, 1).shape == (1, shape[1])

        return read

    def read_config(self, data: bytes) -> None:
        place = self.folder / "other_base"
        if not place.exists():
            shutil.copytree(self.base, place)
        (place / "config.json").write_bytes(data)
        open_models(self.base, {"one": place})
        load_config(place)
        meta_model(place)

    def read_tokenizer(self, data: bytes) -> None:
        name, _, body = data.partition(b"\n")
        place = self.folder / "other_tokenizer"
        if not place.exists():
            shutil.copytree(self.base, place)
        for known in TOKENIZER:
            (place / known).write_bytes(body if known.encode() == name else (self.base / known).read_bytes())
        load_tokenizer(place).encode("a b c")

    def read_card(self, data: bytes) -> None:
        from manyshot.base_model import BaseModel
        from manyshot.card_text import front_matter, metadata, origin_of

        place = self.write("card/README.md", data).parent
        front_matter(metadata(origin_of(str(place), BaseModel("name", place, "")), "metis"))

    def read_record(self, data: bytes) -> None:
        name, _, body = data.partition(b"\n")
        if (known := name.decode("utf-8", "replace")) in self.records:
            self._read_run(known, body)

    def read_named(self, name: str) -> Callable[[bytes], None]:
        return lambda data: self._read_run(name, data)

    def _read_run(self, name: str, data: bytes) -> None:
        """Everything that looks at a run that is there, with one of its records changed; then the last refusal."""
        path = self.run / name
        path.write_bytes(data)
        refused: ManyshotError | None = None
        try:
            for read in (
                self._status,
                self._live,
                self._report,
                lambda: open_source(self.run, None),
                lambda: open_round(self.run, 2),
                lambda: find_model(str(self.run)),
                lambda: plan_upload(self.run, "me/model", private=True),
                lambda: check_files(self.run, lambda text: None, repair=False, how="--repair"),
            ):
                try:
                    read()
                except ManyshotError as error:
                    refused = error
        finally:
            path.write_bytes(self.records[name])
        if refused is not None:
            raise refused

    def _status(self) -> None:
        json.dumps(run_status(self.run))

    def _live(self) -> None:
        state = LiveRun(self.run).read()
        totals(state)
        troubles(state)
        json.dumps(live_json(state))

    def _report(self) -> None:
        found = build_report([self.run])
        render(found.page, manyshot.__version__)
        render_markdown(found.page)
        report_json(found)

    def read_results(self, data: bytes) -> None:
        self.write("compare/results.json", data)
        found = build_report([self.folder / "compare"])
        render(found.page, manyshot.__version__)
        report_json(found)

    def read_journal(self, data: bytes) -> None:
        folder = TuneFolder(self.write("tune/trials.jsonl", data).parent)
        read_trials(folder, 1)
        read_end(folder, 1)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode()


def _safetensors(tensors: dict[str, tuple[str, list[int]]]) -> bytes:
    """A file of zeros."""
    sizes = {"F32": 4, "BF16": 2, "BOOL": 1}
    header, end = {}, 0
    for name, (kind, shape) in tensors.items():
        count = sizes[kind] * int(torch.tensor(shape).prod()) if shape else sizes[kind]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + count]}
        end += count
    text = _json(header)
    return struct.pack("<Q", len(text)) + text + bytes(end)
