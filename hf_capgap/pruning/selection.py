"""From scores to kept indices."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..errors import CheckpointError, ScoresError, ShapeError
from ..families import Config, family_for
from .scores import ExpressiveScores
from .shapes import StudentShape
from .units import score_shapes

KEPT_FILE_NAME = "kept_indices.json"
_BY_LAYER = ("heads", "neurons", "query_heads", "experts")


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a student keeps of its teacher, all in the teacher's numbering and ascending.

    Attributes:
        hidden: Hidden dimensions, one list for the whole model.
        heads: KV groups of each kept layer, {layer: [...]}.
        neurons: Neurons of each kept layer, {layer: [...]}; with experts {layer: [[...]]}, a list for each kept one.
        layers: Kept layers.
        query_heads: Query heads of each kept layer, {layer: [...]}; None for all those of the kept groups.
        experts: Experts of each kept layer, {layer: [...]}; None without experts.
    """

    hidden: list[int]
    heads: dict[int, list[int]]
    neurons: dict[int, list]
    layers: list[int]
    query_heads: dict[int, list[int]] | None = None
    experts: dict[int, list[int]] | None = None

    def units(self, sizes: Mapping[str, int], layer: int | None, expert: int | None = None) -> dict[str, list[int]]:
        """Kept units of each axis.

        Args:
            sizes: The teacher's units per axis.
            layer: A kept layer, or None for what is outside the layers.
            expert: A kept expert of that layer, whose neurons are meant; they are left out if None.
        """
        kept = {"hidden": self.hidden}
        if layer is None:
            return kept
        kept["kv_heads"] = self.heads[layer]
        kept["q_heads"] = self._query_heads(sizes, layer)
        if self.experts is None:
            return {**kept, "neurons": self.neurons[layer]}
        kept["experts"] = self.experts[layer]
        if expert is not None:
            kept["neurons"] = self.neurons[layer][self.experts[layer].index(expert)]
        return kept

    def _query_heads(self, sizes: Mapping[str, int], layer: int) -> list[int]:
        if self.query_heads is not None:
            return self.query_heads[layer]
        queries = sizes["q_heads"] // sizes["kv_heads"]
        return [group * queries + i for group in self.heads[layer] for i in range(queries)]

    def then(self, later: Kept) -> Kept:
        """What is kept if `later`, in the numbering of the student of `self`, is cut out of that student."""

        def pick(mine: Sequence, theirs: Sequence[int]) -> list:
            return [mine[index] for index in theirs]

        layers = pick(self.layers, later.layers)
        origin = dict(zip(later.layers, layers, strict=True))  # layer of the first student -> layer of the teacher

        def pick_by_layer(name: str) -> dict[int, list] | None:
            mine, theirs = getattr(self, name), getattr(later, name)
            if mine is None:
                return None
            return {layer: pick(mine[layer], theirs[number]) for number, layer in origin.items()}

        neurons = pick_by_layer("neurons") if self.experts is None else {}
        if self.experts is not None:
            for number, layer in origin.items():
                of_experts = pick(self.neurons[layer], later.experts[number])
                neurons[layer] = [
                    pick(mine, theirs) for mine, theirs in zip(of_experts, later.neurons[number], strict=True)
                ]
        return Kept(
            hidden=pick(self.hidden, later.hidden),
            layers=layers,
            heads=pick_by_layer("heads"),
            neurons=neurons,
            query_heads=pick_by_layer("query_heads"),
            experts=pick_by_layer("experts"),
        )

    def save(self, folder: str | os.PathLike) -> None:
        """Write `kept_indices.json` into a model's folder."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        (Path(folder) / KEPT_FILE_NAME).write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Kept:
        """Read `kept_indices.json` from a model's folder.

        Raises:
            CheckpointError: A file that cannot be understood.
            FileNotFoundError: No such file.
        """
        path = Path(folder) / KEPT_FILE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            by_layer = {
                name: {int(layer): units for layer, units in content[name].items()}
                for name in _BY_LAYER
                if name in content
            }
            return cls(hidden=content["hidden"], layers=content["layers"], **by_layer)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                "The file of kept indices is damaged", found=f"{path.name}: {error!r}", fix="Cut again."
            ) from error


def select(
    scores: ExpressiveScores,
    shape: StudentShape,
    config: Config,
    *,
    layers: str | Sequence[int] = "symmetric",
    protect_ends: bool = False,
) -> Kept:
    """Keep the best-scored units: heads, neurons and experts ranked inside each layer (local priority), hidden over
    the model. With fewer query heads to a group than the teacher's, each kept group keeps its best ones.

    Args:
        scores: Scores of the teacher that `config` describes. Equal scores keep the lower index.
        shape: A shape that fits the teacher.
        config: The teacher's config.
        layers: `"symmetric"` drops layers from both ends (the reference's way; of an odd number the last end loses one
            more), `"scores"` keeps the best-scored layers, or the indices of the layers to keep.
        protect_ends: The first and the last layer stay, whatever `layers` says: symmetric dropping begins behind them.

    Raises:
        ScoresError: Scores of another model, or non-finite ones, or without what this shape needs.
        ShapeError: A shape that does not fit, or layers that do not match it.
    """
    shape.check_within(config)
    sizes = family_for(config).sizes(config)
    check_scores(scores, config)
    kept_layers = _select_layers(layers, scores, sizes["layers"], shape.num_hidden_layers, protect_ends)
    heads = {layer: best(scores.heads[layer], shape.num_key_value_heads) for layer in kept_layers}
    queries = sizes["q_heads"] // sizes["kv_heads"]
    query_heads = {
        layer: _select_query_heads(scores, layer, groups, queries, shape.queries_per_group)
        for layer, groups in heads.items()
    }
    experts = None
    if "experts" in sizes:
        count = shape.num_experts or sizes["experts"]
        experts = {layer: _select_experts(scores, layer, count, sizes["experts"]) for layer in kept_layers}
        neurons = {
            layer: [best(scores.neurons[layer, expert], shape.intermediate_size) for expert in chosen]
            for layer, chosen in experts.items()
        }
    else:
        neurons = {layer: best(scores.neurons[layer], shape.intermediate_size) for layer in kept_layers}
    return Kept(
        hidden=best(scores.hidden, shape.hidden_size),
        heads=heads,
        neurons=neurons,
        layers=kept_layers,
        query_heads=query_heads,
        experts=experts,
    )


def best(scores: torch.Tensor, count: int) -> list[int]:
    """Indices of the `count` highest of `scores` [units], ascending; of equals the lower index."""
    order = torch.sort(scores, descending=True, stable=True).indices
    return sorted(order[:count].tolist())


def _select_query_heads(
    scores: ExpressiveScores, layer: int, groups: list[int], queries: int, count: int
) -> list[int]:
    if count == queries:
        return [group * queries + i for group in groups for i in range(queries)]
    per_head = _needed(scores, "query_heads")[layer].unflatten(0, (-1, queries))  # [groups, queries]
    return [group * queries + i for group in groups for i in best(per_head[group], count)]


def _select_experts(scores: ExpressiveScores, layer: int, count: int, available: int) -> list[int]:
    return list(range(available)) if count == available else best(_needed(scores, "experts")[layer], count)


def _needed(scores: ExpressiveScores, name: str) -> torch.Tensor:
    tensor = getattr(scores, name)
    if tensor is None:
        raise ScoresError(f"These scores have none of {name}, which this cut needs", fix="Score again.")
    return tensor


def _select_layers(
    layers: str | Sequence[int], scores: ExpressiveScores, available: int, count: int, protect_ends: bool
) -> list[int]:
    protected = [0, available - 1] if protect_ends and available > 1 else []
    if not isinstance(layers, str):
        return _explicit_layers(layers, available, count, protected)
    if count < len(protected):
        raise ShapeError("Protected ends are two layers", found=f"num_hidden_layers={count}", fix="Keep at least 2.")
    inner = available - len(protected)
    inner_count = count - len(protected)
    offset = len(protected) // 2
    if layers == "symmetric":
        first = offset + (inner - inner_count) // 2
        chosen = list(range(first, first + inner_count))
    elif layers == "scores":
        per_layer = _needed(scores, "layers")[offset : offset + inner]
        chosen = [offset + layer for layer in best(per_layer, inner_count)]
    else:
        raise ShapeError(
            "Unknown way to choose layers", found=layers, fix="Use 'symmetric', 'scores' or a list of layers to keep."
        )
    return sorted({*protected, *chosen})


def _explicit_layers(layers: Sequence[int], available: int, count: int, protected: list[int]) -> list[int]:
    try:
        chosen = sorted({operator.index(layer) for layer in layers})
    except TypeError as error:
        raise ShapeError("The layers to keep are indices", found=list(layers)) from error
    if len(chosen) != count or len(layers) != count or not all(0 <= layer < available for layer in chosen):
        raise ShapeError(f"The layers to keep must be {count} different indices below {available}", found=list(layers))
    if not set(protected) <= set(chosen):
        raise ShapeError(
            "The layers to keep leave out a protected end", found=list(layers), fix="Name them, or protect no ends."
        )
    return chosen


def check_scores(scores: ExpressiveScores, config: Config) -> None:
    """Raises `ScoresError` for non-finite scores, or scores of a model of another type or size than `config`."""
    scores.check_finite()
    family = family_for(config)
    expected = score_shapes(family, config)
    found = {name: tuple(tensor.shape) for name, tensor in scores.tensors().items()}
    model_type = family.model_type
    if scores.model_type != model_type or any(shape != expected.get(name) for name, shape in found.items()):
        raise ScoresError(
            f"These scores are of another model than this {model_type} with {expected}",
            found=f"{scores.model_name or 'a model'} ({scores.model_type}) with {found}",
            fix="Score this teacher.",
        )
