"""One relevance-feedback round (layer 4): labels -> teacher -> trees -> boxes -> ranked rows.

`learn` makes the round's model from labels and query; `answer` runs it on the catalog:

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

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.distil import Sample, choose_boxes, draw_sample, random_rows
from clipbranches_widget.errors import Cancelled, RefineError
from clipbranches_widget.result import Branch, Result
from clipbranches_widget.teacher import Teacher, fit_teacher, logit_to_score, score_to_logit
from clipbranches_widget.trees import TreeEnsemble, fit_forest

if TYPE_CHECKING:
    import threading

    from clipbranches_widget.labels import LabelSet

Progress = Callable[[str, float], None]

DEFAULT_THRESHOLD = 0.5
N_BACKGROUND = 2_000
N_NEAR_QUERY = 10
MIN_NEAREST, MAX_NEAREST = 100, 2_000
NEAR_TEXT = "near your examples"
LABELLED_TEXT = "marked yes by you"


@dataclass(frozen=True, slots=True)
class RoundModel:
    """What one round learned.

    Attributes
    ----------
    teacher : Teacher
        Scores and ranks.
    forest : TreeEnsemble
        Imitates the teacher on the indexed columns.
    boxes : tuple of LeafBox
        The leaves of the forest that are read.
    sample : Sample
        What the forest learned from.
    n_nearest : int
        How many rows near the teacher's direction complement the boxes.
    threshold : float
        Lowest score of an answer.
    """

    teacher: Teacher
    forest: TreeEnsemble
    boxes: tuple[LeafBox, ...]
    sample: Sample
    n_nearest: int
    threshold: float


class _Clock:
    """Progress out, cancellation in, and the seconds each stage took."""

    def __init__(self, progress: Progress | None, cancel: threading.Event | None) -> None:
        self._progress, self._cancel = progress, cancel
        self._started = time.perf_counter()
        self._marks: list[tuple[str, float]] = []

    def stage(self, name: str, fraction: float) -> None:
        """Begin a stage, `fraction` of the round done; raises Cancelled when asked to stop."""
        if self._cancel is not None and self._cancel.is_set():
            raise Cancelled("the round was cancelled: labels and results are as before")
        self._marks.append((name, time.perf_counter()))
        if self._progress is not None:
            self._progress(name, fraction)

    def timings(self) -> MappingProxyType[str, float]:
        """Return the seconds of each stage and in total."""
        now = time.perf_counter()
        ends = [mark for _, mark in self._marks[1:]] + [now]
        seconds = {name: end - start for (name, start), end in zip(self._marks, ends, strict=True)}
        return MappingProxyType({**seconds, "total": now - self._started})


def refine(
    index: CatalogIndex,
    *,
    labels: LabelSet,
    query: NDArray[np.float32] | None = None,
    query_text: str = "",
    threshold: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    cancel: threading.Event | None = None,
) -> Result:
    """Answer with every row of the catalog that the labels say is a yes.

    Parameters
    ----------
    index : CatalogIndex
        The opened catalog.
    labels : LabelSet
        Yes and no rows.
    query : (dim,) float32, optional
        The query's embedding: the images nearest to it are a weak positive.
    query_text : str
        For people.
    threshold : float, optional
        Lowest score of an answer, in (0, 1); default 0.5.
    seed : int
        Of sampling and trees. Same labels, query, threshold and seed: same answer.
    progress : callable, optional
        Gets (stage, fraction done) at the start of each stage.
    cancel : threading.Event, optional
        Checked before each stage.

    Returns
    -------
    Result
        Of kind "refine".

    Raises
    ------
    RefineError
        Neither a positive label nor a query; a threshold outside (0, 1).
    Cancelled
        `cancel` was set.
    """
    clock = _Clock(progress, cancel)
    model = learn(
        index, labels=labels, query=query, threshold=threshold, seed=seed, stage=clock.stage
    )
    return answer(index, model, labels=labels, query_text=query_text, seed=seed, clock=clock)


def warm_up() -> None:
    """Fit a teacher and a forest on two rows, so that the first round need not load libraries."""
    rows = np.eye(2, dtype=np.float32)
    fit_teacher(positives=rows[:1], negatives=rows[1:], background=rows[1:])
    codes, target = np.array([[0, 1]], dtype=np.uint8), np.array([False, True])
    TreeEnsemble.from_booster(fit_forest(codes, target, np.ones(2, np.float32), seed=0))


def learn(
    index: CatalogIndex,
    *,
    labels: LabelSet,
    query: NDArray[np.float32] | None = None,
    threshold: float | None = None,
    seed: int = 0,
    stage: Progress = lambda _name, _fraction: None,
) -> RoundModel:
    """Learn a round's model; parameters and errors are those of `refine`."""
    limit = DEFAULT_THRESHOLD if threshold is None else float(threshold)
    if not 0.0 < limit < 1.0:
        raise RefineError(f"expected a threshold between 0 and 1, got {threshold}")
    if not len(labels.positive) and query is None:
        raise RefineError(
            "expected at least one yes label or a query, got neither: "
            "search for something, or mark an image yes, then refine"
        )
    stage("teacher", 0.0)
    drawn = random_rows(len(index.catalog), np.random.default_rng(seed))
    teacher = _teach(index, labels, query, drawn)
    stage("sample", 0.1)
    limit_logit = score_to_logit(limit)
    sample = draw_sample(index, teacher, labels, drawn, limit_logit)
    stage("trees", 0.3)
    booster = fit_forest(sample.codes, sample.target, sample.weights(), seed=seed)
    forest = TreeEnsemble.from_booster(booster)
    stage("boxes", 0.7)
    boxes = choose_boxes(forest, sample, len(index.catalog))
    share = float((sample.logits[sample.is_random] > limit_logit).mean())
    n_nearest = int(np.clip(1.5 * share * len(index.catalog), MIN_NEAREST, MAX_NEAREST))
    return RoundModel(teacher, forest, tuple(boxes), sample, n_nearest, limit)


def answer(
    index: CatalogIndex,
    model: RoundModel,
    *,
    labels: LabelSet,
    query_text: str,
    seed: int,
    clock: _Clock,
) -> Result:
    """Run a learned model on the catalog: boxes and nearest rows, scored, kept, ranked."""
    clock.stage("index", 0.8)
    boxed = index.in_boxes(model.boxes)
    near, _ = index.nearest(model.teacher.direction, model.n_nearest)
    clock.stage("rank", 0.9)
    candidates = np.unique(np.concatenate([boxed.rows, near, labels.positive]))
    rows, scores = _rank(index, model, candidates, labels)
    branches, branch_ids = _branches(index, model.boxes, boxed.by_box, rows, labels)
    margins = model.forest.margins(index.codes(rows))
    return Result(
        catalog=index.catalog,
        kind="refine",
        rows=rows,
        scores=scores,
        margins=margins,
        branch_ids=branch_ids,
        branches=branches,
        n_touched=len(candidates),
        n_total=len(index.catalog),
        timings=clock.timings(),
        query_text=query_text,
        threshold=model.threshold,
        seed=seed,
        notes=_notes(index, model, candidates, labels),
    )


def _teach(
    index: CatalogIndex,
    labels: LabelSet,
    query: NDArray[np.float32] | None,
    random_rows: NDArray[np.int64],
) -> Teacher:
    """Fit the teacher on the labels and the query.

    Text and image vectors of CLIP lie apart (the modality gap): as a positive example, a text
    vector would teach what text looks like. The mean of the images nearest to it, those labelled
    no left out, does not.
    """
    labelled = np.union1d(labels.positive, labels.negative)
    background = random_rows[~np.isin(random_rows, labelled)][:N_BACKGROUND]
    query_image = None
    if query is not None:
        near, _ = index.nearest(query, N_NEAR_QUERY + len(labels.negative))
        near = near[~np.isin(near, labels.negative)][:N_NEAR_QUERY]
        if len(near):
            query_image = index.embeddings(near).mean(axis=0)
    return fit_teacher(
        positives=index.embeddings(labels.positive),
        negatives=index.embeddings(labels.negative),
        background=index.embeddings(background),
        query=query,
        query_image=query_image,
    )


def _rank(
    index: CatalogIndex, model: RoundModel, candidates: NDArray[np.int64], labels: LabelSet
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Score the candidates and keep the answer, best first; labelled rows are as labelled."""
    limit = np.float32(model.threshold)
    scores = logit_to_score(model.teacher.logits(index.embeddings(candidates)))
    is_yes = np.isin(candidates, labels.positive)
    scores[is_yes] = np.maximum(scores[is_yes], limit)
    kept = (scores >= limit) & ~np.isin(candidates, labels.negative)
    rows, scores = candidates[kept], scores[kept]
    order = np.lexsort((rows, -scores))
    return rows[order], scores[order]


def _branches(
    index: CatalogIndex,
    boxes: tuple[LeafBox, ...],
    by_box: tuple[NDArray[np.int64], ...],
    rows: NDArray[np.int64],
    labels: LabelSet,
) -> tuple[tuple[Branch, ...], NDArray[np.int32]]:
    """Say each box in words with its counts, and name the main branch of each row.

    The main branch is the first chosen box that holds the row: the cover takes the most telling
    boxes first. Rows in no box came from the vector index or from a label.
    """
    texts = [box.to_text(index.model.names, index.model.edges) for box in boxes]
    members = list(by_box)
    branch_ids = np.full(len(rows), -1, dtype=np.int32)
    for number, inside in enumerate(by_box):
        branch_ids[(branch_ids < 0) & np.isin(rows, inside)] = number
    unboxed = rows[branch_ids < 0]
    is_yes = np.isin(unboxed, labels.positive)
    for text, extra in ((NEAR_TEXT, unboxed[~is_yes]), (LABELLED_TEXT, unboxed[is_yes])):
        if len(extra):
            branch_ids[np.isin(rows, extra)] = len(texts)
            texts.append(text)
            members.append(extra)
    branches = tuple(
        Branch(
            id=number,
            text=text,
            n_rows=len(inside),
            n_positive=int(np.isin(labels.positive, inside).sum()),
            n_negative=int(np.isin(labels.negative, inside).sum()),
            box=boxes[number] if number < len(boxes) else None,
        )
        for number, (text, inside) in enumerate(zip(texts, members, strict=True))
    )
    return branches, branch_ids


def _notes(
    index: CatalogIndex, model: RoundModel, candidates: NDArray[np.int64], labels: LabelSet
) -> tuple[str, ...]:
    """Say what the answer rests on: the sample, and what share of the positives it reached."""
    notes = []
    sample = model.sample
    labelled = np.union1d(labels.positive, labels.negative)
    is_wanted = sample.is_random & ~np.isin(sample.rows, labelled)
    is_wanted &= logit_to_score(sample.logits) >= np.float32(model.threshold)
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
