"""`capgap.json`: what was done to a model, stage by stage, kept in the model's own folder.

    {"version": 1, "stages": [{"stage": "cut", ...}, {"stage": "distil", ...}]}

A stage is a plain dict of facts. No local path goes in: a model is known by its Hub id or by its folder's name.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from .errors import CapGapError

FILE_NAME = "capgap.json"
_VERSION = 1
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_PACKAGES = ("hf-capgap", "torch", "transformers", "accelerate", "datasets", "safetensors", "peft")


def public_name(name_or_path: str) -> str:
    """A Hub id as it is; of a local path only the last part."""
    name = str(name_or_path).rstrip("/\\")
    is_hub_id = _HUB_ID.fullmatch(name) and not os.path.exists(name)
    return name if is_hub_id else re.split(r"[/\\]", name)[-1]


def hub_commit(
    name_or_path: str, revision: str | None = None, cache_dir: str | os.PathLike | None = None
) -> str | None:
    """The commit of a Hub model that has just been loaded with `revision`; None for a local folder.

    Models do not remember it, so whoever loads one for a lineage keeps it as the model's `hub_commit`.
    """
    if os.path.isdir(name_or_path):
        return None
    cached = try_to_load_from_cache(str(name_or_path), "config.json", cache_dir=cache_dir, revision=revision)
    return Path(cached).parent.name if isinstance(cached, str) else None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def new_stage(stage: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's record: its name, its facts, and the package versions."""
    return {"stage": stage, **facts, "versions": package_versions()}


def read_stages(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """The stages recorded in a model's folder; none if it has no lineage.

    Raises:
        CapGapError: A lineage file that cannot be understood.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return []
    try:
        stages = json.loads(path.read_text(encoding="utf-8"))["stages"]
        if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
            raise TypeError("stages must be a list of records")
        return stages
    except (ValueError, KeyError, TypeError) as error:
        raise CapGapError(
            "The lineage file is damaged", found=f"{path.name}: {error!r}", fix="Restore or remove it."
        ) from error


def write_stages(folder: str | os.PathLike, stages: list[dict[str, Any]]) -> None:
    """Write the lineage of a model's folder; the file appears only when it is complete."""
    path = Path(folder) / FILE_NAME
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({"version": _VERSION, "stages": stages}, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def stages_of(model: Any) -> list[dict[str, Any]]:
    """The lineage of a model in memory: its own (set by `cut`), or that of the folder it was loaded from."""
    own = getattr(model, "lineage", None)
    if own is not None:
        return list(own)
    folder = getattr(model, "name_or_path", "")
    return read_stages(folder) if folder and os.path.isdir(folder) else []


def describe_model(model: Any) -> dict[str, Any]:
    """The facts that identify a model: public name, Hub commit if we loaded it (see `hub_commit`), type and size."""
    return {
        "name": public_name(model.name_or_path),
        "revision": getattr(model, "hub_commit", None),
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters(),
    }
