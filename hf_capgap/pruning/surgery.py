"""Cutting a student out of a teacher: tensors are index-selected along the axes that the family's table names."""

from __future__ import annotations

import contextlib
import copy
import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .. import lineage
from ..compat import attention_implementation
from ..families import Family, audit
from ..output import complete_folder, require_empty
from .scores import ExpressiveScores
from .selection import KEPT_FILE_NAME, Kept, select
from .shapes import StudentShape
from .solver import solve_shape


def cut(
    model: PreTrainedModel | str | os.PathLike,
    scores: ExpressiveScores,
    shape: StudentShape | str | int,
    layers: str | Sequence[int] = "symmetric",
    *,
    output_dir: str | os.PathLike | None = None,
) -> PreTrainedModel:
    """Cut the student of `shape` out of a teacher, keeping the best-scored units.

    Nothing is rescaled and no order changes; what remains are the teacher's own weights. The config follows (head
    counts, `head_dim`, per-layer lists), ties stay tied, and plain `AutoModelForCausalLM` loads the result.

    Args:
        model: The teacher, or its folder or Hub id. It is not modified.
        scores: Its scores.
        shape: The student's shape, or a target for `solve_shape` such as `"40%"`.
        layers: Which layers to keep, see `select`.
        output_dir: Save the student there, with the teacher's tokenizer if it is beside the teacher, the lineage
            `capgap.json` and the kept indices. The folder appears only when it is complete.

    Returns:
        The student, on the teacher's device and in its dtype, with the attributes `kept` (`Kept`) and `lineage`.

    Raises:
        UnsupportedModelError: The teacher fails the audit of its family.
        ShapeError, ScoresError: See `select`.
        OutputFolderError: `output_dir` already holds something.
    """
    if output_dir is not None:
        require_empty(output_dir)
    source = None
    if not isinstance(model, PreTrainedModel):
        source = os.fspath(model)
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        model.hub_commit = lineage.hub_commit(source)
    family = audit(model).family
    if not isinstance(shape, StudentShape):
        shape = solve_shape(model.config, shape)
    kept = select(scores, shape, model.config, layers=layers)
    student = _build_student(model, family, shape, kept)
    student.kept = kept
    student.lineage = [*lineage.stages_of(model), _describe_cut(model, student, scores, shape, layers)]
    if output_dir is not None:
        _save(student, source or model.name_or_path, output_dir)
    return student


def student_config(
    config: PreTrainedConfig, family: Family, shape: StudentShape, kept_layers: list[int]
) -> PreTrainedConfig:
    """The teacher's config with the student's sizes, its per-layer lists sliced to the kept layers."""
    values = copy.deepcopy(config).to_dict()
    for axis, field in family.config_fields.items():
        if axis in shape.sizes():
            values[field] = shape.sizes()[axis]
    for field in family.per_layer_fields:
        if isinstance(values.get(field), list):
            values[field] = [values[field][layer] for layer in kept_layers]
    return type(config).from_dict(values)


def _build_student(model: PreTrainedModel, family: Family, shape: StudentShape, kept: Kept) -> PreTrainedModel:
    config = student_config(model.config, family, shape, kept.layers)
    student = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=attention_implementation(model.config)
    )
    teacher_state = model.state_dict()
    student.load_state_dict(
        {
            name: _cut_tensor(teacher_state[teacher_name], teacher_name, family, model.config, kept)
            for name in student.state_dict()
            for teacher_name in [_teacher_name(name, family, kept)]
        }
    )
    student.generation_config = _valid_generation_config(model.generation_config)
    return student.to(model.device).train(model.training)


def _valid_generation_config(given: GenerationConfig) -> GenerationConfig:
    """A copy that can be saved: some released models set sampling options without `do_sample`."""
    copied = copy.deepcopy(given)
    try:
        copied.validate(strict=True)
    except ValueError:
        copied.do_sample = True
    return copied


def _teacher_name(student_name: str, family: Family, kept: Kept) -> str:
    """The teacher's name of a student's tensor: the same, with the layer's original number."""
    match = re.match(rf"({re.escape(family.layers)}\.)(\d+)(\..+)", student_name)
    return f"{match[1]}{kept.layers[int(match[2])]}{match[3]}" if match else student_name


def _cut_tensor(tensor: torch.Tensor, name: str, family: Family, config: PreTrainedConfig, kept: Kept) -> torch.Tensor:
    layer, dimensions = family.dimensions(name)
    sizes = family.sizes(config)
    units = kept.by_axis(layer, sizes["q_heads"] // sizes["kv_heads"])
    for axis, dimension in enumerate(dimensions):
        indices = dimension.indices(sizes, units)
        if indices is not None:
            tensor = tensor.index_select(axis, indices.to(tensor.device))
    return tensor


def _describe_cut(
    model: PreTrainedModel, student: PreTrainedModel, scores: ExpressiveScores, shape: StudentShape, layers: Any
) -> dict[str, Any]:
    return lineage.new_stage(
        "cut",
        {
            "teacher": lineage.describe_model(model),
            "scores": {
                "metric": scores.metric,
                "unit": scores.unit,
                "num_units": scores.num_units,
                "calibration_hash": scores.calibration_hash,
            },
            "shape": shape.as_dict(),
            "layers": layers if isinstance(layers, str) else [int(layer) for layer in layers],
            "num_parameters": student.num_parameters(),
            "kept_indices_file": KEPT_FILE_NAME,
        },
    )


def _save(student: PreTrainedModel, source: str, output_dir: str | os.PathLike) -> None:
    with complete_folder(output_dir) as folder:
        student.save_pretrained(folder)
        student.kept.save(folder)
        lineage.write_stages(folder, student.lineage)
        tokenizer = None
        with contextlib.suppress(OSError, ValueError, KeyError):  # a teacher without a tokenizer beside it
            tokenizer = AutoTokenizer.from_pretrained(source)
        if tokenizer is not None:  # outside: a full disk must not pass for a missing tokenizer
            tokenizer.save_pretrained(folder)
