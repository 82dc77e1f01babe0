"""The sorted-column index of one shard (layer 2): a code interval gives its rows.

On disk, per shard, all little-endian ``.npy`` and memory-mapped read-only:

- ``codes.npy`` (D, n) uint8: the code of every row, one contiguous line a column.
- ``order.npy`` (D, n) uint32: the shard's rows sorted by code, ties by row.
- ``offsets.npy`` (D, 257) int64: rows of code ``c`` are ``order[offsets[c]:offsets[c + 1]]``.

That is 5 bytes per row and column.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES, CodeRange, LeafBox
from clipbranches_widget.column_model import BLOCK_ROWS, ColumnModel
from clipbranches_widget.storage import open_array

CODES_FILE, ORDER_FILE, OFFSETS_FILE = "codes.npy", "order.npy", "offsets.npy"


@dataclass(frozen=True, slots=True)
class SortedColumns:
    """Read-only view of one shard's column index.

    Attributes
    ----------
    codes : (D, n) uint8
    order : (D, n) uint32
        Shard-local rows.
    offsets : (D, 257) int64
    """

    codes: NDArray[np.uint8]
    order: NDArray[np.uint32]
    offsets: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path, *, n_columns: int, n_rows: int) -> SortedColumns:
        """Map the files of a shard folder; a wrong shape or dtype raises CatalogCorruptError."""
        shape = (n_columns, n_rows)
        return cls(
            open_array(folder / CODES_FILE, dtype=np.uint8, shape=shape),
            open_array(folder / ORDER_FILE, dtype=np.uint32, shape=shape),
            open_array(folder / OFFSETS_FILE, dtype=np.int64, shape=(n_columns, N_CODES + 1)),
        )

    @classmethod
    def from_codes(cls, codes: NDArray[np.uint8]) -> SortedColumns:
        """Build the index of (D, n) uint8 codes in memory."""
        n_columns, n_rows = codes.shape
        order = np.empty((n_columns, n_rows), dtype=np.uint32)
        offsets = np.empty((n_columns, N_CODES + 1), dtype=np.int64)
        for column in range(n_columns):
            order[column], offsets[column] = sort_column(codes[column])
        return cls(codes, order, offsets)

    @property
    def n_columns(self) -> int:
        """The number of columns, D."""
        return int(self.codes.shape[0])

    @property
    def n_rows(self) -> int:
        """The number of rows in the shard, n."""
        return int(self.codes.shape[1])

    def count(self, code_range: CodeRange) -> int:
        """Return how many rows have a code in the range, without reading any: O(1)."""
        offsets = self.offsets[code_range.column]
        return int(offsets[code_range.high] - offsets[code_range.low])

    def posting_list(self, code_range: CodeRange) -> NDArray[np.uint32]:
        """Return the shard-local rows of the range, sorted by code then row; a read-only view."""
        offsets = self.offsets[code_range.column]
        return self.order[code_range.column, offsets[code_range.low] : offsets[code_range.high]]

    def narrowest(self, box: LeafBox) -> CodeRange | None:
        """Return the range of `box` with the fewest rows; None for the box of every row."""
        return min(box.ranges, key=self.count, default=None)


def sort_column(codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Sort one column's rows by code: (n,) uint32 rows, ties by row, and (257,) int64 offsets.

    A stable argsort of bytes is a radix sort: O(n).
    """
    order = np.argsort(codes, kind="stable").astype(np.uint32)
    counts = np.bincount(codes, minlength=N_CODES)
    return order, np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def build_sorted_columns(
    embeddings: NDArray[np.floating],
    model: ColumnModel,
    folder: Path,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the column index of a shard's (n, dim) embeddings into `folder`.

    Embeddings may be memory-mapped: they are read in blocks of 16,384 rows, and each column is
    sorted alone, so memory stays at one block of column values plus 17 bytes a row. `progress`
    gets (columns sorted, D).
    """
    n_rows = len(embeddings)
    shape = (model.n_columns, n_rows)
    codes = np.lib.format.open_memmap(folder / CODES_FILE, "w+", np.uint8, shape)
    for start in range(0, n_rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        codes[:, block] = model.codes(embeddings[block])
    order = np.lib.format.open_memmap(folder / ORDER_FILE, "w+", np.uint32, shape)
    offsets = np.empty((model.n_columns, N_CODES + 1), dtype=np.int64)
    for column in range(model.n_columns):
        order[column], offsets[column] = sort_column(codes[column])
        if progress is not None:
            progress(column + 1, model.n_columns)
    np.save(folder / OFFSETS_FILE, offsets)
    codes.flush()
    order.flush()
