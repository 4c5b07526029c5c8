"""The fitting routine: gradients, recovery of known laws, published fits of real data, and what cannot be fitted."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SHARED_DATA
from laboratory import LAW, distilled_records, held_out_points, list_runs, supervised_records

from hf_capgap import DistillationLaw, RunRecord, SupervisedLaw
from hf_capgap.errors import FitError, RecordError
from hf_capgap.laws import write_records
from hf_capgap.laws.published import CHINCHILLA_REFIT

TRUTH = SupervisedLaw()
CHINCHILLA_OUTLIERS = 5  # the highest losses, which Besiroglu et al. leave out


@pytest.mark.parametrize("law", [SupervisedLaw(), SupervisedLaw(gamma=1.0), DistillationLaw()])
def test_the_jacobian_is_the_derivative(law) -> None:
    rng = np.random.default_rng(0)
    points = [10 ** rng.uniform(8, 10, 9), 10 ** rng.uniform(9, 12, 9)]
    if isinstance(law, DistillationLaw):
        points += [rng.uniform(1.5, 3.0, 9), law.supervised.loss(*points)]
    logs, step = np.log(list(law.values().values())), 1e-6
    predicted, jacobian = law.log_loss(logs, *points)
    for i in range(len(logs)):
        shift = step * np.eye(len(logs))[i]
        difference = law.log_loss(logs + shift, *points)[0] - law.log_loss(logs - shift, *points)[0]
        assert jacobian[:, i] == pytest.approx(difference / (2 * step), abs=1e-7)
    many = law.log_loss(np.stack([logs, logs + 0.1]), *points)
    assert many[0].shape == (2, 9)
    assert many[1].shape == (2, 9, len(logs))
    assert many[0][0] == pytest.approx(predicted, rel=1e-14)


def test_clean_data_give_the_coefficients_back() -> None:
    fit = SupervisedLaw.fit(supervised_records(TRUTH, 80, 0.0, 0), num_bootstrap=0)
    for name, value in TRUTH.values().items():
        assert getattr(fit.law, name) == pytest.approx(value, rel=0.02), name
    assert fit.median_error < 1e-5
    assert fit.law.source == "fitted to 80 runs on ideal"


def test_noisy_data_give_predictions_and_intervals_around_the_truth() -> None:
    """Of 6 · 6 intervals at 95 %, fewer than 30 around the truth would be broken ones (probability below 1e-3)."""
    num_covered = 0
    for seed in range(6):
        fit = SupervisedLaw.fit(supervised_records(TRUTH, 150, 0.005, seed), num_bootstrap=60, seed=seed)
        assert 0.002 < fit.median_error < 0.005  # the median of |normal| is 0.67 of its deviation
        assert 0.002 < fit.held_out_error < 0.007
        num_covered += sum(low <= TRUTH.values()[name] <= high for name, (low, high) in fit.intervals.items())
        predicted = fit.predict(2e9, 1e11)
        assert predicted.loss == pytest.approx(TRUTH.loss(2e9, 1e11), rel=0.002)
        assert predicted.low < predicted.loss < predicted.high < 1.02 * predicted.low
    assert num_covered >= 30


def test_one_run_that_went_wrong_moves_the_huber_fit_little() -> None:
    records = supervised_records(TRUTH, 80, 0.002, 2)
    spoiled = [replace(records[0], loss=3 * records[0].loss), *records[1:]]
    losses = [SupervisedLaw.fit(some, num_bootstrap=0).law.loss(1e9, 1e11) for some in (records, spoiled)]
    assert losses[1] == pytest.approx(losses[0], rel=0.002)


def test_fixed_coefficients_stay_and_unknown_ones_are_named() -> None:
    fit = SupervisedLaw.fit(
        supervised_records(SupervisedLaw(gamma=1.0), 60, 0.001, 3), fixed={"gamma": 1.0}, num_bootstrap=5
    )
    assert fit.law.gamma == pytest.approx(1.0, rel=1e-12)
    assert fit.intervals["gamma"] == pytest.approx((1.0, 1.0), rel=1e-12)
    with pytest.raises(FitError, match=r"no such coefficient.*delta"):
        SupervisedLaw.fit(fit.records, fixed={"delta": 1.0})


def test_the_same_seed_gives_the_same_fit() -> None:
    records = supervised_records(TRUTH, 60, 0.005, 4)
    first, again, other = (SupervisedLaw.fit(records, num_bootstrap=10, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first.draws, again.draws)
    assert not np.array_equal(first.draws, other.draws)
    assert other.law == first.law


def test_checkpoints_of_one_run_are_held_out_together() -> None:
    """Ten equal points per run: a fold that splits them would know every held-out loss already."""
    records = []
    for i, record in enumerate(supervised_records(TRUTH, 14, 0.05, 5)):
        records += [replace(record, run=f"run {i}")] * 10
    together = SupervisedLaw.fit(records, num_bootstrap=0)
    apart = SupervisedLaw.fit([replace(record, run=None) for record in records], num_bootstrap=0)
    assert together.held_out_error > 1.5 * apart.held_out_error


# ---- the distillation law ----


def distillation_trial(seed: int, num_bootstrap: int) -> tuple[float, np.ndarray, dict[str, bool]]:
    """(largest relative error on held-out points, which of their intervals cover the truth, the coefficients' too)"""
    fit = DistillationLaw.fit(
        distilled_records(list_runs(), 0.005, seed), supervised=LAW.supervised, num_bootstrap=num_bootstrap, seed=seed
    )
    points = held_out_points(10)
    truth, predicted = LAW.loss(*points), fit.predict(*points)
    covers = {name: low <= getattr(LAW, name) <= high for name, (low, high) in fit.intervals.items()}
    error = np.abs(predicted.loss / truth - 1).max()
    return float(error), (predicted.low <= truth) & (truth <= predicted.high), covers


def test_the_distillation_law_is_recovered_from_its_protocols() -> None:
    trials = [distillation_trial(seed, 40) for seed in range(2)]
    assert max(error for error, _, _ in trials) < 0.005
    assert np.mean([covered for _, covered, _ in trials]) > 0.8


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_intervals_of_the_distillation_law_cover_the_truth_in_85_of_100_trials() -> None:
    trials = [distillation_trial(seed, 100) for seed in range(100)]
    assert max(error for error, _, _ in trials) < 0.005
    coverage = np.mean([covered for _, covered, _ in trials], axis=0)  # of each held-out point
    assert coverage.min() >= 0.85
    for name in LAW.coefficients:
        assert np.mean([covers[name] for _, _, covers in trials]) >= 0.85, name


def test_what_the_runs_leave_open_is_said() -> None:
    """In the published law tokens hardly matter beside size: no protocol of realistic runs tells B and beta."""
    fit = DistillationLaw.fit(distilled_records(list_runs(), 0.005, 0), supervised=LAW.supervised, num_bootstrap=30)
    assert {"B", "beta"} <= set(fit.undetermined)
    assert "left open by these records" in fit.report()


def test_without_a_supervised_law_it_is_fitted_to_the_runs_without_a_teacher() -> None:
    runs = distilled_records(list_runs()[::4], 0.0, 0)
    fit = DistillationLaw.fit(runs + supervised_records(TRUTH, 60, 0.0, 0), num_bootstrap=0)
    assert fit.law.supervised.loss(1e9, 1e11) == pytest.approx(TRUTH.loss(1e9, 1e11), rel=1e-4)
    assert len(fit.records) == len(runs)
    with pytest.raises(FitError, match="Too few records to fit the supervised law"):
        DistillationLaw.fit(runs)


# ---- real data ----


def read_scaling_data(name: str) -> Path:
    path = SHARED_DATA / "scaling" / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return path


@pytest.mark.timeout(120)
def test_the_chinchilla_points_give_the_published_refit() -> None:
    """Besiroglu et al. 2024 (arXiv 2404.10102): their coefficients lie in the fit's own bootstrap intervals."""
    with read_scaling_data("chinchilla_epoch_svg_extracted.csv").open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["loss"]))
    assert len(rows) == 245
    records = []
    for row in rows[:-CHINCHILLA_OUTLIERS]:
        size, flops = float(row["Model Size"]), float(row["Training FLOP"])
        records.append(
            RunRecord(num_params=size, num_tokens=flops / (6 * size), loss=float(row["loss"]), dataset="MassiveText")
        )
    fit = SupervisedLaw.fit(records, fixed={"gamma": CHINCHILLA_REFIT["gamma"]})
    assert pytest.approx(CHINCHILLA_REFIT["E"], abs=0.005) == fit.law.E
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = fit.intervals[name]
        assert low <= CHINCHILLA_REFIT[name] <= high, name
    assert fit.intervals["alpha"][1] - fit.intervals["alpha"][0] < 0.1  # an interval that says something
    assert fit.held_out_error < 0.005


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["hot", "cool_end"])
def test_the_gemstones_points_fit_with_the_error_reported(name: str) -> None:
    lines = read_scaling_data(f"gemstones_{name}.jsonl").read_text().strip().split("\n")
    rows = [json.loads(line) for line in lines]
    records = [
        RunRecord(
            num_params=row["params_active_precise"],
            num_tokens=row["tokens"],
            loss=row["final_loss"],
            dataset="Dolma",
            run=row["run_name"],
        )
        for row in rows
    ]
    fit = SupervisedLaw.fit(records, fixed={"gamma": 1.0}, num_bootstrap=20)
    assert fit.held_out_error < 0.01
    assert fit.median_error <= fit.held_out_error
    assert f"{fit.held_out_error:.3%}" in fit.report()


# ---- what cannot be fitted ----


def test_too_few_records_are_refused_with_the_number_needed() -> None:
    with pytest.raises(FitError, match=r"Too few records.*12 are needed.*found: 11"):
        SupervisedLaw.fit(supervised_records(TRUTH, 11, 0.0, 0))
    with pytest.raises(FitError, match="Too few records.*18 are needed"):
        DistillationLaw.fit(distilled_records(list_runs()[:17], 0.0, 0), supervised=TRUTH)
    with pytest.raises(FitError, match="found: 0"):
        SupervisedLaw.fit([])


def test_records_of_different_datasets_are_never_pooled() -> None:
    records = supervised_records(TRUTH, 20, 0.0, 0)
    mixed = [replace(record, dataset="C4" if i % 2 else "Dolma") for i, record in enumerate(records)]
    for fit in (SupervisedLaw.fit, lambda some: DistillationLaw.fit(some)):
        with pytest.raises(FitError, match=r"different datasets cannot be pooled.*C4, Dolma"):
            fit(mixed)


@pytest.mark.parametrize(
    ("value", "message"), [(math.nan, "not finite.*diverged"), (math.inf, "not finite"), (None, "not known")]
)
def test_runs_without_a_usable_loss_are_counted_and_refused(value: float | None, message: str) -> None:
    records = supervised_records(TRUTH, 20, 0.0, 0)
    with pytest.raises(FitError, match=f"The loss of 2 of 20 records is {message}"):
        SupervisedLaw.fit([replace(record, loss=value) for record in records[:2]] + records[2:])
    distilled = distilled_records(list_runs()[:20], 0.0, 0)
    with pytest.raises(FitError, match="The teacher_loss of 1 of 20"):
        DistillationLaw.fit([replace(distilled[0], teacher_loss=value), *distilled[1:]], supervised=TRUTH)


def test_a_single_size_or_token_count_is_refused() -> None:
    records = supervised_records(TRUTH, 20, 0.0, 0)
    with pytest.raises(FitError, match="vary num_params too little.*found: 1 distinct"):
        SupervisedLaw.fit([replace(record, num_params=1e9) for record in records])
    with pytest.raises(FitError, match="vary num_tokens too little.*found: 2 distinct"):
        SupervisedLaw.fit([replace(record, num_tokens=1e9 + i % 2) for i, record in enumerate(records)])


def test_tokens_without_their_unit_are_questioned() -> None:
    records = supervised_records(TRUTH, 20, 0.0, 0)
    with pytest.raises(FitError, match="num_tokens is less than 1,000.*Did you mean 100e9"):
        SupervisedLaw.fit([replace(records[0], num_tokens=100), *records[1:]])


def test_records_are_also_read_from_their_files(tmp_path: Path) -> None:
    records = supervised_records(TRUTH, 20, 0.01, 0)
    write_records(tmp_path / "runs.jsonl", records)
    fits = [SupervisedLaw.fit(some, num_bootstrap=0) for some in (records, tmp_path, str(tmp_path / "runs.jsonl"))]
    assert fits[0].law == fits[1].law == fits[2].law
    with pytest.raises(RecordError, match="Not a RunRecord"):
        SupervisedLaw.fit([record.to_dict() for record in records])


def test_residual_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    fit = SupervisedLaw.fit(supervised_records(TRUTH, 20, 0.01, 0), num_bootstrap=0)
    assert fit.plot(tmp_path / "plots" / "residuals.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["residuals.png"]
    with pytest.raises(ValueError, match="Not an image file"):
        fit.plot(tmp_path / "residuals.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fixed": {"gamma": -1.0}}, "gamma must be a positive number"),
        ({"fixed": {"gamma": "1"}}, "gamma must be a positive number"),
        ({"fixed": {"gamma": math.nan}}, "gamma must be a positive number"),
        ({"fixed": SupervisedLaw().values()}, "nothing is left to fit"),
        ({"huber_delta": 0.0}, "huber_delta must be a positive number"),
        ({"num_bootstrap": -1}, "num_bootstrap must be a whole number"),
        ({"num_bootstrap": 1.5}, "num_bootstrap must be a whole number"),
    ],
)
def test_options_of_a_fit_that_cannot_be(options: dict, message: str) -> None:
    records = supervised_records(SupervisedLaw(), 40, 0.005, seed=0)
    with pytest.raises(FitError, match=message):
        SupervisedLaw.fit(records, **options)
