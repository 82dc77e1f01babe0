"""Images of a Hugging Face `datasets.Dataset`, as an object or as a saved folder (layer 7).

The object is read in its own order (also after `shuffle`, `select` or `filter`) as Arrow, so that
no image is decoded twice. An image's uri is its place in the Arrow file that the data set lies in;
where that is not known (a data set in memory, or one that is a slice of its files), the catalog has
thumbnails only, and says so when the original is asked for. A saved folder is read without the
package `datasets`: ``state.json`` lists its Arrow files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.arrow_layout import chunk_of, find_layout
from clipbranches_widget.cells import cell_uri, read_cell, unsaved_uri
from clipbranches_widget.errors import CatalogError, ImageReadError
from clipbranches_widget.remote import join, read_text
from clipbranches_widget.source_parquet import open_table
from clipbranches_widget.source_table import Chunk, ImageSource, TableSource, cell_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BATCH_ROWS = 64
_HINT = "pass a datasets.Dataset"


def is_dataset(source: object) -> bool:
    """Return whether an object is of the package `datasets`; it is not imported for that."""
    return type(source).__module__.partition(".")[0] == "datasets"


def saved_files(folder: str) -> list[str]:
    """Return the Arrow files of a folder that ``Dataset.save_to_disk`` wrote.

    Raises
    ------
    CatalogError
        ``state.json`` is damaged.
    """
    try:
        state = json.loads(read_text(join(folder, "state.json")))
        return [join(folder, str(entry["filename"])) for entry in state["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise CatalogError(
            f"expected the list of Arrow files in {join(folder, 'state.json')}, got: {error!r}; "
            "save the data set again"
        ) from error


def saved_splits(folder: str) -> list[str]:
    """Return the names of the splits of a folder that ``DatasetDict.save_to_disk`` wrote."""
    try:
        return [
            str(name) for name in json.loads(read_text(join(folder, "dataset_dict.json")))["splits"]
        ]
    except (ValueError, LookupError, TypeError):
        return []


class DatasetSource:
    """Images of a data set object; see the module.

    Parameters
    ----------
    dataset
        A `datasets.Dataset`.
    image_column, caption_column
        See `arrow_layout`.

    Raises
    ------
    CatalogError
        It is a dict of data sets, or one that is only streamed, or has no images.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        kind = type(dataset).__name__
        if isinstance(dataset, dict):
            names = ", ".join(repr(str(name)) for name in dataset)
            raise CatalogError(f"expected one data set, got a {kind} of {names}: pass one of them")
        if not hasattr(dataset, "with_format") or not hasattr(dataset, "__len__"):
            raise CatalogError(
                f"expected a data set that knows its length, got a {kind}: {_HINT}, or save it to "
                "Parquet and pass the files"
            )
        if not len(dataset):
            raise CatalogError("expected at least one image, got an empty data set")
        self._dataset = dataset
        self._layout = find_layout(
            dataset.features.arrow_schema,
            where="the data set",
            image_column=image_column,
            caption_column=caption_column,
        )
        self._files = _files(dataset, self._layout.image) if self._layout.has_bytes else ()
        self._rows = _rows(dataset)
        self._first = 0

    @property
    def root(self) -> Path | None:
        """None: all uris are absolute."""
        return None

    @property
    def n_images(self) -> int:
        """Lines of the data set."""
        return len(self._dataset)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the lines of the data set, some at a time."""
        arrow = self._dataset.with_format("arrow", columns=self._layout.columns)
        first = 0
        for table in arrow.iter(_BATCH_ROWS):
            yield chunk_of(
                table,
                self._layout,
                cell_uri=lambda line, first=first: self._uri(first + line),  # type: ignore[misc]
                folder=str(Path.cwd()),
            )
            first += len(table)

    def part(self, start: int, stop: int, file: Path) -> ImageSource:
        """Return some lines; see `DivisibleSource`. Those of a data set in memory are written."""
        part = copy(self)
        part._dataset = self._dataset.select(range(start, stop))  # noqa: SLF001 - its own class
        part._rows = None if self._rows is None else self._rows[start:stop]  # noqa: SLF001
        part._first = self._first + start  # noqa: SLF001
        return part if self._dataset.cache_files else part._listed(file)  # noqa: SLF001

    def _listed(self, file: Path) -> ImageSource:
        """Write the lines and their images to a file: a pickled slice holds the whole table."""
        import pyarrow as pa

        lines = pa.concat_tables(chunk.table for chunk in self.chunks())
        column = self._layout.image
        images = self._dataset.with_format("arrow", columns=[column])[:].column(column)
        source = TableSource(lines, images=images if self._layout.has_bytes else None)
        return source.part(0, len(lines), file)

    def _uri(self, line: int) -> str:
        """Return where the image in a line of the data set is."""
        row = self._first + line if self._rows is None else int(self._rows[line])
        for file, n_rows in self._files:
            if row < n_rows:
                return cell_uri("arrow", self._layout.image, row, file)
            row -= n_rows
        return unsaved_uri(self._layout.image, self._first + line)


def _files(dataset: Any, column: str) -> Sequence[tuple[str, int]]:
    """Return the Arrow files of a data set with their rows; none where they are not its rows.

    A slice, a renamed or replaced column leave a data set with files that are not what it shows:
    the rows are counted, and the first and the last image compared.
    """
    found: list[tuple[str, int]] = []
    total, n_rows = 0, len(dataset.data)
    for entry in dataset.cache_files:
        if total >= n_rows:
            break  # what follows is a list of row numbers, of `shuffle` and the like
        try:
            table = open_table(str(entry["filename"]))
        except CatalogError:
            return ()
        found.append((table.file, table.n_rows))
        total += table.n_rows
    if total != n_rows:
        return ()
    images = dataset.data.column(column)
    (first_file, _), (last_file, n_last) = found[0], found[-1]
    ends = ((first_file, 0, 0), (last_file, n_last - 1, n_rows - 1))
    for file, row, line in ends:
        shown = next(cell_bytes([images[line]]))
        try:
            if shown is not None and shown != read_cell(cell_uri("arrow", column, row, file)):
                return ()
        except ImageReadError:
            return ()
    return found


def _rows(dataset: Any) -> NDArray[np.int64] | None:
    """Return the row of the files that each line is, None where they are the same."""
    indices = getattr(dataset, "_indices", None)
    if indices is None:
        return None
    rows: NDArray[np.int64] = indices.column(0).to_numpy()
    return rows
