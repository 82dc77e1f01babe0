"""What a search or a round returns (layer 3): ranked rows with scores, rules and timings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.branch import Branch
from clipbranches_widget.errors import RefineError
from clipbranches_widget.pool import Pool, with_examples, with_other_sources
from clipbranches_widget.ranking import ranked_at
from clipbranches_widget.result_export import ResultExport
from clipbranches_widget.result_groups import DEFAULT_SIMILARITY, Groups, fold
from clipbranches_widget.round_notes import round_notes

if TYPE_CHECKING:
    import pandas as pd

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.query_plan import QueryPlan
    from clipbranches_widget.round_model import RoundModel

PREVIEW_THRESHOLDS = tuple(n / 20 for n in range(1, 20))


@dataclass(frozen=True, slots=True, eq=False)
class Result(ResultExport):
    """Ranked rows of a catalog: best first, ties by row id.

    Attributes
    ----------
    catalog : Catalog
        Where the rows are.
    kind : "search" or "refine"
        A search holds the k nearest rows; a refine holds every positively classified row.
    rows : (m,) int64
        Row ids, ranked.
    scores : (m,) float32
        What ranks them: for a search the cosine similarity to the query; for a refine the
        teacher's estimate, in 0..1, of how likely the user would say yes.
    margins : (m,) float32
        XGBoost's raw score of the round's trees; NaN for a search.
    branch_ids : (m,) int32
        The main branch of each row, an index into `branches`; -1 for a search.
    branches : tuple of Branch
        The rules that admitted the rows; empty for a search.
    n_touched : int
        Rows that were scored one by one, of `n_total`: for a refine, those the boxes and the
        vector index admitted.
    n_total : int
        Row ids in the catalog, those of removed rows included.
    timings : mapping of str to float
        Seconds a stage; ``total`` is all of it.
    query_text : str
        What was asked, for people.
    threshold : float
        Lowest score of an answer; NaN for a search.
    seed : int
        Seed of the round; 0 for a search.
    notes : tuple of str
        Sentences on what is sampled, approximate, or worth knowing.
    plan : QueryPlan or None
        How the column index answered, with what every other way would have read; print it. None
        for a search.
    pool : Pool or None
        Every row the round scored, with its score; None for a search and while a round runs.
    model : RoundModel or None
        What the round learned: teacher, trees, boxes; None where `pool` is.
    labels : LabelSet or None
        What the round was told; None where `pool` is.
    is_complete : bool
        False for an answer shown while the round is still running: more rows follow, and
        margins and branches are not there yet.
    unfiltered : Result or None
        The answer before `filtered`; None where it was not.
    passing : (n,) bool or None
        The mask of `filtered`; None without.
    groups : Groups or None
        Of a grouped answer, the rows that each of `rows` stands for.
    whole : Result or None
        The answer before `grouped`; None where it was not.
    """

    catalog: Catalog = field(repr=False)
    kind: Literal["search", "refine"]
    rows: NDArray[np.int64]
    scores: NDArray[np.float32]
    margins: NDArray[np.float32]
    branch_ids: NDArray[np.int32]
    branches: tuple[Branch, ...] = ()
    n_touched: int = 0
    n_total: int = 0
    timings: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    query_text: str = ""
    threshold: float = float("nan")
    seed: int = 0
    notes: tuple[str, ...] = ()
    plan: QueryPlan | None = None
    pool: Pool | None = field(default=None, repr=False)
    model: RoundModel | None = field(default=None, repr=False)
    labels: LabelSet | None = field(default=None, repr=False)
    is_complete: bool = True
    unfiltered: Result | None = field(default=None, repr=False)
    passing: NDArray[np.bool_] | None = field(default=None, repr=False)
    groups: Groups | None = field(default=None, repr=False)
    whole: Result | None = field(default=None, repr=False)

    @classmethod
    def from_search(
        cls,
        catalog: Catalog,
        rows: NDArray[np.int64],
        similarities: NDArray[np.float32],
        *,
        n_touched: int,
        seconds: float,
        query_text: str = "",
        notes: tuple[str, ...] = (),
    ) -> Result:
        """Build a search result from ranked `rows` and their cosine similarities."""
        return cls(
            catalog=catalog,
            kind="search",
            rows=rows.astype(np.int64, copy=False),
            scores=similarities.astype(np.float32, copy=False),
            margins=np.full(len(rows), np.nan, dtype=np.float32),
            branch_ids=np.full(len(rows), -1, dtype=np.int32),
            n_touched=n_touched,
            n_total=len(catalog),
            timings=MappingProxyType({"total": seconds}),
            query_text=query_text,
            notes=notes,
        )

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the row ids, best first."""
        return iter(self.rows.tolist())

    def __contains__(self, row: object) -> bool:
        """Return whether a row id is in the answer."""
        return isinstance(row, int | np.integer) and bool((self.rows == row).any())

    def __getitem__(self, index: slice) -> Result:
        """Return the sub-ranking of a slice: ``result[:20]`` is the best twenty, as a Result."""
        if not isinstance(index, slice):
            raise TypeError(
                f"expected a slice such as result[:20], got {type(index).__name__}; "
                "for one row id use result.rows[i]"
            )
        return _picked(self, index)

    def grouped(
        self, similarity: float = DEFAULT_SIMILARITY, *, first: int | None = None
    ) -> Result:
        """Return the answer with near-duplicates folded into their best-ranked one.

        `rows` are then those that stand for a group, in their order, and `groups` maps them to
        the rows folded into them; `ungrouped` brings all back. Every folded row is within the
        similarity of what stands for it; no two rows that stand for a group are. A label is for
        one row all the same. `at` and `filtered` group anew, `grouped` once more from the start.

        Parameters
        ----------
        similarity : float
            Lowest cosine similarity, above 0 and up to 1; see `near_duplicates`.
        first : int, optional
            Group only so many of the best rows. Below 25,000 all pairs are compared (20,000 rows
            of 512 dimensions: 5 s); of more, those that the vector index proposes.

        Raises
        ------
        QueryError
            A similarity or count out of range.

        Examples
        --------
        >>> few = session.refine().grouped()      # doctest: +SKIP
        >>> few.groups[int(few.rows[0])]          # doctest: +SKIP
        array([ 812, 4077])
        """
        whole = self.ungrouped()
        places, groups = fold(self.catalog, whole.rows, similarity, first)
        notes = (*whole.notes, groups.note(len(whole)))
        return replace(_picked(whole, places), notes=notes, groups=groups, whole=whole)

    def ungrouped(self) -> Result:
        """Return the rows of a grouped answer with those folded into them, in rank order."""
        if self.groups is None or self.whole is None:
            return self
        is_folded = np.isin(self.groups.representatives, self.rows)
        kept = np.isin(self.whole.rows, [*self.rows, *self.groups.rows[is_folded]])
        return self.whole if kept.all() else _picked(self.whole, np.flatnonzero(kept))

    def filtered(self, passing: NDArray[np.bool_]) -> Result:
        """Return the answer without the rows that do not pass, labelled ones included.

        What was learned stays: scores, margins, ranking and the branches with their counts, which
        are of the whole catalog. `pool` holds only rows that pass; `at` and `preview` answer for
        these. A note says how many rows pass.

        Parameters
        ----------
        passing : (n,) bool
            For each row of the catalog whether it passes; of a filtered answer, those pass that
            passed before, too.

        Raises
        ------
        RefineError
            If it is no mask of the catalog's rows.
        """
        if self.groups is not None and self.whole is not None:
            return self.groups.again(self.whole.filtered(passing))
        mask = np.asarray(passing)
        if mask.dtype != bool or mask.shape != (self.n_total,):
            raise RefineError(
                f"expected one bool for each of the {self.n_total:,} rows of the catalog, got "
                f"{mask.dtype} of shape {mask.shape}"
            )
        whole = self if self.unfiltered is None else self.unfiltered
        if self.passing is not None:
            mask = mask & self.passing
        kept = mask[whole.rows]
        rows, branch_ids = whole.rows[kept], whole.branch_ids[kept]
        note = f"{len(rows):,} of the {len(whole):,} images of the answer match the filter"
        return replace(
            whole,
            rows=rows,
            scores=whole.scores[kept],
            margins=whole.margins[kept],
            branch_ids=branch_ids,
            branches=with_examples(whole.branches, rows, branch_ids),
            notes=(*whole.notes, note),
            pool=None if whole.pool is None else whole.pool.filtered(mask),
            unfiltered=whole,
            passing=mask,
        )

    def at(self, threshold: float) -> Result:
        """Return the answer of the same round at another threshold, without learning anew.

        Exact for the rows that the round scored (`pool`): a higher threshold gives a part of the
        ranking, a lower one adds the scored rows below the round's own. Labelled rows stay as
        labelled. Of a slice, the answer of the whole round is returned. Rows, scores, margins,
        branches and notes are those that the round would have had; counts of rows that come from
        no box are those of the new answer.

        Below `RoundModel.threshold`, which the boxes were learned for, images may be missing;
        the notes say so.

        Parameters
        ----------
        threshold : float
            Lowest score, in (0, 1).

        Raises
        ------
        RefineError
            If `threshold` is not in (0, 1), or this is a search or a round still running.
        """
        if self.groups is not None and self.whole is not None:
            return self.groups.again(self.whole.at(threshold))
        if self.unfiltered is not None and self.passing is not None:
            return self.unfiltered.at(threshold).filtered(self.passing)
        pool, model, labels = self._round()
        limit = _checked_threshold(threshold)
        positions, scores = ranked_at(pool.rows, pool.scores, labels, limit)
        rows = pool.rows[positions]
        branches, branch_ids = with_other_sources(
            tuple(branch for branch in self.branches if branch.box is not None),
            rows,
            pool.box_ids[positions],
            np.isin(rows, labels.positive),
        )
        old, new = (
            round_notes(model, pool.rows, labels, n_rows=self.catalog.n_present, threshold=each)
            for each in (self.threshold, limit)
        )
        return replace(
            self,
            rows=rows,
            scores=scores,
            margins=pool.margins()[positions],
            branch_ids=branch_ids,
            branches=branches,
            threshold=limit,
            notes=(*new, *(note for note in self.notes if note not in old)),
        )

    def preview(self, thresholds: Iterable[float] | None = None) -> pd.DataFrame:
        """Return how many rows `at` would give at each threshold, and how many to expect right.

        Columns, one line a threshold: threshold (float64); n_rows (int64); expected_precision
        (float64), the mean score of the rows, as a score says how likely a yes is, with rows
        labelled yes counted as 1, NaN where there are no rows; expected_yes (float64), the same
        times `n_rows`.

        Parameters
        ----------
        thresholds : iterable of float, optional
            In (0, 1), in the order wanted; default .05, .1 ... .95 and the result's own.

        Raises
        ------
        RefineError
            As `at`.
        """
        import pandas as pd

        pool, _, labels = self._round()
        if thresholds is None:
            thresholds = sorted({*PREVIEW_THRESHOLDS, self.threshold})
        limits = [_checked_threshold(each) for each in thresholds]
        chances = np.sort(pool.scores[~np.isin(pool.rows, labels.rows)])
        first = np.searchsorted(chances, np.array(limits, dtype=np.float32))
        sums_from = np.append(np.cumsum(chances[::-1], dtype=np.float64)[::-1], 0.0)
        n_labelled = int(np.isin(pool.rows, labels.positive).sum())
        frame = pd.DataFrame({"threshold": np.array(limits, dtype=np.float64)})
        frame["n_rows"] = (len(chances) - first + n_labelled).astype(np.int64)
        frame["expected_yes"] = sums_from[first] + n_labelled
        frame.insert(2, "expected_precision", frame["expected_yes"] / frame["n_rows"])
        return frame

    def _round(self) -> tuple[Pool, RoundModel, LabelSet]:
        """Return what a complete round leaves behind; raises RefineError for anything else."""
        if self.pool is None or self.model is None or self.labels is None:
            what = "a search" if self.kind == "search" else "a round that is still running"
            raise RefineError(
                f"expected the result of a complete round, got that of {what}: "
                "use what session.refine() returns"
            )
        return self.pool, self.model, self.labels

    def branch_text(self, position: int) -> str:
        """Return the rule that admitted the row at a rank; empty for a search."""
        branch_id = int(self.branch_ids[position])
        return self.branches[branch_id].text if branch_id >= 0 else ""

    def __repr__(self) -> str:
        """Return one line: what it is, how many, how long."""
        what = f"{len(self):,} of {self.n_total:,} images"
        about = f" for {self.query_text!r}" if self.query_text else ""
        seconds = self.timings.get("total")
        took = f", {seconds * 1000:.0f} ms" if seconds is not None else ""
        read = f", {self.n_touched / max(self.n_total, 1):.1%} of the catalog scored"
        rules = f", {len(self.branches)} branches" if self.branches else ""
        so_far = "" if self.is_complete else " so far"
        return f"<Result {self.kind}{about}: {what}{so_far}{rules}{read}{took}>"


def _picked(result: Result, index: slice | NDArray[np.int64]) -> Result:
    return replace(
        result,
        rows=result.rows[index],
        scores=result.scores[index],
        margins=result.margins[index],
        branch_ids=result.branch_ids[index],
    )


def _checked_threshold(threshold: float) -> float:
    limit = float(threshold)
    if not 0.0 < limit < 1.0:
        raise RefineError(f"expected a threshold between 0 and 1, got {threshold}")
    return limit
