"""The opened indexes of a catalog (layer 3): rows of all shards behind one set of row ids.

Opening maps files; nothing is read until a row is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_query import BoxAnswer, rows_in_boxes
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.catalog import Catalog, Shard
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.vector_index import VectorIndex, ranked


def open_vector_index(catalog: Catalog, shard: Shard) -> VectorIndex:
    """Return the vector index of one shard; opened once per catalog object."""
    return catalog.opened(
        ("vectors", shard.number),
        lambda: VectorIndex.open(shard.file("vectors.usearch"), shard.embeddings),
    )


@dataclass(frozen=True)
class ShardIndex:
    """One shard's column index and vector index, opened when first used."""

    catalog: Catalog
    shard: Shard
    n_columns: int

    @cached_property
    def columns(self) -> SortedColumns:
        """The sorted columns."""
        return SortedColumns.open(
            self.shard.path, n_columns=self.n_columns, n_rows=self.shard.n_rows
        )

    @cached_property
    def vectors(self) -> VectorIndex:
        """The vector index."""
        return open_vector_index(self.catalog, self.shard)


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

    def nearest(
        self, vector: NDArray[np.floating], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the k rows nearest to a vector, over all shards.

        Returns
        -------
        rows : (min(k, n),) int64
            Similarity descending, ties by row.
        similarities : (min(k, n),) float32
            Exact cosine similarities; which rows are found is approximate in large shards.
        """
        found = [part.vectors.search(vector, k) for part in self.shards]
        rows = [
            local + part.shard.first_row
            for part, (local, _) in zip(self.shards, found, strict=True)
        ]
        similarities = np.concatenate([similarity for _, similarity in found])
        return ranked(np.concatenate(rows), similarities, k)

    def embeddings(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings of `rows`, in their order: (m, dim) float32, a copy."""
        out = np.empty((len(rows), self.catalog.dim), dtype=np.float32)
        for number, positions in self._by_shard(rows):
            shard = self.shards[number].shard
            out[positions] = shard.embeddings[rows[positions] - shard.first_row]
        return out

    def codes(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return the codes of `rows`, in their order: (D, m) uint8, a copy."""
        out = np.empty((self.model.n_columns, len(rows)), dtype=np.uint8)
        for number, positions in self._by_shard(rows):
            part = self.shards[number]
            out[:, positions] = part.columns.codes[:, rows[positions] - part.shard.first_row]
        return out

    def in_boxes(self, boxes: Sequence[LeafBox]) -> BoxAnswer:
        """Return exactly the rows inside any of `boxes`, over all shards, as catalog-wide rows."""
        answers = [rows_in_boxes(part.columns, boxes) for part in self.shards]
        firsts = self._first_rows.tolist()
        rows = [answer.rows + first for answer, first in zip(answers, firsts, strict=True)]
        by_box = tuple(
            np.concatenate(
                [answer.by_box[i] + first for answer, first in zip(answers, firsts, strict=True)]
            )
            for i in range(len(boxes))
        )
        return BoxAnswer(np.concatenate(rows), by_box, sum(answer.n_read for answer in answers))

    def _by_shard(self, rows: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Group positions in `rows` by shard number."""
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        return [(int(n), np.flatnonzero(numbers == n)) for n in np.unique(numbers)]
