"""Which families there are, and the audit that a model must pass before anything is scored or cut."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from ..errors import UnsupportedModelError
from .axes import Dimension
from .family import Family
from .llama import LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES: Mapping[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


@dataclass(frozen=True)
class Entry:
    """One parameter and the axes of its dimensions; `layer` is None outside the decoder layers."""

    name: str
    layer: int | None
    dimensions: tuple[Dimension, ...]


@dataclass(frozen=True)
class Inventory:
    """Every distinct parameter of a model (tied ones once), as its family's table explains it."""

    family: Family
    entries: tuple[Entry, ...]

    def num_parameters(self, sizes: Mapping[str, int]) -> int:
        """Parameters of a model of this make with other `sizes` of the axes, none wider or deeper than this one."""
        return sum(
            count * prod(dimension.size(sizes) for dimension in dimensions)
            for dimensions, count in self._layouts(sizes["layers"]).items()
        )

    def _layouts(self, num_layers: int) -> Counter[tuple[Dimension, ...]]:
        """How many parameters of each layout the first `num_layers` layers and everything outside them have."""
        if num_layers not in self._layouts_by_depth:
            self._layouts_by_depth[num_layers] = Counter(
                entry.dimensions for entry in self.entries if entry.layer is None or entry.layer < num_layers
            )
        return self._layouts_by_depth[num_layers]

    @cached_property
    def _layouts_by_depth(self) -> dict[int, Counter[tuple[Dimension, ...]]]:
        return {}  # the solver asks thousands of times


def family_for(config: PreTrainedConfig) -> Family:
    """The family of a config.

    Raises:
        UnsupportedModelError: No table describes this `model_type`.
    """
    try:
        return FAMILIES[config.model_type]
    except KeyError:
        raise _unsupported("No family table describes this model", config.model_type) from None


def audit(model: torch.nn.Module) -> Inventory:
    """Check that the family's table claims every dimension of every parameter of `model`.

    Raises:
        UnsupportedModelError: Unknown family, or a parameter that the table does not name or whose shape it does not
            explain. The message names the parameter; nothing has been changed.
    """
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    entries = tuple(
        _explain(name, tuple(parameter.shape), family, sizes) for name, parameter in model.named_parameters()
    )
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in model.state_dict():
        if name not in known:
            raise _unsupported(f"The {family.model_type} table has no place for a stored buffer", name)
    return Inventory(family, entries)


def _explain(name: str, shape: tuple[int, ...], family: Family, sizes: Mapping[str, int]) -> Entry:
    found = family.dimensions(name)
    if found is None:
        raise _unsupported(f"The {family.model_type} table does not name the parameter {name}", f"shape {shape}")
    layer, dimensions = found
    expected = tuple(dimension.size(sizes) for dimension in dimensions)
    if shape != expected:
        raise _unsupported(
            f"The parameter {name} does not have the shape {expected} that the {family.model_type} table gives",
            f"shape {shape}",
        )
    return Entry(name, layer, dimensions)


def _unsupported(cause: str, found: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        cause,
        found=found,
        fix=f"Supported families: {', '.join(supported_model_types())}. "
        "Adapters and quantised weights must be merged first.",
    )


def inventory_of(config: PreTrainedConfig) -> Inventory:
    """The inventory of the model that `config` describes, built without weights."""
    family_for(config)
    return _inventory_of(config.model_type, json.dumps(config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=32)
def _inventory_of(model_type: str, config_json: str) -> Inventory:
    values: dict[str, Any] = json.loads(config_json)
    config = AutoConfig.for_model(model_type, **{key: value for key, value in values.items() if key != "model_type"})
    with torch.device("meta"):
        return audit(AutoModelForCausalLM.from_config(config))


def supported_model_types() -> list[str]:
    """The `model_type`s that can be scored and cut."""
    return sorted(FAMILIES)
