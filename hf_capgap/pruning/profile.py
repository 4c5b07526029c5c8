"""What a global ranking would keep in each layer, and what uniform widths cost against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..families import Config
from .scores import ExpressiveScores
from .selection import best, check_scores
from .shapes import StudentShape

_KINDS = {"heads": "num_key_value_heads", "neurons": "intermediate_size"}


@dataclass(frozen=True)
class Profile:
    """Units that each layer keeps when they compete across layers.

    Attributes:
        kept: {"heads" or "neurons": {layer: number of units}}; with experts the neurons of all experts of a layer.
        share: Share of the normalised scores that the global ranking keeps, of heads and of neurons.
        uniform_share: The share that the same number of units keeps when every layer gives the same number.
        rows_per_layer: Ranked vectors of each layer: one, but of neurons one for each expert.
    """

    kept: dict[str, dict[int, int]]
    share: dict[str, float]
    uniform_share: dict[str, float]
    rows_per_layer: dict[str, int]

    def symmetric(self) -> dict[str, int]:
        """Uniform widths with as many units in all, for a plain config: `num_key_value_heads`, `intermediate_size`.

        Within a layer the global order is the local one, so a cut to these widths keeps what `select` keeps.
        """
        return {
            _KINDS[kind]: round(sum(layers.values()) / len(layers) / self.rows_per_layer[kind])
            for kind, layers in self.kept.items()
        }


def global_profile(
    scores: ExpressiveScores, shape: StudentShape, config: Config, *, layers: Sequence[int] | None = None
) -> Profile:
    """Rank heads and neurons, each kind over all layers, and keep as many in all as `shape` does.

    Scores are normalised by their L2 norm per layer first, as the reference implementation does before its global
    sort (arXiv 2311.07052). No family can say a different width for each layer, so this is a report: uneven profiles
    tell that uniform widths throw away good units in some layers and keep poor ones in others.

    Args:
        scores: The teacher's scores.
        shape: How many units to keep, on average over layers.
        config: The teacher's config.
        layers: The layers that compete; all if None.

    Raises:
        ScoresError: Scores of another model, or non-finite ones.
        ShapeError: A shape that does not fit the teacher.
    """
    shape.check_within(config)
    check_scores(scores, config)
    normalized = scores.normalized()
    competing = list(range(len(scores.heads)) if layers is None else layers)
    kept, share, uniform_share, rows_per_layer = {}, {}, {}, {}
    for kind, width in _KINDS.items():
        ranked = getattr(normalized, kind)[competing]  # [layers, (experts,) units]
        per_row = getattr(shape, width)
        rows = ranked.flatten(0, -2)  # [layers · experts, units]
        mass = rows.clamp(min=0)  # movement scores can be negative: nothing to lose there
        chosen = torch.zeros(rows.numel(), dtype=torch.bool)
        chosen[best(rows.flatten(), per_row * len(rows))] = True
        counts = chosen.view(len(competing), -1).sum(1).tolist()
        rows_per_layer[kind] = len(rows) // len(competing)
        kept[kind] = dict(zip(competing, counts, strict=True))
        total = mass.sum().clamp(min=torch.finfo(rows.dtype).tiny)
        share[kind] = float(mass.flatten()[chosen].sum() / total)
        uniform_share[kind] = float(mass.topk(per_row, dim=-1).values.sum() / total)
    return Profile(kept, share, uniform_share, rows_per_layer)
