"""Scaling laws of training and distillation, their fits, and the planner: numpy and scipy, no torch."""

from .accounting import ModelSize, balanced_cut, measure
from .book import Laws
from .capacity import CapacityGapLaw
from .crossovers import crossover_compute, crossover_tokens
from .devices import DEVICES, Device
from .distilled import DistillationLaw
from .memory import Memory, Precision, training_memory
from .planner import plan
from .planning import Plan, PlanSettings
from .recipes import SCENARIOS, compute_optimal, iso_flop_curves
from .records import RunRecord, append_record, read_records, write_records
from .sizes import ExtrapolationWarning, format_size, parse_size
from .supervised import SupervisedLaw

__all__ = [
    "DEVICES",
    "SCENARIOS",
    "CapacityGapLaw",
    "Device",
    "DistillationLaw",
    "ExtrapolationWarning",
    "Laws",
    "Memory",
    "ModelSize",
    "Plan",
    "PlanSettings",
    "Precision",
    "RunRecord",
    "SupervisedLaw",
    "append_record",
    "balanced_cut",
    "compute_optimal",
    "crossover_compute",
    "crossover_tokens",
    "format_size",
    "iso_flop_curves",
    "measure",
    "parse_size",
    "plan",
    "read_records",
    "training_memory",
    "write_records",
]
