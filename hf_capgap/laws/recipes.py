"""Compute-optimal distillation: the best teacher and tokens for a student and a budget.

Total compute, with F(N) the forward FLOPs per token of a model of N parameters outside the embeddings:

    C = 3·F(N_S)·D_S + F(N_T)·(d_inference·D_S + 3·d_pretraining·D_T)

(Busbridge et al., arXiv 2502.08606). The scenarios say which of the teacher's costs count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..errors import LawError
from .book import Laws
from .published import CHINCHILLA_TOKENS_PER_PARAM
from .sizes import check_counts

_TEACHERS = (0.1, 1000.0)  # sizes searched, as multiples of the student's
_SHARES = (1e-4, 1 - 1e-4)  # fractions of the compute searched for the teacher's pretraining
_GRID, _ZOOMS = 65, 6


@dataclass(frozen=True)
class Scenario:
    """Which costs of the teacher count against the budget."""

    teacher_inference: bool
    teacher_pretraining: bool
    description: str


SCENARIOS = {
    "best_case": Scenario(False, False, "the teacher and its outputs are there already"),
    "teacher_inference": Scenario(True, False, "the teacher is there, and runs on every token"),
    "teacher_pretraining": Scenario(False, True, "the teacher is trained first; its outputs cost nothing"),
    "both": Scenario(True, True, "the teacher is trained first, and runs on every token"),
}


@dataclass(frozen=True)
class Recipe:
    """The best distillation of one student within a budget, and training on text alone for the same.

    Attributes:
        scenario: One of `SCENARIOS`.
        num_params: The student's parameters outside the embeddings, as are all sizes here.
        num_tokens: Tokens that it is distilled on.
        num_teacher_params: The best teacher's size.
        num_teacher_tokens: What that teacher is trained on.
        teacher_loss: Its loss by the supervised law, nats per token.
        loss: The student's by the distillation law.
        num_supervised_tokens: Tokens that training on text alone gets from the budget.
        supervised_loss: The student's loss after those.
        flops: What each part costs, those that the scenario does not count included.
        at_edge: The best teacher is the smallest or largest one searched (a tenth to a thousand times the student), or
            gets the smallest or largest share of the compute: the budget has no optimum of its own.
    """

    scenario: str
    num_params: float
    num_tokens: float
    num_teacher_params: float
    num_teacher_tokens: float
    teacher_loss: float
    loss: float
    num_supervised_tokens: float
    supervised_loss: float
    flops: dict[str, float]
    at_edge: bool

    @property
    def distil(self) -> bool:
        """Whether distillation is predicted to be the better use of the budget."""
        return self.loss < self.supervised_loss


@dataclass(frozen=True)
class IsoFlopCurves:
    """Losses at equal compute. Budgets along the first axis, student sizes along the second.

    Attributes:
        scenario: One of `SCENARIOS`.
        compute: [budgets] FLOPs.
        num_params: [sizes].
        recipes: [budgets][sizes], the best distillation of each student within each budget.
    """

    scenario: str
    compute: np.ndarray
    num_params: np.ndarray
    recipes: tuple[tuple[Recipe, ...], ...]

    def of(self, name: str) -> np.ndarray:
        """One attribute of every recipe, [budgets, sizes]."""
        return np.array([[getattr(recipe, name) for recipe in row] for row in self.recipes])


def forward_flops(num_params: ArrayLike) -> np.ndarray:
    """Forward FLOPs per token, 2 per parameter outside the embeddings: attention's products and the output head are
    left out (see `ModelSize.forward_flops_per_token` for all of them, from a config)."""
    return 2.0 * np.asarray(num_params, dtype=float)


def compute_optimal(
    num_params: float,
    *,
    compute: float | None = None,
    num_tokens: float | None = None,
    scenario: str = "both",
    laws: Laws | None = None,
    teacher_tokens_per_param: float = CHINCHILLA_TOKENS_PER_PARAM,
) -> Recipe:
    """The best teacher, and the best split of the budget between it and the student.

    A teacher that has to be trained within a budget of compute gets the tokens that serve the student best. Any other
    is taken as trained on `teacher_tokens_per_param`.

    Args:
        num_params: The student's parameters outside the embeddings.
        compute: Budget in FLOPs, for everything that the scenario counts.
        num_tokens: Or: tokens to distil on, whatever it costs.
        scenario: One of `SCENARIOS`.
        laws: The laws to go by; the published ones if None.
        teacher_tokens_per_param: Training tokens per parameter of a teacher whose training is not optimised.

    Raises:
        LawError: Not exactly one budget, one that is not positive, or an unknown scenario.
    """
    laws, size = laws or Laws(), float(check_counts("num_params", num_params))
    counted = _scenario(scenario)
    if (compute is None) == (num_tokens is None):
        raise LawError("A recipe needs one budget", fix="Give either compute= (FLOPs) or num_tokens=.")
    if num_tokens is not None:
        budget, pretrains = float(check_counts("num_tokens", num_tokens)), False
    else:
        budget, pretrains = float(check_counts("compute", compute)), counted.teacher_pretraining

    def split(log_teacher: np.ndarray, share: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(teacher size, its tokens, the student's tokens)"""
        teacher = np.exp(log_teacher)
        teacher_tokens = (
            share * budget / (3 * forward_flops(teacher)) if pretrains else teacher_tokens_per_param * teacher
        )
        if num_tokens is not None:
            return teacher, teacher_tokens, np.full_like(teacher, budget)
        per_token = 3 * forward_flops(size) + counted.teacher_inference * forward_flops(teacher)
        return teacher, teacher_tokens, ((1 - share) if pretrains else 1.0) * budget / per_token

    def loss(log_teacher: np.ndarray, share: np.ndarray) -> np.ndarray:
        teacher, teacher_tokens, tokens = split(log_teacher, share)
        return laws.distillation.loss(size, tokens, laws.supervised.loss(teacher, teacher_tokens))

    bounds = [tuple(np.log(np.multiply(size, _TEACHERS))), _SHARES if pretrains else (0.0, 0.0)]
    best, at_edge = _minimise(loss, bounds)
    teacher, teacher_tokens, tokens = (float(value) for value in split(*best))
    alone = budget if num_tokens is not None else budget / (3 * float(forward_flops(size)))
    return Recipe(
        scenario=scenario,
        num_params=size,
        num_tokens=tokens,
        num_teacher_params=teacher,
        num_teacher_tokens=teacher_tokens,
        teacher_loss=float(laws.supervised.loss(teacher, teacher_tokens)),
        loss=float(loss(*best)),
        num_supervised_tokens=alone,
        supervised_loss=float(laws.supervised.loss(size, alone)),
        flops={
            "student_training": float(3 * forward_flops(size) * tokens),
            "teacher_inference": float(forward_flops(teacher) * tokens),
            "teacher_pretraining": float(3 * forward_flops(teacher) * teacher_tokens),
        },
        at_edge=at_edge,
    )


def iso_flop_curves(
    compute: Sequence[float],
    num_params: Sequence[float],
    *,
    scenario: str = "both",
    laws: Laws | None = None,
) -> IsoFlopCurves:
    """The best distillation, and training on text alone, of students of several sizes at equal compute.

    Args:
        compute: Budgets in FLOPs.
        num_params: Student sizes, parameters outside the embeddings.
        scenario: One of `SCENARIOS`.
        laws: The laws to go by; the published ones if None.

    Raises:
        LawError: A size or budget that cannot be, or an unknown scenario.
    """
    rows = tuple(
        tuple(compute_optimal(size, compute=budget, scenario=scenario, laws=laws) for size in num_params)
        for budget in compute
    )
    return IsoFlopCurves(scenario, np.asarray(compute, dtype=float), np.asarray(num_params, dtype=float), rows)


def _scenario(name: str) -> Scenario:
    if name not in SCENARIOS:
        raise LawError("Unknown scenario", found=name, fix=f"It is one of {', '.join(SCENARIOS)}.")
    return SCENARIOS[name]


def _minimise(
    function: Callable[[np.ndarray, np.ndarray], np.ndarray], bounds: Sequence[tuple[float, float]]
) -> tuple[list[np.ndarray], bool]:
    """The lowest point of a function of two variables in a box, by a grid that zooms in; is it at an edge?"""
    box = list(bounds)
    for _ in range(_ZOOMS):
        axes = [np.linspace(low, high, _GRID if high > low else 1) for low, high in box]
        grid = np.meshgrid(*axes, indexing="ij")
        best = np.unravel_index(np.argmin(function(*grid)), grid[0].shape)
        point = [axis[i] for axis, i in zip(axes, best)]
        steps = [axis[1] - axis[0] if len(axis) > 1 else 0.0 for axis in axes]
        box = [(max(low, x - 2 * step), min(high, x + 2 * step)) for x, step, (low, high) in zip(point, steps, bounds)]
    at_edge = any(high > low and min(x - low, high - x) < 1e-6 * (high - low) for x, (low, high) in zip(point, bounds))
    return [np.asarray(x) for x in point], at_edge
