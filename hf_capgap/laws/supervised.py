"""What scaling laws share, and the supervised one: the loss of a model trained on text alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike

from ..errors import LawError
from . import published
from .fitting import Coefficient
from .records import Records
from .sizes import check_counts, warn_outside


class ScalingLaw:
    """What the laws share: coefficients that are positive numbers, the range they hold in, and calls on arrays."""

    # Name of each coefficient, in the order of the fields, and where a fit looks for it.
    coefficients: ClassVar[Mapping[str, Coefficient]]
    _published: ClassVar[Mapping[str, float]]

    def __post_init__(self) -> None:
        for name, value in self.values().items():
            if not (isinstance(value, (int, float)) and np.isfinite(value) and value > 0):
                raise LawError(
                    f"The coefficient {name} must be a positive number",
                    found=value,
                    fix="Exponents are given without their minus sign: the terms fall with size and tokens.",
                )
        is_published = self.values() == dict(self._published)
        if self.source is None:
            object.__setattr__(self, "source", published.BUSBRIDGE_SOURCE if is_published else published.GIVEN)
        if self.ranges is None:
            object.__setattr__(self, "ranges", dict(published.BUSBRIDGE_RANGES) if is_published else {})

    def values(self) -> dict[str, float]:
        """Name of each coefficient -> its value."""
        return {name: getattr(self, name) for name in self.coefficients}

    def to_dict(self) -> dict[str, Any]:
        """Everything that makes this law again: plain JSON."""
        return dataclasses.asdict(self)

    def _log_coefficients(self) -> np.ndarray:
        return np.log(np.array(list(self.values().values())))


@dataclass(frozen=True)
class SupervisedLaw(ScalingLaw):
    """Loss of a model trained on text alone: L(N, D) = E + (A·N^-alpha + B·D^-beta)^gamma.

    Busbridge et al., arXiv 2502.08606, the supervised law; gamma = 1 is the form of Hoffmann et al., arXiv 2203.15556.
    Without arguments it has the published coefficients.

    Args:
        E: Loss that no size and no data removes, nats per token.
        A: Weight of the term that falls with parameters.
        B: Weight of the term that falls with tokens.
        alpha: Exponent of parameters, positive: the term is A·N^-alpha.
        beta: Exponent of tokens, positive.
        gamma: Exponent of the sum.
        ranges: Name of an input -> (lowest, highest) value that the law was measured for; outside them a call warns.
        source: Where the coefficients come from.

    Raises:
        LawError: A coefficient that is not a positive number.
    """

    E: float = published.SUPERVISED_COEFFICIENTS["E"]
    A: float = published.SUPERVISED_COEFFICIENTS["A"]
    B: float = published.SUPERVISED_COEFFICIENTS["B"]
    alpha: float = published.SUPERVISED_COEFFICIENTS["alpha"]
    beta: float = published.SUPERVISED_COEFFICIENTS["beta"]
    gamma: float = published.SUPERVISED_COEFFICIENTS["gamma"]
    ranges: Mapping[str, tuple[float, float]] | None = None
    source: str | None = None

    coefficients = {
        "E": Coefficient((0.5, 1.0, 2.0), 1e-3, 10.0),
        "A": Coefficient((1e1, 1e2, 1e3, 1e4), 1e-3, 1e12),
        "B": Coefficient((1e1, 1e2, 1e3, 1e4, 1e5), 1e-3, 1e12),
        "alpha": Coefficient((0.2, 0.35, 0.5), 0.02, 3.0),
        "beta": Coefficient((0.2, 0.35, 0.5), 0.02, 3.0),
        "gamma": Coefficient((0.5, 1.0), 0.05, 10.0),
    }
    _published = published.SUPERVISED_COEFFICIENTS

    def __call__(self, num_params: ArrayLike, num_tokens: ArrayLike) -> np.ndarray:
        """Loss in nats per token, float64, of the broadcast shape of the inputs.

        Args:
            num_params: Parameters outside the embeddings.
            num_tokens: Training tokens.

        Raises:
            LawError: Sizes that are negative, not finite, or lack their unit.

        Warns:
            ExtrapolationWarning: Sizes outside `ranges`.
        """
        num_params, num_tokens = check_counts("num_params", num_params), check_counts("num_tokens", num_tokens)
        warn_outside("The supervised law", self.ranges, num_params=num_params, num_tokens=num_tokens)
        return self.loss(num_params, num_tokens)

    def loss(self, num_params: ArrayLike, num_tokens: ArrayLike) -> np.ndarray:
        """As a call, without checks and warnings: for searches. `num_tokens` may be infinite."""
        num_params, num_tokens = np.asarray(num_params, dtype=float), np.asarray(num_tokens, dtype=float)
        return self.E + (self.A * num_params**-self.alpha + self.B * num_tokens**-self.beta) ** self.gamma

    def tokens_for(self, num_params: ArrayLike, loss: ArrayLike) -> np.ndarray:
        """Tokens after which a model of `num_params` has `loss`, by inverting the law; infinite if it never has."""
        num_params, loss = np.asarray(num_params, dtype=float), np.asarray(loss, dtype=float)
        left = np.maximum(loss - self.E, 0.0) ** (1 / self.gamma) - self.A * num_params**-self.alpha
        with np.errstate(divide="ignore"):
            return np.where(left > 0, (np.maximum(left, 0.0) / self.B) ** (-1 / self.beta), np.inf)

    @staticmethod
    def log_loss(
        log_coefficients: np.ndarray, num_params: np.ndarray, num_tokens: np.ndarray, gradient: bool = True
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The law on logarithms, with its Jacobian: what is fitted (see `fitting.LogForm`).

        Args:
            log_coefficients: [..., 6].
            num_params: [points].
            num_tokens: [points].

        Returns:
            log loss [..., points], and its derivatives [..., points, 6] or None.
        """
        E, A, B, *exponents = np.moveaxis(log_coefficients, -1, 0)[..., None]
        alpha, beta, gamma = np.exp(exponents)
        by_params, by_tokens = A - alpha * np.log(num_params), B - beta * np.log(num_tokens)
        inner = np.logaddexp(by_params, by_tokens)
        total = np.logaddexp(E, gamma * inner)
        if not gradient:
            return total, None
        reducible = gamma * np.exp(gamma * inner - total)  # d total / d inner
        share_params, share_tokens = reducible * np.exp(by_params - inner), reducible * np.exp(by_tokens - inner)
        columns = (
            np.exp(E - total),
            share_params,
            share_tokens,
            share_params * (by_params - A),
            share_tokens * (by_tokens - B),
            reducible * inner,
        )
        return total, np.stack(columns, axis=-1)

    @classmethod
    def fit(cls, records: Records, *, fixed: Mapping[str, float] | None = None, **options: Any) -> Any:
        """Fit the law to the runs without a teacher among `records`.

        Args:
            records: `RunRecord`s of one dataset; or a file or folder of them.
            fixed: Coefficients to hold at a value: `{"gamma": 1.0}` gives the form of Hoffmann et al.
            options: `huber_delta`, `num_bootstrap` and `seed` of `fitting.fit_form`.

        Returns:
            A `fits.Fit` with the law, intervals, residuals and held-out errors.

        Raises:
            FitError: Too few records or sizes, several datasets, losses that are missing or not finite.
        """
        from .fits import fit_supervised

        return fit_supervised(records, fixed=fixed, **options)
