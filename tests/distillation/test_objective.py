"""The dense objective against its definition, and the fused one against the dense one, for every option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_capgap.distillation import OutputHead, distillation_loss, fused_distillation_loss
from hf_capgap.distillation.fused import blockwise_argmax, default_chunk_tokens, row_dot
from hf_capgap.distillation.objective import STATISTICS
from hf_capgap.errors import CapGapError, ConfigError

Problem = dict[str, Any]


def make_problem(
    *,
    num_tokens: int = 23,
    student_vocab: int = 97,
    teacher_vocab: int = 97,
    ignored: float = 0.3,
    student_bias: bool = False,
    softcap: float | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Problem:
    """Hidden states, heads and labels; labels stay below the smaller vocabulary."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(min(student_vocab, teacher_vocab), (num_tokens,), generator=generator)
    labels[torch.rand(num_tokens, generator=generator) < ignored] = -100
    weight = random(student_vocab, 8).requires_grad_()
    bias = random(student_vocab).requires_grad_() if student_bias else None
    return {
        "student_hidden": random(num_tokens, 8).requires_grad_(),
        "student_head": OutputHead(weight, bias, scale, softcap),
        "teacher_hidden": random(num_tokens, 12),
        "teacher_head": OutputHead(random(teacher_vocab, 12), random(teacher_vocab), scale, softcap),
        "labels": labels,
    }


def leaves(problem: Problem) -> list[torch.Tensor]:
    head = problem["student_head"]
    return [tensor for tensor in (problem["student_hidden"], head.weight, head.bias) if tensor is not None]


def dense(problem: Problem, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The reference: all logits at once."""
    options.pop("chunk_tokens", None)
    teacher_hidden = problem["teacher_hidden"]
    return distillation_loss(
        problem["student_head"].logits(problem["student_hidden"]),
        None if teacher_hidden is None else problem["teacher_head"].logits(teacher_hidden),
        problem["labels"],
        **options,
    )


def assert_fused_is_dense(problem: Problem, tolerance: float = 1e-10, **options: Any) -> None:
    fused_loss, fused_metrics = fused_distillation_loss(**problem, **options)
    dense_loss, dense_metrics = dense(problem, **options)
    torch.testing.assert_close(fused_loss, dense_loss, rtol=tolerance, atol=tolerance)
    assert fused_metrics.keys() == dense_metrics.keys()
    for name, value in dense_metrics.items():
        torch.testing.assert_close(fused_metrics[name], value, rtol=tolerance, atol=10 * tolerance)
    inputs = leaves(problem)
    for fused, expected in zip(
        torch.autograd.grad(fused_loss, inputs), torch.autograd.grad(dense_loss, inputs), strict=True
    ):
        torch.testing.assert_close(fused, expected, rtol=tolerance, atol=tolerance)


def test_dense_is_the_definition():
    problem = make_problem(ignored=0.0)
    alpha, tau, num_tokens = 0.3, 2.0, 23
    loss, metrics = dense(problem, alpha=alpha, temperature=tau)
    student = problem["student_head"].logits(problem["student_hidden"]).detach()
    teacher = problem["teacher_head"].logits(problem["teacher_hidden"])
    total = dict.fromkeys(STATISTICS, 0.0)
    for s, t, y in zip(student.tolist(), teacher.tolist(), problem["labels"].tolist(), strict=True):
        total["ce"] += -s[y] + math.log(sum(math.exp(x) for x in s))
        p, q = ([math.exp(x / tau) for x in logits] for logits in (t, s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total["kl"] += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        total["teacher_entropy"] += -sum(a * math.log(a) for a in p)
        total["agreement"] += s.index(max(s)) == t.index(max(t))
    assert loss.item() == pytest.approx(((1 - alpha) * total["ce"] + alpha * tau**2 * total["kl"]) / num_tokens)
    assert {name: metrics[name].item() for name in STATISTICS} == pytest.approx(total)
    assert metrics["num_tokens"] == num_tokens


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    student_vocab=st.integers(2, 200),
    teacher_vocab=st.integers(2, 200),
    ignored=st.floats(0, 1),
    alpha=st.sampled_from([0.0, 0.25, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    chunk_tokens=st.integers(1, 50),
    student_bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    scale=st.sampled_from([1.0, 0.5]),
    num_items=st.sampled_from([None, 1, 57]),
    padding=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_fused_is_dense_for_every_option(
    num_tokens, student_vocab, teacher_vocab, ignored, alpha, temperature, chunk_tokens, student_bias, softcap, scale,
    num_items, padding, seed,
):  # fmt: skip
    problem = make_problem(
        num_tokens=num_tokens,
        student_vocab=student_vocab + padding,
        teacher_vocab=teacher_vocab,
        ignored=ignored,
        student_bias=student_bias,
        softcap=softcap,
        scale=scale,
        seed=seed,
    )
    vocab_size = min(student_vocab, teacher_vocab)
    problem["labels"] = torch.where(problem["labels"] < vocab_size, problem["labels"], -100)
    assert_fused_is_dense(
        problem,
        alpha=alpha,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
        num_items=num_items,
        vocab_size=vocab_size,
    )


def test_fused_is_dense_in_float32():
    assert_fused_is_dense(make_problem(dtype=torch.float32), tolerance=2e-5, chunk_tokens=5)


def test_fused_bf16_is_no_further_from_float64_than_dense_bf16():
    problem = make_problem(dtype=torch.bfloat16, num_tokens=64, student_vocab=500, teacher_vocab=500)
    exact = {name: _to_float64(value) for name, value in problem.items()}
    expected = torch.autograd.grad(dense(exact)[0], leaves(exact))
    for fused, rounded, reference in zip(
        torch.autograd.grad(fused_distillation_loss(**problem)[0], leaves(problem)),
        torch.autograd.grad(dense(problem)[0], leaves(problem)),
        expected,
        strict=True,
    ):
        fused_error, dense_error = ((g.double() - reference).norm() / reference.norm() for g in (fused, rounded))
        assert fused_error <= dense_error
        assert fused_error < 0.01


def _to_float64(value: Any) -> Any:
    if isinstance(value, OutputHead):
        tensors = (
            None if t is None else t.detach().double().requires_grad_(t.requires_grad)
            for t in (value.weight, value.bias)
        )
        return OutputHead(*tensors, value.scale, value.softcap)
    if not value.is_floating_point():
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def test_plain_weights_are_accepted_for_heads():
    problem = make_problem()
    weights = {
        name: OutputHead(problem[name].weight.detach().requires_grad_()) for name in ("student_head", "teacher_head")
    }
    by_head, _ = fused_distillation_loss(**{**problem, **weights})
    by_weight, _ = fused_distillation_loss(**{**problem, **{name: head.weight for name, head in weights.items()}})
    assert by_head.item() == by_weight.item()


@pytest.mark.parametrize("loss", [dense, lambda problem, **options: fused_distillation_loss(**problem, **options)])
def test_teacher_against_itself_is_zero_with_zero_gradient(loss):
    problem = make_problem(ignored=0.0, dtype=torch.float32)
    problem["teacher_hidden"] = problem["student_hidden"].detach()
    problem["teacher_head"] = problem["student_head"]
    value, metrics = loss(problem, alpha=1.0)
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert metrics["kl"].item() == pytest.approx(0.0, abs=1e-5)
    assert metrics["agreement"] == metrics["num_tokens"]
    for gradient in torch.autograd.grad(value, leaves(problem)):
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("loss", [dense, lambda problem, **options: fused_distillation_loss(**problem, **options)])
def test_all_labels_ignored_is_a_finite_zero_with_gradients(loss):
    problem = make_problem(ignored=1.1)
    value, metrics = loss(problem)
    assert value.item() == 0.0
    assert metrics["num_tokens"] == 0
    for gradient in torch.autograd.grad(value, leaves(problem)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_tied_head_collects_both_gradients():
    """With tied embeddings the weight is used twice in one graph; the fused gradient must add to the other one."""
    problem = make_problem()
    weight, ids = problem["student_head"].weight, torch.arange(23)

    def gradient(loss):
        embedded = torch.nn.functional.embedding(ids, weight).tanh()
        tied = {**problem, "student_hidden": embedded, "student_head": OutputHead(weight)}
        return torch.autograd.grad(loss(tied), weight)[0]

    fused = gradient(lambda p: fused_distillation_loss(**p)[0])
    torch.testing.assert_close(fused, gradient(lambda p: dense(p)[0]))


def test_rows_beyond_the_real_vocabulary_get_no_gradient_and_no_mass():
    problem = make_problem(student_vocab=97, teacher_vocab=110)
    problem["labels"] = problem["labels"].clamp(max=89)
    loss, _ = fused_distillation_loss(**problem, vocab_size=90)
    _, weight_gradient = torch.autograd.grad(loss, leaves(problem))
    assert weight_gradient[:90].abs().sum() > 0
    assert torch.equal(weight_gradient[90:], torch.zeros(7, 8, dtype=torch.float64))
    with torch.no_grad():
        problem["student_head"].weight[90:] += 100.0
        problem["teacher_head"].weight[90:] -= 100.0
    assert fused_distillation_loss(**problem, vocab_size=90)[0].item() == loss.item()


def test_gradient_scale_survives_temperature():
    """τ² keeps the scale of the divergence's gradient (arXiv 1503.02531); without it τ = 4 would shrink it 16-fold."""
    problem = make_problem(ignored=0.0)
    with torch.no_grad():
        problem["student_hidden"].mul_(0.1)
        problem["teacher_hidden"].mul_(0.1)
    norms = [
        torch.autograd.grad(fused_distillation_loss(**problem, alpha=1.0, temperature=tau)[0], leaves(problem))[
            0
        ].norm()
        for tau in (1.0, 4.0)
    ]
    assert 0.5 < norms[1] / norms[0] < 2.0


def test_frozen_head_costs_no_weight_gradient():
    problem = make_problem()
    head = OutputHead(problem["student_head"].weight.detach())
    loss, _ = fused_distillation_loss(**{**problem, "student_head": head})
    loss.backward()
    assert problem["student_hidden"].grad is not None
    assert head.weight.grad is None


def test_no_gradients_are_formed_without_grad_mode():
    with torch.no_grad():
        loss, _ = fused_distillation_loss(**make_problem())
    assert not loss.requires_grad


def test_second_backward_is_refused_not_wrong():
    loss, _ = fused_distillation_loss(**make_problem())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    "options",
    [{"alpha": -0.1}, {"alpha": 1.5}, {"temperature": 0.0}, {"temperature": math.inf}, {"divergence": "wasserstein"}],
)
def test_options_without_meaning_are_refused(options):
    with pytest.raises(ConfigError):
        fused_distillation_loss(**make_problem(), **options)


@given(num_rows=st.integers(1, 6), vocab=st.integers(1, 400), seed=st.integers(0, 100))
@settings(max_examples=60, deadline=None)
def test_blockwise_argmax_is_argmax(num_rows, vocab, seed):
    values = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(blockwise_argmax(values), values.argmax(-1, keepdim=True))


@pytest.mark.parametrize("num_rows", [1, 2, 7, 8])
def test_row_dot_is_the_dot_product_of_rows(num_rows):
    a, b = torch.randn(2, num_rows, 33, dtype=torch.float64)
    torch.testing.assert_close(row_dot(a, b), (a * b).sum(-1))


def test_chunks_shrink_with_the_vocabulary_but_stay_useful():
    small, large = (default_chunk_tokens(vocab, torch.device("cpu")) for vocab in (32_000, 256_000))
    assert small > large >= 64


@pytest.mark.parametrize(
    "change",
    [
        {"teacher_hidden": None, "teacher_head": None},
        {"teacher_head": None},
        {"labels": torch.zeros(5, dtype=torch.long)},
        {"teacher_hidden": torch.randn(24, 12, dtype=torch.float64)},
        {"vocab_size": 98},
        {"vocab_size": 0},
        {"chunk_tokens": -1},
    ],
    ids=[
        "alpha without teacher",
        "no head",
        "few labels",
        "long teacher",
        "large vocabulary",
        "no vocabulary",
        "chunk",
    ],
)
def test_inputs_that_do_not_fit_are_refused(change):
    with pytest.raises(CapGapError):
        fused_distillation_loss(**{**make_problem(), **change})


@pytest.mark.parametrize("num_items", [7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0)])
def test_num_items_of_any_kind_gives_a_scalar(num_items):
    loss, _ = fused_distillation_loss(**make_problem(), num_items=num_items)
    assert loss.shape == ()
    assert loss.item() == fused_distillation_loss(**make_problem(), num_items=7)[0].item()


def test_float16_gradients_survive_until_the_loss_scale_comes():
    scale, num_items = 65536.0, 200_000
    problem = make_problem(dtype=torch.float16)
    loss, _ = fused_distillation_loss(**problem, num_items=num_items)
    exact = {name: _to_float64(value) for name, value in problem.items()}
    expected = torch.autograd.grad(scale * dense(exact, num_items=num_items)[0], leaves(exact))
    for found, reference in zip(torch.autograd.grad(scale * loss, leaves(problem)), expected, strict=True):
        assert (found.double() - reference).norm() < 0.01 * reference.norm()
