"""Scores, target shapes, selection, surgery, and the proof that the surgery is right."""

from .callback import ExpressiveScoreCallback
from .checkpoint import StudentFolder
from .metrics import METRICS
from .profile import Profile, global_profile
from .scores import ExpressiveScores, merge_ranks
from .scoring import score
from .selection import Kept, select
from .shapes import StudentShape
from .solver import solve_shape
from .staging import prune
from .surgery import cut
from .verification import VerificationReport, verify

__all__ = [
    "METRICS",
    "ExpressiveScoreCallback",
    "ExpressiveScores",
    "Kept",
    "Profile",
    "StudentFolder",
    "StudentShape",
    "VerificationReport",
    "cut",
    "global_profile",
    "merge_ranks",
    "prune",
    "score",
    "select",
    "solve_shape",
    "verify",
]
