"""What a model family is: a table of named axes. Everything else in the package is generic over this table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from .axes import Dimension

LAYER = "{layer}"


@dataclass(frozen=True)
class Rule:
    """A condition that the config class (or the forward pass) of a family puts on the sizes of its axes."""

    text: str
    holds: Callable[[Mapping[str, int]], bool]


@dataclass(frozen=True)
class Branch:
    """A branch of the residual stream in each layer, by module path below the layer.

    Attributes:
        reads: Module whose input is the residual stream before the branch.
        writes: Module whose output is added to the residual stream.
    """

    reads: str
    writes: str


@dataclass(frozen=True, kw_only=True)
class Family:
    """The axes of one `model_type`, declared as data.

    Attributes:
        model_type: `config.model_type` of the family.
        config_fields: Config field that holds the size of each axis, `layers` among them.
        parameters: Axis layout of every dimension of every parameter (see `axes`), by full name with `{layer}`.
            Parameters that only some configs have (biases) are listed too.
        layers: Path of the list of decoder layers.
        embedding: Path of the token embedding, whose output starts the residual stream.
        norms: Paths of the norms over the hidden axis.
        branches: Branches of each layer, in the order in which they are added to the residual stream.
        heads_site: Module below a layer whose input is the attention output, [.., q_heads·head_dim].
        neurons_site: Module below a layer whose input is the gated MLP activation, [.., neurons].
        per_layer_fields: Config fields with one entry per layer, sliced when layers are removed.
        rules: Conditions on the sizes.
        tiny_config: Keyword arguments of a small config, for tests.
    """

    model_type: str
    config_fields: Mapping[str, str]
    parameters: Mapping[str, tuple[str, ...]]
    layers: str
    embedding: str
    norms: tuple[str, ...]
    branches: tuple[Branch, ...]
    heads_site: str
    neurons_site: str
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    rules: tuple[Rule, ...] = ()
    tiny_config: Mapping[str, Any] = field(default_factory=dict)

    def sizes(self, config: Any) -> dict[str, int]:
        """Units of every axis in `config`; `head_dim` falls back to hidden / heads as the model classes do."""
        sizes = {axis: getattr(config, name, None) for axis, name in self.config_fields.items()}
        if sizes["head_dim"] is None:
            sizes["head_dim"] = sizes["hidden"] // sizes["q_heads"]
        if sizes["kv_heads"] is None:
            sizes["kv_heads"] = sizes["q_heads"]
        return sizes

    def dimensions(self, parameter_name: str) -> tuple[int | None, tuple[Dimension, ...]] | None:
        """(layer index or None, dimensions) of a parameter, or None if the table has no such parameter."""
        for pattern, dimensions in self._patterns:
            if match := pattern.fullmatch(parameter_name):
                layer = match.groupdict().get("layer")
                return None if layer is None else int(layer), dimensions
        return None

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], tuple[Dimension, ...]]]:
        placeholder = re.escape(LAYER)
        return [
            (
                re.compile(re.escape(name).replace(placeholder, r"(?P<layer>\d+)")),
                tuple(map(Dimension.parse, dimensions)),
            )
            for name, dimensions in self.parameters.items()
        ]

    def broken_rules(self, sizes: Mapping[str, int]) -> list[str]:
        """The texts of the rules that `sizes` break."""
        return [rule.text for rule in self.rules if not rule.holds(sizes)]
