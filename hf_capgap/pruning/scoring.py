"""Scoring a frozen model on calibration batches, without training it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..families import audit
from ..labels import IGNORE_INDEX
from .accumulator import ScoreAccumulator, check_choices, count_targets
from .gates import GateRecorder
from .scores import ExpressiveScores


def score(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]],
    unit: str = "batch",
    metric: str = "expressive",
    *,
    num_batches: int | None = None,
    progress: bool = False,
) -> ExpressiveScores:
    """Expressive scores of every KV group, neuron and hidden dimension of `model` (arXiv 2311.07052).

    The score of a unit is the mean over calibration units of |∂L/∂gate|, with a virtual gate of 1 on the unit and L
    the mean next-token cross-entropy of the batch (`unit="batch"`, as the reference implementation computes it) or of
    each sequence (`unit="example"`, which does not depend on the batch size). Batches weigh the same. Weights are
    frozen meanwhile: no weight gradient is ever allocated; the model is left as it was found.

    Args:
        model: A causal language model of a supported family, on any device and in any floating dtype.
        batches: Dicts as a `Trainer`'s dataloader yields them: `input_ids` [batch, length], and optionally `labels`
            (unshifted, -100 ignored; the inputs if absent), `attention_mask`, `position_ids`.
        unit: `"batch"` or `"example"`.
        metric: `"expressive"`.
        num_batches: Stop after so many batches; all if None.
        progress: Show a progress bar.

    Raises:
        UnsupportedModelError: The model fails the audit of its family.
        ScoresError: No valid target, or a non-finite gradient.
    """
    check_choices(unit, metric)
    family = audit(model).family
    accumulator = ScoreAccumulator(model.config, unit=unit, metric=metric)
    with _frozen(model), GateRecorder(model, family, per_example=unit == "example") as recorder:
        for batch in tqdm(islice(batches, num_batches), total=num_batches, desc="scoring", disable=not progress):
            batch = {name: value.to(model.device) for name, value in batch.items()}
            labels = batch.pop("labels", None)
            if labels is None:
                labels = _default_labels(batch)
            num_targets = count_targets(labels)
            token_weight = 1.0 / max(1, int(num_targets.sum()))
            (token_weight * _sum_cross_entropy(model(**batch, use_cache=False).logits, labels)).backward()
            accumulator.add(recorder.take(), num_targets, token_weight, {**batch, "labels": labels})
    return accumulator.result()


def _default_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The inputs, but for what the attention mask hides."""
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, IGNORE_INDEX)


def _sum_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed next-token cross-entropy of logits [batch, length, vocab] against unshifted labels [batch, length]."""
    targets = labels[:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets, ignore_index=IGNORE_INDEX, reduction="sum")


@contextmanager
def _frozen(model: torch.nn.Module) -> Iterator[None]:
    """Weights that ask for no gradient, no dropout, and gradients enabled; everything is restored on the way out."""
    required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        model.requires_grad_(False)
        model.eval()
        for module in model.modules():
            # A layer checkpoints only in training mode; its children (dropout, attention) stay in evaluation mode.
            if getattr(module, "gradient_checkpointing", False):
                module.training = True
        with torch.enable_grad():
            yield
    finally:
        for parameter, value in required:
            parameter.requires_grad_(value)
        for module, value in training:
            module.training = value
