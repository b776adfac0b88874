"""What a merge did, as sums over tiles. Shapes: T = tasks, P = entries of a tile."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from manyshot.engine import Piece


@dataclass
class MergeReport:
    """What a merge did. Norms are Frobenius norms over all merged tensors; counts are coordinates.

    Without `pairs` nobody asked for the inner products of unlike task vectors, and there are no cosines.
    """

    tasks: list[str]
    num_changed: int = 0
    num_kept: int = 0
    kept_by_tensor: dict[str, float] = field(default_factory=dict)
    merged_norm: float = 0.0
    update_norm: float = 0.0
    gram_TT: list[list[float]] = field(default_factory=list)
    pairs: bool = True

    @property
    def kept_share(self) -> float:
        """Share of the coordinates that some task changed which the merged task vector keeps."""
        return self.num_kept / self.num_changed if self.num_changed else 0.0

    def to_json(self) -> dict[str, Any]:
        norms = {task: math.sqrt(self.gram_TT[i][i]) for i, task in enumerate(self.tasks)}
        record = {key: value for key, value in asdict(self).items() if key not in ("gram_TT", "pairs")}
        record |= {"kept_share": self.kept_share, "task_vector_norms": _finite(norms)}
        if self.pairs:
            record["task_vector_cosines"] = cosines(self.gram_TT)
        return _finite(record)


def _finite(record: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no Inf: null, for norms of models that hold some."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def cosines(gram_TT: Sequence[Sequence[float]]) -> list[list[float]]:
    """Cosine matrix of vectors, from their inner products; 0 for a vector that is zero."""
    norms = [math.sqrt(gram_TT[i][i]) for i in range(len(gram_TT))]
    return [
        [dot / (norms[i] * norms[j]) if norms[i] * norms[j] > 0 else 0.0 for j, dot in enumerate(row)]
        for i, row in enumerate(gram_TT)
    ]


@dataclass(frozen=True)
class TileSums:
    """One tile's part of a report: counts, v vᵀ (T·T, below the diagonal where wanted), |Θʳ − Θ⁰|² and |Θʳ − Θʳ⁻¹|²."""

    piece: Piece
    changed: int
    kept: int
    gram: list[float]
    merged_square: float
    update_square: float


def add_up(tasks: Sequence[str], tiles: Iterable[TileSums], *, pairs: bool = True) -> MergeReport:
    """The report, tiles added in the order of tensors and positions: the same sums however many threads there were."""
    report = MergeReport(list(tasks), pairs=pairs)
    size = len(tasks)
    gram = [0.0] * size**2
    merged, updated = 0.0, 0.0
    by_tensor: dict[str, tuple[int, int]] = {}
    for tile in sorted(tiles, key=lambda tile: (tile.piece.name, tile.piece.start)):
        changed, kept = by_tensor.get(tile.piece.name, (0, 0))
        by_tensor[tile.piece.name] = changed + tile.changed, kept + tile.kept
        gram = [total + value for total, value in zip(gram, tile.gram, strict=True)]
        merged += tile.merged_square
        updated += tile.update_square
    report.num_changed = sum(changed for changed, _ in by_tensor.values())
    report.num_kept = sum(kept for _, kept in by_tensor.values())
    report.kept_by_tensor = {name: kept / changed if changed else 0.0 for name, (changed, kept) in by_tensor.items()}
    report.gram_TT = [[gram[max(i, j) * size + min(i, j)] for j in range(size)] for i in range(size)]
    report.merged_norm, report.update_norm = math.sqrt(merged), math.sqrt(updated)
    return report
