"""Running sums of what the objective measures: kept on the device, added over ranks and divided only when they are
read.
"""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator

from .objective import STATISTICS


class StatisticSums:
    """Sums of per-token statistics and the number of tokens that they are over."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None  # [len(STATISTICS) + 1], the last is num_tokens

    def add(self, statistics: torch.Tensor, num_tokens: torch.Tensor) -> None:
        """Add sums [len(STATISTICS)] over `num_tokens` (scalar) tokens; no host synchronisation."""
        values = torch.cat([statistics.detach().flatten(), num_tokens.reshape(1).to(statistics)])
        values = values.to(_sum_dtype(values.device))
        self._sums = values if self._sums is None else self._sums + values

    def teacher_is_finite(self) -> bool:
        """Whether every teacher entropy so far was finite (one host synchronisation)."""
        return self._sums is None or math.isfinite(self._sums[STATISTICS.index("teacher_entropy")].item())

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the tokens of all ranks, and `num_tokens`; then start anew. Every rank must call it.

        Returns:
            One entry per statistic and `num_tokens`; empty if no rank added anything.
        """
        empty = torch.zeros(len(STATISTICS) + 1, device=accelerator.device, dtype=_sum_dtype(accelerator.device))
        sums, self._sums = empty if self._sums is None else self._sums, None
        *totals, num_tokens = accelerator.reduce(sums).tolist()
        if num_tokens == 0:
            return {}
        return {
            **{name: total / num_tokens for name, total in zip(STATISTICS, totals, strict=True)},
            "num_tokens": num_tokens,
        }


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
