"""From a target size ("40%", "1.2B", "2.5x") to the legal student shape nearest to it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..errors import ConfigError, ShapeError
from ..families import Config, family_for
from .scores import ExpressiveScores
from .shapes import StudentShape

SPLITS = ("balanced", "scores")

_UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_TARGET = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|x(?:\s+smaller)?|[kmbt]?)\s*", re.IGNORECASE)

# One percent off the target count weighs as much as five percent of imbalance between the dimensions, or five percent
# of the score mass of one of them.
_COUNT_TOLERANCE, _SPLIT_TOLERANCE = 0.01, 0.05
_FARTHEST = math.log(1.10)  # a legal shape that misses the target by more is refused, not passed off as an answer
_FEWEST_HIDDEN_SIZES = 8
_STEPS = (256, 128, 64, 32, 16, 8, 1)

# (hidden, KV groups, neurons) -> how bad the split of the cut between them is; a NumPy array for arrays.
SplitCost = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


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
    cost: float


def solve_shape(
    config: Config,
    target: str | int,
    *,
    num_hidden_layers: int | None = None,
    num_experts: int | None = None,
    multiple_of: int | None = None,
    tensor_parallel: int = 1,
    split: str = "balanced",
    scores: ExpressiveScores | None = None,
) -> StudentShape:
    """The legal shape whose parameter count is nearest to `target`, with a good split between the dimensions.

    `split="balanced"`: hidden size, heads and neurons keep about the same fraction of their units, so that a weight
    matrix keeps that fraction's square: the "square-root" split of the reference implementation (arXiv 2311.07052).
    `split="scores"`: of the shapes of this size, the one that loses the smallest shares of the scores of hidden
    dimensions, heads and neurons together. Layers and experts are kept unless said otherwise.

    Args:
        config: The teacher's config.
        target: See `parse_target`. Counts are of all parameters, embeddings included, tied ones once.
        num_hidden_layers: Layers of the student; the teacher's if None.
        num_experts: Experts of each layer of the student; the teacher's if None.
        multiple_of: Hidden size and neurons are multiples of this, or the teacher's own; if None the largest of 256,
            128, … 8 that is at most a sixteenth of the teacher's own and leaves a choice.
        tensor_parallel: KV groups and neurons are divisible by so many devices.
        split: `"balanced"` or `"scores"`.
        scores: The teacher's scores, for `split="scores"`.

    Raises:
        ShapeError: An impossible target, or no legal shape within 10 % of it. The message gives the nearest legal one.
        ConfigError: An unknown split, or one without its scores.
    """
    teacher = StudentShape.of(config)
    num_teacher_parameters = teacher.num_parameters(config)
    count = parse_target(target, num_teacher_parameters)
    base = replace(
        teacher,
        num_hidden_layers=teacher.num_hidden_layers if num_hidden_layers is None else num_hidden_layers,
        num_experts=teacher.num_experts if num_experts is None else num_experts,
    )
    # Where hidden = heads × head_dim the base keeps its own, legal sizes.
    base.check_within(config)
    cost = _split_cost(split, scores, base)
    if (multiple_of is not None and multiple_of < 1) or tensor_parallel < 1:
        raise ShapeError("multiple_of and tensor_parallel must be at least 1", found=(multiple_of, tensor_parallel))
    steps = _default_multiples(config, base) if multiple_of is None else (multiple_of, multiple_of)
    candidates = list(_candidates(config, base, count, steps, tensor_parallel, cost))
    if not candidates:
        raise ShapeError(
            "No legal shape has these multiples",
            found=f"multiple_of={multiple_of or steps}, tensor_parallel={tensor_parallel}",
            fix="Lower them.",
        )
    close = [candidate for candidate in candidates if candidate.count_error <= _FARTHEST]
    if close:
        return min(close, key=lambda candidate: candidate.cost).shape
    nearest = min(candidates, key=lambda candidate: candidate.count_error)
    raise ShapeError(
        f"No legal shape has about {count:,} parameters",
        found=target,
        fix=f"The nearest legal one has {nearest.num_parameters:,} "
        f"({nearest.num_parameters / num_teacher_parameters:.1%}): {nearest.shape}.",
    )


def _default_multiples(config: Config, base: StudentShape) -> tuple[int, int]:
    """(of the hidden size, of the neurons): the largest that leave a choice.

    Where hidden = heads × head_dim only every so many steps are legal; experts are narrower than the hidden size.
    """
    steps = _steps_within(base.hidden_size)
    step = next((s for s in steps if len(_legal_widths(config, base, s)) >= _FEWEST_HIDDEN_SIZES), steps[-1])
    return step, min(step, _steps_within(base.intermediate_size)[0])


def _steps_within(size: int) -> list[int]:
    return [step for step in _STEPS if step <= size // 16] or [1]


def _legal_widths(config: Config, base: StudentShape, step: int, parallel: int = 1) -> dict[int, list[int]]:
    """{hidden size: [numbers of KV groups]} that the family's rules allow together."""
    family, queries = family_for(config), base.queries_per_group
    sizes = {**family.sizes(config), **base.sizes()}
    legal = {
        hidden: [
            groups
            for groups in range(parallel, base.num_key_value_heads + 1, parallel)
            if not family.broken_rules({**sizes, "hidden": hidden, "kv_heads": groups, "q_heads": groups * queries})
        ]
        for hidden in _multiples(base.hidden_size, math.lcm(step, family.multiples.get("hidden", 1)))
    }
    return {hidden: groups for hidden, groups in legal.items() if groups}


def _candidates(
    config: Config, base: StudentShape, count: int, steps: tuple[int, int], parallel: int, cost: SplitCost
) -> Iterator[_Candidate]:
    """Every legal hidden size and number of KV groups, each with the two legal neurons nearest to the count."""
    queries = base.queries_per_group
    hidden_step, neuron_step = steps
    neuron_step = math.lcm(neuron_step, family_for(config).multiples.get("neurons", 1))
    neuron_choices = np.array([n for n in _multiples(base.intermediate_size, neuron_step) if n % parallel == 0])
    widths = _legal_widths(config, base, hidden_step, parallel)
    legal = np.array([(hidden, groups) for hidden, choices in widths.items() for groups in choices])
    if not len(legal) or not len(neuron_choices):
        return
    hidden, num_groups = legal.T  # [shapes] each
    at_zero, per_neuron = _count_line(config, base, hidden, num_groups)
    wanted = (count - at_zero) / per_neuron
    above = np.searchsorted(neuron_choices, wanted)
    for index in (above - 1, above):
        inside = (index >= 0) & (index < len(neuron_choices))
        neurons = neuron_choices[index[inside]]
        num_parameters = at_zero[inside] + neurons * per_neuron[inside]
        count_error = np.abs(np.log(num_parameters / count))
        total = count_error / _COUNT_TOLERANCE + cost(hidden[inside], num_groups[inside], neurons) / _SPLIT_TOLERANCE
        rows = zip(hidden[inside], num_groups[inside], neurons, num_parameters, count_error, total, strict=True)
        for h, k, n, size, error, value in rows:
            shape = replace(
                base, hidden_size=h, num_key_value_heads=k, num_attention_heads=k * queries, intermediate_size=n
            )
            yield _Candidate(shape, int(size), float(error), float(value))


def _count_line(
    config: Config, base: StudentShape, hidden: np.ndarray, num_groups: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Parameter counts as lines in the neurons, (at zero, per neuron), for each hidden size and number of KV groups.

    No tensor has one of these axes twice, so that the count is linear in each: eight corners give the whole.
    """
    family = family_for(config)

    def corner(h: int, k: int, n: int) -> int:
        return family.num_parameters(
            config, {**base.sizes(), "hidden": h, "kv_heads": k, "q_heads": k * base.queries_per_group, "neurons": n}
        )

    def plane(n: int) -> np.ndarray:
        c = {(h, k): corner(h, k, n) for h in (0, 1) for k in (0, 1)}
        return (
            c[0, 0]
            + (c[1, 0] - c[0, 0]) * hidden
            + (c[0, 1] - c[0, 0]) * num_groups
            + (c[1, 1] - c[1, 0] - c[0, 1] + c[0, 0]) * hidden * num_groups
        )

    at_zero = plane(0)
    return at_zero, plane(1) - at_zero


def _multiples(limit: int, step: int) -> list[int]:
    """Multiples of `step` up to `limit`, and `limit` itself, which the teacher already has."""
    return sorted({*range(step, limit + 1, step), limit})


def _split_cost(split: str, scores: ExpressiveScores | None, base: StudentShape) -> SplitCost:
    if split not in SPLITS:
        raise ConfigError("Unknown split between the dimensions", found=split, fix=f"Choose one of: {SPLITS}.")
    if (split == "scores") != (scores is not None):
        raise ConfigError(
            "split='scores' and scores= belong together", found=f"split={split!r}", fix="Give both, or neither."
        )
    return _imbalance(base) if scores is None else _lost_shares(scores)


def _imbalance(base: StudentShape) -> SplitCost:
    """Spread of the logarithms of the kept fractions."""
    full = (base.hidden_size, base.num_key_value_heads, base.intermediate_size)

    def cost(*kept: np.ndarray) -> np.ndarray:
        fractions = np.log(np.stack([units / size for units, size in zip(kept, full, strict=True)]))
        return fractions.max(0) - fractions.min(0)

    return cost


def _lost_shares(scores: ExpressiveScores) -> SplitCost:
    """Sum over hidden, heads and neurons of the share of the scores that goes with the removed units."""
    shares = [_kept_shares(tensor.numpy()) for tensor in (scores.hidden, scores.heads, scores.neurons)]
    return lambda *kept: sum(1 - share[units] for share, units in zip(shares, kept, strict=True))


def _kept_shares(scores: np.ndarray) -> np.ndarray:
    """Share of the scores that the n best of the last dimension have, averaged over the others, [units + 1]."""
    positive = np.clip(scores.astype(np.float64), 0, None)  # movement scores can be negative: nothing to lose there
    best_first = -np.sort(-positive.reshape(-1, positive.shape[-1]), axis=1)
    totals = best_first.sum(1, keepdims=True)
    shares = np.cumsum(best_first, axis=1) / np.where(totals > 0, totals, 1)
    return np.concatenate([[0.0], shares.mean(0)])
