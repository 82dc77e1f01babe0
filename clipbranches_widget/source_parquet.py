"""Images in Parquet and Arrow files, or named by them, read batch by batch (layer 6).

Parquet files are read page by page (a page is what their writer made it, at most a row group), in
batches of some megabytes; Arrow IPC files and streams (also Feather, also what Hugging Face's
``save_to_disk`` writes) batch by batch from a memory map.
Several files are one source, in the order given; their columns are brought to common types before
the first image is read. An image whose bytes are in a file is later found by the address that
`cells` defines. Relative paths start from the folder of the file that names them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.arrow_layout import Layout, chunk_of, find_layout, kept_columns
from clipbranches_widget.cells import arrow_batches, arrow_schema, cell_uri
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.remote import driver_errors, open_file, parent, reason
from clipbranches_widget.source_table import Chunk, ImageSource

if TYPE_CHECKING:
    import pyarrow as pa

PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")

_BATCH_BYTES = 2**23
_BATCH_ROWS = 256
_BUFFER_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class TableFile:
    """One Parquet or Arrow file: its columns, and how many lines it has."""

    file: str
    kind: str
    schema: pa.Schema
    n_rows: int

    def batches(
        self, columns: list[str], start: int = 0, stop: int | None = None
    ) -> Generator[pa.Table, None, None]:
        """Yield the lines ``start <= line < stop`` of the file, some at a time.

        Raises
        ------
        CatalogError
            The file is damaged.
        """
        import pyarrow as pa

        try:
            yield from self._batches(columns, start, self.n_rows if stop is None else stop)
        except (*driver_errors(), pa.ArrowException) as error:
            raise _damaged(self.file, error) from error

    def _batches(self, columns: list[str], start: int, stop: int) -> Iterator[pa.Table]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self.kind == "parquet":
            with open_file(self.file) as stream, _parquet(pq, stream) as file:
                groups, first = _groups(file.metadata, start, stop)
                read = file.iter_batches(_batch_rows(file.metadata), groups, columns=columns)
                for batch in _between(read, first, start, stop):
                    yield pa.Table.from_batches([batch])
        else:
            for batch in _between(arrow_batches(self.file), 0, start, stop):
                yield pa.Table.from_batches([batch]).select(columns)


def open_table(file: str) -> TableFile:
    """Look at the columns and the number of lines of a Parquet or Arrow file.

    Raises
    ------
    CatalogError
        There is no such file, or it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    inner = file.partition("::")[0].lower()
    try:
        if inner.endswith(ARROW_SUFFIXES):
            n_rows = sum(len(batch) for batch in arrow_batches(file))
            return TableFile(file, "arrow", arrow_schema(file), n_rows)
        with open_file(file) as stream, _parquet(pq, stream) as table:
            return TableFile(file, "parquet", table.schema_arrow, table.metadata.num_rows)
    except CatalogError:
        raise
    except (*driver_errors(), pa.ArrowException) as error:
        raise _damaged(file, error) from error


def read_table(file: str) -> pa.Table:
    """Read a whole Parquet or Arrow file, for a table of items without images."""
    import pyarrow as pa

    found = open_table(file)
    return pa.concat_tables(found.batches(found.schema.names)) if found.n_rows else pa.table({})


class TableFilesSource:
    """Images of Parquet or Arrow files; see the module.

    Parameters
    ----------
    files
        References, at least one.
    image_column, caption_column
        See `arrow_layout`.

    Raises
    ------
    CatalogError
        A file is damaged, has no images, or other columns than the others.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        self._files = [table for file in files if (table := open_table(file)).n_rows]
        if not self._files:
            raise CatalogError(f"expected at least one image in {files[0]}, found no lines")
        self._layouts = [
            find_layout(
                table.schema,
                where=table.file,
                image_column=image_column,
                caption_column=caption_column,
            )
            for table in self._files
        ]
        self._schema = common_schema(
            [
                (table.file, kept_columns(table.schema.empty_table(), layout).schema)
                for table, layout in zip(self._files, self._layouts, strict=True)
            ]
        )

    @property
    def root(self) -> Path | None:
        """None: all uris are absolute."""
        return None

    @property
    def n_images(self) -> int:
        """Lines of all files."""
        return sum(table.n_rows for table in self._files)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the lines of all files, some at a time."""
        return self._part(0, self.n_images).chunks()

    def part(self, start: int, stop: int, file: Path) -> ImageSource:  # noqa: ARG002 - a protocol
        """Return some lines; see `DivisibleSource`. Nothing is written."""
        return self._part(start, stop)

    def _part(self, start: int, stop: int) -> TableLines:
        spans = []
        first = 0
        for table, layout in zip(self._files, self._layouts, strict=True):
            low, high = max(start - first, 0), min(stop - first, table.n_rows)
            if low < high:
                spans.append((table, layout, low, high))
            first += table.n_rows
        return TableLines(tuple(spans), self._schema)


@dataclass(frozen=True, slots=True)
class TableLines:
    """Images in some lines of Parquet or Arrow files, with the columns of all of them.

    Attributes
    ----------
    spans
        File, what its columns are for, first line, and the line after the last.
    schema
        The user's columns.
    """

    spans: tuple[tuple[TableFile, Layout, int, int], ...]
    schema: pa.Schema

    @property
    def root(self) -> Path | None:
        """None: all uris are absolute."""
        return None

    @property
    def n_images(self) -> int:
        """Lines of all files."""
        return sum(stop - start for _, _, start, stop in self.spans)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the lines, some at a time."""
        for table, layout, start, stop in self.spans:
            first = start
            with closing(table.batches(layout.columns, start, stop)) as batches:
                for batch in batches:
                    chunk = chunk_of(
                        batch,
                        layout,
                        cell_uri=partial(_cell, table, layout, first),
                        folder=parent(table.file),
                    )
                    yield Chunk(with_schema(chunk.table, self.schema), chunk.images)
                    first += len(batch)
            if first != stop:
                raise CatalogError(
                    f"{table.file}: expected {table.n_rows} lines, as its footer says, got {first}"
                )


def common_schema(schemas: Sequence[tuple[str, pa.Schema]]) -> pa.Schema:
    """Return the columns of several files together: missing ones are null, numbers widened.

    Raises
    ------
    CatalogError
        A column is of one type in one file and of another in the next; the message names them.
    """
    import pyarrow as pa

    (_, common), *others = schemas
    common = common.remove_metadata()
    for file, schema in others:
        try:
            common = pa.unify_schemas(
                [common, schema.remove_metadata()], promote_options="permissive"
            )
        except pa.ArrowException as error:
            raise CatalogError(
                f"expected the columns of {file} to have the types of those in {schemas[0][0]}: "
                f"{error}"
            ) from error
    return common


def with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return a table with exactly the columns of `schema` after uri and caption."""
    import pyarrow as pa

    own = {name for name in table.column_names if name not in schema.names}
    columns = {name: table.column(name) for name in table.column_names if name in own}
    for field in schema:
        if field.name in table.column_names:
            columns[field.name] = table.column(field.name).cast(field.type)
        else:
            columns[field.name] = pa.nulls(len(table), field.type)
    return pa.table(columns)


def _groups(metadata: Any, start: int, stop: int) -> tuple[list[int], int]:
    """Return the row groups of a Parquet file that hold some lines, and the first line of them."""
    kept: list[int] = []
    first, kept_from = 0, 0
    for number in range(metadata.num_row_groups):
        n_rows = metadata.row_group(number).num_rows
        if first < stop and first + n_rows > start:
            kept_from = kept_from if kept else first
            kept.append(number)
        first += n_rows
    return kept, kept_from


def _between(
    batches: Iterable[pa.RecordBatch], first: int, start: int, stop: int
) -> Iterator[pa.RecordBatch]:
    """Yield the lines ``start <= line < stop`` of batches, of which the first starts at `first`."""
    for batch in batches:
        if first >= stop:
            return
        low, high = max(start - first, 0), min(stop - first, len(batch))
        if low < high:
            yield batch.slice(low, high - low)
        first += len(batch)


def _cell(table: TableFile, layout: Layout, first: int, line: int) -> str:
    return cell_uri(table.kind, layout.image, first + line, table.file)


def _batch_rows(metadata: Any) -> int:
    """Return how many lines of a Parquet file are about `_BATCH_BYTES`, at most `_BATCH_ROWS`."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    row_bytes = max(group.total_byte_size // max(group.num_rows, 1) for group in groups)
    return int(min(max(_BATCH_BYTES // max(row_bytes, 1), 1), _BATCH_ROWS))


def _parquet(pq: Any, stream: Any) -> Any:
    return pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _damaged(file: str, error: BaseException) -> CatalogError:
    return CatalogError(
        f"{file}: expected a whole Parquet or Arrow file, got: {reason(error)}; "
        "copy or download it again"
    )
