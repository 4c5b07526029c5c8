"""From scores to kept indices."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..errors import ScoresError, ShapeError
from ..families import family_for
from .scores import ExpressiveScores
from .shapes import StudentShape

KEPT_FILE_NAME = "kept_indices.json"


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a student keeps of its teacher, all in the teacher's numbering and ascending.

    Attributes:
        hidden: Hidden dimensions, one list for the whole model.
        heads: KV groups of each kept layer, {layer: [...]}.
        neurons: Neurons of each kept layer, {layer: [...]}.
        layers: Kept layers.
    """

    hidden: list[int]
    heads: dict[int, list[int]]
    neurons: dict[int, list[int]]
    layers: list[int]

    def by_axis(self, layer: int | None, queries_per_group: int) -> dict[str, list[int]]:
        """Kept units of each axis in one teacher layer, or outside the layers for None."""
        kept = {"hidden": self.hidden}
        if layer is not None:
            groups = self.heads[layer]
            kept["kv_heads"] = groups
            kept["q_heads"] = [group * queries_per_group + i for group in groups for i in range(queries_per_group)]
            kept["neurons"] = self.neurons[layer]
        return kept

    def save(self, folder: str | os.PathLike) -> None:
        """Write `kept_indices.json` into a model's folder."""
        (Path(folder) / KEPT_FILE_NAME).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Kept:
        """Read `kept_indices.json` from a model's folder."""
        content = json.loads((Path(folder) / KEPT_FILE_NAME).read_text(encoding="utf-8"))
        by_layer = {
            name: {int(layer): units for layer, units in content[name].items()} for name in ("heads", "neurons")
        }
        return cls(hidden=content["hidden"], layers=content["layers"], **by_layer)


def select(
    scores: ExpressiveScores,
    shape: StudentShape,
    config: PreTrainedConfig,
    *,
    layers: str | Sequence[int] = "symmetric",
) -> Kept:
    """Keep the best-scored units: heads and neurons ranked inside each layer (local priority), hidden over the model.

    Args:
        scores: Scores of the teacher that `config` describes. Equal scores keep the lower index.
        shape: A shape that fits the teacher.
        config: The teacher's config.
        layers: `"symmetric"` drops layers from both ends (the reference's way; of an odd number the last end loses one
            more), or the indices of the layers to keep.

    Raises:
        ScoresError: Scores of another model, or non-finite ones.
        ShapeError: A shape that does not fit, or layers that do not match it.
    """
    shape.check_within(config)
    _check_scores(scores, config)
    kept_layers = _select_layers(layers, StudentShape.of(config).num_hidden_layers, shape.num_hidden_layers)
    return Kept(
        hidden=_best(scores.hidden, shape.hidden_size),
        heads={layer: _best(scores.heads[layer], shape.num_key_value_heads) for layer in kept_layers},
        neurons={layer: _best(scores.neurons[layer], shape.intermediate_size) for layer in kept_layers},
        layers=kept_layers,
    )


def _best(scores: torch.Tensor, count: int) -> list[int]:
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def _select_layers(layers: str | Sequence[int], available: int, count: int) -> list[int]:
    if isinstance(layers, str):
        if layers == "symmetric":
            first = (available - count) // 2
            return list(range(first, first + count))
        raise ShapeError(
            "Unknown way to choose layers", found=layers, fix="Use 'symmetric' or a list of layers to keep."
        )
    chosen = sorted({int(layer) for layer in layers})
    if len(chosen) != count or len(layers) != count or not all(0 <= layer < available for layer in chosen):
        raise ShapeError(f"The layers to keep must be {count} different indices below {available}", found=list(layers))
    return chosen


def _check_scores(scores: ExpressiveScores, config: PreTrainedConfig) -> None:
    scores.check_finite()
    sizes = family_for(config).sizes(config)
    expected = {
        "heads": (sizes["layers"], sizes["kv_heads"]),
        "neurons": (sizes["layers"], sizes["neurons"]),
        "hidden": (sizes["hidden"],),
    }
    found = {name: tuple(getattr(scores, name).shape) for name in expected}
    if found != expected or scores.model_type != config.model_type:
        raise ScoresError(
            f"These scores are of another model than this {config.model_type} with {expected}",
            found=f"{scores.model_name or 'a model'} ({scores.model_type}) with {found}",
            fix="Score this teacher.",
        )
