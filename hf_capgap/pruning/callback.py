"""Scoring while a `Trainer` trains: the same numbers as `score`, from the run's own micro-batches."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..families import audit
from .accumulator import ScoreAccumulator, count_targets
from .fingerprint import fingerprint_of_model
from .metrics import Source, check_unit, metric_named
from .scores import ExpressiveScores, merge_ranks
from .scoring import score_without_data
from .sites import ActivationRecorder, GateRecorder
from .weight_gradients import WeightGradientRecorder


class ExpressiveScoreCallback(TrainerCallback):
    """Records scores (see `score`) during any `Trainer` run.

    Every micro-batch counts once, under gradient accumulation, gradient checkpointing, mixed precision and DDP;
    evaluation batches do not count, nor do micro-batches whose gradients overflowed in float16. The gradients that the
    run computes anyway are rescaled to those of the micro-batch's own mean cross-entropy, whatever the `Trainer`
    divides or multiplies its loss by. With several ranks, each rank's batches weigh the same and every rank ends with
    the same scores.

    Args:
        save_path: Where to write the scores (safetensors) when training ends.
        unit: `"batch"` or `"example"`.
        metric: A key of `METRICS`. Those of the weights alone are taken when training ends.

    After training, `scores` holds the `ExpressiveScores`.

    Raises:
        ConfigError: An unknown unit or metric, or `unit="example"` for a metric of weight gradients, which are of
            whole micro-batches.
    """

    def __init__(self, save_path: str | os.PathLike | None = None, *, unit: str = "batch", metric: str = "expressive"):
        check_unit(unit)
        self._source = metric_named(metric).source
        if unit == "example" and self._source is Source.WEIGHT_GRADIENTS:
            raise ConfigError(
                f"In a training run '{metric}' cannot be taken of single examples",
                found="unit='example'",
                fix="Use unit='batch', or `score(model, batches, unit='example')`.",
            )
        self.save_path = save_path
        self.scores: ExpressiveScores | None = None
        self._unit, self._metric = unit, metric
        self._pending: dict[str, Any] | None = None
        self._recorder: GateRecorder | ActivationRecorder | WeightGradientRecorder | None = None
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
        self._model, self._family = model, audit(model)
        self._accumulator = ScoreAccumulator(model, unit=self._unit, metric=self._metric, skip_overflow=args.fp16)
        if not self._source.needs_data:
            return
        self._recorder = self._make_recorder(model)
        self._recorder.attach()
        self._handles = [
            model.register_forward_pre_hook(self._start_micro_batch, with_kwargs=True),
            model.register_forward_hook(self._end_forward),
        ]

    def on_substep_end(self, *args: Any, **kwargs: Any) -> None:
        self._finish_micro_batch()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._finish_micro_batch()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()
        if self._source.needs_data:
            samples = fingerprint_of_model(self._family, self._model)
            self.scores = merge_ranks(self._accumulator.result(samples) if self._accumulator.num_units else None)
        else:
            self.scores = score_without_data(self._model, self._family, self._metric, seed=args.seed)
        if self.save_path is not None and state.is_world_process_zero:
            self.scores.save(self.save_path)

    def _make_recorder(self, model: torch.nn.Module) -> GateRecorder | ActivationRecorder | WeightGradientRecorder:
        if self._source is Source.WEIGHT_GRADIENTS:
            return WeightGradientRecorder(model, self._family, metric_named(self._metric), keep_gradients=True)
        dropout = self._family.functional_dropout
        if self._source is Source.GATES and dropout is not None and self._family.value(model.config, dropout):
            warnings.warn(
                f"{self._family.model_type} applies its dropout where no hook sees it: the scores of hidden "
                f"dimensions are exact only with {dropout}=0, or from `score(model, batches)`.",
                stacklevel=2,
            )
        recorder = GateRecorder if self._source is Source.GATES else ActivationRecorder
        return recorder(model, self._family, per_example=self._unit == "example")

    def _detach(self) -> None:
        if self._recorder is not None:
            self._recorder.detach()
        for handle in self._handles:
            handle.remove()
        self._handles, self._recorder = [], None

    def _start_micro_batch(self, model: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        counts = model.training and torch.is_grad_enabled()
        if counts:
            inputs = kwargs["input_ids"]
            self._pending = {
                "batch": {"input_ids": inputs, "labels": kwargs.get("labels", inputs)},
                "num_items": kwargs.get("num_items_in_batch"),
                "loss_gradient": None,
            }
        if self._source is Source.ACTIVATIONS:
            self._recorder.enabled = counts
            self._recorder.token_mask = kwargs.get("attention_mask")

    def _end_forward(self, model: torch.nn.Module, args: tuple, output: Any) -> None:
        if self._source is Source.ACTIVATIONS:
            self._recorder.enabled = False  # what a gradient checkpoint computes again does not count again
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
        divisors = self._num_tokens(pending) if self._source is Source.ACTIVATIONS else self._loss_weights(pending)
        self._accumulator.add(self._recorder.take(), divisors, pending["batch"])

    def _num_tokens(self, pending: dict[str, Any]) -> torch.Tensor:
        mask = self._recorder.token_mask
        by_example = (torch.ones_like(pending["batch"]["input_ids"]) if mask is None else mask).sum(1)
        return by_example if self._unit == "example" else by_example.sum().reshape(1)

    def _loss_weights(self, pending: dict[str, Any]) -> torch.Tensor:
        num_targets = count_targets(pending["batch"]["labels"])
        rows = num_targets if self._unit == "example" else num_targets.sum().reshape(1)
        if pending["loss_gradient"] is None:
            self._warn_about_foreign_loss()
            return torch.ones_like(rows)
        num_items = pending["num_items"] if pending["num_items"] is not None else num_targets.sum()
        return rows.cpu() * (float(pending["loss_gradient"]) / max(1.0, float(num_items)))

    def _warn_about_foreign_loss(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "The Trainer does not minimise the model's own loss: the scores are of its objective, at its scale, "
                "and not of the next-token cross-entropy. For those use `score(model, batches)`.",
                stacklevel=2,
            )
