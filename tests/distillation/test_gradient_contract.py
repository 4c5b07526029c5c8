"""The same global batch gives the same loss and gradients, however it is split over micro-batches and ranks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

SCRIPT = Path(__file__).parent.parent / "scripts" / "gradient_contract.py"
TOLERANCE = 1e-5

spec = importlib.util.spec_from_file_location("gradient_contract", SCRIPT)
contract = importlib.util.module_from_spec(spec)
spec.loader.exec_module(contract)


def assert_same(loss: float, gradients: dict[str, torch.Tensor], reference: tuple) -> None:
    reference_loss, reference_gradients, _ = reference
    assert loss == pytest.approx(reference_loss, rel=TOLERANCE)
    assert gradients.keys() == reference_gradients.keys()
    for name, gradient in gradients.items():
        expected = reference_gradients[name]
        assert expected.norm() > 0, f"{name} is not trained at all"
        assert (gradient - expected).norm() <= TOLERANCE * expected.norm(), name


@pytest.fixture(scope="module")
def one_batch() -> tuple:
    return contract.run_step(8, 1)


@pytest.fixture(scope="module")
def by_definition() -> tuple[float, dict[str, torch.Tensor]]:
    """The objective written down from its definition, in float64, with plain autograd."""
    student, teacher = contract.build_model(32, seed=1).double(), contract.build_model(48, seed=2).double()
    rows = contract.build_rows().with_format("torch")
    labels = rows["labels"][:][:, 1:]
    log_student = student(rows["input_ids"][:]).logits[:, :-1].log_softmax(-1)
    log_teacher = teacher(rows["input_ids"][:]).logits[:, :-1].log_softmax(-1).detach()
    valid = labels != -100
    cross_entropy = -log_student.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    loss = (0.5 * cross_entropy + 0.5 * divergence)[valid].sum() / valid.sum()
    loss.backward()
    return loss.item(), {name: parameter.grad.float() for name, parameter in student.named_parameters()}


def test_one_batch_is_the_objective_by_definition(one_batch, by_definition):
    loss, gradients, _ = one_batch
    assert_same(loss, gradients, (*by_definition, True))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_gives_the_gradient_of_the_whole_batch(one_batch, batch_size, accumulation):
    loss, gradients, _ = contract.run_step(batch_size, accumulation)
    assert_same(loss, gradients, one_batch)


@pytest.mark.parametrize(
    "options",
    [{"fused": False}, {"chunk_tokens": 7}, {"activation_checkpointing": True}],
    ids=["dense", "odd-chunks", "activation-checkpointing"],
)
def test_every_path_gives_the_same_gradient(one_batch, options):
    loss, gradients, _ = contract.run_step(2, 4, **options)
    assert_same(loss, gradients, one_batch)


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "options"),
    [
        (4, 1, []),
        (1, 4, []),
        (2, 2, ["fused=false"]),
        (2, 2, ['sharded=["student"]']),
        (4, 1, ['sharded=["student", "teacher"]']),
    ],
    ids=["DDP 4 rows", "DDP 4 x 1 row", "DDP dense 2 x 2 rows", "FSDP2 2 x 2 rows", "FSDP2 4 rows, teacher sharded"],
)
def test_two_ranks_give_the_gradient_of_the_whole_batch(
    one_batch, launch_ranks, tmp_path, batch_size, accumulation, options
):
    path = tmp_path / "gradients.safetensors"
    launch_ranks(SCRIPT, str(path), str(batch_size), str(accumulation), *options)
    with safe_open(path, framework="pt") as file:
        gradients = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert_same(float(file.metadata()["loss"]), gradients, one_batch)
