"""Held-out cross-entropy against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from students import ALL_FAMILIES

from hf_capgap import cross_entropy
from hf_capgap.cross_entropy import NextTokenLoss, mean_cross_entropy
from hf_capgap.errors import DataError


def make_batches(vocab_size: int) -> list[dict[str, torch.Tensor]]:
    """Padded, with ignored labels, and of different sizes."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, vocab_size, shape, generator=generator) for shape in ((2, 9), (3, 12), (1, 6))]
    mask = torch.ones_like(ids[1])
    mask[0, 7:] = 0
    labels = ids[2].clone()
    labels[0, :3] = -100
    return [
        {"input_ids": ids[0]},
        {"input_ids": ids[1], "attention_mask": mask},
        {"input_ids": ids[2], "labels": labels},
    ]


@torch.no_grad()
def by_definition(model, batches) -> float:
    """Mean of -log p(target) over all targets, from the model's own logits."""
    total, count = 0.0, 0
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        labels = batch.get("labels", batch["input_ids"].masked_fill(mask == 0, -100))
        logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits.double()
        for row in range(len(labels)):
            for position in range(labels.shape[1] - 1):
                target = int(labels[row, position + 1])
                if target != -100:
                    total -= float(logits[row, position].log_softmax(-1)[target])
                    count += 1
    return total / count


@pytest.mark.parametrize("model_type", ALL_FAMILIES)
def test_it_is_the_mean_over_all_targets(make_model, model_type: str) -> None:
    model = make_model(model_type).train()
    batches = make_batches(model.config.vocab_size)
    expected = by_definition(model.eval(), batches)
    model.train()
    assert mean_cross_entropy(model, batches) == pytest.approx(expected, rel=1e-5)
    assert model.training  # left as it was
    assert all(parameter.grad is None for parameter in model.parameters())


def test_chunks_do_not_change_it(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    batches = make_batches(model.config.vocab_size)
    whole = mean_cross_entropy(model, batches)
    monkeypatch.setattr(cross_entropy, "_LOGIT_BYTES", [3 * 4 * model.config.vocab_size] * 2)  # three tokens at a time
    assert NextTokenLoss(model)._chunk_tokens == 3
    assert mean_cross_entropy(model, batches) == pytest.approx(whole, rel=1e-6)


def test_a_head_that_is_not_known_gives_its_own_logits(make_model) -> None:
    model = make_model().eval()
    batches = make_batches(model.config.vocab_size)
    plain = mean_cross_entropy(model, batches)
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    found = mean_cross_entropy(model, batches)
    assert found == pytest.approx(by_definition(model, batches), rel=1e-5)
    assert abs(found - plain) > 0.01


def test_no_target_at_all_is_refused(make_model) -> None:
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(DataError, match="No batch has a target"):
        mean_cross_entropy(make_model(), [{"input_ids": ids, "labels": torch.full_like(ids, -100)}])
    with pytest.raises(DataError, match="No batch has a target"):
        mean_cross_entropy(make_model(), [])
