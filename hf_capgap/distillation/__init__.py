"""The objective, teachers, and the trainer that brings them together."""

from ..output_head import OutputHead
from .config import DistillationConfig
from .fused import fused_distillation_loss
from .objective import distillation_loss
from .teachers import LiveTeacher, load_teacher
from .trainer import DistillationTrainer

__all__ = [
    "DistillationConfig",
    "DistillationTrainer",
    "LiveTeacher",
    "OutputHead",
    "distillation_loss",
    "fused_distillation_loss",
    "load_teacher",
]
