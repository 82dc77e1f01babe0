"""Answer boxes and tree ensembles over the shards of a column index, exactly (layer 3).

Two contracts, whatever the plan and the engine: the rows of a set of boxes are exactly the rows
inside any of them, and the rows of an ensemble above a threshold are exactly those for which
``Booster.predict(output_margin=True) > threshold``.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_program import BoxProgram
from clipbranches_widget.boxes import LeafBox, in_range
from clipbranches_widget.column_stats import ColumnStats
from clipbranches_widget.engine import Engine, EngineLoader
from clipbranches_widget.errors import Cancelled
from clipbranches_widget.query_answer import (
    BoxAnswer,
    BoxPart,
    EnsembleAnswer,
    join_parts,
    joined_rows,
)
from clipbranches_widget.query_plan import (
    BoxStrategy,
    EnsembleStrategy,
    QueryPlan,
    by_selectivity,
    candidate_leaves,
    plan_boxes,
    plan_ensemble,
    worth_reading,
)
from clipbranches_widget.removed_rows import is_among
from clipbranches_widget.sorted_columns import WORD_ROWS, SortedColumns
from clipbranches_widget.tree_program import TreeProgram

if TYPE_CHECKING:
    import threading

    from clipbranches_widget.trees import TreeEnsemble

T = TypeVar("T")


class ColumnIndex:
    """The column index of all shards. Thread-safe: any number of queries may run at once.

    Parameters
    ----------
    shards : sequence of SortedColumns
        In row order; the rows of each follow those of the one before.
    n_threads : int, optional
        Threads that answer queries, shared by all of them; default: one a core.
    removed : (m,) int64, optional
        Rows that no answer holds or counts, ascending.
    first_rows : sequence of int, optional
        The catalog row of each shard's row 0, ascending, where these are not all shards.
    loader : EngineLoader, optional
        To share one.
    """

    def __init__(
        self,
        shards: Sequence[SortedColumns],
        *,
        n_threads: int | None = None,
        removed: NDArray[np.int64] | None = None,
        first_rows: Sequence[int] | None = None,
        loader: EngineLoader | None = None,
    ) -> None:
        self.shards = tuple(shards)
        self.n_threads = n_threads or n_cores()
        self.loader = EngineLoader() if loader is None else loader
        sizes = [shard.n_rows for shard in self.shards]
        self.first_rows: list[int] = (
            np.cumsum([0, *sizes[:-1]]).tolist() if first_rows is None else list(first_rows)
        )
        self._removed = np.empty(0, dtype=np.int64) if removed is None else removed
        self._pool = ThreadPoolExecutor(self.n_threads, thread_name_prefix="clipbranches-query")

    @cached_property
    def stats(self) -> ColumnStats:
        """Counts over all shards."""
        return ColumnStats.of(self.shards)

    def in_boxes(
        self,
        boxes: Sequence[LeafBox],
        *,
        strategy: BoxStrategy | None = None,
        cancel: threading.Event | None = None,
    ) -> BoxAnswer:
        """Return exactly the rows inside any of `boxes`.

        Parameters
        ----------
        boxes : sequence of LeafBox
            At most 65,536.
        strategy : "bits", "postings" or "scan", optional
            Force one; by default the quickest by estimate. The answer is the same.
        cancel : threading.Event, optional
            Looked at every few milliseconds.

        Raises
        ------
        QueryError
            The forced strategy needs a part of the index that is not stored.
        Cancelled
            `cancel` was set.
        """
        plan, parts = self.stream_boxes(boxes, strategy=strategy, cancel=cancel)
        return join_parts(list(parts), len(boxes), plan)

    def rows_in(
        self,
        boxes: Sequence[LeafBox],
        *,
        strategy: BoxStrategy | None = None,
        cancel: threading.Event | None = None,
    ) -> NDArray[np.int64]:
        """Return the rows of `in_boxes` alone, (m,) int64 ascending: which boxes are not told."""
        _, parts = self.stream_boxes(boxes, strategy=strategy, cancel=cancel, only_rows=True)
        return joined_rows(list(parts))

    def stream_boxes(
        self,
        boxes: Sequence[LeafBox],
        *,
        strategy: BoxStrategy | None = None,
        cancel: threading.Event | None = None,
        only_rows: bool = False,
    ) -> tuple[QueryPlan, Iterator[BoxPart]]:
        """Plan as `in_boxes` and return the plan and the answer, stretch by stretch of rows.

        What is not yet consumed is not yet computed, but for a few parts ahead. With `only_rows`,
        `box_ids` and `counts` may be left out of the parts: empty, and 0.
        """
        engine = self.loader.engine
        plan = plan_boxes(boxes, self.stats, strategy=strategy, engine=engine.NAME)
        tasks: Iterator[Callable[[], BoxPart]]
        if plan.strategy == "postings":
            numbers = range(len(self.shards))
            tasks = (
                self._present(boxes, partial(self._posting_part, boxes, cancel, number), whole)
                for number, whole in zip(numbers, self._wholes(), strict=True)
            )
        else:
            program = BoxProgram.of(boxes, use_bits=plan.strategy == "bits", only_rows=only_rows)
            pieces = self._pieces(engine.BOX_PIECE_ROWS)
            tasks = (
                self._present(boxes, partial(self._box_piece, engine, program, piece), piece)
                for piece in pieces
            )
        return plan, self._run(tasks, cancel)

    def rows_above(
        self,
        ensemble: TreeEnsemble,
        threshold: float,
        *,
        strategy: EnsembleStrategy | None = None,
        cancel: threading.Event | None = None,
    ) -> EnsembleAnswer:
        """Return exactly the rows whose margin is above `threshold`, compared as float32.

        Parameters and errors as `in_boxes`; the strategies are "scan" and "leaves".
        """
        engine, limit = self.loader.engine, np.float32(threshold)
        program = TreeProgram.of(ensemble)
        leaves: list[LeafBox] | None = None
        if strategy != "scan":
            most = worth_reading(program, self.stats, engine.NAME) if strategy is None else np.inf
            leaves = candidate_leaves(ensemble, limit, self.stats, max_rows=most)
        plan = plan_ensemble(program, leaves, self.stats, strategy=strategy, engine=engine.NAME)
        if leaves is not None and plan.strategy == "leaves":
            rows = self.rows_in(leaves, cancel=cancel)
            margins = engine.margins(self.codes(rows, program.used_columns), program)
            above = margins > limit
            return EnsembleAnswer(rows[above], margins[above], plan)
        pieces = self._pieces(engine.TREE_PIECE_ROWS)
        tasks = (partial(self._tree_piece, engine, program, limit, piece) for piece in pieces)
        parts = list(self._run(tasks, cancel))
        rows = joined_rows(parts)
        margins = np.concatenate([np.empty(0, np.float32), *(part[2] for part in parts)])
        return EnsembleAnswer(rows, margins, plan)

    def margins(self, ensemble: TreeEnsemble, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the margins of `rows`, in their order: (m,) float32."""
        program = TreeProgram.of(ensemble)
        return self.loader.engine.margins(self.codes(rows, program.used_columns), program)

    def codes(
        self, rows: NDArray[np.int64], columns: NDArray[np.int32] | None = None
    ) -> NDArray[np.uint8]:
        """Return the codes of `rows`, in their order: (D, m) uint8, a copy.

        Where `columns` are given, only those are read; the others are 0.
        """
        n_columns = self.shards[0].n_columns
        out = np.zeros((n_columns, len(rows)), dtype=np.uint8)
        numbers = np.searchsorted(self.first_rows, rows, side="right") - 1
        for number in np.unique(numbers).tolist():
            at = np.flatnonzero(numbers == number)
            local = rows[at] - self.first_rows[number]
            for column in range(n_columns) if columns is None else columns.tolist():
                out[column, at] = self.shards[number].codes[column, local]
        return out

    def _pieces(self, limits: tuple[int, int]) -> Iterator[tuple[int, int, int]]:
        """Yield (shard, first local row, stop): whole words, some pieces a thread."""
        wanted = self.stats.n_rows // (4 * self.n_threads)
        n_piece = max(limits[0], min(limits[1], wanted)) // WORD_ROWS * WORD_ROWS
        for number, shard in enumerate(self.shards):
            for start in range(0, shard.n_rows, n_piece):
                yield number, start, min(start + n_piece, shard.n_rows)

    def _run(self, tasks: Iterator[Callable[[], T]], cancel: threading.Event | None) -> Iterator[T]:
        """Run tasks on the pool and yield their results in order.

        A few are queued at a time, so that queries that run at once take turns.
        """
        waiting: deque[Future[T]] = deque()
        try:
            for task in tasks:
                waiting.append(self._pool.submit(task))
                if len(waiting) > 2 * self.n_threads:
                    _check(cancel)
                    yield waiting.popleft().result()
            while waiting:
                _check(cancel)
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _box_piece(
        self, engine: Engine, program: BoxProgram, piece: tuple[int, int, int]
    ) -> BoxPart:
        """Answer boxes for a stretch of one shard, from bit vectors or codes."""
        number, start, stop = piece
        words = start // WORD_ROWS, -(-stop // WORD_ROWS)
        rows, box_ids, counts = engine.rows_in_boxes(self.shards[number], program, *words)
        return BoxPart(self.first_rows[number], rows, box_ids, counts)

    def _posting_part(
        self, boxes: Sequence[LeafBox], cancel: threading.Event | None, number: int
    ) -> BoxPart:
        """Answer boxes for one shard from its posting lists."""
        found = []
        for box in boxes:
            _check(cancel)
            found.append(_posted_rows(self.shards[number], box, self.stats))
        rows = np.concatenate([np.empty(0, np.uint32), *found])
        box_ids = np.repeat(np.arange(len(boxes), dtype=np.uint16), [len(each) for each in found])
        rows, first = np.unique(rows, return_index=True)  # the first box comes first
        counts = np.array([len(each) for each in found], dtype=np.int64)
        return BoxPart(self.first_rows[number], rows, box_ids[first], counts)

    def _tree_piece(
        self, engine: Engine, program: TreeProgram, limit: np.float32, piece: tuple[int, int, int]
    ) -> tuple[int, NDArray[np.uint32], NDArray[np.float32]]:
        """Return the first row of a shard, and the rows of a stretch of it above a margin."""
        number, start, stop = piece
        rows, margins = engine.rows_above(self.shards[number], program, limit, start, stop)
        if len(removed := self._removed_in(piece)):
            kept = ~is_among(rows, removed)
            rows, margins = rows[kept], margins[kept]
        return self.first_rows[number], rows, margins

    def _wholes(self) -> Iterator[tuple[int, int, int]]:
        """Yield each shard as one piece."""
        for number, shard in enumerate(self.shards):
            yield number, 0, shard.n_rows

    def _removed_in(self, piece: tuple[int, int, int]) -> NDArray[np.int64]:
        """Return the local rows of a piece that are removed, ascending."""
        number, start, stop = piece
        first = self.first_rows[number]
        low, high = np.searchsorted(self._removed, (first + start, first + stop))
        return self._removed[low:high] - first

    def _present(
        self,
        boxes: Sequence[LeafBox],
        task: Callable[[], BoxPart],
        piece: tuple[int, int, int],
    ) -> Callable[[], BoxPart]:
        """Return a task that answers as `task` does for a piece, without the removed rows."""
        if not len(removed := self._removed_in(piece)):
            return task

        def answer() -> BoxPart:
            part = task()
            kept = ~is_among(part.local_rows, removed)
            used = sorted({column for box in boxes for column, _, _ in box.ranges})
            codes = self.codes(removed + part.first_row, np.array(used, dtype=np.int32))
            gone = np.array([np.count_nonzero(box.contains(codes)) for box in boxes], np.int64)
            return BoxPart(
                part.first_row,
                part.local_rows[kept],
                part.box_ids[kept] if len(part.box_ids) else part.box_ids,
                part.counts - gone if len(part.box_ids) else part.counts,
            )

        return answer


def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _posted_rows(columns: SortedColumns, box: LeafBox, stats: ColumnStats) -> NDArray[np.uint32]:
    """Return the local rows of one box: its shortest posting list, the other ranges verified."""
    if not box.ranges:
        return np.arange(columns.n_rows, dtype=np.uint32)
    shortest, *others = by_selectivity(box, stats)
    rows = columns.posting_list(shortest)
    for column, low, high in others:
        rows = rows[in_range(columns.codes[column, rows], low, high)]
    return rows


def _check(cancel: threading.Event | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled("the query was cancelled")
