"""Lines of a catalog's items, read where they are wanted (layer 2).

``items.parquet`` of a shard holds its rows in groups. The items of a small catalog are read once
and kept; of a large one only the groups and columns that are asked for, the latest kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.integrity import ITEMS_FILE

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clipbranches_widget.shard import Shard

ROWS_READ_WHOLE = 1_000_000
"""Items of catalogs of at most so many rows are read whole, at the first question."""

KEPT_BYTES = 256 * 2**20

_GroupColumn = tuple[int, int, str]


class CatalogItems:
    """The items of all shards. Thread-safe.

    Parameters
    ----------
    shards : sequence of Shard
        In row order.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = tuple(shards)
        self._first_rows = np.array([shard.first_row for shard in shards], dtype=np.int64)
        self._lock = threading.Lock()
        self._files: dict[int, tuple[pq.ParquetFile, NDArray[np.int64]]] = {}
        self._kept: OrderedDict[_GroupColumn, pa.ChunkedArray] = OrderedDict()
        self._kept_bytes = 0

    @cached_property
    def schema(self) -> pa.Schema:
        """Names and types of the columns."""
        import pyarrow.parquet as pq

        return pq.read_schema(self._shards[0].file(ITEMS_FILE))

    @cached_property
    def table(self) -> pa.Table:
        """All lines in row order; read by the first call and kept."""
        return self.columns(None)

    def columns(self, names: Sequence[str] | None) -> pa.Table:
        """Return some columns of all lines, or all columns; read anew by each call."""
        if "table" in self.__dict__:
            return self.table if names is None else self.table.select(names)
        import pyarrow as pa
        import pyarrow.parquet as pq

        files = [shard.file(ITEMS_FILE) for shard in self._shards]
        return pa.concat_tables(
            pq.read_table(file, memory_map=True, columns=names) for file in files
        )

    def take(self, rows: NDArray[np.int64], names: Sequence[str] | None = None) -> pa.Table:
        """Return the lines of `rows`, valid row ids, in their order; of these columns, or all."""
        import pyarrow as pa

        if "table" in self.__dict__ or self._shards[-1].end <= ROWS_READ_WHOLE:
            table = self.table if names is None else self.table.select(names)
            return table.take(pa.array(rows))
        wanted = self.schema.names if names is None else list(names)
        order, parts = np.argsort(rows, kind="stable"), []
        with self._lock:
            for number, group, local_rows in self._groups(rows[order]):
                lines = pa.table({name: self._read(number, group, name) for name in wanted})
                parts.append(lines.take(pa.array(local_rows)))
        if not parts:
            return self.schema.empty_table().select(wanted)
        places = np.empty(len(rows), dtype=np.int64)
        places[order] = np.arange(len(rows))
        return pa.concat_tables(parts).take(pa.array(places))

    def _groups(self, ascending: NDArray[np.int64]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
        """Yield shard, group and rows within it for every group that holds some of the rows."""
        for number, rows in _runs(self._first_rows, ascending):
            _, starts = self._file(number)
            for group, local_rows in _runs(starts, rows - self._first_rows[number]):
                yield number, group, local_rows - starts[group]

    def _file(self, number: int) -> tuple[pq.ParquetFile, NDArray[np.int64]]:
        """Return a shard's file and the first local row of each of its groups."""
        if number not in self._files:
            import pyarrow.parquet as pq

            file = pq.ParquetFile(self._shards[number].file(ITEMS_FILE), memory_map=True)
            sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
            self._files[number] = file, np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        return self._files[number]

    def _read(self, number: int, group: int, name: str) -> pa.ChunkedArray:
        """Return one column of one group; the latest stay in memory. The caller holds the lock."""
        key = number, group, name
        if (column := self._kept.pop(key, None)) is None:
            file, _ = self._file(number)
            column = file.read_row_group(group, columns=[name]).column(name)
            self._kept_bytes += column.nbytes
        self._kept[key] = column
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
        return column


def _runs(
    starts: NDArray[np.int64], ascending: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield which of the ranges that begin at `starts` hold rows, each with those that it holds."""
    ranges = np.searchsorted(starts, ascending, side="right") - 1
    numbers, firsts = np.unique(ranges, return_index=True)
    if len(ascending):  # nothing is split into one part
        yield from zip(numbers.tolist(), np.split(ascending, firsts[1:]), strict=True)
