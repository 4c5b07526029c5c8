"""Sums over the weights of each unit: what a head, a neuron, a hidden dimension, an expert or a layer owns."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from ..families import Family, Parameter


def score_shapes(family: Family, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each score tensor of a model with `config`, by the names of `ExpressiveScores`."""
    sizes = family.sizes(config)
    layers, experts = sizes["layers"], sizes.get("experts")
    shapes = {
        "heads": (layers, sizes["kv_heads"]),
        "neurons": (layers, *([experts] if experts else []), sizes["neurons"]),
        "hidden": (sizes["hidden"],),
        "query_heads": (layers, sizes["q_heads"]),
        "layers": (layers,),
    }
    return {**shapes, "experts": (layers, experts)} if experts else shapes


class UnitSums:
    """Adds values that lie on parameters (squares, products with gradients) up to the units that own them.

    A weight belongs to every unit that one of its dimensions runs along: an entry of `up_proj` to a neuron, to a
    hidden dimension and to a layer. Weights of queries and of outputs belong to a query head and to its KV group.
    """

    def __init__(self, family: Family, config: PreTrainedConfig):
        self._family, self._sizes = family, family.sizes(config)
        self._queries_per_group = self._sizes["q_heads"] // self._sizes["kv_heads"]
        self._shapes = score_shapes(family, config)
        self._sums = self._zeros()

    def add(self, name: str, values: torch.Tensor) -> None:
        """Add `values`, of the shape of the parameter `name`."""
        parameter = self._family.explain(name)
        values = values.float()
        if parameter.layer is not None:
            self._sums["layers"][parameter.layer] += values.double().sum().cpu()
        for index, dimension in enumerate(parameter.dimensions):
            for axis in dimension.axes:
                self._add_dimension(parameter, axis, index, values)

    def _add_dimension(self, parameter: Parameter, axis: str, index: int, values: torch.Tensor) -> None:
        targets = {
            "hidden": ["hidden"],
            "neurons": ["neurons"],
            "experts": ["experts"],
            "q_heads": ["query_heads", "heads"],
            "kv_heads": ["heads"],
        }.get(axis, [])
        owners = torch.from_numpy(parameter.dimensions[index].owners(axis, self._sizes))
        for target in targets:
            # An expert's neurons are its own: the experts stay a dimension of the sum.
            per_expert = target == "neurons" and "experts" in parameter.dimensions[0].axes
            others = [other for other in range(values.dim()) if other != index and not (per_expert and other == 0)]
            sums = (values.sum(others) if others else values).double().cpu()  # [(experts,) entries]
            owned = owners >= 0
            units = owners[owned]
            if target == "heads" and axis == "q_heads":
                units = units // self._queries_per_group
            into = self._sums[target] if target == "hidden" else self._sums[target][parameter.layer]
            into.index_add_(-1, units, sums[..., owned])

    def take(self) -> dict[str, torch.Tensor]:
        """The sums since the last call, float64, by the names and in the shapes of `score_shapes`; starts anew."""
        taken, self._sums = self._sums, self._zeros()
        return taken

    def _zeros(self) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in self._shapes.items()}
