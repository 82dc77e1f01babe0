"""A part of a catalog on disk (layer 2)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.integrity import EMBEDDINGS_FILE
from clipbranches_widget.storage import open_array


@dataclass(frozen=True)
class Shard:
    """A self-contained part of a catalog.

    Attributes
    ----------
    number
        Position in ``Catalog.shards``.
    path
        Its folder.
    first_row, n_rows
        It holds the catalog rows ``first_row <= row < first_row + n_rows``.
    dim
        Length of an embedding.
    """

    number: int
    path: Path
    first_row: int
    n_rows: int
    dim: int

    @property
    def end(self) -> int:
        """The catalog row after its last."""
        return self.first_row + self.n_rows

    def among(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the local rows of those of `rows`, ascending, that lie in it."""
        low, high = np.searchsorted(rows, (self.first_row, self.end))
        return rows[low:high] - self.first_row

    @cached_property
    def embeddings(self) -> NDArray[np.float16]:
        """The unit-norm embeddings, (n_rows, dim) float16, memory-mapped read-only."""
        shape = (self.n_rows, self.dim)
        return open_array(self.file(EMBEDDINGS_FILE), dtype=np.float16, shape=shape)

    def file(self, name: str) -> Path:
        """Return the path of one of the shard's files."""
        return self.path / name
