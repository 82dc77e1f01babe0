"""Leaf boxes (layer 1): conjunctions of code ranges, the unit every index query is made of.

A *code* is the 8-bit bin of one indexed column. A range is half open, ``low <= code < high``; a
box is the conjunction of its ranges, and a box without ranges holds every row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

N_CODES = 256
"""Codes per column: one byte."""


class CodeRange(NamedTuple):
    """One half-open range of codes, ``low <= code < high``, of one column."""

    column: int
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class LeafBox:
    """A conjunction of code ranges, at most one a column, in column order.

    Ranges that span all 256 codes are dropped, so equal boxes compare equal.

    Parameters
    ----------
    ranges : tuple of CodeRange
        The conditions; ``low`` in 0..255, ``high`` in 1..256, ``low < high``.
    value : float
        The leaf value (a float32) that a tree gives its rows.
    tree : int
        Index of the tree in its ensemble; -1 when the box is not a leaf.

    Examples
    --------
    >>> box = LeafBox.from_bounds({2: (10, 256), 0: (0, 256)}, value=1.5)
    >>> box.ranges
    (CodeRange(column=2, low=10, high=256),)
    >>> codes = np.array([[0, 0], [0, 0], [9, 10]], dtype=np.uint8)
    >>> box.contains(codes)
    array([False,  True])
    """

    ranges: tuple[CodeRange, ...]
    value: float = 0.0
    tree: int = -1

    @classmethod
    def from_bounds(
        cls, bounds: Mapping[int, tuple[int, int]], *, value: float = 0.0, tree: int = -1
    ) -> LeafBox:
        """Build a box from ``{column: (low, high)}``; raises ValueError on an empty range."""
        for column, (low, high) in bounds.items():
            if not 0 <= low < high <= N_CODES:
                raise ValueError(
                    f"expected 0 <= low < high <= 256 for column {column}, got [{low}, {high})"
                )
        return cls(
            tuple(
                CodeRange(column, low, high)
                for column, (low, high) in sorted(bounds.items())
                if (low, high) != (0, N_CODES)
            ),
            value,
            tree,
        )

    def contains(self, codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Return which of the rows of `codes`, (D, n) uint8, are inside: (n,) bool."""
        inside = np.ones(codes.shape[1], dtype=np.bool_)
        for column, low, high in self.ranges:
            inside &= in_range(codes[column], low, high)
        return inside

    def intersect(self, other: LeafBox) -> LeafBox | None:
        """Return the box of the rows in both (leaf value and tree of `self`), None when empty."""
        bounds = {column: (low, high) for column, low, high in self.ranges}
        for column, low, high in other.ranges:
            mine = bounds.get(column, (0, N_CODES))
            bounds[column] = (max(mine[0], low), min(mine[1], high))
        if any(low >= high for low, high in bounds.values()):
            return None
        return LeafBox.from_bounds(bounds, value=self.value, tree=self.tree)

    def to_text(self, names: Sequence[str], edges: NDArray[np.float32]) -> str:
        """Say the box as a rule on named columns.

        Parameters
        ----------
        names : sequence of str
            Column names, D of them.
        edges : (D, 255) float32
            Inner bin edges: code ``c`` holds ``edges[c - 1] <= value < edges[c]``.

        Examples
        --------
        >>> edges = np.linspace(0, 1, 255, dtype=np.float32)[None, :]
        >>> LeafBox.from_bounds({0: (128, 256)}).to_text(["bird"], edges)
        'bird >= 0.500'
        >>> LeafBox.from_bounds({}).to_text(["bird"], edges)
        'every image'
        """
        terms = []
        for column, low, high in self.ranges:
            if low > 0:
                terms.append(f"{names[column]} >= {edges[column, low - 1]:.3f}")
            if high < N_CODES:
                terms.append(f"{names[column]} < {edges[column, high - 1]:.3f}")
        return " and ".join(terms) or "every image"


def in_range(codes: NDArray[np.uint8], low: int, high: int) -> NDArray[np.bool_]:
    """Return ``low <= codes < high`` for uint8 codes, in one comparison.

    The subtraction wraps around modulo 256, so that one unsigned comparison tests both bounds.
    """
    if high - low == N_CODES:
        return np.ones(codes.shape, dtype=np.bool_)
    above_low = codes - np.uint8(low)
    inside = above_low.view(np.bool_)  # in place: a second array would cost more than the work
    np.less(above_low, np.uint8(high - low), out=inside)
    return inside


def union_mask(boxes: Iterable[LeafBox], codes: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which rows of (D, n) `codes` are in any box, by a full scan: (n,) bool."""
    inside = np.zeros(codes.shape[1], dtype=np.bool_)
    for box in boxes:
        inside |= box.contains(codes)
    return inside
