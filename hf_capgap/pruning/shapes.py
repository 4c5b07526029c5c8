"""Target shapes: given explicitly, checked against the teacher, or (in `solver`) solved for."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from transformers import PreTrainedConfig

from ..errors import ShapeError
from ..families import family_for, inventory_of

_AXES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "q_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "neurons",
}


@dataclass(frozen=True, kw_only=True)
class StudentShape:
    """The sizes of a student. Everything that is not named here (vocabulary, positions) stays the teacher's.

    Attributes:
        num_hidden_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Query heads; the query heads per KV group stay the teacher's.
        num_key_value_heads: KV groups.
        head_dim: Width of a head, the teacher's.
        intermediate_size: Neurons of each MLP.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int

    def __post_init__(self) -> None:
        for name in _AXES:
            value = getattr(self, name)
            if hasattr(value, "__index__") and not isinstance(value, bool):
                object.__setattr__(self, name, operator.index(value))  # NumPy's integers

    @classmethod
    def of(cls, config: PreTrainedConfig) -> StudentShape:
        """The shape of a model of a supported family."""
        return cls.from_sizes(family_for(config).sizes(config))

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int]) -> StudentShape:
        """The shape with these sizes of the families' axes."""
        return cls(**{name: sizes[axis] for name, axis in _AXES.items()})

    def sizes(self) -> dict[str, int]:
        """Units per axis, in the families' names."""
        return {axis: getattr(self, name) for name, axis in _AXES.items()}

    def num_parameters(self, config: PreTrainedConfig) -> int:
        """Parameters (tied ones once) of the student of this shape cut out of a teacher with `config`."""
        return inventory_of(config).num_parameters(self.sizes_within(config))

    def sizes_within(self, config: PreTrainedConfig) -> dict[str, int]:
        """This shape's sizes, with the teacher's for every other axis."""
        return {**family_for(config).sizes(config), **self.sizes()}

    def as_dict(self) -> dict[str, int]:
        """The fields as a plain dict."""
        return asdict(self)

    def check_within(self, config: PreTrainedConfig) -> None:
        """Check that this shape can be cut out of a teacher with `config`.

        Raises:
            ShapeError: A size that is not positive, larger than the teacher's, or breaks a rule of the family. The
                message gives the nearest legal shape.
        """
        problems = _problems(self, config)
        if problems:
            raise ShapeError(
                "This shape cannot be cut out of the teacher: " + "; ".join(problems),
                found=self,
                fix=f"The nearest legal shape is {nearest_legal(self, config)}.",
            )


def _problems(shape: StudentShape, config: PreTrainedConfig) -> list[str]:
    family, teacher = family_for(config), StudentShape.of(config)
    problems = []
    for name in _AXES:
        wanted, available = getattr(shape, name), getattr(teacher, name)
        if type(wanted) is not int or wanted < 1:
            problems.append(f"{name} must be a positive integer, not {wanted!r}")
        elif wanted > available:
            problems.append(f"{name} {wanted} is wider than the teacher's {available}")
    if problems:
        return problems
    if shape.head_dim != teacher.head_dim:
        problems.append(
            f"head_dim {shape.head_dim} is not the teacher's {teacher.head_dim}: heads are kept or dropped whole"
        )
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    if shape.num_attention_heads != group * shape.num_key_value_heads:
        problems.append(
            f"{shape.num_attention_heads} query heads in {shape.num_key_value_heads} KV groups: "
            f"a group has {group} query heads and is kept or dropped whole"
        )
    return problems + family.broken_rules(shape.sizes())


def nearest_legal(shape: StudentShape, config: PreTrainedConfig) -> StudentShape:
    """The legal shape closest to `shape`: sizes clamped into the teacher, then KV groups and hidden size moved the
    least.
    """
    family, teacher = family_for(config), StudentShape.of(config)
    clamped = {name: _clamp(getattr(shape, name), getattr(teacher, name)) for name in _AXES}
    group = teacher.num_attention_heads // teacher.num_key_value_heads
    wanted = replace(shape, **clamped)
    num_groups = min(max(1, round(clamped["num_attention_heads"] / group)), teacher.num_key_value_heads)
    by_distance = sorted(range(1, teacher.hidden_size + 1), key=lambda hidden: abs(hidden - wanted.hidden_size))
    for hidden in by_distance:
        candidate = replace(
            wanted,
            hidden_size=hidden,
            num_attention_heads=num_groups * group,
            num_key_value_heads=num_groups,
            head_dim=teacher.head_dim,
        )
        if not family.broken_rules(candidate.sizes()):
            return candidate
    return teacher


def _clamp(wanted: object, limit: int) -> int:
    is_number = isinstance(wanted, (int, float)) and not isinstance(wanted, bool) and math.isfinite(wanted)
    return min(max(1, int(wanted)), limit) if is_number else limit
