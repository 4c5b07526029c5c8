"""`ExpressiveScoreCallback` in a real `Trainer`: the same numbers as `score` on the same batches."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_scores import assert_same_scores as assert_same_tensors
from torch import Tensor
from transformers import PreTrainedModel, Trainer

from hf_capgap import DistillationConfig, DistillationTrainer, ExpressiveScoreCallback, ExpressiveScores, score
from hf_capgap.errors import ConfigError, ScoresError, UnsupportedModelError
from hf_capgap.families import audit
from hf_capgap.pruning import METRICS
from hf_capgap.pruning.accumulator import ScoreAccumulator
from hf_capgap.pruning.fingerprint import fingerprint_of_model
from hf_capgap.pruning.sites import GateRecorder

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


def scores_of_training(
    model: PreTrainedModel, rows: list[Row], unit: str = "batch", metric: str = "expressive", **options: Any
) -> ExpressiveScores:
    callback = ExpressiveScoreCallback(unit=unit, metric=metric)
    score_ranks.make_trainer(model, rows, callback, **options).train()
    return callback.scores


def assert_same_scores(found: ExpressiveScores, expected: ExpressiveScores, tolerance: float = 3e-5) -> None:
    """Every score within `tolerance` of the largest score of its layer, from the same data."""
    assert (found.num_units, found.calibration_hash) == (expected.num_units, expected.calibration_hash)
    assert found.metric == expected.metric
    assert_same_tensors(found, expected, tolerance)


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
    """To `score` in float32, and closer to the same products taken from the activations of a run under autocast."""
    model, rows = make_model(), make_rows(6)
    expected = score(model, batches_of(rows))
    products = []
    for batch in batches_of(rows):
        activations = []
        handles = [
            layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, into=activations: into.append(args[0]))
            for layer in model.model.layers
        ]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch).loss
        gradients = torch.autograd.grad(loss, activations)
        products.append(torch.stack([(a.double() * g.double()).sum((0, 1)) for a, g in zip(activations, gradients)]))
        for handle in handles:
            handle.remove()
    assert activations[0].dtype == torch.bfloat16
    exact = torch.stack(products).abs().mean(0).detach()

    scores = scores_of_training(model, rows, bf16=True, gradient_accumulation_steps=2)
    assert_same_scores(scores, expected, tolerance=0.15)
    error = (scores.neurons - exact).abs().amax(-1) / exact.amax(-1)
    assert error.max() < 0.02
    assert (scores.neurons - expected.neurons).abs().max() > 1e-3 * expected.neurons.max()  # autocast was on
    assert scores.hidden.dtype == torch.float32


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "mixtral"])
def test_every_metric_of_a_training_run(make_model, model_type, metric):
    model, rows = make_model(model_type, **({"dropout": 0.0} if model_type == "opt" else {})), make_rows(6)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = score(model, batches_of(rows), metric=metric, seed=7 if metric == "random" else None)
    scores = scores_of_training(model, rows, metric=metric, gradient_accumulation_steps=2, seed=7)
    assert_same_scores(scores, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("metric", ["taylor", "movement", "activation"])
def test_metrics_of_a_run_with_clipping_checkpointing_and_evaluation(make_model, metric, checkpointing):
    model, rows = make_model(), make_rows(7)
    options = {"eval_dataset": make_rows(3, seed=7), "eval_strategy": "steps", "eval_steps": 1, "max_grad_norm": 1e-4}
    expected = score(model, batches_of(rows), metric=metric)
    scores = scores_of_training(
        model, rows, metric=metric, gradient_accumulation_steps=3, activation_checkpointing=checkpointing, **options
    )
    assert_same_scores(scores, expected)


def test_example_scores_of_activations_in_training(make_model):
    model, rows = make_model(), make_rows(6)
    expected = score(model, batches_of(rows), unit="example", metric="activation")
    assert_same_scores(scores_of_training(model, rows, unit="example", metric="activation"), expected)


def test_movement_follows_the_weights_through_a_run(make_model):
    """Mean over the steps of -w·∂L/∂w at the weights of that step, computed again step by step."""
    rows = make_rows(8)
    model, again = make_model(), make_model()
    scores = scores_of_training(
        model, rows, metric="movement", learning_rate=0.02, lr_scheduler_type="constant", max_grad_norm=0.0
    )
    sums: dict[str, Tensor] = {}
    for batch in batches_of(rows):
        names, parameters = zip(*again.named_parameters())
        logits = again(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        with torch.no_grad():
            for name, parameter, gradient in zip(names, parameters, torch.autograd.grad(loss, parameters)):
                sums[name] = sums.get(name, 0.0) - (parameter * gradient).double() / 4
                parameter -= 0.02 * gradient
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, again.get_parameter(name), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.lm_head.weight, make_model().lm_head.weight)
    neurons = torch.stack(
        [
            sum(sums[f"model.layers.{layer}.mlp.{name}_proj.weight"].sum(1) for name in ("gate", "up"))
            + sums[f"model.layers.{layer}.mlp.down_proj.weight"].sum(0)
            for layer in range(4)
        ]
    )
    error = (scores.neurons - neurons).abs().amax(-1) / neurons.abs().amax(-1)
    assert error.max() < 1e-3
    at_fixed_weights = score(make_model(), batches_of(rows), metric="movement").neurons
    assert (at_fixed_weights - neurons).abs().max() > 0.05 * neurons.abs().max()


def test_metrics_of_the_weights_are_those_at_the_end_of_the_run(make_model):
    model, rows = make_model(), make_rows(4)
    before = score(model, metric="magnitude")
    scores = scores_of_training(model, rows, metric="magnitude", learning_rate=0.1)
    assert_same_scores(scores, score(model, metric="magnitude"), tolerance=1e-7)
    with pytest.raises(AssertionError):
        assert_same_scores(scores, before)


def test_examples_of_weight_gradients_are_refused():
    for metric in ("taylor", "movement"):
        with pytest.raises(ConfigError, match=rf"'{metric}' cannot be taken of single examples.*unit='batch'"):
            ExpressiveScoreCallback(unit="example", metric=metric)


def test_weight_gradients_of_a_partly_frozen_model_are_refused_before_training(make_model):
    model = make_model()
    model.model.layers[2].requires_grad_(False)
    trainer = score_ranks.make_trainer(model, make_rows(4), ExpressiveScoreCallback(metric="taylor"))
    with pytest.raises(ConfigError, match=r"asks for no gradient.*model\.layers\.2"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.parametrize("metric", ["expressive", "taylor"])
def test_dropout_that_no_hook_sees_is_told(make_model, metric):
    """OPT's, where hidden dimensions are gated behind it; the products of weights and gradients do not care."""
    trainer = score_ranks.make_trainer(
        make_model("opt", dropout=0.1), make_rows(4), ExpressiveScoreCallback(metric=metric)
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    told = [str(warning.message) for warning in caught if "dropout" in str(warning.message)]
    assert len(told) == (metric == "expressive")
    assert all("dropout=0" in text and "score(model, batches)" in text for text in told)


def test_overflowed_micro_batches_of_a_float16_run_are_left_out(make_model):
    """As their optimizer step is; elsewhere a non-finite value is an error."""
    model, batches = make_model(), batches_of(make_rows(6))
    whole = [recorded(model, batch) for batch in batches]
    infinite = {**whole[1][0], "neurons": whole[1][0]["neurons"].clone()}
    infinite["neurons"][0, 2, 5] = float("inf")
    lenient = ScoreAccumulator(model, unit="batch", metric="expressive", skip_overflow=True)
    for taken, batch in ((whole[0][0], batches[0]), (infinite, batches[1]), (whole[2][0], batches[2])):
        lenient.add(taken, torch.ones(1), batch)
    fingerprint = fingerprint_of_model(audit(model), model)
    assert_same_scores(lenient.result(fingerprint), score(model, [batches[0], batches[2]]))
    strict = ScoreAccumulator(model, unit="batch", metric="expressive")
    strict.add(whole[0][0], torch.ones(1), batches[0])
    with pytest.raises(ScoresError, match=r"Non-finite values of neurons in calibration batch 1"):
        strict.add(infinite, torch.ones(1), batches[1])
    assert_same_scores(strict.result(fingerprint), score(model, batches[:1]))  # nothing of it was added


def recorded(model: PreTrainedModel, batch: Row) -> tuple[dict[str, Tensor], Tensor]:
    """What a recorder takes of the batch's mean cross-entropy, and that."""
    with GateRecorder(model.eval(), audit(model), per_example=False) as recorder:
        loss = model(**batch).loss
        loss.backward()
        return recorder.take(), loss.detach()


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
    assert_same_tensors(callback.scores, expected, tolerance=1e-4)


@pytest.mark.parametrize("choice", [{"unit": "token"}, {"metric": "beauty"}])
def test_unknown_choice_is_refused_at_construction(choice):
    with pytest.raises(ConfigError, match="Choose one of"):
        ExpressiveScoreCallback(**choice)
