"""The law of the capacity gap: the best teacher of a student is a fixed multiple of its size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import LawError
from . import published
from .fitting import NUM_BOOTSTRAP
from .records import Records
from .sizes import check_counts, warn_outside


@dataclass(frozen=True)
class CapacityGapLaw:
    """Optimal teacher = ratio × student (Zhang et al., arXiv 2311.07052; 2.5 without arguments).

    Args:
        ratio: Size of the best teacher over the student's.
        band_factor: A teacher up to so many times larger or smaller than the best one counts as near-optimal. The
            default of 2 is a convention, as coarse as the sizes that model families come in; a fit measures it.
        ranges: Name of an input -> (lowest, highest) value that the law was measured for; outside them a call warns.
        source: Where the ratio comes from.

    Raises:
        LawError: A ratio that is not positive, or a band that is narrower than nothing.
    """

    ratio: float = published.CAPACITY_GAP_RATIO
    band_factor: float = 2.0
    ranges: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    source: str | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.ratio) and self.ratio > 0):
            raise LawError("The ratio of teacher to student must be a positive number", found=self.ratio)
        if not self.band_factor >= 1:
            raise LawError("band_factor must be at least 1", found=self.band_factor)
        if self.source is None:
            is_published = self.ratio == published.CAPACITY_GAP_RATIO
            object.__setattr__(self, "source", published.CAPACITY_GAP_SOURCE if is_published else published.GIVEN)

    def __call__(self, num_params: ArrayLike) -> np.ndarray:
        """Size of the best teacher for students of `num_params` parameters, float64, of the shape given.

        Raises:
            LawError: Sizes that are negative, not finite, or lack their unit.

        Warns:
            ExtrapolationWarning: Sizes outside `ranges`.
        """
        num_params = check_counts("num_params", num_params)
        warn_outside("The capacity-gap law", self.ranges, num_params=num_params)
        return self.ratio * num_params

    def inverse(self, num_teacher_params: ArrayLike) -> np.ndarray:
        """Size of the student that a teacher of `num_teacher_params` is best for, float64, of the shape given.

        Raises:
            LawError: As a call.
        """
        return check_counts("num_teacher_params", num_teacher_params) / self.ratio

    def band(self, num_params: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """(smallest, largest) near-optimal teacher for students of `num_params` parameters.

        Raises:
            LawError: As a call.
        """
        best = self(num_params)
        return best / self.band_factor, best * self.band_factor

    def to_dict(self) -> dict[str, Any]:
        """Everything that makes this law again: plain JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def fit(cls, records: Records, *, num_bootstrap: int = NUM_BOOTSTRAP, seed: int = 0) -> Any:
        """Find each student's best teacher, and the line through them.

        For each student size and token budget, the student's loss is fitted by a quadratic in the logarithm of the
        teacher's size. Its lowest point counts if it lies between the smallest and the largest teacher, and if the
        curve bends upwards significantly: a one-sided t-test at 5 % over all students, against the scatter around all
        quadratics. Three runs for each student leave no scatter: no law follows from them.

        Args:
            records: `RunRecord`s of one dataset, with `num_teacher_params`; or a file or folder of them.
            num_bootstrap: Samples of the interval: students are resampled, and the residuals of each one's quadratic.
            seed: Of the bootstrap.

        Returns:
            A `capacity_fit.CapacityGapFit` with the law, its interval and each student's best teacher; its verdict is
            "no minimum inside the range" where the runs show none, or that three runs cannot show one, and then there
            is no law.

        Raises:
            FitError: Several datasets, losses that are missing or not finite, or no student with three teachers.
        """
        from .capacity_fit import fit_capacity_gap

        return fit_capacity_gap(records, num_bootstrap=num_bootstrap, seed=seed)
