"""Embeddings that are there already: arrays, ``.npy`` files, output of clip-retrieval (layer 7).

``clip-retrieval inference`` writes, for each part of its input::

    img_emb/img_emb_0.npy            (n, dim) embeddings of the images, float16 or float32
    metadata/metadata_0.parquet      n lines: image_path, caption, then the fields of the JSON
    text_emb/text_emb_0.npy          embeddings of the captions; not used here

Line i of a part's metadata belongs to row i of its embeddings. The parts are paired by their number
(padded with zeros or not) and taken in the order of their numbers, so that part 10 follows part 9,
and the two counts are compared for each part. ``image_path`` is the image where it names a file;
for parts made from WebDataset it is only a key, and ``url`` is taken if there is one.

Everything is read part by part: local embeddings from a memory map, remote ones a whole part at
a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from clipbranches_widget.arrow_layout import find_layout, kept_columns, place_of
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.npy import map_array, read_array, read_header
from clipbranches_widget.remote import (
    driver_errors,
    join,
    local_path,
    open_file,
    parent,
    reason,
    scheme,
)
from clipbranches_widget.source_parquet import TableFile, common_schema, open_table, with_schema
from clipbranches_widget.source_table import with_captions

if TYPE_CHECKING:
    import pyarrow as pa

EMBEDDINGS = re.compile(r"img_emb/img_emb_(\d+)\.npy")
METADATA = re.compile(r"metadata/metadata_(\d+)\.parquet")
LAYOUT = "img_emb/img_emb_0.npy ... and metadata/metadata_0.parquet ..."

_URL_COLUMNS = ("url", "URL")


class EmbeddingSource(Protocol):
    """Embeddings and the lines that belong to them, part by part."""

    @property
    def n_rows(self) -> int:
        """Embeddings of all parts."""

    @property
    def dim(self) -> int:
        """Length of an embedding."""

    def parts(self) -> Iterator[tuple[NDArray[Any], pa.Table]]:
        """Yield each part: its embeddings, shape (m, dim), and m lines, alike in every part."""


@dataclass(frozen=True, slots=True)
class ArrayEmbeddings:
    """Embeddings in arrays, (m, dim) each, may be memory maps, and one table for all of them."""

    arrays: Sequence[NDArray[Any]]
    items: pa.Table

    @property
    def n_rows(self) -> int:
        """Embeddings of all arrays."""
        return sum(len(array) for array in self.arrays)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.arrays[0].shape[1])

    def parts(self) -> Iterator[tuple[NDArray[Any], pa.Table]]:
        """Yield each array with its lines."""
        first = 0
        for array in self.arrays:
            yield array, self.items.slice(first, len(array))
            first += len(array)


@dataclass(frozen=True, slots=True)
class _Part:
    embeddings: str
    shape: tuple[int, int]
    metadata: TableFile


class ClipRetrievalEmbeddings:
    """The output folder of ``clip-retrieval inference``; see the module.

    Parameters
    ----------
    folder
        Path or URL.
    names
        Its files, relative to it.
    suffixes
        Endings of image files, lower case, with the dot.
    image_column, caption_column
        Where the images and captions are, if not where clip-retrieval puts them.

    Raises
    ------
    CatalogError
        A part is missing, damaged, or its two files do not have as many rows.
    """

    def __init__(
        self,
        folder: str,
        names: Sequence[str],
        *,
        suffixes: frozenset[str],
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        self._parts = [
            _Part(
                join(folder, array), npy_shape(join(folder, array)), open_table(join(folder, table))
            )
            for array, table in _paired(folder, names)
        ]
        for part in self._parts:
            self._check(part)
        self._caption = caption_column
        self._image = image_column or _image_column(self._parts[0].metadata, suffixes)
        self._folder = _base(folder, self._first(self._image)) if self._image else folder
        self._schema = common_schema(
            [
                (p.metadata.file, self._kept(p.metadata.schema.empty_table()).schema)
                for p in self._parts
            ]
        )

    @property
    def n_rows(self) -> int:
        """Embeddings of all parts."""
        return sum(part.shape[0] for part in self._parts)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self._parts[0].shape[1]

    def parts(self) -> Iterator[tuple[NDArray[Any], pa.Table]]:
        """Yield each part with its lines: uri, caption, then the other columns."""
        import pyarrow as pa

        for part in self._parts:
            table = pa.concat_tables(part.metadata.batches(part.metadata.schema.names))
            uris = [""] * len(table)
            if self._image:
                found = table.column(self._image).to_pylist()
                uris = [place_of(path, self._folder) for path in found]
            captions: list[str | None] = [None] * len(table)
            caption = self._caption_in(table.column_names)
            if caption is not None:
                captions = table.column(caption).to_pylist()
            lines = with_captions(uris, captions, self._kept(table))
            yield open_npy(part.embeddings), with_schema(lines, self._schema)

    def _check(self, part: _Part) -> None:
        n_rows, dim = part.shape
        if n_rows != part.metadata.n_rows:
            raise CatalogError(
                f"expected as many lines in {part.metadata.file} as rows in {part.embeddings}, got "
                f"{part.metadata.n_rows} and {n_rows}: the two are not of one run, or one of them "
                "was cut short"
            )
        if dim != self._parts[0].shape[1]:
            raise CatalogError(
                f"expected embeddings of dim {self._parts[0].shape[1]} as in "
                f"{self._parts[0].embeddings}, got {dim} in {part.embeddings}: they are not of one "
                "model"
            )

    def _caption_in(self, names: Sequence[str]) -> str | None:
        if self._caption is not None or "caption" not in names:
            return self._caption
        return "caption" if self._image != "caption" else None

    def _first(self, column: str) -> str | None:
        """Return the first value of a column that is not missing."""
        for part in self._parts:
            if column in part.metadata.schema.names:
                for batch in part.metadata.batches([column]):
                    for value in batch.column(column).to_pylist():
                        if value:
                            return str(value)
        return None

    def _kept(self, table: pa.Table) -> pa.Table:
        """Return the user's columns; sizes of images, where they are whole numbers, among them."""
        import pyarrow as pa

        nowhere = pa.field("(no image)", pa.string())
        layout = find_layout(
            table.schema if self._image else table.schema.append(nowhere),
            where="the metadata",
            image_column=self._image or nowhere.name,
            caption_column=self._caption_in(table.column_names),
        )
        kept = kept_columns(table, layout)
        for name in ("width", "height"):
            if f"source_{name}" in kept.column_names and pa.types.is_integer(
                kept.schema.field(f"source_{name}").type
            ):
                names = [name if old == f"source_{name}" else old for old in kept.column_names]
                kept = kept.rename_columns(names)
        return kept


def npy_shape(file: str) -> tuple[int, int]:
    """Return rows and dim of a ``.npy`` file of embeddings, from its header alone.

    Raises
    ------
    CatalogError
        It is none, or does not hold rows of real numbers.
    """
    with open_file(file) as stream:
        try:
            shape, _, dtype = read_header(stream)
        except driver_errors() as error:
            raise _not_npy(file, error) from error
    if len(shape) != 2 or 0 in shape or dtype.kind not in "fiu":
        raise CatalogError(
            f"expected real embeddings of shape (n >= 1, dim >= 1) in {file}, got {dtype} {shape}"
        )
    return int(shape[0]), int(shape[1])


def open_npy(file: str) -> NDArray[Any]:
    """Return the array of a ``.npy`` file: a memory map of a local one, read from elsewhere.

    Raises
    ------
    CatalogError
        It is none, or is cut short.
    """
    path = local_path(file)
    try:
        if path is not None:
            return map_array(path)
        with open_file(file) as stream:
            return read_array(stream)
    except CatalogError:
        raise
    except driver_errors() as error:
        raise _not_npy(file, error) from error


def _not_npy(file: str, error: BaseException) -> CatalogError:
    return CatalogError(f"expected a NumPy file (.npy) at {file}, got: {reason(error)}")


def _paired(folder: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the two files of each part, in the order of the parts' numbers."""
    arrays = {int(found[1]): name for name in names if (found := EMBEDDINGS.fullmatch(name))}
    tables = {int(found[1]): name for name in names if (found := METADATA.fullmatch(name))}
    if not arrays:
        text = any(name.startswith("text_emb/") for name in names)
        raise CatalogError(
            f"expected {LAYOUT} in {folder}, found no img_emb/img_emb_*.npy"
            + (": only embeddings of texts; run inference with --enable_image True" if text else "")
        )
    alone = [arrays[n] for n in sorted(arrays.keys() - tables.keys())]
    alone += [tables[n] for n in sorted(tables.keys() - arrays.keys())]
    if alone:
        raise CatalogError(
            f"expected {LAYOUT} in {folder}, one of each for every part, found no other half for "
            f"{', '.join(alone[:5])}{' and more' if len(alone) > 5 else ''}: copy the missing files"
        )
    return [(arrays[number], tables[number]) for number in sorted(arrays)]


def _image_column(table: TableFile, suffixes: frozenset[str]) -> str | None:
    """Return the column that says where the images are, None where none does."""
    if "image_path" in table.schema.names:
        for batch in table.batches(["image_path"]):
            first = next((str(v) for v in batch.column(0).to_pylist() if v), "")
            if scheme(first) or Path(first).suffix.lower() in suffixes:
                return "image_path"
            break
    return next((name for name in _URL_COLUMNS if name in table.schema.names), None)


def _base(folder: str, first: str | None) -> str:
    """Return the folder that relative image paths start from: where the first of them is found."""
    here = str(Path.cwd())
    for place in (here, folder, parent(folder.rstrip("/"))):
        path = local_path(join(place, first or ""))
        if path is not None and path.exists():
            return place
    return here
