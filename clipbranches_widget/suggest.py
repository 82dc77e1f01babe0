"""Which rows to label next (layer 4): those whose label would teach most.

After a round, three kinds of unlabelled rows are mixed:

- the best-scored row of each branch of the answer that no label supports yet;
- likely matches that nobody has marked: in a large catalog matches are rare, and each one found
  teaches more than a doubtful row (relevance sampling: D. Lewis and W. Gale, SIGIR 1994);
- rows on the boundary, whose score is nearest to the threshold (uncertainty sampling, ibid.).

All are taken farthest first: each has a high value and lies far, in the embedding space, from
every labelled row and every row already taken, so that near-duplicates are not asked twice
(greedy k-centre: O. Sener and S. Savarese, ICLR 2018). Before the first round the candidates are
the hits of the search, or random rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import union_mask
from clipbranches_widget.counts import whole_count
from clipbranches_widget.labels import as_row_ids
from clipbranches_widget.removed_rows import nth_present

if TYPE_CHECKING:
    import pandas as pd

    from clipbranches_widget.branch import Branch
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.index_protocol import Index
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.result import Result

Rows = NDArray[np.int64]

BRANCH_SHARE, LIKELY_SHARE = 0.15, 0.7
"""Of the suggestions, at most (but one branch); the others are on the boundary."""

LIKELY_POWER = 8
"""A likely match is worth this power of its score: the score comes first, being different next."""

N_SHORTLIST_TIMES = 40
"""Rows considered for each one suggested: enough to look past many near-duplicates."""

DUPLICATE_DISTANCE, LAST = 0.02, 1e-40
N_RANDOM = 1_000
MIN_SCORE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Suggestions:
    """Rows to label, with the reason for each. Usable wherever rows are.

    Attributes
    ----------
    catalog : Catalog
    rows : (m,) int64
        Distinct, without a label.
    reasons : tuple of str
        Why each row, for people.
    """

    catalog: Catalog = field(repr=False)
    rows: Rows
    reasons: tuple[str, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the rows."""
        return iter(self.rows.tolist())

    def to_pandas(self) -> pd.DataFrame:
        """Return one line a row: row, reason, then path, caption and the catalog's columns."""
        import pandas as pd

        frame = pd.DataFrame({"row": self.rows, "reason": list(self.reasons)})
        items = self.catalog.lines(self.rows).drop_columns(["row"]).to_pandas()
        items = items.rename(columns={"uri": "path"})
        joined: pd.DataFrame = pd.concat([frame, items], axis="columns")
        return joined


def suggest(
    index: Index,
    result: Result | None,
    labels: LabelSet,
    n: int = 12,
    *,
    skip: Iterable[int] = (),
    seed: int = 0,
) -> Suggestions:
    """Return the unlabelled rows whose label would teach most.

    Parameters
    ----------
    index : Index
        The opened catalog.
    result : Result, optional
        The latest answer of a round, or hits of a search; None: random rows that differ.
    labels : LabelSet
        The labels now; they may be newer than `result`.
    n : int
        How many, at least 1; fewer when the catalog has fewer without a label.
    skip : iterable of int
        Rows that were seen and passed over: neither they nor their near-duplicates are taken.
    seed : int
        Of random rows. Same arguments: same rows.

    Raises
    ------
    QueryError
        n < 1.
    """
    chosen = _Chosen(index, labels, np.setdiff1d(as_row_ids(skip), labels.rows))
    n = min(whole_count(n, "n"), chosen.n_open)
    if result is not None and result.pool is not None and result.model is not None:
        _from_round(chosen, result, n)
    elif result is not None:
        free = chosen.free(result.rows)
        scores = result.scores[np.isin(result.rows, free)]
        said = "near the query" if result.kind == "search" else "in the answer"
        reasons = [f"{said} ({score:.2f}), unlike the others" for score in scores]
        chosen.take_diverse(free, np.ones(len(free)), reasons, n)
    _from_anywhere(chosen, n, seed)
    return Suggestions(
        index.catalog, np.array(chosen.rows[:n], dtype=np.int64), tuple(chosen.reasons[:n])
    )


class _Chosen:
    """Rows taken so far, and how far every other row is from them and from those seen before."""

    def __init__(self, index: Index, labels: LabelSet, skipped: Rows) -> None:
        self.index, self.labels = index, labels
        self.seen = np.concatenate([labels.rows, skipped])
        self.rows: list[int] = []
        self.reasons: list[str] = []
        self._known = index.embeddings(self.seen)

    @property
    def n_open(self) -> int:
        """Rows of the catalog that are neither seen nor removed."""
        catalog = self.index.catalog
        return catalog.n_present - len(catalog.without_removed(self.seen))

    def free(self, rows: Rows) -> Rows:
        """Return those of `rows` that are not seen, taken or removed, in their order, once."""
        distinct = rows[np.sort(np.unique(rows, return_index=True)[1])]
        distinct = self.index.catalog.without_removed(distinct)
        return distinct[~np.isin(distinct, [*self.seen.tolist(), *self.rows])]

    def take(self, row: int, reason: str) -> None:
        """Take one row."""
        self.rows.append(row)
        self.reasons.append(reason)
        self._known = np.concatenate([self._known, self.index.embeddings(np.array([row]))])

    def take_diverse(
        self, rows: Rows, values: NDArray[np.float64], reasons: list[str], n: int
    ) -> None:
        """Take up to `n` of `rows`, farthest first: the greatest value times distance each time.

        The distance is ``1 - cosine`` to the nearest row seen or taken; 1 when there is none.
        Near-duplicates of those come last.
        """
        if not len(rows):
            return
        embeddings = self.index.embeddings(rows)
        nearest = np.zeros(len(rows), dtype=np.float32)
        if len(self._known):
            nearest = (embeddings @ self._known.T).max(axis=1)
        is_open = np.ones(len(rows), dtype=np.bool_)
        for _ in range(min(n, len(rows))):
            distance = 1.0 - nearest.astype(np.float64)
            distance[distance < DUPLICATE_DISTANCE] = LAST
            at = int(np.where(is_open, values * distance, -1.0).argmax())
            is_open[at] = False
            self.take(int(rows[at]), reasons[at])
            nearest = np.maximum(nearest, embeddings @ embeddings[at])


def _from_round(chosen: _Chosen, result: Result, n: int) -> None:
    """Take rows of thinly supported branches, likely matches and rows on the boundary."""
    assert result.pool is not None and result.model is not None  # noqa: S101, PT018 - checked
    for row, reason in _unsupported(chosen, result)[: math.ceil(BRANCH_SHARE * n)]:
        if len(chosen.free(np.array([row]))):
            chosen.take(row, reason)
    rows, scores = _scored(chosen, result)
    n_likely = min(round(LIKELY_SHARE * n), n - len(chosen.rows))
    best = np.lexsort((rows, -scores))[: N_SHORTLIST_TIMES * max(n_likely, 1)]
    said = [
        f"{'likely a match' if score >= result.threshold else 'next best'} ({score:.2f})"
        for score in scores[best]
    ]
    chosen.take_diverse(rows[best], scores[best] ** LIKELY_POWER, said, n_likely)
    rest = np.isin(rows, chosen.rows, invert=True)
    rows, scores = rows[rest], scores[rest]
    doubt = np.abs(_log_odds(scores) - _log_odds(np.array([result.threshold])))
    nearest = np.lexsort((rows, doubt))[: N_SHORTLIST_TIMES * n]
    said = [f"on the boundary ({score:.2f})" for score in scores[nearest]]
    chosen.take_diverse(rows[nearest], np.exp(-doubt[nearest]), said, n - len(chosen.rows))


def _scored(chosen: _Chosen, result: Result) -> tuple[Rows, NDArray[np.float64]]:
    """Return free rows with a score, ascending: those the round scored, and its random sample.

    Of the sample only what no branch that is switched off holds.
    """
    assert result.pool is not None and result.model is not None  # noqa: S101, PT018 - checked
    sample = result.model.sample
    off = [branch.box for branch in result.branches if branch.state == "off" and branch.box]
    is_on = ~union_mask(off, sample.codes) & np.isin(sample.rows, result.pool.rows, invert=True)
    rows = np.concatenate([result.pool.rows, sample.rows[is_on]])
    sampled = result.model.teacher.score_of(sample.logits[is_on])
    scores = np.concatenate([result.pool.scores, sampled])
    order = np.argsort(rows)
    rows, scores = rows[order], scores[order]
    is_free = np.isin(rows, chosen.free(rows))
    return rows[is_free], scores[is_free].astype(np.float64)


def _unsupported(chosen: _Chosen, result: Result) -> list[tuple[int, str]]:
    """Return the best unlabelled row of each branch that holds no label, most rows first."""
    labels = chosen.labels
    codes = chosen.index.codes(labels.rows)
    found: list[tuple[int, int, str]] = []
    for branch in result.branches:
        if branch.box is None or branch.state == "off" or branch.box.contains(codes).any():
            continue
        members = chosen.free(result.rows[result.branch_ids == branch.id])
        if len(members):
            found.append((-len(members), int(members[0]), _no_label(branch)))
    return [(row, reason) for _, row, reason in sorted(found)]


def _no_label(branch: Branch) -> str:
    return f"rule '{branch.text}' has no label yet"


def _from_anywhere(chosen: _Chosen, n: int, seed: int) -> None:
    """Fill up with random rows of the whole catalog, unlike those there are."""
    catalog, rng = chosen.index.catalog, np.random.default_rng(seed)
    n_total = catalog.n_present
    while len(chosen.rows) < n:
        n_wanted = n - len(chosen.rows)
        if n_total <= N_RANDOM + N_SHORTLIST_TIMES * n:
            rows = rng.permutation(n_total)
        else:
            rows = rng.integers(0, n_total, max(N_RANDOM, N_SHORTLIST_TIMES * n_wanted))
        free = chosen.free(nth_present(rows.astype(np.int64), catalog.removed_rows))
        reasons = ["a random image, unlike the others"] * len(free)
        chosen.take_diverse(free, np.ones(len(free)), reasons, n_wanted)


def _log_odds(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(scores, MIN_SCORE, 1.0 - MIN_SCORE)
    odds: NDArray[np.float64] = np.log(inside / (1.0 - inside))
    return odds
