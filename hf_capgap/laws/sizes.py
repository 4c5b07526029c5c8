"""Sizes as people write them ("3B"), and the checks that every law makes on what it is given."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from ..errors import LawError

_UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(?P<unit>[kKmMbBtT]?)\s*")

# No language model has fewer parameters, and none learns from fewer tokens: such a number lacks its unit.
SMALLEST_COUNT = 1_000.0
# A uniform guess over a million tokens has 13.8 nats: a "loss" above this is another quantity.
LARGEST_LOSS = 15.0
# Text has more entropy than this; a loss below it is of a model that saw the answers, or is another quantity.
SMALLEST_LOSS = 1e-3
_LARGEST_SIZE = 1e18  # far above any model and any text, far below where products of sizes overflow


class ExtrapolationWarning(UserWarning):
    """A law is asked about a point outside the range in which it was measured."""


def parse_size(text: str | float) -> float:
    """The number that a size such as `"3B"`, `"350M"`, `"1.5e12"` or `3e9` stands for.

    Raises:
        LawError: Not a size, one that lacks its unit ("3"), or one above 1e18.
    """
    if isinstance(text, str):
        match = _SIZE.fullmatch(text)
        if match is None:
            raise LawError("Not a size", found=text, fix='Write "3B", "350M", "100B" or a plain number.')
        text = float(match["number"]) * _UNITS[match["unit"].upper()]
    size = float(check_counts("size", text))
    if size > _LARGEST_SIZE:
        raise LawError(f"size is larger than {_LARGEST_SIZE:g}, which no model or text has", found=f"{size:g}")
    return size


def format_size(count: float) -> str:
    """A count with three significant digits and its unit: 3.09B."""
    if not np.isfinite(count):
        return str(count)
    unit = max((unit for unit in _UNITS if _UNITS[unit] <= max(1.0, count * 1.0005)), key=_UNITS.__getitem__)
    return f"{count / _UNITS[unit]:.3g}{unit}"


def check_counts(name: str, values: ArrayLike, smallest: float = SMALLEST_COUNT) -> np.ndarray:
    """Parameters or tokens as float64, of the shape given; below `smallest` the unit must have been left out.

    Raises:
        LawError: Not numbers, not finite, not positive, or so small that the unit must have been left out.
    """
    array = _numbers(name, values)
    small = array[array < smallest]
    if small.size:
        found = float(small.flat[0])
        raise LawError(
            f"{name} is less than {smallest:,.0f}, which no language model has",
            found=f"{found:g}",
            fix=f"Did you mean {found:g}e9 ({found:g}B)? Sizes are in single parameters and tokens.",
        )
    return array


def check_losses(name: str, values: ArrayLike) -> np.ndarray:
    """Cross-entropies in nats per token as float64, of the shape given.

    Raises:
        LawError: Not numbers, not finite, not positive, or so large or small that it is another quantity.
    """
    array = _numbers(name, values)
    large = array[array > LARGEST_LOSS]
    if large.size:
        found = float(large.flat[0])
        raise LawError(
            f"{name} is larger than any cross-entropy in nats per token",
            found=f"{found:g}",
            fix=f"Is it a perplexity? Its cross-entropy is ln({found:g}) = {np.log(found):.3f}.",
        )
    small = array[array < SMALLEST_LOSS]
    if small.size:
        raise LawError(f"{name} is smaller than any cross-entropy of text", found=f"{float(small.flat[0]):g}")
    return array


def _numbers(name: str, values: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise LawError(f"{name} is not a number", found=values, fix='parse_size reads "3B".') from error
    for wrong, cause in ((~np.isfinite(array), "is not finite"), (array <= 0, "must be positive")):
        if wrong.any():
            raise LawError(f"{name} {cause}", found=array[wrong].flat[0])
    return array


def warn_outside(law: str, ranges: Mapping[str, tuple[float, float]], **values: np.ndarray) -> list[str]:
    """Warn of values outside the ranges in which `law` was measured.

    Returns:
        What was said, one sentence per value that is outside.
    """
    said = outside(law, ranges, **values)
    for sentence in said:
        warnings.warn(sentence, ExtrapolationWarning, stacklevel=3)
    return said


def outside(law: str, ranges: Mapping[str, tuple[float, float]], **values: ArrayLike) -> list[str]:
    """One sentence for each of `values` that leaves its range in `ranges`, which it names."""
    sentences = []
    for name, (low, high) in ranges.items():
        array = np.asarray(values.get(name, low), dtype=np.float64)
        if (array < low * (1 - 1e-9)).any() or (array > high * (1 + 1e-9)).any():
            show = format_size if name.startswith("num_") else "{:.3f}".format
            seen = show(array.min()) if array.min() == array.max() else f"{show(array.min())} to {show(array.max())}"
            sentences.append(
                f"{law} was measured for {name} from {show(low)} to {show(high)}; {seen} is an extrapolation"
            )
    return sentences
