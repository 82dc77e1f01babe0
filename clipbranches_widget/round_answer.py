"""Run what a round learned on the catalog (layer 4): candidates, scores, ranking, branches.

Candidates are the rows in the boxes, the vector index's nearest rows to the teacher's direction,
and the rows labelled yes. The boxes are answered stretch by stretch of the catalog, so that the
best rows so far can be shown before the last stretch is read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_query import BoxAnswer, BoxPart, join_parts
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.query_plan import BoxStrategy
from clipbranches_widget.result import Branch, Pool, Result
from clipbranches_widget.round_clock import RoundClock
from clipbranches_widget.round_model import RoundModel
from clipbranches_widget.teacher import Teacher

Partial = Callable[[Result], None]

NEAR_TEXT = "near your examples"
LABELLED_TEXT = "marked yes by you"
N_FIRST_PAGE = 100
PARTIAL_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Asked:
    """What a round was asked, for its results.

    Attributes
    ----------
    labels : LabelSet
    query_text : str
    threshold : float
    seed : int
    """

    labels: LabelSet
    query_text: str
    threshold: float
    seed: int


class Scored:
    """Rows of the catalog with the teacher's score, as they are found.

    Parameters
    ----------
    index : CatalogIndex
    teacher : Teacher
    asked : Asked
    """

    def __init__(self, index: CatalogIndex, teacher: Teacher, asked: Asked) -> None:
        self._index, self._teacher, self._asked = index, teacher, asked
        self._rows: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        self._scores: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)]

    def add(self, rows: NDArray[np.int64]) -> None:
        """Score rows; those added before may come again."""
        self._rows.append(rows)
        self._scores.append(self._teacher.scores(self._index.embeddings(rows)))

    def candidates(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return all rows once, ascending, (m,) int64, and their scores, (m,) float32."""
        rows, first = np.unique(np.concatenate(self._rows), return_index=True)
        return rows, np.concatenate(self._scores)[first]

    def ranked(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the rows of the answer, best first, ties by row; labelled ones as labelled."""
        candidates, scores = self.candidates()
        limit, labels = np.float32(self._asked.threshold), self._asked.labels
        is_yes = np.isin(candidates, labels.positive)
        scores[is_yes] = np.maximum(scores[is_yes], limit)
        kept = (scores >= limit) & ~np.isin(candidates, labels.negative)
        rows, scores = candidates[kept], scores[kept]
        order = np.lexsort((rows, -scores))
        return rows[order], scores[order]

    def so_far(self, clock: RoundClock) -> Result:
        """Return the answer as it stands: ranked, without branches, not complete."""
        rows, scores = self.ranked()
        asked = self._asked
        return Result(
            catalog=self._index.catalog,
            kind="refine",
            rows=rows,
            scores=scores,
            margins=np.full(len(rows), np.nan, dtype=np.float32),
            branch_ids=np.full(len(rows), -1, dtype=np.int32),
            n_touched=len(self.candidates()[0]),
            n_total=len(self._index.catalog),
            timings=clock.timings(),
            query_text=asked.query_text,
            threshold=asked.threshold,
            seed=asked.seed,
            notes=("still being computed: more images follow",),
            is_complete=False,
        )


def first_page(index: CatalogIndex, teacher: Teacher, asked: Asked) -> Scored:
    """Score the rows labelled yes and the nearest to the teacher's direction: no boxes needed."""
    scored = Scored(index, teacher, asked)
    near, _ = index.nearest(teacher.direction, N_FIRST_PAGE)
    scored.add(np.union1d(near, asked.labels.positive))
    return scored


def answer(
    index: CatalogIndex,
    model: RoundModel,
    scored: Scored,
    asked: Asked,
    clock: RoundClock,
    *,
    strategy: BoxStrategy | None = None,
    partial: Partial | None = None,
) -> Result:
    """Run a learned model on the catalog.

    Parameters
    ----------
    index : CatalogIndex
    model : RoundModel
    scored : Scored
        From `first_page`.
    asked : Asked
    clock : RoundClock
        Asked between stretches whether to go on.
    strategy : "bits", "postings" or "scan", optional
        Force how the boxes are answered.
    partial : callable, optional
        Gets the answer so far, some times a second.
    """
    clock.stage("index", 0.8)
    near, _ = index.nearest(model.teacher.direction, model.n_nearest)
    scored.add(near)
    plan, stretches = index.columns.stream_boxes(model.boxes, strategy=strategy)
    parts: list[BoxPart] = []
    last_shown = clock.seconds()
    for part in stretches:
        clock.check()
        parts.append(part)
        scored.add(part.rows)
        if partial is not None and clock.seconds() - last_shown > PARTIAL_EVERY_S:
            partial(scored.so_far(clock))
            last_shown = clock.seconds()
    boxed = join_parts(parts, len(model.boxes), plan)
    clock.stage("rank", 0.9)
    candidates, candidate_scores = scored.candidates()
    rows, scores = scored.ranked()
    branches, branch_ids = _branches(index, model.boxes, boxed, rows, asked.labels)
    return Result(
        catalog=index.catalog,
        kind="refine",
        rows=rows,
        scores=scores,
        margins=index.columns.margins(model.forest, rows),
        branch_ids=branch_ids,
        branches=branches,
        n_touched=len(candidates),
        n_total=len(index.catalog),
        timings=clock.timings(),
        query_text=asked.query_text,
        threshold=model.threshold,
        seed=asked.seed,
        notes=_notes(index, model, candidates, asked.labels),
        plan=plan,
        pool=Pool(candidates, candidate_scores),
        model=model,
    )


def _branches(
    index: CatalogIndex,
    boxes: tuple[LeafBox, ...],
    boxed: BoxAnswer,
    rows: NDArray[np.int64],
    labels: LabelSet,
) -> tuple[tuple[Branch, ...], NDArray[np.int32]]:
    """Say each box in words with its counts, and name the main branch of each row.

    The main branch is the first chosen box that holds the row: the cover takes the most telling
    boxes first. Rows in no box came from the vector index or from a label.
    """
    branch_ids = np.full(len(rows), -1, dtype=np.int32)
    at = np.searchsorted(boxed.rows, rows)
    at[at == len(boxed.rows)] = 0
    is_boxed = boxed.rows[at] == rows if len(boxed.rows) else np.zeros(len(rows), dtype=np.bool_)
    branch_ids[is_boxed] = boxed.box_ids[at[is_boxed]]
    yes, no = index.columns.codes(labels.positive), index.columns.codes(labels.negative)
    branches = [
        Branch(
            id=number,
            text=box.to_text(index.model.names, index.model.edges),
            n_rows=int(boxed.counts[number]),
            n_positive=int(box.contains(yes).sum()),
            n_negative=int(box.contains(no).sum()),
            box=box,
        )
        for number, box in enumerate(boxes)
    ]
    is_yes = np.isin(rows, labels.positive)
    for text, is_member in ((NEAR_TEXT, ~is_boxed & ~is_yes), (LABELLED_TEXT, ~is_boxed & is_yes)):
        if n_members := int(is_member.sum()):
            branch_ids[is_member] = len(branches)
            n_positive = int((is_member & is_yes).sum())
            branches.append(Branch(len(branches), text, n_members, n_positive, n_negative=0))
    return tuple(branches), branch_ids


def _notes(
    index: CatalogIndex, model: RoundModel, candidates: NDArray[np.int64], labels: LabelSet
) -> tuple[str, ...]:
    """Say what the answer rests on: the sample, and what share of the positives it reached."""
    notes = []
    sample = model.sample
    labelled = np.union1d(labels.positive, labels.negative)
    is_wanted = sample.is_random & ~np.isin(sample.rows, labelled)
    is_wanted &= model.teacher.score_of(sample.logits) >= np.float32(model.threshold)
    wanted = sample.rows[is_wanted]
    n_random, found = int(sample.is_random.sum()), int(np.isin(wanted, candidates).sum())
    if n_random < len(index.catalog) and len(wanted):
        notes.append(
            f"boxes and nearest rows hold {found:,} of the {len(wanted):,} rows above the "
            f"threshold in a random sample of {n_random:,}: about {found / len(wanted):.0%}"
        )
    elif found < len(wanted):
        notes.append(
            f"{len(wanted) - found:,} more rows are above the threshold, but in none of the boxes"
        )
    if not len(labels.positive):
        notes.append("no image is marked yes: the query stood in as the example")
    if not len(labels.negative):
        notes.append("no image is marked no: marking a few wrong ones sharpens the answer")
    return tuple(notes)
