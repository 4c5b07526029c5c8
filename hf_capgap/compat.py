"""The private names of other libraries that we cannot do without, in one place; `tests/test_compat.py` tells when one
moves.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Which attention a model runs ("sdpa", "eager", …). transformers has a public setter, but no public getter."""
    return getattr(config, "_attn_implementation", None)


def without_compile(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside a `torch.compile` wrapper; any other module as it is."""
    return getattr(module, "_orig_mod", module)
