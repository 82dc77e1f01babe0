"""Run what a round learned on the catalog (layer 4): candidates, scores, ranking, branches.

Candidates are the rows in the boxes, the vector index's nearest rows to the teacher's direction,
and the rows labelled yes. The boxes are answered stretch by stretch of the catalog, so that the
best rows so far can be shown before the last stretch is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import LeafBox, union_mask
from clipbranches_widget.branch import Branch
from clipbranches_widget.conditions import RuleState, column_names, conditions_of
from clipbranches_widget.index_protocol import Index
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.pool import Pool, with_other_sources
from clipbranches_widget.query_answer import BoxAnswer, BoxPart, join_parts
from clipbranches_widget.query_plan import BoxStrategy
from clipbranches_widget.ranking import ranked_at
from clipbranches_widget.result import Result
from clipbranches_widget.round_clock import RoundClock
from clipbranches_widget.round_model import RoundModel
from clipbranches_widget.round_notes import label_notes, removed_notes, round_notes
from clipbranches_widget.teacher import Teacher

Partial = Callable[[Result], None]

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
    off, pinned : tuple of LeafBox
        Rules switched off, and rules to read whatever is learned; only their ranges count.
    n_ignored : int
        Labels that were left out: their rows are removed from the catalog.
    """

    labels: LabelSet
    query_text: str
    threshold: float
    seed: int
    off: tuple[LeafBox, ...] = ()
    pinned: tuple[LeafBox, ...] = ()
    n_ignored: int = 0

    def under_rules(
        self, chosen: Sequence[LeafBox]
    ) -> tuple[tuple[LeafBox, ...], tuple[LeafBox, ...]]:
        """Return the boxes to read, and all that are listed, when `chosen` were learned.

        Pinned boxes that were not learned come first, then what was learned, in its order; boxes
        switched off keep their place in the list, and follow it where they were not learned.
        """
        learned = {box.ranges for box in chosen}
        listed = (
            *(box for box in self.pinned if box.ranges not in learned),
            *chosen,
            *(box for box in self.off if box.ranges not in learned),
        )
        off = {box.ranges for box in self.off}
        return tuple(box for box in listed if box.ranges not in off), listed


class Scored:
    """Rows of the catalog with the teacher's score, as they are found.

    Rows inside a box that is switched off are held back until a box that is read holds them,
    unless they are labelled yes: else the vector index would bring most of them back.

    Parameters
    ----------
    index : Index
    teacher : Teacher
    asked : Asked
    """

    def __init__(self, index: Index, teacher: Teacher, asked: Asked) -> None:
        self._index, self._teacher, self._asked = index, teacher, asked
        self._rows: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)]
        self._scores: list[NDArray[np.float32]] = [np.empty(0, dtype=np.float32)]

    def add(
        self, rows: NDArray[np.int64], logits: NDArray[np.float32], *, is_boxed: bool = False
    ) -> None:
        """Take in rows, which a box that is read holds or not; known ones may come again."""
        off = self._asked.off
        if off and not is_boxed:
            is_off = union_mask(off, self._index.codes(rows))
            kept = ~is_off | np.isin(rows, self._asked.labels.positive)
            rows, logits = rows[kept], logits[kept]
        self._rows.append(rows)
        self._scores.append(self._teacher.score_of(logits))

    def candidates(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return all rows once, ascending, (m,) int64, and their scores, (m,) float32."""
        rows, first = np.unique(np.concatenate(self._rows), return_index=True)
        return rows, np.concatenate(self._scores)[first]

    def so_far(self, clock: RoundClock) -> Result:
        """Return the answer as it stands: ranked, without branches, not complete."""
        asked = self._asked
        candidates, candidate_scores = self.candidates()
        positions, scores = ranked_at(candidates, candidate_scores, asked.labels, asked.threshold)
        rows = candidates[positions]
        return Result(
            catalog=self._index.catalog,
            kind="refine",
            rows=rows,
            scores=scores,
            margins=np.full(len(rows), np.nan, dtype=np.float32),
            branch_ids=np.full(len(rows), -1, dtype=np.int32),
            n_touched=len(candidates),
            n_total=len(self._index.catalog),
            timings=clock.timings(),
            query_text=asked.query_text,
            threshold=asked.threshold,
            seed=asked.seed,
            notes=("still being computed: more images follow",),
            is_complete=False,
        )


def first_page(index: Index, teacher: Teacher, asked: Asked) -> Scored:
    """Score the rows labelled yes and the nearest to the teacher's direction: no boxes needed."""
    scored = Scored(index, teacher, asked)
    scored.add(*index.nearest_scored(teacher, N_FIRST_PAGE))
    positives = asked.labels.positive
    scored.add(positives, index.logits(teacher, positives))
    return scored


def answer(
    index: Index,
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
    index : Index
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
    plan, stretches = index.stream_boxes(
        model.boxes, model.teacher, strategy=strategy, cancel=clock.cancel
    )
    scored.add(*index.nearest_scored(model.teacher, model.n_nearest))
    parts: list[BoxPart] = []
    last_shown = clock.seconds()
    with clock.cancelled():
        for part, rows, logits in stretches:
            clock.check()
            parts.append(part)
            scored.add(rows, logits, is_boxed=True)
            if partial is not None and clock.seconds() - last_shown > PARTIAL_EVERY_S:
                partial(scored.so_far(clock))
                last_shown = clock.seconds()
    boxed = join_parts(parts, len(model.boxes), plan)
    clock.stage("rank", 0.9)
    listed = model.listed or model.boxes
    off = {box.ranges for box in model.off}
    numbers = np.array([n for n, box in enumerate(listed) if box.ranges not in off], dtype=np.int32)
    pool = _pool(index, model, scored, boxed, numbers)
    positions, scores = ranked_at(pool.rows, pool.scores, asked.labels, model.threshold)
    rows = pool.rows[positions]
    branches, branch_ids = with_other_sources(
        _box_branches(index, listed, _counts(index, model, boxed, numbers), asked),
        rows,
        pool.box_ids[positions],
        np.isin(rows, asked.labels.positive),
    )
    return Result(
        catalog=index.catalog,
        kind="refine",
        rows=rows,
        scores=scores,
        margins=index.margins(model.forest, rows),
        branch_ids=branch_ids,
        branches=branches,
        n_touched=len(pool.rows),
        n_total=len(index.catalog),
        timings=clock.timings(),
        query_text=asked.query_text,
        threshold=model.threshold,
        seed=asked.seed,
        notes=(
            *round_notes(
                model,
                pool.rows,
                asked.labels,
                n_rows=index.catalog.n_present,
                threshold=model.threshold,
            ),
            *label_notes(asked.labels),
            *removed_notes(asked.n_ignored),
        ),
        plan=plan,
        pool=pool,
        model=model,
        labels=asked.labels,
    )


def _pool(
    index: Index,
    model: RoundModel,
    scored: Scored,
    boxed: BoxAnswer,
    numbers: NDArray[np.int32],
) -> Pool:
    """Put together what is known of every scored row, the boxed ones among them.

    `numbers`, (n_boxes,), are the branches of the boxes.
    """
    rows, scores = scored.candidates()
    box_ids = np.full(len(rows), -1, dtype=np.int32)
    box_ids[np.searchsorted(rows, boxed.rows)] = numbers[boxed.box_ids]
    margins = cache(lambda: index.margins(model.forest, rows))
    return Pool(rows, scores, box_ids, margins)


def _counts(
    index: Index, model: RoundModel, boxed: BoxAnswer, numbers: NDArray[np.int32]
) -> NDArray[np.int64]:
    """Return how many rows each listed box holds, those switched off included: (n_listed,)."""
    if not model.off:
        return boxed.counts
    counts = np.zeros(len(model.listed), dtype=np.int64)
    counts[np.setdiff1d(np.arange(len(counts)), numbers)] = index.counts(model.off)
    counts[numbers] = boxed.counts
    return counts


def _box_branches(
    index: Index, boxes: Sequence[LeafBox], counts: NDArray[np.int64], asked: Asked
) -> tuple[Branch, ...]:
    """Say each box in words with its counts."""
    labels, columns = asked.labels, index.model
    yes, no = index.codes(labels.positive), index.codes(labels.negative)
    names = column_names(columns.names)
    states: dict[object, RuleState] = {box.ranges: "off" for box in asked.off}
    states |= {box.ranges: "pinned" for box in asked.pinned}
    return tuple(
        Branch(
            id=number,
            text=box.to_text(columns.names, columns.edges),
            n_rows=int(counts[number]),
            n_positive=int(box.contains(yes).sum()),
            n_negative=int(box.contains(no).sum()),
            box=box,
            conditions=conditions_of(box, names, columns.edges),
            state=states.get(box.ranges, "on"),
        )
        for number, box in enumerate(boxes)
    )
