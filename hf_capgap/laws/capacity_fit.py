"""Fitting the capacity-gap law: each student's best teacher from its runs, and the line through them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from .capacity import CapacityGapLaw
from .fitting import LEVEL, Coefficient, check_options, fit_form
from .records import Records, RunRecord, as_records, check_fittable
from .sizes import format_size

NO_MINIMUM = "no minimum inside the range"
NO_SCATTER = "three runs leave no scatter to tell a minimum from noise; add a fourth teacher or repeat seeds"
_FEWEST_TEACHERS = 3  # a quadratic has three coefficients
_SAME_TOKENS = 1.1  # token counts within this factor are one budget: runs end on whole steps
_CURVATURE_LEVEL = 0.05  # one-sided significance that a curve must bend upwards with
_TOLERANCE = 0.005  # a teacher is near-optimal if its student's loss is at most this fraction above the lowest
_RATIO = {"ratio": Coefficient((2.5,), 1e-2, 1e3)}  # convex: one start is enough
_RATIO_DELTA = 0.1  # measured optima scatter by tens of percent, not by parts in a thousand


@dataclass(frozen=True)
class TeacherOptimum:
    """The best teacher of one student, as its runs show it.

    Attributes:
        num_params: The student's size.
        num_tokens: What it was trained on (the mean over its runs).
        num_teacher_params: The best teacher's size; None if the runs show none.
        loss: The student's loss there, on the quadratic.
        num_runs: How many runs the quadratic is through.
        verdict: None, or why there is no optimum.
    """

    num_params: float
    num_tokens: float
    num_teacher_params: float | None
    loss: float | None
    num_runs: int
    verdict: str | None


@dataclass(frozen=True)
class CapacityGapFit:
    """What the runs say about the capacity gap.

    Attributes:
        law: The fitted law; None if no student's runs show a best teacher.
        interval: 95 % bootstrap interval of the ratio; None without a law, or if nothing is left to resample (one
            student with exactly three runs).
        optima: The best teacher of each student.
    """

    law: CapacityGapLaw | None
    interval: tuple[float, float] | None
    optima: tuple[TeacherOptimum, ...]

    @property
    def verdict(self) -> str:
        """What came out, in one sentence."""
        found = sum(optimum.verdict is None for optimum in self.optima)
        of_all = f"{found} of {len(self.optima)} students"
        if self.law is None and any(optimum.verdict == NO_SCATTER for optimum in self.optima):
            return NO_SCATTER
        if self.law is None:
            return f"{NO_MINIMUM} ({of_all}): these runs show no best teacher size"
        interval = "no interval" if self.interval is None else "95 % {:.2f} to {:.2f}".format(*self.interval)
        return f"optimal teacher = {self.law.ratio:.2f} x student ({interval}; {of_all} show a minimum)"

    def report(self) -> str:
        """The verdict and each student's optimum, as text."""
        lines = [self.verdict]
        for optimum in self.optima:
            said = (
                optimum.verdict or f"best teacher {format_size(optimum.num_teacher_params)}, loss {optimum.loss:.4f}"
            )
            size, tokens = format_size(optimum.num_params), format_size(optimum.num_tokens)
            lines.append(f"  student {size}, {tokens} tokens, {optimum.num_runs} runs: {said}")
        return "\n".join(lines)


def fit_capacity_gap(records: Records, *, num_bootstrap: int, seed: int) -> CapacityGapFit:
    """See `CapacityGapLaw.fit`."""
    check_options(num_bootstrap=num_bootstrap)
    used = [record for record in as_records(records) if record.teacher is not None]
    check_fittable(used, ("loss", "num_teacher_params"), _FEWEST_TEACHERS, "the capacity-gap law (one student)")
    curves = [curve for group in _groups(used) if (curve := _Curve.of(group)) is not None]
    check_fittable(
        used if curves else [],
        (),
        _FEWEST_TEACHERS,
        "the capacity-gap law (of one student under teachers of different sizes)",
    )
    needed = _needed_curvatures(curves)
    optima = tuple(curve.optimum(least) for curve, least in zip(curves, needed))
    inside = [(curve, optimum) for curve, optimum in zip(curves, optima) if optimum.verdict is None]
    if not inside:
        return CapacityGapFit(law=None, interval=None, optima=optima)
    students = np.array([curve.num_params for curve, _ in inside])
    law = CapacityGapLaw(
        ratio=_fit_ratio(students, np.array([optimum.num_teacher_params for _, optimum in inside])),
        band_factor=float(np.exp(np.median([curve.half_width() for curve, _ in inside]))),
        ranges={"num_params": (float(students.min()), float(students.max()))},
        source=f"fitted to {len(used)} runs on {used[0].dataset}",
    )
    interval = _bootstrap_ratio([curve for curve, _ in inside], num_bootstrap, np.random.default_rng(seed))
    return CapacityGapFit(law=law, interval=interval, optima=optima)


@dataclass(frozen=True)
class _Curve:
    """One student's losses under its teachers, and the quadratic through them."""

    num_params: float
    num_tokens: float
    log_teachers: np.ndarray  # [runs]
    losses: np.ndarray  # [runs]

    @classmethod
    def of(cls, records: list[RunRecord]) -> _Curve | None:
        """None if there are too few teachers for a quadratic."""
        teachers = np.array([record.num_teacher_params for record in records], dtype=float)
        if len(np.unique(teachers)) < _FEWEST_TEACHERS:
            return None
        return cls(
            num_params=float(records[0].num_params),
            num_tokens=float(np.mean([record.num_tokens for record in records])),
            log_teachers=np.log(teachers),
            losses=np.array([record.loss for record in records], dtype=float),
        )

    @property
    def design(self) -> np.ndarray:
        """[runs, 3]: 1, x, x² of the centred log teacher size."""
        return np.vander(self.log_teachers - self.log_teachers.mean(), 3, increasing=True)

    def quadratic(self, losses: np.ndarray | None = None) -> np.ndarray:
        """[3] coefficients of 1, x, x²."""
        return np.linalg.lstsq(self.design, self.losses if losses is None else losses, rcond=None)[0]

    def optimum(self, least_curvature: float | None) -> TeacherOptimum:
        """The lowest point, of a curve that bends upwards by more than `least_curvature`; none if that is None."""
        constant, slope, curvature = self.quadratic()
        verdict = self._objection(slope, curvature, least_curvature)
        lowest = -slope / (2 * curvature) if verdict is None else None
        return TeacherOptimum(
            num_params=self.num_params,
            num_tokens=self.num_tokens,
            num_teacher_params=None if lowest is None else float(np.exp(lowest + self.log_teachers.mean())),
            loss=None if lowest is None else float(constant - curvature * lowest**2),
            num_runs=len(self.losses),
            verdict=verdict,
        )

    def _objection(self, slope: float, curvature: float, least_curvature: float | None) -> str | None:
        """Why the quadratic shows no best teacher, or None."""
        if curvature <= 0:
            return f"{NO_MINIMUM}: the curve does not bend upwards"
        lowest = -slope / (2 * curvature) + self.log_teachers.mean()
        if lowest >= self.log_teachers.max():
            return f"{NO_MINIMUM}: the largest teacher is the best"
        if lowest <= self.log_teachers.min():
            return f"{NO_MINIMUM}: the smallest teacher is the best"
        if least_curvature is None:
            return NO_SCATTER
        if curvature <= least_curvature:
            return f"{NO_MINIMUM} that stands out from the noise"
        return None

    def half_width(self) -> float:
        """Distance in log teacher size from the best teacher to where the loss is `_TOLERANCE` above the lowest."""
        constant, slope, curvature = self.quadratic()
        return float(np.sqrt(_TOLERANCE * (constant - slope**2 / (4 * curvature)) / curvature))

    def resampled_optimum(self, rng: np.random.Generator) -> float:
        """Best teacher of a residual-bootstrap sample, kept inside the range of the teachers."""
        fitted = self.design @ self.quadratic()
        num_free = len(self.losses) - 3
        spread = np.sqrt(len(self.losses) / num_free) if num_free else 0.0  # residuals are smaller than errors
        residuals = (self.losses - fitted) * spread
        _, slope, curvature = self.quadratic(fitted + rng.choice(residuals, len(residuals)))
        ends = self.log_teachers.min(), self.log_teachers.max()
        if curvature <= 0:
            return float(np.exp(ends[0] if slope > 0 else ends[1]))
        return float(np.exp(np.clip(-slope / (2 * curvature) + self.log_teachers.mean(), *ends)))


def _groups(records: list[RunRecord]) -> list[list[RunRecord]]:
    """Runs of one student size and one token budget, in ascending order."""
    groups: list[list[RunRecord]] = []
    for record in sorted(records, key=lambda record: (record.num_params, record.num_tokens)):
        first = groups[-1][0] if groups else None
        if (
            first is not None
            and first.num_params == record.num_params
            and record.num_tokens <= _SAME_TOKENS * first.num_tokens
        ):
            groups[-1].append(record)
        else:
            groups.append([record])
    return groups


def _needed_curvatures(curves: list[_Curve]) -> list[float] | list[None]:
    """The curvature that chance alone seldom gives each quadratic: a one-sided t-test, Bonferroni over students.

    None where every quadratic goes through all of its runs: then nothing tells how large chance is.
    """
    num_free = sum(len(curve.losses) - 3 for curve in curves)
    if num_free == 0:
        return [None] * len(curves)
    variance = sum(np.sum((curve.losses - curve.design @ curve.quadratic()) ** 2) for curve in curves) / num_free
    quantile = stdtrit(num_free, 1 - _CURVATURE_LEVEL / len(curves))
    return [
        float(quantile * np.sqrt(variance * np.linalg.inv(curve.design.T @ curve.design)[2, 2])) for curve in curves
    ]


def _fit_ratio(students: np.ndarray, teachers: np.ndarray) -> float:
    log_students = np.log(students)

    def form(logs: np.ndarray, gradient: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        predicted = logs[..., :1] + log_students
        return predicted, np.ones((*predicted.shape, 1)) if gradient else None

    found = fit_form(form, teachers, _RATIO, huber_delta=_RATIO_DELTA, num_bootstrap=0, num_folds=0)
    return float(found.coefficients[0])


def _bootstrap_ratio(curves: list[_Curve], num_samples: int, rng: np.random.Generator) -> tuple[float, float] | None:
    if num_samples == 0 or (len(curves) == 1 and len(curves[0].losses) == _FEWEST_TEACHERS):
        return None
    ratios = []
    for _ in range(num_samples):
        chosen = [curves[i] for i in rng.integers(len(curves), size=len(curves))]
        teachers = np.array([curve.resampled_optimum(rng) for curve in chosen])
        ratios.append(_fit_ratio(np.array([curve.num_params for curve in chosen]), teachers))
    low, high = np.quantile(ratios, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
