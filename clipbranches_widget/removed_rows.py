"""Rows that were removed from a catalog: what they are, and how to count without them (layer 2).

On disk, in the catalog's folder: ``removed-HASH.npy``, (m,) int64 row ids, ascending. HASH is of
the content, so that removing more makes a new file; ``catalog.json`` says which one counts. Row
ids never change: a removed row keeps its id, and nothing else gets it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.storage import REBUILD, open_array, save_array

Rows = NDArray[np.int64]


def save_removed(folder: Path, rows: Rows) -> Path:
    """Write (m,) ascending row ids into a catalog's folder and return the file."""
    content = np.ascontiguousarray(rows, dtype="<i8")
    digest = hashlib.blake2b(content.tobytes(), digest_size=6).hexdigest()
    file = folder / f"removed-{digest}.npy"
    save_array(file, content)
    return file


def read_removed(file: Path, n_rows: int) -> Rows:
    """Read removed rows of a catalog of `n_rows` rows: (m,) int64, ascending, in memory.

    Raises
    ------
    CatalogCorruptError
        The file is missing, of another type, or holds other than ascending row ids.
    """
    rows = np.array(open_array(file, dtype="<i8", shape=(None,)), dtype=np.int64)
    if len(rows) and (rows[0] < 0 or rows[-1] >= n_rows or (np.diff(rows) <= 0).any()):
        raise CatalogCorruptError(
            f"{file}: expected ascending row ids below {n_rows}, got others: {REBUILD}"
        )
    rows.flags.writeable = False
    return rows


def nth_present(places: Rows, removed: Rows) -> Rows:
    """Return the rows at places of the list of rows that are not removed.

    Parameters
    ----------
    places : (k,) int64
        From 0.
    removed : (m,) int64
        Ascending.

    Returns
    -------
    (k,) int64
        Cost: O(m + k log m).

    Examples
    --------
    >>> nth_present(np.array([0, 1, 2]), np.array([1, 2])).tolist()
    [0, 3, 4]
    """
    if not len(removed):
        return places
    # A place p is row p plus the removed rows before it.
    skipped = np.searchsorted(removed - np.arange(len(removed)), places, side="right")
    rows: Rows = places + skipped
    return rows


def without(rows: Rows, removed: Rows) -> Rows:
    """Return those of `rows` that are not among `removed` (ascending), in their order."""
    return rows[~is_among(rows, removed)] if len(removed) else rows


def is_among(rows: NDArray[np.integer], removed: Rows) -> NDArray[np.bool_]:
    """Return for each of `rows`, (k,), whether it is among `removed`, ascending: O(k log m)."""
    if not len(removed):
        return np.zeros(len(rows), dtype=np.bool_)
    places = np.minimum(np.searchsorted(removed, rows), len(removed) - 1)
    found: NDArray[np.bool_] = removed[places] == rows
    return found
