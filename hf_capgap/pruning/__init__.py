"""Scores, target shapes, selection, surgery, and the proof that the surgery is right."""

from .callback import ExpressiveScoreCallback
from .scores import ExpressiveScores, merge_ranks
from .scoring import score
from .selection import Kept, select
from .shapes import StudentShape
from .solver import solve_shape
from .surgery import cut
from .verification import VerificationReport, verify

__all__ = [
    "ExpressiveScoreCallback",
    "ExpressiveScores",
    "Kept",
    "StudentShape",
    "VerificationReport",
    "cut",
    "merge_ranks",
    "score",
    "select",
    "solve_shape",
    "verify",
]
