"""hf_capgap: small language models cut out of and distilled from big ones, the way the capacity-gap papers say.

Public names load on first use, so that `import hf_capgap` is quick and pulls in no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that owns it.
_HOMES = {
    "CapGapError": "errors",
    "CapacityGapLaw": "laws",
    "DistillationConfig": "distillation",
    "DistillationLaw": "laws",
    "DistillationTrainer": "distillation",
    "ExpressiveScoreCallback": "pruning",
    "ExpressiveScores": "pruning",
    "RunRecord": "laws",
    "StudentShape": "pruning",
    "SupervisedLaw": "laws",
    "cut": "pruning",
    "fused_distillation_loss": "distillation",
    "load_corpus": "data",
    "pack": "data",
    "plan": "laws",
    "prune": "pruning",
    "score": "pruning",
    "solve_shape": "pruning",
    "verify": "pruning",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from .data import load_corpus, pack
    from .distillation import DistillationConfig, DistillationTrainer, fused_distillation_loss
    from .errors import CapGapError
    from .laws import CapacityGapLaw, DistillationLaw, RunRecord, SupervisedLaw, plan
    from .pruning import (
        ExpressiveScoreCallback,
        ExpressiveScores,
        StudentShape,
        cut,
        prune,
        score,
        solve_shape,
        verify,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
