"""Which text belongs to which picture: one table for sampling and for finding positives."""

from __future__ import annotations

import numpy as np
from captions import Captions
from numpy.typing import NDArray


class CaptionTable:
    """The texts of all pictures in compressed rows.

    Attributes
    ----------
    texts
        The distinct texts.
    """

    def __init__(self, captions: list[Captions]) -> None:
        ids: dict[str, int] = {}
        rows = [[ids.setdefault(t, len(ids)) for t in c.texts] for c in captions]
        self.texts = list(ids)
        self._offsets = np.cumsum([0, *map(len, rows)])
        self._text_ids = np.concatenate([np.asarray(r) for r in rows])
        self._weights = np.concatenate([np.asarray(c.weights, np.float32) for c in captions])
        # One increasing cumulative sum per table: row r occupies the interval [r, r + 1).
        self._cumulative = np.concatenate(
            [r + np.cumsum(c.weights) for r, c in enumerate(captions)]
        )

    def sample(self, rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw one text id for each picture in `rows`, by weight."""
        drawn = np.searchsorted(self._cumulative, rows + rng.random(len(rows)) * 0.9999)
        clipped = np.clip(drawn, self._offsets[rows], self._offsets[rows + 1] - 1)
        return self._text_ids[clipped]

    def sample_evenly(self, rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Draw one text id for each picture in `rows`, all its texts being equally likely."""
        lengths = self._offsets[rows + 1] - self._offsets[rows]
        drawn = self._offsets[rows] + (rng.random(len(rows)) * lengths).astype(np.int64)
        return self._text_ids[drawn]  # type: ignore[no-any-return]

    def positives(
        self, rows: NDArray[np.int64], text_ids: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Return weights, shape (len(rows), len(text_ids)): zero where a text is not the picture's.

        `text_ids` must be distinct.
        """
        column = np.full(len(self.texts), -1)
        column[text_ids] = np.arange(len(text_ids))
        lengths = self._offsets[rows + 1] - self._offsets[rows]
        row_of = np.repeat(np.arange(len(rows)), lengths)
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        entries = np.repeat(self._offsets[rows], lengths) + within
        columns = column[self._text_ids[entries]]
        matrix = np.zeros((len(rows), len(text_ids)), dtype=np.float32)
        found = columns >= 0
        matrix[row_of[found], columns[found]] = self._weights[entries[found]]
        return matrix

    def text_ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the distinct ids of the texts of the pictures in `rows`, ascending."""
        parts = [self._text_ids[self._offsets[r] : self._offsets[r + 1]] for r in rows]
        return np.unique(np.concatenate(parts))

    def mean_vectors(self, vectors: NDArray[np.float16]) -> NDArray[np.float32]:
        """Return the weighted mean of each picture's text vectors, unit norm, shape (n, dim)."""
        means = np.empty((len(self._offsets) - 1, vectors.shape[1]), dtype=np.float32)
        for row in range(len(means)):
            part = slice(self._offsets[row], self._offsets[row + 1])
            means[row] = self._weights[part] @ vectors[self._text_ids[part]].astype(np.float32)
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        return means
