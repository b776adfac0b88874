"""How tasks train: in how many rounds, with how many steps, and what one task's local update does."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from manyshot.task_spec import Count, Section
from manyshot.trainer_command import command_problem


class Protocol(Section):
    """How often to merge. rounds: 1 is post-hoc merging."""

    rounds: Count = Field(5, description="merging rounds R")
    local_steps: Count = Field(50, description="optimizer steps per task, over all rounds")
    allocation: Literal["even", "gap"] = Field(
        "even", description="gap: from round 2 on, more steps for tasks that had more weight in the round before"
    )
    on_failure: Literal["stop", "skip_task_this_round"] = Field(
        "stop", description="when a task's local update fails: end the run, or merge the round without that task"
    )

    @model_validator(mode="after")
    def _a_step_per_round(self) -> Protocol:
        if self.local_steps < self.rounds:
            raise PydanticCustomError(
                "starved",
                "local_steps is {steps} for {rounds} rounds; every round needs at least one step per task",
                {"steps": self.local_steps, "rounds": self.rounds},
            )
        return self

    def steps_in_round(self, round_index: int) -> int:
        """Steps of round 1..R; the first rounds take what does not divide evenly."""
        even, rest = divmod(self.local_steps, self.rounds)
        return even + (1 if round_index <= rest else 0)

    def steps_before_round(self, round_index: int) -> int:
        return sum(self.steps_in_round(earlier) for earlier in range(1, round_index))

    def share(self, part: float) -> Protocol:
        """The protocol of a task that takes this part of the steps, at least one a round."""
        return self.model_copy(update={"local_steps": max(self.rounds, round(part * self.local_steps))})


# what only method: command has, and what a trainer of one's own decides for itself
FOR_COMMAND = {"command": "is for method: command"}
BY_COMMAND = {
    "adapter_start": "is for adapters that are trained here; a command starts from the merged model itself (fresh)",
    "train_factors": "is for adapters that are trained here; a command decides what it trains",
    "optimizer_state": "is for training here; a command starts its optimizer itself",
    "proximal": "is for training here; a command decides its loss itself",
    "trainer": "are arguments of the trainer here; a command has its own",
    "quantization": "is for training here; a command decides what it trains on",
    "launcher": "is for training here; a command starts its processes itself",
    "launch": "is for launcher: accelerate",
}


Quantization = Literal["none", "8bit", "4bit"]


class LocalUpdate(Section):
    """How one task fine-tunes from the round's start model."""

    method: Literal["lora", "full", "command"] = Field(
        "lora", description="full trains all weights; command: a program of your own trains (docs/any_trainer.md)"
    )
    command: str | None = Field(
        None, description="that program and its arguments, with {start}, {output}, {data}, {steps}, {seed}, … in them"
    )
    time_limit: float | None = Field(
        None, gt=0, description="seconds after which a command or a launch is ended and has failed"
    )
    rank: Count = Field(16, description="of every adapter")
    alpha: float = Field(16, gt=0, description="an adapter adds alpha/rank · B·A")
    dropout: float = Field(0.0, ge=0, lt=1, description="of what goes into an adapter, in training")
    rslora: bool = Field(False, description="scale by alpha/√rank instead of alpha/rank")
    rank_pattern: dict[str, Count] = Field(default_factory=dict, description="rank by module name pattern, as in PEFT")
    alpha_pattern: dict[str, float] = Field(default_factory=dict, description="alpha by module name pattern")
    target_modules: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj"), min_length=1, description="endings of the names of adapted layers"
    )
    adapter_start: Literal["fresh", "averaged", "svd", "own"] = Field(
        "fresh", description="what a round's adapters start from; all are exact"
    )
    train_factors: Literal["both", "b", "alternate"] = Field(
        "both", description="b: A is frozen and the same for all tasks; alternate: B in odd rounds, A in even ones"
    )
    learning_rate: float = Field(3.0e-4, gt=0, description="of AdamW, after the warm-up")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    schedule_scope: Literal["round", "run"] = Field(
        "round", description="round: the schedule starts anew every round; run: it decays once, over all rounds"
    )
    warmup_steps: int = Field(2, ge=0, description="in every round where the optimizer restarts, once where it is kept")
    optimizer_state: Literal["restart", "kept"] = Field(
        "restart", description="kept: each task's AdamW moments go on from round to round"
    )
    proximal: float = Field(0.0, ge=0, description="μ of FedProx: adds μ/2 ‖θ − start‖² of what is trained to the loss")
    batch_size: Count = Field(8, description="examples of an optimizer step")
    micro_batch_size: Count | None = Field(None, description="examples at once; the rest is gradient accumulation")
    max_length: Annotated[int, Field(ge=2)] = Field(512, description="tokens of an example; see a task's `overlong`")
    loss_on: Literal["completion", "whole_text"] = Field("completion", description="which tokens are trained on")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a GPU that has it, float32 on CPU"
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps")
    attn_implementation: str | None = Field(
        None, description="transformers' name: eager, sdpa, …; its own choice when not given"
    )
    quantization: Quantization = Field(
        "none", description="weights that adapters train on, by bitsandbytes; merged and measured are the full ones"
    )
    launcher: Literal["none", "accelerate"] = Field(
        "none", description="accelerate: a local update runs in several processes of this machine (docs/distributed.md)"
    )
    launch: dict[str, Any] = Field(
        default_factory=dict, description="arguments of accelerate launch: num_processes, config_file, use_fsdp, fsdp_…"
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="further arguments of TRL's SFTConfig")

    @model_validator(mode="after")
    def _batches_divide(self) -> LocalUpdate:
        micro = self.micro_batch_size
        if micro is not None and self.batch_size % micro:
            raise PydanticCustomError(
                "micro_batch",
                "batch_size {batch} is not a multiple of micro_batch_size {micro}",
                {"batch": self.batch_size, "micro": micro},
            )
        return self

    @model_validator(mode="after")
    def _adapters_on_rounded_weights(self) -> LocalUpdate:
        if self.quantization != "none" and (self.method == "full" or self.launcher != "none"):
            why = "rounds weights that stay as they are, and method: full trains all of them"
            why = (
                why if self.method == "full" else "is for one process; launcher: accelerate has shards for large models"
            )
            raise PydanticCustomError("quantization", "quantization {why}", {"why": why})
        return self

    @model_validator(mode="after")
    def _a_command_trains(self) -> LocalUpdate:
        if self.method == "command":
            problem = (
                "is missing, and method: command runs it" if self.command is None else command_problem(self.command)
            )
            if problem:
                raise PydanticCustomError("command", "command {problem}", {"problem": problem})
        told = BY_COMMAND if self.method == "command" else FOR_COMMAND
        if self.method != "command" and self.launcher == "none":
            told = told | {
                "time_limit": "is for method: command and launcher: accelerate",
                "launch": "is for launcher: accelerate",
            }
        for name, why in told.items():
            if getattr(self, name) != LocalUpdate.model_fields[name].get_default(call_default_factory=True):
                raise PydanticCustomError("command", "{name} {why}", {"name": name, "why": why})
        return self
