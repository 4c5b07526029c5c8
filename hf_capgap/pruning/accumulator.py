"""From gate gradients of micro-batches to scores: absolute value per unit, mean over units, hash of what was seen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from ..errors import ConfigError, ScoresError
from ..labels import IGNORE_INDEX
from ..lineage import public_name
from .scores import METRICS, UNITS, ExpressiveScores, combine_hashes


def check_choices(unit: str, metric: str) -> None:
    """Raises `ConfigError` if `unit` or `metric` is not one of the known ones."""
    for name, value, choices in (("unit", unit, UNITS), ("metric", metric, METRICS)):
        if value not in choices:
            raise ConfigError(f"Unknown {name} of scores", found=value, fix=f"Choose one of: {', '.join(choices)}.")


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Valid next-token targets of each row, [batch] int64, from unshifted labels [batch, length]."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(1)


class ScoreAccumulator:
    """Adds up absolute gate gradients in float64 and turns their mean into `ExpressiveScores`."""

    def __init__(self, config: PreTrainedConfig, *, unit: str, metric: str):
        self._config, self._unit, self._metric = config, unit, metric
        self._sums: dict[str, torch.Tensor] = {}
        self._num_units = 0
        self._hashes: list[str] = []

    @property
    def num_units(self) -> int:
        """Batches or examples added so far."""
        return self._num_units

    def add(
        self,
        gradients: Mapping[str, torch.Tensor],
        num_targets: torch.Tensor,
        token_weight: float,
        batch: Mapping[str, torch.Tensor],
    ) -> None:
        """Add one micro-batch.

        Args:
            gradients: What `GateRecorder.take` returned: one row per example, or one for the batch.
            num_targets: Valid targets of each example, [batch].
            token_weight: Weight of each target's cross-entropy in the loss that ran backward. The gradients of a mean
                over n targets follow by dividing by token_weight · n.
            batch: `input_ids` and `labels`, for the hash of the calibration data.

        Raises:
            ScoresError: A non-finite gradient.
        """
        num_targets = num_targets.cpu().double()
        rows = num_targets if self._unit == "example" else num_targets.sum().reshape(1)
        valid = rows > 0
        if not valid.any():
            return
        for name, gradient in gradients.items():
            scaled = gradient[valid].double() / (token_weight * rows[valid]).view(-1, *[1] * (gradient.dim() - 1))
            if not torch.isfinite(scaled).all():
                raise ScoresError(
                    f"Non-finite gradient of {name} in calibration batch {len(self._hashes)}",
                    fix="Check the data and the model's dtype (float16 overflows easily; bfloat16 does not).",
                )
            total = scaled.abs().sum(0)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._num_units += int(valid.sum())
        self._hashes.append(_hash_batch(batch))

    def result(self) -> ExpressiveScores:
        """The mean of everything added.

        Raises:
            ScoresError: Nothing was added, or no batch had a valid target.
        """
        if self._num_units == 0:
            raise ScoresError(
                "No calibration batch had a target to score on", fix="Give data whose labels are not all -100."
            )
        means = {name: (total / self._num_units).float() for name, total in self._sums.items()}
        return ExpressiveScores(
            **means,
            metric=self._metric,
            unit=self._unit,
            num_units=self._num_units,
            model_type=self._config.model_type,
            model_name=public_name(self._config.name_or_path),
            calibration_hash=combine_hashes(self._hashes),
        )


def _hash_batch(batch: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name in ("input_ids", "labels"):
        values = batch[name].detach().cpu().to(torch.int64)
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
