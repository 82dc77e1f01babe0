"""What a column index answers, and its parts put together (layer 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from clipbranches_widget.query_plan import QueryPlan


class BoxPart(NamedTuple):
    """The answer for a stretch of one shard's rows.

    Attributes
    ----------
    first_row : int
        The catalog row of the shard's row 0.
    local_rows : (m,) uint32
        Rows in any box, ascending; later parts hold later rows.
    box_ids : (m,) uint16
        The first box that holds each row.
    counts : (n_boxes,) int64
        Rows of each box.
    """

    first_row: int
    local_rows: NDArray[np.uint32]
    box_ids: NDArray[np.uint16]
    counts: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """Catalog rows, (m,)."""
        return np.add(self.local_rows, self.first_row, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class BoxAnswer:
    """The rows of a set of boxes.

    Attributes
    ----------
    rows : (m,) int64
        Rows in any box, ascending.
    box_ids : (m,) uint16
        The first box that holds each row.
    counts : (n_boxes,) int64
        Rows of each box.
    plan : QueryPlan
        How they were found.
    """

    rows: NDArray[np.int64]
    box_ids: NDArray[np.uint16]
    counts: NDArray[np.int64]
    plan: QueryPlan


@dataclass(frozen=True, slots=True)
class EnsembleAnswer:
    """The rows above a margin: `rows` (m,) int64 ascending, `margins` (m,) float32."""

    rows: NDArray[np.int64]
    margins: NDArray[np.float32]
    plan: QueryPlan


def join_parts(parts: Sequence[BoxPart], n_boxes: int, plan: QueryPlan) -> BoxAnswer:
    """Put the parts of `ColumnIndex.stream_boxes` together; whole shards may come in any order."""
    parts = sorted(parts, key=lambda part: part.first_row)
    return BoxAnswer(
        joined_rows(parts),
        np.concatenate([np.empty(0, np.uint16), *(part.box_ids for part in parts)]),
        np.sum([np.zeros(n_boxes, np.int64), *(part.counts for part in parts)], axis=0),
        plan,
    )


def joined_rows(parts: Sequence[tuple[Any, ...]]) -> NDArray[np.int64]:
    """Return catalog rows of parts that start with a shard's first row and local rows."""
    ends = np.cumsum([0, *(len(part[1]) for part in parts)]).tolist()
    rows = np.empty(ends[-1], dtype=np.int64)
    for part, start, stop in zip(parts, ends[:-1], ends[1:], strict=True):
        np.add(part[1], part[0], out=rows[start:stop])
    return rows
