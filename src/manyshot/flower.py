"""METIS on a Flower server: a strategy for Flower's message API, and its clients' side. The only importer of flwr.

A TRAIN message holds `arrays` (what the recipe's `sends` says) and `config` (server-round, sends, base-digest). A reply
holds `arrays` (a PEFT adapter's factors, or all weights), `metrics` (start-loss, expert-loss, pretrained-loss) and
`expert` (task, adapter-config, base-digest); expert_reply() makes one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyshot.base_model import find_base_model
from manyshot.errors import MissingExtraError, ModelError, RecipeError
from manyshot.federated import EXPERT, PRETRAINED, START, Arrays, FederatedRun, Returned
from manyshot.federated_client import add_start as add_start_arrays
from manyshot.federated_client import read_expert
from manyshot.federated_recipe import FederatedRecipe
from manyshot.recipe_file import federated_recipe_from_mapping, load_federated_recipe

try:
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.serverapp.strategy import FedAvg
except ImportError as error:
    raise MissingExtraError(
        f"manyshot.flower needs Flower ({error}); run: pip install 'manyshot[flower]', and for simulations on one "
        "machine: pip install 'flwr[simulation]'"
    ) from error

if TYPE_CHECKING:
    import torch
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import Result

ARRAYS, CONFIG, METRICS, EXPERT_RECORD = "arrays", "config", "metrics", "expert"
LOGGER = logging.getLogger("flwr")
# what np.load raises for bytes that are no array, or for a header that asks for more than there is
UNREADABLE = (ValueError, TypeError, EOFError, OSError, MemoryError)


class ManyShot(FedAvg):  # type: ignore[misc]
    """Merges the experts of clients in rounds: loss-gap weights, masks and outer optimizer as in a run of manyshot.

    Nodes are sampled, and EVALUATE replies averaged, as in FedAvg, whose arguments of both it takes (`sampling`).
    """

    def __init__(
        self, recipe: FederatedRecipe | Mapping[str, Any] | str | Path, output: str | Path, **sampling: Any
    ) -> None:
        """`recipe` is a FederatedRecipe, a mapping with its keys, or the path of its file; `output` a new folder.

        Raises RecipeError, ModelError or RunFolderError for what cannot be used.
        """
        if isinstance(recipe, str | Path):
            recipe = load_federated_recipe(Path(recipe))
        elif not isinstance(recipe, FederatedRecipe):
            recipe = federated_recipe_from_mapping(recipe)
        if sampling.get("fraction_train", 1.0) < 1 and recipe.on_failure == "stop":
            raise RecipeError("fraction_train below 1 leaves clients out of rounds, and on_failure: stop allows none")
        nodes = {"min_train_nodes": recipe.min_tasks, "min_available_nodes": len(recipe.tasks)}
        super().__init__(**(nodes | sampling), arrayrecord_key=ARRAYS, configrecord_key=CONFIG)
        self.recipe = recipe
        self.run = FederatedRun(recipe, Path(output))

    def summary(self) -> None:
        """Log what is merged and how."""
        super().summary()
        LOGGER.info("\tmanyshot: %s of %s", self.recipe.method.name, ", ".join(self.recipe.tasks))

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds of the recipe, then write the merged model to `merged/` in the output folder.

        `num_rounds` and `initial_arrays` are the recipe's own: giving others raises RecipeError.
        """
        if num_rounds not in (None, self.recipe.rounds):
            raise RecipeError(f"num_rounds is {num_rounds}, and the recipe's rounds {self.recipe.rounds}; give one")
        if initial_arrays is not None:
            raise RecipeError("initial_arrays: rounds begin from the recipe's model; leave them out")
        begin, rounds = to_record(self.run.start_arrays()), self.recipe.rounds
        result = super().start(grid, begin, rounds, timeout, train_config, evaluate_config, evaluate_fn)
        LOGGER.info("merged model: %s", self.run.export())
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send Θʳ⁻¹ to the sampled nodes, and say what it is."""
        return super().configure_train(server_round, arrays, self._told(config), grid)  # type: ignore[no-any-return]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Send Θʳ to the nodes that measure it."""
        return super().configure_evaluate(server_round, arrays, self._told(config), grid)  # type: ignore[no-any-return]

    def _told(self, config: ConfigRecord) -> ConfigRecord:
        config["sends"], config["base-digest"] = self.recipe.sends, self.run.base.digest
        return config

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the experts that came back: Θʳ, and weights and gaps by task. Raises MergeError as the recipe says."""
        returned, failed = [], {}
        for message in replies:
            client = f"node {message.metadata.src_node_id}"
            try:
                returned.append(_returned(message, client))
            except ModelError as error:
                failed[client] = str(error)
        merged = self.run.merge_round(returned, failed)
        for name, why in sorted(merged.left_out.items()):
            LOGGER.warning("round %d goes on without %s: %s", server_round, name, why)
        metrics: dict[str, float] = {"kept-share": merged.kept_share, "tasks-merged": len(merged.weights)}
        metrics |= {f"weight/{task}": weight for task, weight in merged.weights.items()}
        metrics |= {f"loss-gap/{task}": gap for task, gap in merged.loss_gaps.items()}
        return to_record(self.run.start_arrays()), MetricRecord(metrics)


def _returned(message: Message, client: str) -> Returned:
    """A reply as the server's rounds take it. Raises ModelError for one that is an error, or lacks something."""
    if message.has_error():
        raise ModelError(f"its ClientApp failed: {message.error.reason}")
    content = message.content
    expert = content.config_records.get(EXPERT_RECORD)
    arrays = content.array_records.get(ARRAYS)
    if expert is None or arrays is None or not isinstance(task := expert.get("task"), str):
        raise ModelError(f"its reply lacks '{ARRAYS}' or '{EXPERT_RECORD}' with a task; expert_reply() makes one")
    texts = {key: expert.get(key) for key in ("adapter-config", "base-digest")}
    losses = {key: content.metric_records.get(METRICS, {}).get(key) for key in (START, EXPERT, PRETRAINED)}
    for key, value in {**texts, **losses}.items():
        kinds = str if key in texts else int | float
        if value is not None and not isinstance(value, kinds):
            raise ModelError(f"'{key}' of its reply is {value!r:.80}")
    return Returned(
        task,
        to_arrays(arrays),
        texts["adapter-config"],
        {key: float(value) for key, value in losses.items() if value is not None},
        texts["base-digest"],
        client,
    )


# ---- clients ---------------------------------------------------------------------------------------------------------


def add_start(model: torch.nn.Module, message: Message) -> None:
    """Make the model that a message tells of, Θʳ⁻¹ (TRAIN) or Θʳ (EVALUATE), of one that was loaded with Θ⁰.

    Raises ModelError for a tensor that the model lacks, or a message of another strategy.
    """
    config, arrays = message.content.config_records.get(CONFIG, {}), message.content.array_records.get(ARRAYS)
    if arrays is None or config.get("sends") not in ("delta", "weights"):
        raise ModelError("the message does not say what it sends; the server's strategy is manyshot.flower.ManyShot")
    add_start_arrays(model, to_arrays(arrays), whole=config["sends"] == "weights")


def expert_reply(
    message: Message,
    task: str,
    folder: str | Path,
    *,
    start_loss: float | None = None,
    expert_loss: float | None = None,
    pretrained_loss: float | None = None,
    base: str | Path | None = None,
) -> Message:
    """The reply to a TRAIN message: an adapter as PEFT saves it, or a model folder, and L_τ(Θʳ⁻¹), L_τ(θ_τ), L_τ(Θ⁰).

    Operators that weigh by loss gaps need the first two; `gap: relative` needs the third of clients that were not in
    round 1. With `base`, the folder of the client's pretrained model, the server checks that it is its own.
    """
    arrays, adapter_config = read_expert(Path(folder))
    told = {"task": task, "adapter-config": adapter_config}
    told["base-digest"] = find_base_model(str(base)).digest if base is not None else None
    losses = {START: start_loss, EXPERT: expert_loss, PRETRAINED: pretrained_loss}
    content = RecordDict(
        {
            ARRAYS: to_record(arrays),
            EXPERT_RECORD: ConfigRecord({key: value for key, value in told.items() if value is not None}),
            METRICS: MetricRecord({key: float(value) for key, value in losses.items() if value is not None}),
        }
    )
    return Message(content=content, reply_to=message)


# ---- arrays ----------------------------------------------------------------------------------------------------------


def to_record(arrays: Arrays) -> ArrayRecord:
    """Arrays as Flower sends them."""
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def to_arrays(record: ArrayRecord) -> Arrays:
    """Arrays as they were sent. Raises ModelError naming one that cannot be read."""
    found = {}
    for name, array in record.items():
        try:
            found[name] = array.numpy()
        except UNREADABLE as error:
            raise ModelError(f"tensor '{name:.200}' is no array ({type(error).__name__}: {error})") from None
    return found


__all__ = ["FederatedRecipe", "ManyShot", "add_start", "expert_reply", "to_arrays", "to_record"]
