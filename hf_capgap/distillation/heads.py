"""Output heads as data: from the final hidden state to logits, with all that a model does after its `lm_head`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from .forwarding import run_inside

# Config fields of what models do to their logits: (multiply by it, divide by it).
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling",)
_SOFTCAP = "final_logit_softcapping"


@dataclass(frozen=True)
class OutputHead:
    """logits = softcap(scale · (hidden · weightᵀ + bias)), with softcap(x) = c · tanh(x / c).

    Attributes:
        weight: [V, H].
        bias: [V], or None.
        scale: Multiplies the logits.
        softcap: c, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> OutputHead:
        """The head that a causal language model's module and config describe; see `head_matches`."""
        module, config = model.get_output_embeddings(), model.config.get_text_config()
        scale = 1.0
        for name in _SCALES:
            scale *= getattr(config, name, None) or 1.0
        for name in _DIVISORS:
            scale /= getattr(config, name, None) or 1.0
        return cls(module.weight, getattr(module, "bias", None), scale, getattr(config, _SOFTCAP, None))

    def first(self, vocab_size: int) -> OutputHead:
        """The head of the first `vocab_size` tokens, as views."""
        return replace(
            self, weight=self.weight[:vocab_size], bias=None if self.bias is None else self.bias[:vocab_size]
        )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[.., H] -> [.., V], all at once."""
        logits = torch.nn.functional.linear(hidden, self.weight.to(hidden.dtype))
        if self.bias is not None:
            logits = logits + self.bias.to(hidden.dtype)
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_matches(model: PreTrainedModel) -> bool:
    """Whether `OutputHead.of(model)` on the final hidden state gives the model's own logits, tried on two tokens."""
    head = model.get_output_embeddings()
    # An adapter on the head is no nn.Linear, a quantised one has packed weights: neither is all in `weight`.
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_floating_point() or head.weight.dim() != 2:
        return False
    input_ids = torch.arange(2, device=model.device)[None]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=input_ids, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            found = run_inside(head, head, lambda states: OutputHead.of(model).logits(states).float(), hidden)
    finally:
        model.train(training)
    # A forward of the instance's own is the one that accelerate puts there to run in 16 bits.
    rounded = model.dtype not in (torch.float32, torch.float64) or "forward" in vars(model)
    tolerance = 5e-2 if rounded else 1e-4
    return expected.shape == found.shape and bool(
        (expected - found).abs().max() <= tolerance * (1 + expected.abs().max())
    )
