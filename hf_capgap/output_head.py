"""Output heads as data: from the final hidden state to logits, with all that a model does after its `lm_head`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from .compat import input_device
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
        return self.shaped(logits)

    def shaped(self, logits: torch.Tensor) -> torch.Tensor:
        """What the model does to the output of its `lm_head` module."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@contextmanager
def _probing(model: PreTrainedModel) -> Iterator[None]:
    """Without gradients, but for quantised models: when they first run without on a CPU, bitsandbytes packs its 4-bit
    weights anew, less exactly and in a way that has no backward.
    """
    if getattr(model.config, "quantization_config", None) is None:
        with torch.no_grad():
            yield
        return
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, output: output.detach().requires_grad_())
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()


def head_matches(model: PreTrainedModel) -> bool:
    """Whether `OutputHead.of(model)` on the final hidden state gives the model's own logits, tried on two tokens."""
    head = model.get_output_embeddings()
    # An adapter on the head is no nn.Linear, a quantised one has packed weights: neither is all in `weight`. Of an
    # offloaded one there is nothing there.
    if not isinstance(head, torch.nn.Linear) or not head.weight.is_floating_point() or head.weight.dim() != 2:
        return False
    if head.weight.is_meta:
        return False
    input_ids = torch.arange(2, device=input_device(model))[None]
    training = [(module, module.training) for module in model.modules()]  # not always the same everywhere
    model.eval()
    try:
        with _probing(model):
            expected = model(input_ids=input_ids, use_cache=False).logits.float()
            hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            found = run_inside(head, head, lambda states: OutputHead.of(model).logits(states).float(), hidden)
    finally:
        for module, mode in training:
            module.training = mode
    # A forward of the instance's own is the one that accelerate puts there to run in 16 bits.
    rounded = model.dtype not in (torch.float32, torch.float64) or "forward" in vars(model)
    tolerance = 5e-2 if rounded else 1e-4
    return expected.shape == found.shape and bool(
        (expected - found).abs().max() <= tolerance * (1 + expected.abs().max())
    )
