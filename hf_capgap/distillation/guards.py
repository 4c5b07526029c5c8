"""Watching that a run has something to learn from."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import DataError


class TargetGuard(TrainerCallback):
    """Stops a run of which a whole epoch had no valid target on any rank: it would train nothing, silently."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._num_targets: torch.Tensor | None = None

    def count(self, num_targets: torch.Tensor) -> None:
        """Add the valid targets (scalar) of a micro-batch; no host synchronisation."""
        self._num_targets = num_targets if self._num_targets is None else self._num_targets + num_targets

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._num_targets = None

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        nothing = torch.zeros((), dtype=torch.long, device=args.device)
        total = self._accelerator.reduce(nothing if self._num_targets is None else self._num_targets.clone())
        if total.item() == 0:
            raise DataError(
                "A whole epoch had no target to learn from",
                found="an empty dataset" if self._num_targets is None else "labels that are all -100",
                fix="Check the labels (they are shifted by the model, not by the data) and the length of the rows.",
            )
