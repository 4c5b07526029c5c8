"""Models, configs and tokenizers from a folder or the Hub, with one error for all that can be wrong with a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import CheckpointError
from ..extras import require
from ..lineage import hub_commit

QUANTIZATIONS = ("8bit", "4bit")

# An unknown path or id, no network, an unknown model type, a config that its class refuses.
_LOADING_ERRORS = (OSError, ValueError, StrictDataclassError)

_Loaded = TypeVar("_Loaded")


def load_model(name_or_path: str, **options: Any) -> PreTrainedModel:
    """A causal language model, in the dtype it was saved in unless `dtype` says otherwise.

    Raises:
        CheckpointError: It does not load, or a file is damaged.
    """
    given = {"dtype": "auto", **{name: value for name, value in options.items() if value is not None}}
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, **given)
    except SafetensorError as error:
        raise CheckpointError(
            "A weight file is damaged or truncated", found=f"{name_or_path}: {error}", fix="Download it again."
        ) from error
    except _LOADING_ERRORS as error:
        raise _does_not_load("model", name_or_path, error) from error
    model.hub_commit = hub_commit(name_or_path, given.get("revision"))
    return model


def load_config(name_or_path: str, revision: str | None = None) -> PreTrainedConfig:
    """The config of a model.

    Raises:
        CheckpointError: There is none.
    """
    return _load(AutoConfig.from_pretrained, "config", name_or_path, revision)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        CheckpointError: There is none.
    """
    return _load(AutoTokenizer.from_pretrained, "tokenizer", name_or_path, revision)


def quantization(kind: str | None) -> BitsAndBytesConfig | None:
    """How to load a model with packed weights.

    Args:
        kind: One of `QUANTIZATIONS`, or None.

    Raises:
        MissingExtraError: bitsandbytes is not installed.
    """
    if kind is None:
        return None
    require("bitsandbytes", extra="quantization")
    return BitsAndBytesConfig(load_in_8bit=kind == "8bit", load_in_4bit=kind == "4bit")


def _load(load: Callable[..., _Loaded], what: str, name_or_path: str, revision: str | None) -> _Loaded:
    try:
        return load(name_or_path, revision=revision)
    except (*_LOADING_ERRORS, KeyError, AttributeError) as error:
        raise _does_not_load(what, name_or_path, error) from error


def _does_not_load(what: str, name_or_path: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The {what} does not load: {error}", found=name_or_path, fix="Check the path or Hub id, and the network."
    )
