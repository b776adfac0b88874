"""A team's part of a round by hand: train the round's model on data that stays here, and say the two losses.

    python examples/any_trainer/team.py MODEL TRAIN.jsonl VALIDATION.jsonl OUTPUT [STEPS]

MODEL is the folder that the coordinator gave for this round. OUTPUT gets a PEFT adapter; what is printed goes with it
to the coordinator: `--loss-merged` is MODEL's loss on the validation rows, `--loss-expert` that of what was trained.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from train import encode, losses, read_rows, train

MAX_LENGTH = 512


def mean_loss(model, encoded):
    """Mean cross-entropy over the counted tokens of all rows."""
    model.eval()
    with torch.inference_mode():
        found = [(nats.item(), count) for nats, count in losses(model, encoded)]
    model.train()
    return sum(nats for nats, _ in found) / sum(count for _, count in found)


def as_chat(row):
    """Texts as turns of a conversation, as the other teams of the example have them."""
    prompt, completion = row["prompt"], row["completion"]
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def main():
    start, training, validation, output = sys.argv[1:5]
    steps = int(sys.argv[5]) if len(sys.argv) > 5 else 4
    tokenizer = AutoTokenizer.from_pretrained(start)
    rows = [[encode(as_chat(row), tokenizer, MAX_LENGTH) for row in read_rows(path)] for path in (training, validation)]
    model = AutoModelForCausalLM.from_pretrained(start)
    before = mean_loss(model, rows[1])
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    train(model, rows[0], steps=steps, batch_size=4, learning_rate=3e-3, tell=lambda *args, **kwargs: None)
    model.save_pretrained(output)
    print(f"--loss-merged {before:.6f} --loss-expert {mean_loss(model, rows[1]):.6f}")


if __name__ == "__main__":
    main()
