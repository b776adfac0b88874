"""The Flower strategy on messages in memory: what it sends, what it takes back, and what a reply may not lack."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr", reason="Flower is not installed; make test-flower installs it and runs this")

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from federated_helpers import TASKS, adapter_of, make_federation, told
from manyshot.base_model import find_base_model
from manyshot.errors import MergeError, ModelError, RecipeError
from manyshot.federated import EXPERT, START, FederatedRun
from manyshot.federated_client import read_expert
from manyshot.flower import ManyShot, add_start, expert_reply, to_arrays, to_record
from merge_helpers import make_base, make_peft_adapter, read_model

Client = Callable[[Message], Message]


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are made by a run's own process, which has these numbers."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class MemoryGrid:
    """Nodes 1, 2, 3 that answer at once."""

    def __init__(self, client: Client) -> None:
        self.client, self.sent = client, list[Message]()

    def get_node_ids(self) -> list[int]:
        return [1, 2, 3]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        asked = list(messages)
        self.sent += asked
        return [self.client(message) for message in asked]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


def task_of(message: Message) -> str:
    return TASKS[message.metadata.dst_node_id - 1]


def drawing_client(folder: Path, base: Path) -> Client:
    """Sends a drawn adapter of its round, as adapter_of() draws it."""

    def answer(message: Message) -> Message:
        if message.metadata.message_type == "evaluate":
            metrics = MetricRecord({"loss": float(message.metadata.dst_node_id), "num-examples": 1})
            return Message(content=RecordDict({"metrics": metrics}), reply_to=message)
        task, round_index = task_of(message), int(message.content["config"]["server-round"])
        path = make_peft_adapter(folder / f"sent{round_index}" / task, f"sent{round_index}/{task}")
        losses = told(task)
        return expert_reply(message, task, path, start_loss=losses[START], expert_loss=losses[EXPERT], base=base)

    return answer


def test_flower_strategy_ends_with_the_bytes_of_the_same_rounds_without_flower(tmp_path: Path, base: Path) -> None:
    grid = MemoryGrid(drawing_client(tmp_path / "clients", base))
    strategy = ManyShot(make_federation(base), tmp_path / "flower")
    result = strategy.start(grid)
    plain = FederatedRun(make_federation(base), tmp_path / "plain")
    for round_index in (1, 2):
        plain.merge_round([adapter_of(tmp_path / "again" / f"sent{round_index}", task) for task in TASKS])
    plain.export()
    files = [path.relative_to(tmp_path / "plain") for path in sorted((tmp_path / "plain").rglob("*")) if path.is_file()]
    assert len(files) == 9
    for file in files:
        assert (tmp_path / "flower" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes(), file
    assert {name: array.tolist() for name, array in to_arrays(result.arrays).items()} == {
        name: array.tolist() for name, array in plain.start_arrays().items()
    }
    assert result.train_metrics_clientapp[1]["tasks-merged"] == 3
    assert result.train_metrics_clientapp[2]["loss-gap/letters"] == 1.5
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(2.0)


def test_flower_strategy_sends_nothing_but_settings_first_and_then_what_changed(tmp_path: Path, base: Path) -> None:
    grid = MemoryGrid(drawing_client(tmp_path / "clients", base))
    strategy = ManyShot(make_federation(base), tmp_path / "flower", fraction_evaluate=0.0)
    strategy.start(grid)
    first, second = grid.sent[0], grid.sent[3]
    assert len(grid.sent) == 6 and len(first.content["arrays"]) == 0
    assert set(second.content["arrays"]) == {"a.weight", "b.weight"}
    assert second.content["config"]["sends"] == "delta"
    assert second.content["config"]["base-digest"] == find_base_model(str(base)).digest
    weights = read_model(base)["a.weight"]
    module = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in "ab"})
    module["a"].weight = torch.nn.Parameter(weights.clone())
    module["b"].weight = torch.nn.Parameter(read_model(base)["b.weight"].clone())
    add_start(module, second)
    delta = torch.from_numpy(to_arrays(second.content["arrays"])["a.weight"])
    assert torch.equal(module["a"].weight, weights + delta)
    with pytest.raises(ModelError, match="the message does not say what it sends"):
        add_start(module, Message(content=RecordDict({"arrays": ArrayRecord()}), reply_to=second))


def _content(message: Message, base: Path, **records: Any) -> RecordDict:
    arrays, config = read_expert(make_peft_adapter(base.parent / f"one{message.metadata.dst_node_id}", "one"))
    found = {
        "arrays": to_record(arrays),
        "expert": ConfigRecord({"task": task_of(message), "adapter-config": str(config)}),
        "metrics": MetricRecord({"start-loss": 1.0, "expert-loss": 0.5}),
    }
    return RecordDict({name: record for name, record in (found | records).items() if record is not None})


def _broken_array() -> ArrayRecord:
    record = to_record({"a": torch.zeros(2, 2).numpy()})
    record["a"].data = b"not an array"
    return record


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ({"arrays": None}, "its reply lacks 'arrays' or 'expert' with a task; expert_reply() makes one"),
        ({"expert": None}, "its reply lacks 'arrays' or 'expert' with a task"),
        ({"expert": ConfigRecord({"task": 3})}, "its reply lacks 'arrays' or 'expert' with a task"),
        (
            {"expert": ConfigRecord({"task": "words", "adapter-config": b"{}"})},
            "'adapter-config' of its reply is b'{}'",
        ),
        ({"metrics": MetricRecord({"start-loss": [1.0, 2.0]})}, "'start-loss' of its reply is [1.0, 2.0]"),
        ({"metrics": None}, "no start-loss and no expert-loss, and metis weighs tasks by it"),
        ({"metrics": MetricRecord({"start-loss": float("nan")})}, "start-loss is nan"),
        ({"arrays": _broken_array()}, "tensor 'a' is no array"),
    ],
)
def test_flower_strategy_goes_on_without_a_reply_that_cannot_be_used(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture, records: dict[str, Any], message: str
) -> None:
    strategy = ManyShot(make_federation(base), tmp_path / "run")
    asked = strategy.configure_train(1, ArrayRecord(), ConfigRecord(), MemoryGrid(lambda message: message))
    replies = []
    for one in sorted(asked, key=task_of):
        spoiled = records if task_of(one) == "words" else {}
        replies.append(Message(content=_content(one, base, **spoiled), reply_to=one))
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics is not None and metrics["tasks-merged"] == 2 and "weight/words" not in metrics
    assert message in caplog.text and "round 1 goes on without" in caplog.text


def test_flower_strategy_ends_where_too_few_clients_answer(tmp_path: Path, base: Path) -> None:
    def crash(message: Message) -> Message:
        return Message(error=Error(code=0, reason="out of memory"), reply_to=message)

    with pytest.raises(MergeError, match="0 of 3 tasks can be merged, and min_tasks is 2") as found:
        ManyShot(make_federation(base), tmp_path / "run").start(MemoryGrid(crash))
    assert "node 1: its ClientApp failed: out of memory" in str(found.value)


def test_flower_strategy_takes_rounds_and_model_from_the_recipe_alone(tmp_path: Path, base: Path) -> None:
    with pytest.raises(RecipeError, match="on_failure: stop allows none"):
        ManyShot(make_federation(base, on_failure="stop"), tmp_path / "one", fraction_train=0.5)
    strategy = ManyShot({"model": str(base), "tasks": list(TASKS)}, tmp_path / "two")
    grid = MemoryGrid(lambda message: message)
    with pytest.raises(RecipeError, match="num_rounds is 3, and the recipe's rounds 5"):
        strategy.start(grid, num_rounds=3)
    with pytest.raises(RecipeError, match="initial_arrays: rounds begin from the recipe's model"):
        strategy.start(grid, ArrayRecord())
    assert not grid.sent
