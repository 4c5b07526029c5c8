"""Cutting a student out of a teacher: tensors are index-selected along the axes that the family's table names."""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from accelerate.utils import convert_file_size_to_int
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from .. import lineage
from ..compat import attention_implementation
from ..errors import ConfigError, UnsupportedModelError
from ..families import audit, family_for
from ..output import complete_folder, require_empty
from .checkpoint import Checkpoint, StudentFolder
from .fingerprint import check_same_model, fingerprint_of_model
from .scores import ExpressiveScores
from .selection import KEPT_FILE_NAME, Kept, select
from .shapes import StudentShape
from .slicing import TensorCut
from .solver import solve_shape
from .streaming import write_student

_LARGEST_SINGLE_CUT = 0.5


@overload
def cut(
    model: PreTrainedModel, scores: ExpressiveScores, shape: StudentShape | str | int, *args: Any, **kwargs: Any
) -> PreTrainedModel: ...
@overload
def cut(
    model: str | os.PathLike,
    scores: ExpressiveScores,
    shape: StudentShape | str | int,
    *args: Any,
    output_dir: None = None,
    **kwargs: Any,
) -> PreTrainedModel: ...
@overload
def cut(
    model: str | os.PathLike,
    scores: ExpressiveScores,
    shape: StudentShape | str | int,
    *args: Any,
    output_dir: str | os.PathLike,
    **kwargs: Any,
) -> StudentFolder: ...
def cut(
    model: PreTrainedModel | str | os.PathLike,
    scores: ExpressiveScores,
    shape: StudentShape | str | int,
    layers: str | Sequence[int] = "symmetric",
    *,
    protect_ends: bool = False,
    output_dir: str | os.PathLike | None = None,
    max_shard_size: str | int = "5GB",
    revision: str | None = None,
) -> PreTrainedModel | StudentFolder:
    """Cut the student of `shape` out of a teacher, keeping the best-scored units.

    What remains are the teacher's own weights, in their order. The config follows (head counts, `head_dim`, per-layer
    lists), ties stay tied, and plain `AutoModelForCausalLM` loads the result.

    From a folder or Hub id to an `output_dir` the teacher's safetensors shards are streamed to the student's, tensor
    by tensor: no model is built, and a teacher of any size is cut with little memory. The tensors are bit for bit
    those of the cut in memory.

    Args:
        model: The teacher, or its folder or Hub id. It is not modified.
        scores: Its scores.
        shape: The student's shape, or a target for `solve_shape` such as `"40%"`.
        layers: Which layers to keep, see `select`.
        protect_ends: Never remove the first and the last layer.
        output_dir: Save the student there, with the teacher's tokenizer if it is beside the teacher, the lineage
            `capgap.json` and the kept indices. The folder appears only when it is complete.
        max_shard_size: Largest file of the saved student.
        revision: Branch, tag or commit of a teacher given by its Hub id.

    Returns:
        The student, on the teacher's device and in its dtype, with the attributes `kept` (`Kept`) and `lineage`. When
        shards were streamed, the student's folder with the same attributes; `load()` gives the model.

    Raises:
        UnsupportedModelError: The teacher fails the audit of its family, or its weights are quantised.
        CheckpointError: A checkpoint with missing, truncated or contradictory shards.
        ShapeError, ScoresError: See `select`. Scores of other weights are refused, too.
        OutputFolderError: `output_dir` already holds something, or its disk has not enough room.
    """
    if output_dir is not None:
        require_empty(output_dir)
    _check_shard_size(max_shard_size)
    options = {"layers": layers, "protect_ends": protect_ends}
    if isinstance(model, PreTrainedModel):
        return _cut_in_memory(model, scores, shape, options, output_dir, max_shard_size, source=model.name_or_path)
    source = os.fspath(model)
    if output_dir is not None:
        checkpoint = Checkpoint.find(source, revision)
        if checkpoint is not None:
            return _cut_checkpoint(checkpoint, scores, shape, options, output_dir, max_shard_size)
        warnings.warn(f"{source} has no safetensors files: the teacher is loaded into memory.", stacklevel=2)
    _refuse_quantized(AutoConfig.from_pretrained(source, revision=revision))
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype="auto", revision=revision)
    teacher.hub_commit = lineage.hub_commit(source, revision)
    return _cut_in_memory(teacher, scores, shape, options, output_dir, max_shard_size, source=source)


def _cut_in_memory(
    model: PreTrainedModel,
    scores: ExpressiveScores,
    shape: StudentShape | str | int,
    options: dict[str, Any],
    output_dir: str | os.PathLike | None,
    max_shard_size: str | int,
    *,
    source: str,
) -> PreTrainedModel:
    _refuse_quantized(model.config)
    family = audit(model)
    _refuse_offloaded(model)
    plan = _plan(model.config, scores, shape, options)
    check_same_model(scores, fingerprint_of_model(family, model), lineage.public_name(model.name_or_path))
    student = _build_student(model, plan)
    student.kept = plan.kept
    student.lineage = [
        *lineage.stages_of(model),
        _describe_cut(lineage.describe_model(model), plan, scores, options),
    ]
    if output_dir is not None:
        save_student(student, source, output_dir, max_shard_size)
    return student


def save_student(
    student: PreTrainedModel, source: str, output_dir: str | os.PathLike, max_shard_size: str | int = "5GB"
) -> None:
    """Save a student that `cut` returned, with its kept indices and lineage and the tokenizer of `source`.

    Raises:
        OutputFolderError: `output_dir` already holds something.
    """
    with complete_folder(output_dir) as folder:
        student.save_pretrained(folder, max_shard_size=max_shard_size)
        _write_company(folder, student.kept, student.lineage, source)


def _cut_checkpoint(
    checkpoint: Checkpoint,
    scores: ExpressiveScores,
    shape: StudentShape | str | int,
    options: dict[str, Any],
    output_dir: str | os.PathLike,
    max_shard_size: str | int,
) -> StudentFolder:
    config = checkpoint.config
    _refuse_quantized(config)
    checkpoint.check_complete()
    plan = _plan(config, scores, shape, options)
    check_same_model(scores, checkpoint.fingerprint(), checkpoint.name)
    stages = [
        *lineage.read_stages(checkpoint.folder),
        _describe_cut(checkpoint.describe(), plan, scores, options),
    ]
    config = plan.student_config()  # a refusal comes before the first byte
    with complete_folder(output_dir) as folder:
        write_student(checkpoint, plan, folder, max_shard_size)
        config.save_pretrained(folder)
        with contextlib.suppress(OSError):  # a teacher without generation settings of its own
            _valid_generation_config(GenerationConfig.from_pretrained(checkpoint.folder)).save_pretrained(folder)
        _write_company(folder, plan.kept, stages, str(checkpoint.folder))
    return StudentFolder(Path(output_dir), plan.kept, stages)


def _plan(
    config: Any, scores: ExpressiveScores, shape: StudentShape | str | int, options: dict[str, Any]
) -> TensorCut:
    if not isinstance(shape, StudentShape):
        shape = solve_shape(config, shape)
    kept = select(scores, shape, config, **options)
    share = shape.num_parameters(config) / StudentShape.of(config).num_parameters(config)
    if share < _LARGEST_SINGLE_CUT:
        warnings.warn(
            f"This cut removes {1 - share:.0%} of the teacher at once. Scores are of the whole teacher: cutting in "
            "stages, with new scores in between (`prune(..., stages=2)`), keeps more of it.",
            stacklevel=4,
        )
    return TensorCut(family_for(config), config, shape, kept)


def _build_student(model: PreTrainedModel, plan: TensorCut) -> PreTrainedModel:
    student = AutoModelForCausalLM.from_config(
        plan.student_config(), dtype=model.dtype, attn_implementation=attention_implementation(model.config)
    )
    state = {}
    for name, tensor in model.named_parameters():  # tied ones once
        parameter = plan.family.explain(name)
        new_name = plan.student_name(parameter)
        if new_name is not None:
            state[new_name] = plan.apply(parameter, tensor.detach())
    missing = dict(student.named_parameters()).keys() - state.keys()
    student.load_state_dict(state, strict=False)
    assert not missing, f"not cut: {missing}"  # the audit has matched both with the same table
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


def _refuse_quantized(config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(
            "Quantised weights cannot be cut: rows and columns are packed together",
            found=config.quantization_config,
            fix="Cut the unquantised checkpoint; scores of the quantised model fit it.",
        )


def _check_shard_size(size: str | int) -> None:
    try:
        is_possible = convert_file_size_to_int(size) > 0
    except (ValueError, TypeError):
        is_possible = False
    if not is_possible:
        raise ConfigError("Not a size of a shard", found=size, fix='Write "5GB", "500MB" or a number of bytes.')


def _refuse_offloaded(model: PreTrainedModel) -> None:
    offloaded = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if offloaded is not None:
        raise UnsupportedModelError(
            "A model whose weights are offloaded cannot be cut in memory",
            found=offloaded,
            fix="Cut its folder: cut(path, scores, shape, output_dir=...) needs no memory for the whole model.",
        )


def _describe_cut(
    teacher: dict[str, Any], plan: TensorCut, scores: ExpressiveScores, options: dict[str, Any]
) -> dict[str, Any]:
    layers = options["layers"]
    return lineage.new_stage(
        "cut",
        {
            "teacher": teacher,
            "scores": {
                "metric": scores.metric,
                "unit": scores.unit,
                "num_units": scores.num_units,
                "calibration_hash": scores.calibration_hash,
            },
            "shape": plan.shape.as_dict(),
            "layers": layers if isinstance(layers, str) else [int(layer) for layer in layers],
            "protect_ends": options["protect_ends"],
            "num_parameters": plan.shape.num_parameters(plan.config),
            "kept_indices_file": KEPT_FILE_NAME,
        },
    )


def _write_company(folder: Path, kept: Kept, stages: list[dict[str, Any]], source: str) -> None:
    """What lies beside the weights: kept indices, lineage, and the teacher's tokenizer."""
    kept.save(folder)
    lineage.write_stages(folder, stages)
    tokenizer = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # a damaged file raises whatever its parser raises
        if os.path.isdir(source) and any(Path(source).glob("tokenizer*")):
            warnings.warn(f"The teacher's tokenizer does not load and is not copied: {error}", stacklevel=5)
    if tokenizer is not None:  # outside: a full disk must not pass for a missing tokenizer
        tokenizer.save_pretrained(folder)
