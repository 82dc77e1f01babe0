"""What one shard of a catalog is asked in a search, and its answer (layer 3).

Shards answer one by one, here or on other machines, or several at once (`propose_all`), which gives
the same answers sooner.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.kept_threads import start
from clipbranches_widget.shard import Shard
from clipbranches_widget.vector_index import (
    EXACT_SHARE,
    VectorIndex,
    exact_similarities,
    n_candidates,
    ranked,
)

Rows = NDArray[np.int64]

_SPARE = 1.5
_SCAN_PER_WANTED = 10
"""Scanning so many rows costs what the vector index costs for each row that it is asked for."""

_SMALL = 256
"""Rows asked of a shard, for which the work around the graph is worth sharing."""

_ASKS_A_THREAD = 4
"""Fewer graphs are asked sooner by one thread."""


class Proposed(NamedTuple):
    """What one shard proposed.

    Attributes
    ----------
    local_rows : (m,) int64
        Ranked: similarity descending, ties by row.
    similarities : (m,) float32
    n_scored : int
        Rows that were scored one by one.
    is_exact : bool
        Whether it can have missed none.
    """

    local_rows: Rows
    similarities: NDArray[np.float32]
    n_scored: int
    is_exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    """What one shard is asked: plain values, so that another machine can be asked as well.

    Attributes
    ----------
    number : int
        Of the shard.
    query : (dim,) float64
        From `unit_query`.
    k : int
    expansion : int
        How many rows the graph looks at.
    is_scanned : bool
    allowed : (n_rows,) bool, optional
        Which rows of the shard may be in the answer; None for all.
    n_allowed : int
    is_filtered : bool
        Whether `allowed` leaves out more than the removed rows.
    floor : float
        Rows of a lower similarity are not needed: `k` others are known.
    """

    number: int
    query: NDArray[np.float64]
    k: int
    expansion: int
    is_scanned: bool
    allowed: NDArray[np.bool_] | None
    n_allowed: int
    is_filtered: bool
    floor: float = -math.inf


def open_vector_index(catalog: Catalog, shard: Shard) -> VectorIndex:
    """Return the vector index of one shard; opened once per catalog object."""
    n_removed = len(shard.among(catalog.removed_rows))
    return catalog.opened(
        ("vectors", shard.number),
        lambda: VectorIndex.open(
            shard.file("vectors.usearch"), shard.embeddings, n_removed=n_removed
        ),
    )


def propose(catalog: Catalog, ask: Ask) -> Proposed:
    """Answer what one shard is asked: the `k` nearest of the allowed rows."""
    shard = catalog.shards[ask.number]
    index, n_rows = open_vector_index(catalog, shard), shard.n_rows
    if ask.allowed is not None:
        return _among(shard, index, ask, ask.allowed)
    is_exact = _is_exact(ask, ask.k, n_rows)
    local_rows, found = index.search(ask.query, ask.k, exact=is_exact, expansion=ask.expansion)
    n_scored = n_rows if is_exact else n_candidates(ask.k, n_rows)
    return Proposed(local_rows, found, n_scored, is_exact)


def propose_all(
    catalog: Catalog, query: NDArray[np.float64], asks: Sequence[Ask]
) -> list[Proposed]:
    """Answer what shards are asked about one query: as `propose` answers each, but sooner.

    A small answer of a graph takes less time than what is around it; so the graphs are asked in
    a few threads, and all that they propose is scored and ranked at once.
    """
    small = [number for number, ask in enumerate(asks) if _is_small(catalog, ask)]
    answers: dict[int, Proposed] = {}
    if len(small) > 1:
        together = _by_graphs(catalog, query, [asks[number] for number in small])
        answers = dict(zip(small, together, strict=True))
    return [
        answers[number] if number in answers else propose(catalog, ask)
        for number, ask in enumerate(asks)
    ]


def _is_small(catalog: Catalog, ask: Ask) -> bool:
    """Return whether a graph answers, with so few rows that those of all shards can be held."""
    n_rows = catalog.shards[ask.number].n_rows
    return ask.allowed is None and ask.k <= _SMALL and not _is_exact(ask, ask.k, n_rows)


def _by_graphs(catalog: Catalog, query: NDArray[np.float64], asks: Sequence[Ask]) -> list[Proposed]:
    """Answer asks that are all small."""
    shards = [catalog.shards[ask.number] for ask in asks]
    indexes = [open_vector_index(catalog, shard) for shard in shards]

    def candidates(numbers: range) -> list[Rows]:
        return [
            indexes[n].candidates(query, asks[n].k, expansion=asks[n].expansion) for n in numbers
        ]

    found = _in_threads(candidates, len(asks))
    counts = [len(rows) for rows in found]
    local_rows, of = np.concatenate(found), np.repeat(np.arange(len(found)), counts)
    embeddings = [shard.embeddings[rows] for shard, rows in zip(shards, found, strict=True)]
    similarities = exact_similarities(np.concatenate(embeddings), query)
    order = np.lexsort((local_rows, -similarities, of))
    first = np.cumsum(counts) - counts
    answers = []
    for ask, shard, at, count in zip(asks, shards, first.tolist(), counts, strict=True):
        best = order[at : at + min(ask.k, count)]
        n_scored = n_candidates(ask.k, shard.n_rows)
        answers.append(Proposed(local_rows[best], similarities[best], n_scored, is_exact=False))
    return answers


def _in_threads(work: Callable[[range], list[Rows]], n: int) -> list[Rows]:
    """Return what `work` gives for the numbers below `n`, in their order."""
    n_threads = max(1, min(os.cpu_count() or 1, n // _ASKS_A_THREAD))
    bounds = [n * part // n_threads for part in range(n_threads + 1)]
    *others, last = [range(*pair) for pair in pairwise(bounds)]
    running = [start("shard-search", partial(work, part)) for part in others]
    own = work(last)
    return [rows for part in running for rows in part.result()] + own


def _among(shard: Shard, index: VectorIndex, ask: Ask, allowed: NDArray[np.bool_]) -> Proposed:
    """Scan the allowed rows where they are few, else ask for more than are wanted."""
    k, n_rows, n_asked = ask.k, shard.n_rows, shard.n_rows
    if ask.n_allowed:
        n_asked = int(_SPARE * k * n_rows / ask.n_allowed) + 1
    while ask.n_allowed > _SCAN_PER_WANTED * n_asked and not _is_exact(ask, n_asked, n_rows):
        local_rows, found = index.search(ask.query, n_asked, exact=False, expansion=ask.expansion)
        kept = allowed[local_rows]
        if np.count_nonzero(kept) >= k:
            n_scored = n_candidates(n_asked, n_rows)
            return Proposed(local_rows[kept][:k], found[kept][:k], n_scored, is_exact=False)
        n_asked *= 4  # what the filter lets pass is far from the query
    n_hidden = n_rows - ask.n_allowed
    if 4 * (k + n_hidden) < n_rows:
        local_rows, found = index.search(ask.query, k + n_hidden, exact=True)
        kept = allowed[local_rows]
        return Proposed(local_rows[kept][:k], found[kept][:k], ask.n_allowed, is_exact=True)
    candidates = np.flatnonzero(allowed)
    similarities = exact_similarities(shard.embeddings, ask.query, candidates)
    return Proposed(*ranked(candidates, similarities, k), ask.n_allowed, is_exact=True)


def _is_exact(ask: Ask, k: int, n_rows: int) -> bool:
    return ask.is_scanned or k > EXACT_SHARE * n_rows
