"""The map of a catalog: a place on a plane for each image, or for a sample of them (layer 3).

On disk, in the catalog's folder: ``map-HASH.npy``, (m, 2) uint16, row by row, x to the right and y
up, 0..65534 on one scale; 65535 for an image that has no place. m is the number of rows that the
catalog had when the map was made: rows appended later have no place. HASH is of the content, so
that a new map is a new file and never changes one that somebody reads; ``catalog.json`` says which
one counts. A catalog without a map is complete, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipbranches_widget.errors import CatalogCorruptError, QueryError
from clipbranches_widget.integrity import identity, read_manifest
from clipbranches_widget.manifest import Manifest
from clipbranches_widget.map_layout import MAX_POINTS, layout
from clipbranches_widget.removed_rows import is_among
from clipbranches_widget.storage import open_array, save_array

MAX_COORDINATE = 65_534
NO_PLACE = 65_535

_BLOCK_ROWS = 65_536


@dataclass(frozen=True, slots=True, eq=False)
class CatalogMap:
    """Where images of a catalog lie on its map.

    Attributes
    ----------
    name : str
        Of the file; two maps of one name are equal.
    rows : (m,) int64
        Rows that have a place, ascending.
    points : (m, 2) uint16
        Their places: x to the right and y up, 0..65534, on one scale.
    n_rows : int
        Rows in the catalog.
    """

    name: str
    rows: NDArray[np.int64]
    points: NDArray[np.uint16]
    n_rows: int

    def __len__(self) -> int:
        """Return the number of images on the map."""
        return len(self.rows)

    def __repr__(self) -> str:
        """Return one line: how many images."""
        return f"<CatalogMap: {len(self):,} of {self.n_rows:,} images>"

    @property
    def positions(self) -> NDArray[np.float32]:
        """The places in the unit square, (m, 2) float32; a copy."""
        return (self.points / np.float32(MAX_COORDINATE)).astype(np.float32)

    def places_of(self, rows: ArrayLike) -> NDArray[np.int64]:
        """Return the positions in `rows` of those of the given rows that are on the map."""
        wanted = np.asarray(rows, dtype=np.int64)
        if not len(self.rows):
            return np.empty(0, dtype=np.int64)
        found = np.minimum(np.searchsorted(self.rows, wanted), len(self.rows) - 1)
        places: NDArray[np.int64] = found[self.rows[found] == wanted]
        return places

    def without(self, removed: NDArray[np.int64]) -> CatalogMap:
        """Return the map without rows that are removed, ascending; its name says how many."""
        kept = ~is_among(self.rows, removed)
        name = f"{self.name} without {len(removed)}"
        return CatalogMap(name, self.rows[kept], self.points[kept], self.n_rows)

    def inside(self, polygon: ArrayLike) -> NDArray[np.int64]:
        """Return the rows whose points lie inside a closed polygon, ascending.

        Parameters
        ----------
        polygon : (v, 2) real
            Corners in the units of `points`; the last is joined to the first. Where it crosses
            itself, the even-odd rule holds. Of the edge, the left and lower parts belong to it.

        Raises
        ------
        QueryError
            Fewer than three corners, or not finite pairs of numbers.
        """
        corners = np.asarray(polygon, dtype=np.float64)
        if corners.ndim != 2 or corners.shape[1:] != (2,) or len(corners) < 3:
            raise QueryError(
                f"expected three or more corners (x, y), got an array of shape {corners.shape}: "
                "draw a wider line"
            )
        if not np.isfinite(corners).all():
            raise QueryError("expected finite corners, got NaN or infinity: draw the line again")
        low, high = corners.min(axis=0), corners.max(axis=0)
        near = np.flatnonzero(((self.points >= low) & (self.points <= high)).all(axis=1))
        return self.rows[near[points_inside(self.points[near], corners)]]


def points_inside(points: NDArray[np.number], corners: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return for each point whether it lies inside a polygon, by the even-odd rule.

    Parameters
    ----------
    points : (m, 2) real
    corners : (v, 2) float64

    Returns
    -------
    NDArray[np.bool_]
        (m,). Cost: O(m v).

    Examples
    --------
    >>> square = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 2.0], [0.0, 2.0]])
    >>> points_inside(np.array([[1, 1], [3, 1], [0, 0], [2, 2]]), square).tolist()
    [True, False, True, False]
    """
    x, y = points[:, 0].astype(np.float64), points[:, 1].astype(np.float64)
    is_inside = np.zeros(len(points), dtype=np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 == y1:
            continue
        crosses = (y0 <= y) != (y1 <= y)
        is_inside ^= crosses & (x < x0 + (y - y0) * ((x1 - x0) / (y1 - y0)))
    return is_inside


def compute_map(
    shards: Sequence[NDArray[np.float16]],
    *,
    max_points: int = MAX_POINTS,
    seed: int = 0,
    removed: NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> NDArray[np.uint16]:
    """Return the map of all shards together: (n, 2) uint16, as stored.

    Parameters
    ----------
    shards
        Embeddings of each, (n_i, dim) float16, may be memory-mapped.
    max_points
        Of more rows, so many are placed, drawn at random without replacement.
    seed
        Same embeddings, seed and `max_points`: same map.
    removed : (r,) int64, optional
        Rows that get no place, ascending.
    progress
        Gets (done, 100).
    is_cancelled
        Asked several times a second; raises `Cancelled` where it returns true.
    """
    first_rows = np.cumsum([0, *(len(shard) for shard in shards)])
    n_rows = int(first_rows[-1])
    rows = np.arange(n_rows)
    if removed is not None and len(removed):
        rows = rows[~is_among(rows, removed)]
    if len(rows) > max_points:
        rng = np.random.default_rng(seed)
        rows = rows[np.sort(rng.choice(len(rows), max_points, replace=False))]
    embeddings = np.empty((len(rows), shards[0].shape[1]), dtype=np.float32)
    for first_row, shard in zip(first_rows, shards, strict=False):
        low, high = np.searchsorted(rows, [first_row, first_row + len(shard)])
        for start in range(low, high, _BLOCK_ROWS):
            stop = min(start + _BLOCK_ROWS, high)
            embeddings[start:stop] = shard[rows[start:stop] - first_row]
    places = layout(
        embeddings,
        seed=seed,
        progress=None if progress is None else lambda share: progress(int(100 * share), 100),
        is_cancelled=is_cancelled,
    )
    result = np.full((n_rows, 2), NO_PLACE, dtype=np.uint16)
    result[rows] = np.rint(places * MAX_COORDINATE).astype(np.uint16)
    if progress is not None:
        progress(100, 100)
    return result


def save_map(folder: Path, points: NDArray[np.uint16]) -> Path:
    """Write a map into a catalog's folder and return its file; the manifest must still name it."""
    content = np.ascontiguousarray(points, dtype="<u2")
    digest = hashlib.blake2b(content.tobytes(), digest_size=6).hexdigest()
    file = folder / f"map-{digest}.npy"
    save_array(file, content)
    return file


def read_map(file: Path, n_rows: int) -> CatalogMap:
    """Read a map of a catalog of `n_rows` rows.

    Raises
    ------
    CatalogCorruptError
        The file is missing, truncated, or of another type.
    """
    stored = np.asarray(open_array(file, dtype="<u2", shape=(None, 2)))[:n_rows]
    rows = np.flatnonzero(stored[:, 0] != NO_PLACE)
    return CatalogMap(file.name, rows, np.ascontiguousarray(stored[rows]), n_rows)


def current_map(
    folder: Path,
    own: Manifest,
    opened: Callable[[tuple[str, str], Callable[[], CatalogMap]], CatalogMap],
) -> CatalogMap | None:
    """Return the map that a catalog has at this moment, None for none.

    Parameters
    ----------
    folder
        Of the catalog.
    own
        The manifest that the caller's catalog was opened with: counts where another catalog has
        taken its place since.
    opened
        Returns a piece that is kept, by its key, or else what the function reads.
    """

    def map_file() -> str | None:
        manifest = read_manifest(folder)
        return (manifest if identity(manifest) == identity(own) else own).map_file

    name = map_file()
    while name is not None:
        try:
            return opened(("map", name), partial(read_map, folder / name, own.n_rows))
        except CatalogCorruptError:
            last, name = name, map_file()
            if name == last:
                raise  # it was not taken away by a new map meanwhile
    return None
