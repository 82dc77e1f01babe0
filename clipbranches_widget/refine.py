"""One relevance-feedback round (layer 4): labels -> teacher -> trees -> boxes -> ranked rows.

`learn` makes the round's model from labels and query, `round_answer` runs it on the catalog:

1. `teacher.fit_teacher` learns what the user means on the full embedding.
2. It scores a sample of the catalog: random rows, and rows near its own direction and the
   positives. A catalog of at most 20,000 rows is its own sample.
3. Shallow trees learn to imitate its decision, with some slack, on the indexed columns.
4. A greedy cover picks the leaf boxes worth reading.
5. The column index answers the boxes exactly; the rows inside, and the vector index's nearest
   rows to the teacher's direction, are scored by the teacher. Those at or above the threshold
   are the answer. Labelled rows are always as labelled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.distil import Sample, choose_boxes, draw_sample, random_rows
from clipbranches_widget.errors import RefineError
from clipbranches_widget.index_protocol import Index
from clipbranches_widget.round_answer import Asked, Partial, answer, first_page
from clipbranches_widget.round_clock import Progress, RoundClock, run_until
from clipbranches_widget.round_model import RoundModel
from clipbranches_widget.sorted_columns import snapped
from clipbranches_widget.teacher import Teacher, fit_teacher
from clipbranches_widget.trees import TreeEnsemble, fit_forest

if TYPE_CHECKING:
    import threading
    from collections.abc import Sequence

    from clipbranches_widget.boxes import LeafBox
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.query_plan import BoxStrategy
    from clipbranches_widget.result import Result

DEFAULT_THRESHOLD = 0.3
N_BACKGROUND = 2_000
N_NEAR_QUERY = 10
MIN_NEAREST, MAX_NEAREST = (1_000, 2_000), 5_000
"""Fewest nearest images to the teacher's direction that are scored, in a small and a large catalog
(in between, one in `NEAREST_SHARE` of the rows), and most."""
NEAREST_SHARE = 40


def refine(
    index: Index,
    *,
    labels: LabelSet,
    query: NDArray[np.float32] | None = None,
    query_text: str = "",
    threshold: float | None = None,
    seed: int = 0,
    strategy: BoxStrategy | None = None,
    progress: Progress | None = None,
    partial: Partial | None = None,
    cancel: threading.Event | None = None,
    off: Sequence[LeafBox] = (),
    pinned: Sequence[LeafBox] = (),
) -> Result:
    """Answer with every row of the catalog that the labels say is a yes.

    Parameters
    ----------
    index : Index
        The opened catalog.
    labels : LabelSet
        Yes and no rows; those of removed rows are ignored.
    query : (dim,) float32, optional
        The query's embedding: the similarity to it is a prior, and the images nearest to it stand
        in where nothing is labelled yes.
    query_text : str
        For people.
    threshold : float, optional
        Lowest score of an answer, in (0, 1); default 0.3: what is at least 30 % likely a yes.
    seed : int
        Of sampling and trees. Same labels, query, threshold and seed: same answer.
    strategy : "bits", "postings" or "scan", optional
        Force how the column index answers; by default the quickest by estimate. The answer is
        the same.
    progress : callable, optional
        Gets (stage, fraction done) at the start of each stage.
    partial : callable, optional
        Gets the answer so far, ranked, with `Result.is_complete` False: a first page as soon as
        the teacher is fitted, then some times a second. Rows are only ever added.
    cancel : threading.Event, optional
        Looked at every 20 ms. With it, the round and its callbacks run on another thread.
    off : sequence of LeafBox, optional
        Boxes switched off, by their ranges: they are not read, and rows inside one of them and
        in no box that is read are no candidates, unless labelled yes, whoever else found them.
        They stay listed in `Result.branches`, with the state "off".
    pinned : sequence of LeafBox, optional
        Boxes to read, by their ranges, whatever is learned; their rows are scored as all are.

    Returns
    -------
    Result
        Of kind "refine".

    Raises
    ------
    RefineError
        Neither a positive label nor a query; a threshold outside (0, 1); a box that is both
        off and pinned, or is on columns that the catalog does not have.
    QueryError
        The forced strategy needs a part of the column index that is not stored.
    Cancelled
        `cancel` was set.
    """
    clock = RoundClock(progress, cancel)

    limit = _checked_threshold(threshold)
    rules = _checked_rules(index, off, pinned)
    labels, n_ignored = index.present(labels)
    asked = Asked(labels, query_text, limit, seed, *rules, n_ignored)

    def run() -> Result:
        clock.stage("teacher", 0.0)
        drawn = random_rows(index.catalog, np.random.default_rng(seed))
        teacher = _teach(index, labels, query, drawn)
        scored = first_page(index, teacher, asked)
        if partial is not None:
            partial(scored.so_far(clock))
        model = _imitate(index, teacher, asked, drawn, clock.stage)
        return answer(index, model, scored, asked, clock, strategy=strategy, partial=partial)

    return run_until(cancel, run)


def answer_again(
    index: Index,
    model: RoundModel,
    *,
    labels: LabelSet,
    query_text: str = "",
    seed: int = 0,
    off: Sequence[LeafBox] = (),
    pinned: Sequence[LeafBox] = (),
) -> Result:
    """Answer with what a round has learned, under other rules: the very answer of `refine`.

    Teacher, sample and trees do not depend on the rules, so nothing is learned anew.

    Parameters
    ----------
    index, labels, query_text, seed
        Those of the round.
    model : RoundModel
        Of the round's result, whatever its rules were.
    off, pinned
        As for `refine`, also in what it raises.
    """
    clock = RoundClock()
    rules = _checked_rules(index, off, pinned)
    labels, n_ignored = index.present(labels)
    asked = Asked(labels, query_text, model.threshold, seed, *rules, n_ignored)
    clock.stage("boxes", 0.0)
    chosen = _choose(index, model.teacher, model.forest, model.sample, asked)
    return answer(index, chosen, first_page(index, model.teacher, asked), asked, clock)


def warm_up() -> None:
    """Fit a teacher and a forest on two rows, so that the first round need not load libraries."""
    rows = np.eye(2, dtype=np.float32)
    fit_teacher(positives=rows[:1], negatives=rows[1:], background=rows[1:])
    codes, target = np.array([[0, 1]], dtype=np.uint8), np.array([False, True])
    TreeEnsemble.from_booster(fit_forest(codes, target, np.ones(2, np.float32), seed=0))


def learn(
    index: Index,
    *,
    labels: LabelSet,
    query: NDArray[np.float32] | None = None,
    threshold: float | None = None,
    seed: int = 0,
    off: Sequence[LeafBox] = (),
    pinned: Sequence[LeafBox] = (),
) -> RoundModel:
    """Learn a round's model without running it; parameters and errors are those of `refine`."""
    rules = _checked_rules(index, off, pinned)
    labels, n_ignored = index.present(labels)
    asked = Asked(labels, "", _checked_threshold(threshold), seed, *rules, n_ignored)
    drawn = random_rows(index.catalog, np.random.default_rng(seed))
    teacher = _teach(index, labels, query, drawn)
    return _imitate(index, teacher, asked, drawn, lambda _name, _fraction: None)


def _checked_threshold(threshold: float | None) -> float:
    limit = DEFAULT_THRESHOLD if threshold is None else float(threshold)
    if not 0.0 < limit < 1.0:
        raise RefineError(f"expected a threshold between 0 and 1, got {threshold}")
    return limit


def _checked_rules(
    index: Index, off: Sequence[LeafBox], pinned: Sequence[LeafBox]
) -> tuple[tuple[LeafBox, ...], tuple[LeafBox, ...]]:
    """Return both without repeats of the same ranges."""
    both = [{box.ranges: box for box in boxes} for boxes in (off, pinned)]
    columns = {column for boxes in both for ranges in boxes for column, _, _ in ranges}
    if both[0].keys() & both[1].keys():
        raise RefineError("expected each box to be off or pinned, got one that is both: drop one")
    if not columns <= set(range(index.model.n_columns)):
        raise RefineError(
            f"expected boxes on columns 0 to {index.model.n_columns - 1}, got column "
            f"{max(columns)}: they are of another catalog"
        )
    return tuple(both[0].values()), tuple(both[1].values())


def _imitate(
    index: Index,
    teacher: Teacher,
    asked: Asked,
    drawn: NDArray[np.int64],
    stage: Progress,
) -> RoundModel:
    """Turn the teacher's decision into boxes; the trees split only where there is a bit vector."""
    stage("sample", 0.1)
    limit_logit = teacher.logit_of(asked.threshold)
    sample = draw_sample(index, teacher, asked.labels, drawn, limit_logit)
    stage("trees", 0.3)
    codes = snapped(sample.codes)
    booster = fit_forest(codes, sample.target, sample.weights(), seed=asked.seed)
    forest = TreeEnsemble.from_booster(booster)
    stage("boxes", 0.7)
    return _choose(index, teacher, forest, sample, asked)


def _choose(
    index: Index, teacher: Teacher, forest: TreeEnsemble, sample: Sample, asked: Asked
) -> RoundModel:
    """Choose the boxes to read; only this part of a model depends on the rules."""
    limit_logit = teacher.logit_of(asked.threshold)
    boxes, listed = asked.under_rules(choose_boxes(forest, sample, index.catalog.n_present))
    share = float((sample.logits[sample.is_random] > limit_logit).mean())
    n_rows = index.catalog.n_present
    fewest = np.clip(n_rows / NEAREST_SHARE, *MIN_NEAREST)
    n_nearest = int(np.clip(1.5 * share * n_rows, fewest, MAX_NEAREST))
    return RoundModel(
        teacher, forest, boxes, sample, n_nearest, asked.threshold, listed if asked.off else ()
    )


def _teach(
    index: Index,
    labels: LabelSet,
    query: NDArray[np.float32] | None,
    random_rows: NDArray[np.int64],
) -> Teacher:
    """Fit the teacher on the labels, the query and the images nearest to it.

    Those labelled no are left out: where nothing is labelled yes, the mean of these images stands
    in. Text and image vectors of CLIP lie apart (the modality gap): as a positive example, a text
    vector would teach what text looks like.
    """
    if not len(labels.positive) and query is None:
        raise RefineError(
            "expected at least one yes label or a query, got neither: "
            "search for something, or mark an image yes, then refine"
        )
    labelled = np.union1d(labels.positive, labels.negative)
    background = random_rows[~np.isin(random_rows, labelled)][:N_BACKGROUND]
    near = np.empty(0, dtype=np.int64)
    if query is not None:
        near, _ = index.nearest(query, N_NEAR_QUERY + len(labels.negative))
        near = near[~np.isin(near, labels.negative)][:N_NEAR_QUERY]
    parts = (labels.positive, labels.negative, background, near)
    embeddings = index.embeddings(np.concatenate(parts))  # in one go: they may be far away
    positives, negatives, far, images = np.split(embeddings, np.cumsum(list(map(len, parts)))[:-1])
    return fit_teacher(
        positives=positives,
        negatives=negatives,
        background=far,
        query=query,
        query_images=images if len(images) else None,
    )
