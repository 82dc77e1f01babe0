"""Groups of rows that are alike, each around its first row (layer 2). Pure, exact.

The rule, *leader grouping*: rows are taken in their order. A row joins the group of the leader
before it that it is most like, if that one is within the similarity, and else leads a group of its
own. Hence every member is as similar as asked for to the row that stands for it, and no two
leaders are. Single linkage promises neither: it chains from one image to the next until the ends
of a group have nothing in common.

Similarities are exact: the float32 nearest to ``a . b / (|a| |b|)``. The elements of float16 rows
of norm 1 are multiples of 2**-24, so products are multiples of 2**-48 and their sums, below 2, are
held by float64 without rounding, in whichever order they are summed. A float32 matrix product only
proposes pairs, with a proven bound of its error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.int64]
Similarities = NDArray[np.float32]

BLOCK_ROWS = 512
_LEADERS_AT_ONCE = 16_384
_PAIR_ELEMENTS = 2**21


class Grouping(NamedTuple):
    """Which row stands for each of n rows.

    Attributes
    ----------
    leaders : (n,) int64
        Place of the row that stands for each; its own for one that stands for itself.
    similarities : (n,) float32
        To that row; 1 for itself.
    """

    leaders: Places
    similarities: Similarities


def pair_similarities(
    embeddings: NDArray[np.float16], first: Places, second: Places
) -> Similarities:
    """Return the exact cosine similarity of pairs of rows, correctly rounded to float32.

    Parameters
    ----------
    embeddings : (n, dim) float16
        Rows of norm 1 up to float16 rounding, none of them zero.
    first, second : (m,) int64
        Places of the two rows of each pair.

    Returns
    -------
    NDArray[np.float32]
        Shape (m,). Symmetric; 1 for equal rows. Cost: O(m dim).

    Examples
    --------
    >>> rows = np.array([[1, 0], [0, 1], [1, 0]], np.float16)
    >>> pair_similarities(rows, np.array([0, 0]), np.array([1, 2])).tolist()
    [0.0, 1.0]
    """
    result = np.empty(len(first), dtype=np.float32)
    at_once = max(1, _PAIR_ELEMENTS // embeddings.shape[1])
    for start in range(0, len(first), at_once):
        piece = slice(start, start + at_once)
        a = embeddings[first[piece]].astype(np.float64)
        b = embeddings[second[piece]].astype(np.float64)
        squares = np.einsum("ij,ij->i", a, a) * np.einsum("ij,ij->i", b, b)
        result[piece] = np.einsum("ij,ij->i", a, b) / np.sqrt(squares)
    return result


def leader_groups(
    embeddings: NDArray[np.float16],
    similarity: float,
    *,
    progress: Callable[[int], None] | None = None,
) -> Grouping:
    """Group rows in their order; see the module docstring for the rule.

    Parameters
    ----------
    embeddings : (n, dim) float16
        Rows of norm 1 up to float16 rounding, none of them zero, in the order of preference.
    similarity : float
        Lowest cosine similarity of a member to its leader; closed, compared as float32.
    progress
        Gets the number of rows done.

    Returns
    -------
    Grouping
        A row that is equally like two leaders joins the earlier one. Cost: O(n l dim) for l
        leaders; memory: the leaders as float32.

    Examples
    --------
    >>> rows = np.array([[1, 0], [0.8, 0.6], [0, 1], [0.6, 0.8]], np.float16)
    >>> leader_groups(rows, 0.75).leaders.tolist()
    [0, 0, 2, 2]
    """
    n_rows, dim = embeddings.shape
    limit = np.float32(similarity)
    leaders = np.arange(n_rows, dtype=np.int64)
    best = np.full(n_rows, -2.0, dtype=np.float32)
    found = _Leaders(dim)
    off = slack(dim)
    low = limit - off
    for start in range(0, n_rows, BLOCK_ROWS):
        block = unit_rows(embeddings[start : start + BLOCK_ROWS])
        rows = np.arange(start, start + len(block))
        for places, units in found.pieces():
            near = block @ units.T
            likeliest = near.max(axis=1, keepdims=True) - 2 * off
            row, column = np.nonzero(near >= np.maximum(low, likeliest))
            _join_most_similar(embeddings, rows[row], places[column], leaders, best)
        is_near = block @ block.T >= low
        new = []
        for at in range(len(block)):
            place = start + at
            if best[place] >= limit:
                continue
            new.append(at)
            leaders[place], best[place] = place, 1.0
            later = place + 1 + np.flatnonzero(is_near[at, at + 1 :])
            _join_most_similar(embeddings, later, np.full_like(later, place), leaders, best)
        found.add(rows[new], block[new])
        if progress is not None:
            progress(min(start + BLOCK_ROWS, n_rows))
    return Grouping(leaders, best)


def _join_most_similar(
    embeddings: NDArray[np.float16],
    rows: Places,
    to: Places,
    leaders: Places,
    best: Similarities,
) -> None:
    """Let rows join the leaders `to`, ascending for each row, where these are most like them."""
    if not len(rows):
        return
    similarities = pair_similarities(embeddings, rows, to)
    order = np.lexsort((to, -similarities, rows))
    rows, to, similarities = rows[order], to[order], similarities[order]
    is_first = np.append(True, rows[1:] != rows[:-1])
    is_better = is_first & (similarities > best[rows])
    leaders[rows[is_better]] = to[is_better]
    best[rows[is_better]] = similarities[is_better]


def unit_rows(embeddings: NDArray[np.float16]) -> NDArray[np.float32]:
    """Return rows scaled to norm 1 in float32, a copy of the same shape."""
    rows = embeddings.astype(np.float32)
    rows /= np.sqrt(np.einsum("ij,ij->i", rows, rows))[:, None]
    return rows


def slack(dim: int) -> np.float32:
    """Return by how much a float32 product of `unit_rows` can be off.

    ``dim * 2**-24`` for the sum of the products (Higham, Accuracy and Stability, section 3.1), and
    for the two norms half as much each and some roundings.
    """
    return np.float32((2 * dim + 16) * 2.0**-24)


class _Leaders:
    """The leaders found so far, with their rows in float32: they grow in pieces of one size."""

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._pieces: list[tuple[Places, NDArray[np.float32]]] = []
        self._n_in_last = 0

    def add(self, places: Places, units: NDArray[np.float32]) -> None:
        """Append leaders: (m,) places and (m, dim) rows."""
        while len(places):
            if not self._pieces or self._n_in_last == len(self._pieces[-1][0]):
                n_room = BLOCK_ROWS if not self._pieces else 2 * len(self._pieces[-1][0])
                n_room = min(n_room, _LEADERS_AT_ONCE)
                room = np.empty((n_room, self._dim), dtype=np.float32)
                self._pieces.append((np.empty(n_room, dtype=np.int64), room))
                self._n_in_last = 0
            kept_places, kept_units = self._pieces[-1]
            n = min(len(places), len(kept_places) - self._n_in_last)
            free = slice(self._n_in_last, self._n_in_last + n)
            kept_places[free], kept_units[free] = places[:n], units[:n]
            self._n_in_last += n
            places, units = places[n:], units[n:]

    def pieces(self) -> list[tuple[Places, NDArray[np.float32]]]:
        """Return what there is, piece by piece, in the order it was added."""
        if not self._pieces:
            return []
        places, units = self._pieces[-1]
        return [*self._pieces[:-1], (places[: self._n_in_last], units[: self._n_in_last])]
