"""Where training on text alone overtakes distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq

from .book import Laws
from .recipes import compute_optimal
from .sizes import check_counts, check_losses, format_size

_TOKENS_SEARCHED = (1e7, 1e16)
_COMPUTE_SEARCHED = (1e16, 1e28)


@dataclass(frozen=True)
class Crossover:
    """Where training on text alone overtakes distillation.

    Attributes:
        value: Tokens, or FLOPs, from which on supervised training is better; None if there is no such change.
        windows: (lowest, highest) tokens, or FLOPs, between which distillation is better; an end of the range that was
            looked at where it goes beyond.
        searched: The range of tokens, or FLOPs, that was looked at.
        verdict: What was found, in one sentence.
    """

    value: float | None
    windows: tuple[tuple[float, float], ...]
    searched: tuple[float, float]
    verdict: str


def crossover_tokens(num_params: float, teacher_loss: float, *, laws: Laws | None = None) -> Crossover:
    """The tokens from which on a student does better alone than under one given teacher.

    Args:
        num_params: The student's parameters outside the embeddings.
        teacher_loss: The teacher's cross-entropy, nats per token.
        laws: The laws to go by; the published ones if None.

    Raises:
        LawError: A size or loss that cannot be.
    """
    laws, size = laws or Laws(), float(check_counts("num_params", num_params))
    teacher_loss = float(check_losses("teacher_loss", teacher_loss))

    def gain(log_tokens: float) -> float:
        tokens = np.exp(log_tokens)
        return float(laws.supervised.loss(size, tokens) - laws.distillation.loss(size, tokens, teacher_loss))

    return _crossover(gain, _TOKENS_SEARCHED, "tokens")


def crossover_compute(num_params: float, *, scenario: str = "both", laws: Laws | None = None) -> Crossover:
    """The compute from which on a student does better alone than under the best teacher for that compute.

    Args:
        num_params: The student's parameters outside the embeddings.
        scenario: One of `SCENARIOS`.
        laws: The laws to go by; the published ones if None.

    Raises:
        LawError: A size that cannot be, or an unknown scenario.
    """
    laws = laws or Laws()

    def gain(log_compute: float) -> float:
        recipe = compute_optimal(num_params, compute=float(np.exp(log_compute)), scenario=scenario, laws=laws)
        return recipe.supervised_loss - recipe.loss

    return _crossover(gain, _COMPUTE_SEARCHED, "FLOPs")


def _crossover(gain: Callable[[float], float], searched: tuple[float, float], unit: str) -> Crossover:
    """Every change of sign along a budget; `gain` > 0: distillation is better."""
    show = format_size if unit == "tokens" else "{:.2e}".format
    budgets = np.linspace(*np.log(searched), 61)
    wins = np.array([gain(budget) for budget in budgets]) > 0
    changes = np.flatnonzero(wins[1:] != wins[:-1])
    points = [float(np.exp(brentq(gain, budgets[i], budgets[i + 1]))) for i in changes]
    ends = [*([searched[0]] if wins[0] else []), *points, *([searched[1]] if wins[-1] else [])]
    windows = tuple(zip(ends[::2], ends[1::2], strict=True))
    value = points[-1] if points and not wins[-1] else None
    if not windows:
        verdict = f"supervised training is better everywhere from {show(searched[0])} to {show(searched[1])} {unit}"
    else:
        where = " and ".join(f"from {show(low)} to {show(high)} {unit}" for low, high in windows)
        verdict = f"distillation is better {where}"
    return Crossover(value, windows, searched, verdict)
