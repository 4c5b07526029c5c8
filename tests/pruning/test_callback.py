"""`ExpressiveScoreCallback` in a real `Trainer`: the same numbers as `score` on the same batches."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_capgap import DistillationConfig, DistillationTrainer, ExpressiveScoreCallback, ExpressiveScores, score
from hf_capgap.errors import ConfigError, UnsupportedModelError

SCRIPT = Path(__file__).parent.parent / "scripts" / "score_ranks.py"
spec = importlib.util.spec_from_file_location("score_ranks", SCRIPT)
score_ranks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(score_ranks)

Row = dict[str, Tensor]


def make_rows(num_rows: int, seed: int = 0, length: int = 24) -> list[Row]:
    """Random tokens; row i begins with its own number of -100, so that batches differ in their number of targets."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        input_ids = torch.randint(2, 96, (length,), generator=generator)
        rows.append({"input_ids": input_ids, "labels": input_ids.masked_fill(torch.arange(length) < 3 * index, -100)})
    return rows


def batches_of(rows: list[Row]) -> list[Row]:
    """The batches that the trainer makes of `rows`; the last one may be smaller."""
    size = score_ranks.BATCH_SIZE
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{name: torch.stack([row[name] for row in chunk]) for name in chunk[0]} for chunk in chunks]


def scores_of_training(model: PreTrainedModel, rows: list[Row], unit: str = "batch", **options: Any):
    callback = ExpressiveScoreCallback(unit=unit)
    score_ranks.make_trainer(model, rows, callback, **options).train()
    return callback.scores


def assert_same_scores(found: ExpressiveScores, expected: ExpressiveScores, tolerance: float = 3e-5) -> None:
    """Every score within `tolerance` of the largest score of its layer, from the same data."""
    assert (found.num_units, found.calibration_hash) == (expected.num_units, expected.calibration_hash)
    for name in ("heads", "neurons", "hidden"):
        a, b = getattr(found, name), getattr(expected, name)
        error = (a - b).abs().amax(-1) / b.abs().amax(-1)
        assert error.max() < tolerance, f"{name}: {error.max():.1e}"


class MultiplyingTrainer(Trainer):
    """Scales its loss, as users' own `compute_loss` may."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        return 7.0 * super().compute_loss(*args, **kwargs)


class MeanTrainer(Trainer):
    """Lets the model take the mean over each micro-batch: no `num_items_in_batch` reaches it."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return model(**inputs).loss


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation 2, the last one incomplete"),
        pytest.param({"gradient_accumulation_steps": 3}, id="accumulation 3, the last one incomplete"),
        pytest.param({"gradient_accumulation_steps": 5}, id="accumulation 5, complete"),
        pytest.param({"max_grad_norm": 1e-4}, id="clipping"),
        pytest.param({"activation_checkpointing": True}, id="activation checkpointing"),
        pytest.param(
            {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
            id="reentrant activation checkpointing",
        ),
        pytest.param({"trainer_class": MultiplyingTrainer, "gradient_accumulation_steps": 2}, id="multiplied loss"),
        pytest.param({"trainer_class": MeanTrainer, "gradient_accumulation_steps": 2}, id="mean loss"),
        pytest.param(
            {"eval_dataset": make_rows(3, seed=7), "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
            id="evaluation in between",
        ),
    ],
)
def test_training_gives_the_scores_of_its_batches(make_model, options):
    """Nine rows: four batches of two and one of a single row, each with another number of targets."""
    model, rows = make_model(), make_rows(7) + make_rows(2, seed=1)
    expected = score(model, batches_of(rows))
    assert_same_scores(scores_of_training(model, rows, **options), expected)


def test_weights_stay_in_these_tests(make_model):
    """Otherwise the comparisons above would be between different models."""
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores_of_training(model, make_rows(4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_example_scores_of_training(make_model):
    model, rows = make_model("qwen3"), make_rows(6)
    expected = score(model, batches_of(rows), unit="example")
    assert expected.num_units == 6
    assert_same_scores(scores_of_training(model, rows, unit="example", gradient_accumulation_steps=2), expected)


def test_every_epoch_counts(make_model):
    model, rows = make_model("mistral"), make_rows(4)
    assert_same_scores(scores_of_training(model, rows, num_train_epochs=2), score(model, 2 * batches_of(rows)))


def test_bfloat16_autocast_is_close(make_model):
    model, rows = make_model(), make_rows(6)
    scores = scores_of_training(model, rows, bf16=True, gradient_accumulation_steps=2)
    assert_same_scores(scores, score(model, batches_of(rows)), tolerance=0.05)
    assert scores.hidden.dtype == torch.float32


def test_two_ranks_give_the_scores_of_one_process(make_model, launch_ranks, tmp_path):
    """Ranks see different batches, and the Trainer multiplies the loss by their number."""
    model, rows = make_model("qwen2"), make_rows(8)
    model.save_pretrained(tmp_path / "teacher")
    torch.save(rows, tmp_path / "rows.pt")
    path = tmp_path / "scores.safetensors"
    launch_ranks(SCRIPT, tmp_path / "teacher", tmp_path / "rows.pt", path, num_ranks=2)
    expected = score(model, batches_of(rows))
    for suffix in ("", ".0", ".1"):
        assert_same_scores(ExpressiveScores.load(f"{path}{suffix}"), expected)


def test_scores_file_is_written_when_training_ends(make_model, tmp_path):
    path = tmp_path / "deep" / "scores.safetensors"
    callback = ExpressiveScoreCallback(path)
    score_ranks.make_trainer(make_model(), make_rows(4), callback).train()
    assert_same_scores(ExpressiveScores.load(path), callback.scores, tolerance=1e-12)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_hooks_are_gone_and_the_callback_starts_anew(make_model):
    model, callback = make_model(), ExpressiveScoreCallback()
    for rows in (make_rows(6), make_rows(4, seed=3)):
        score_ranks.make_trainer(model, rows, callback).train()
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert_same_scores(callback.scores, score(model, batches_of(make_rows(4, seed=3))))


def test_torch_compile_is_refused_before_training(make_model):
    """Hooks may silently be dropped from a compiled graph."""
    model, options = make_model(), {"torch_compile": True, "torch_compile_backend": "eager"}
    with patch.dict(os.environ):  # TrainingArguments leaves its choice of compiler there, for every later trainer
        trainer = score_ranks.make_trainer(model, make_rows(4), ExpressiveScoreCallback(), **options)
        with pytest.raises(ConfigError, match="torch_compile"):
            trainer.train()
    assert trainer.state.global_step == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_model_that_fails_the_audit_is_refused_before_training(make_model):
    model = make_model()
    model.model.norm.register_parameter("bias", torch.nn.Parameter(torch.zeros(64)))
    trainer = score_ranks.make_trainer(model, make_rows(4), ExpressiveScoreCallback())
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.bias"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_loss_that_the_model_does_not_compute_is_scored_with_a_warning(make_model):
    """Label smoothing takes the labels away from the model: other scores, but not silently."""
    callback = ExpressiveScoreCallback()
    trainer = score_ranks.make_trainer(make_model(), make_rows(4), callback, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match=r"not minimise the model's own loss.*score\(model, batches\)"):
        trainer.train()
    callback.scores.check_finite()


def test_distillation_run_is_scored_on_its_own_objective(make_model, tmp_path):
    """With alpha = 0 that objective is the batch's mean cross-entropy, whose scores are known."""
    model, rows, callback = make_model(), make_rows(4), ExpressiveScoreCallback()
    config = DistillationConfig(
        output_dir=str(tmp_path),
        alpha=0.0,
        use_cpu=True,
        learning_rate=0.0,
        per_device_train_batch_size=score_ranks.BATCH_SIZE,
        train_sampling_strategy="sequential",
        max_steps=2,
        report_to=[],
    )
    trainer = DistillationTrainer(model, args=config, train_dataset=rows, callbacks=[callback])
    with pytest.warns(UserWarning, match="not minimise the model's own loss"):
        trainer.train()
    expected = score(model, batches_of(rows))
    for name in ("heads", "neurons", "hidden"):
        torch.testing.assert_close(getattr(callback.scores, name), getattr(expected, name), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("choice", [{"unit": "token"}, {"metric": "magnitude"}])
def test_unknown_choice_is_refused_at_construction(choice):
    with pytest.raises(ConfigError, match="Choose one of"):
        ExpressiveScoreCallback(**choice)
