"""Scoring while a `Trainer` trains: the same numbers as `score`, from the run's own micro-batches."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..families import audit
from .accumulator import ScoreAccumulator, check_choices, count_targets
from .gates import GateRecorder
from .scores import ExpressiveScores, merge_ranks


class ExpressiveScoreCallback(TrainerCallback):
    """Records expressive scores (see `score`) during any `Trainer` run.

    Every micro-batch counts once, under gradient accumulation, gradient checkpointing, mixed precision and DDP;
    evaluation batches do not count. The gradients that the run computes anyway are rescaled to those of the
    micro-batch's own mean cross-entropy, whatever the `Trainer` divides or multiplies its loss by. With several ranks,
    each rank's batches weigh the same and every rank ends with the same scores.

    Args:
        save_path: Where to write the scores (safetensors) when training ends.
        unit: `"batch"` or `"example"`.
        metric: `"expressive"`.

    After training, `scores` holds the `ExpressiveScores`.
    """

    def __init__(self, save_path: str | os.PathLike | None = None, *, unit: str = "batch", metric: str = "expressive"):
        check_choices(unit, metric)
        self.save_path = save_path
        self.scores: ExpressiveScores | None = None
        self._unit, self._metric = unit, metric
        self._pending: dict[str, Any] | None = None
        self._recorder: GateRecorder | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._warned = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        if args.torch_compile:
            raise ConfigError(
                "Scores are taken by hooks, which torch_compile may drop", fix="Score without torch_compile."
            )
        self._detach()  # what a run that crashed has left
        family = audit(model).family
        self._accumulator = ScoreAccumulator(model.config, unit=self._unit, metric=self._metric)
        self._recorder = GateRecorder(model, family, per_example=self._unit == "example")
        self._recorder.attach()
        self._handles = [
            model.register_forward_pre_hook(self._start_micro_batch, with_kwargs=True),
            model.register_forward_hook(self._watch_loss),
        ]

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._finish_micro_batch()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._finish_micro_batch()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()
        self.scores = merge_ranks(self._accumulator.result() if self._accumulator.num_units else None)
        if self.save_path is not None and state.is_world_process_zero:
            self.scores.save(self.save_path)

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _start_micro_batch(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.is_grad_enabled():
            inputs = kwargs["input_ids"]
            self._pending = {
                "batch": {"input_ids": inputs, "labels": kwargs.get("labels", inputs)},
                "num_items": kwargs.get("num_items_in_batch"),
                "loss_gradient": None,
            }

    def _watch_loss(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if self._pending is not None and loss is not None and loss.requires_grad:
            # Whatever the Trainer multiplies the loss by (accumulation, ranks, loss scaling) arrives here.
            loss.register_hook(self._keep_loss_gradient)

    def _keep_loss_gradient(self, gradient: torch.Tensor) -> None:
        self._pending["loss_gradient"] = gradient

    def _finish_micro_batch(self) -> None:
        pending, self._pending = self._pending, None
        if pending is None:
            return
        num_targets = count_targets(pending["batch"]["labels"])
        if pending["loss_gradient"] is None:
            self._warn_about_foreign_loss()
            num_targets, token_weight = torch.ones_like(num_targets), 1.0
            if self._unit == "batch":
                num_targets = num_targets[:1]
        else:
            num_items = pending["num_items"] if pending["num_items"] is not None else num_targets.sum()
            token_weight = float(pending["loss_gradient"]) / max(1.0, float(num_items))
        self._accumulator.add(self._recorder.take(), num_targets, token_weight, pending["batch"])

    def _warn_about_foreign_loss(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "The Trainer does not minimise the model's own loss: the scores are of its objective, at its scale, "
                "and not of the next-token cross-entropy. For those use `score(model, batches)`.",
                stacklevel=2,
            )
