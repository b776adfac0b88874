"""From validation losses to merging weights: loss gaps, what they are measured in, softmax, memory. No torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from manyshot.errors import MergeError
from manyshot.operators import Operator

# an expert that gained less than this share of the pretrained model's loss has learned next to nothing
SMALLEST_GAIN = 0.01
# where a gap that is a share of something is cut off: its task then weighs as one that lacks all (or has twice) that
LARGEST_SHARE = 1.0
# the same for shares of the expert's loss, which have no bound where an expert's loss goes to zero
LARGEST_OVER_EXPERT = 4.0
# share of the tasks that `temperature: auto` keeps effective when the recipe does not say how many
EFFECTIVE_SHARE = 0.75
# below every weight that float32 can hold: what a weight of zero counts as where its logarithm is taken
SMALLEST_WEIGHT = 1e-45
# the smallest float64 that has all its digits
SMALLEST_TEMPERATURE = sys.float_info.min
SMALLEST_SPREAD = 1e-100


@dataclass(frozen=True)
class TaskLosses:
    """Validation losses of one merge, task by task: of Θʳ⁻¹, of each task's expert θ_τ, of the pretrained model Θ⁰."""

    start: tuple[float, ...]
    expert: tuple[float, ...]
    pretrained: tuple[float, ...]

    @property
    def gaps(self) -> list[float]:
        return loss_gaps(self.start, self.expert)


# ---- loss gaps, and what they are measured in ------------------------------------------------------------------------


def loss_gaps(start_losses: Sequence[float], expert_losses: Sequence[float]) -> list[float]:
    """G_τ = L_τ(Θʳ⁻¹) − L_τ(θ_τ) for every task: how much worse the merged model fits a task than its expert."""
    return [start - expert for start, expert in zip(start_losses, expert_losses, strict=True)]


def relative_gaps(losses: TaskLosses) -> list[float]:
    """G_τ / (L_τ(Θ⁰) − L_τ(θ_τ)), the share of what the expert gained that the merged model lacks, in −1 … 1.

    Tasks whose losses have unlike scales then weigh alike. A gain below SMALLEST_GAIN · L_τ(Θ⁰) counts as that, and no
    gap counts for more than the gain: an expert that gained nothing has nothing that could be lacking, however far the
    merged model has moved away from a task that cannot be learned.
    """
    found = []
    for gap, pretrained, expert in zip(losses.gaps, losses.pretrained, losses.expert, strict=True):
        gain = pretrained - expert
        lacking = min(gap, max(gain, 0.0))
        found.append(_share(lacking, max(gain, SMALLEST_GAIN * pretrained), LARGEST_SHARE))
    return found


def gaps_over_expert(losses: TaskLosses) -> list[float]:
    """G_τ / L_τ(θ_τ) = L_τ(Θʳ⁻¹)/L_τ(θ_τ) − 1, in −1 … LARGEST_OVER_EXPERT."""
    pairs = zip(losses.gaps, losses.expert, strict=True)
    return [_share(gap, expert, LARGEST_OVER_EXPERT) for gap, expert in pairs]


def gaps_over_start(losses: TaskLosses) -> list[float]:
    """G_τ / L_τ(Θʳ⁻¹) = 1 − L_τ(θ_τ)/L_τ(Θʳ⁻¹), the share of a task's loss that its expert takes away, in −1 … 1."""
    return [_share(gap, start, LARGEST_SHARE) for gap, start in zip(losses.gaps, losses.start, strict=True)]


def _share(gap: float, of: float, largest: float) -> float:
    """gap / of, cut off below −1 and above `largest`; a share of nothing is all of it, or none where the gap is 0."""
    if of == 0:
        return math.copysign(1.0 if gap < 0 else largest, gap) if gap else 0.0
    return min(max(gap / of, -1.0), largest)


# ---- weights ---------------------------------------------------------------------------------------------------------


def gap_weights(gaps: Sequence[float], temperature: float) -> list[float]:
    """α = softmax(G / λ), in float64, shifted by the largest gap so that no exponential overflows."""
    if not all(math.isfinite(gap) for gap in (*gaps, max(gaps) - min(gaps))):
        raise MergeError(f"loss gaps must be finite, and so must their differences, found {list(gaps)}")
    largest = max(gaps)
    raised = [math.exp((gap - largest) / temperature) for gap in gaps]
    total = math.fsum(raised)
    return [value / total for value in raised]


def remember(weights: Sequence[float], before: Sequence[float], memory: float) -> list[float]:
    """α_τ · α′_τ^μ, made to sum to 1: log α_r = μ log α_{r−1} + G/λ, up to a constant; α′ = `before`, μ = `memory`.

    Exponentiated gradient steps on the weights, as in agnostic federated learning (Mohri et al. 2019, arXiv
    1902.00146), with a memory that fades.
    """
    logs = [
        math.log(max(weight, SMALLEST_WEIGHT)) + memory * math.log(max(old, SMALLEST_WEIGHT))
        for weight, old in zip(weights, before, strict=True)
    ]
    return gap_weights(logs, 1.0)


def auto_temperature(gaps: Sequence[float], effective: float) -> float:
    """The λ for which exp(H(softmax(G/λ))) is `effective`, by bisection; it rises with λ from 1 to the number of tasks.

    Where several tasks share the largest gap no λ gives fewer effective tasks than those; then the smallest λ tried.
    """
    spread = max(gaps) - min(gaps)
    if spread == 0 or not math.isfinite(spread):
        return 1.0  # any: the weights are uniform; or gap_weights() refuses such gaps
    if not SMALLEST_SPREAD < spread < 1 / SMALLEST_SPREAD:  # the products below would leave float64
        return max(spread * auto_temperature([gap / spread for gap in gaps], effective), SMALLEST_TEMPERATURE)
    low, high = spread * 1e-4, spread * 1e4
    for _ in range(200):
        middle = math.sqrt(low * high)
        if effective_tasks(gap_weights(gaps, middle)) < effective:
            low = middle
        else:
            high = middle
    return high


def uniform_weights(num_tasks: int) -> list[float]:
    """1/T for every task."""
    return [1.0 / num_tasks] * num_tasks


def normalized_weights(weights: Sequence[float]) -> list[float]:
    """ᾱ = α / Σα, as an average takes them: those of a sum, 1 each, become 1/T. They sum to 1 already where α does."""
    total = math.fsum(weights)
    if not math.isfinite(total) or total <= 0:
        raise MergeError(f"weights must be finite and sum to more than 0, found {list(weights)}")
    # what sums to 1 but for rounding stays as it is, to the bit
    return list(weights) if math.isclose(total, 1.0, rel_tol=1e-12) else [weight / total for weight in weights]


def effective_tasks(weights: Sequence[float]) -> float:
    """exp(H(α)) of the weights divided by their sum: T for uniform weights, 1 when one task has all the weight."""
    total = math.fsum(abs(weight) for weight in weights)
    weights = [abs(weight) / total for weight in weights]
    return math.exp(-math.fsum(weight * math.log(weight) for weight in weights if weight > 0))


# ---- an operator's choice --------------------------------------------------------------------------------------------


def needs_gaps(operator: Operator) -> bool:
    """Whether an operator's weights come from loss gaps, as it is set."""
    weighted = operator.uses_loss_gaps and operator.weighting != "multiplier"
    return weighted and getattr(operator, "gap", "absolute") != "none"


def memory_of(operator: Operator) -> float:
    """How much of the round before's weights an operator keeps, at its round; 0 where it needs none."""
    memory: float = getattr(operator, "weight_memory", 0.0) if needs_gaps(operator) else 0.0
    return memory


def weights_without_gaps(operator: Operator, num_tasks: int) -> list[float]:
    """A mean weighs each task 1/T, a sum multiplies each by 1."""
    return [1.0] * num_tasks if operator.weighting == "multiplier" else uniform_weights(num_tasks)


def for_all_tasks(operator: Operator, weights: Sequence[float], num_tasks: int) -> list[float]:
    """The weights of a merge that lacks some of the `num_tasks` tasks: those of a sum are T in total all the same.

    Θʳ⁻¹ − Θ⁰, which is in all task vectors, is then multiplied by β·T in this round as in the others, not by less. The
    weights of a mean sum to 1 already, and TIES divides by the sum of those that agree.
    """
    if not operator.sums or len(weights) == num_tasks:
        return list(weights)
    return [weight * num_tasks / len(weights) for weight in weights]


def weigh_tasks(
    operator: Operator,
    names: Sequence[str],
    losses: TaskLosses | None,
    num_tasks: int,
    before: Sequence[float] | None = None,
) -> dict[str, Any]:
    """What loss_gap.json says of a merge: gaps and weights by task, effective tasks, and how the weights came about.

    `names` are the tasks that are there, of `num_tasks`; without `losses` the operator is one that needs none. `before`
    and errors as in choose_weights().
    """
    details: dict[str, Any] = {}
    gaps: dict[str, float] = {}
    if losses is None:
        weights = weights_without_gaps(operator, len(names))
    else:
        weights, details = choose_weights(operator, losses, before)
        gaps = dict(zip(names, losses.gaps, strict=True))
    weights = for_all_tasks(operator, weights, num_tasks)
    by_task = dict(zip(names, weights, strict=True))
    return {"loss_gaps": gaps, "weights": by_task, "effective_tasks": effective_tasks(weights), **details}


def choose_weights(
    operator: Operator, losses: TaskLosses, before: Sequence[float] | None = None
) -> tuple[list[float], dict[str, Any]]:
    """The tasks' weights for an operator, and how they came about: α = softmax(G/λ), or what needs no gaps.

    `before` holds the weights of the round before, where there was one and the operator remembers them. Raises
    MergeError for losses that are not finite, whether the weights need them or not.
    """
    gaps = losses.gaps
    for which, found in asdict(losses).items():
        if not all(math.isfinite(loss) for loss in found):
            raise MergeError(f"validation losses must be finite, found {list(found)} ({which})")
    if not needs_gaps(operator):
        return weights_without_gaps(operator, len(gaps)), {}
    details: dict[str, Any] = {}
    # a third-party operator that uses loss gaps has these settings too, or their defaults
    temperature, effective = getattr(operator, "temperature", 1.0), getattr(operator, "effective_tasks", None)
    kinds = {"relative": relative_gaps, "over_expert": gaps_over_expert, "over_start": gaps_over_start}
    if (kind := getattr(operator, "gap", "absolute")) in kinds:
        gaps = kinds[kind](losses)
        details["relative_gaps"] = gaps
    if temperature == "auto":
        temperature = auto_temperature(gaps, effective or EFFECTIVE_SHARE * len(gaps))
    weights = gap_weights(gaps, temperature)
    if before is not None and (memory := memory_of(operator)):
        weights = remember(weights, before, memory)
    return weights, details | {"temperature": temperature}
