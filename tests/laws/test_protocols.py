"""The experiment protocols: which runs they ask for."""

from __future__ import annotations

import pytest

from hf_capgap.errors import LawError
from hf_capgap.laws.protocols import (
    ModelRun,
    fixed_m_teachers_fixed_m_students,
    fixed_m_teachers_iso_flop_students,
    iso_flop_teachers_fixed_m_students,
    teachers_of,
)

TEACHERS, STUDENTS = (1e9, 4e9), (1e8, 2e8, 5e8)


def test_fixed_m_teachers_and_iso_flop_students() -> None:
    runs = fixed_m_teachers_iso_flop_students(TEACHERS, STUDENTS, (1e19, 1e20), teacher_tokens_per_param=20)
    assert len(runs) == len(set(runs)) == 2 * 3 * 2
    assert {run.teacher.num_tokens / run.teacher.num_params for run in runs} == {20}
    assert {f"{6 * run.num_params * run.num_tokens:.6e}" for run in runs} == {"1.000000e+19", "1.000000e+20"}
    assert teachers_of(runs) == [ModelRun(1e9, 2e10), ModelRun(4e9, 8e10)]


def test_iso_flop_teachers_and_fixed_m_students() -> None:
    runs = iso_flop_teachers_fixed_m_students(TEACHERS, (1e20, 1e21), STUDENTS, student_tokens_per_param=(20, 80))
    assert len(runs) == len(set(runs)) == 4 * 3 * 2
    assert {run.num_tokens / run.num_params for run in runs} == {20, 80}
    assert [f"{6 * run.num_params * run.num_tokens:.4e}" for run in teachers_of(runs)] == [
        "1.0000e+20",
        "1.0000e+21",
    ] * 2


def test_fixed_m_teachers_and_students() -> None:
    runs = fixed_m_teachers_fixed_m_students(TEACHERS, STUDENTS, student_tokens_per_param=(20, 40, 80))
    assert len(runs) == len(set(runs)) == 2 * 3 * 3
    assert {run.num_tokens / run.num_params for run in runs} == {20, 40, 80}
    assert {run.teacher.num_tokens / run.teacher.num_params for run in runs} == {20}


def test_what_cannot_be_run() -> None:
    with pytest.raises(LawError, match="Did you mean 3e9"):
        fixed_m_teachers_fixed_m_students((3,), STUDENTS)
    with pytest.raises(LawError, match="Tokens per parameter must be positive"):
        fixed_m_teachers_fixed_m_students(TEACHERS, STUDENTS, student_tokens_per_param=(0,))
    with pytest.raises(LawError, match="compute must be positive"):
        fixed_m_teachers_iso_flop_students(TEACHERS, STUDENTS, (-1e20,))
