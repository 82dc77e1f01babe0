"""Single images out of tables: ``parquet:``, ``arrow:``, ``unsaved:`` (layer 2).

``parquet://image/17::/data/train.parquet`` names the bytes in row 17 (from 0, in the whole file) of
column ``image`` of a Parquet file, in the style of fsspec's chained URLs; ``arrow:`` does the same
for Arrow IPC, the files of Hugging Face datasets. The column's name is percent-encoded, the file
is a path or a URL. A cell is bytes, or a struct with a field ``bytes``.

``unsaved://image/17`` names an image that was only ever in memory: it cannot be read again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

from clipbranches_widget.errors import CatalogError, ImageReadError
from clipbranches_widget.remote import driver_errors, local_path, open_file, reason

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = ("parquet", "arrow")
UNSAVED = "unsaved"


def cell_uri(kind: str, column: str, row: int, file: str) -> str:
    """Return the address of one cell.

    >>> cell_uri("parquet", "the image", 17, "/data/train.parquet")
    'parquet://the%20image/17::/data/train.parquet'
    """
    return f"{kind}://{quote(column, safe='')}/{row}::{file}"


def unsaved_uri(column: str, row: int) -> str:
    """Return the name of an image that no file holds."""
    return f"{UNSAVED}://{quote(column, safe='')}/{row}"


def read_cell(uri: str) -> bytes:
    """Return the image bytes that `cell_uri` names.

    Raises
    ------
    ImageReadError
        The file, the column or the row is not there, or the cell holds no bytes.
    """
    kind, _, rest = uri.partition("://")
    if kind == UNSAVED:
        raise ImageReadError(
            f"{uri}: the image was given in memory and is in no file: its original cannot be read "
            "again, its thumbnail is in the catalog; save the data set, and index what was saved"
        )
    place, _, file = rest.partition("::")
    column, _, number = place.rpartition("/")
    if not (column and number.isdecimal() and file):
        raise ImageReadError(f"{uri}: expected {kind}://COLUMN/ROW::FILE")
    import pyarrow as pa

    read = _parquet_cell if kind == "parquet" else _arrow_cell
    try:
        cell = read(file, unquote(column), int(number))
    except CatalogError as error:
        raise ImageReadError(f"{uri}: {error}") from error
    except (KeyError, IndexError) as error:
        raise ImageReadError(f"{uri}: no such column or row in the file: {error}") from error
    except (*driver_errors(), pa.ArrowException) as error:
        raise ImageReadError(f"{uri}: cannot be read: {reason(error)}") from error
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise ImageReadError(f"{uri}: expected image bytes there, got {type(data).__name__}")
    return data


def arrow_batches(file: str) -> Iterator[pa.RecordBatch]:
    """Yield the record batches of an Arrow IPC file or stream; a local one is memory-mapped."""
    reader, is_stream = _open_arrow(file)
    if is_stream:
        yield from reader
    else:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def arrow_schema(file: str) -> pa.Schema:
    """Return the columns of an Arrow IPC file or stream."""
    return _open_arrow(file)[0].schema


def _open_arrow(file: str) -> tuple[Any, bool]:
    """Return a reader of record batches, and whether it is one of a stream."""
    import pyarrow as pa

    path = local_path(file)
    source = pa.memory_map(str(path)) if path is not None else open_file(file)
    try:
        return pa.ipc.open_file(source), False
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_stream(source), True


def _parquet_cell(file: str, column: str, row: int) -> Any:
    """Read the row group of the row in small batches, up to the row: memory stays small."""
    import pyarrow.parquet as pq

    with (
        open_file(file) as stream,
        pq.ParquetFile(stream, buffer_size=2**20, pre_buffer=False) as table,
    ):
        if column not in table.schema_arrow.names:
            raise KeyError(column)
        left = row
        for group in range(table.metadata.num_row_groups):
            n_rows = table.metadata.row_group(group).num_rows
            if left >= n_rows:
                left -= n_rows
                continue
            for batch in table.iter_batches(16, row_groups=[group], columns=[column]):
                if left < len(batch):
                    return batch.column(0)[left].as_py()
                left -= len(batch)
    raise IndexError(f"row {row}")


def _arrow_cell(file: str, column: str, row: int) -> Any:
    path = local_path(file)
    if path is not None:
        status = path.stat()
        table = _mapped_table(file, (status.st_mtime_ns, status.st_size))
        if row >= len(table):
            raise IndexError(f"row {row}")
        return table.column(column)[row].as_py()
    left = row
    for batch in arrow_batches(file):
        if left < len(batch):
            return batch.column(column)[left].as_py()
        left -= len(batch)
    raise IndexError(f"row {row}")


# A memory map: what is cached takes no memory. A changed file has another stamp.
@lru_cache(maxsize=32)
def _mapped_table(file: str, stamp: tuple[int, int]) -> pa.Table:  # noqa: ARG001 - part of the key
    import pyarrow as pa

    return pa.Table.from_batches(arrow_batches(file), schema=arrow_schema(file))
