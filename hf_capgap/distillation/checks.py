"""What must hold between student, teacher, tokenizer and data before a single step is taken."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import ConfigError, DataError, TeacherError
from ..labels import IGNORE_INDEX

_PROBE = "The quick brown fox, 12345; naïve café — 你好，世界。\n\tdef f(x):\n        return x ** 2"


def check_adapter(student: torch.nn.Module) -> None:
    """Raises `ConfigError` if the student is a PEFT model that changes its inputs rather than its layers."""
    for name, config in getattr(student, "peft_config", {}).items():
        if getattr(config, "is_prompt_learning", False):
            raise ConfigError(
                "Prompt learning adds positions that the teacher does not have",
                found=name,
                fix="Use LoRA or the like.",
            )


def check_sizes(student: torch.nn.Module, teacher: PreTrainedModel) -> None:
    """Raises `TeacherError` if the teacher has fewer parameters than the student (without its adapters)."""
    is_adapted = hasattr(student, "peft_config")  # then what is frozen is the model that was there before
    num_student = sum(p.numel() for p in student.parameters() if not (is_adapted and p.requires_grad))
    num_teacher = teacher.num_parameters()
    if num_teacher < num_student:
        raise TeacherError(
            f"The teacher is smaller than the student ({num_student:,} parameters)",
            found=f"{num_teacher:,} parameters",
            fix="Were the two swapped? The capacity-gap law asks for a teacher of about 2.5 times the student.",
        )


def real_vocab_size(
    student: PreTrainedModel, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> int:
    """The number of token ids that both models really have; rows beyond it are padding.

    Raises:
        TeacherError: The tokenizer has ids that one of the models has no row for, or the models differ and there is no
            tokenizer to tell which rows are padding.
    """
    configs = {"student": student.config.get_text_config(), "teacher": teacher.config.get_text_config()}
    rows = {role: config.vocab_size for role, config in configs.items()}
    if tokenizer is None:
        if rows["student"] != rows["teacher"]:
            raise TeacherError(
                "Student and teacher have different vocabulary sizes, and no tokenizer tells which rows are padding",
                found=rows,
                fix="Pass processing_class=tokenizer.",
            )
        return rows["student"]
    for model, num_rows in rows.items():
        if len(tokenizer) > num_rows:
            raise TeacherError(
                f"The tokenizer has ids that the {model} has no row for",
                found=f"{len(tokenizer)} tokens, {num_rows} rows",
                fix="Student and teacher must share the student's tokenizer.",
            )
    return len(tokenizer)


def check_same_tokenizer(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raises `TeacherError` if the two tokenizers give the same text different ids."""
    student_ids, teacher_ids = student.get_vocab(), teacher.get_vocab()
    if student_ids != teacher_ids:
        different = sorted(student_ids.items() ^ teacher_ids.items(), key=lambda item: item[1])[:3]
        raise TeacherError(
            "Student and teacher have different tokenizers: an id does not mean the same token to both",
            found=f"{len(student_ids)} and {len(teacher_ids)} tokens, first differences {different}",
            fix="Distil between models that share a tokenizer, or adapt the teacher to the student's first.",
        )
    if (
        student(_PROBE, add_special_tokens=False)["input_ids"]
        != teacher(_PROBE, add_special_tokens=False)["input_ids"]
    ):
        raise TeacherError(
            "Student and teacher have the same vocabulary, but their tokenizers split text differently",
            fix="Use one tokenizer for both.",
        )


def teacher_tokenizer(name_or_path: str, *, required: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a teacher; None if there is none, with a warning if it was `required` for a check."""
    if not required and not os.path.isdir(name_or_path):
        return None  # a model object from the Hub or from nowhere: do not reach for the network
    try:
        return AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError):
        if required:
            warnings.warn(
                "The teacher has no tokenizer beside it: that it shares the student's is not checked", stacklevel=3
            )
        return None


def check_length(length: int, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises `DataError` if sequences of `length` tokens go beyond the positions of either model."""
    for role, model in (("student", student), ("teacher", teacher)):
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and length > limit:
            raise DataError(
                f"Sequences are longer than the {role}'s {limit} positions",
                found=f"{length} tokens",
                fix="Pack smaller blocks.",
            )


def check_labels(labels: torch.Tensor, vocab_size: int) -> None:
    """Raises `DataError` if a label is neither a real token id nor -100."""
    invalid = (labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))
    if invalid.any():
        raise DataError(
            f"Labels must be token ids below {vocab_size} or {IGNORE_INDEX}",
            found=labels[invalid][0].item(),
            fix="Tokenise with the student's tokenizer.",
        )


def check_dataset(dataset: Any, role: str, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Raises `DataError` if a dataset or stream is empty, or its first row has no `input_ids` or too many."""
    if dataset is None:
        return
    if isinstance(dataset, dict):
        for name, part in dataset.items():
            check_dataset(part, f"{role} {name}", student, teacher)
        return
    first = next(iter(dataset), None)
    if first is None:
        raise DataError(f"The {role} dataset is empty", fix="Check the corpus and the block size.")
    if "input_ids" not in first:
        raise DataError(
            f"The {role} dataset has no input_ids", found=list(first), fix="Tokenise and pack it: hf_capgap.data.pack."
        )
    check_length(len(first["input_ids"]), student, teacher)
