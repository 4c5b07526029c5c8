"""Every error that `hf_capgap` raises on purpose: one root, and a builtin parent for each child.

A message always says three things: the cause, the value that was seen, and what to do about it.
"""

from __future__ import annotations


class CapGapError(Exception):
    """Root of all errors raised by `hf_capgap`.

    Args:
        cause: What is wrong, in one sentence without a final full stop.
        found: The value that was seen, shown as it is.
        fix: What the reader can do about it.
    """

    def __init__(self, cause: str, *, found: object = None, fix: str | None = None):
        message = cause if found is None else f"{cause} (found: {found})"
        super().__init__(message if fix is None else f"{message}. {fix}")


class ConfigError(CapGapError, ValueError):
    """An option has a value that cannot be used."""


class UnsupportedModelError(CapGapError, ValueError):
    """A model whose axes no family table describes, or that departs from its table."""


class ShapeError(CapGapError, ValueError):
    """A student shape that cannot be cut out of the teacher, or a target that no legal shape meets."""


class ScoresError(CapGapError, ValueError):
    """Scores that are damaged, non-finite, or belong to another model."""


class VerificationError(CapGapError, RuntimeError):
    """A cut student that does not compute what the masked teacher computes."""


class CheckpointError(CapGapError, OSError):
    """A checkpoint on disk that is incomplete, damaged or cannot be fetched."""


class DataError(CapGapError, ValueError):
    """A corpus or batch that cannot be trained on."""


class TeacherError(CapGapError, ValueError):
    """A teacher that cannot teach this student."""


class LawError(CapGapError, ValueError):
    """A size, loss, budget or coefficient that no law can take."""


class RecordError(CapGapError, ValueError):
    """Run records that are damaged, or that say what cannot be."""


class FitError(CapGapError, ValueError):
    """Run records that a law cannot be fitted to."""


class PlanError(CapGapError, ValueError):
    """A candidate or an option that no plan can be made with."""


class NonFiniteError(CapGapError, FloatingPointError):
    """NaN or infinity where training would silently be poisoned."""


class OutputFolderError(CapGapError, FileExistsError):
    """An output folder that already holds something."""


class MissingExtraError(CapGapError, ImportError):
    """An optional dependency that is not installed."""
