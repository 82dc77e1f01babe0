"""The column index of one shard (layer 2): which rows have which codes.

On disk, per shard, all little-endian ``.npy`` and memory-mapped read-only:

- ``codes.npy`` (D, n) uint8: the code of every row, one contiguous line a column.
- ``offsets.npy`` (D, 257) int64: how many rows have a code below 0, 1, ..., 256.
- ``prefix.npy`` (D, 31, ceil(n / 64)) uint64: for each of `PREFIX_EDGES` one bit a row, set when
  the code is below the edge; row r is bit r % 64 of word r // 64, spare bits are 0. Prefixes of
  the sorted column as bit vectors, after BinDex (Li et al., SIGMOD 2020).
- ``order.npy`` (D, n) uint32: the shard's rows sorted by code, ties by row; the rows of code
  ``c`` are ``order[offsets[c]:offsets[c + 1]]``.

That is 1, 3.9 and 4 bytes per row and column. The last two files can be left out
(`ColumnParts`): every query still has the same answer, from the codes alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES, CodeRange
from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.storage import open_array

CODES_FILE, ORDER_FILE, OFFSETS_FILE = "codes.npy", "order.npy", "offsets.npy"
PREFIX_FILE = "prefix.npy"

T = TypeVar("T", bound=np.generic)

ColumnParts = Literal["full", "bits", "codes"]
"""What is stored: everything; all but the sorted order; the codes alone."""

PREFIX_EDGES: tuple[int, ...] = (
    *range(32, 129, 32),
    *range(136, 193, 8),
    *range(196, 241, 4),
    *range(242, 255, 2),
)
"""Codes with a bit vector, ascending: sparse in the low half, dense where a rule such as
``bird >= 0.31`` cuts off the few rows most similar to a concept."""

WORD_ROWS = 64

_FLOORS = np.array([0, *PREFIX_EDGES], dtype=np.uint8)
_SNAPPED = _FLOORS[np.searchsorted(_FLOORS, np.arange(N_CODES), side="right") - 1]


@dataclass(frozen=True, slots=True)
class SortedColumns:
    """Read-only view of one shard's column index.

    Attributes
    ----------
    codes : (D, n) uint8
    offsets : (D, 257) int64
    order : (D, n) uint32 or None
        Shard-local rows; None where it is not stored.
    prefix : (D, 31, ceil(n / 64)) uint64 or None
        Bit vectors; None where they are not stored.
    """

    codes: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    order: NDArray[np.uint32] | None
    prefix: NDArray[np.uint64] | None

    @classmethod
    def open(cls, folder: Path, *, n_columns: int, n_rows: int) -> SortedColumns:
        """Map the files of a shard folder; a wrong shape or dtype raises CatalogCorruptError."""
        shape = (n_columns, n_rows)
        bits = (n_columns, len(PREFIX_EDGES), n_words(n_rows))
        return cls(
            _mapped(folder / CODES_FILE, np.uint8, shape),
            _mapped(folder / OFFSETS_FILE, np.int64, (n_columns, N_CODES + 1)),
            _mapped_if_there(folder / ORDER_FILE, np.uint32, shape),
            _mapped_if_there(folder / PREFIX_FILE, np.uint64, bits),
        )

    @classmethod
    def from_codes(
        cls, codes: NDArray[np.uint8], *, columns: ColumnParts = "full"
    ) -> SortedColumns:
        """Build the index of (D, n) uint8 codes in memory."""
        parts = [sort_column(line) for line in codes]
        offsets = np.stack([offsets for _, offsets in parts])
        order = np.stack([order for order, _ in parts]) if columns == "full" else None
        prefix = np.stack([prefix_bits(line) for line in codes]) if columns != "codes" else None
        return cls(
            _frozen(np.ascontiguousarray(codes)),
            _frozen(offsets),
            None if order is None else _frozen(order),
            None if prefix is None else _frozen(prefix),
        )

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
        """Return the shard-local rows of the range, sorted by code then row; a read-only view.

        Raises ValueError where `order` is not stored.
        """
        if self.order is None:
            raise ValueError("expected an index with its sorted order, got one without")
        offsets = self.offsets[code_range.column]
        return self.order[code_range.column, offsets[code_range.low] : offsets[code_range.high]]

    def bit_vector(self, column: int, slot: int) -> NDArray[np.uint64]:
        """Return which rows are below an edge of `PREFIX_EDGES`: (ceil(n / 64),), a view.

        Raises ValueError where `prefix` is not stored.
        """
        if self.prefix is None:
            raise ValueError("expected an index with its bit vectors, got one without")
        line: NDArray[np.uint64] = self.prefix[column, slot]
        return line


def n_words(n_rows: int) -> int:
    """Return how many 64-bit words hold one bit a row."""
    return -(-n_rows // WORD_ROWS)


def snapped(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return each code rounded down to 0 or one of `PREFIX_EDGES`, in the same shape.

    Trees trained on snapped codes split only where there is a bit vector.

    >>> snapped(np.array([31, 32, 200, 255], dtype=np.uint8)).tolist()
    [0, 32, 200, 254]
    """
    rounded: NDArray[np.uint8] = _SNAPPED[codes]
    return rounded


def sort_column(codes: NDArray[np.uint8]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Sort one column's rows by code: (n,) uint32 rows, ties by row, and (257,) int64 offsets.

    A stable argsort of bytes is a radix sort: O(n).
    """
    order = np.argsort(codes, kind="stable").astype(np.uint32)
    counts = np.bincount(codes, minlength=N_CODES)
    return order, np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def prefix_bits(codes: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the bit vectors of one column's (n,) codes: (31, ceil(n / 64)) uint64."""
    bits = np.zeros((len(PREFIX_EDGES), n_words(len(codes))), dtype="<u8")
    for line, edge in zip(bits, PREFIX_EDGES, strict=True):
        packed = np.packbits(codes < edge, bitorder="little")
        line.view(np.uint8)[: len(packed)] = packed
    return bits


def _mapped(path: Path, dtype: type[T], shape: tuple[int, ...]) -> NDArray[T]:
    """Map a file as a plain array: compiled code takes no subclass such as `np.memmap`."""
    return np.asarray(open_array(path, dtype=dtype, shape=shape))


def _mapped_if_there(path: Path, dtype: type[T], shape: tuple[int, ...]) -> NDArray[T] | None:
    try:
        return _mapped(path, dtype, shape)
    except CatalogCorruptError:
        if path.exists():
            raise
        return None  # not stored, or dropped this moment by `rebuild_columns`


def _frozen(array: NDArray[T]) -> NDArray[T]:
    view = array.view()
    view.flags.writeable = False
    return view
