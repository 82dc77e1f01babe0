"""The opened indexes of a catalog on this machine (layer 4): one set of row ids for all shards.

Opening maps files; nothing is read until a row is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.index_protocol import Rows, ScoredPart
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.shard import Shard
from clipbranches_widget.shard_search import Nearest, nearest
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.vector_index import unit_query

if TYPE_CHECKING:
    import threading

    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.query_plan import BoxStrategy, QueryPlan
    from clipbranches_widget.teacher import Teacher
    from clipbranches_widget.trees import TreeEnsemble


@dataclass(frozen=True)
class ShardIndex:
    """One shard's column index, opened when first used."""

    catalog: Catalog
    shard: Shard
    n_columns: int

    @cached_property
    def columns(self) -> SortedColumns:
        """The sorted columns."""
        return SortedColumns.open(
            self.shard.path, n_columns=self.n_columns, n_rows=self.shard.n_rows
        )


class CatalogIndex:
    """All indexes of one catalog: an `index_protocol.Index`, where the methods are documented.

    Parameters
    ----------
    catalog : Catalog
    n_threads : int, optional
        Threads that answer boxes; default: one a core.
    """

    def __init__(self, catalog: Catalog, *, n_threads: int | None = None) -> None:
        self.catalog = catalog
        self.model = ColumnModel.open(catalog.path)
        self.shards = tuple(
            ShardIndex(catalog, shard, self.model.n_columns) for shard in catalog.shards
        )
        self._n_threads = n_threads
        self._first_rows = np.array([shard.first_row for shard in catalog.shards], dtype=np.int64)

    @cached_property
    def columns(self) -> ColumnIndex:
        """The column index of all shards: answers boxes and trees."""
        return ColumnIndex(
            [part.columns for part in self.shards],
            n_threads=self._n_threads,
            removed=self.catalog.removed_rows,
        )

    def start_loading(self) -> None:
        """Open the column index and load its compiled loops in the background."""
        self.columns.loader.start()

    def search(
        self, query: NDArray[np.float64], k: int, *, only: NDArray[np.bool_] | None = None
    ) -> Nearest:
        """Return the rows nearest to a query of `unit_query`."""
        return nearest(self.catalog, query, k, only=only)

    def nearest(self, vector: NDArray[np.floating], k: int) -> tuple[Rows, NDArray[np.float32]]:
        """Return the k rows nearest to a vector, over all shards, removed rows aside.

        Returns
        -------
        rows : (min(k, n_present),) int64
            Similarity descending, ties by row.
        similarities : (min(k, n_present),) float32
            Exact cosine similarities; which rows are found is approximate in large shards.
        """
        found = self.search(unit_query(vector, self.catalog.dim), k)
        return found.rows, found.similarities

    def nearest_of_each(self, wanted: Sequence[tuple[NDArray[np.floating], int]]) -> list[Rows]:
        """Return the k rows nearest to each of several (vector, k)."""
        return [self.nearest(vector, k)[0] for vector, k in wanted]

    def nearest_scored(self, teacher: Teacher, k: int) -> tuple[Rows, NDArray[np.float32]]:
        """Return the k rows nearest to a teacher's direction and their logits."""
        rows, _ = self.nearest(teacher.direction, k)
        return rows, self.logits(teacher, rows)

    def present(self, labels: LabelSet) -> tuple[LabelSet, int]:
        """Return the labels of rows that are not removed, and how many others there were."""
        kept = labels.without(self.catalog.removed_rows)
        return kept, len(labels) - len(kept)

    def embeddings(self, rows: Rows) -> NDArray[np.float32]:
        """Return the embeddings of `rows`, in their order: (m, dim) float32, a copy."""
        out = np.empty((len(rows), self.catalog.dim), dtype=np.float32)
        for number, positions in by_shard(rows, self._first_rows):
            shard = self.shards[number].shard
            out[positions] = shard.embeddings[rows[positions] - shard.first_row]
        return out

    def codes(self, rows: Rows) -> NDArray[np.uint8]:
        """Return the codes of `rows`, in their order: (D, m) uint8, a copy."""
        return self.columns.codes(rows)

    def logits(self, teacher: Teacher, rows: Rows) -> NDArray[np.float32]:
        """Return a teacher's logits of `rows`: (m,) float32."""
        return teacher.logits(self.embeddings(rows))

    def sampled(
        self, teacher: Teacher, rows: Rows
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return both `logits` and `codes` of `rows`."""
        return self.logits(teacher, rows), self.codes(rows)

    def margins(self, forest: TreeEnsemble, rows: Rows) -> NDArray[np.float32]:
        """Return the margins of `rows`: (m,) float32."""
        return self.columns.margins(forest, rows)

    def counts(self, boxes: Sequence[LeafBox]) -> NDArray[np.int64]:
        """Return how many rows each of `boxes` holds: (n_boxes,) int64."""
        return self.columns.in_boxes(boxes).counts

    def stream_boxes(
        self,
        boxes: Sequence[LeafBox],
        teacher: Teacher,
        *,
        strategy: BoxStrategy | None = None,
        cancel: threading.Event | None = None,
    ) -> tuple[QueryPlan, Iterator[ScoredPart]]:
        """Plan boxes, and return the plan and their rows with logits, stretch by stretch."""
        plan, parts = self.columns.stream_boxes(boxes, strategy=strategy, cancel=cancel)

        def scored() -> Iterator[ScoredPart]:
            for part in parts:
                rows = part.rows
                yield ScoredPart(part, rows, self.logits(teacher, rows))

        return plan, scored()


def by_shard(rows: Rows, first_rows: Rows) -> list[tuple[int, NDArray[np.int64]]]:
    """Group positions in `rows` by shard number."""
    numbers = np.searchsorted(first_rows, rows, side="right") - 1
    return [(int(n), np.flatnonzero(numbers == n)) for n in np.unique(numbers)]
