"""Compute-optimal recipes: the budget is spent, nothing near is better, and the crossovers are crossovers."""

from __future__ import annotations

import numpy as np
import pytest

from hf_capgap import DistillationLaw
from hf_capgap.errors import LawError
from hf_capgap.laws import SCENARIOS, Laws, compute_optimal, crossover_compute, crossover_tokens, iso_flop_curves

each_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
LAW = DistillationLaw()


def cost(scenario: str, student: float, tokens: float, teacher: float, teacher_tokens: float) -> float:
    """C = 3·F(N_S)·D_S + F(N_T)·(δ_inference·D_S + 3·δ_pretraining·D_T), F = 2N."""
    inference, pretraining = SCENARIOS[scenario].teacher_inference, SCENARIOS[scenario].teacher_pretraining
    return 6 * student * tokens + 2 * teacher * (inference * tokens + 3 * pretraining * teacher_tokens)


@each_scenario
@pytest.mark.parametrize("compute", [1e20, 1e22, 1e24])
@pytest.mark.parametrize("student", [3e8, 3e9])
def test_a_recipe_spends_its_budget_and_predicts_by_the_laws(scenario: str, compute: float, student: float) -> None:
    recipe = compute_optimal(student, compute=compute, scenario=scenario)
    spent = cost(scenario, student, recipe.num_tokens, recipe.num_teacher_params, recipe.num_teacher_tokens)
    assert spent == pytest.approx(compute, rel=1e-9)
    teacher_loss = LAW.supervised.loss(recipe.num_teacher_params, recipe.num_teacher_tokens)
    assert recipe.teacher_loss == pytest.approx(teacher_loss, rel=1e-12)
    assert recipe.loss == pytest.approx(LAW.loss(student, recipe.num_tokens, teacher_loss), rel=1e-12)
    assert recipe.num_supervised_tokens == pytest.approx(compute / (6 * student), rel=1e-12)
    assert recipe.supervised_loss == pytest.approx(LAW.supervised.loss(student, compute / (6 * student)), rel=1e-12)
    assert recipe.distil == (recipe.loss < recipe.supervised_loss)


@each_scenario
@pytest.mark.parametrize("compute", [1e20, 1e22])
def test_no_other_split_of_the_budget_is_better(scenario: str, compute: float) -> None:
    """Ten thousand random teachers and splits, each with the student's tokens that the budget leaves."""
    student, rng = 1e9, np.random.default_rng(0)
    best = compute_optimal(student, compute=compute, scenario=scenario)
    teacher = student * np.exp(rng.uniform(np.log(0.1), np.log(1000), 10_000))
    chosen = SCENARIOS[scenario]
    if chosen.teacher_pretraining:
        share = rng.uniform(0.001, 0.999, 10_000)
        teacher_tokens = share * compute / (6 * teacher)
    else:
        share, teacher_tokens = 0.0, 20 * teacher
    tokens = (1 - share) * compute / (6 * student + 2 * teacher * chosen.teacher_inference)
    losses = LAW.loss(student, tokens, LAW.supervised.loss(teacher, teacher_tokens))
    assert best.loss <= losses.min() + 1e-9
    assert losses.min() < best.loss * 1.01  # the search was near enough to say something
    assert not best.at_edge


@each_scenario
def test_a_token_budget_is_kept_and_its_teacher_is_the_best(scenario: str) -> None:
    recipe = compute_optimal(1e9, num_tokens=1e11, scenario=scenario)
    assert recipe.num_tokens == recipe.num_supervised_tokens == 1e11
    teachers = np.geomspace(1e8, 1e12, 4000)
    losses = LAW.loss(1e9, 1e11, LAW.supervised.loss(teachers, 20 * teachers))
    assert recipe.num_teacher_params == pytest.approx(teachers[losses.argmin()], rel=0.01)
    assert recipe.flops["teacher_inference"] == pytest.approx(2 * recipe.num_teacher_params * 1e11)


def test_paying_for_the_teacher_never_helps() -> None:
    losses = {name: compute_optimal(1e9, compute=1e22, scenario=name).loss for name in SCENARIOS}
    assert losses["best_case"] < losses["teacher_inference"] < losses["both"]
    assert losses["best_case"] < losses["teacher_pretraining"] < losses["both"]


def test_an_optimum_at_the_edge_of_the_search_is_said() -> None:
    """A student that loses next to nothing to its teacher: the largest teacher searched is the best."""
    laws = Laws(distillation=DistillationLaw(A=1e-3, B=1e-3))
    assert compute_optimal(1e9, num_tokens=1e10, laws=laws).at_edge


@pytest.mark.parametrize("teacher_loss", [1.8, 2.0, 2.2])
def test_supervised_training_overtakes_at_the_crossover(teacher_loss: float) -> None:
    found = crossover_tokens(1e9, teacher_loss)
    gain = [
        LAW.supervised.loss(1e9, tokens) - LAW.loss(1e9, tokens, teacher_loss)
        for tokens in (found.value * 0.9, found.value, found.value * 1.1)
    ]
    assert gain[0] > 0 > gain[2]
    assert gain[1] == pytest.approx(0, abs=1e-9)
    assert found.windows[-1][1] == found.value


def test_a_weaker_teacher_is_overtaken_sooner() -> None:
    points = [crossover_tokens(3e9, loss).value for loss in (1.9, 2.1, 2.5)]
    assert points == sorted(points, reverse=True)


@each_scenario
def test_the_crossover_in_compute_separates_the_recipes(scenario: str) -> None:
    found = crossover_compute(1e9, scenario=scenario)
    below, above = (compute_optimal(1e9, compute=found.value * factor, scenario=scenario) for factor in (0.8, 1.25))
    assert below.distil
    assert not above.distil


def test_where_distillation_always_loses_the_crossover_says_so() -> None:
    laws = Laws(distillation=DistillationLaw(A=1e9))  # a student that never follows its teacher
    found = crossover_tokens(1e9, 2.0, laws=laws)
    assert found.value is None
    assert found.windows == ()
    assert "supervised training is better everywhere" in found.verdict


def test_iso_flop_curves_have_their_best_student_inside() -> None:
    sizes = np.geomspace(1e8, 1e11, 13)
    curves = iso_flop_curves([1e20, 1e22], sizes, scenario="best_case")
    losses = curves.of("supervised_loss")
    assert losses.shape == (2, 13)
    assert (losses[1] < losses[0]).all()
    best = losses.argmin(axis=1)
    assert (best > 0).all()
    assert (best < 12).all()
    assert best[1] > best[0]
    np.testing.assert_allclose(curves.of("num_supervised_tokens") * 6 * sizes, [[1e20] * 13, [1e22] * 13])


def test_bad_budgets_are_refused() -> None:
    for budget in ({}, {"compute": 1e20, "num_tokens": 1e10}):
        with pytest.raises(LawError, match="one budget"):
            compute_optimal(1e9, **budget)
    with pytest.raises(LawError, match="Unknown scenario.*best_case"):
        compute_optimal(1e9, compute=1e20, scenario="free lunch")
    with pytest.raises(LawError, match="compute must be positive"):
        compute_optimal(1e9, compute=-1e20)
    with pytest.raises(LawError, match="Did you mean 3e9"):
        compute_optimal(3, compute=1e20)
