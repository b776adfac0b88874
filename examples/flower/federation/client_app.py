"""A client: its own examples, a few steps of fine-tuning from the round's model, its expert and two losses back."""

import random
from tempfile import TemporaryDirectory

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from federation.data import find_model, make_examples
from federation.settings import settings_of
from manyshot.flower import add_start, expert_reply

IGNORED = -100
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Fine-tune from Θʳ⁻¹ and send the expert, with L(Θʳ⁻¹) and L(θ) on the client's validation data."""
    settings = settings_of(context)
    task = task_of(context, settings)
    model, tokenizer = load(message, settings)
    validation = batch(tokenizer, make_examples(task, settings["examples"], "validation"))
    start_loss = loss_of(model, validation)
    if settings["method"] == "lora":
        torch.manual_seed(settings["seed"])
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        config = LoraConfig(
            r=settings["rank"], lora_alpha=settings["rank"], target_modules=targets, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    fine_tune(model, tokenizer, task, settings, int(message.content["config"]["server-round"]))
    expert_loss = loss_of(model, validation)
    with TemporaryDirectory() as folder:
        if settings["method"] == "lora":
            model.save_pretrained(folder, save_embedding_layers=False)
        else:
            model.save_pretrained(folder)
        base = find_model(settings["model"])
        return expert_reply(message, task, folder, start_loss=start_loss, expert_loss=expert_loss, base=base)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Measure the merged model on the client's test data."""
    settings = settings_of(context)
    task = task_of(context, settings)
    model, tokenizer = load(message, settings)
    test = batch(tokenizer, make_examples(task, settings["examples"], "test"))
    metrics = MetricRecord({"loss": loss_of(model, test), "num-examples": settings["examples"]})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def task_of(context: Context, settings: dict) -> str:
    """The client's task: its node configuration says it, or, in a simulation, the partition that it is given."""
    named = context.node_config.get("task")
    return named or settings["tasks"].split(",")[context.node_config["partition-id"]]


def load(message: Message, settings: dict) -> tuple:
    """The model that the message tells of, and its tokenizer."""
    folder = find_model(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    add_start(model, message)
    return model, AutoTokenizer.from_pretrained(folder)


def batch(tokenizer, examples: list) -> dict:
    """Padded tokens; only those of the answers are counted."""
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(prompt + answer)["input_ids"]) for prompt, answer in examples]
    length = max(len(ids) for _, ids in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {
        "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for _, ids in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for _, ids in rows]),
        "labels": torch.tensor(
            [[IGNORED] * len(prompt) + ids[len(prompt) :] + [IGNORED] * (length - len(ids)) for prompt, ids in rows]
        ),
    }


def loss_of(model: torch.nn.Module, examples: dict) -> float:
    """Mean cross-entropy over the answers' tokens."""
    model.eval()
    with torch.inference_mode():
        return float(model(**examples).loss)


def fine_tune(model: torch.nn.Module, tokenizer, task: str, settings: dict, round_index: int) -> None:
    """`steps` steps of AdamW on batches of 8 examples; other ones in every round."""
    examples = make_examples(task, settings["examples"], "train")
    order = random.Random(f"{settings['seed']}/{task}/{round_index}")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=settings["learning-rate"])
    model.train()
    for _ in range(settings["steps"]):
        loss = model(**batch(tokenizer, order.sample(examples, 8))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
