"""From a target size ("40%", "1.2B", "2.5x") to the legal student shape nearest to it."""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from ..errors import ShapeError
from ..families import family_for, inventory_of
from .shapes import StudentShape

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_TARGET = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|x(?:\s+smaller)?|[kmbt]?)\s*", re.IGNORECASE)

# One percent off the target count weighs as much as five percent of imbalance between the dimensions.
_COUNT_TOLERANCE, _BALANCE_TOLERANCE = 0.01, 0.05
_FARTHEST = math.log(1.10)  # a legal shape that misses the target by more is refused, not passed off as an answer


def parse_target(target: str | int, num_teacher_parameters: int) -> int:
    """The parameter count that a target asks for.

    Args:
        target: `"40%"` of the teacher, `"2.5x"` smaller, `"1.2B"` / `"350M"` / `"800K"` parameters, or a plain count.
        num_teacher_parameters: Parameters of the teacher.

    Returns:
        The count, at least 1.

    Raises:
        ShapeError: Not such a target, or larger than the teacher.
    """
    match = _TARGET.fullmatch(str(target))
    if not match:
        raise ShapeError(
            "Not a target size", found=target, fix='Write "40%", "2.5x", "1.2B", or a number of parameters.'
        )
    number, unit = float(match["number"]), match["unit"].lower()
    if unit == "%":
        count = num_teacher_parameters * number / 100
    elif unit.startswith("x"):
        count = num_teacher_parameters / number if number else math.inf
    else:
        count = number * _UNITS[unit]
    if count > num_teacher_parameters:
        raise ShapeError(
            f"The target is larger than the teacher, {num_teacher_parameters:,} parameters",
            found=target,
            fix="The nearest legal target is 100%: a student is cut out of its teacher.",
        )
    return max(1, round(count))


@dataclass(frozen=True)
class _Candidate:
    shape: StudentShape
    num_parameters: int
    count_error: float  # |log(count / target)|
    imbalance: float  # spread of log(kept fraction) over hidden, heads and neurons

    @property
    def cost(self) -> float:
        return self.count_error / _COUNT_TOLERANCE + self.imbalance / _BALANCE_TOLERANCE


def solve_shape(
    config: PreTrainedConfig,
    target: str | int,
    *,
    num_hidden_layers: int | None = None,
    multiple_of: int | None = None,
    tensor_parallel: int = 1,
) -> StudentShape:
    """The legal shape whose parameter count is nearest to `target`, with a balanced split between the dimensions.

    Hidden size, heads and neurons keep about the same fraction of their units, so that a weight matrix keeps that
    fraction's square: the "square-root" split of the reference implementation (arXiv 2311.07052). Layers are kept
    unless `num_hidden_layers` says otherwise.

    Args:
        config: The teacher's config.
        target: See `parse_target`. Counts are of all parameters, embeddings included, tied ones once.
        num_hidden_layers: Layers of the student; the teacher's if None.
        multiple_of: Hidden size and neurons are multiples of this, or the teacher's own; if None the largest of 256,
            128, … 8 that is at most a sixteenth of the teacher's hidden size, and then 1.
        tensor_parallel: KV groups and neurons are divisible by so many devices.

    Raises:
        ShapeError: An impossible target, or no legal shape within 10 % of it. The message gives the nearest legal one.
    """
    teacher = StudentShape.of(config)
    num_teacher_parameters = teacher.num_parameters(config)
    count = parse_target(target, num_teacher_parameters)
    base = replace(
        teacher, num_hidden_layers=teacher.num_hidden_layers if num_hidden_layers is None else num_hidden_layers
    )
    base.check_within(config)
    step = multiple_of if multiple_of is not None else _default_multiple(teacher.hidden_size)
    if step < 1 or tensor_parallel < 1:
        raise ShapeError("multiple_of and tensor_parallel must be at least 1", found=(step, tensor_parallel))
    candidates = list(_candidates(config, base, count, step, tensor_parallel))
    if not candidates:
        raise ShapeError(
            "No legal shape has these multiples",
            found=f"multiple_of={step}, tensor_parallel={tensor_parallel}",
            fix="Lower them.",
        )
    close = [candidate for candidate in candidates if candidate.count_error <= _FARTHEST]
    if not close:
        nearest = min(candidates, key=lambda candidate: candidate.count_error)
        raise ShapeError(
            f"No legal shape has about {count:,} parameters",
            found=target,
            fix=f"The nearest legal one has {nearest.num_parameters:,} "
            f"({nearest.num_parameters / num_teacher_parameters:.1%}): {nearest.shape}.",
        )
    return min(close, key=lambda candidate: candidate.cost).shape


def _default_multiple(hidden_size: int) -> int:
    return next((step for step in (256, 128, 64, 32, 16, 8) if step <= hidden_size // 16), 1)


def _candidates(
    config: PreTrainedConfig, base: StudentShape, count: int, step: int, parallel: int
) -> Iterator[_Candidate]:
    """Every legal hidden size and number of KV groups, each with the legal neurons nearest to the count."""
    family, inventory = family_for(config), inventory_of(config)
    group = base.num_attention_heads // base.num_key_value_heads
    neuron_choices = [n for n in _multiples(base.intermediate_size, step) if n % parallel == 0]
    for hidden in _multiples(base.hidden_size, step):
        for num_groups in range(parallel, base.num_key_value_heads + 1, parallel):
            shape = replace(
                base, hidden_size=hidden, num_key_value_heads=num_groups, num_attention_heads=num_groups * group
            )
            if family.broken_rules(shape.sizes()):
                continue
            # The count is linear in the neurons: two evaluations give the line.
            at_one, at_two = (
                inventory.num_parameters(replace(shape, intermediate_size=n).sizes_within(config)) for n in (1, 2)
            )
            wanted = 1 + (count - at_one) / (at_two - at_one)
            above = bisect_left(neuron_choices, wanted)
            for neurons in neuron_choices[max(0, above - 1) : above + 1]:
                sized = replace(shape, intermediate_size=neurons)
                yield _rate(sized, at_one + (neurons - 1) * (at_two - at_one), count, base)


def _multiples(limit: int, step: int) -> list[int]:
    """Multiples of `step` up to `limit`, and `limit` itself, which the teacher already has."""
    return sorted({*range(step, limit + 1, step), limit})


def _rate(shape: StudentShape, num_parameters: int, count: int, base: StudentShape) -> _Candidate:
    fractions = [
        math.log(getattr(shape, name) / getattr(base, name))
        for name in ("hidden_size", "num_key_value_heads", "intermediate_size")
    ]
    return _Candidate(shape, num_parameters, abs(math.log(num_parameters / count)), max(fractions) - min(fractions))
