"""The compiled loops of decision branches; what they do stands in `quality_branches`."""

# ruff: noqa: PLR0917 - compiled functions take positional arguments only
# ruff: noqa: NPY002 - compiled code has NumPy's old generator only

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.floating]
Edges = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Boxes = tuple[Numbers, Numbers, Edges, Edges]

_compiled = numba.njit(cache=True, nogil=True)
_YES, _NO, _ALL_YES, _ALL_NO = 0, 1, 2, 3


@_compiled
def _gini(counts: Numbers) -> float:
    """Return the impurity inside and outside, each weighted by its rows.

    `counts` are yes and no rows inside, yes and no rows in all.
    """
    n_inside = counts[_YES] + counts[_NO]
    yes_out, no_out = counts[_ALL_YES] - counts[_YES], counts[_ALL_NO] - counts[_NO]
    n_outside = yes_out + no_out
    total: float = 0.0
    if n_inside > 0:
        total += n_inside - (counts[_YES] ** 2 + counts[_NO] ** 2) / n_inside
    if n_outside > 0:
        total += n_outside - (yes_out**2 + no_out**2) / n_outside
    impurity: float = total / (n_inside + n_outside)
    return impurity


@_compiled
def _start(
    x: Table, is_yes: Flags, alive: Flags, at: int, order: Numbers, low: Edges, high: Edges
) -> None:
    """Set the box around row `at`: its first feature to the nearest rows, others to nearest yes."""
    for position in range(len(order)):
        here = x[at, order[position]]
        below, above = -np.inf, np.inf
        for row in range(len(x)):
            if alive[row] and (position == 0 or is_yes[row]):
                value = x[row, order[position]]
                if value < here:
                    below = max(below, value)
                elif value > here:
                    above = min(above, value)
        if position > 0:
            below = here if below == -np.inf else below
            above = here if above == np.inf else above
        low[position], high[position] = below, above


@_compiled
def _count(
    x: Table, is_yes: Flags, alive: Flags, order: Numbers, low: Edges, high: Edges, counts: Numbers
) -> Numbers:
    """Return how many features keep each row out; fill `counts`."""
    n_keep_out = np.zeros(len(x), dtype=np.int64)
    for row in range(len(x)):
        if not alive[row]:
            continue
        for position in range(len(order)):
            value = x[row, order[position]]
            if value < low[position] or value > high[position]:
                n_keep_out[row] += 1
        kind = _YES if is_yes[row] else _NO
        counts[_ALL_YES + kind] += 1
        if n_keep_out[row] == 0:
            counts[kind] += 1
    return n_keep_out


@_compiled
def _move(values: Edges, is_yes: Flags, border: float, limit: int, counts: Numbers) -> float:
    """Return where a border goes.

    `values` are those of the rows that only this border keeps out; all of them are larger than
    the border. `counts` follow.
    """
    if len(values) == 0:
        return np.inf
    order = np.argsort(values)
    best, best_at = _gini(counts), -1
    tried, kept = counts.copy(), counts.copy()
    position, n_distinct = 0, 0
    while position < len(order) and n_distinct < limit:
        value = values[order[position]]
        while position < len(order) and values[order[position]] == value:
            tried[_YES if is_yes[order[position]] else _NO] += 1
            position += 1
        n_distinct += 1
        score = _gini(tried)
        if score < best:
            best, best_at = score, position
            kept[:] = tried
    moved: float = np.inf
    if best_at < 0:
        moved = (border + values[order[0]]) / 2
    elif best_at < len(order):
        moved = (values[order[best_at - 1]] + values[order[best_at]]) / 2
    if best_at > 0:
        counts[:] = kept
    return moved


@_compiled
def _expand(
    x: Table,
    is_yes: Flags,
    alive: Flags,
    feature: int,
    side: int,
    border: float,
    limit: int,
    n_keep_out: Numbers,
    counts: Numbers,
) -> float:
    """Move one border, `side` -1 for the lower one; values and border are times `side`."""
    values, kinds = np.empty(len(x)), np.empty(len(x), dtype=np.bool_)
    n_found = 0
    for row in range(len(x)):
        if alive[row] and n_keep_out[row] == 1 and side * x[row, feature] > border:
            values[n_found], kinds[n_found] = side * x[row, feature], is_yes[row]
            n_found += 1
    moved = _move(values[:n_found], kinds[:n_found], border, limit, counts)
    for row in range(len(x)):
        if alive[row] and border < side * x[row, feature] <= moved:
            n_keep_out[row] -= 1
    return moved


@_compiled
def _grow(
    x: Table,
    is_yes: Flags,
    alive: Flags,
    at: int,
    order: Numbers,
    limit: int,
    low: Edges,
    high: Edges,
) -> float:
    """Grow the box of row `at` in the features `order`; return its impurity."""
    _start(x, is_yes, alive, at, order, low, high)
    counts = np.zeros(4, dtype=np.int64)
    n_keep_out = _count(x, is_yes, alive, order, low, high, counts)
    for position in range(len(order)):
        feature = order[position]
        border = -low[position]
        low[position] = -_expand(x, is_yes, alive, feature, -1, border, limit, n_keep_out, counts)
        border = high[position]
        high[position] = _expand(x, is_yes, alive, feature, 1, border, limit, n_keep_out, counts)
    return _gini(counts)


@_compiled
def _is_in(x: Table, row: int, features: Numbers, width: int, low: Edges, high: Edges) -> bool:
    for each in range(width):
        value = x[row, features[each]]
        if value < low[each] or value > high[each]:
            return False
    return True


@_compiled
def member_boxes(
    x: Table,
    is_yes: Flags,
    subsets: Numbers,
    sizes: Numbers,
    limit: int,
    max_boxes: int,
    seed: int,
) -> Boxes:
    """Return one member's boxes.

    Parameters
    ----------
    x : (m, 32) float
    is_yes : (m,) bool
    subsets : (s, 8) int64
    sizes : (s,) int64
        How many entries of a line of `subsets` count.
    limit : int
        Distinct values that a border may move over.
    max_boxes, seed : int

    Returns
    -------
    features : (b, 8) int64
    widths : (b,) int64
    lows, highs : (b, 8) float64
    """
    np.random.seed(seed)
    n_boxes, widest = 0, subsets.shape[1]
    features = np.zeros((max_boxes, widest), dtype=np.int64)
    widths = np.zeros(max_boxes, dtype=np.int64)
    lows, highs = np.zeros((max_boxes, widest)), np.zeros((max_boxes, widest))
    alive = np.ones(len(x), dtype=np.bool_)
    low, high = np.zeros(widest), np.zeros(widest)
    while n_boxes < max_boxes:
        left = np.flatnonzero(alive & is_yes)
        if len(left) == 0 or alive.sum() < 2:
            break
        at = left[np.random.randint(len(left))]
        best = np.inf
        for number in np.random.permutation(len(subsets))[: (len(subsets) + 1) // 2]:
            order = np.random.permutation(subsets[number, : sizes[number]])
            score = _grow(x, is_yes, alive, at, order, limit, low, high)
            if score < best:
                best, widths[n_boxes] = score, len(order)
                features[n_boxes, : len(order)] = order
                lows[n_boxes], highs[n_boxes] = low, high
        for row in range(len(x)):
            if _is_in(x, row, features[n_boxes], widths[n_boxes], lows[n_boxes], highs[n_boxes]):
                alive[row] = False
        n_boxes += 1
    return features[:n_boxes], widths[:n_boxes], lows[:n_boxes], highs[:n_boxes]


@_compiled
def vote(
    x: Table, features: Numbers, widths: Numbers, lows: Edges, highs: Edges, votes: Table
) -> None:
    """Add one to the votes of every row in any box."""
    for row in range(len(x)):
        for box in range(len(widths)):
            if _is_in(x, row, features[box], widths[box], lows[box], highs[box]):
                votes[row] += 1.0
                break
