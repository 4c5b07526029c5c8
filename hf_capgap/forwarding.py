"""Running a computation inside the forward of a (wrapped) module.

DDP, FSDP2 and DeepSpeed do their work in the forward of the wrapper that they put around a model: DDP arms its
reducer, FSDP2 and ZeRO-3 gather the weights. Calling the backbone or reading `lm_head.weight` behind the wrapper's
back skips all that: under DDP the ranks then train apart without any error. So the loss is computed where the wrapper
expects the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .compat import without_compile


def run_inside(
    wrapper: torch.nn.Module, module: torch.nn.Module, function: Callable, *args: Any, **kwargs: Any
) -> Any:
    """Call `wrapper(*args, **kwargs)` with `function` in the place of `module.forward`.

    Args:
        wrapper: `module` itself, or what DDP, FSDP or DeepSpeed put around it. A `torch.compile` wrapper is stepped
            over (what is compiled is the backbone).
        module: The module whose forward the wrapper would run.
        function: Runs instead. While it runs, `module` has its own forward again.
    """
    replaced = module.__dict__.get("forward")  # accelerate puts an autocasting forward there

    def restore() -> None:
        if replaced is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = replaced

    def forward(*inner_args: Any, **inner_kwargs: Any) -> Any:
        restore()
        return function(*inner_args, **inner_kwargs)

    module.forward = forward
    try:
        return without_compile(wrapper)(*args, **kwargs)
    finally:
        restore()
