"""From run records to fitted laws: which records a law can use, and what a fit reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..errors import FitError, LawError
from .distilled import DistillationLaw
from .fitting import LEVEL, Optimum, fit_form
from .records import Records, RunRecord, as_records, check_fittable
from .sizes import check_counts, check_losses, format_size
from .supervised import ScalingLaw, SupervisedLaw

L = TypeVar("L", bound=ScalingLaw)

_RECORDS_PER_COEFFICIENT = 2
_DISTINCT_PER_INPUT = 3  # two values cannot tell a power law from a straight line
_UNDETERMINED = 10.0  # an interval from x to more than so many times x says little


@dataclass(frozen=True)
class Prediction:
    """Predicted losses, each an array of the inputs' shape: the estimate, and the ends of its interval."""

    loss: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Fit(Generic[L]):
    """A fitted law and how far to trust it.

    Attributes:
        law: The law, with the ranges of the records.
        records: The records that it was fitted to.
        predicted: Its loss for each record, [records].
        residuals: log measured - log predicted, [records].
        held_out_residuals: The same under fits that did not see the record, [records].
        draws: Coefficients of each bootstrap sample, [num_bootstrap, coefficients].
    """

    law: L
    records: tuple[RunRecord, ...]
    predicted: np.ndarray
    residuals: np.ndarray
    held_out_residuals: np.ndarray
    draws: np.ndarray

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % percentile interval of each coefficient over the bootstrap."""
        ends = _interval(self.draws)
        return {name: (float(low), float(high)) for name, low, high in zip(self.law.coefficients, *ends, strict=True)}

    @property
    def undetermined(self) -> list[str]:
        """Coefficients that the records leave open: others make up for them, and predictions can still be sharp."""
        return [name for name, (low, high) in self.intervals.items() if high > _UNDETERMINED * low]

    @property
    def median_error(self) -> float:
        """Median over the records of |log measured - log predicted|: 0.01 is about 1 %."""
        return float(np.median(np.abs(self.residuals)))

    @property
    def held_out_error(self) -> float:
        """The same for records that the fit did not see (five-fold; records of one `run` stay together)."""
        return float(np.nanmedian(np.abs(self.held_out_residuals)))

    def predict(self, num_params: ArrayLike, num_tokens: ArrayLike, *teacher_loss: ArrayLike) -> Prediction:
        """The law's prediction and its 95 % interval over the bootstrap: of the mean, not of a single noisy run.

        Takes what a call of the law takes; raises and warns as it does.
        """
        loss = self.law(num_params, num_tokens, *teacher_loss)
        laws = [self.law_of(row) for row in self.draws]
        low, high = _interval(np.array([law.loss(num_params, num_tokens, *teacher_loss) for law in laws]))
        return Prediction(loss, low, high)

    def law_of(self, coefficients: np.ndarray) -> L:
        """This law with other coefficients (a row of `draws`)."""
        return dataclasses.replace(self.law, **dict(zip(self.law.coefficients, map(float, coefficients))))

    def report(self) -> str:
        """Coefficients with intervals, errors and ranges, as text."""
        lines = [f"{type(self.law).__name__} from {len(self.records)} records"]
        for name, (low, high) in self.intervals.items():
            note = "  (left open by these records)" if name in self.undetermined else ""
            lines.append(f"  {name:6} {getattr(self.law, name):12.5g}   {LEVEL:.0%} [{low:.5g}, {high:.5g}]{note}")
        lines.append(f"  median error {self.median_error:.3%}, on held-out records {self.held_out_error:.3%}")
        show = {True: format_size, False: "{:.3f}".format}
        for name, ends in self.law.ranges.items():
            lines.append(f"  {name} from {' to '.join(show[name.startswith('num_')](end) for end in ends)}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw the residuals against every input into an image file (needs matplotlib).

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from .plots import plot_residuals

        return plot_residuals(self, path)


def fit_supervised(
    records: Records, *, fixed: Mapping[str, float] | None = None, **options: Any
) -> Fit[SupervisedLaw]:
    """See `SupervisedLaw.fit`."""
    used = [record for record in as_records(records) if record.teacher is None]
    return _fit(SupervisedLaw, used, ("num_params", "num_tokens"), fixed, options, "the supervised law")


def fit_distillation(
    records: Records,
    *,
    supervised: SupervisedLaw | None = None,
    fixed: Mapping[str, float] | None = None,
    **options: Any,
) -> Fit[DistillationLaw]:
    """See `DistillationLaw.fit`."""
    records = as_records(records)
    used = [record for record in records if record.teacher is not None]
    if supervised is None:
        check_fittable(records, (), 0, "the distillation law")  # one dataset, before the longer fit
        supervised = fit_supervised(records, **{**options, "num_bootstrap": 0}).law
    inputs = ("num_params", "num_tokens", "teacher_loss")
    return _fit(DistillationLaw, used, inputs, fixed, options, "the distillation law", supervised=supervised)


def _fit(
    law_type: type[L],
    records: Sequence[RunRecord],
    inputs: Sequence[str],
    fixed: Mapping[str, float] | None,
    options: Mapping[str, Any],
    purpose: str,
    **parts: Any,
) -> Fit[L]:
    fixed = dict(fixed or {})
    unknown = sorted(set(fixed) - set(law_type.coefficients))
    if unknown:
        raise FitError(
            f"{law_type.__name__} has no such coefficient", found=unknown, fix=f"It has {list(law_type.coefficients)}."
        )
    num_free = len(law_type.coefficients) - len(fixed)
    if num_free == 0:
        raise FitError("Every coefficient is fixed: nothing is left to fit", fix=f"Call {law_type.__name__} itself.")
    check_fittable(records, ("loss", *inputs), _RECORDS_PER_COEFFICIENT * num_free, f"{purpose} ({num_free} unknowns)")
    columns = {name: np.array([getattr(record, name) for record in records], dtype=float) for name in inputs}
    for name, column in columns.items():
        _check_units(name, column)
        num_distinct = len(np.unique(column))
        if num_distinct < _DISTINCT_PER_INPUT:
            raise FitError(
                f"The records vary {name} too little to fit {purpose}",
                found=f"{num_distinct} distinct",
                fix=f"At least {_DISTINCT_PER_INPUT} are needed.",
            )
    measured = np.array([record.loss for record in records], dtype=float)
    points = list(columns.values())
    if "supervised" in parts:
        points.append(parts["supervised"].loss(*points[:2]))

    def form(logs: np.ndarray, gradient: bool = True) -> tuple[np.ndarray, np.ndarray | None]:
        return law_type.log_loss(logs, *points, gradient=gradient)

    groups = np.array([record.run or f"record {i}" for i, record in enumerate(records)])
    found = fit_form(form, measured, law_type.coefficients, fixed=fixed, groups=groups, **options)
    law = law_type(
        **dict(zip(law_type.coefficients, map(float, found.coefficients))),
        **parts,
        ranges={name: (float(column.min()), float(column.max())) for name, column in columns.items()},
        source=f"fitted to {len(records)} runs on {records[0].dataset}",
    )
    return _report(law, records, measured, found)


def _check_units(name: str, column: np.ndarray) -> None:
    try:
        (check_counts if name.startswith("num_") else check_losses)(name, column)
    except LawError as error:
        raise FitError(str(error)) from error


def _report(law: L, records: Sequence[RunRecord], measured: np.ndarray, found: Optimum) -> Fit[L]:
    return Fit(
        law=law,
        records=tuple(records),
        predicted=measured * np.exp(-found.residuals),
        residuals=found.residuals,
        held_out_residuals=found.held_out_residuals,
        draws=found.draws,
    )


def _interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the percentile interval over the first axis; NaN without draws."""
    if not len(draws):
        return (np.full(draws.shape[1:], np.nan),) * 2
    return tuple(np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0))
