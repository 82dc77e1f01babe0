"""Remove rows from a catalog for good (layer 6): they are hidden at once, their ids stay."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_change import changing, commit, folder_of
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.labels import as_row_ids
from clipbranches_widget.removed_rows import save_removed
from clipbranches_widget.shard_writer import describe_piece


def remove(catalog: Catalog | str | Path, rows: int | Iterable[int] | NDArray[Any]) -> Catalog:
    """Hide rows in every search and round, from now on and for good.

    Row ids never change, and that of a removed row is not given away; ``len(catalog)`` still counts
    it, ``catalog.n_present`` does not. Labels on removed rows are ignored. The same images are
    not appended again. `compact` erases their thumbnails and embeddings; their lines in
    ``catalog.items`` stay, and so do the original files.

    Parameters
    ----------
    catalog
        An open catalog, or the folder of one.
    rows
        Row ids: a list, an array, a Result, or one integer. Rows that are removed already may be
        among them.

    Returns
    -------
    Catalog
        Opened anew, without the rows. Catalogs and sessions that are open keep what they had.

    Raises
    ------
    CatalogNotFoundError, CatalogCorruptError
        As of `Catalog.open`.
    LabelError, QueryError
        If `rows` are not integers, or not rows of the catalog.
    CatalogError
        No row would be left, the folder cannot be written, or another writer works on it.
    """
    folder = folder_of(catalog)
    with changing(folder, "remove") as (current, _):
        wanted = current.check_rows(as_row_ids(rows))
        removed = np.union1d(current.removed_rows, wanted)
        if len(removed) == len(current):
            raise CatalogError(
                f"expected to leave at least one row, got all {len(current):,}: delete the folder "
                f"{folder} instead"
            )
        if len(removed) > len(current.removed_rows):
            file = save_removed(folder, removed)
            commit(folder, current.manifest.with_removed(file.name, describe_piece(file)))
    return Catalog.open(folder)
