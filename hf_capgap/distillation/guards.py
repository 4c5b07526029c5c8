"""Counting what a run learns from, and stopping one that has nothing to learn from."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import DataError


class TargetCounter(TrainerCallback):
    """Counts valid targets, on all ranks and across resumed runs.

    A run of which a whole epoch had no target is stopped: it would train nothing, silently. No checkpoint is written
        before
    the epoch's first target.
    """

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._unread: torch.Tensor | None = None  # of this rank, since the last read
        self._total = 0
        self._total_before_epoch = 0

    def add(self, num_targets: torch.Tensor) -> None:
        """Add the valid targets (scalar) of a micro-batch; no host synchronisation."""
        self._unread = num_targets if self._unread is None else self._unread + num_targets

    def read(self) -> int:
        """Targets so far, on all ranks. Every rank must call it."""
        nothing = torch.zeros((), dtype=torch.long, device=self._accelerator.device)
        unread, self._unread = nothing if self._unread is None else self._unread, None
        self._total += int(self._accelerator.reduce(unread.clone()).item())
        return self._total

    @property
    def last_read(self) -> int:
        """What `read` last gave."""
        return self._total

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logged = [entry["num_tokens_seen"] for entry in state.log_history if "num_tokens_seen" in entry]
        self._total = logged[-1] if logged and state.global_step > 0 else 0
        self._unread = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._total_before_epoch = self.read()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if control.should_save and self.read() == self._total_before_epoch:
            control.should_save = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.read() == self._total_before_epoch:
            raise DataError(
                "A whole epoch had no target to learn from: its labels are all -100, or there was no row",
                fix="Check the labels (they are shifted by the model, not by the data) and the length of the rows.",
            )
