"""What a plan is asked for, and what is known of the teachers' training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from ..errors import PlanError
from .accounting import ModelSize, balanced_cut
from .book import Laws
from .candidates import Candidate, find_candidate
from .planning import Interval
from .published import CHINCHILLA_TOKENS_PER_PARAM
from .sizes import check_losses, format_size, parse_size


@dataclass(frozen=True)
class Wanted:
    """What was asked for: a number of parameters, or a model of its own."""

    name: str
    target: float | None
    size: ModelSize | None

    @classmethod
    def of(cls, student: str | float | os.PathLike) -> Wanted:
        if isinstance(student, os.PathLike) or (isinstance(student, str) and _is_a_model(student)):
            candidate = find_candidate(student)
            return cls(candidate.name, None, candidate.size)
        target = parse_size(student)
        return cls(format_size(target), target, None)

    def beside(self, teacher: Candidate) -> ModelSize:
        return self.size if self.size is not None else balanced_cut(teacher.config, self.target)

    @property
    def num_params(self) -> float:
        """All parameters of the student."""
        return float(self.target if self.target is not None else self.size.total)


def _is_a_model(text: str) -> bool:
    return os.path.exists(text) or "/" in text or (text[:1].isalpha() and text.lower() not in ("nan", "inf"))


@dataclass(frozen=True)
class Knowledge:
    """What the caller knows of the teachers' training."""

    tokens: Mapping[str, float]
    losses: Mapping[str, float]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        tokens: str | float | Mapping[str, str | float] | None,
        losses: Mapping[str, float] | None,
    ) -> Knowledge:
        if tokens is not None and not isinstance(tokens, Mapping):
            tokens = dict.fromkeys(names, tokens)
        tokens, losses = dict(tokens or {}), dict(losses or {})
        for name in (*tokens, *losses):
            if name not in names:
                near = get_close_matches(name, names, n=1)
                raise PlanError(
                    "Something is said of a teacher that is not a candidate",
                    found=name,
                    fix=f"Did you mean {near[0]}?" if near else f"Candidates: {', '.join(names)}.",
                )
        return cls(
            {name: parse_size(value) for name, value in tokens.items()},
            {name: float(check_losses(f"The loss of {name}", value)) for name, value in losses.items()},
        )

    def teacher_loss(self, candidate: Candidate, laws: Laws) -> tuple[Interval, str]:
        """(loss and between what it may lie, where it comes from)"""
        name, size = candidate.name, candidate.size
        if name in self.losses:
            return Interval(*[self.losses[name]] * 3), "given"
        ends = (size.active_non_embedding, size.non_embedding)  # which of the two counts is not known
        if name in self.tokens:
            losses = laws.supervised.loss(ends, self.tokens[name])
            source = f"supervised law, {format_size(self.tokens[name])} tokens"
        else:
            assumed = CHINCHILLA_TOKENS_PER_PARAM * size.non_embedding
            losses = laws.supervised.loss([*ends, size.non_embedding], [assumed, assumed, np.inf])
            source = f"supervised law, {CHINCHILLA_TOKENS_PER_PARAM:.0f} tokens per parameter assumed"
        return Interval(float(losses[1]), float(min(losses)), float(max(losses))), source

    def teacher_tokens(self, candidate: Candidate) -> float:
        assumed = CHINCHILLA_TOKENS_PER_PARAM * candidate.size.non_embedding
        return self.tokens.get(candidate.name, assumed)
