"""Peak memory of training a student beside a live teacher, per device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import PlanError
from .accounting import ModelSize

# What each strategy splits over the devices; the rest is held whole by each.
STRATEGIES: dict[str, frozenset[str]] = {
    "ddp": frozenset(),
    "zero1": frozenset({"optimizer"}),
    "zero2": frozenset({"optimizer", "gradients"}),
    "zero3": frozenset({"optimizer", "gradients", "weights"}),
    "fsdp2": frozenset({"optimizer", "gradients", "weights"}),
}
_COMPUTE_BYTES = 2  # bfloat16
_STREAM_BYTES = 4  # the residual stream stays in float32 under autocast


@dataclass(frozen=True)
class Precision:
    """Bytes per parameter while training. The default is `bf16=True` of the `Trainer` with AdamW: float32 weights and
    gradients, two float32 moments, and bfloat16 only inside autocast.
    """

    weight_bytes: float = 4
    gradient_bytes: float = 4
    optimizer_bytes: float = 8


@dataclass(frozen=True)
class Memory:
    """Bytes on each device.

    Attributes:
        weights: Of the student.
        gradients: Of the student.
        optimizer: Its states.
        activations: What the backward pass needs (an estimate, see `accounting`).
        gathered: Sharded weights: the largest block that is whole for a moment, of student and teacher.
        teacher: The live teacher's weights; 0 if its outputs are cached.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    gathered: float
    teacher: float

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def training_memory(
    student: ModelSize,
    teacher: ModelSize | None = None,
    *,
    strategy: str = "fsdp2",
    num_devices: int = 1,
    tokens_per_device: int = 4096,
    gradient_checkpointing: bool = False,
    precision: Precision | None = None,
    teacher_weight_bytes: float = _COMPUTE_BYTES,
) -> Memory:
    """Peak bytes per device of distillation, without fragmentation and the objective's chunk of logits.

    Args:
        student: The student's sizes.
        teacher: The teacher's, if it runs beside the student.
        strategy: One of `STRATEGIES`. The teacher is split as the student's weights are.
        num_devices: Devices that share the work.
        tokens_per_device: Tokens of one micro-batch on one device.
        gradient_checkpointing: Keep only each layer's input, and compute one layer's activations at a time again.
        precision: Bytes per parameter; mixed precision with AdamW if None.
        teacher_weight_bytes: Bytes per parameter of the frozen teacher.

    Raises:
        PlanError: An unknown strategy, or fewer than one device or token.
    """
    if strategy not in STRATEGIES:
        raise PlanError("Unknown strategy", found=strategy, fix=f"It is one of {', '.join(STRATEGIES)}.")
    if num_devices < 1 or tokens_per_device < 1:
        raise PlanError(
            "num_devices and tokens_per_device must be at least 1", found=f"{num_devices}, {tokens_per_device}"
        )
    precision, split = precision or Precision(), STRATEGIES[strategy]

    def held(part: str, size: float) -> float:
        return size / num_devices if part in split else size

    if gradient_checkpointing:
        per_token = student.num_layers * student.hidden * _STREAM_BYTES + student.activation_bytes
    else:
        per_token = student.num_layers * student.activation_bytes
    is_gathered = "weights" in split and num_devices > 1
    blocks = student.largest_block + (teacher.largest_block if teacher else 0)
    return Memory(
        weights=held("weights", student.total * precision.weight_bytes),
        gradients=held("gradients", student.total * precision.gradient_bytes),
        optimizer=held("optimizer", student.total * precision.optimizer_bytes),
        activations=float(per_token * tokens_per_device),
        gathered=float(blocks * _COMPUTE_BYTES) if is_gathered else 0.0,
        teacher=held("weights", teacher.total * teacher_weight_bytes) if teacher else 0.0,
    )
