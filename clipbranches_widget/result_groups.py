"""Near-duplicates inside an answer, folded into their best-ranked one (layer 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.counts import whole_count
from clipbranches_widget.duplicate_search import DEFAULT_SIMILARITY, compare

__all__ = ["DEFAULT_SIMILARITY", "Groups", "fold"]

Rows = NDArray[np.int64]


class Groupable(Protocol):
    """What can be grouped: a `Result`."""

    def grouped(self, similarity: float, *, first: int | None) -> Self:
        """Return it with near-duplicates folded."""


Answer = TypeVar("Answer", bound=Groupable)


class Groups(Mapping[int, Rows]):
    """The rows that were folded: representative row id -> the rows it stands for, best first.

    Rows that stand for themselves alone are no keys. The length is the number of keys.

    Attributes
    ----------
    similarity : float
        Lowest similarity of a folded row to its representative.
    first : int or None
        How many of the best rows were grouped; None for all.
    n_grouped : int
        Rows that were compared.
    is_exact : bool
        Whether all pairs of these were compared, so that none was missed.
    rows, representatives : (m,) int64
        Every folded row, by representative and then by rank, and what stands for it.
    similarities : (m,) float32
        Exact cosine similarity of the two; 1 for images of equal content.
    """

    def __init__(
        self,
        similarity: float,
        first: int | None,
        n_grouped: int,
        *,
        is_exact: bool,
        rows: Rows,
        representatives: Rows,
        similarities: NDArray[np.float32],
    ) -> None:
        self.similarity, self.first = similarity, first
        self.n_grouped, self.is_exact = n_grouped, is_exact
        self.rows, self.representatives, self.similarities = rows, representatives, similarities
        starts = np.flatnonzero(np.diff(representatives, prepend=-1))
        ends = np.append(starts, len(rows))[1:]
        keys = representatives[starts].tolist()
        bounds = zip(starts.tolist(), ends.tolist(), strict=True)
        self._slices = {row: slice(*each) for row, each in zip(keys, bounds, strict=True)}

    def __getitem__(self, row: int) -> Rows:
        """Return the rows that a representative stands for, itself aside, (k,) int64."""
        return self.rows[self._slices[int(row)]]

    def __iter__(self) -> Iterator[int]:
        """Iterate over the representatives that stand for others, best first."""
        return iter(self._slices)

    def __len__(self) -> int:
        """Return how many rows stand for others."""
        return len(self._slices)

    def __repr__(self) -> str:
        """Return one line."""
        return (
            f"<Groups: {len(self.rows):,} images folded into {len(self):,}, similarity "
            f"{self.similarity:g} or more>"
        )

    def counts(self, rows: Rows) -> Rows:
        """Return how many others each of `rows` stands for, (m,) int64."""
        return np.array([self.count(row) for row in rows.tolist()], dtype=np.int64)

    def count(self, row: int) -> int:
        """Return how many others a row stands for."""
        found = self._slices.get(row)
        return 0 if found is None else found.stop - found.start

    def similarities_of(self, row: int) -> NDArray[np.float32]:
        """Return the similarities of the rows that a representative stands for, (k,) float32."""
        return self.similarities[self._slices[int(row)]]

    def again(self, result: Answer) -> Answer:
        """Return another answer, grouped in the same way."""
        return result.grouped(self.similarity, first=self.first)

    def note(self, n_images: int) -> str:
        """Return what was folded, in a sentence about an answer of `n_images`."""
        n_groups = n_images - len(self.rows)
        text = (
            f"{n_images:,} images in {n_groups:,} groups: {len(self.rows):,} near-duplicates "
            f"(similarity {self.similarity:g} or more) are folded into the best-ranked of each"
        )
        if self.n_grouped < n_images:
            text += f"; only the best {self.n_grouped:,} images were grouped"
        if not self.is_exact:
            text += "; the vector index proposed them and can have missed some"
        return text


def fold(
    catalog: Catalog, rows: Rows, similarity: float, first: int | None = None
) -> tuple[Rows, Groups]:
    """Find the near-duplicates of an answer.

    Parameters
    ----------
    catalog : Catalog
    rows : (n,) int64
        Distinct rows, best first.
    similarity : float
        Lowest similarity of a row to the one that stands for it.
    first : int, optional
        Group only so many of the best; the others stay as they are.

    Returns
    -------
    places : (m,) int64
        Places in `rows` of those that stay, ascending.
    groups : Groups

    Raises
    ------
    QueryError
        A similarity outside of (0, 1], or `first` below 1.
    """
    n_grouped = len(rows) if first is None else min(whole_count(first, "first"), len(rows))
    found = compare(catalog, rows[:n_grouped], similarity)
    own = np.arange(n_grouped)
    folded = np.flatnonzero(found.leaders != own)
    folded = folded[np.argsort(found.leaders[folded], kind="stable")]
    places = np.append(np.flatnonzero(found.leaders == own), np.arange(n_grouped, len(rows)))
    groups = Groups(
        float(similarity),
        first,
        n_grouped,
        is_exact=found.is_exact,
        rows=rows[folded],
        representatives=rows[found.leaders[folded]],
        similarities=found.similarities[folded],
    )
    return places, groups
