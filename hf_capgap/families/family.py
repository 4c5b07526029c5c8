"""What a model family is: a table of named axes. Everything else in the package is generic over this table.

Nothing here needs torch: a config, or the content of a `config.json`, is enough to know every tensor of a model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from typing import Any

from .axes import Dimension

LAYER, EXPERT = "{layer}", "{expert}"
HEAD = "lm_head.weight"

Config = Any  # a `PreTrainedConfig`, or a mapping as `config.json` holds it


@dataclass(frozen=True)
class Rule:
    """A condition that the config class (or the forward pass) of a family puts on the sizes of its axes."""

    text: str
    holds: Callable[[Mapping[str, int]], bool]


@dataclass(frozen=True)
class When:
    """A condition on one field of a config."""

    field: str
    equals: Any


@dataclass(frozen=True)
class Branch:
    """A branch of the residual stream in each layer, by module path below the layer.

    Attributes:
        reads: Module whose input is the residual stream before the branch.
        writes: Module whose output is added to the residual stream.
    """

    reads: str
    writes: str


@dataclass(frozen=True)
class Parameter:
    """One tensor and the axes of its dimensions.

    Attributes:
        name: Its full name.
        layer: Decoder layer that it belongs to, None outside the layers.
        expert: Expert that it belongs to, None if it is no single expert's.
        dimensions: One per dimension of the tensor.
    """

    name: str
    layer: int | None
    expert: int | None
    dimensions: tuple[Dimension, ...]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(dimension.size(sizes) for dimension in self.dimensions)


@dataclass(frozen=True, kw_only=True)
class Family:
    """The axes of one `model_type`, declared as data.

    Attributes:
        model_type: `config.model_type` of the family.
        config_fields: Config field that holds the size of each axis, `layers` among them. Without `head_dim` the heads
            share the hidden size; without `kv_heads` each query head has its own keys and values.
        parameters: Axis layout of every dimension of every parameter (see `axes`), by full name with `{layer}`.
        optional: Parameters (glob over names) that only some configs have, and when.
        stored: Axis layouts of what a checkpoint holds under other names than the model: experts one by one.
        stored_instead_of: The parameters (names as in `parameters`) that `stored` takes the place of.
        stored_names: Other beginnings of names in checkpoints, as (theirs, ours).
        written_names: Those of them that `save_pretrained` writes, as (theirs, ours).
        layers: Path of the list of decoder layers.
        lookups: Parameters that are indexed, not multiplied; the token embedding first.
        norms: Path of each norm, and the dimension that it runs over.
        branches: Branches of each layer, in the order in which they are added to the residual stream.
        parallel: Set if, and while this holds, all branches of a layer read the same stream and are added in one sum.
        heads_site: Module below a layer whose input is the attention output, [.., q_heads·head_dim].
        neurons_site: Module below a layer whose input is the MLP activation, [.., neurons]; None with experts.
        experts_site: Module below a layer that runs the experts, called with (states [tokens, hidden],
            chosen experts [tokens, k], their weights [tokens, k]); None without experts.
        router: Module below a layer that chooses the experts.
        functional_dropout: Config field of a dropout between a branch and its sum that is no module of its own.
        per_layer_fields: Config fields with one entry per layer, sliced when layers are removed.
        follows_hidden: Config fields that repeat the hidden size.
        requires: Conditions without which this table does not describe the model.
        pinned: Numbers that some configs fix for `rules`, by name: from the family and a config, None if not fixed.
        rules: Conditions on the sizes.
        multiples: Axes whose size must be a multiple of a number.
        scales_embeddings: The model multiplies embeddings by √hidden.
        norm_offset: What a norm adds to its weight before it multiplies (1 for Gemma).
        aliases: Other names of config fields, as a `config.json` may have them.
        defaults: What the config class takes for a field that a `config.json` leaves out.
        tiny_config: Keyword arguments of a small config, for tests.
    """

    model_type: str
    config_fields: Mapping[str, str]
    parameters: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, When] = field(default_factory=dict)
    stored: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    stored_instead_of: tuple[str, ...] = ()
    stored_names: tuple[tuple[str, str], ...] = ()
    written_names: tuple[tuple[str, str], ...] = ()
    layers: str = "model.layers"
    lookups: tuple[str, ...] = ("model.embed_tokens.weight",)
    norms: Mapping[str, str]
    branches: tuple[Branch, ...]
    parallel: When | None = None
    heads_site: str = "self_attn.o_proj"
    neurons_site: str | None = "mlp.down_proj"
    experts_site: str | None = None
    router: str | None = None
    functional_dropout: str | None = None
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    follows_hidden: tuple[str, ...] = ()
    requires: tuple[When, ...] = ()
    pinned: Mapping[str, Callable[[Family, Config], int | None]] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    multiples: Mapping[str, int] = field(default_factory=dict)
    scales_embeddings: bool = False
    norm_offset: float = 0.0
    aliases: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tiny_config: Mapping[str, Any] = field(default_factory=dict)

    def value(self, config: Config, name: str) -> Any:
        """A field of `config`, or what the config class takes when it is left out."""
        default = self.defaults.get(name)
        if not isinstance(config, Mapping):
            return getattr(config, name, default)
        return config.get(name, config.get(self.aliases.get(name), default))

    def holds(self, condition: When, config: Config) -> bool:
        """Whether `config` meets `condition`."""
        return self.value(config, condition.field) == condition.equals

    def sizes(self, config: Config) -> dict[str, int]:
        """Units of every axis in `config`, with the fallbacks of the model classes for what it leaves open."""
        sizes = {axis: self.value(config, name) for axis, name in self.config_fields.items()}
        fallbacks = {
            "kv_heads": lambda: sizes["q_heads"],
            "head_dim": lambda: sizes["hidden"] // sizes["q_heads"],
            "neurons": lambda: 4 * sizes["hidden"],
        }
        for axis, fallback in fallbacks.items():
            if sizes.get(axis) is None:
                sizes[axis] = fallback()
        pinned = {name: of(self, config) for name, of in self.pinned.items()}
        return {**sizes, **{name: value for name, value in pinned.items() if value is not None}}

    def tied(self, config: Config) -> bool:
        """Whether the output head is the token embedding."""
        return bool(self.value(config, "tie_word_embeddings"))

    def adds_branches_at_once(self, config: Config) -> bool:
        """Whether all branches of a layer are added to the stream in one sum."""
        return self.parallel is not None and self.holds(self.parallel, config)

    def parameters_of(self, config: Config) -> Iterator[Parameter]:
        """Every parameter of a model with `config`, tied ones once."""
        num_layers = self.sizes(config)["layers"]
        for name, dimensions in self._present(config):
            for layer in range(num_layers) if LAYER in name else (None,):
                yield Parameter(name.replace(LAYER, str(layer)), layer, None, dimensions)

    def stored_parameters_of(self, config: Config) -> Iterator[Parameter]:
        """Every tensor of a checkpoint of a model with `config`, experts as `save_pretrained` writes them."""
        sizes = self.sizes(config)
        replaced = {
            parameter.replace(LAYER, str(layer))
            for parameter in self.stored_instead_of
            for layer in range(sizes["layers"])
        }
        yield from (parameter for parameter in self.parameters_of(config) if parameter.name not in replaced)
        for name, dimensions in self.stored.items():
            for layer in range(sizes["layers"]):
                for expert in range(sizes["experts"]) if EXPERT in name else (None,):
                    full_name = name.replace(LAYER, str(layer)).replace(EXPERT, str(expert))
                    yield Parameter(full_name, layer, expert, tuple(map(Dimension.parse, dimensions)))

    def num_parameters(self, config: Config, sizes: Mapping[str, int] | None = None) -> int:
        """Parameters of a model with `config`, tied ones once.

        Args:
            sizes: Other sizes of the axes than the config's: what a model of this make would have with them.
        """
        sizes = {**self.sizes(config), **(sizes or {})}
        return sum(
            (sizes["layers"] if LAYER in name else 1) * prod(dimension.size(sizes) for dimension in dimensions)
            for name, dimensions in self._present(config)
        )

    def explain(self, name: str) -> Parameter | None:
        """The parameter of this name in a model or a checkpoint, or None if the table has no such parameter."""
        for pattern, dimensions in self._patterns:
            if match := pattern.fullmatch(name):
                numbers = {key: int(value) for key, value in match.groupdict().items()}
                return Parameter(name, numbers.get("layer"), numbers.get("expert"), dimensions)
        return None

    def broken_rules(self, sizes: Mapping[str, int]) -> list[str]:
        """The texts of the rules that `sizes` break."""
        uneven = [
            f"{self.config_fields[axis]} must be a multiple of {number}"
            for axis, number in self.multiples.items()
            if sizes[axis] % number
        ]
        return uneven + [rule.text for rule in self.rules if not rule.holds(sizes)]

    def _present(self, config: Config) -> Iterator[tuple[str, tuple[Dimension, ...]]]:
        """Name pattern and dimensions of the parameters that a model with `config` has."""
        absent = [glob for glob, condition in self.optional.items() if not self.holds(condition, config)]
        for name, dimensions in self.parameters.items():
            if not any(fnmatchcase(name, glob) for glob in absent):
                yield name, tuple(map(Dimension.parse, dimensions))

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], tuple[Dimension, ...]]]:
        return [
            (_pattern(name), tuple(map(Dimension.parse, dimensions)))
            for table in (self.parameters, self.stored)
            for name, dimensions in table.items()
        ]


def _pattern(name: str) -> re.Pattern[str]:
    text = re.escape(name)
    for placeholder in (LAYER, EXPERT):
        text = text.replace(re.escape(placeholder), rf"(?P<{placeholder.strip('{}')}>\d+)")
    return re.compile(text)
