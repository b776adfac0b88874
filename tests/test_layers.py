"""Who may import whom, written down: a module that is not in the tables, or imports more than they say, fails here."""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "manyshot"

# module -> the modules of ours that it may import; operators, demo: all modules of that package
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "seeding": set(),
    "content": set(),
    "yaml_text": set(),
    "remote_code": {"errors"},
    "folder_links": {"errors"},
    "misshapen": {"errors"},
    "secret_text": set(),
    "fault_points": set(),
    "rundir": {"errors", "fault_points"},
    "process_mark": set(),
    "run_lock": {"errors", "process_mark", "rundir"},
    "memory": set(),
    "progress": {"memory", "rundir", "secret_text"},
    "executors": {"progress"},
    "executor_spec": {"task_spec"},
    "remote_job": {"disk", "errors", "memory", "progress", "rundir", "secret_text"},
    "workers": {"errors", "progress", "remote_job", "rundir"},
    "executor_choice": {
        *{"engine", "errors", "executor_spec", "executors", "inputs", "inspect_recipe", "memory", "models", "progress"},
        *{"ray_executor", "recipe", "workers"},
    },
    "measure_parts": {"evaluate", "executors", "progress", "rundir"},
    "ray_executor": {"engine", "errors", "executor_spec", "progress", "remote_code", "remote_job", "rundir"},
    "kernels": {"kernels"},
    "operators": {"kernels", "operators"},
    "demo": {"demo"},
    "tensors": {"errors", "rundir"},
    "removed": {"errors", "rundir"},
    "manifest": {"errors", "removed", "rundir", "tensors"},
    "tensor_writer": {"errors", "fault_points", "rundir", "tensors"},
    "task_vector": {"errors", "kernels", "rundir", "tensors"},
    "engine": {"task_vector"},
    "merge_report": {"engine"},
    "reading": {"engine", "errors", "kernels", "task_vector", "tensors"},
    "stream": {"engine", "errors", "kernels", "merge_report", "operators", "reading", "task_vector"},
    "adapters": {"errors", "reading", "rundir", "task_vector", "tensor_writer", "tensors"},
    "export": {"engine", "folder_links", "kernels", "rundir", "task_vector", "tensor_writer", "tensors"},
    "peft_adapter": {"errors", "folder_links", "misshapen", "rundir", "task_vector", "tensors"},
    "match": {"errors", "folder_links", "peft_adapter", "rundir", "task_vector", "tensors"},
    "outer": {"engine", "kernels", "task_vector", "tensor_writer", "tensors"},
    "outer_choice": {"outer", "recipe", "task_vector"},
    "round_merge": {
        "progress",
        *{"adapters", "engine", "errors", "kernels", "merge_report", "operators", "outer", "reading", "rundir"},
        *{"stream", "task_vector", "tensor_writer", "tensors"},
    },
    "merge_models": {
        *{
            "engine",
            "errors",
            "export",
            "kernels",
            "match",
            "round_merge",
            "merge_report",
            "operators",
            "reading",
            "rundir",
        },
        *{"stream", "task_vector", "tensor_writer", "tensors"},
    },
    "child_process": set(),
    "trainer_command": {"child_process", "errors"},
    "training_spec": {"task_spec", "trainer_command"},
    "launch_spec": {"errors", "training_spec", "yaml_text"},
    "launch_files": set(),
    "spread": set(),
    "quantized": {"errors", "models", "training_spec"},
    "launcher": {
        *{"child_process", "errors", "launch_files", "launch_spec", "process_mark", "progress", "rundir"},
        "training_spec",
    },
    "launched": {"launch_files", "launched_update", "process_mark", "progress", "rundir"},
    "launched_update": {
        *{"errors", "launch_spec", "local_update", "loss_gap", "models", "optimizer_state", "progress", "rundir"},
        *{"start_adapters", "tasks", "tensors", "trainer"},
    },
    "returned_expert": {"errors", "folder_links", "match", "peft_adapter", "rundir", "task_vector", "tensors"},
    "by_hand": {
        *{"base_model", "errors", "executors", "local_update", "manifest", "models", "peft_adapter"},
        *{"progress", "recipe", "returned_expert", "run_identity", "run_lock", "rundir", "steps", "steps_train"},
        *{"task_spec", "tasks", "tensors", "yaml_text"},
    },
    "by_hand_merge": {
        *{"by_hand", "card_text", "compare_render", "errors", "local_update", "manifest", "normalize", "progress"},
        *{"rounds", "run_lock", "rundir", "steps", "steps_guard", "steps_merge", "steps_train"},
    },
    "command_update": {
        *{"errors", "export", "models", "recipe", "returned_expert", "rundir", "seeding", "task_vector", "tensors"},
        "trainer_command",
    },
    "determinism": {
        *{"disk", "executors", "inputs", "progress", "recipe", "rounds", "run_identity", "rundir", "seeding", "steps"},
        "tensors",
    },
    "local_failure": {"disk", "errors", "local_update", "manifest", "progress", "rundir", "secret_text"},
    "steps_regression": {
        *{"errors", "guard_advice", "manifest", "models", "rundir", "status", "steps", "steps_merge"},
        *{"tensor_writer", "tensors"},
    },
    "allocation": set(),
    "optimizer_state": {"errors", "rundir", "tensor_writer", "tensors"},
    "start_adapters": {"recipe", "removed", "rundir", "training_spec"},
    "presets": {"task_spec"},
    "operator_choice": {"operators", "task_spec"},
    "recipe": {
        *{"executor_spec", "keep_spec", "operator_choice", "operators", "presets", "task_spec", "tracker_spec"},
        "training_spec",
    },
    "merge_recipe": {"gap_weights", "operator_choice", "operators", "presets", "recipe"},
    "mergekit_yaml": {"errors"},
    "tune_space": set(),
    "tune_recipe": {"errors", "recipe", "task_spec", "tune_space"},
    "recipe_problems": {
        "executor_spec",
        *{"benchmark_spec", "compare_recipe", "errors", "merge_recipe", "operators", "recipe", "tune_recipe"},
    },
    "recipe_file": {
        *{
            "secret_text",
            "yaml_text",
            "compare_recipe",
            "errors",
            "federated_recipe",
            "merge_recipe",
            "mergekit_yaml",
            "operators",
            "recipe",
            "recipe_problems",
            "tune_recipe",
        },
    },
    "federated_recipe": {"operator_choice", "operators", "recipe", "task_spec"},
    "federated": {
        *{"base_model", "errors", "export", "federated_recipe", "gap_weights", "match", "outer"},
        *{"outer_choice", "peft_adapter", "recipe_file", "round_merge", "rundir", "task_vector"},
        *{"tensor_writer", "tensors"},
    },
    "federated_client": {"models", "peft_adapter", "task_vector", "tensors"},
    "flower": {"base_model", "errors", "federated", "federated_client", "federated_recipe", "recipe_file"},
    "starter": {"errors", "executor_spec", "keep_spec", "operators", "presets", "recipe", "tracker_spec"},
    "status": {"yaml_text", "errors", "misshapen", "rundir", "segments", "task_spec"},
    "live_metrics": {"rundir"},
    "live_estimate": {"live_metrics", "status"},
    "live_state": {
        *{"errors", "live_estimate", "live_metrics", "misshapen", "process_mark", "progress", "rundir", "status"},
    },
    "live_text": {"live_metrics", "live_state", "status"},
    "serve": {"errors", "live_state", "live_text"},
    "workload": {"recipe", "tasks"},
    "tracker_spec": {"task_spec"},
    "keep_spec": {"task_spec"},
    "steps_keep": {"optimizer_state", "removed", "start_adapters", "steps"},
    "tracker_backends": {"tracker_spec"},
    "trackers": {"errors", "progress", "recipe", "rundir", "tracker_backends", "tracker_spec"},
    "data_files": {"demo", "errors"},
    "task_spec": set(),
    "sources": {"data_files", "errors", "seeding", "task_spec"},
    "examples": {"data_files", "errors", "task_spec"},
    "tasks": {"content", "data_files", "errors", "examples", "recipe", "seeding", "sources", "task_spec"},
    "metrics": {"demo", "errors", "examples"},
    "model_guard": {"errors"},
    "models": {
        "model_guard",
        *{"remote_code", "errors", "launch_spec", "recipe", "rundir", "seeding", "spread", "task_vector"},
        *{"tensor_writer", "tensors"},
    },
    "base_model": {"errors", "folder_links", "models", "remote_code", "rundir", "tensors"},
    "gap_weights": {"errors", "operators"},
    "loss_gap": {"errors", "tasks"},
    "trainer": {"errors", "loss_gap", "models", "optimizer_state", "recipe", "tasks"},
    "local_update": {
        *{"launcher", "quantized"},
        *{
            "command_update",
            "errors",
            "examples",
            "loss_gap",
            "manifest",
            "models",
            "optimizer_state",
            "peft_adapter",
            "progress",
            "recipe",
            "rundir",
            "seeding",
            "start_adapters",
            "tasks",
            "tensors",
            "tracker_backends",
            "trackers",
            "trainer",
        },
    },
    "normalize": set(),
    "evaluate": {
        *{"examples", "local_update", "loss_gap", "manifest", "metrics", "models", "progress", "recipe", "rundir"},
        "tasks",
    },
    "disk": {"errors"},
    "inspect_input": {
        "removed",
        *{"errors", "match", "misshapen", "reading", "rundir", "start_adapters", "status", "task_vector", "tensors"},
        "yaml_text",
    },
    "inspect_models": {"engine", "errors", "inspect_input", "merge_report", "reading", "task_vector"},
    "merge_gaps": {
        *{
            "base_model",
            "data_files",
            "gap_weights",
            "local_update",
            "merge_recipe",
            "models",
            "progress",
            "recipe",
            "tasks",
        }
    },
    "merge_command": {
        *{"yaml_text", "export", "match", "tensors"},
        *{
            "base_model",
            "disk",
            "errors",
            "merge_gaps",
            "merge_models",
            "merge_recipe",
            "merge_report",
            "mergekit_yaml",
        },
        *{"card_text", "compare_render", "progress", "recipe_file"},
    },
    "benchmark_spec": {"errors", "harness_presets", "recipe"},
    "compare_benchmarks": {
        *{"benchmark_spec", "errors", "harness", "harness_data", "hub", "models", "progress", "recipe", "rundir"},
        *{"tensors"},
    },
    "compare_methods": {"errors", "operator_choice", "operators", "presets", "recipe"},
    "compare_spec": {"benchmark_spec", "compare_methods", "operators", "presets", "recipe"},
    "compare_checks": {"benchmark_spec", "compare_methods", "compare_spec", "recipe"},
    "compare_recipe": {"compare_checks", "compare_methods", "compare_spec", "presets", "recipe"},
    "compare_plan": {"compare_recipe", "line_search", "recipe", "rundir"},
    "compare_gain": {"gap_weights", "normalize"},
    "compare_folder": {
        *{
            "secret_text",
            "yaml_text",
            "compare_methods",
            "compare_recipe",
            "older_recipe",
            "errors",
            "inputs",
            "models",
            "recipe_file",
        },
        *{"rundir", "run_identity"},
    },
    "compare_inputs": {
        *{"compare_benchmarks", "compare_plan", "compare_recipe", "errors", "inputs", "models", "progress", "recipe"},
        *{"rundir", "tasks", "trainer"},
    },
    "compare_jobs": {
        *{"benchmark_spec", "compare_benchmarks"},
        *{"base_model", "errors", "evaluate", "executors", "local_update", "manifest", "models", "optimizer_state"},
        *{"outer", "progress", "recipe", "rounds", "rundir", "secret_text", "seeding", "steps", "tasks"},
    },
    "compare_results": {
        "compare_benchmarks",
        "compare_folder",
        "compare_gain",
        "compare_jobs",
        "compare_plan",
        "compare_recipe",
        "normalize",
        "rundir",
    },
    "compare_place": {
        *{"compare_benchmarks", "compare_folder", "compare_inputs", "compare_jobs", "compare_methods", "compare_plan"},
        *{"compare_recipe", "content", "executors", "inputs", "local_update", "models", "progress", "recipe"},
        *{"rundir", "steps", "steps_train", "tasks"},
    },
    "compare_trials": {
        *{"compare_gain", "compare_inputs", "compare_jobs", "compare_place", "compare_plan", "compare_recipe"},
        *{"content", "rundir"},
    },
    "comparison": {
        *{"compare_folder", "compare_inputs", "compare_jobs", "compare_outputs", "compare_place", "compare_plan"},
        *{"compare_recipe", "compare_results", "compare_trials", "disk", "executor_choice", "manifest"},
        "progress",
        *{"run_lock", "rundir"},
    },
    "compare_statistics": {"errors", "rundir"},
    "compare_grid": {"compare_statistics", "errors"},
    "compare_render": {"compare_statistics"},
    "compare_tables": {"compare_grid", "compare_render", "compare_statistics"},
    "compare_rounds": {"compare_grid"},
    "compare_detail_tables": {"compare_gain", "compare_grid", "compare_render", "compare_rounds", "compare_tables"},
    "compare_gain_tables": {"compare_grid", "compare_render", "compare_statistics", "compare_tables", "gap_weights"},
    "compare_drawing": {"compare_grid", "compare_render", "compare_statistics", "errors", "rundir"},
    "compare_round_figures": {"compare_drawing", "compare_grid", "compare_rounds", "compare_statistics"},
    "compare_figures": {"compare_drawing", "compare_grid", "compare_round_figures", "compare_tables", "rundir"},
    "compare_outputs": {
        *{"compare_detail_tables", "compare_figures", "compare_gain_tables", "compare_grid", "compare_render"},
        *{"compare_tables", "errors", "rundir"},
    },
    "inputs": {
        *{"launcher", "quantized"},
        *{"allocation", "base_model", "errors", "evaluate", "local_update", "match", "metrics", "models"},
        *{"export", "recipe", "rundir", "sizes", "tasks", "tensors", "trainer"},
    },
    "report_data": {"compare_gain", "normalize"},
    "report_examples": {"report_data", "rundir"},
    "report_resources": {"progress", "report_data", "rundir"},
    "report_read": {"yaml_text", "errors", "report_data", "report_examples", "report_resources", "rundir", "status"},
    "report_compare": {
        *{"compare_gain", "compare_grid", "compare_rounds", "compare_statistics", "errors", "report_data"},
        *{"report_examples", "report_read", "report_resources", "status"},
    },
    "report_page": {"compare_render", "report_data"},
    "report_figures": {"report_data", "report_page"},
    "report_verdict": {"compare_statistics", "errors", "report_data", "report_page"},
    "report_build": {
        *{"compare_grid", "compare_outputs", "compare_render", "errors", "report_compare", "report_data", "misshapen"},
        *{"report_examples", "report_figures", "report_page", "report_read", "report_resources", "report_rounds"},
        *{"report_verdict"},
    },
    "report_rounds": {"report_data", "report_figures", "report_page"},
    "report_html": {"report_page"},
    "report_markdown": {"compare_render", "report_data", "report_page"},
    "report_command": {"errors", "report_build", "report_html", "report_markdown", "report_page", "rundir"},
    "steps": {
        *{"base_model", "evaluate", "executors", "manifest", "models", "normalize", "progress", "recipe", "rundir"},
        *{"measure_parts", "tasks", "trackers"},
    },
    "steps_train": {
        "executors",
        *{"allocation", "content", "evaluate", "gap_weights", "local_update", "models", "optimizer_state", "recipe"},
        *{"errors", "local_failure", "rundir", "start_adapters", "status", "steps", "tasks", "tensors"},
        *{"manifest", "removed", "training_spec"},
    },
    "line_search": {"gap_weights"},
    "steps_search": {"evaluate", "gap_weights", "line_search", "measure_parts", "rundir", "steps"},
    "round_record": {"gap_weights"},
    "guard_advice": {"gap_weights", "operators", "recipe"},
    "guards": {"gap_weights", "guard_advice", "recipe", "round_record"},
    "steps_guard": {"guards", "round_record", "rundir", "steps"},
    "steps_merge": {
        "merge_report",
        "removed",
        "segments",
        *{"adapters", "errors", "export", "gap_weights", "manifest", "match", "models", "operators", "outer"},
        *{"outer_choice", "round_merge", "rundir", "steps", "steps_guard", "steps_search", "steps_train"},
        *{"task_vector", "tensors"},
    },
    "card_text": {"yaml_text", "base_model", "compare_render"},
    "card": {"card_text", "compare_render", "normalize", "rundir", "steps", "task_spec"},
    "push": {"errors", "misshapen", "rundir", "status"},
    "rounds": {
        "card",
        "manifest",
        "models",
        "normalize",
        "rundir",
        "steps",
        "steps_extend",
        "steps_guard",
        "steps_keep",
        "steps_merge",
        "steps_regression",
        "steps_train",
    },
    "check_merged": {"errors", "evaluate", "local_update", "measure_parts", "models", "rundir", "steps", "tensors"},
    "segments": {"errors", "rundir"},
    "steps_extend": {
        *{"evaluate", "manifest", "models", "normalize", "older_recipe", "recipe", "recipe_file", "segments", "steps"},
        *{"steps_train", "training_spec"},
    },
    "extend_command": {
        *{"disk", "errors", "executors", "gap_weights", "inputs", "manifest", "outer", "progress", "recipe"},
        *{"recipe_file", "removed", "run_identity", "run_lock", "rundir", "runner", "segments", "start_adapters"},
        "status",
    },
    "older_recipe": {"content", "errors", "operators", "recipe_file", "yaml_text"},
    "run_identity": {
        *{"base_model", "errors", "models", "older_recipe", "recipe", "recipe_file", "rundir", "secret_text", "tasks"},
        *{"tensors", "trainer_command", "yaml_text"},
    },
    "runner": {
        *{"check_merged", "disk", "errors", "executors", "inputs", "manifest", "models", "process_mark", "progress"},
        "trainer_command",
        *{"recipe", "report_command", "rounds", "run_identity", "run_lock", "rundir", "seeding", "steps", "trackers"},
        *{"executor_choice", "removed", "steps_extend", "workload"},
    },
    "sizes": {"export", "models", "outer", "recipe", "tensor_writer", "tensors"},
    "inspect_recipe": {"errors", "line_search", "models", "recipe", "inputs", "sizes", "tasks", "tensors", "trainer"},
    "hub": set(),
    "harness_tasks": {"harness_tasks"},
    "harness_presets": {"errors"},
    "harness_data": {"data_files", "errors", "metrics", "recipe", "tasks"},
    "harness": {"errors", "harness_data", "harness_tasks", "hub", "seeding"},
    "eval_model": {
        "removed",
        *{"base_model", "errors", "local_update", "misshapen", "models", "peft_adapter", "recipe_file", "rundir"},
        *{"start_adapters", "task_vector", "tensors"},
    },
    "judge": {"eval_model", "harness_tasks", "loss_gap", "models", "recipe", "tasks"},
    "eval_command": {
        *{"errors", "eval_model", "evaluate", "harness", "harness_data", "harness_presets", "inputs", "models"},
        *{"harness_tasks", "judge", "progress", "recipe", "recipe_file", "rundir", "tasks"},
    },
    "tune_plan": {"tune_recipe"},
    "tune_sampler": {"errors", "tune_space"},
    "tune_folder": {
        *{"yaml_text", "errors", "inputs", "models", "recipe_file", "run_identity", "rundir", "tune_recipe"},
        *{"tune_sampler", "tune_space"},
    },
    "tune_results": {"tune_folder", "tune_recipe", "tune_sampler", "tune_space"},
    "tune_figures": {"compare_drawing", "tune_space"},
    "tune_outputs": {"compare_drawing", "compare_render", "errors", "rundir", "tune_figures", "tune_space"},
    "tuning": {
        *{"compare_gain", "compare_jobs", "disk", "errors", "executor_choice", "inputs", "manifest", "models"},
        "progress",
        *{"recipe", "recipe_file", "rounds", "run_identity", "run_lock", "rundir", "seeding", "steps", "steps_merge"},
        "steps_train",
        *{"tune_folder", "tune_outputs", "tune_recipe", "tune_results", "tune_sampler", "tune_space"},
    },
    "go_template": set(),
    "export_source": {
        *{"base_model", "errors", "misshapen", "operators", "recipe", "rundir", "status", "tensors", "yaml_text"},
    },
    "export_folder": {
        *{"errors", "export", "export_card", "export_source", "rundir", "task_vector", "tensors"},
    },
    "export_lora": {"peft_adapter", "rundir", "task_vector", "tensor_writer"},
    "export_adapter": {
        *{"adapters", "errors", "export_lora", "export_source", "models", "rundir", "task_vector"},
    },
    "export_losses": {
        *{"errors", "evaluate", "export_source", "inputs", "models", "progress", "rundir", "tasks"},
    },
    "export_mergekit": {
        "removed",
        *{"errors", "export", "export_folder", "export_lora", "export_source", "local_update", "models", "operators"},
        *{"peft_adapter", "rundir", "start_adapters", "task_vector", "tensors"},
    },
    "export_chat": {"go_template"},
    "export_hints": set(),
    "export_card": {"base_model", "card_text", "compare_render", "export_source"},
    "export_command": {
        *{"disk", "errors", "export_adapter", "export_card", "export_chat", "export_folder", "export_hints"},
        *{"export_losses", "export_mergekit", "export_source", "merge_recipe", "models", "peft_adapter", "rundir"},
        *{"tensor_writer", "tensors"},
    },
    "api": {
        "compare_recipe",
        "comparison",
        "extend_command",
        "merge_command",
        "merge_recipe",
        "progress",
        "recipe",
        "recipe_file",
        "report_command",
        "runner",
        "tune_recipe",
        "tuning",
    },
}
# the outermost layer: it may import everything, and nothing imports it
OUTERMOST = ("__init__", "__main__", "cli")

# package -> the only modules that may import it (anywhere in them)
DOORS: dict[str, set[str]] = {
    "transformers": {"models", "trainer", "loss_gap", "evaluate", "tracker_backends"},
    "peft": {"models"},
    "trl": {"trainer"},
    "datasets": {"data_files", "harness", "hub", "models", "trainer"},
    "lm_eval": {"harness"},
    "nltk": {"harness"},
    "accelerate": {"launcher", "spread"},
    "bitsandbytes": {"quantized"},
    "tokenizers": set(),
    "huggingface_hub": {"base_model", "hub", "cli_runs", "push"},
    "pyarrow": {"data_files"},
    "safetensors": {"tensors", "disk"},
    "pydantic": {
        "benchmark_spec",
        "compare_checks",
        "compare_methods",
        "compare_recipe",
        "compare_spec",
        "executor_spec",
        "federated_recipe",
        "keep_spec",
        "launched_update",
        "launcher",
        "merge_recipe",
        "operator_choice",
        "presets",
        "recipe",
        "recipe_file",
        "recipe_problems",
        "starter",
        "task_spec",
        "tracker_spec",
        "training_spec",
        "tune_recipe",
    },
    "pydantic_core": {
        *{
            "benchmark_spec",
            "compare_checks",
            "compare_methods",
            "merge_recipe",
            "operator_choice",
            "recipe",
            "starter",
            "task_spec",
            "training_spec",
        },
    },
    "jinja2": {"report_html"},
    "markupsafe": {"report_html"},
    "typer": {
        "cli",
        "cli_compare",
        "cli_eval",
        "cli_export",
        "cli_inspect",
        "cli_merge",
        "cli_report",
        "cli_round",
        "cli_runs",
        "cli_tune",
    },
    "rich": {"cli_eval", "cli_inspect_view", "cli_live", "cli_view"},
    "matplotlib": {"cli_inspect_view", "compare_drawing", "compare_figures", "compare_round_figures", "tune_figures"},
    "gguf": set(),
    "tensorboard": set(),
    "wandb": {"tracker_backends"},
    "trackio": {"tracker_backends"},
    "mlflow": {"tracker_backends"},
    "optuna": {"tune_sampler"},
    "flwr": {"flower"},
    "ray": {"ray_executor"},
}
FORBIDDEN = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
OPERATOR_IMPORTS = {"torch", "numpy", "annotated_types"}
KERNEL_IMPORTS = {"torch", "numpy"}
# what operators share with each other, beside the kernels
OPERATOR_PARTS = {f"operators.{part}" for part in ("_base", "_norm", "_plan", "_spectral", "_trim")}


def name_of(file: Path) -> str:
    """`merge` for merge.py; `operators.metis`, `operators` for files of a package."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


@cache
def imports(name: str) -> tuple[str, ...]:
    """Every absolute dotted name that a module imports, inside functions too; `from a import b` gives `a.b`."""
    found = []
    for node in ast.walk(ast.parse(FILES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return tuple(found)


def own_imports(name: str) -> set[str]:
    """The modules of ours, as in FILES, that a module imports."""
    found = set()
    for dotted in imports(name):
        if dotted.split(".")[0] == "manyshot":
            parts = dotted.split(".")[1:]
            candidates = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
            found.add(next((candidate for candidate in candidates if candidate in FILES), "__init__"))
    return found - {name}


def top(name: str) -> str:
    return name.split(".", maxsplit=1)[0]


def is_outermost(name: str) -> bool:
    return top(name).startswith(OUTERMOST)


def test_layers_table_names_every_module() -> None:
    modules = {top(name) for name in FILES if not is_outermost(name)}
    assert modules == set(ALLOWED), "add the module to ALLOWED, and say there what it may import"


@pytest.mark.parametrize("name", sorted(name for name in FILES if not is_outermost(name)))
def test_layers_let_a_module_import_only_what_the_table_says(name: str) -> None:
    found = {top(other) for other in own_imports(name)}
    assert found - {top(name)} <= ALLOWED[top(name)]
    assert top(name) in ALLOWED[top(name)] or top(name) not in found


def test_layers_table_allows_nothing_that_goes_in_a_circle() -> None:
    order: list[str] = []
    remaining = {module: allowed - {module} for module, allowed in ALLOWED.items()}
    while remaining:
        free = [module for module, allowed in remaining.items() if allowed <= set(order)]
        assert free, f"these import each other: {sorted(remaining)}"
        order += free
        remaining = {module: allowed for module, allowed in remaining.items() if module not in free}
    assert order.index("errors") < order.index("rundir") < order.index("round_merge") < order.index("runner")


def test_layers_have_no_cycle_among_files() -> None:
    remaining = {name: own_imports(name) for name in FILES if name != "__init__"}
    done = {"__init__"}  # it holds names that are looked up when they are asked for
    while remaining:
        free = {name for name, needed in remaining.items() if needed <= done}
        assert free, f"these import each other: {sorted(remaining)}"
        done |= free
        remaining = {name: needed for name, needed in remaining.items() if name not in free}


def test_layers_keep_the_command_line_outermost() -> None:
    for name in FILES:
        if not is_outermost(name):
            assert not {other for other in own_imports(name) if is_outermost(other)}, name


@pytest.mark.parametrize("package", sorted(DOORS))
def test_layers_give_a_heavy_package_one_door(package: str) -> None:
    importers = {top(name) for name in FILES if any(top(dotted) == package for dotted in imports(name))}
    assert importers <= DOORS[package]


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("operators.")))
def test_layers_keep_operators_pure(name: str) -> None:
    shares = {"operators.metis"} if name == "operators.consensus_ta" else set()  # the agreement that both ask for
    assert own_imports(name) <= {"kernels", *OPERATOR_PARTS, *shares}
    outside = {top(dotted) for dotted in imports(name)} - {"manyshot", "__future__"}
    assert {package for package in outside if package not in sys.stdlib_module_names} <= OPERATOR_IMPORTS
    assert not outside & {"os", "io", "pathlib", "random", "time", "subprocess"}


@pytest.mark.parametrize("name", sorted(name for name in FILES if top(name) == "kernels"))
def test_layers_keep_kernels_on_torch_and_ctypes(name: str) -> None:
    outside = {top(dotted) for dotted in imports(name)} - {"manyshot", "__future__"}
    assert {package for package in outside if package not in sys.stdlib_module_names} <= KERNEL_IMPORTS
    assert not outside & {"io", "random", "time", "subprocess", "shutil", "threading"}
    if name != "kernels._native":  # which finds the library that the installation compiled
        assert not outside & {"pathlib"}


def test_layers_have_no_pickle_anywhere() -> None:
    for name, file in FILES.items():
        assert not [dotted for dotted in imports(name) if top(dotted) in FORBIDDEN], name
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), f"{name}: torch.{node.attr} reads or writes pickles"


def test_layers_below_the_recipe_do_not_import_torch() -> None:
    for name in ("errors", "rundir", "progress", "executors", "status"):
        assert "torch" not in {top(dotted) for dotted in imports(name)}, name
    for name in ("metrics", "data_files", "recipe_file"):
        assert not {top(dotted) for dotted in imports(name)} & {"torch", "transformers"}, name


def test_layers_keep_files_and_functions_within_their_budgets() -> None:
    for name, file in FILES.items():
        text = file.read_text("utf-8")
        assert text.count("\n") <= 400, f"{name}: more than 400 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                limit = 150 if name == "rounds" else 60
                assert node.end_lineno - node.lineno < limit, f"{name}.{node.name}: more than {limit} lines"
