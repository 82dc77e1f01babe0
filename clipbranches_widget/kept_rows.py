"""What is known of rows that were asked for before, kept on the client (layer 1)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]
T = TypeVar("T", bound=np.generic)


class KeptRows(Generic[T]):
    """Vectors of rows, up to a number of bytes. Thread-safe.

    Parameters
    ----------
    width : int
        Length of a vector.
    dtype : type
    max_bytes : int
        When more is known, what was known before is forgotten.
    """

    def __init__(self, width: int, dtype: type[T], max_bytes: int) -> None:
        self._rows: Rows = np.empty(0, dtype=np.int64)
        self._values: NDArray[T] = np.empty((0, width), dtype=dtype)
        self._max_rows = max_bytes // self._values.itemsize // max(width, 1)
        self._lock = threading.Lock()

    def missing(self, rows: Rows) -> Rows:
        """Return those of `rows` that are not known, ascending, once."""
        rows = np.unique(rows)
        known, _ = self._snapshot()
        return rows[np.isin(rows, known, assume_unique=True, invert=True)]

    def get(self, rows: Rows, fetch: Callable[[Rows], NDArray[T]]) -> NDArray[T]:
        """Return the vectors of `rows`, (m, width), fetching those that are not known."""
        known, values = self._snapshot()
        wanted = np.unique(rows)
        missing = wanted[np.isin(wanted, known, assume_unique=True, invert=True)]
        if len(missing):
            known, values = self._joined(known, values, missing, fetch(missing))
            self._keep(known, values, wanted)
        return values[np.searchsorted(known, rows)]

    def _snapshot(self) -> tuple[Rows, NDArray[T]]:
        with self._lock:
            return self._rows, self._values

    @staticmethod
    def _joined(
        known: Rows, values: NDArray[T], rows: Rows, new: NDArray[T]
    ) -> tuple[Rows, NDArray[T]]:
        both = np.concatenate([known, rows])
        order = np.argsort(both, kind="stable")
        return both[order], np.concatenate([values, new])[order]

    def _keep(self, known: Rows, values: NDArray[T], latest: Rows) -> None:
        if len(known) > self._max_rows:
            at = np.searchsorted(known, latest[: self._max_rows])
            known, values = known[at], values[at]
        with self._lock:
            self._rows, self._values = known, values
