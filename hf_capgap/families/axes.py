"""The dimension language of the family tables: which axis each dimension of a tensor runs along, and in what layout.

    "hidden"                                    one entry per unit
    "q_heads*head_dim"                          each unit owns `head_dim` consecutive entries
    "q_heads*3*head_dim"                        each unit owns 3·`head_dim` consecutive entries (interleaved qkv)
    "q_heads*head_dim + kv_heads*head_dim"      segments one after the other (fused projections)

The first name of a segment is the axis that surgery may cut; the factors after it are fixed widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch


@dataclass(frozen=True)
class Segment:
    """`axis` units, each of Π `factors` consecutive entries."""

    axis: str
    factors: tuple[str, ...] = ()

    def width(self, sizes: Mapping[str, int]) -> int:
        """Entries per unit."""
        return prod(int(factor) if factor.isdigit() else sizes[factor] for factor in self.factors)


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

    def size(self, sizes: Mapping[str, int]) -> int:
        """Number of entries when each axis has `sizes[axis]` units."""
        return sum(sizes[segment.axis] * segment.width(sizes) for segment in self.segments)

    def indices(self, sizes: Mapping[str, int], kept: Mapping[str, list[int]]) -> torch.Tensor | None:
        """Entries to keep, ascending within each segment, [kept entries] int64; None if every entry stays.

        Args:
            sizes: Units per axis before the cut.
            kept: Kept units of each axis that is cut; an axis that is not named stays whole.
        """
        if not any(segment.axis in kept for segment in self.segments):
            return None
        chosen, offset = [], 0
        for segment in self.segments:
            width = segment.width(sizes)
            units = torch.as_tensor(kept.get(segment.axis, range(sizes[segment.axis])), dtype=torch.long)
            chosen.append((offset + units[:, None] * width + torch.arange(width)).flatten())  # [units, width] -> flat
            offset += sizes[segment.axis] * width
        return torch.cat(chosen)
