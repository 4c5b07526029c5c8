"""The one fitting routine of all laws: Huber loss on log residuals, L-BFGS from a grid of starts, bootstrap intervals.

A law is fitted through its log form: a function from the logarithms of its (positive) coefficients to the logarithms
of its predictions at the records' points, with its Jacobian. What is minimised is (Hoffmann et al. 2022)

    mean_i Huber_delta(log measured_i - log predicted_i)

so that a run that went wrong has bounded influence and all sizes weigh the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.optimize import minimize
from scipy.special import chdtri

from ..errors import FitError

# Hoffmann et al. 2022, who found larger ones to overweight the small, noisy runs.
HUBER_DELTA = 1e-3
NUM_BOOTSTRAP = 200
LEVEL = 0.95
_NUM_POLISHED = 12  # of the starts; the others are only looked at
NUM_FOLDS = 5
_RIDGE = 1e-10  # of the largest curvature: how far a direction that the data do not determine is trusted
_WALL = 1.0  # weight of the squared distance outside the bounds, in log units


@dataclass(frozen=True)
class Coefficient:
    """Where the search for a coefficient starts, and the bounds that it stays in; all positive."""

    starts: Sequence[float]
    low: float
    high: float


class LogForm(Protocol):
    """The log predictions of a law at fixed points, as a function of its log coefficients."""

    def __call__(
        self, log_coefficients: np.ndarray, gradient: bool = True
    ) -> tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, None]:
        """([..., points], [..., points, coefficients] or None) from [..., coefficients]."""


@dataclass(frozen=True)
class Optimum:
    """What the routine found.

    Attributes:
        coefficients: [coefficients], fixed ones included.
        draws: The same from each bootstrap sample, [num_bootstrap, coefficients].
        residuals: log measured - log predicted, [points].
        held_out_residuals: The same, each point predicted by a fit that did not see it, [points]; NaN where too few
            groups were left to fit.
        objective: The mean Huber loss, in units of delta squared.
    """

    coefficients: np.ndarray
    draws: np.ndarray
    residuals: np.ndarray
    held_out_residuals: np.ndarray
    objective: float


def fit_form(
    form: LogForm,
    measured: np.ndarray,
    coefficients: Mapping[str, Coefficient],
    *,
    fixed: Mapping[str, float] | None = None,
    groups: np.ndarray | None = None,
    huber_delta: float = HUBER_DELTA,
    num_bootstrap: int = NUM_BOOTSTRAP,
    num_folds: int = NUM_FOLDS,
    seed: int = 0,
) -> Optimum:
    """Fit the coefficients of a log form to measurements.

    Args:
        form: The law at the measured points.
        measured: Measured values, positive, [points].
        coefficients: Name of each coefficient, in the form's order, and where to look for it.
        fixed: Coefficients that are not fitted, and their values.
        groups: A label per point, [points]: points of one label are resampled and held out together. Each its own if
            None.
        huber_delta: Log residual at which the loss turns from quadratic to linear.
        num_bootstrap: Bootstrap samples; 0 gives no intervals.
        num_folds: Parts that are held out in turn; 0 gives no held-out residuals.
        seed: Of the bootstrap and of the folds.

    Raises:
        FitError: Options that cannot be, or every start ended where the law is not finite.
    """
    names = list(coefficients)
    given = fixed or {}
    check_options(given, huber_delta, num_bootstrap)
    problem = _Problem(
        form=form,
        log_measured=np.log(measured),
        low=np.log([given.get(name, coefficients[name].low) for name in names]),
        high=np.log([given.get(name, coefficients[name].high) for name in names]),
        delta=huber_delta,
    )
    choices = [[given[name]] if name in given else coefficients[name].starts for name in names]
    starts = np.log(np.array(list(itertools.product(*choices))))
    labels = np.unique(np.arange(len(measured)) if groups is None else groups, return_inverse=True)[1]
    for_bootstrap, for_folds = np.random.default_rng(seed).spawn(2)

    even = np.ones(len(measured))
    found = problem.solve_from_grid(starts, even)
    optimum, objective = found[0]
    residuals = problem.residuals(optimum)
    draws = [
        problem.solve(start, weights, rounds=2)[0]
        for weights, start in _bootstrap(problem, _rivals(found, labels), labels, num_bootstrap, for_bootstrap)
    ]
    return Optimum(
        coefficients=np.exp(optimum),
        draws=np.exp(np.array(draws).reshape(num_bootstrap, len(names))),
        residuals=residuals,
        held_out_residuals=_cross_validate(problem, optimum, labels, num_folds, for_folds),
        objective=objective,
    )


def check_options(
    fixed: Mapping[str, float] | None = None, huber_delta: float = HUBER_DELTA, num_bootstrap: int = NUM_BOOTSTRAP
) -> None:
    """Raises `FitError` for options of a fit that cannot be."""
    for name, value in {**(fixed or {}), "huber_delta": huber_delta}.items():
        if not (isinstance(value, (int, float, np.number)) and 0 < value < np.inf):
            raise FitError(f"{name} must be a positive number", found=repr(value))
    if not (isinstance(num_bootstrap, (int, np.integer)) and num_bootstrap >= 0):
        raise FitError("num_bootstrap must be a whole number, 0 or more", found=repr(num_bootstrap))


@dataclass(frozen=True)
class _Problem:
    """Points, bounds and loss; every fit of it differs only in the weights of the points and in where it starts."""

    form: LogForm
    log_measured: np.ndarray  # [points]
    low: np.ndarray  # [coefficients], logarithms; low = high: fixed
    high: np.ndarray
    delta: float

    def residuals(self, log_coefficients: np.ndarray) -> np.ndarray:
        return self.log_measured - self.form(log_coefficients, gradient=False)[0]

    def objective(self, x: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
        """Mean weighted Huber loss in units of delta², and its gradient.

        Outside the bounds the law is taken at the nearest bound and the squared distance is added, so that the search
        may change its coordinates freely and yet comes back.
        """
        inside = np.clip(x, self.low, self.high)
        predicted, jacobian = self.form(inside)
        scaled = (predicted - self.log_measured) / self.delta
        slope = np.clip(scaled, -1, 1)
        losses = slope * (scaled - 0.5 * slope)
        total = weights.sum()
        gradient = (weights * slope) @ jacobian / (total * self.delta)
        out = x - inside
        value = weights @ losses / total + 0.5 * _WALL * (out @ out)
        return value, np.where(out == 0, gradient, 0.0) + _WALL * out

    def solve_from_grid(self, starts: np.ndarray, weights: np.ndarray) -> list[tuple[np.ndarray, float]]:
        """(log coefficients, objective) from each of the most promising starts, best first."""
        scores = []
        for chunk in np.array_split(starts, max(1, len(starts) * len(weights) // 200_000)):
            scaled = (self.form(chunk, gradient=False)[0] - self.log_measured) / self.delta
            slope = np.clip(scaled, -1, 1)
            scores.append((slope * (scaled - 0.5 * slope)) @ weights)
        scores = np.concatenate(scores)
        order = np.argsort(np.where(np.isfinite(scores), scores, np.inf), kind="stable")[:_NUM_POLISHED]
        found = [pair for pair in (self.solve(starts[i], weights) for i in order) if np.isfinite(pair[1])]
        if not found:
            raise FitError("No start of the fit ended at a finite loss", fix="Check the records' sizes and losses.")
        return sorted(found, key=lambda pair: pair[1])

    def solve(self, start: np.ndarray, weights: np.ndarray, rounds: int = 6) -> tuple[np.ndarray, float]:
        """L-BFGS from one start: (log coefficients inside the bounds, objective).

        Scaling laws are sloppy: A and alpha trade off over orders of magnitude. In the coordinates that make the
        Gauss-Newton curvature at the start the identity, L-BFGS needs tens of steps instead of thousands; a few rounds
        renew those coordinates.
        """
        x, value = start, np.inf
        for _ in range(rounds):
            root = self._whitening(x, weights)

            def in_root(z: np.ndarray, x: np.ndarray = x, root: np.ndarray = root) -> tuple[float, np.ndarray]:
                value, gradient = self.objective(x + root @ z, weights)
                return value, root.T @ gradient

            result = minimize(
                in_root,
                np.zeros(root.shape[1]),
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": 100, "maxfun": 300, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-8},
            )
            x = np.clip(x + root @ result.x, self.low, self.high)
            improved = value - result.fun
            value = min(value, float(result.fun))
            if not improved > 1e-6 * abs(value):
                break
        return x, value

    def _whitening(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[coefficients, free]: a root of the inverse Gauss-Newton matrix in units of delta, no step above one e-fold
        in a direction that the data do not determine."""
        free = self.low < self.high
        jacobian = self.form(np.clip(x, self.low, self.high))[1][:, free] / self.delta
        values, vectors = np.linalg.eigh((weights[:, None] * jacobian).T @ jacobian / weights.sum())
        scale = 1 / np.sqrt(np.maximum(values, 0) + _RIDGE * values[-1] + 1.0)
        root = np.zeros((len(x), int(free.sum())))
        root[free] = vectors * scale
        return root

    def covariance_root(self, x: np.ndarray, residuals: np.ndarray) -> np.ndarray:
        """[coefficients, free]: a root of the linearised covariance of the estimate."""
        free = self.low < self.high
        jacobian = self.form(x)[1][:, free]
        spread = 1.4826 * np.median(np.abs(residuals)) or 1e-12  # of a normal with this median
        values, vectors = np.linalg.eigh(jacobian.T @ jacobian)
        root = np.zeros((len(x), int(free.sum())))
        # No wider than the bounds: beyond them nothing is to be found.
        root[free] = vectors * np.minimum(spread / np.sqrt(np.maximum(values, 1e-300)), (self.high - self.low).max())
        return root


def _rivals(found: list[tuple[np.ndarray, float]], labels: np.ndarray) -> list[np.ndarray]:
    """The optima that the data do not tell from the best one: by the likelihood ratio at `LEVEL`.

    The Huber loss of residuals well above delta is that of a Laplace distribution, whose log likelihood falls by the
    number of independent points times the log of the ratio of the losses.
    """
    best, objective = found[0]
    largest_ratio = np.exp(chdtri(len(best), 1 - LEVEL) / (2 * (labels.max() + 1)))
    return [x for x, value in found if value <= objective * largest_ratio]


def _bootstrap(
    problem: _Problem, rivals: list[np.ndarray], labels: np.ndarray, num_samples: int, rng: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(weights, start) of each bootstrap sample.

    A start is a draw from the linearised distribution around the optimum or one of its rivals. From the optimum itself
    every sample would stay near it in the directions that the data leave open, and the intervals would claim a
    knowledge that there is not.
    """
    num_groups = labels.max() + 1
    roots = [problem.covariance_root(x, problem.residuals(x)) for x in rivals]
    for _ in range(num_samples):
        weights = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups))[labels].astype(float)
        i = rng.integers(len(rivals))
        start = rivals[i] + roots[i] @ rng.standard_normal(roots[i].shape[1])
        yield weights, np.clip(start, problem.low, problem.high)


def _cross_validate(
    problem: _Problem, optimum: np.ndarray, labels: np.ndarray, num_folds: int, rng: np.random.Generator
) -> np.ndarray:
    """Residual of each point under a fit without its fold, [points]."""
    num_groups = labels.max() + 1
    folds = rng.permutation(num_groups) % max(1, min(num_folds, num_groups))
    residuals = np.full(len(labels), np.nan)
    for fold in range(min(num_folds, folds.max() + 1)):
        held_out = folds[labels] == fold
        if held_out.all():
            continue
        residuals[held_out] = problem.residuals(problem.solve(optimum, (~held_out).astype(float))[0])[held_out]
    return residuals
