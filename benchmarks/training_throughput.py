"""Training throughput of a local update beside a bare TRL SFTTrainer: same model, examples, order, batches, LoRA.

    python benchmarks/training_throughput.py [steps]

Prints tokens/s of both, measured in turns in one process, and their ratio (above 1: ours is faster).
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from statistics import median

from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from manyshot.base_model import find_base_model
from manyshot.demo import RECIPE_FILE
from manyshot.models import ModelState, add_adapter, choose_placement, load_model, load_tokenizer, quiet_transformers
from manyshot.recipe import Recipe
from manyshot.recipe_file import load_recipe
from manyshot.tasks import Task, encode_all, load_task
from manyshot.trainer import make_trainer

ROUNDS_OF_MEASUREMENT = 3


def bare_trl(recipe: Recipe, task: Task, tokenizer, state: ModelState, steps: int) -> float:
    """Seconds of SFTTrainer.train() on the examples as messages, as TRL's documentation does it."""
    update = recipe.local_update
    rows = [
        {
            "prompt": [*example.prompt],
            "completion": [{"role": "assistant", "content": example.completion}],
        }
        for example in task.train[: steps * update.batch_size]
    ]
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=load_model(state, choose_placement(update)),
            args=SFTConfig(
                output_dir=scratch,
                max_steps=steps,
                per_device_train_batch_size=update.batch_size,
                learning_rate=update.learning_rate,
                max_length=update.max_length,
                bf16=False,
                activation_checkpointing=False,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                train_sampling_strategy="sequential",
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=LoraConfig(
                r=update.rank,
                lora_alpha=update.alpha,
                target_modules=list(update.target_modules),
                task_type="CAUSAL_LM",
            ),
        )
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started


def ours(recipe: Recipe, task: Task, tokenizer, state: ModelState, steps: int) -> tuple[float, int]:
    """Seconds of a local update's trainer on the same examples, and their tokens."""
    update = recipe.local_update
    placement = choose_placement(update)
    examples = task.train[: steps * update.batch_size]
    encoded = encode_all(examples, tokenizer, task, "train", update.max_length, update.loss_on)
    model = add_adapter(load_model(state, placement), recipe, task.name, (0, "benchmark"), None)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = make_trainer(
            model,
            tokenizer,
            encoded,
            update,
            placement,
            multipliers=[1.0] * steps,
            seed=0,
            scratch=scratch,
            on_step=lambda count, loss: None,
        )
        started = time.perf_counter()
        trainer.train()
        return time.perf_counter() - started, sum(len(example.input_ids) for example in encoded)


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    warnings.simplefilter("ignore", FutureWarning)
    recipe = load_recipe(RECIPE_FILE)
    state = ModelState(find_base_model(recipe.model).path)
    tokenizer = load_tokenizer(state.pretrained)
    ratios = []
    with quiet_transformers():
        for name in ("math", "instruction"):
            task = load_task(recipe, name)
            for _ in range(ROUNDS_OF_MEASUREMENT):
                bare = bare_trl(recipe, task, tokenizer, state, steps)
                own, tokens = ours(recipe, task, tokenizer, state, steps)
                ratios.append(bare / own)
                rates = f"bare TRL {tokens / bare:.0f} tokens/s, manyshot {tokens / own:.0f}"
                print(f"{name}: {rates}, ratio {bare / own:.2f}", flush=True)
    print(f"median ratio over {len(ratios)} pairs: {median(ratios):.2f} (lowest {min(ratios):.2f})")


if __name__ == "__main__":
    main()
