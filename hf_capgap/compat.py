"""The private names of other libraries that we cannot do without, in one place; `tests/test_compat.py` tells when one
moves.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Which attention a model runs ("sdpa", "eager", …). transformers has a public setter, but no public getter."""
    return getattr(config, "_attn_implementation", None)


def commit_hash(config: PreTrainedConfig) -> str | None:
    """The Hub commit that a config was loaded from, if any."""
    return getattr(config, "_commit_hash", None)


def without_compile(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside a `torch.compile` wrapper; any other module as it is."""
    return getattr(module, "_orig_mod", module)
