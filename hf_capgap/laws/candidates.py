"""Configs of candidate models, by Hub id or local folder. Only `config.json` is read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CapGapError, PlanError
from ..families import FAMILIES, family_for
from .accounting import ModelSize, measure

_CONFIG = "config.json"
_NUM_THREADS = 16
_CAN_BE_LEFT_OUT = ("kv_heads", "head_dim", "neurons")  # follow from the other sizes


@dataclass(frozen=True)
class Candidate:
    """A model that could be a teacher, or the student.

    Attributes:
        name: Hub id, or folder, as it was given.
        config: The content of its `config.json`.
        size: Its sizes.
    """

    name: str
    config: dict[str, Any]
    size: ModelSize


def find_candidates(names: Sequence[str | os.PathLike]) -> tuple[list[Candidate], dict[str, str]]:
    """Read many configs at the same time.

    Args:
        names: Hub ids, or local folders with a `config.json`.

    Returns:
        Those that could be read, in the order given, and the name of each other one -> what is wrong with it.
    """
    names = list(dict.fromkeys(os.fspath(name) for name in names))
    with ThreadPoolExecutor(max_workers=_NUM_THREADS) as pool:
        results = list(pool.map(_try_to_find, names))
    found = [result for result in results if isinstance(result, Candidate)]
    problems = {name: str(result) for name, result in zip(names, results) if isinstance(result, CapGapError)}
    return found, problems


def find_candidate(name: str | os.PathLike) -> Candidate:
    """Read one config.

    Raises:
        PlanError: A folder without a config, an id that does not exist, is gated, or cannot be reached, or a config
            that is not one of a language model.
        UnsupportedModelError: A model of an unknown family.
    """
    name = os.fspath(name)
    config = _read_config(name, _locate(name))
    _check_sizes(name, config)
    try:
        return Candidate(name, config, measure(config))
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:  # layer types that are no list, ...
        raise PlanError(
            f"The {_CONFIG} makes no model", found=f"{name}: {type(error).__name__}: {error}", fix="Check its fields."
        ) from error


def _try_to_find(name: str) -> Candidate | CapGapError:
    try:
        return find_candidate(name)
    except CapGapError as error:
        return error


def _locate(name: str) -> Path:
    path = Path(name)
    if path.is_file() and path.suffix == ".json":
        return path
    if path.is_dir():
        if not (path / _CONFIG).is_file():
            raise PlanError(f"The folder has no {_CONFIG}", found=name)
        return path / _CONFIG
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise PlanError("There is no such folder", found=name)
    return _download(name)


def _download(name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download  # not needed for local folders

    # The first that fits; children before their parents.
    messages: dict[type[Exception], tuple[str, str]] = {
        errors.GatedRepoError: (
            "The model is gated",
            f"Ask for access at https://huggingface.co/{name}, then log in: hf auth login.",
        ),
        errors.RevisionNotFoundError: ("The model has no such revision", "Look it up on the Hub."),
        errors.RepositoryNotFoundError: (
            "There is no such model on the Hub, or it is private",
            "Check the spelling; for a private model log in: hf auth login.",
        ),
        errors.LocalEntryNotFoundError: (
            "The model's config is not in the local cache, and the Hub cannot be reached",
            "Connect, or name a local folder.",
        ),
        errors.EntryNotFoundError: (f"The repository has no {_CONFIG}", "Name a transformers model."),
        errors.HFValidationError: ("Neither a folder nor the id of a model", 'Ids look like "Qwen/Qwen3-8B".'),
        errors.HfHubHTTPError: ("The Hub did not answer as it should", "Try again later."),
    }
    try:
        return Path(hf_hub_download(name, _CONFIG))
    except tuple(messages) as error:
        cause, fix = next(said for kind, said in messages.items() if isinstance(error, kind))
        raise PlanError(cause, found=name, fix=fix) from error
    except OSError as error:
        raise PlanError("The Hub cannot be reached", found=f"{name}: {error}", fix="Name a local folder.") from error


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"The {_CONFIG} cannot be read", found=f"{name}: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise PlanError(f"The {_CONFIG} is not that of a transformers model", found=name)
    text = config.get("text_config")  # of a model that also sees or hears
    is_multimodal = (
        config["model_type"] not in FAMILIES and isinstance(text, dict) and isinstance(text.get("model_type"), str)
    )
    return text if is_multimodal else config


def _check_sizes(name: str, config: dict[str, Any]) -> None:
    family = family_for(config)
    fields = {axis: (field, family.value(config, field)) for axis, field in family.config_fields.items()}
    wrong = {
        field: value
        for axis, (field, value) in fields.items()
        if not (_is_count(value) or (value is None and axis in _CAN_BE_LEFT_OUT))
    }
    if not wrong:  # what follows from the others
        wrong = {axis: size for axis, size in family.sizes(config).items() if not _is_count(size)}
    if wrong:
        raise PlanError(
            f"The {_CONFIG} does not say its sizes in positive whole numbers",
            found=f"{name}: " + ", ".join(f"{field}={value!r}" for field, value in wrong.items()),
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
