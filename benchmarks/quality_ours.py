"""Our round in `quality.py`: the product, indexes and all; and its teacher by full scan.

ours
    `refine.refine` as a session calls it. Rows it scored are ranked by score, the others below
    them by the text.
ours, full scan
    The teacher of the same round, of the same labels, scores every row: what the boxes must keep
    up with.

Further figures of a round:

touched, boxed
    Share of the catalog's rows that were scored one by one; that are in any box.
unseen_boxed, unseen_found
    Of the rows at or above the threshold by full scan that neither the training sample nor the
    labels hold: the share in the boxes; the share among all scored rows. NaN where there is none.
loose_boxed, loose_found
    The same of the rows with a score of at least .2: what is missed when the threshold is lowered
    afterwards.
bins, ece
    Unlabelled candidates in ten bins of the score: (rows, sum of scores, members) each; and the
    expected calibration error, the mean distance of score and share of members, by rows.
n_boxes
    Boxes of the round.
noted
    Whether the result says anything about the text query's ranking.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from quality_users import Figures, Outcome, Task

from clipbranches_widget import refine
from clipbranches_widget.result import Result

FULL_SCAN = "ours, full scan"
N_BINS = 10
LOOSE_SCORE = 0.2


def ours(task: Task) -> Outcome:
    """Answer a round with the product; beside it the teacher's full scan."""
    index = task.collection.index
    result = refine.refine(
        index,
        labels=task.labels,
        query=task.concept.vector,
        query_text=task.concept.query,
        seed=task.seed,
    )
    pool, model = result.pool, result.model
    if pool is None or model is None:
        raise RuntimeError(f"expected a complete result with pool and model, got {result}")
    n_rows = len(task.collection)
    scores = np.full(n_rows, -1.0, dtype=np.float32)
    scores[pool.rows] = pool.scores
    answer = np.zeros(n_rows, dtype=np.bool_)
    answer[result.rows] = True
    full_scores = model.teacher.scores(task.collection.embeddings)
    boxed = index.columns.in_boxes(model.boxes).rows
    facts: Figures = {
        "touched": result.n_touched / n_rows,
        "boxed": len(boxed) / n_rows,
        "n_boxes": float(len(model.boxes)),
        "noted": float(any("text" in note or "search" in note for note in result.notes)),
        **_coverage("unseen", task, result, full_scores >= np.float32(model.threshold), boxed),
        **_coverage("loose", task, result, full_scores >= np.float32(LOOSE_SCORE), boxed),
        **calibration(task, pool.rows, pool.scores),
    }
    everything = np.arange(n_rows)
    full_facts = {"touched": 1.0, **calibration(task, everything, full_scores)}
    full = Outcome(full_scores, full_scores >= np.float32(model.threshold), 0.0, full_facts)
    seconds = result.timings.get("total")
    return Outcome(scores, answer, seconds, facts, {FULL_SCAN: full})


def _coverage(
    name: str,
    task: Task,
    result: Result,
    wanted: NDArray[np.bool_],
    boxed: NDArray[np.int64],
) -> Figures:
    """Count the wanted rows that training never saw, and what held them."""
    if result.model is None or result.pool is None:
        return {}
    unseen = wanted.copy()
    unseen[result.model.sample.rows] = False
    unseen[task.labels.rows] = False
    n_unseen = int(unseen.sum())
    if not n_unseen:
        return {f"{name}_boxed": float("nan"), f"{name}_found": float("nan"), f"n_{name}": 0.0}
    return {
        f"{name}_boxed": float(unseen[boxed].sum()) / n_unseen,
        f"{name}_found": float(unseen[result.pool.rows].sum()) / n_unseen,
        f"n_{name}": float(n_unseen),
    }


def calibration(task: Task, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> Figures:
    """Bin unlabelled rows by score and compare with the truth."""
    truth = np.zeros(len(task.collection), dtype=np.bool_)
    truth[task.concept.members] = True
    is_open = ~np.isin(rows, task.labels.rows)
    rows, scores = rows[is_open], scores[is_open].astype(np.float64)
    bins = np.minimum((scores * N_BINS).astype(np.int64), N_BINS - 1)
    table: NDArray[np.float64] = np.stack(
        [
            np.bincount(bins, weights=each, minlength=N_BINS)
            for each in (np.ones(len(rows)), scores, truth[rows].astype(np.float64))
        ],
        axis=1,
    )
    return {"bins": table.tolist(), "ece": expected_error(table)}


def expected_error(table: NDArray[np.float64]) -> float:
    """Return the expected calibration error of (bins, 3): rows, sum of scores, members."""
    n_rows = table[:, 0].sum()
    return float(np.abs(table[:, 1] - table[:, 2]).sum() / n_rows) if n_rows else float("nan")
