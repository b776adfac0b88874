"""A trainer of one's own, as small as it can be: LoRA with transformers and peft, told by {config} what to do.

    command: python examples/any_trainer/train.py {config}

It takes exactly the steps that it is told, on the rows in their order, from the model in `start`, and leaves an adapter
in `output`. Whatever does these four things can stand in its place.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def encode(row, tokenizer, max_length):
    """Token ids of a row, and how many of them, at its beginning, are not trained on."""
    if "text" in row:
        return [*tokenizer.encode(row["text"]), tokenizer.eos_token_id][:max_length], 1
    if isinstance(row["prompt"], str):
        prompt = tokenizer.encode(row["prompt"])
        answer = [*tokenizer.encode(row["completion"], add_special_tokens=False), tokenizer.eos_token_id]
        return (prompt + answer)[:max_length], len(prompt)
    template = {"tokenize": True, "return_dict": True}
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, **template)["input_ids"]
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **template)["input_ids"]
    return whole[:max_length], len(prompt)


def losses(model, encoded):
    """For each row the sum of −log p over its counted tokens, and how many these are."""
    for ids, skip in encoded:
        labels = torch.tensor([[-100] * skip + ids[skip:]], device=model.device)
        mean = model(input_ids=torch.tensor([ids], device=model.device), labels=labels).loss
        yield mean * (len(ids) - skip), len(ids) - skip


def train(model, encoded, *, steps, batch_size, learning_rate, tell=print):
    """`steps` steps of AdamW over the rows, from the first on, around again where they end."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    for step in range(steps):
        batch = [encoded[i % len(encoded)] for i in range(step * batch_size, (step + 1) * batch_size)]
        counted = sum(len(ids) - skip for ids, skip in batch)
        total = 0.0
        for nats, _ in losses(model, batch):
            (nats / counted).backward()
            total += nats.item() / counted
        optimizer.step()
        optimizer.zero_grad()
        tell(f"step {step + 1}: loss {total:.4f}", flush=True)


def main():
    config = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.manual_seed(config["seed"])
    tokenizer = AutoTokenizer.from_pretrained(config["start"])
    model = AutoModelForCausalLM.from_pretrained(config["start"]).to(config["device"])
    targets = config["local_update"]["target_modules"]
    lora = LoraConfig(r=config["rank"], lora_alpha=config["alpha"], target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    encoded = [encode(row, tokenizer, config["max_length"]) for row in read_rows(config["data"])]
    settings = {name: config[name] for name in ("steps", "batch_size", "learning_rate")}
    train(model, encoded, **settings)
    model.save_pretrained(config["output"])


if __name__ == "__main__":
    main()
