"""The three experiment protocols from which a distillation law is measured, as lists of runs.

M = tokens per parameter. A "fixed-M" model of N parameters is trained on M·N tokens; an "isoFLOP" set of models shares
a training compute, so that the larger ones see fewer tokens (C = 6·N·D). After Busbridge et al., arXiv 2502.08606; the
sizes and budgets are the caller's own, the paper's are not at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ..errors import LawError
from .published import CHINCHILLA_TOKENS_PER_PARAM
from .sizes import check_counts

_TRAINING_FLOPS = 6.0  # per parameter and token


@dataclass(frozen=True, order=True)
class ModelRun:
    """A model to train on text alone.

    Attributes:
        num_params: Parameters outside the embeddings.
        num_tokens: Training tokens.
    """

    num_params: float
    num_tokens: float


@dataclass(frozen=True, order=True)
class DistillationRun:
    """A student to distil from a teacher, which is trained first.

    Attributes:
        teacher: The teacher's own training.
        num_params: The student's parameters outside the embeddings.
        num_tokens: Tokens that it is distilled on.
    """

    teacher: ModelRun
    num_params: float
    num_tokens: float


def fixed_m_teachers_iso_flop_students(
    teacher_params: Sequence[float],
    student_params: Sequence[float],
    student_compute: Sequence[float],
    *,
    teacher_tokens_per_param: float = CHINCHILLA_TOKENS_PER_PARAM,
) -> list[DistillationRun]:
    """Every student at every compute under every teacher: how the student's side of the law falls.

    Args:
        teacher_params: Teacher sizes.
        student_params: Student sizes.
        student_compute: FLOPs of the students' training, 6·N·D.
        teacher_tokens_per_param: M of the teachers.

    Raises:
        LawError: A size, budget or ratio that cannot be.
    """
    return sorted(
        DistillationRun(teacher, size, tokens)
        for teacher in fixed_m(teacher_params, [teacher_tokens_per_param])
        for size, tokens in _pairs(iso_flop(student_params, student_compute))
    )


def iso_flop_teachers_fixed_m_students(
    teacher_params: Sequence[float],
    teacher_compute: Sequence[float],
    student_params: Sequence[float],
    *,
    student_tokens_per_param: Sequence[float] = (CHINCHILLA_TOKENS_PER_PARAM,),
) -> list[DistillationRun]:
    """Every student under teachers of many losses: that teachers act through their loss, and where the gap opens.

    Args:
        teacher_params: Teacher sizes.
        teacher_compute: FLOPs of the teachers' training, 6·N·D.
        student_params: Student sizes.
        student_tokens_per_param: M of the students.

    Raises:
        LawError: A size, budget or ratio that cannot be.
    """
    return sorted(
        DistillationRun(teacher, size, tokens)
        for teacher in iso_flop(teacher_params, teacher_compute)
        for size, tokens in _pairs(fixed_m(student_params, student_tokens_per_param))
    )


def fixed_m_teachers_fixed_m_students(
    teacher_params: Sequence[float],
    student_params: Sequence[float],
    *,
    teacher_tokens_per_param: float = CHINCHILLA_TOKENS_PER_PARAM,
    student_tokens_per_param: Sequence[float] = (CHINCHILLA_TOKENS_PER_PARAM,),
) -> list[DistillationRun]:
    """Every student under every teacher at given tokens per parameter: weak teachers of strong students among them.

    Args:
        teacher_params: Teacher sizes.
        student_params: Student sizes.
        teacher_tokens_per_param: M of the teachers.
        student_tokens_per_param: M of the students.

    Raises:
        LawError: A size or ratio that cannot be.
    """
    return sorted(
        DistillationRun(teacher, size, tokens)
        for teacher in fixed_m(teacher_params, [teacher_tokens_per_param])
        for size, tokens in _pairs(fixed_m(student_params, student_tokens_per_param))
    )


def teachers_of(runs: Iterable[DistillationRun]) -> list[ModelRun]:
    """The teachers that runs need, each once: train these first. They also measure the supervised law."""
    return sorted({run.teacher for run in runs})


def fixed_m(num_params: Sequence[float], tokens_per_param: Sequence[float]) -> list[ModelRun]:
    """Models of every size, trained on so many tokens per parameter."""
    for ratio in tokens_per_param:
        if not ratio > 0:
            raise LawError("Tokens per parameter must be positive", found=ratio)
    check_counts("num_params", num_params)
    return [ModelRun(float(size), float(round(size * ratio))) for size in num_params for ratio in tokens_per_param]


def iso_flop(num_params: Sequence[float], compute: Sequence[float]) -> list[ModelRun]:
    """Models of every size, trained for every compute C = 6·N·D."""
    check_counts("num_params", num_params)
    check_counts("compute", compute)
    # Whole tokens: the same run from two protocols is then one run.
    return [ModelRun(float(n), float(round(c / (_TRAINING_FLOPS * n)))) for n in num_params for c in compute]


def _pairs(runs: Iterable[ModelRun]) -> Iterator[tuple[float, float]]:
    return ((run.num_params, run.num_tokens) for run in runs)
