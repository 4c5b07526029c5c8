"""Target shapes: given explicitly, checked against the teacher, or (in `solver`) solved for."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from ..errors import ShapeError
from ..families import Config, Family, family_for

_AXES = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden",
    "num_attention_heads": "q_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "neurons",
    "num_experts": "experts",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class StudentShape:
    """The sizes of a student. Everything that is not named here (vocabulary, positions) stays the teacher's.

    Attributes:
        num_hidden_layers: Decoder layers.
        hidden_size: Width of the residual stream.
        num_attention_heads: Query heads: the same number in every KV group, at most the teacher's.
        num_key_value_heads: KV groups; as many as query heads where each has its own keys and values.
        head_dim: Width of a head, the teacher's.
        intermediate_size: Neurons of each MLP, or of each expert.
        num_experts: Experts of each layer; None for a model without, or for as many as the teacher has.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    num_experts: int | None = None

    def __post_init__(self) -> None:
        for name in _AXES:
            value = getattr(self, name)
            if hasattr(value, "__index__") and not isinstance(value, bool):
                object.__setattr__(self, name, operator.index(value))  # NumPy's integers

    def __repr__(self) -> str:
        return f"StudentShape({', '.join(f'{name}={value!r}' for name, value in self.as_dict().items())})"

    @classmethod
    def of(cls, config: Config) -> StudentShape:
        """The shape of a model of a supported family."""
        return cls.from_sizes(family_for(config).sizes(config))

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, int]) -> StudentShape:
        """The shape with these sizes of the families' axes."""
        return cls(**{name: sizes[axis] for name, axis in _AXES.items() if axis in sizes})

    @property
    def queries_per_group(self) -> int:
        """Query heads of each KV group."""
        return self.num_attention_heads // self.num_key_value_heads

    def sizes(self) -> dict[str, int]:
        """Units per axis, in the families' names."""
        return {axis: getattr(self, name) for name, axis in _AXES.items() if getattr(self, name) is not None}

    def num_parameters(self, config: Config) -> int:
        """Parameters (tied ones once) of the student of this shape cut out of a teacher with `config`."""
        return family_for(config).num_parameters(config, self.sizes())

    def as_dict(self) -> dict[str, int]:
        """The fields as a plain dict."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def check_within(self, config: Config) -> None:
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


def _problems(shape: StudentShape, config: Config) -> list[str]:
    family, teacher = family_for(config), StudentShape.of(config)
    problems = []
    for name in _AXES:
        wanted, available = getattr(shape, name), getattr(teacher, name)
        if name == "num_experts" and wanted is None:
            continue
        if type(wanted) is not int or wanted < 1:
            problems.append(f"{name} must be a positive integer, not {wanted!r}")
        elif available is None:
            problems.append(f"{name} {wanted}, but the teacher is no mixture of experts")
        elif wanted > available:
            problems.append(f"{name} {wanted} is wider than the teacher's {available}")
    if problems:
        return problems
    if shape.head_dim != teacher.head_dim:
        problems.append(
            f"head_dim {shape.head_dim} is not the teacher's {teacher.head_dim}: heads are kept or dropped whole"
        )
    group = teacher.queries_per_group
    if shape.num_attention_heads % shape.num_key_value_heads or shape.queries_per_group > group:
        problems.append(
            f"{shape.num_attention_heads} query heads in {shape.num_key_value_heads} KV groups: "
            f"every group keeps the same number of query heads, at most the teacher's {group}"
        )
    return problems + family.broken_rules({**family.sizes(config), **shape.sizes()})


def nearest_legal(shape: StudentShape, config: Config) -> StudentShape:
    """The legal shape closest to `shape`: sizes clamped into the teacher, then query heads, KV groups and hidden size
    moved the least.
    """
    family, teacher = family_for(config), StudentShape.of(config)
    clamped = {name: _clamp(getattr(shape, name), getattr(teacher, name)) for name in _AXES}
    wanted = replace(shape, **clamped)
    wanted = replace(
        wanted,
        head_dim=teacher.head_dim,
        num_experts=_enough_experts(family, config, wanted),
        intermediate_size=to_multiple(wanted.intermediate_size, family.multiples.get("neurons", 1)),
    )
    candidates = (
        replace(wanted, hidden_size=hidden, num_attention_heads=groups * queries, num_key_value_heads=groups)
        for groups, queries in _by_distance(wanted, teacher)
        for hidden in _legal_hidden_sizes(family, config, wanted, groups * queries)[:1]
    )
    return next(candidates, teacher)


def _by_distance(wanted: StudentShape, teacher: StudentShape) -> list[tuple[int, int]]:
    """(KV groups, query heads per group), those nearest to the wanted number of query heads first."""
    pairs = [
        (groups, queries)
        for groups in range(1, teacher.num_key_value_heads + 1)
        for queries in range(1, teacher.queries_per_group + 1)
    ]

    def distance(pair: tuple[int, int]) -> tuple[int, int, int]:
        groups, queries = pair
        return (
            abs(groups * queries - wanted.num_attention_heads),
            abs(groups - wanted.num_key_value_heads),
            -queries,
        )

    return sorted(pairs, key=distance)


def _legal_hidden_sizes(family: Family, config: Config, wanted: StudentShape, num_heads: int) -> list[int]:
    """Hidden sizes that the family's rules allow with `num_heads` query heads, the nearest first."""
    sizes = {**family.sizes(config), **wanted.sizes(), "q_heads": num_heads, "kv_heads": 1}
    choices = range(1, family.sizes(config)["hidden"] + 1)
    return sorted(
        (hidden for hidden in choices if not family.broken_rules({**sizes, "hidden": hidden})),
        key=lambda hidden: abs(hidden - wanted.hidden_size),
    )


def _enough_experts(family: Family, config: Config, wanted: StudentShape) -> int | None:
    if wanted.num_experts is None:
        return None
    return max(wanted.num_experts, family.sizes(config)["experts_per_token"])


def to_multiple(size: int, number: int) -> int:
    """The multiple of `number` nearest to `size`, at least one of it."""
    return max(1, round(size / number)) * number


def _clamp(wanted: object, limit: int | None) -> int | None:
    if limit is None:
        return None
    is_number = isinstance(wanted, (int, float)) and not isinstance(wanted, bool) and math.isfinite(wanted)
    return min(max(1, int(wanted)), limit) if is_number else limit
