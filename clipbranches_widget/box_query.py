"""Answer boxes and tree ensembles from the sorted columns of one shard, exactly (layer 3).

Two contracts, whatever the plan: the rows of a set of boxes are exactly the rows inside any of
them, and the rows of an ensemble above a threshold are exactly those for which
``Booster.predict(output_margin=True) > threshold``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import CodeRange, LeafBox, in_range
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.trees import TreeEnsemble

GATHER_COST = 8.0
"""Cost of reading one code at a random row, in codes read in sequence: a cache line against a
vector lane."""


@dataclass(frozen=True, slots=True)
class BoxPlan:
    """How one box is answered.

    Attributes
    ----------
    strategy : "postings" or "scan"
        Read the posting list of the narrowest range and verify the others row by row, or compare
        every code of every range.
    ranges : tuple of CodeRange
        In the order they are read: fewest rows first.
    n_read : int
        Rows read to answer: the posting list's, or all.
    """

    strategy: Literal["postings", "scan"]
    ranges: tuple[CodeRange, ...]
    n_read: int


@dataclass(frozen=True, slots=True)
class BoxAnswer:
    """The rows of a set of boxes in one shard.

    Attributes
    ----------
    rows : (m,) int64
        Shard-local rows in any box, ascending.
    by_box : tuple of (m_i,) int64
        The rows of each box, ascending.
    n_read : int
        Rows read, summed over boxes and at most the shard's rows times boxes.
    """

    rows: NDArray[np.int64]
    by_box: tuple[NDArray[np.int64], ...]
    n_read: int


@dataclass(frozen=True, slots=True)
class EnsembleAnswer:
    """The rows of one shard above a margin: `rows` (m,) int64 ascending, `margins` (m,) float32."""

    rows: NDArray[np.int64]
    margins: NDArray[np.float32]
    n_read: int


def plan_box(box: LeafBox, counts: Sequence[int], n_rows: int) -> BoxPlan:
    """Choose the cheaper strategy from counts alone, without reading a row.

    Parameters
    ----------
    box : LeafBox
    counts : sequence of int
        Rows of each of the box's ranges, in `box.ranges` order.
    n_rows : int
        Rows of the shard.

    Examples
    --------
    >>> box = LeafBox.from_bounds({0: (0, 10), 3: (200, 256)})
    >>> plan_box(box, [40, 220], 1000).strategy
    'postings'
    >>> plan_box(box, [400, 720], 1000).strategy
    'scan'
    """
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    ranges = tuple(box.ranges[i] for i in order)
    if not ranges:
        return BoxPlan("scan", (), n_rows)
    postings_cost = counts[order[0]] * (1.0 + GATHER_COST * (len(ranges) - 1))
    if postings_cost <= n_rows * len(ranges):
        return BoxPlan("postings", ranges, counts[order[0]])
    return BoxPlan("scan", ranges, n_rows)


def run_plan(columns: SortedColumns, plan: BoxPlan) -> NDArray[np.int64]:
    """Return the shard-local rows of a planned box, ascending: (m,) int64."""
    if plan.strategy == "scan":
        inside = np.ones(columns.n_rows, dtype=np.bool_)
        for column, low, high in plan.ranges:
            inside &= in_range(columns.codes[column], low, high)
        return np.flatnonzero(inside)
    rows = columns.posting_list(plan.ranges[0]).astype(np.int64)
    for column, low, high in plan.ranges[1:]:
        rows = rows[in_range(columns.codes[column, rows], low, high)]
    rows.sort()
    return rows


def rows_in_boxes(columns: SortedColumns, boxes: Sequence[LeafBox]) -> BoxAnswer:
    """Return exactly the rows inside any of `boxes`, and those of each."""
    plans = [plan_box(box, [columns.count(r) for r in box.ranges], columns.n_rows) for box in boxes]
    by_box = tuple(run_plan(columns, plan) for plan in plans)
    inside = np.zeros(columns.n_rows, dtype=np.bool_)
    for rows in by_box:
        inside[rows] = True
    return BoxAnswer(np.flatnonzero(inside), by_box, sum(plan.n_read for plan in plans))


def rows_above(columns: SortedColumns, ensemble: TreeEnsemble, threshold: float) -> EnsembleAnswer:
    """Return exactly the rows whose margin is above `threshold`.

    Candidate leaves are chosen by upper bounds; their rows come from the index, and the margin
    is summed only for them. When that would read more than a scan, it is a scan.
    """
    limit = np.float32(threshold)
    leaves = candidate_leaves(columns, ensemble, limit)
    if leaves is None:
        margins = ensemble.margins(columns.codes)
        rows = np.flatnonzero(margins > limit)
        return EnsembleAnswer(rows, margins[rows], columns.n_rows)
    answer = rows_in_boxes(columns, leaves)
    margins = ensemble.margins(columns.codes[:, answer.rows])
    above = margins > limit
    return EnsembleAnswer(answer.rows[above], margins[above], answer.n_read)


def candidate_leaves(
    columns: SortedColumns, ensemble: TreeEnsemble, limit: np.float32
) -> list[LeafBox] | None:
    """Choose leaves so that no row outside all of them can have a margin above `limit`.

    Outside the chosen leaves a row gets at most the largest leaf left in each tree. Float32
    addition is monotone, so the sum of those, in tree order, bounds its margin exactly. Leaves
    are taken greedily: the tree whose best leaf lowers the bound most per row of the index.

    Returns None when the chosen leaves would read at least as many rows as a scan.
    """
    remaining = [
        sorted(boxes, key=lambda box: box.value, reverse=True) for boxes in ensemble.leaf_boxes()
    ]
    chosen: list[LeafBox] = []
    n_read = 0
    while _bound(ensemble, remaining) > limit:
        best, best_gain, best_cost = -1, -1.0, 0
        for index, leaves in enumerate(remaining):
            if not leaves:
                continue
            gain = leaves[0].value - (leaves[1].value if len(leaves) > 1 else -np.inf)
            narrowest = columns.narrowest(leaves[0])
            cost = columns.n_rows if narrowest is None else columns.count(narrowest)
            if gain / (cost + 1) > best_gain:
                best, best_gain, best_cost = index, gain / (cost + 1), cost
        n_read += best_cost
        if n_read >= columns.n_rows:
            return None
        chosen.append(remaining[best].pop(0))
    return chosen


def _bound(ensemble: TreeEnsemble, remaining: Sequence[Sequence[LeafBox]]) -> np.float32:
    """Sum the largest remaining leaf of each tree, in float32 and tree order."""
    bound = ensemble.base_margin
    for leaves in remaining:
        if not leaves:
            return np.float32(-np.inf)
        bound = bound + np.float32(leaves[0].value)
    return bound
