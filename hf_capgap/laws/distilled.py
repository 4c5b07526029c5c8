"""The distillation law: the loss of a student that learns from a teacher."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from . import published
from .fitting import Coefficient
from .records import Records
from .sizes import check_counts, check_losses, warn_outside
from .supervised import ScalingLaw, SupervisedLaw


@dataclass(frozen=True)
class DistillationLaw(ScalingLaw):
    """Loss of a student distilled from a teacher with loss L_T (equation 8 of Busbridge et al., arXiv 2502.08606):

        L_S = L_T + L_T^-c0 · (1 + (L_T / (d1·L̃_S))^(1/f1))^(-c1·f1) · (A·N^-alpha + B·D^-beta)^gamma

    where L̃_S is the loss that the supervised law gives the student for the same tokens. L_S is always above L_T: this
    form cannot describe a student that beats its teacher, although the paper's measurements show such students.
    Without arguments it has the published coefficients.

    Args:
        A: Weight of the term that falls with the student's parameters.
        B: Weight of the term that falls with the student's tokens.
        alpha: Exponent of parameters, positive: the term is A·N^-alpha.
        beta: Exponent of tokens, positive.
        gamma: Exponent of the sum.
        c0: How much harder a stronger teacher is to follow.
        c1: How fast the gap closes for a teacher that is weak beside the student.
        f1: Width of the transition between strong and weak teachers.
        d1: Ratio L_T / L̃_S at the transition.
        supervised: The supervised law of the same data.
        ranges: Name of an input -> (lowest, highest) value that the law was measured for; outside them a call warns.
        source: Where the coefficients come from.

    Raises:
        LawError: A coefficient that is not a positive number.
    """

    A: float = published.DISTILLATION_COEFFICIENTS["A"]
    B: float = published.DISTILLATION_COEFFICIENTS["B"]
    alpha: float = published.DISTILLATION_COEFFICIENTS["alpha"]
    beta: float = published.DISTILLATION_COEFFICIENTS["beta"]
    gamma: float = published.DISTILLATION_COEFFICIENTS["gamma"]
    c0: float = published.DISTILLATION_COEFFICIENTS["c0"]
    c1: float = published.DISTILLATION_COEFFICIENTS["c1"]
    f1: float = published.DISTILLATION_COEFFICIENTS["f1"]
    d1: float = published.DISTILLATION_COEFFICIENTS["d1"]
    supervised: SupervisedLaw = dataclasses.field(default_factory=SupervisedLaw)
    ranges: Mapping[str, tuple[float, float]] | None = None
    source: str | None = None

    coefficients = {
        "A": Coefficient((1e1, 1e3, 1e5), 1e-3, 1e12),
        "B": Coefficient((1e2, 1e4), 1e-3, 1e12),
        "alpha": Coefficient((0.2, 0.4), 0.02, 3.0),
        "beta": Coefficient((0.3, 0.6), 0.02, 3.0),
        "gamma": Coefficient((0.5, 1.0), 0.05, 10.0),
        "c0": Coefficient((1.0, 3.0), 0.01, 30.0),
        "c1": Coefficient((10.0, 100.0, 1000.0), 0.01, 1e5),
        "f1": Coefficient((0.05, 0.2), 0.01, 2.0),
        "d1": Coefficient((1.0, 1.3), 0.2, 5.0),
    }
    _published = published.DISTILLATION_COEFFICIENTS

    def __post_init__(self) -> None:
        is_labelled = self.source is not None
        super().__post_init__()
        if not is_labelled and self.supervised.values() != SupervisedLaw().values():
            object.__setattr__(self, "source", f"{self.source}; on a supervised law given by the caller")

    def __call__(self, num_params: ArrayLike, num_tokens: ArrayLike, teacher_loss: ArrayLike) -> np.ndarray:
        """The student's loss in nats per token, float64, of the broadcast shape of the inputs.

        Args:
            num_params: The student's parameters outside the embeddings.
            num_tokens: Tokens that it is distilled on.
            teacher_loss: The teacher's cross-entropy on the same held-out text, nats per token.

        Raises:
            LawError: Sizes or losses that are negative, not finite, or in other units.

        Warns:
            ExtrapolationWarning: Inputs outside `ranges`.
        """
        num_params, num_tokens = check_counts("num_params", num_params), check_counts("num_tokens", num_tokens)
        teacher_loss = check_losses("teacher_loss", teacher_loss)
        warn_outside(
            "The distillation law",
            self.ranges,
            num_params=num_params,
            num_tokens=num_tokens,
            teacher_loss=teacher_loss,
        )
        return self.loss(num_params, num_tokens, teacher_loss)

    def loss(self, num_params: ArrayLike, num_tokens: ArrayLike, teacher_loss: ArrayLike) -> np.ndarray:
        """As a call, without checks and warnings: for searches."""
        points = np.broadcast_arrays(*(np.asarray(x, dtype=float) for x in (num_params, num_tokens, teacher_loss)))
        alone = self.supervised.loss(points[0], points[1])
        gap = _LogGap(self._log_coefficients(), *(x.ravel() for x in (*points, alone))).value
        return (points[2] + np.exp(gap).reshape(points[2].shape))[()]

    @staticmethod
    def log_loss(
        log_coefficients: np.ndarray,
        num_params: np.ndarray,
        num_tokens: np.ndarray,
        teacher_loss: np.ndarray,
        supervised_loss: np.ndarray,
        gradient: bool = True,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The law on logarithms, with its Jacobian: what is fitted (see `fitting.LogForm`).

        Args:
            log_coefficients: [..., 9].
            num_params: [points].
            num_tokens: [points].
            teacher_loss: [points].
            supervised_loss: L̃_S of each student, [points].

        Returns:
            log loss [..., points], and its derivatives [..., points, 9] or None.
        """
        gap = _LogGap(log_coefficients, num_params, num_tokens, teacher_loss, supervised_loss)
        total = np.logaddexp(np.log(teacher_loss), gap.value)
        if not gradient:
            return total, None
        return total, gap.jacobian() * np.exp(gap.value - total)[..., None]

    @classmethod
    def fit(
        cls,
        records: Records,
        *,
        supervised: SupervisedLaw | None = None,
        fixed: Mapping[str, float] | None = None,
        **options: Any,
    ) -> Any:
        """Fit the law to the runs with a teacher among `records`.

        Args:
            records: `RunRecord`s of one dataset; or a file or folder of them.
            supervised: The supervised law of the same data; fitted to the runs without a teacher if None.
            fixed: Coefficients to hold at a value.
            options: `huber_delta`, `num_bootstrap` and `seed` of `fitting.fit_form`.

        Returns:
            A `fits.Fit` with the law, intervals, residuals and held-out errors.

        Raises:
            FitError: Too few records or sizes, several datasets, losses that are missing or not finite.
        """
        from .fits import fit_distillation

        return fit_distillation(records, supervised=supervised, fixed=fixed, **options)


class _LogGap:
    """log(L_S - L_T) at some points, [..., points], of log coefficients [..., 9]; see `DistillationLaw`."""

    def __init__(
        self,
        log_coefficients: np.ndarray,
        num_params: np.ndarray,
        num_tokens: np.ndarray,
        teacher_loss: np.ndarray,
        supervised_loss: np.ndarray,
    ):
        A, B, *others, log_d1 = np.moveaxis(log_coefficients, -1, 0)[..., None]
        alpha, beta, self.gamma, c0, c1, f1 = np.exp(others)
        log_teacher = np.log(teacher_loss)
        self.from_params, self.from_tokens = -alpha * np.log(num_params), -beta * np.log(num_tokens)
        self.by_params, self.by_tokens = A + self.from_params, B + self.from_tokens
        self.inner = np.logaddexp(self.by_params, self.by_tokens)
        self.transition = (log_teacher - np.log(supervised_loss) - log_d1) / f1
        self.weak = np.logaddexp(0.0, self.transition)  # log(1 + (L_T / (d1·L̃_S))^(1/f1))
        self.steepness, self.exponent = c1, c1 * f1
        self.strength = -c0 * log_teacher
        self.value = self.strength - self.exponent * self.weak + self.gamma * self.inner

    def jacobian(self) -> np.ndarray:
        """Derivatives by the log coefficients, [..., points, 9]."""
        slope = np.exp(self.transition - self.weak)  # d weak / d transition
        share_params = self.gamma * np.exp(self.by_params - self.inner)
        share_tokens = self.gamma * np.exp(self.by_tokens - self.inner)
        columns = (
            share_params,
            share_tokens,
            share_params * self.from_params,
            share_tokens * self.from_tokens,
            self.gamma * self.inner,
            self.strength,
            -self.exponent * self.weak,
            self.exponent * (slope * self.transition - self.weak),
            self.steepness * slope,
        )
        return np.stack(np.broadcast_arrays(*columns, self.value)[:-1], axis=-1)
