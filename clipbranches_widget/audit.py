"""How far to trust an answer (layer 4): label a small random sample, get precision and recall.

`propose` splits the catalog into strata and draws some rows of each at random:

- *inside*: the answer;
- *boundary*: the rows that would be next in the answer, as many as it holds, and *near*: four
  times as many after those, both by the teacher's score, because missed matches concentrate there;
- *far*: every other row of the catalog.

Rows labelled before are known, belong to no stratum and are never asked again.
`Audit.report` turns labels of the proposed rows into intervals: for precision Blaker's, for recall
and the number of matches the melded one (`clipbranches_widget.intervals`). They assume nothing
about where matches are, only that labels are right. So a large catalog keeps recall uncertain:
with n labels and no match among them, up to a share 3.7 / n of the far rows may be matches.

Measured (benchmarks/audit.py: 13 simulated catalogs, 20, 60 and 200 labels, 300 audits each): the
95 % intervals hold the truth in at least 93 % of each 300 audits and in 98 % of all. With 60 labels
their mean width is .1 to .4 for precision; for recall .85 to .97 in catalogs of 5,000 to 100,000
rows where few matches are missed, .4 to .7 where many are; for recall nearby .5 to .6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.audit_report import AuditReport, Counted, report_on
from clipbranches_widget.counts import whole_count
from clipbranches_widget.errors import QueryError, RefineError
from clipbranches_widget.intervals import Draw
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.session_results import digest

if TYPE_CHECKING:
    from clipbranches_widget.index_protocol import Index
    from clipbranches_widget.result import Result

Rows = NDArray[np.int64]

INSIDE, BOUNDARY, NEAR, FAR = STRATA = ("inside", "boundary", "near", "far")
SHARES = {INSIDE: 0.3, BOUNDARY: 0.15, NEAR: 0.15, FAR: 0.4}
"""Of the proposed rows. Far rows decide how much of the catalog recall can vouch for."""

MIN_BOUNDARY, MAX_BOUNDARY = 50, 2_000
NEAR_TIMES = 4
MIN_LABELLED_SHARE = 0.75
_PERMUTED_BELOW = 100_000


@dataclass(frozen=True, slots=True, eq=False)
class Stratum:
    """Unlabelled rows of a catalog, of which some are drawn.

    Attributes
    ----------
    name : "inside", "boundary", "near" or "far"
    n_rows : int
    rows : (n_rows,) int64 or None
        Ascending; None for the rows of no other stratum.
    """

    name: str
    n_rows: int
    rows: Rows | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Audit:
    """Rows to label, and what is needed to turn their labels into precision and recall.

    Usable wherever rows are, as in ``session.label(negative=audit)``.

    Attributes
    ----------
    rows : (n,) int64
        In random order; label them in this order.
    stratum_ids : (n,) int8
        Stratum of each row, an index into `strata`.
    strata : tuple of Stratum
        Disjoint; with the rows of `known` they are the whole catalog.
    known : LabelSet
        The labels when the audit was proposed.
    answer_rows : (m,) int64
        The answer that is audited, ascending.
    n_total : int
        Row ids of the catalog.
    seed : int
    digest : str
        Of the answer's ranked rows, as in the session file.
    removed : (r,) int64
        Rows that are removed from the catalog, ascending: in no stratum.
    """

    rows: Rows
    stratum_ids: NDArray[np.int8]
    strata: tuple[Stratum, ...]
    known: LabelSet
    answer_rows: Rows
    n_total: int
    seed: int
    digest: str
    removed: Rows = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    def __len__(self) -> int:
        """Return the number of proposed rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the proposed rows, in order."""
        return iter(self.rows.tolist())

    def stratum_of(self, position: int) -> str:
        """Return the name of the stratum of a proposed row."""
        return self.strata[int(self.stratum_ids[position])].name

    def more(self, n: int = 20, *, only: str | None = None) -> Audit:
        """Return this audit with up to `n` more rows, after those there are.

        Parameters
        ----------
        n : int
            At least 1; fewer rows when the strata are exhausted.
        only : "inside", "boundary", "near" or "far", optional
            Draw from this stratum alone.

        Raises
        ------
        QueryError
            A bad `n`, or a name of no stratum.
        """
        names = [stratum.name for stratum in self.strata]
        if only is not None and only not in names:
            raise QueryError(f"expected one of {', '.join(names)}, got {only!r}")
        have = np.bincount(self.stratum_ids, minlength=len(self.strata)).tolist()
        open_ = [only in {None, name} for name in names]
        rows, stratum_ids = _drawn(self, _allocated(self.strata, whole_count(n, "n"), have, open_))
        is_new = ~np.isin(rows, self.rows)
        return replace(
            self,
            rows=np.concatenate([self.rows, rows[is_new]]),
            stratum_ids=np.concatenate([self.stratum_ids, stratum_ids[is_new]]),
        )

    def report(self, labels: LabelSet) -> AuditReport:
        """Say what the labels given so far tell of the answer.

        Parameters
        ----------
        labels : LabelSet
            Any; those of the proposed rows and of rows known before count.

        Notes
        -----
        The proposed rows of a stratum are in random order, so the first so many are a random
        sample too, and those after it count as not yet drawn. A stratum's sample is its longest
        beginning that ends with a label and has labels for three quarters; a row passed over in it
        counts as a match for upper limits and as none for lower ones. Other labelled rows
        were not chosen at random: they only bound what is possible.
        """
        draws = [self._draw(number, labels) for number in range(len(self.strata))]
        asked = np.bincount(self.stratum_ids, minlength=len(self.strata)).tolist()
        counted = [
            Counted(stratum.name, n_asked, draw)
            for stratum, n_asked, draw in zip(self.strata, asked, draws, strict=True)
        ]
        is_inside = np.isin(self.known.rows, self.answer_rows)
        known = (
            _known(self.known.rows[is_inside], labels),
            _known(self.known.rows[~is_inside], labels),
        )
        n_missing = len(self.rows) - len(labels.among(self.rows))
        return report_on(counted, *known, n_answer=len(self.answer_rows), n_missing=n_missing)

    def _draw(self, number: int, labels: LabelSet) -> Draw:
        """Return the sample of one stratum that the labels make."""
        asked = self.rows[self.stratum_ids == number]
        sample = asked[: _n_sampled(np.isin(asked, labels.rows))]
        n_yes = int(np.isin(sample, labels.positive).sum())
        n_no = int(np.isin(sample, labels.negative).sum())
        others = labels.without(sample).without(self.known.rows).without(self.removed)
        more_yes, more_no = (
            int(self._are_in(number, rows).sum()) for rows in (others.positive, others.negative)
        )
        return Draw(
            self.strata[number].n_rows,
            n_drawn=len(sample),
            n_yes=n_yes,
            n_unsure=len(sample) - n_yes - n_no,
            n_more_yes=more_yes,
            n_more_no=more_no,
        )

    def _are_in(self, number: int, rows: Rows) -> NDArray[np.bool_]:
        """Tell which of `rows`, none of them known before, are in a stratum."""
        members = self.strata[number].rows
        if members is not None:
            return np.isin(rows, members)
        inside = [stratum.rows for stratum in self.strata if stratum.rows is not None]
        return ~np.isin(rows, np.concatenate(inside))


def propose(index: Index, result: Result, labels: LabelSet, *, n: int = 60, seed: int = 0) -> Audit:
    """Draw a stratified random sample of rows that tells how good an answer is.

    Parameters
    ----------
    index : Index
        The opened catalog.
    result : Result
        The finished answer of a round; a slice of it is audited as an answer of its own.
    labels : LabelSet
        What is labelled already: known, and not asked again.
    n : int
        How many rows, at least 1; at most all that have no label.
    seed : int
        Of the draw. Same answer, labels and seed: same rows, and with a larger `n` those of a
        smaller one among them.

    Raises
    ------
    RefineError
        `result` is no finished answer of a round.
    QueryError
        n < 1.
    """
    if result.kind != "refine" or result.pool is None or result.model is None:
        kind = "search" if result.kind == "search" else "round that is still running"
        raise RefineError(
            f"expected the answer of a finished round, got that of a {kind}: "
            "audit what session.refine() returns"
        )
    labels, _ = index.present(labels)
    taken = np.union1d(result.rows, labels.rows)
    n_next = _n_boundary(len(result.rows)) * (1 + NEAR_TIMES)
    next_rows = _next_rows(index, result, taken, n_next)
    n_total, removed = len(index.catalog), index.catalog.removed_rows
    audit = stratified(n_total, result.rows, next_rows, labels, seed=seed, removed=removed)
    return audit.more(n)


def stratified(
    n_total: int,
    answer: Rows,
    next_rows: Rows,
    labels: LabelSet,
    *,
    seed: int = 0,
    removed: Rows | None = None,
) -> Audit:
    """Return an audit without proposed rows; `Audit.more` draws them.

    Parameters
    ----------
    n_total : int
        Row ids of the catalog.
    answer : (m,) int64
        Ranked.
    next_rows : (k,) int64
        Rows neither in the answer nor labelled, those first that would be next in it. The first
        m of them (at least 50, at most 2,000) are the boundary, the others are near.
    labels : LabelSet
        What is known.
    seed : int
    removed : (r,) int64, optional
        Rows in none of the others that are removed from the catalog, ascending.
    """
    gone = np.empty(0, np.int64) if removed is None else removed
    inside = np.setdiff1d(answer, labels.rows)
    n_boundary = _n_boundary(len(answer))
    boundary, near = np.sort(next_rows[:n_boundary]), np.sort(next_rows[n_boundary:])
    n_far = n_total - len(np.union1d(answer, labels.rows)) - len(next_rows) - len(gone)
    strata = (
        Stratum(INSIDE, len(inside), inside),
        Stratum(BOUNDARY, len(boundary), boundary),
        Stratum(NEAR, len(near), near),
        Stratum(FAR, n_far),
    )
    return Audit(
        rows=np.empty(0, np.int64),
        stratum_ids=np.empty(0, np.int8),
        strata=strata,
        known=labels,
        answer_rows=np.unique(answer),
        n_total=n_total,
        seed=seed,
        digest=digest(answer),
        removed=gone,
    )


def _n_boundary(n_answer: int) -> int:
    return int(np.clip(n_answer, MIN_BOUNDARY, MAX_BOUNDARY))


def _next_rows(index: Index, result: Result, taken: Rows, n: int) -> Rows:
    """Return up to `n` rows that are not taken, by the teacher's score, ties by row.

    Among the rows that the round scored and the vector index's nearest to the teacher's direction.
    """
    assert result.pool is not None and result.model is not None  # noqa: S101, PT018 - checked
    teacher = result.model.teacher
    n_taken = int(np.clip(len(taken), 0, MAX_BOUNDARY))
    near, _ = index.nearest(teacher.direction, n + n_taken)
    near = np.setdiff1d(near, result.pool.rows)
    rows = np.concatenate([result.pool.rows, near])
    scores = np.concatenate([result.pool.scores, teacher.score_of(index.logits(teacher, near))])
    is_free = ~np.isin(rows, taken)
    rows, scores = rows[is_free], scores[is_free]
    best: Rows = rows[np.lexsort((rows, -scores))[:n]]
    return best


def _allocated(
    strata: Sequence[Stratum], n: int, have: Sequence[int], is_open: Sequence[bool]
) -> list[int]:
    """Return how many rows of each stratum to have, `n` more in all, as near to `SHARES` as can be.

    Sainte-Lague's divisors, after one row of each stratum: more rows never mean fewer of one.
    """
    counts = list(have)
    for _ in range(n):
        best, at = 0.0, -1
        for number, stratum in enumerate(strata):
            if is_open[number] and counts[number] < stratum.n_rows:
                divisor = 2 * counts[number] + 1 if counts[number] else 1e-3
                quotient = SHARES[stratum.name] / divisor
                if quotient > best:
                    best, at = quotient, number
        if at < 0:
            break
        counts[at] += 1
    return counts


def _drawn(audit: Audit, counts: Sequence[int]) -> tuple[Rows, NDArray[np.int8]]:
    """Draw rows of each stratum and shuffle them: (rows, stratum ids)."""
    parts = [_draw_rows(audit, number, count) for number, count in enumerate(counts)]
    rows = np.concatenate([np.empty(0, np.int64), *parts])
    stratum_ids = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts])
    order = np.random.default_rng([audit.seed, len(parts)]).permutation(len(rows))
    return rows[order], stratum_ids[order]


def _draw_rows(audit: Audit, number: int, n: int) -> Rows:
    """Draw `n` distinct rows of a stratum; the first ones are the same whatever `n` is."""
    stratum = audit.strata[number]
    rng = np.random.default_rng([audit.seed, number])
    if stratum.n_rows <= _PERMUTED_BELOW:
        places = rng.permutation(stratum.n_rows)[:n]
    else:
        places = np.empty(0, np.int64)
        while len(places) < n:
            places = np.concatenate([places, rng.integers(0, stratum.n_rows, 256)])
            places = places[np.sort(np.unique(places, return_index=True)[1])]
        places = places[:n]
    if stratum.rows is not None:
        return stratum.rows[places]
    others = [each.rows for each in audit.strata if each.rows is not None]
    taken = np.sort(np.concatenate([audit.known.rows, audit.answer_rows, audit.removed, *others]))
    taken = np.unique(taken)
    # The row at place p of those not taken: p plus the taken rows before it.
    rows: Rows = places + np.searchsorted(taken - np.arange(len(taken)), places, side="right")
    return rows


def _known(rows: Rows, labels: LabelSet) -> Draw:
    """Return rows that were labelled before as a sample of all that still have a label."""
    n_yes = int(np.isin(rows, labels.positive).sum())
    n_labelled = len(labels.among(rows))
    return Draw(len(rows), n_more_yes=n_yes, n_more_no=n_labelled - n_yes)


def _n_sampled(is_labelled: NDArray[np.bool_]) -> int:
    """Return the length of the longest beginning that counts as drawn; see `Audit.report`."""
    share = np.cumsum(is_labelled) / np.arange(1, len(is_labelled) + 1)
    ends = np.flatnonzero(is_labelled & (share >= MIN_LABELLED_SHARE))
    return int(ends[-1]) + 1 if len(ends) else 0
