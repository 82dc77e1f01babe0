"""What every source of images is: chunks of a table, and each image's bytes (layer 4).

An `ImageSource` tells how many images it has and then hands them out in order, in chunks: a table
with the columns ``uri`` and ``caption`` (strings) and the user's own, of the same types in every
chunk, and for each line the encoded image where it is not to be read by its uri. Bytes may be
made one by one as they are asked for, so neither a table of millions of images nor a tar of 10 GB
is ever in memory; what stays are the lines of the images that are on their way (`RowStream`).

The uri of a line is how the original is found again later: see `images.load`.

A source that lies in files keeps their columns under their names. Names that a catalog fills in
itself get ``source_`` in front (``width`` becomes ``source_width``); columns of bytes are left out.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

from clipbranches_widget import archives, cells
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.images import Encoded
from clipbranches_widget.remote import DRIVERS, read_bytes, scheme

if TYPE_CHECKING:
    import pyarrow as pa

RESULT_COLUMNS = frozenset(("row", "score", "margin", "branch"))
MEASURED_COLUMNS = {"width": "int32", "height": "int32", "content_hash": "string"}

N_READERS = 32
"""Remote images that are fetched at the same time, from one or many servers."""

_CHUNK_ROWS = 4096
_IMAGE_ROWS = 64
_SEPARATORS = re.compile(r"[_\-.+\s]+")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some images of a source.

    Attributes
    ----------
    table
        Columns uri and caption (string), then the user's.
    images
        One entry a line, may be made lazily; None where every image is read by its uri.
    """

    table: pa.Table
    images: Iterable[Encoded] | None = None


class ImageSource(Protocol):
    """Images to index, in a fixed order."""

    @property
    def root(self) -> Path | None:
        """Folder that relative uris start from; None where they are absolute."""

    @property
    def n_images(self) -> int:
        """How many there are."""

    def chunks(self) -> Iterator[Chunk]:
        """Yield all of them, once.

        Raises
        ------
        CatalogError
            A file of the source cannot be read any further.
        """


class DivisibleSource(ImageSource, Protocol):
    """A source of which other machines can read parts."""

    def part(self, start: int, stop: int, file: Path) -> ImageSource:
        """Return the images ``start <= i < stop`` as a source of its own, which can be pickled.

        What it needs and cannot read from the files of the source (the lines of a table in
        memory) is written to `file`, which must not exist; where there is no such thing, it is not
        made.
        """


@dataclass(frozen=True, slots=True)
class TableSource:
    """Images that a table in memory lists.

    Attributes
    ----------
    table
        Columns uri and caption (string), then the user's.
    root
        Folder that relative uris start from; None where they are absolute.
    images
        A column of image bytes, or of structs of bytes and path; None to read the uris.
    """

    table: pa.Table
    root: Path | None = None
    images: pa.ChunkedArray | None = None

    @property
    def n_images(self) -> int:
        """Lines of the table."""
        return len(self.table)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the table in slices."""
        for start in range(0, len(self.table), _CHUNK_ROWS):
            part = self.table.slice(start, _CHUNK_ROWS)
            if self.images is None:
                yield Chunk(part)
            else:
                yield Chunk(part, cell_bytes(self.images.slice(start, _CHUNK_ROWS)))

    def part(self, start: int, stop: int, file: Path) -> ImageSource:
        """Write some lines of the table to a file; see `DivisibleSource`."""
        lines = self.table.slice(start, stop - start)
        if self.images is not None:
            lines = lines.append_column("images", self.images.slice(start, stop - start))
        write_lines(file, lines, batch_rows=_CHUNK_ROWS if self.images is None else _IMAGE_ROWS)
        return StoredLines(file, stop - start, self.root, has_images=self.images is not None)


@dataclass(frozen=True, slots=True)
class StoredLines:
    """Images that an Arrow file lists, read a batch at a time.

    Attributes
    ----------
    file
        From `write_lines`: uri and caption, the user's columns, then the image where `has_images`.
    n_images
        Its lines.
    root
        Folder that relative uris start from; None where they are absolute.
    has_images
        Whether the last column holds the image, or the uris are to be read.
    """

    file: Path
    n_images: int
    root: Path | None
    has_images: bool

    def chunks(self) -> Iterator[Chunk]:
        """Yield the lines of the file."""
        for lines in stored_lines(self.file):
            if self.has_images:
                last = lines.num_columns - 1
                yield Chunk(lines.select(range(last)), cell_bytes(lines.column(last)))
            else:
                yield Chunk(lines)


def write_lines(file: Path, lines: pa.Table, *, batch_rows: int = _CHUNK_ROWS) -> None:
    """Write a table as an Arrow file, in batches of so many rows."""
    import pyarrow as pa

    with pa.ipc.new_file(str(file), lines.schema) as writer:
        writer.write_table(lines, max_chunksize=batch_rows)


def stored_lines(file: Path) -> Iterator[pa.Table]:
    """Yield what `write_lines` wrote, a batch at a time; not mapped, so that it may be deleted."""
    import pyarrow as pa

    with pa.OSFile(str(file)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            yield pa.Table.from_batches([reader.get_batch(number)])


class RowStream:
    """The images of a source, one by one, and the lines of those that are still on their way.

    Remote images are fetched by `N_READERS` threads from the moment they are handed out: what
    waits for a server needs no core.
    """

    def __init__(self, source: ImageSource) -> None:
        self._source = source
        self._pending: deque[tuple[int, pa.Table]] = deque()

    def __iter__(self) -> Iterator[tuple[str, Encoded]]:
        """Yield uri and image of every line, for `embed.embed_images`."""
        first = 0
        readers: ThreadPoolExecutor | None = None
        try:
            for chunk in self._source.chunks():
                self._pending.append((first, chunk.table))
                uris = chunk.table.column("uri").to_pylist()
                images = repeat(None, len(uris)) if chunk.images is None else chunk.images
                for uri, image in zip(uris, images, strict=True):
                    if image is not None or scheme(uri) not in DRIVERS:
                        yield uri, image
                        continue
                    if readers is None:
                        readers = ThreadPoolExecutor(N_READERS, "clipbranches-read")
                    yield uri, readers.submit(read_bytes, uri).result
                first += len(uris)
        except BaseException:  # closed early: what waits in line is not fetched any more
            if readers is not None:
                readers.shutdown(wait=False, cancel_futures=True)
            raise
        if readers is not None:
            readers.shutdown(wait=False)

    def take(self, positions: Sequence[int]) -> pa.Table:
        """Return the lines at ascending positions, counted over the whole source; at least one."""
        import pyarrow as pa

        parts = []
        for first, table in self._pending:
            inside = [p - first for p in positions if first <= p < first + len(table)]
            if inside:
                parts.append(table.take(pa.array(inside, pa.int64())))
        return pa.concat_tables(parts)

    def forget(self, position: int) -> None:
        """Let go of the lines up to a position: they will not be asked for again."""
        while self._pending and self._pending[0][0] + len(self._pending[0][1]) <= position + 1:
            self._pending.popleft()


def cell_bytes(column: Any) -> Iterator[bytes | None]:
    """Yield the bytes of each cell of an image column; None where there are none."""
    for cell in column:
        value = cell.as_py()
        yield value.get("bytes") if isinstance(value, dict) else value


def items_table(items: Any, *, taken: Iterable[str] = RESULT_COLUMNS) -> pa.Table:
    """Turn a DataFrame or Arrow table into catalog items.

    ``path`` is taken for ``uri``; both it and ``caption`` become strings (caption: empty where
    missing). Columns that the catalog measures itself get their type, where they are allowed.

    Raises
    ------
    CatalogError
        Two columns of one name, a name in `taken`, or values that have no Arrow type.
    """
    import pyarrow as pa

    table = arrow_table(items)
    names = ["uri" if name == "path" else str(name) for name in table.column_names]
    clashes = sorted({name for name in names if name in set(taken) or names.count(name) > 1})
    if clashes:
        raise CatalogError(
            f"expected other names than {', '.join(clashes)} for the columns of items ('path' and "
            "'uri' are one): these are filled in by the catalog; rename or drop them"
        )
    table = table.rename_columns(names).replace_schema_metadata(None)
    for name, kind in {"uri": "string", "caption": "string", **MEASURED_COLUMNS}.items():
        if name in names:
            table = _cast(table, name, pa.type_for_alias(kind))
    if "caption" not in names:
        table = table.append_column("caption", pa.array([""] * len(table), pa.string()))
    return table


def arrow_table(items: Any) -> pa.Table:
    """Return a DataFrame (pandas, or any that gives Arrow, as Polars) as an Arrow table.

    Raises
    ------
    CatalogError
        It is neither, or holds values that have no Arrow type.
    """
    import pyarrow as pa

    if isinstance(items, pa.Table):
        return items
    is_pandas = type(items).__module__.partition(".")[0] == "pandas"
    try:
        if hasattr(items, "__arrow_c_stream__") and not is_pandas:
            return pa.table(items)
        return pa.Table.from_pandas(items, preserve_index=False)
    except (pa.ArrowException, TypeError, ValueError, AttributeError) as error:
        raise CatalogError(
            f"expected items as a pandas DataFrame or pyarrow Table of plain columns, got "
            f"{type(items).__name__}: {error}"
        ) from error


def free_name(name: str, *, taken: Iterable[str]) -> str:
    """Return the name that a column of a file has in the catalog.

    >>> free_name("width", taken=["uri"]), free_name("price", taken=["uri"])
    ('source_width', 'price')
    """
    used = {*taken, *RESULT_COLUMNS, *MEASURED_COLUMNS, "uri", "caption"}
    while name in used:
        name = f"source_{name}"
    return name


def caption_from_uri(uri: str) -> str:
    """Return a file's name without suffix, separators turned into spaces; "" for a table's cell.

    >>> caption_from_uri("/home/me/red_panda-02.final.JPG")
    'red panda 02 final'
    >>> caption_from_uri("zip://old/red_panda.jpg::/data/photos.zip")
    'red panda'
    """
    kind = scheme(uri)
    if kind in cells.KINDS or kind == cells.UNSAVED:
        return ""
    if kind in archives.KINDS:
        uri = uri.partition("::")[0]
    if kind in ("http", "https"):
        uri = unquote(uri.partition("?")[0])
    if kind or uri.startswith("openmoji:"):
        uri = uri.partition(":")[2]
    return _SEPARATORS.sub(" ", PurePosixPath(uri.replace("\\", "/")).stem).strip()


def fill_captions(uris: Sequence[str | None], captions: Sequence[str | None]) -> list[str]:
    """Return the captions, made from the uri where they are missing or empty."""
    return [c or caption_from_uri(u or "") for u, c in zip(uris, captions, strict=True)]


def with_captions(
    uris: Sequence[str], captions: Sequence[str | None], rest: pa.Table | None = None
) -> pa.Table:
    """Return a chunk's table: uri, caption (made where missing), then the columns of `rest`."""
    import pyarrow as pa

    columns = {
        "uri": pa.array(uris, pa.string()),
        "caption": pa.array(fill_captions(uris, captions), pa.string()),
    }
    if rest is not None:
        columns |= {name: rest.column(name) for name in rest.column_names}
    return pa.table(columns)


def _cast(table: pa.Table, name: str, kind: Any) -> pa.Table:
    import pyarrow as pa

    position = table.column_names.index(name)
    try:
        column = table.column(name).cast(kind)
    except pa.ArrowException as error:
        raise CatalogError(f"expected column {name!r} to hold {kind} values: {error}") from error
    return table.set_column(position, name, column)
