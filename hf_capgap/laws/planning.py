"""What goes into a plan and what comes out: data only."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import PlanError
from .accounting import CACHE_CODECS, ModelSize
from .devices import device_named
from .memory import STRATEGIES, Memory
from .recipes import SCENARIOS


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How a plan prices its candidates. Each option is documented once, in its `help`.

    Raises:
        PlanError: A value that cannot be.
    """

    scenario: str = field(
        default="teacher_inference",
        metadata={
            "help": "Which costs of the teacher count: "
            + "; ".join(f"{k}: {v.description}" for k, v in SCENARIOS.items()),
            "choices": list(SCENARIOS),
        },
    )
    device: str = field(
        default="H100", metadata={"help": "Accelerator that the hours are for: H100, A100, RTX4090, ..."}
    )
    num_devices: int = field(default=8, metadata={"help": "Accelerators that share the work."})
    utilisation: float = field(
        default=0.4, metadata={"help": "Fraction of the accelerator's peak speed that training reaches."}
    )
    price_per_hour: float | None = field(
        default=None, metadata={"help": "Price of one accelerator for one hour, in your currency."}
    )
    strategy: str = field(
        default="fsdp2", metadata={"help": "What is split over the accelerators.", "choices": list(STRATEGIES)}
    )
    block_size: int = field(default=4096, metadata={"help": "Tokens per training sequence."})
    batch_size: int = field(default=1, metadata={"help": "Sequences per accelerator and micro-batch."})
    tokens_per_step: int = field(default=1 << 20, metadata={"help": "Tokens per optimizer step, about."})
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations a second time instead of keeping them."}
    )
    cache_codec: str = field(
        default="topk",
        metadata={
            "help": "How a teacher's cached outputs are kept: "
            + "; ".join(f"{k}: {v}" for k, v in CACHE_CODECS.items()),
            "choices": list(CACHE_CODECS),
        },
    )
    cache_entries: int = field(
        default=64, metadata={"help": "Vocabulary entries per token that topk and sample keep."}
    )

    def __post_init__(self) -> None:
        for name, known in (("scenario", SCENARIOS), ("strategy", STRATEGIES), ("cache_codec", CACHE_CODECS)):
            if getattr(self, name) not in known:
                raise PlanError(f"Unknown {name}", found=getattr(self, name), fix=f"It is one of {', '.join(known)}.")
        for name in ("num_devices", "block_size", "batch_size", "tokens_per_step", "cache_entries"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} must be at least 1", found=getattr(self, name))
        if self.price_per_hour is not None and not 0 <= self.price_per_hour < math.inf:
            raise PlanError("price_per_hour must be finite and must not be negative", found=self.price_per_hour)
        device_named(self.device).hours(0.0, self.utilisation)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step that come nearest to `tokens_per_step`."""
        return max(1, round(self.tokens_per_step / (self.block_size * self.batch_size * self.num_devices)))

    def num_steps(self, num_tokens: float) -> int:
        """Optimizer steps that see `num_tokens`."""
        per_step = self.block_size * self.batch_size * self.num_devices * self.accumulation_steps
        return max(1, round(num_tokens / per_step))


@dataclass(frozen=True)
class Interval:
    """A predicted loss, and between what it may lie by what is not known of the teacher; not the law's own error.

    Attributes:
        value: The prediction.
        low: The lowest one that is consistent with what is known.
        high: The highest.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class TeacherRow:
    """One candidate, by both laws.

    Attributes:
        name: Hub id or folder.
        size: Its sizes.
        student: The student's sizes beside it: a student given as a number is a balanced cut out of it.
        ratio: All its parameters over all the student's.
        near_optimal: Whether the capacity-gap law counts it among the near-optimal.
        teacher_loss: Its predicted loss, nats per token.
        teacher_loss_source: Where that comes from.
        student_loss: The student's by the distillation law.
        supervised_loss: The student's after the same tokens of text alone.
        supervised_tokens: Tokens of text alone that the same compute pays for.
        supervised_loss_same_compute: The student's loss after those.
        flops: Of training the student, running and training the teacher.
        counted_flops: What of it the scenario counts.
        device_hours: Hours of one device for that.
        price: Of those hours; None without a price.
        memory: Bytes per device.
        cache_bytes: Of its cached outputs for all tokens.
        notes: What to know about it.
    """

    name: str
    size: ModelSize
    student: ModelSize
    ratio: float
    near_optimal: bool
    teacher_loss: Interval
    teacher_loss_source: str
    student_loss: Interval
    supervised_loss: float
    supervised_tokens: float
    supervised_loss_same_compute: float
    flops: dict[str, float]
    counted_flops: float
    device_hours: float
    price: float | None
    memory: Memory
    cache_bytes: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Curve:
    """The student's predicted loss against the size of teachers trained on a fixed number of tokens per parameter.

    Attributes:
        teacher_params: [points], outside the embeddings.
        student_loss: [points].
        supervised_loss: The student's loss after the same tokens of text alone.
        best_teacher_params: Where the curve is lowest.
        tokens_per_param: Of the teachers on the curve.
    """

    teacher_params: tuple[float, ...]
    student_loss: tuple[float, ...]
    supervised_loss: float
    best_teacher_params: float
    tokens_per_param: float


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`.

    Attributes:
        student: The student as it was asked for.
        student_params: All its parameters.
        num_tokens: Tokens that it would be distilled on.
        best_teacher_params: The capacity-gap law's best teacher, all its parameters.
        band: (smallest, largest) teacher that this law counts as near-optimal.
        rows: The candidates, best first by the distillation law.
        rejected: Name of each candidate that could not be used -> why.
        recommended: Name of the teacher to take; None without candidates.
        best_by_capacity_gap: Name of the candidate nearest to the capacity-gap law's best teacher.
        best_by_distillation: Name of the candidate with the lowest predicted student loss.
        verdict: Whether to distil at all, in sentences.
        disagreement: Why the laws choose different teachers; None if they agree.
        warnings: What the predictions do not cover.
        command: Command line of the next stages; None without candidates.
        curve: Student loss against teacher size.
        settings: How it was priced.
        sources: Where each law's coefficients come from.
    """

    student: str
    student_params: float
    num_tokens: float
    best_teacher_params: float
    band: tuple[float, float]
    rows: tuple[TeacherRow, ...]
    rejected: dict[str, str]
    recommended: str | None
    best_by_capacity_gap: str | None
    best_by_distillation: str | None
    verdict: str
    disagreement: str | None
    warnings: tuple[str, ...]
    command: str | None
    curve: Curve
    settings: PlanSettings
    sources: dict[str, str]

    def row(self, name: str) -> TeacherRow:
        """The row of a candidate."""
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Everything in the plan, as plain JSON.

        Raises:
            PlanError: Settings so extreme that a number overflowed: JSON has no infinity.
        """
        try:
            return json.loads(json.dumps(asdict(self), allow_nan=False))
        except ValueError as error:
            raise PlanError(
                "The plan has numbers that are not finite", fix="Check sizes, price, and utilisation."
            ) from error

    def render(self, width: int | None = None) -> str:
        """The plan as a table and sentences for a terminal, without colours."""
        from .render import render_plan

        return render_plan(self, width)

    def plot(self, path: str) -> Any:
        """Draw student loss against teacher size into an image file (needs matplotlib).

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from .plots import plot_plan

        return plot_plan(self, path)
