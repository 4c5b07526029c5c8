"""The private names of other libraries that we cannot do without, in one place; `tests/test_compat.py` tells when one
moves.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Which attention a model runs ("sdpa", "eager", …). transformers has a public setter, but no public getter."""
    return getattr(config, "_attn_implementation", None)


def input_device(model: torch.nn.Module) -> torch.device:
    """Where a model takes its token ids: beside its embeddings, or where accelerate loads them to if it has put them
    away on the disk or the CPU.
    """
    embeddings = model.get_input_embeddings()
    hook = getattr(embeddings, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):  # of several hooks in a row, or one, or none
        if embeddings.weight.is_meta and getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    return embeddings.weight.device


def without_compile(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside a `torch.compile` wrapper; any other module as it is."""
    return getattr(module, "_orig_mod", module)
