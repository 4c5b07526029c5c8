"""Runs of an ideal world: the losses that the published laws give on the three protocols, with noise."""

from __future__ import annotations

import math

import numpy as np

from hf_capgap import DistillationLaw, RunRecord, SupervisedLaw
from hf_capgap.laws.protocols import (
    DistillationRun,
    fixed_m_teachers_fixed_m_students,
    fixed_m_teachers_iso_flop_students,
    iso_flop_teachers_fixed_m_students,
)

LAW = DistillationLaw()
SIZES = (143e6, 266e6, 546e6, 1.02e9, 1.82e9, 3.4e9, 7.75e9)


def list_runs(sizes: tuple[float, ...] = SIZES) -> list[DistillationRun]:
    """The three protocols over sizes in the range of the published laws."""
    runs = {
        *fixed_m_teachers_iso_flop_students(sizes[2:], sizes, (3e19, 1e20, 3e20, 1e21)),
        *iso_flop_teachers_fixed_m_students(sizes, (3e19, 3e20, 3e21), sizes),
        *fixed_m_teachers_fixed_m_students(sizes[2:], sizes, student_tokens_per_param=(20, 80, 320)),
    }
    return sorted(runs)


def distilled_records(runs: list[DistillationRun], noise: float, seed: int) -> list[RunRecord]:
    """What the published distillation law gives for `runs`, with log-normal noise on the students' losses."""
    rng = np.random.default_rng(seed)
    records = []
    for run in runs:
        teacher_loss = float(LAW.supervised.loss(run.teacher.num_params, run.teacher.num_tokens))
        loss = float(LAW.loss(run.num_params, run.num_tokens, teacher_loss))
        records.append(
            RunRecord(
                num_params=run.num_params,
                num_tokens=run.num_tokens,
                loss=loss * math.exp(noise * rng.standard_normal()),
                dataset="ideal",
                teacher=f"n{run.teacher.num_params:.0f}-d{run.teacher.num_tokens:.0f}",
                num_teacher_params=run.teacher.num_params,
                num_teacher_tokens=run.teacher.num_tokens,
                teacher_loss=teacher_loss,
                seed=seed,
            )
        )
    return records


def supervised_records(law: SupervisedLaw, num_runs: int, noise: float, seed: int) -> list[RunRecord]:
    """What a supervised law gives for runs spread over sizes and tokens."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(math.log(1e8), math.log(1e10), num_runs))
    tokens = np.exp(rng.uniform(math.log(1e9), math.log(1e12), num_runs))
    losses = law.loss(sizes, tokens) * np.exp(noise * rng.standard_normal(num_runs))
    return [
        RunRecord(num_params=float(n), num_tokens=float(d), loss=float(loss), dataset="ideal")
        for n, d, loss in zip(sizes, tokens, losses, strict=True)
    ]


def held_out_points(num_points: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(student sizes, tokens, teacher losses) between those of the protocols, none of them on their grid."""
    rng = np.random.default_rng(123)

    def spread(low: float, high: float) -> np.ndarray:
        return np.exp(rng.uniform(math.log(low), math.log(high), num_points))

    sizes, teachers = spread(150e6, 7e9), spread(300e6, 7e9)
    return sizes, sizes * spread(20, 300), LAW.supervised.loss(teachers, 20 * teachers)
