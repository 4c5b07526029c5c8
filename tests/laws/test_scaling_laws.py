"""The scaling laws: their numbers by the definition, their shape, and what they refuse."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from hf_capgap import CapacityGapLaw, DistillationLaw, SupervisedLaw
from hf_capgap.errors import LawError
from hf_capgap.laws import ExtrapolationWarning, Laws, format_size, parse_size, published

SMALL, IN_RANGE = 198e6, (143e6, 546e6, 1.02e9, 3e9, 7.75e9)


def supervised_by_definition(n: float, d: float) -> float:
    return 1.220 + (3355 / n**0.408 + 18186 / d**0.431) ** 0.452


def distilled_by_definition(n: float, d: float, teacher: float) -> float:
    weak = (1 + (teacher / (supervised_by_definition(n, d) * 1.315)) ** (1 / 0.090)) ** (-522.6 * 0.090)
    return teacher + teacher**-2.549 * weak * (2243 / n**0.321 + 24181 / d**0.637) ** 0.764


@pytest.mark.parametrize("num_params", IN_RANGE)
@pytest.mark.parametrize("num_tokens", [1e9, 20e9, 512e9])
@pytest.mark.parametrize("teacher_loss", [1.8, 2.2, 2.6])
def test_the_published_laws_are_their_formulas(num_params: float, num_tokens: float, teacher_loss: float) -> None:
    """Written a second time with divisions, so that a lost minus sign in an exponent shows."""
    assert SupervisedLaw()(num_params, num_tokens) == pytest.approx(
        supervised_by_definition(num_params, num_tokens), rel=1e-12
    )
    assert DistillationLaw()(num_params, num_tokens, teacher_loss) == pytest.approx(
        distilled_by_definition(num_params, num_tokens, teacher_loss), rel=1e-12
    )


def test_losses_fall_with_parameters_and_tokens() -> None:
    sizes, tokens = np.geomspace(143e6, 7.75e9, 30), np.geomspace(1e9, 1e12, 30)
    assert (np.diff(SupervisedLaw()(sizes, 1e11)) < 0).all()
    assert (np.diff(SupervisedLaw()(1e9, tokens)) < 0).all()
    assert (np.diff(DistillationLaw()(sizes, 1e11, 1.9)) < 0).all()
    assert (np.diff(DistillationLaw()(1e9, tokens, 1.9)) < 0).all()


def test_calls_broadcast_and_agree_with_single_calls() -> None:
    law = DistillationLaw()
    sizes, tokens, losses = np.array([[2e8], [1e9]]), np.array([1e10, 1e11, 1e12]), 2.1
    grid = law(sizes, tokens, losses)
    assert grid.shape == (2, 3)
    assert grid.dtype == np.float64
    for i, j in np.ndindex(grid.shape):
        assert grid[i, j] == pytest.approx(float(law(sizes[i, 0], tokens[j], losses)), rel=1e-14)


# ---- properties of the published coefficients ----


def best_teacher_loss(num_params: float, num_tokens: float) -> float:
    losses = np.linspace(1.3, 3.0, 3401)
    return float(losses[np.argmin(DistillationLaw()(num_params, num_tokens, losses))])


@pytest.mark.parametrize("num_params", IN_RANGE)
@pytest.mark.parametrize("num_tokens", [4e9, 64e9, 512e9])
def test_a_stronger_teacher_eventually_hurts(num_params: float, num_tokens: float) -> None:
    """The minimum over the teacher's loss lies inside the range of teachers, and both ends are clearly worse."""
    teachers = np.linspace(1.3, 3.0, 3401)
    students = DistillationLaw()(num_params, num_tokens, teachers)
    lowest = int(np.argmin(students))
    assert 0 < lowest < len(teachers) - 1
    assert students[0] > students[lowest] + 0.003
    assert students[-1] > students[lowest] + 0.1


@pytest.mark.parametrize("num_params", [143e6, SMALL, 266e6, 546e6])
def test_the_best_teacher_of_a_small_student_gets_weaker_with_more_tokens(num_params: float) -> None:
    best = [best_teacher_loss(num_params, tokens) for tokens in (1e9, 4e9, 16e9, 64e9, 256e9)]
    assert best == sorted(best)
    assert best[-1] > best[0] + 0.2


@pytest.mark.parametrize("num_params", IN_RANGE)
@pytest.mark.parametrize("teacher_loss", [1.9, 2.1])
def test_from_one_teacher_distillation_wins_at_few_tokens_and_loses_at_many(
    num_params: float, teacher_loss: float
) -> None:
    tokens = np.array([4e9, 1e14])
    gain = SupervisedLaw()(num_params, tokens) - DistillationLaw()(num_params, tokens, teacher_loss)
    assert gain[0] > 0
    assert gain[1] < 0


def test_the_form_never_predicts_a_student_below_its_teacher() -> None:
    rng = np.random.default_rng(0)
    sizes, tokens = np.exp(rng.uniform(np.log(143e6), np.log(7.75e9), 500)), 10 ** rng.uniform(9, 13, 500)
    teachers = rng.uniform(1.3, 3.0, 500)
    assert (DistillationLaw()(sizes, tokens, teachers) >= teachers).all()


# ---- coefficients and their labels ----


def test_published_numbers_are_labelled_as_quoted_and_others_are_not() -> None:
    for law in (CapacityGapLaw(), SupervisedLaw(), DistillationLaw()):
        assert "quoted without the paper at hand" in law.source
        assert "arXiv" in law.source
    assert SupervisedLaw(E=1.3).source == published.GIVEN
    assert DistillationLaw(c0=2.0).source == published.GIVEN
    assert CapacityGapLaw(3.0).source == published.GIVEN


def test_one_call_replaces_the_constants_and_their_range() -> None:
    law = SupervisedLaw(**published.CHINCHILLA_REFIT, source="Besiroglu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = law(70e9, 1.4e12)
    assert loss == pytest.approx(1.8172 + 482.01 / 70e9**0.3478 + 2085.43 / 1.4e12**0.3658, rel=1e-12)


@pytest.mark.parametrize("law", [SupervisedLaw, DistillationLaw])
@pytest.mark.parametrize("value", [0.0, -0.408, math.nan, math.inf, "0.4", None])
def test_a_coefficient_that_would_make_a_term_rise_is_refused(law: type, value: object) -> None:
    with pytest.raises(LawError, match="alpha must be a positive number.*without their minus sign"):
        law(alpha=value)


def test_tokens_for_inverts_the_supervised_law() -> None:
    law = SupervisedLaw()
    for tokens in (1e9, 3e11):
        assert law.tokens_for(1e9, law(1e9, tokens)) == pytest.approx(tokens, rel=1e-6)
    assert law.tokens_for(1e9, 1.9) == math.inf


def test_laws_survive_saving(tmp_path) -> None:
    laws = Laws(
        CapacityGapLaw(3.1, ranges={"num_params": (1e8, 1e9)}), DistillationLaw(c0=2.0, supervised=SupervisedLaw(E=1))
    )
    laws.save(tmp_path / "laws.json")
    assert Laws.load(tmp_path / "laws.json") == laws
    assert [path.name for path in tmp_path.iterdir()] == ["laws.json"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"capacity_gap": 3}', '{"capacity_gap": {}, "distillation": {}}']
)
def test_damaged_laws_are_refused(tmp_path, content: str) -> None:
    (tmp_path / "laws.json").write_text(content)
    with pytest.raises(LawError, match="damaged"):
        Laws.load(tmp_path / "laws.json")
    with pytest.raises(LawError, match="cannot be read"):
        Laws.load(tmp_path / "none.json")


# ---- ranges and units ----


def test_outside_the_measured_range_a_warning_names_it() -> None:
    for ask in (lambda: SupervisedLaw()(70e9, 1e12), lambda: DistillationLaw()([3e9, 70e9], 1e12, 2.0)):
        with pytest.warns(ExtrapolationWarning, match="143M to 7.75B.*70B"):
            ask()


def test_inside_the_measured_range_there_is_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SupervisedLaw()([143e6, 7.75e9], 1e11)
        DistillationLaw()([143e6, 7.75e9], 1e11, 2.0)


CALLS = {
    "supervised": lambda n, d: SupervisedLaw()(n, d),
    "distillation": lambda n, d: DistillationLaw()(n, d, 2.0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (-3e9, "must be positive.*-3"),
        (0, "must be positive"),
        (math.nan, "not finite"),
        (math.inf, "not finite"),
        (3, r"less than 1,000.*found: 3.*Did you mean 3e9 \(3B\)"),
        (7.75, r"Did you mean 7\.75e9"),
        ("3B", "not a number.*parse_size"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(call, value: object, message: str) -> None:
    with pytest.raises(LawError, match=f"num_params.*{message}"):
        call(value, 1e11)
    with pytest.raises(LawError, match=f"num_tokens.*{message}"):
        call(1e9, value)


def test_one_bad_size_among_many_is_found() -> None:
    with pytest.raises(LawError, match="num_params must be positive"):
        SupervisedLaw()([1e9, -1e9], 1e11)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-2.0, "positive"), (math.nan, "not finite"), (24.8, r"perplexity.*ln\(24\.8\) = 3\.211")],
)
def test_a_teacher_loss_that_cannot_be_is_refused(value: float, message: str) -> None:
    with pytest.raises(LawError, match=message):
        DistillationLaw()(1e9, 1e11, value)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("3B", 3e9),
        ("350m", 350e6),
        ("1.5T", 1.5e12),
        (" 20 K ", 2e4),
        ("3e9", 3e9),
        (3e9, 3e9),
        ("7750000000", 7.75e9),
    ],
)
def test_sizes_as_people_write_them(text: str | float, count: float) -> None:
    assert parse_size(text) == count


@pytest.mark.parametrize("text", ["3", "", "B", "3G", "-3B", "3 B 4", 3, -3e9, math.nan, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(LawError):
        parse_size(text)


@pytest.mark.parametrize(
    ("count", "text"), [(3.09e9, "3.09B"), (1e12, "1T"), (999_999, "1M"), (1234, "1.23K"), (5, "5")]
)
def test_sizes_are_written_with_three_digits(count: float, text: str) -> None:
    assert format_size(count) == text


def test_the_source_says_whose_supervised_law_it_builds_on() -> None:
    published, mine = DistillationLaw(), DistillationLaw(supervised=SupervisedLaw(E=1.0))
    assert "given by the caller" not in published.source
    assert mine.source.startswith(published.source)
    assert "supervised law given by the caller" in mine.source
    assert DistillationLaw(supervised=SupervisedLaw(E=1.0), source="mine").source == "mine"
