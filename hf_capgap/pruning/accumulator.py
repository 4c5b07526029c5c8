"""From sums of micro-batches to scores: one value per unit and calibration unit, their mean, hash of what was seen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ScoresError
from ..labels import IGNORE_INDEX
from ..lineage import public_name
from .metrics import METRICS
from .scores import ExpressiveScores, combine_hashes


def count_targets(labels: torch.Tensor) -> torch.Tensor:
    """Valid next-token targets of each row, [batch] int64, from unshifted labels [batch, length]."""
    return (labels[:, 1:] != IGNORE_INDEX).sum(1)


class ScoreAccumulator:
    """Adds up what a recorder took, in float64, and turns the mean into `ExpressiveScores`.

    Args:
        model: The scored model.
        unit: `"batch"` or `"example"`.
        metric: A key of `METRICS`.
        skip_overflow: Leave out micro-batches with non-finite values instead of refusing them: those of a float16 run
            whose loss scale was too high, as its optimizer step is left out.
    """

    def __init__(self, model: torch.nn.Module, *, unit: str, metric: str, skip_overflow: bool = False):
        self._model, self._unit, self._metric = model, unit, metric
        self._finish = METRICS[metric].finish
        self._skip_overflow = skip_overflow
        self._sums: dict[str, torch.Tensor] = {}
        self._num_units = 0
        self._num_seen = 0
        self._hashes: list[str] = []

    @property
    def num_units(self) -> int:
        """Batches or examples added so far."""
        return self._num_units

    def add(
        self, taken: Mapping[str, torch.Tensor], divisors: torch.Tensor, batch: Mapping[str, torch.Tensor]
    ) -> None:
        """Add one micro-batch.

        Args:
            taken: What a recorder's `take` returned: one row per example, or one for the batch.
            divisors: Of each row, [rows]: the weight of its targets in the loss that ran backward times their number,
                which makes the sums those of a mean over targets. Rows with 0 do not count.
            batch: `input_ids` and `labels`, for the hash of the calibration data.

        Raises:
            ScoresError: A non-finite value.
        """
        self._num_seen += 1
        divisors = divisors.cpu().double()
        valid = divisors != 0
        if not valid.any():
            return
        values = {}
        for name, rows in taken.items():
            rows = rows.cpu()[valid].double()
            scaled = rows / divisors[valid].view(-1, *[1] * (rows.dim() - 1))
            if not torch.isfinite(scaled).all():
                if self._skip_overflow:
                    return
                raise ScoresError(
                    f"Non-finite values of {name} in calibration batch {self._num_seen - 1}",
                    fix="Check the data and the model's dtype (float16 overflows easily; bfloat16 does not).",
                )
            values[name] = self._finish(scaled).sum(0)
        for name, total in values.items():
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._num_units += int(valid.sum())
        self._hashes.append(_hash_batch(batch))

    def result(self, fingerprint: torch.Tensor) -> ExpressiveScores:
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
            calibration_hash=combine_hashes(self._hashes),
            fingerprint=fingerprint,
            **describe_scored(self._model),
        )


def describe_scored(model: torch.nn.Module) -> dict[str, Any]:
    """What scores record of the model that they are of."""
    return {
        "model_type": model.config.model_type,
        "model_name": public_name(model.config.name_or_path),
        "revision": getattr(model, "hub_commit", None),
    }


def _hash_batch(batch: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for name in ("input_ids", "labels"):
        values = batch[name].detach().cpu().to(torch.int64)
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
