"""The capacity-gap law: its arithmetic, and its fit to runs that show a best teacher and to runs that do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from hf_capgap import CapacityGapLaw, RunRecord
from hf_capgap.errors import FitError, LawError
from hf_capgap.laws import ExtrapolationWarning, Laws

TEACHERS = np.geomspace(3e8, 3e10, 7)
STUDENTS = (3e8, 1e9, 3e9)


def make_records(
    loss: Callable[[float, float], float], *, noise: float = 0.0, seed: int = 0, students=STUDENTS, teachers=TEACHERS
) -> list[RunRecord]:
    rng = np.random.default_rng(seed)
    return [
        RunRecord(
            num_params=student,
            num_tokens=1e10 + i,  # runs end on whole steps, not on the same token
            loss=loss(student, teacher) * math.exp(noise * rng.standard_normal()),
            dataset="text",
            teacher=f"teacher-{teacher:.0f}",
            num_teacher_params=teacher,
        )
        for student in students
        for i, teacher in enumerate(teachers)
    ]


def with_gap(ratio: float) -> Callable[[float, float], float]:
    return lambda student, teacher: 2.5 + 0.05 * math.log(teacher / (ratio * student)) ** 2


def test_the_published_law() -> None:
    law = CapacityGapLaw()
    assert law(3e9) == 7.5e9
    assert law([1e9, 2e9]).tolist() == [2.5e9, 5e9]
    assert law.inverse(7.5e9) == 3e9
    assert law.inverse(law(1.7e9)) == pytest.approx(1.7e9)
    low, high = law.band(3e9)
    assert low < 7.5e9 < high


@pytest.mark.parametrize("value", [-3e9, 0, 3, math.nan])
def test_sizes_that_cannot_be(value: float) -> None:
    law = CapacityGapLaw()
    for ask in (law, law.inverse, law.band):
        with pytest.raises(LawError):
            ask(value)


@pytest.mark.parametrize("ratio", [0.0, -2.5, math.nan, math.inf])
def test_a_ratio_that_cannot_be(ratio: float) -> None:
    with pytest.raises(LawError, match="positive"):
        CapacityGapLaw(ratio)


@pytest.mark.parametrize("ratio", [1.5, 2.5, 4.0])
def test_a_fit_recovers_the_ratio_of_clean_runs(ratio: float) -> None:
    fit = CapacityGapLaw.fit(make_records(with_gap(ratio)), num_bootstrap=20)
    assert fit.law.ratio == pytest.approx(ratio, rel=1e-6)
    assert [optimum.num_teacher_params for optimum in fit.optima] == pytest.approx(
        [ratio * student for student in STUDENTS], rel=1e-6
    )
    # The loss is 0.5 % above the lowest where 0.05·log² = 0.005·2.5.
    assert fit.law.band_factor == pytest.approx(math.exp(0.5), rel=1e-6)
    with pytest.warns(ExtrapolationWarning, match="300M to 3B"):
        fit.law(1e11)


def test_the_interval_covers_the_truth_in_noise() -> None:
    """Nominally in 95 of 100; with 30 trials, fewer than 24 would be a broken interval (probability below 1e-3)."""
    fits = [CapacityGapLaw.fit(make_records(with_gap(2.5), noise=0.003, seed=i), num_bootstrap=60) for i in range(30)]
    assert all(low < fit.law.ratio < high for fit in fits for low, high in [fit.interval])
    assert sum(fit.interval[0] <= 2.5 <= fit.interval[1] for fit in fits) >= 24


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda student, teacher: 2.5 - 0.05 * math.log(teacher / student), "no minimum inside the range"),
        (lambda student, teacher: 2.5 + 0.05 * math.log(teacher / student), "no minimum inside the range"),
        (
            lambda student, teacher: 2.5 + 0.05 * math.log(teacher / (1e3 * student)) ** 2,
            "the largest teacher is the best",
        ),
        (
            lambda student, teacher: 2.5 + 0.05 * math.log(1e3 * teacher / student) ** 2,
            "the smallest teacher is the best",
        ),
        (lambda student, teacher: 2.5 - 0.05 * math.log(teacher / student) ** 2, "does not bend upwards"),
    ],
    ids=["falls", "rises", "beyond the largest", "below the smallest", "bends downwards"],
)
def test_runs_that_show_no_best_teacher_give_the_verdict_and_no_law(loss, reason: str) -> None:
    fit = CapacityGapLaw.fit(make_records(loss), num_bootstrap=0)
    assert fit.law is None
    assert fit.interval is None
    assert fit.verdict.startswith("no minimum inside the range")
    assert all(reason in optimum.verdict for optimum in fit.optima)
    with pytest.raises(FitError, match="no minimum inside the range"):
        Laws.fit(make_records(loss))


def test_noise_alone_seldom_shows_a_best_teacher() -> None:
    """At the 5 % level of the test; half of the flat curves bend upwards by chance."""
    flat = [CapacityGapLaw.fit(make_records(lambda *_: 2.5, noise=0.01, seed=i), num_bootstrap=0) for i in range(40)]
    assert sum(fit.law is not None for fit in flat) <= 6


def test_students_with_and_without_a_best_teacher_are_told_apart() -> None:
    records = make_records(with_gap(2.5), students=(3e8, 1e9)) + make_records(
        lambda student, teacher: 3 - 0.05 * math.log(teacher / student), students=(3e9,)
    )
    fit = CapacityGapLaw.fit(records, num_bootstrap=10)
    assert [optimum.verdict is None for optimum in fit.optima] == [True, True, False]
    assert "2 of 3 students" in fit.verdict
    assert fit.law.ratio == pytest.approx(2.5, rel=1e-6)
    assert "no minimum inside the range" in fit.report()


def test_token_budgets_of_one_student_are_separate_curves() -> None:
    """Pooled, the lower losses of the longer runs would bend the curve."""
    longer = [
        RunRecord(**{**record.to_dict(), "num_tokens": 2e10, "loss": record.loss - 0.3})
        for record in make_records(with_gap(2.5), students=(1e9,), teachers=TEACHERS[:4])
    ]
    fit = CapacityGapLaw.fit(make_records(with_gap(2.5), students=(1e9,)) + longer, num_bootstrap=0)
    assert len(fit.optima) == 2
    assert fit.law.ratio == pytest.approx(2.5, rel=1e-6)


@pytest.mark.parametrize("students", [(1e9,), (8e8, 1e9, 1.2e9)])
def test_three_runs_for_each_student_claim_no_law_whatever_they_show(students: tuple[float, ...]) -> None:
    three = {"students": students, "teachers": (1e9, 2e9, 8e9)}
    for records in (make_records(with_gap(2.5), **three), make_records(lambda *_: 2.5, noise=0.01, seed=3, **three)):
        fit = CapacityGapLaw.fit(records)
        assert fit.law is fit.interval is None
        assert "leave no scatter" in fit.verdict
        assert "add a fourth teacher or repeat seeds" in fit.verdict


def test_noise_under_three_teachers_never_becomes_a_law() -> None:
    three = {"students": (1e9,), "teachers": (1e9, 2e9, 8e9)}
    fits = [CapacityGapLaw.fit(make_records(lambda *_: 2.5, noise=0.01, seed=i, **three)) for i in range(20)]
    assert all(fit.law is None for fit in fits)
    # Before the scatter is asked for, chance shows a minimum to some of them.
    assert any("leave no scatter" in fit.verdict for fit in fits)


def test_other_seeds_under_three_teachers_give_the_scatter() -> None:
    three = {"students": (1e9,), "teachers": (1e9, 2e9, 8e9), "noise": 1e-4}
    records = [record for seed in (0, 1) for record in make_records(with_gap(2.5), seed=seed, **three)]
    assert CapacityGapLaw.fit(records, num_bootstrap=20).law.ratio == pytest.approx(2.5, rel=0.05)


def test_three_runs_among_students_with_more_leave_nothing_to_resample() -> None:
    """The scatter is the other student's, whose own runs show no minimum."""
    records = make_records(with_gap(2.5), students=(1e9,), teachers=(1e9, 2e9, 8e9))
    records += make_records(lambda student, teacher: 3 - 0.05 * math.log(teacher / student), students=(3e9,))
    fit = CapacityGapLaw.fit(records)
    assert fit.law.ratio == pytest.approx(2.5, rel=1e-6)
    assert fit.interval is None
    assert "no interval" in fit.verdict


def test_a_number_of_samples_that_cannot_be() -> None:
    for number in (-1, 2.5, "many"):
        with pytest.raises(FitError, match="num_bootstrap"):
            CapacityGapLaw.fit(make_records(with_gap(2.5)), num_bootstrap=number)


def test_bad_records_are_refused() -> None:
    records = make_records(with_gap(2.5))
    with pytest.raises(FitError, match="different datasets cannot be pooled"):
        CapacityGapLaw.fit([replace(records[0], dataset="other"), *records[1:]])
    with pytest.raises(FitError, match="The loss of 1 of 21 records is not finite"):
        CapacityGapLaw.fit([replace(records[0], loss=math.nan), *records[1:]])
    with pytest.raises(FitError, match="The num_teacher_params of 1 of 21 records is not known"):
        CapacityGapLaw.fit([replace(records[0], num_teacher_params=None), *records[1:]])


def test_too_few_teachers_or_runs_are_refused() -> None:
    with pytest.raises(FitError, match="Too few records"):
        CapacityGapLaw.fit([])
    with pytest.raises(FitError, match="teachers of different sizes"):
        CapacityGapLaw.fit(make_records(with_gap(2.5), teachers=(1e9, 2e9)))
