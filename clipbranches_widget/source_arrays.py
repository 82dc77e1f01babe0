"""What `from_embeddings` takes: arrays, ``.npy`` files, a clip-retrieval folder (layer 9).

Every kind ends as an `EmbeddingSource`, whose lines have all the columns of a catalog but ``row``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import CatalogError
from clipbranches_widget.source_embeddings import (
    ArrayEmbeddings,
    EmbeddingSource,
    npy_shape,
    open_npy,
)
from clipbranches_widget.source_parquet import read_table
from clipbranches_widget.source_table import (
    MEASURED_COLUMNS,
    arrow_table,
    fill_captions,
    items_table,
)
from clipbranches_widget.sources import Found, clip_retrieval_source, find

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class _Complete:
    """A source with every column of a catalog but ``row``."""

    source: EmbeddingSource

    @property
    def n_rows(self) -> int:
        return self.source.n_rows

    @property
    def dim(self) -> int:
        return self.source.dim

    def parts(self) -> Iterator[tuple[NDArray[Any], pa.Table]]:
        for array, items in self.source.parts():
            yield array, complete_items(items, len(array))


def embedding_source(
    embeddings: ArrayLike | str | Path,
    items: pd.DataFrame | pa.Table | str | Path | None,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
) -> EmbeddingSource:
    """Return embeddings and their lines; see `ingest.from_embeddings` for the parameters.

    Raises
    ------
    CatalogError
        Bad embeddings, a file or folder of another layout, or another number of items.
    """
    table = read_table(str(items)) if isinstance(items, str | Path) else items
    if isinstance(embeddings, str | Path):
        found = find_embeddings(embeddings)
        arrays = [] if found.kind == "clip-retrieval" else _opened(found.files)
    else:
        found = None
        arrays = [_checked(embeddings)]
    if found is not None and found.kind == "clip-retrieval":
        if items is not None:
            raise CatalogError(
                f"expected no items beside {found.folder}: its metadata/ has them, a line for each "
                "embedding"
            )
        return _Complete(
            clip_retrieval_source(found, image_column=image_column, caption_column=caption_column)
        )
    if table is not None:
        table = _renamed(table, uri=image_column, caption=caption_column)
    n_rows = sum(len(array) for array in arrays)
    return ArrayEmbeddings(arrays, complete_items(table, n_rows))


def find_embeddings(place: str | Path) -> Found:
    """Return what is at a path or URL; raises CatalogError unless it is embeddings."""
    found = find(place)
    if found.kind not in ("clip-retrieval", "npy"):
        raise CatalogError(
            f"expected embeddings at {place} (.npy, or the output folder of clip-retrieval), found "
            "images or a table of them: give that to index"
        )
    return found


def complete_items(items: pd.DataFrame | pa.Table | None, n_rows: int) -> pa.Table:
    """Return a table with every column of a catalog but ``row``.

    Raises
    ------
    CatalogError
        It has not `n_rows` lines, or a column name that is taken.
    """
    import pyarrow as pa

    unknown = pa.array([""] * n_rows, pa.string())
    table = items_table(pa.table({"uri": unknown}) if items is None else items)
    if len(table) != n_rows:
        raise CatalogError(
            f"expected as many items as embeddings, got {len(table)} items and {n_rows} "
            "embeddings: they must be in the same order, one line each"
        )
    if "uri" not in table.column_names:
        table = table.append_column("uri", unknown)
    for name, kind in MEASURED_COLUMNS.items():
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(n_rows, pa.type_for_alias(kind)))
    captions = fill_captions(table.column("uri").to_pylist(), table.column("caption").to_pylist())
    position = table.column_names.index("caption")
    return table.set_column(position, "caption", pa.array(captions, pa.string()))


def _opened(files: Sequence[str]) -> list[NDArray[Any]]:
    dims = {file: npy_shape(file)[1] for file in files}
    if len(set(dims.values())) != 1:
        raise CatalogError(f"expected embeddings of one dim in all files, got {dims}")
    return [open_npy(file) for file in files]


def _checked(embeddings: ArrayLike) -> NDArray[Any]:
    try:
        array = np.asanyarray(embeddings)
    except ValueError as error:
        raise CatalogError(f"expected a 2-D array of embeddings: {error}") from error
    if array.ndim != 2 or 0 in array.shape:
        raise CatalogError(f"expected embeddings of shape (n >= 1, dim >= 1), got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise CatalogError(f"expected real numbers as embeddings, got dtype {array.dtype}")
    return array


def _renamed(items: Any, *, uri: str | None, caption: str | None) -> Any:
    """Return items with the named columns called ``uri`` and ``caption``."""
    columns = {"uri": uri, "caption": caption}
    chosen = {old: new for new, old in columns.items() if old is not None}
    if not chosen:
        return items
    table = arrow_table(items)
    missing = sorted(chosen.keys() - set(table.column_names))
    if missing:
        raise CatalogError(
            f"expected the columns {', '.join(missing)} in items, found {table.column_names}"
        )
    return table.rename_columns([chosen.get(name, name) for name in table.column_names])
