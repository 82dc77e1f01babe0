"""The nearest rows over all shards of a catalog (layer 3).

A catalog of few rows is scanned. Else each shard is asked for its share of the answer, by its
number of rows, and some more: twenty shards then propose hardly more rows than one would. A shard
that turns out to hold more than its share, as one topic appended at once does, is asked again for
all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.shard import Shard
from clipbranches_widget.shard_ask import Ask, Proposed, propose_all
from clipbranches_widget.vector_index import EXACT_BELOW, EXPANSION_SEARCH, ranked

Rows = NDArray[np.int64]

_SCANNED_BELOW = 1_000
"""Rows of a shard of a large catalog that are scanned as quickly as its graph answers."""

_SHARE_SPARE, _MORE = 1.25, 8
_FULL = 0.95
"""A shard with so much of what it proposed in the answer may hold more, and is asked again."""

_MIN_EXPANSION = 64


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


Runner = Callable[[Sequence[Ask]], list[Proposed]]
"""Answers what shards are asked, in the order asked."""


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
    return nearest_of_each(
        catalog, [(query, k)], lambda asks: propose_all(catalog, query, asks), only=only
    )[0]


def nearest_of_each(
    catalog: Catalog,
    wanted: Sequence[tuple[NDArray[np.float64], int]],
    run: Runner,
    *,
    only: NDArray[np.bool_] | None = None,
) -> list[Nearest]:
    """Return the rows nearest to each of several queries, whoever answers what shards are asked.

    Parameters
    ----------
    catalog : Catalog
        Its shards' sizes and removed rows count; their vector indexes are not opened.
    wanted : sequence of (query, k)
        As for `nearest`.
    run : callable
        Called once with all that is asked, and once more where shards hold more than their
        share.
    only : (n,) bool, optional
    """
    plans = [_plan(catalog, query, k, only) for query, k in wanted]
    proposed = iter(run([each.share for plan in plans for each in plan]))
    parts = [list(islice(proposed, len(plan))) for plan in plans]
    found = [_merged(catalog, part, k) for part, (_, k) in zip(parts, wanted, strict=True)]
    again = [
        (n, shard)
        for n, (plan, (rows, _)) in enumerate(zip(plans, found, strict=True))
        for shard in _overfull(catalog, plan, rows)
    ]
    floors = [
        _lowest(similarities, k) for (_, similarities), (_, k) in zip(found, wanted, strict=True)
    ]
    while again:
        asks = [replace(plans[n][shard].whole, floor=floors[n]) for n, shard in again]
        for (n, asked), part in zip(again, run(asks), strict=True):
            parts[n][asked] = part
        for n in {n for n, _ in again}:
            found[n] = _merged(catalog, parts[n], wanted[n][1])
        # A graph may miss what it found for a smaller k: then rows below the floor count after all.
        low = [_lowest(found[n][1], wanted[n][1]) < floors[n] for n, _ in again]
        again = [each for each, is_low in zip(again, low, strict=True) if is_low]
        floors = [-math.inf] * len(plans)
    return [
        Nearest(
            rows,
            similarities,
            sum(each.n_scored for each in part),
            all(each.is_exact for each in part),
        )
        for (rows, similarities), part in zip(found, parts, strict=True)
    ]


def _overfull(catalog: Catalog, plan: Sequence[_Plan], rows: Rows) -> Iterator[int]:
    """Yield the shards that hold more of the rows found than was asked of them."""
    in_order = np.sort(rows)
    for shard, asked in zip(catalog.shards, plan, strict=True):
        first, last = np.searchsorted(in_order, (shard.first_row, shard.end))
        if asked.share.k < asked.whole.k and last - first > _FULL * asked.share.k:
            yield shard.number


def _lowest(similarities: NDArray[np.float32], k: int) -> float:
    """Return the similarity of the k-th of ranked rows; none is too low where there are fewer."""
    return float(similarities[k - 1]) if len(similarities) >= k else -math.inf


class _Plan(NamedTuple):
    """What one shard is asked first, its share of the answer; and then, where that is too little.

    The graph looks at fewer rows for a share.
    """

    share: Ask
    whole: Ask


def _plan(
    catalog: Catalog,
    query: NDArray[np.float64],
    k: int,
    only: NDArray[np.bool_] | None,
) -> list[_Plan]:
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
    plans = []
    for n, mask in enumerate(masks):
        about = (bool(is_scanned[n]), mask, int(counts[n]), only is not None)
        share = Ask(n, query, int(shares[n]), int(expansions[n]), *about)
        plans.append(_Plan(share, Ask(n, query, k, EXPANSION_SEARCH, *about)))
    return plans


def _merged(
    catalog: Catalog, parts: Sequence[Proposed], k: int
) -> tuple[Rows, NDArray[np.float32]]:
    """Return the `k` best of all shards."""
    shards = zip(catalog.shards, parts, strict=True)
    rows = [part.local_rows + shard.first_row for shard, part in shards]
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
