"""Next-token cross-entropy of a model, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .compat import input_device
from .errors import DataError
from .labels import IGNORE_INDEX
from .output_head import OutputHead, head_matches

# Of one chunk of logits in float32, of which a few copies exist at a time: a small part of what the weights take,
# within bounds that keep products efficient.
_SHARE_OF_WEIGHTS = 1 / 64
_LOGIT_BYTES = (4 * 2**20, 128 * 2**20)


def default_labels(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The inputs of a batch without labels, but for what its attention mask hides, [batch, length]."""
    mask = batch.get("attention_mask")
    return batch["input_ids"] if mask is None else batch["input_ids"].masked_fill(mask == 0, IGNORE_INDEX)


class NextTokenLoss:
    """Sums of cross-entropy in token chunks, with a gradient where the model's activations have one.

    Args:
        model: A causal language model. A head that does more than `OutputHead` knows gives all logits at once.
    """

    def __init__(self, model: torch.nn.Module):
        self._model = model
        self._in_chunks = head_matches(model)
        weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        lowest, highest = _LOGIT_BYTES
        logit_bytes = min(max(lowest, int(_SHARE_OF_WEIGHTS * weight_bytes)), highest)
        self._chunk_tokens = max(1, logit_bytes // (4 * model.config.vocab_size))

    def __call__(self, batch: Mapping[str, torch.Tensor], labels: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
        """Sum over the valid targets of `labels` [batch, length] (unshifted), times `weight`; a scalar, in nats."""
        targets = labels[:, 1:].flatten()
        if not self._in_chunks:
            logits = self._model(**batch, use_cache=False).logits[:, :-1]
            return weight * _sum_cross_entropy(logits.flatten(0, 1), targets)
        hidden = self._model.base_model(**batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        valid = targets.to(hidden.device) != IGNORE_INDEX
        hidden, targets = hidden[valid], targets.to(hidden.device)[valid]  # [valid, H], [valid]
        losses = [
            checkpoint(self._chunk, states, wanted, use_reentrant=False)
            for states, wanted in zip(hidden.split(self._chunk_tokens), targets.split(self._chunk_tokens), strict=True)
        ]
        return weight * torch.stack(losses).sum()

    def _chunk(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        head = OutputHead.of(self._model)
        logits = head.shaped(self._model.get_output_embeddings()(hidden))
        return _sum_cross_entropy(logits, targets)


def _sum_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets.to(logits.device), ignore_index=IGNORE_INDEX, reduction="sum")


@torch.no_grad()
def mean_cross_entropy(model: torch.nn.Module, batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """Cross-entropy of `model` on `batches` in nats, averaged over all their targets. The model is left as it was.

    Args:
        model: A causal language model.
        batches: Dicts with `input_ids` [batch, length], and optionally `labels` (unshifted, -100 ignored; the inputs
            if absent), `attention_mask` and `position_ids`.

    Raises:
        DataError: No target at all.
    """
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    total, num_targets = 0.0, 0
    device = input_device(model)
    try:
        loss_of = NextTokenLoss(model)
        for given in batches:
            batch = {name: value.to(device) for name, value in given.items()}
            labels = batch.pop("labels", None)
            labels = default_labels(batch) if labels is None else labels
            total += float(loss_of(batch, labels))
            num_targets += int((labels[:, 1:] != IGNORE_INDEX).sum())
    finally:
        for module, was_training in training:
            module.training = was_training
    if num_targets == 0:
        raise DataError("No batch has a target to evaluate on", fix="Give data whose labels are not all -100.")
    return total / num_targets
