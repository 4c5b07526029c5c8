"""Options that say how large a student is and which layers it keeps, shared by the commands that cut or show a cut."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..errors import ConfigError
from ..families import Config
from ..pruning import ExpressiveScores, StudentShape, solve_shape

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_experts",
)
_WITH_TARGET = ("num_hidden_layers", "num_experts")  # what a target leaves to say
_ONLY_WITH_TARGET = {"split": "balanced", "multiple_of": None, "tensor_parallel": 1}


@dataclass
class ShapeOptions:
    """A target, or sizes; and which layers go."""

    target: str | None = field(
        default=None,
        metadata={"help": 'Size of the student: "40%%" of the teacher, "2.5x" (smaller), "1.2B" or 350M parameters.'},
    )
    num_hidden_layers: int | None = field(
        default=None, metadata={"help": "Layers of the student; the teacher's if not given. Also with a target."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden size, instead of a target; the teacher's if not given."}
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={
            "help": "Query heads, instead of a target. If not given they go with their KV groups; if given alone, "
            "groups keep fewer query heads (or, where each head has its own keys and values, those go, too)."
        },
    )
    num_key_value_heads: int | None = field(
        default=None, metadata={"help": "KV groups, instead of a target; the teacher's if not given."}
    )
    intermediate_size: int | None = field(
        default=None,
        metadata={"help": "Neurons of each MLP or expert, instead of a target; the teacher's if not given."},
    )
    num_experts: int | None = field(
        default=None, metadata={"help": "Experts of each layer; the teacher's if not given. Also with a target."}
    )
    split: str = field(
        default="balanced",
        metadata={
            "help": "How a target is split between hidden size, heads and neurons: each keeps about the same fraction "
            "(balanced), or what loses the least of the scores goes (scores).",
            "choices": ["balanced", "scores"],
        },
    )
    multiple_of: int | None = field(
        default=None,
        metadata={"help": "With a target: hidden size and neurons are multiples of it; chosen if not given."},
    )
    tensor_parallel: int = field(
        default=1, metadata={"help": "With a target: KV groups and neurons can be divided among so many devices."}
    )
    layers: str = field(
        default="symmetric",
        metadata={
            "help": "Which layers stay: those in the middle (symmetric), the best-scored (scores), or the indices of "
            'those to keep, from 0 ("0,1,5").'
        },
    )
    protect_ends: bool = field(default=False, metadata={"help": "Never remove the first and the last layer."})

    @property
    def is_given(self) -> bool:
        """Whether anything says how large the student is."""
        return self.target is not None or bool(self._sizes()) or not isinstance(self.kept_layers(), str)

    def kept_layers(self) -> str | list[int]:
        """`layers` as `cut` takes it.

        Raises:
            ConfigError: Neither a known way nor a list of indices.
        """
        if self.layers in ("symmetric", "scores"):
            return self.layers
        try:
            return [int(index) for index in self.layers.split(",")]
        except ValueError:
            raise ConfigError(
                "Unknown way to choose layers",
                found=self.layers,
                fix="Write symmetric, scores, or the indices of those to keep: 0,1,5.",
            ) from None

    def shape(self, config: Config, scores: ExpressiveScores) -> StudentShape:
        """The shape that the options ask for, of a student cut out of a teacher with `config`.

        Raises:
            ConfigError: Options that contradict each other, or none.
            ShapeError: A target that no legal shape meets, or sizes that do not fit the teacher.
        """
        sizes, kept_layers = self._sizes(), self.kept_layers()
        if not self.is_given:
            raise ConfigError("Nothing says how large the student is", fix="Pass --target 40%, or sizes; see --help.")
        if not isinstance(kept_layers, str):
            sizes.setdefault("num_hidden_layers", len(kept_layers))
        if self.target is None:
            self._refuse(
                [name for name, default in _ONLY_WITH_TARGET.items() if getattr(self, name) != default],
                "These options choose a shape for a target, but there is none",
            )
            shape = _with_sizes(StudentShape.of(config), sizes)
            shape.check_within(config)
            return shape
        self._refuse([name for name in sizes if name not in _WITH_TARGET], "A target and sizes contradict each other")
        return solve_shape(
            config,
            self.target,
            split=self.split,
            scores=scores if self.split == "scores" else None,
            multiple_of=self.multiple_of,
            tensor_parallel=self.tensor_parallel,
            **sizes,
        )

    def _sizes(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}

    def _refuse(self, names: list[str], cause: str) -> None:
        if names:
            raise ConfigError(cause, found=", ".join(f"--{name}" for name in names), fix="Leave out one or the other.")


def _with_sizes(teacher: StudentShape, sizes: dict[str, int]) -> StudentShape:
    """The teacher's shape with other `sizes`, whose heads follow each other where only one kind is named."""
    merged: dict[str, Any] = {**teacher.as_dict(), **sizes}
    if "num_attention_heads" not in sizes:
        merged["num_attention_heads"] = merged["num_key_value_heads"] * teacher.queries_per_group
    elif "num_key_value_heads" not in sizes and teacher.queries_per_group == 1:
        merged["num_key_value_heads"] = merged["num_attention_heads"]
    return StudentShape(**merged)
