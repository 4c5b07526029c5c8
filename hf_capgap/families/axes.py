"""The dimension language of the family tables: which axis each dimension of a tensor runs along, and in what layout.

    "hidden"                                    one entry per unit
    "q_heads*head_dim"                          each unit owns `head_dim` consecutive entries
    "q_heads*3*head_dim"                        each unit owns 3·`head_dim` consecutive entries (interleaved qkv)
    "q_heads*head_dim + kv_heads*head_dim"      segments one after the other (fused projections)
    "positions + 2"                             a number instead of an axis: so many entries that no axis owns

The first name of a segment is the axis that surgery may cut; the factors after it are fixed widths.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod

import numpy as np


@dataclass(frozen=True)
class Segment:
    """`axis` units, each of Π `factors` consecutive entries."""

    axis: str
    factors: tuple[str, ...] = ()

    def num_units(self, sizes: Mapping[str, int]) -> int:
        return _number(self.axis, sizes)

    def width(self, sizes: Mapping[str, int]) -> int:
        """Entries per unit."""
        return prod(_number(factor, sizes) for factor in self.factors)


@dataclass(frozen=True)
class Dimension:
    """One dimension of a tensor: segments laid one after the other."""

    segments: tuple[Segment, ...]

    @staticmethod
    @cache
    def parse(text: str) -> Dimension:
        """Read `"axis*factor*… + axis*factor*…"`."""
        parts = [[name.strip() for name in segment.split("*")] for segment in text.split("+")]
        return Dimension(tuple(Segment(axis, tuple(factors)) for axis, *factors in parts))

    @property
    def axes(self) -> set[str]:
        """The axes that run along this dimension."""
        return {segment.axis for segment in self.segments}

    def size(self, sizes: Mapping[str, int]) -> int:
        """Number of entries when each axis has `sizes[axis]` units."""
        return sum(segment.num_units(sizes) * segment.width(sizes) for segment in self.segments)

    def indices(self, sizes: Mapping[str, int], kept: Mapping[str, Sequence[int]]) -> np.ndarray | None:
        """Entries to keep, ascending within each segment, [kept entries] int64; None if every entry stays.

        Args:
            sizes: Units per axis before the cut.
            kept: Kept units of each axis that is cut; an axis that is not named stays whole.
        """
        if not any(segment.axis in kept for segment in self.segments):
            return None
        chosen = []
        for segment, offset, width in self._layout(sizes):
            units = np.asarray(kept.get(segment.axis, range(segment.num_units(sizes))), dtype=np.int64)
            chosen.append((offset + units[:, None] * width + np.arange(width)).ravel())  # [units, width] -> flat
        return np.concatenate(chosen)

    def owners(self, axis: str, sizes: Mapping[str, int]) -> np.ndarray:
        """The unit of `axis` that each entry belongs to, [entries] int64; -1 for entries of other axes."""
        units = np.full(self.size(sizes), -1, dtype=np.int64)
        for segment, offset, width in self._layout(sizes):
            if segment.axis == axis:
                num_units = segment.num_units(sizes)
                units[offset : offset + num_units * width] = np.repeat(np.arange(num_units), width)
        return units

    def _layout(self, sizes: Mapping[str, int]) -> Iterator[tuple[Segment, int, int]]:
        """(segment, its first entry, entries per unit)"""
        offset = 0
        for segment in self.segments:
            width = segment.width(sizes)
            yield segment, offset, width
            offset += segment.num_units(sizes) * width


def _number(name: str, sizes: Mapping[str, int]) -> int:
    return int(name) if name.isdigit() else sizes[name]
