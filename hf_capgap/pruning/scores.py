"""The container of scores: what they are of, how they merge, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ScoresError

UNITS = ("batch", "example")
METRICS = ("expressive",)

_TENSORS = ("heads", "neurons", "hidden")
_HASH_MODULUS = 2**256
_TINY = 1e-17  # keeps a layer whose scores are all zero finite, as the reference implementation does


@dataclass(frozen=True, kw_only=True)
class ExpressiveScores:
    """Scores of the units of one model, averaged over calibration units, not normalised.

    Attributes:
        heads: [num_layers, num_key_value_heads] float32, one score per KV group.
        neurons: [num_layers, intermediate_size] float32.
        hidden: [hidden_size] float32.
        metric: What was measured, `"expressive"`.
        unit: What the absolute value was taken over: each `"batch"` or each `"example"`.
        num_units: Batches or examples that the mean is over.
        model_type: `config.model_type` of the scored model.
        model_name: Its Hub id or folder name, for the record.
        calibration_hash: Hash of the multiset of calibration batches (64 hex digits); it does not depend on their
            order or on how they were spread over runs and ranks.
    """

    heads: torch.Tensor
    neurons: torch.Tensor
    hidden: torch.Tensor
    metric: str
    unit: str
    num_units: int
    model_type: str
    model_name: str
    calibration_hash: str

    def normalized(self) -> ExpressiveScores:
        """The same scores, divided by their L2 norm: per layer for heads and neurons, once for hidden."""
        return replace(self, **{name: _unit_norm(getattr(self, name)) for name in _TENSORS})

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. It appears under its name only when it is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        record = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in _TENSORS}
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS}
        save_file(tensors, partial, metadata={"hf_capgap_scores": json.dumps(record)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExpressiveScores:
        """Read a file that `save` wrote.

        Raises:
            ScoresError: Not such a file, damaged, or with non-finite scores.
            FileNotFoundError: No such file.
        """
        try:
            with safe_open(path, framework="pt") as file:
                record = json.loads((file.metadata() or {})["hf_capgap_scores"])
                scores = cls(**{name: file.get_tensor(name) for name in _TENSORS}, **record)
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ScoresError(
                "Not a scores file, or a damaged one", found=f"{path}: {error!r}", fix="Score again."
            ) from error
        scores.check_finite()
        return scores

    @classmethod
    def merge(cls, parts: Sequence[ExpressiveScores]) -> ExpressiveScores:
        """The scores of all calibration units of `parts` together, as if one run had seen them all.

        Raises:
            ScoresError: Nothing to merge, or parts of different models, metrics or units.
        """
        if not parts:
            raise ScoresError("There are no scores to merge")
        first = parts[0]
        for part in parts[1:]:
            for name in ("metric", "unit", "model_type"):
                if getattr(part, name) != getattr(first, name):
                    raise ScoresError(
                        f"Scores of different {name}s cannot be merged",
                        found=(getattr(first, name), getattr(part, name)),
                    )
            if any(getattr(part, name).shape != getattr(first, name).shape for name in _TENSORS):
                raise ScoresError("Scores of models of different sizes cannot be merged")
        num_units = sum(part.num_units for part in parts)
        means = {
            name: (sum(getattr(part, name).double() * part.num_units for part in parts) / num_units).float()
            for name in _TENSORS
        }
        calibration_hash = combine_hashes(part.calibration_hash for part in parts)
        return replace(first, num_units=num_units, calibration_hash=calibration_hash, **means)

    def check_finite(self) -> None:
        """Raises `ScoresError` if any score is NaN or infinite."""
        for name in _TENSORS:
            if not torch.isfinite(getattr(self, name)).all():
                raise ScoresError(f"Non-finite scores of {name}", fix="Score in float32 or bfloat16 on clean data.")


def _unit_norm(scores: torch.Tensor) -> torch.Tensor:
    return scores / (scores.norm(dim=-1, keepdim=True) + _TINY)


def combine_hashes(hashes) -> str:
    """The hash of a multiset from the hashes of its members (hex): their sum, which forgets the order."""
    return f"{sum(int(digest, 16) for digest in hashes) % _HASH_MODULUS:064x}"


def merge_ranks(scores: ExpressiveScores | None) -> ExpressiveScores:
    """The scores of the calibration units of all ranks, on every rank; None from a rank that saw none.

    Raises:
        ScoresError: No rank has scores.
    """
    parts: list[ExpressiveScores | None] = [scores]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, scores)
    present = [part for part in parts if part is not None]
    if not present:
        raise ScoresError(
            "No calibration batch had a target to score on", fix="Check the labels: are all of them -100?"
        )
    return present[0] if len(present) == 1 else ExpressiveScores.merge(present)
