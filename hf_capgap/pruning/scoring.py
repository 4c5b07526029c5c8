"""Scoring a frozen model on calibration batches, without training it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice

import torch
from accelerate.utils import align_module_device, extract_model_from_parallel
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from ..compat import input_device
from ..cross_entropy import NextTokenLoss, default_labels
from ..errors import ConfigError
from ..families import Family, audit, is_quantized
from .accumulator import ScoreAccumulator, count_targets, describe_scored
from .fingerprint import fingerprint_of_model
from .metrics import METRICS, Metric, Source, check_unit, metric_named
from .scores import ExpressiveScores, combine_hashes, merge_ranks
from .sites import ActivationRecorder, GateRecorder
from .units import UnitSums, score_shapes
from .weight_gradients import WeightGradientRecorder


def score(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
    unit: str = "batch",
    metric: str = "expressive",
    *,
    num_batches: int | None = None,
    seed: int | None = None,
    gradient_checkpointing: bool = True,
    distributed: bool = True,
    progress: bool = False,
) -> ExpressiveScores:
    """Scores of every head, neuron, hidden dimension, expert and layer of `model`.

    By default expressive scores (arXiv 2311.07052): the score of a unit is the mean over calibration units of
    |∂L/∂gate|, with a virtual gate of 1 on the unit and L the mean next-token cross-entropy of the batch
    (`unit="batch"`, as the reference implementation computes it) or of each sequence (`unit="example"`, which does not
    depend on the batch size). Batches weigh the same. The model is left as it was found.

    Memory: the weights, and the activations of one layer and one chunk of logits. No gradient of any weight exists,
    but for the metrics `taylor` and `movement`, which are made of them: one weight's at a time.

    Args:
        model: A causal language model of a supported family, on any devices, in any floating dtype, quantised or not.
        batches: Dicts as a `Trainer`'s dataloader yields them: `input_ids` [batch, length], and optionally `labels`
            (unshifted, -100 ignored; the inputs if absent), `attention_mask`, `position_ids`. The metrics `magnitude`,
            `magnitude_l1` and `random` do not read them.
        unit: `"batch"` or `"example"`.
        metric: A key of `METRICS`. `movement` is of one pass over the data at fixed weights here;
            `ExpressiveScoreCallback` accumulates it over a training run.
        num_batches: Stop after so many batches; all if None.
        seed: Of the metric `random`; 0 if None.
        gradient_checkpointing: Compute each layer twice instead of keeping its activations.
        distributed: With several ranks, each with batches of its own (or none), merge the scores of all on every rank.
        progress: Show a progress bar.

    Raises:
        UnsupportedModelError: The model fails the audit of its family.
        ConfigError: An unknown unit or metric, a metric that needs data without batches, or a `seed` without effect.
        ScoresError: No valid target, or a non-finite gradient.
    """
    check_unit(unit)
    description = metric_named(metric)
    if seed is not None and description.source is not Source.NOTHING:
        raise ConfigError(f"The metric '{metric}' takes no seed", found=seed, fix="Leave it out.")
    model = extract_model_from_parallel(model)
    family = audit(model)
    if not description.source.needs_data:
        return score_without_data(model, family, metric, seed=seed or 0)
    if batches is None:
        raise ConfigError(f"The metric '{metric}' needs calibration batches", fix="Pass batches=.")
    accumulator = ScoreAccumulator(model, unit=unit, metric=metric)
    total = len(batches) if isinstance(batches, Sized) else None
    if num_batches is not None:
        batches, total = islice(batches, num_batches), num_batches if total is None else min(total, num_batches)
    scoring = {
        Source.GATES: _score_gates,
        Source.ACTIVATIONS: _score_activations,
        Source.WEIGHT_GRADIENTS: _score_weight_gradients,
    }[description.source]
    layers = model.get_submodule(family.layers) if gradient_checkpointing and description.source.needs_backward else ()
    with _frozen(model), _checkpointed(layers):
        scoring(model, family, accumulator, _prepared(batches, model, total, progress), unit, description)
    samples = fingerprint_of_model(family, model)
    if not distributed:
        return accumulator.result(samples)
    return merge_ranks(accumulator.result(samples) if accumulator.num_units else None)


def score_without_data(model: torch.nn.Module, family: Family, metric: str, *, seed: int) -> ExpressiveScores:
    """Scores by a metric of the weights alone, or of nothing."""
    description = METRICS[metric]
    if description.source is Source.NOTHING:
        generator = torch.Generator().manual_seed(seed)
        shapes = score_shapes(family, model.config)
        values = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    else:
        sums = UnitSums(family, model.config)
        for name, parameter in _weights_of(model, family):
            if not parameter.is_floating_point() or hasattr(parameter, "quant_state"):
                raise ConfigError(
                    f"The metric '{metric}' cannot read a quantised weight", found=name, fix="Load it unquantised."
                )
            sums.add(name, description.entry(parameter.detach().float()))
        values = {name: description.finish(total).float() for name, total in sums.take().items()}
    return ExpressiveScores(
        **values,
        metric=metric,
        unit="batch",
        num_units=1,
        calibration_hash=combine_hashes([]),
        fingerprint=fingerprint_of_model(family, model),
        **describe_scored(model),
    )


def _weights_of(model: torch.nn.Module, family: Family) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight, tied ones once; those that are offloaded are there until the next one is asked for."""
    names = {parameter.name for parameter in family.parameters_of(model.config)}  # offloading breaks ties
    for path, module in model.named_modules():
        with align_module_device(module):
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                if name in names:
                    yield name, parameter


def _score_gates(
    model: torch.nn.Module, family: Family, accumulator: ScoreAccumulator, batches: Iterable, unit: str, metric: Metric
) -> None:
    loss_of = NextTokenLoss(model)
    if is_quantized(model):
        # If the model has run without gradients on a CPU, bitsandbytes has packed its 4-bit weights in a way that has
        # no backward. Asking for the state dict packs them back.
        model.state_dict()
    with GateRecorder(model, family, per_example=unit == "example") as recorder:
        for batch, labels in batches:
            num_targets = count_targets(labels)
            rows = num_targets if unit == "example" else num_targets.sum().reshape(1)
            loss_of(batch, labels, 1.0 / max(1, int(num_targets.sum()))).backward()
            weight = 1.0 / max(1, int(num_targets.sum()))
            accumulator.add(recorder.take(), rows * weight, {**batch, "labels": labels})


def _score_weight_gradients(
    model: torch.nn.Module, family: Family, accumulator: ScoreAccumulator, batches: Iterable, unit: str, metric: Metric
) -> None:
    loss_of = NextTokenLoss(model)
    recorder = WeightGradientRecorder(model, family, metric, keep_gradients=False)
    model.requires_grad_(True)
    with recorder:
        for batch, labels in batches:
            # The gradient of a weight is of the whole batch: single examples run by themselves.
            for part in range(len(labels)) if unit == "example" else (slice(None),):
                rows = slice(part, part + 1) if unit == "example" else part
                num_targets = count_targets(labels[rows]).sum()
                if num_targets == 0:
                    continue
                piece = {name: value[rows] for name, value in batch.items()}
                loss_of(piece, labels[rows], 1.0 / int(num_targets)).backward()
                accumulator.add(recorder.take(), torch.ones(1), {**piece, "labels": labels[rows]})


def _score_activations(
    model: torch.nn.Module, family: Family, accumulator: ScoreAccumulator, batches: Iterable, unit: str, metric: Metric
) -> None:
    with ActivationRecorder(model, family, per_example=unit == "example") as recorder, torch.no_grad():
        for batch, labels in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            recorder.token_mask = mask
            model.base_model(**batch, use_cache=False)
            num_tokens = mask.sum(1) if unit == "example" else mask.sum().reshape(1)
            accumulator.add(recorder.take(), num_tokens, {**batch, "labels": labels})


def _prepared(
    batches: Iterable[Mapping[str, torch.Tensor]], model: torch.nn.Module, total: int | None, progress: bool
) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
    """(what the model reads, labels) of each batch, on the model's device."""
    device = input_device(model)
    for given in tqdm(batches, total=total, desc="scoring", unit="batch", disable=not progress):
        batch = {name: value.to(device) for name, value in given.items()}
        labels = batch.pop("labels", None)
        yield batch, default_labels(batch) if labels is None else labels


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


@contextmanager
def _checkpointed(layers: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Each layer's forward keeps its inputs alone, unless the model checkpoints already.

    `activation_checkpointing_enable` would leave hooks on the embeddings behind that look like the user's own.
    """
    with ExitStack() as stack:
        for layer in layers:
            if getattr(layer, "gradient_checkpointing", False):
                continue
            stack.callback(_set_forward, layer, vars(layer).get("forward"))  # accelerate puts one of its own there
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        yield


def _set_forward(layer: torch.nn.Module, forward: Callable | None) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward
