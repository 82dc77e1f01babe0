"""What a round scored, and the rule that each row of its answer came by (layer 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.branch import Branch

NEAR_TEXT = "near your examples"
LABELLED_TEXT = "marked yes by you"
N_EXAMPLE_ROWS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Every row that a round scored, in the answer or not.

    Attributes
    ----------
    rows : (m,) int64
        Ascending.
    scores : (m,) float32
        The teacher's, whatever the labels say.
    box_ids : (m,) int32
        The first box that holds each row, an index into `Result.branches`; -1 for a row in none.
    margins : callable
        Returns the margins of `rows`, (m,) float32: read from the column index by the first
        call, kept for the others.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    box_ids: NDArray[np.int32]
    margins: Callable[[], NDArray[np.float32]] = field(repr=False)

    def filtered(self, passing: NDArray[np.bool_]) -> Pool:
        """Return the rows that pass a mask of the catalog's rows, (n,) bool."""
        kept = passing[self.rows]
        return Pool(
            self.rows[kept], self.scores[kept], self.box_ids[kept], lambda: self.margins()[kept]
        )


def with_other_sources(
    boxes: Sequence[Branch],
    rows: NDArray[np.int64],
    box_ids: NDArray[np.int32],
    is_yes: NDArray[np.bool_],
) -> tuple[tuple[Branch, ...], NDArray[np.int32]]:
    """Name the main branch of each row of an answer.

    It is the first box that holds the row: the cover takes the most telling boxes first. Rows in
    no box came from the vector index or from a label; a branch each is added for those.

    Parameters
    ----------
    boxes : sequence of Branch
        The boxes.
    rows : (m,) int64
        The answer, best first.
    box_ids : (m,) int32
        The branch of the first box that holds each row; -1 for none.
    is_yes : (m,) bool
        Whether it is labelled yes.

    Returns
    -------
    branches : tuple of Branch
        `boxes`, then the other sources that rows came from; each with its example rows.
    branch_ids : (m,) int32
    """
    branches, branch_ids = list(boxes), box_ids.copy()
    is_other = box_ids < 0
    for text, is_member in ((NEAR_TEXT, is_other & ~is_yes), (LABELLED_TEXT, is_other & is_yes)):
        if n_members := int(is_member.sum()):
            branch_ids[is_member] = len(branches)
            members = tuple(np.sort(rows[is_member]).tolist())
            n_positive = int((is_member & is_yes).sum())
            branches.append(
                Branch(len(branches), text, n_members, n_positive, n_negative=0, rows=members)
            )
    return with_examples(branches, rows, branch_ids), branch_ids


def with_examples(
    branches: Sequence[Branch], rows: NDArray[np.int64], branch_ids: NDArray[np.int32]
) -> tuple[Branch, ...]:
    """Return branches with the best rows of an answer whose main branch each is."""
    best = [rows[np.flatnonzero(branch_ids == n)[:N_EXAMPLE_ROWS]] for n in range(len(branches))]
    examples = zip(branches, best, strict=True)
    return tuple(replace(one, example_rows=tuple(few.tolist())) for one, few in examples)
