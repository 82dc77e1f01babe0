"""The opened indexes of a catalog (layer 3): rows of all shards behind one set of row ids.

Opening maps files; nothing is read until a row is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.shard import Shard
from clipbranches_widget.shard_search import nearest
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.vector_index import unit_query


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
    """All indexes of one catalog.

    Parameters
    ----------
    catalog : Catalog
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.model = ColumnModel.open(catalog.path)
        self.shards = tuple(
            ShardIndex(catalog, shard, self.model.n_columns) for shard in catalog.shards
        )
        self._first_rows = np.array([shard.first_row for shard in catalog.shards], dtype=np.int64)

    @cached_property
    def columns(self) -> ColumnIndex:
        """The column index of all shards: answers boxes and trees."""
        return ColumnIndex(
            [part.columns for part in self.shards], removed=self.catalog.removed_rows
        )

    def nearest(
        self, vector: NDArray[np.floating], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the k rows nearest to a vector, over all shards, removed rows aside.

        Returns
        -------
        rows : (min(k, n_present),) int64
            Similarity descending, ties by row.
        similarities : (min(k, n_present),) float32
            Exact cosine similarities; which rows are found is approximate in large shards.
        """
        query = unit_query(vector, self.catalog.dim)
        found = nearest(self.catalog, query, k)
        return found.rows, found.similarities

    def present(self, labels: LabelSet) -> tuple[LabelSet, int]:
        """Return the labels of rows that are not removed, and how many others there were."""
        kept = labels.without(self.catalog.removed_rows)
        return kept, len(labels) - len(kept)

    def embeddings(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings of `rows`, in their order: (m, dim) float32, a copy."""
        out = np.empty((len(rows), self.catalog.dim), dtype=np.float32)
        for number, positions in self._by_shard(rows):
            shard = self.shards[number].shard
            out[positions] = shard.embeddings[rows[positions] - shard.first_row]
        return out

    def _by_shard(self, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Group positions in `rows` by shard number."""
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        return [(int(n), np.flatnonzero(numbers == n)) for n in np.unique(numbers)]
