"""The fused objective on a GPU: 16-bit products into float32."""

from __future__ import annotations

import pytest
import torch

from hf_capgap.distillation import distillation_loss, fused_distillation_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def make_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 64), (1000, 64), (300, 96), (1000, 96)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to("cuda", dtype) for shape in shapes]
    labels = torch.randint(1000, (300,), generator=generator)
    labels[::7] = -100
    return (*(t.requires_grad_(i < 2) for i, t in enumerate(tensors)), labels.cuda())


def errors_against_float64(dtype: torch.dtype, autocast: torch.dtype | None = None) -> list[float]:
    inputs = make_inputs(dtype)
    exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]
    loss, _ = distillation_loss(exact[0] @ exact[1].T, exact[2] @ exact[3].T, exact[4])
    expected = torch.autograd.grad(loss, exact[:2])
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        fused, _ = fused_distillation_loss(*inputs, chunk_tokens=77)
    found = torch.autograd.grad(fused, inputs[:2])
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_are_those_of_float64(dtype, tolerance):
    assert max(errors_against_float64(dtype)) < tolerance


def test_autocast_multiplies_float32_inputs_in_16_bits():
    assert 1e-5 < max(errors_against_float64(torch.float32, autocast=torch.bfloat16)) < 2e-2
