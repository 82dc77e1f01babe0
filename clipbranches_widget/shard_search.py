"""The nearest rows over all shards of a catalog (layer 3).

A catalog of few rows is scanned. Else each shard is asked for its share of the answer, by its
number of rows, and some more: twenty shards then propose hardly more rows than one would. A shard
that turns out to hold more than its share, as one topic appended at once does, is asked again for
all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.shard import Shard
from clipbranches_widget.vector_index import (
    EXACT_BELOW,
    EXACT_SHARE,
    EXPANSION_SEARCH,
    VectorIndex,
    exact_similarities,
    n_candidates,
    ranked,
)

Rows = NDArray[np.int64]

_SPARE = 1.5
_SCAN_PER_WANTED = 10
"""Scanning so many rows costs what the vector index costs for each row that it is asked for."""

_SCANNED_BELOW = 1_000
"""Rows of a shard of a large catalog that are scanned as quickly as its graph answers."""

_SHARE_SPARE, _MORE = 1.25, 8
_MIN_EXPANSION = 64


class _Part(NamedTuple):
    """What one shard proposed: local rows and similarities, ranked; rows scored; can none miss."""

    local_rows: Rows
    similarities: NDArray[np.float32]
    n_scored: int
    is_exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """The nearest rows of a catalog.

    Attributes
    ----------
    rows : (m,) int64
        Similarity descending, ties by row.
    similarities : (m,) float32
        Exact cosine similarities.
    n_scored : int
        Rows that were scored one by one.
    is_exact : bool
        Whether every row was scanned, so that none can be missed.
    """

    rows: Rows
    similarities: NDArray[np.float32]
    n_scored: int
    is_exact: bool


def open_vector_index(catalog: Catalog, shard: Shard) -> VectorIndex:
    """Return the vector index of one shard; opened once per catalog object."""
    n_removed = len(shard.among(catalog.removed_rows))
    return catalog.opened(
        ("vectors", shard.number),
        lambda: VectorIndex.open(
            shard.file("vectors.usearch"), shard.embeddings, n_removed=n_removed
        ),
    )


def nearest(
    catalog: Catalog,
    query: NDArray[np.float64],
    k: int,
    *,
    only: NDArray[np.bool_] | None = None,
) -> Nearest:
    """Return the `k` rows nearest to a query, removed ones aside.

    Parameters
    ----------
    catalog : Catalog
    query : (dim,) float64
        From `unit_query`.
    k : int
        At least 1; more than there are gives all of them.
    only : (n,) bool, optional
        Which rows of the catalog may be in the answer. They are scanned where they are few; else
        the vector index is asked for as many more, again if need be.
    """
    tasks = _tasks(catalog, query, k, only)
    parts = [task.run(task.share) for task in tasks]
    rows, similarities = _merged(tasks, parts, k)
    in_order = np.sort(rows)
    is_final = True
    for number, task in enumerate(tasks):
        first, last = np.searchsorted(in_order, (task.shard.first_row, task.shard.end))
        if task.share < k and last - first > task.share / _SHARE_SPARE:
            parts[number] = task.run(k)
            is_final = False
    if not is_final:
        rows, similarities = _merged(tasks, parts, k)
    n_scored = sum(part.n_scored for part in parts)
    return Nearest(rows, similarities, n_scored, all(part.is_exact for part in parts))


@dataclass(frozen=True, slots=True)
class _Task:
    """What to ask one shard."""

    index: VectorIndex
    shard: Shard
    query: NDArray[np.float64]
    allowed: NDArray[np.bool_] | None
    n_allowed: int
    is_scanned: bool
    share: int
    expansion: int

    def run(self, k: int) -> _Part:
        """Return the `k` nearest of the allowed rows."""
        if self.allowed is not None:
            return self._among(self.allowed, k)
        is_exact = self._is_exact(k)
        local_rows, found = self.index.search(
            self.query, k, exact=is_exact, expansion=self._expansion(k)
        )
        n_rows = self.shard.n_rows
        return _Part(local_rows, found, n_rows if is_exact else n_candidates(k, n_rows), is_exact)

    def _among(self, allowed: NDArray[np.bool_], k: int) -> _Part:
        """Scan the allowed rows where they are few, else ask for more than are wanted."""
        n_rows, n_asked = self.shard.n_rows, self.shard.n_rows
        if self.n_allowed:
            n_asked = int(_SPARE * k * n_rows / self.n_allowed) + 1
        while self.n_allowed > _SCAN_PER_WANTED * n_asked and not self._is_exact(n_asked):
            local_rows, found = self.index.search(
                self.query, n_asked, exact=False, expansion=self._expansion(k)
            )
            kept = allowed[local_rows]
            if np.count_nonzero(kept) >= k:
                n_scored = n_candidates(n_asked, n_rows)
                return _Part(local_rows[kept][:k], found[kept][:k], n_scored, is_exact=False)
            n_asked *= 4  # what the filter lets pass is far from the query
        n_hidden = n_rows - self.n_allowed
        if 4 * (k + n_hidden) < n_rows:
            local_rows, found = self.index.search(self.query, k + n_hidden, exact=True)
            kept = allowed[local_rows]
            return _Part(local_rows[kept][:k], found[kept][:k], self.n_allowed, is_exact=True)
        candidates = np.flatnonzero(allowed)
        similarities = exact_similarities(self.shard.embeddings, self.query, candidates)
        return _Part(*ranked(candidates, similarities, k), self.n_allowed, is_exact=True)

    def _is_exact(self, k: int) -> bool:
        return self.is_scanned or k > EXACT_SHARE * self.shard.n_rows

    def _expansion(self, k: int) -> int:
        """Return how many rows the graph looks at: less for a share of the answer."""
        return self.expansion if k == self.share else EXPANSION_SEARCH


def _tasks(
    catalog: Catalog,
    query: NDArray[np.float64],
    k: int,
    only: NDArray[np.bool_] | None,
) -> list[_Task]:
    """Plan a search: a small catalog is scanned, of a large one only what is quicker scanned."""
    masks = [_allowed(catalog, shard, only) for shard in catalog.shards]
    counts = np.array(
        [
            shard.n_rows if mask is None else np.count_nonzero(mask)
            for shard, mask in zip(catalog.shards, masks, strict=True)
        ]
    )
    n_allowed = int(counts.sum())
    is_scanned = counts < (EXACT_BELOW if n_allowed < EXACT_BELOW else _SCANNED_BELOW)
    parts_of_all = counts / max(n_allowed, 1)
    shares = np.minimum(k, np.ceil(_SHARE_SPARE * k * parts_of_all).astype(np.int64) + _MORE)
    shares[is_scanned] = k
    expansions = np.maximum(_MIN_EXPANSION, np.ceil(EXPANSION_SEARCH * parts_of_all))
    return [
        _Task(
            open_vector_index(catalog, shard),
            shard,
            query,
            mask,
            int(counts[n]),
            bool(is_scanned[n]),
            int(shares[n]),
            int(expansions[n]),
        )
        for n, (shard, mask) in enumerate(zip(catalog.shards, masks, strict=True))
    ]


def _merged(
    tasks: Sequence[_Task], parts: Sequence[_Part], k: int
) -> tuple[Rows, NDArray[np.float32]]:
    """Return the `k` best of all shards."""
    rows = [part.local_rows + task.shard.first_row for task, part in zip(tasks, parts, strict=True)]
    similarities = np.concatenate([part.similarities for part in parts])
    return ranked(np.concatenate(rows), similarities, k)


def _allowed(
    catalog: Catalog, shard: Shard, only: NDArray[np.bool_] | None
) -> NDArray[np.bool_] | None:
    """Return which rows of a shard may be in an answer, (n_rows,) bool; None for all."""
    rows = slice(shard.first_row, shard.end)
    if not len(shard.among(catalog.removed_rows)):
        return None if only is None else only[rows]
    present = catalog.is_present[rows]
    return present if only is None else only[rows] & present
