"""What a search or a round returns (layer 3): ranked rows with scores, rules and timings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.query_plan import QueryPlan
    from clipbranches_widget.round_model import RoundModel


@dataclass(frozen=True, slots=True)
class Branch:
    """One rule of an answer: a leaf box, said in words, with its counts.

    Attributes
    ----------
    id : int
        Position in `Result.branches`; `Result.branch_ids` refers to it.
    text : str
        The rule, such as ``bird >= 0.31 and aircraft < 0.18``.
    n_rows : int
        Rows of the whole catalog that the rule admits, before the score decides; without a box,
        the rows of the answer that no box admits.
    n_positive, n_negative : int
        Labelled rows that the rule admits, by label.
    box : LeafBox or None
        The box; None for the two sources that are no box: the vector index's nearest rows to
        the examples, and rows admitted only because they are labelled yes.
    """

    id: int
    text: str
    n_rows: int
    n_positive: int
    n_negative: int
    box: LeafBox | None = None

    def __str__(self) -> str:
        """Return the rule with its counts, on one line."""
        images = "image" if self.n_rows == 1 else "images"
        return (
            f"{self.text} -> {self.n_rows:,} {images} ({self.n_positive} yes, {self.n_negative} no)"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Every row that a round scored, in the answer or not.

    Attributes
    ----------
    rows : (m,) int64
        Ascending.
    scores : (m,) float32
        The teacher's, whatever the labels say.
    """

    rows: NDArray[np.int64]
    scores: NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Result:
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
        Rows in the catalog.
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
    is_complete : bool
        False for an answer shown while the round is still running: more rows follow, and
        margins and branches are not there yet.
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
    is_complete: bool = True

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
        return replace(
            self,
            rows=self.rows[index],
            scores=self.scores[index],
            margins=self.margins[index],
            branch_ids=self.branch_ids[index],
        )

    def branch_text(self, position: int) -> str:
        """Return the rule that admitted the row at a rank; empty for a search."""
        branch_id = int(self.branch_ids[position])
        return self.branches[branch_id].text if branch_id >= 0 else ""

    def to_pandas(self) -> pd.DataFrame:
        """Return one line a row, in rank order, with the catalog's own columns.

        Columns: row (int64), score and margin (float32), branch (str), path, caption, width,
        height, content_hash and the user's columns. The index is the rank from 0.
        """
        import pandas as pd

        frame = pd.DataFrame(
            {
                "row": self.rows,
                "score": self.scores,
                "margin": self.margins,
                "branch": [self.branch_text(i) for i in range(len(self))],
            }
        )
        items = self.catalog.items.drop_columns(["row"]).take(self.rows).to_pandas()
        items = items.rename(columns={"uri": "path"})
        joined: pd.DataFrame = pd.concat([frame, items], axis="columns")
        return joined

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
