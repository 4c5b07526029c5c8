"""The container of scores: what they are of, how they merge, and their file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import OutputFolderError, ScoresError
from .fingerprint import share_equal

UNITS = ("batch", "example")

REQUIRED = ("heads", "neurons", "hidden")
OPTIONAL = ("query_heads", "experts", "layers")
_PER_MODEL = ("hidden", "layers")  # one vector; the others have one per layer
_TENSORS = (*REQUIRED, *OPTIONAL, "fingerprint")
_HASH_MODULUS = 2**256
_TINY = 1e-17  # keeps a layer whose scores are all zero finite, as the reference implementation does


@dataclass(frozen=True, kw_only=True)
class ExpressiveScores:
    """Scores of the units of one model, averaged over calibration units, not normalised. Higher is kept.

    Attributes:
        heads: [num_layers, num_key_value_heads] float32, one score per KV group.
        neurons: [num_layers, intermediate_size] float32, with experts [num_layers, num_experts, intermediate_size].
        hidden: [hidden_size] float32.
        metric: What was measured, a key of `METRICS`.
        unit: What one measurement was taken over: each `"batch"` or each `"example"`.
        num_units: Batches or examples that the mean is over.
        model_type: `config.model_type` of the scored model.
        model_name: Its Hub id or folder name, for the record.
        calibration_hash: Hash of the multiset of calibration batches (64 hex digits); it does not depend on their
            order or on how they were spread over runs and ranks.
        query_heads: [num_layers, num_attention_heads] float32, for cutting query heads inside their groups.
        experts: [num_layers, num_experts] float32, None for a model without experts.
        layers: [num_layers] float32, of what each layer adds to the residual stream.
        fingerprint: [num_parameters, 8] bfloat16 samples of the scored weights (see `fingerprint`), by which `cut`
            knows another model of the same sizes.
        revision: Hub commit of the scored model, if known.
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
    query_heads: torch.Tensor | None = None
    experts: torch.Tensor | None = None
    layers: torch.Tensor | None = None
    fingerprint: torch.Tensor | None = None
    revision: str | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """The scores that there are, by name."""
        return {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL) if getattr(self, name) is not None}

    def normalized(self) -> ExpressiveScores:
        """The same scores, divided by their L2 norm: per layer for heads, neurons and experts, once for the others."""
        return replace(
            self,
            **{name: _unit_norm(scores, per_layer=name not in _PER_MODEL) for name, scores in self.tensors().items()},
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file. It appears under its name only when it is complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        record = {name: value for name, value in values.items() if name not in _TENSORS}
        tensors = {name: values[name].contiguous() for name in _TENSORS if values[name] is not None}
        try:
            save_file(tensors, partial, metadata={"hf_capgap_scores": json.dumps(record)})
            os.replace(partial, path)
        except SafetensorError as error:
            partial.unlink(missing_ok=True)
            raise OutputFolderError("The scores cannot be written", found=f"{path}: {error}") from error
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

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
                scores = cls(**{name: file.get_tensor(name) for name in file.keys()}, **record)  # noqa: SIM118
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
            if _shapes(part) != _shapes(first):
                raise ScoresError("Scores of models of different sizes cannot be merged")
            if share_equal(first.fingerprint, part.fingerprint) < 1.0:
                raise ScoresError("Scores of models with different weights cannot be merged")
        num_units = sum(part.num_units for part in parts)
        means = {
            name: (sum(getattr(part, name).double() * part.num_units for part in parts) / num_units).float()
            for name in first.tensors()
        }
        calibration_hash = combine_hashes(part.calibration_hash for part in parts)
        return replace(first, num_units=num_units, calibration_hash=calibration_hash, **means)

    def check_finite(self) -> None:
        """Raises `ScoresError` if any score is NaN or infinite."""
        for name, scores in self.tensors().items():
            if not torch.isfinite(scores).all():
                raise ScoresError(f"Non-finite scores of {name}", fix="Score in float32 or bfloat16 on clean data.")


def _shapes(scores: ExpressiveScores) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in scores.tensors().items()}


def _unit_norm(scores: torch.Tensor, *, per_layer: bool) -> torch.Tensor:
    flat = scores.flatten(1) if per_layer else scores
    norm = flat.norm(dim=-1, keepdim=True)
    return scores / (norm.view(-1, *[1] * (scores.dim() - 1)) + _TINY)


def combine_hashes(hashes: Iterable[str]) -> str:
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
