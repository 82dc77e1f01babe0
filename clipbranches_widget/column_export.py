"""The indexed columns as a table (layer 4), on which the rules of a round can be run elsewhere.

A table, or a Parquet file, with ``row`` (int64) and one float32 column for each indexed column,
named by `conditions.column_names`. `Branch.to_sql` and `Branch.to_pandas_query` select from it
the very rows that the branch holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.column_model import BLOCK_ROWS
from clipbranches_widget.conditions import ROW_COLUMN, column_names
from clipbranches_widget.labels import as_row_ids
from clipbranches_widget.open_index import local_index_of
from clipbranches_widget.storage import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.catalog_index import CatalogIndex

GROUP_ROWS = 4 * BLOCK_ROWS
"""Rows of a row group of the Parquet file, but for the last."""

Rows = int | Iterable[int] | NDArray[Any]


@overload
def export_columns(
    catalog: Catalog, path: None = None, *, rows: Rows | None = None
) -> pa.Table: ...


@overload
def export_columns(catalog: Catalog, path: str | Path, *, rows: Rows | None = None) -> Path: ...


def export_columns(
    catalog: Catalog, path: str | Path | None = None, *, rows: Rows | None = None
) -> pa.Table | Path:
    """Export the values of the indexed columns.

    Parameters
    ----------
    catalog : Catalog
    path : str or Path, optional
        Write a Parquet file there, in place of what is there, and make its folder. It appears
        complete or not at all.
    rows : optional
        Row ids: a list, an array or a Result. Default: the whole catalog, but for removed rows.

    Returns
    -------
    pyarrow.Table or Path
        The table, of ``4 * (D + 2)`` bytes a row; with `path`, where the file is. Rows are
        ascending. The first column is ``row`` (int64), the D others are float32, in the order of
        the column model: similarities of the embedding to the anchors.

    Raises
    ------
    LabelError, QueryError
        If `rows` are not integers, or not rows of the catalog.

    Notes
    -----
    Each value lies in the interval of the code that the index stores for it, so that comparing
    it with an edge says what the index says, on every machine. BLAS adds up in an order that
    depends on the machine and the number of rows: where that rounds a value across an edge, it
    is set to the nearest float32 on the right side of the edge.

    With `path`, memory does not depend on the number of rows: a row group of 65,536 rows and its
    compressed form, 80 MiB at D = 128.

    Examples
    --------
    Select the rows of a branch with DuckDB::

        cb.export_columns(catalog, "columns.parquet")
        duckdb.sql(result.branches[0].to_sql("columns.parquet"))
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    index = local_index_of(catalog)
    wanted = None if rows is None else catalog.check_rows(as_row_ids(rows))
    if wanted is None and len(catalog.removed_rows):
        wanted = catalog.present_rows()
    names = column_names(index.model.names)
    schema = pa.schema([(ROW_COLUMN, pa.int64()), *((name, pa.float32()) for name in names)])
    batches = (
        pa.record_batch([part_rows, *values], schema=schema)
        for part_rows, values in _parts(index, wanted)
    )
    if path is None:
        return pa.Table.from_batches(batches, schema)
    place = Path(path).expanduser().absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic_file(place) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer,
    ):
        for group in _groups(batches):
            writer.write_table(pa.Table.from_batches(group, schema), row_group_size=GROUP_ROWS)
            group.clear()  # free it before the next one is gathered
    return place


def _groups(batches: Iterator[pa.RecordBatch]) -> Iterator[list[pa.RecordBatch]]:
    """Gather batches of at most `BLOCK_ROWS` into row groups of at most `GROUP_ROWS`."""
    group: list[pa.RecordBatch] = []
    for batch in batches:
        if sum(each.num_rows for each in group) + batch.num_rows > GROUP_ROWS:
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def _parts(
    index: CatalogIndex, wanted: NDArray[np.int64] | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield rows and their values, (D, m) float32, at most `BLOCK_ROWS` at a time, ascending.

    Blocks start where those of `ColumnModel.codes` do, so that mostly the same sums are made.
    """
    for part in index.shards:
        shard = part.shard
        for start in range(0, shard.n_rows, BLOCK_ROWS):
            stop = min(start + BLOCK_ROWS, shard.n_rows)
            first, last = shard.first_row + start, shard.first_row + stop
            at: slice | NDArray[np.int64] = slice(start, stop)
            rows = np.arange(first, last)
            if wanted is not None:
                rows = wanted[slice(*np.searchsorted(wanted, (first, last)))]
                at = rows - shard.first_row
            if len(rows):
                values = np.ascontiguousarray(index.model.values(shard.embeddings[at]).T)
                codes = part.columns.codes[:, at]
                yield rows, clipped(values, codes, index.model.edges)


def clipped(
    values: NDArray[np.float32], codes: NDArray[np.uint8], edges: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Move values into the intervals of their codes, as little as possible.

    Parameters
    ----------
    values : (D, m) float32
        NaN becomes the lowest value of its code.
    codes : (D, m) uint8
        Code ``c`` stands for ``edges[c - 1] <= value < edges[c]``.
    edges : (D, 255) float32

    Returns
    -------
    (D, m) float32

    Examples
    --------
    >>> edges = np.linspace(0, 1, 255, dtype=np.float32)[None, :]
    >>> values, codes = np.float32([[0.3, 0.5, 0.5]]), np.uint8([[77, 127, 128]])
    >>> clipped(values, codes, edges)
    array([[0.3       , 0.49999997, 0.5       ]], dtype=float32)
    """
    infinite = np.full((len(edges), 1), np.inf, dtype=np.float32)
    lows = np.concatenate((-infinite, edges), axis=1)
    highs = np.concatenate((np.nextafter(edges, -infinite), infinite), axis=1)
    out = np.empty_like(values)
    for column, line in enumerate(codes):
        np.fmax(values[column], lows[column, line], out=out[column])
        np.fmin(out[column], highs[column, line], out=out[column])
    return out
