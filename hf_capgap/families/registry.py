"""Which families there are, and the audit that a model must pass before anything is scored or cut."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from .experts import MIXTRAL, QWEN3_MOE
from .family import HEAD, Config, Family
from .gemma import GEMMA2, GEMMA3
from .gpt import GPT2, GPT_NEOX, OPT
from .llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3, SMOLLM3

if TYPE_CHECKING:
    import torch

_ALL = (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, OLMO2, PHI3),
    *(GEMMA2, GEMMA3),
    *(GPT2, GPT_NEOX, OPT),
    *(MIXTRAL, QWEN3_MOE),
)
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}


def supported_model_types() -> list[str]:
    """The `model_type`s that can be scored and cut."""
    return sorted(FAMILIES)


def family_for(config: Config) -> Family:
    """The family of a config, or of the content of a `config.json`.

    Raises:
        UnsupportedModelError: No table describes this `model_type`, or this model departs from its table.
    """
    model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    try:
        family = FAMILIES[model_type]
    except KeyError:
        raise _unsupported("No family table describes this model", model_type) from None
    for condition in family.requires:
        if not family.holds(condition, config):
            raise _unsupported(
                f"The {model_type} table covers only models with {condition.field}={condition.equals!r}",
                f"{condition.field}={family.value(config, condition.field)!r}",
            )
    return family


def audit(model: torch.nn.Module) -> Family:
    """Check that the family's table claims every dimension of every parameter of `model`, and no parameter besides.

    Returns:
        The family.

    Raises:
        UnsupportedModelError: Unknown family, or a parameter that the table does not name, whose shape it does not
            explain, or that is missing. The message names the parameter; nothing has been changed.
    """
    family = family_for(model.config)
    sizes = family.sizes(model.config)
    present = dict(model.named_parameters())
    for name, parameter in present.items():
        _check(name, _logical_shape(parameter), family, sizes)
    for parameter in family.parameters_of(model.config):
        if parameter.name not in present:
            raise _unsupported(f"The model lacks a parameter of the {family.model_type} table", parameter.name)
    _check_tie(present, family, model.config)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in () if is_quantized(model) else model.state_dict():  # a quantised layer stores its scales as buffers
        if name not in known:
            raise _unsupported(f"The {family.model_type} table has no place for a stored buffer", name)
    return family


def _check_tie(present: Mapping[str, torch.nn.Parameter], family: Family, config: Config) -> None:
    """A checkpoint can hold a head of its own although its config says that the head is the embedding."""
    head, embedding = present.get(HEAD), present.get(family.lookups[0])
    if not family.tied(config) or head is None or embedding is None or head.is_meta or embedding.is_meta:
        return  # tied parameters are listed once; offloading lists them twice
    if head.shape != embedding.shape or bool((head.to(embedding.device) != embedding).any()):
        raise _unsupported(
            "The config says that the output head is the token embedding, but the weights of the two differ: set "
            "tie_word_embeddings to false in config.json",
            HEAD,
        )


def is_quantized(model: torch.nn.Module) -> bool:
    """Whether `model` was loaded with packed weights, which can be scored but not cut."""
    return getattr(model.config, "quantization_config", None) is not None


def _logical_shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    packed = getattr(parameter, "quant_state", None)  # bitsandbytes: two 4-bit weights to a byte, in one column
    return tuple(parameter.shape if packed is None else packed.shape)


def _check(name: str, shape: tuple[int, ...], family: Family, sizes: Mapping[str, int]) -> None:
    found = family.explain(name)
    if found is None:
        raise _unsupported(f"The {family.model_type} table does not name the parameter {name}", f"shape {shape}")
    if shape != found.shape(sizes):
        raise _unsupported(
            f"The parameter {name} does not have the shape {found.shape(sizes)} that the {family.model_type} table "
            "gives",
            f"shape {shape}",
        )


def _unsupported(cause: str, found: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        cause,
        found=found,
        fix=f"Supported families: {', '.join(supported_model_types())}. "
        "Adapters must be merged first. docs/adding_a_family.md says how to add a family.",
    )
