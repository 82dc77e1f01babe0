"""The rows of an opened catalog: which there are, their lines and embeddings (layer 2)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipbranches_widget.catalog_items import CatalogItems
from clipbranches_widget.errors import QueryError
from clipbranches_widget.manifest import Manifest
from clipbranches_widget.removed_rows import nth_present, read_removed, without
from clipbranches_widget.shard import Shard

if TYPE_CHECKING:
    import pyarrow as pa
    from distributed import Client

T = TypeVar("T")


class CatalogRows:
    """The part of `Catalog` that knows its rows."""

    def __init__(self, path: Path, manifest: Manifest, client: Client | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.client = client
        self.url: str | None = None
        self.shards: tuple[Shard, ...] = tuple(
            Shard(number, path / entry.folder, entry.first_row, entry.n_rows, manifest.dim)
            for number, entry in enumerate(manifest.shards)
        )
        self._first_rows = np.array([s.first_row for s in self.shards], dtype=np.int64)
        removed = manifest.removed_file
        self.removed_rows: NDArray[np.int64] = (
            np.empty(0, dtype=np.int64)
            if removed is None
            else read_removed(path / removed, manifest.n_rows)
        )
        self._opened: dict[Hashable, Any] = {}
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """Return the number of row ids: all rows, removed ones included; see `n_present`."""
        return self.manifest.n_rows

    @property
    def n_present(self) -> int:
        """Number of rows that are not removed."""
        return len(self) - len(self.removed_rows)

    @cached_property
    def is_present(self) -> NDArray[np.bool_]:
        """Which rows are not removed, (n,) bool, read-only."""
        mask = np.ones(len(self), dtype=np.bool_)
        mask[self.removed_rows] = False
        mask.flags.writeable = False
        return mask

    def present_rows(self) -> NDArray[np.int64]:
        """Return the rows that are not removed, ascending, (n_present,) int64."""
        return nth_present(np.arange(self.n_present, dtype=np.int64), self.removed_rows)

    def without_removed(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of `rows` that are not removed, in their order."""
        return without(rows, self.removed_rows)

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.manifest.dim

    @cached_property
    def items(self) -> pa.Table:
        """One line per row id, removed ones included; see the module docstring for the columns.

        All of them, in memory: see `lines` for those of some rows.
        """
        return self.item_store.table

    @cached_property
    def item_store(self) -> CatalogItems:
        """The items, of which a large catalog reads only what is asked for."""
        return CatalogItems(self.shards)

    def lines(self, rows: ArrayLike, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the lines of `items` for `rows`, in the order given; some columns, or all.

        Of a catalog of more than a million rows only the parts that hold them are read.
        """
        return self.item_store.take(self.check_rows(rows), columns)

    @cached_property
    def embeddings(self) -> NDArray[np.float16]:
        """All embeddings, (n, dim) float16, read-only: a memory map for one shard, else a copy."""
        if len(self.shards) == 1:
            return self.shards[0].embeddings
        joined = np.concatenate([shard.embeddings for shard in self.shards])
        joined.flags.writeable = False
        return joined

    def check_rows(self, rows: ArrayLike) -> NDArray[np.int64]:
        """Return `rows` as a 1-D int64 array of valid row ids, in the order given.

        Raises
        ------
        QueryError
            Not integers, or outside ``0 <= row < len(catalog)``; the message names them.
        """
        array = np.atleast_1d(np.asarray(rows))
        if array.size == 0:
            return np.empty(0, dtype=np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise QueryError(f"expected row ids (integers), got {_shown(array.ravel())}")
        outside = array[(array < 0) | (array >= len(self))]
        if outside.size:
            raise QueryError(
                f"expected row ids from 0 to {len(self) - 1}, got {_shown(outside)}: "
                "row ids are those of catalog.items and result.rows"
            )
        return array.astype(np.int64)

    def embeddings_of(self, rows: ArrayLike) -> NDArray[np.float16]:
        """Return the embeddings of `rows`, (m, dim) float16, in the order given; a copy."""
        checked = self.check_rows(rows)
        result = np.empty((len(checked), self.dim), dtype=np.float16)
        for shard, positions, local_rows in self._by_shard(checked):
            result[positions] = shard.embeddings[local_rows]
        return result

    def opened(self, key: Hashable, open_it: Callable[[], T]) -> T:
        """Return a piece that is opened once per catalog object and kept, such as an index.

        Parameters
        ----------
        key
            Names the piece, for instance ``("vectors", shard.number)``.
        open_it
            Opens it; called at most once for each key, under a lock.
        """
        with self._lock:
            if key not in self._opened:
                self._opened[key] = open_it()
            piece: T = self._opened[key]
            return piece

    def _by_shard(
        self, rows: NDArray[np.int64]
    ) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield, per shard that holds any of `rows`, positions in `rows` and local rows."""
        numbers = np.searchsorted(self._first_rows, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            positions = np.flatnonzero(numbers == number)
            shard = self.shards[number]
            yield shard, positions, rows[positions] - shard.first_row


def _shown(values: NDArray[Any]) -> str:
    """Return up to five values and how many more there are."""
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(str(v) for v in values[:5].tolist()) + more
