"""Cutting in stages: score, cut a part, optionally train, and again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice, product
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..families import Config, family_for
from ..output import require_empty
from .scores import ExpressiveScores
from .scoring import score
from .shapes import StudentShape, to_multiple
from .solver import solve_shape
from .surgery import cut, save_student

# (student, teacher, stage from 1) -> the trained student, or None if it was trained in place.
Distil = Callable[[PreTrainedModel, PreTrainedModel, int], "PreTrainedModel | None"]


def prune(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, torch.Tensor]],
    target: StudentShape | str | int,
    *,
    stages: int = 1,
    metric: str = "expressive",
    unit: str = "batch",
    num_batches: int | None = None,
    layers: str = "symmetric",
    protect_ends: bool = False,
    num_hidden_layers: int | None = None,
    num_experts: int | None = None,
    multiple_of: int | None = None,
    tensor_parallel: int = 1,
    split: str = "balanced",
    distil: Distil | None = None,
    output_dir: str | os.PathLike | None = None,
    progress: bool = False,
) -> PreTrainedModel:
    """Score and cut `model` down to `target`, in `stages` steps of the same ratio with new scores before each.

    The score of a unit is a first-order estimate around the whole teacher. The more is removed at once, the less it
    says; so a large cut is better made in parts, the more so with some training in between.

    Args:
        model: The teacher. It is not modified.
        batches: Calibration batches, see `score`. The same ones score every stage.
        target: The final shape, or a target for `solve_shape`.
        stages: Number of cuts.
        metric: See `score`.
        unit: See `score`.
        num_batches: See `score`.
        layers: `"symmetric"` or `"scores"`, see `select`.
        protect_ends: See `select`.
        num_hidden_layers: See `solve_shape`; like the next four, only for a target that is no shape.
        num_experts: See `solve_shape`.
        multiple_of: See `solve_shape`.
        tensor_parallel: See `solve_shape`.
        split: See `solve_shape`.
        distil: Trains the student after each cut but the last: called with (student, teacher, stage from 1), returns
            the trained student, or None for the one it was given.
        output_dir: Save the student there, see `cut`.
        progress: Show progress bars.

    Returns:
        The student. `kept` is in the teacher's numbering, `lineage` has a stage for each cut.

    Raises:
        ConfigError: An impossible number of stages.
        ShapeError, ScoresError, UnsupportedModelError: See `score`, `solve_shape` and `cut`.
    """
    if stages < 1:
        raise ConfigError("There must be at least one stage", found=stages)
    if not isinstance(layers, str):
        raise ConfigError(
            "Layers by index have a meaning for one cut only", found=layers, fix="Use cut(..., layers=[...])."
        )
    if output_dir is not None:
        require_empty(output_dir)
    if isinstance(batches, Iterator):
        batches = list(islice(batches, num_batches))  # every stage reads them again
    shape_options = {
        "num_hidden_layers": num_hidden_layers,
        "num_experts": num_experts,
        "multiple_of": multiple_of,
        "tensor_parallel": tensor_parallel,
        "split": split,
    }
    final, student, kept = None, model, None
    if isinstance(target, StudentShape) or split != "scores":  # what is wrong with it shows before the scoring
        final = _final_shape(model.config, target, None, shape_options)
    for stage in range(1, stages + 1):
        scores = score(student, batches, unit, metric, num_batches=num_batches, progress=progress)
        if final is None:
            final = _final_shape(model.config, target, scores, shape_options)
        shape = stage_shapes(model.config, final, stages)[stage - 1]
        student = cut(student, scores, shape, layers, protect_ends=protect_ends)
        kept = student.kept if kept is None else kept.then(student.kept)
        if distil is not None and stage < stages:
            stages_so_far = student.lineage
            student = distil(student, model, stage) or student
            student.lineage = getattr(student, "lineage", stages_so_far)
    student.kept = kept
    if output_dir is not None:
        save_student(student, model.name_or_path, output_dir)
    return student


def _final_shape(
    config: Config, target: StudentShape | str | int, scores: ExpressiveScores | None, options: Mapping[str, Any]
) -> StudentShape:
    if isinstance(target, StudentShape):
        given = {name for name, value in options.items() if value not in (None, 1, "balanced")}
        if given:
            raise ConfigError("These options choose a shape, but a shape is given", found=", ".join(sorted(given)))
        target.check_within(config)
        return target
    return solve_shape(config, target, scores=scores, **options)


def stage_shapes(config: Config, final: StudentShape, stages: int) -> list[StudentShape]:
    """Shapes after each of `stages` cuts of about the same ratio: each fits into the one before, the last is `final`.

    Args:
        config: The teacher's config.
        final: A shape that fits the teacher.
        stages: Number of cuts.
    """
    shapes = [StudentShape.of(config)]
    for remaining in range(stages, 0, -1):
        # From the last shape, not from the teacher: means of the whole way, rounded one by one, need not be nested.
        shapes.append(_on_the_way(shapes[-1], final, 1 / remaining, config))
    return shapes[1:]


def _on_the_way(current: StudentShape, final: StudentShape, fraction: float, config: Config) -> StudentShape:
    """A legal shape near the geometric mean of `current` and `final`, and between them in every dimension."""
    if fraction == 1:
        return final
    family = family_for(config)
    mean = {
        name: round(size ** (1 - fraction) * (getattr(final, name) or size) ** fraction)
        for name, size in current.as_dict().items()
    }
    neurons = to_multiple(mean["intermediate_size"], family.multiples.get("neurons", 1))
    mean["intermediate_size"] = max(neurons, final.intermediate_size)
    wanted, known = StudentShape(**mean), family.sizes(config)
    hidden_sizes = sorted(
        range(final.hidden_size, current.hidden_size + 1), key=lambda hidden: abs(hidden - wanted.hidden_size)
    )
    choices = (
        replace(wanted, num_attention_heads=groups * queries, num_key_value_heads=groups, hidden_size=hidden)
        for groups, queries in _heads_between(current, final, wanted)
        for hidden in hidden_sizes
    )
    return next((shape for shape in choices if not family.broken_rules({**known, **shape.sizes()})), current)


def _heads_between(current: StudentShape, final: StudentShape, wanted: StudentShape) -> list[tuple[int, int]]:
    """(KV groups, query heads per group), those nearest to the wanted ones first."""
    pairs = product(
        range(final.num_key_value_heads, current.num_key_value_heads + 1),
        range(final.queries_per_group, current.queries_per_group + 1),
    )
    return sorted(
        pairs,
        key=lambda pair: (
            abs(pair[0] * pair[1] - wanted.num_attention_heads),
            abs(pair[0] - wanted.num_key_value_heads),
        ),
    )
