"""Our column index, every way it can answer."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from box_measure import Bench, Rows, ms, reset_peak, status_mb, timed
from numpy.typing import NDArray

from clipbranches_widget.box_program import on_edge
from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.query_plan import (
    BoxStrategy,
    EnsembleStrategy,
    by_selectivity,
    candidate_leaves,
)
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.trees import TreeEnsemble

BOX_STRATEGIES: tuple[BoxStrategy, ...] = ("bits", "scan", "postings")
TREE_STRATEGIES: tuple[EnsembleStrategy, ...] = ("scan", "leaves")
PLANNER, CODES_ONLY = "ours: planner", "ours: codes only"
WITH_BOXES = "ours: planner, with the boxes of each row"
N_THREADS, N_QUERIES = 8, 20
CLOSE = 1.3
NARROWEST = (255, 254, 252, 250, 244, 240, 232, 220, 200, 176, 152, 128)
"""Lower bounds of the narrowest range of the crossover: from one code of 256 to half of them.
All but the first have a bit vector; the codes below them have none, and are tried too."""


@dataclass(frozen=True)
class Indexes:
    """One catalog's index, opened in three ways.

    Attributes
    ----------
    compiled : ColumnIndex
    arrays : ColumnIndex
        The same files; the compiled loops were never loaded.
    codes_only : ColumnIndex
        Without bit vectors and order; compiled.
    """

    compiled: ColumnIndex
    arrays: ColumnIndex
    codes_only: ColumnIndex

    @classmethod
    def of(cls, full: SortedColumns, codes_only: SortedColumns) -> Indexes:
        """Open all three; waits until the compiled loops are loaded."""
        indexes = cls(ColumnIndex([full]), ColumnIndex([full]), ColumnIndex([codes_only]))
        for index in (indexes.compiled, indexes.codes_only):
            assert index.loader.wait().NAME == "numba", index.loader.problem
        return indexes


def answer_boxes(
    bench: Bench, indexes: Indexes, task: str, boxes: Sequence[LeafBox], expected: Rows
) -> None:
    """Time every strategy on both engines."""
    asked: list[tuple[str, ColumnIndex, BoxStrategy | None]] = [
        (PLANNER, indexes.compiled, None),
        (WITH_BOXES, indexes.compiled, None),
        *((f"ours: {each}", indexes.compiled, each) for each in BOX_STRATEGIES),
        (CODES_ONLY, indexes.codes_only, None),
        ("ours: planner, NumPy loops", indexes.arrays, None),
        *((f"ours: {each}, NumPy loops", indexes.arrays, each) for each in BOX_STRATEGIES),
    ]
    for system, index, strategy in asked:
        plan = index.in_boxes(boxes, strategy=strategy).plan

        def rows(
            index: ColumnIndex = index,
            strategy: BoxStrategy | None = strategy,
            system: str = system,
        ) -> Rows:
            if system == WITH_BOXES:
                return index.in_boxes(boxes, strategy=strategy).rows
            return index.rows_in(boxes, strategy=strategy)

        bench.measure(
            task,
            system,
            rows,
            expected=expected,
            bytes_read=plan.chosen.n_bytes,
            rows_touched=_rows_touched(index, boxes, plan.strategy),
            plan=plan.strategy,
            engine=plan.engine,
            estimated_ms_of_one_core=plan.chosen.ms,
        )


def _rows_touched(index: ColumnIndex, boxes: Sequence[LeafBox], strategy: str) -> int:
    """Count the rows whose codes or posting lists are read; bits read a bit a row and bound."""
    if strategy == "postings":
        lists = [by_selectivity(box, index.stats) for box in boxes]
        return sum(index.stats.count(each[0]) if each else index.stats.n_rows for each in lists)
    ranges = [each for box in boxes for each in box.ranges]
    if strategy == "bits" and all(on_edge(low) and on_edge(high) for _, low, high in ranges):
        return 0
    return index.stats.n_rows


def answer_trees(
    bench: Bench, indexes: Indexes, task: str, ensemble: TreeEnsemble, expected: Rows
) -> None:
    """Time every strategy for the rows above 0 of an ensemble, on both engines."""
    asked: list[tuple[str, ColumnIndex, EnsembleStrategy | None]] = [
        (PLANNER, indexes.compiled, None),
        *((f"ours: {each}", indexes.compiled, each) for each in TREE_STRATEGIES),
        (CODES_ONLY, indexes.codes_only, None),
        ("ours: planner, NumPy loops", indexes.arrays, None),
    ]
    leaves = candidate_leaves(ensemble, np.float32(0), indexes.compiled.stats)
    n_candidates = len(indexes.compiled.rows_in(leaves))
    for system, index, strategy in asked:
        plan = index.rows_above(ensemble, 0.0, strategy=strategy).plan

        def rows(index: ColumnIndex = index, strategy: EnsembleStrategy | None = strategy) -> Rows:
            return index.rows_above(ensemble, 0.0, strategy=strategy).rows

        bench.measure(
            task,
            system,
            rows,
            expected=expected,
            bytes_read=plan.chosen.n_bytes,
            rows_touched=n_candidates if plan.strategy == "leaves" else index.stats.n_rows,
            plan=plan.strategy,
            engine=plan.engine,
            estimated_ms_of_one_core=plan.chosen.ms,
        )


def crossover(bench: Bench, index: ColumnIndex) -> None:
    """Find where one strategy overtakes another: one box of 1 to 4 ranges.

    The narrowest range grows from one code, which holds 1/256 of the rows: no range is
    narrower. The others hold half of the rows.
    """
    points: list[dict[str, Any]] = []
    for n_ranges in range(1, 5):
        for code in sorted({*NARROWEST, *(code - 1 for code in NARROWEST)}, reverse=True):
            bounds = dict.fromkeys(range(1, n_ranges), (128, 256))
            box = LeafBox.from_bounds({0: (code, 256), **bounds})
            share = index.stats.count(box.ranges[0]) / index.stats.n_rows
            measured = {
                each: ms(timed(lambda box=box, each=each: index.rows_in([box], strategy=each))[1])
                for each in BOX_STRATEGIES
            }
            times = {each: figures["median_ms"] for each, figures in measured.items()}
            chosen, quickest = index.in_boxes([box]).plan.strategy, min(times, key=times.get)
            point = {"ranges": n_ranges, "share": share, "has_bit_vector": on_edge(code), **times}
            point |= {"quickest": quickest, "planned": chosen}
            points.append(point | {"slowdown": times[chosen] / times[quickest]})
    good = sum(point["slowdown"] <= CLOSE for point in points)
    bench.note(
        crossover={
            "postings_up_to_share": _postings_up_to(points),
            "close": CLOSE,
            "planned_close_to_quickest": good / len(points),
            "worst_slowdown": max(point["slowdown"] for point in points),
            "points": points,
        }
    )


def _postings_up_to(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return up to which share of the narrowest range postings win, and are planned."""
    found = []
    for n_ranges in range(1, 5):
        for has_bits in (True, False):
            line = [
                each
                for each in points
                if each["ranges"] == n_ranges and each["has_bit_vector"] == has_bits
            ]
            limits = {"ranges": n_ranges, "has_bit_vector": has_bits}
            for who in ("quickest", "planned"):
                won = itertools.takewhile(lambda each, who=who: each[who] == "postings", line)
                limits[who] = max((each["share"] for each in won), default=0.0)
            found.append(limits)
    return found


def anytime(bench: Bench, index: ColumnIndex, boxes: Sequence[LeafBox]) -> None:
    """Time until the first part of an answer, and until the last."""
    first: list[float] = []

    def stream() -> int:
        start = time.perf_counter()
        _, parts = index.stream_boxes(boxes)
        n_parts = 0
        for part in parts:
            if not n_parts:
                first.append(time.perf_counter() - start)
            n_parts += bool(len(part.counts))
        return n_parts

    n_parts, seconds = timed(stream)
    bench.note(anytime={"parts": n_parts, "first_part": ms(first[1:]), "all": ms(seconds)})


def concurrent(bench: Bench, index: ColumnIndex, boxes: Sequence[LeafBox], expected: Rows) -> None:
    """Let eight threads ask one index at once; check every answer."""
    seconds = np.zeros((N_THREADS, N_QUERIES))
    equal = np.zeros((N_THREADS, N_QUERIES), dtype=np.bool_)
    barrier = threading.Barrier(N_THREADS)

    def ask(number: int) -> None:
        barrier.wait()
        for query in range(N_QUERIES):
            start = time.perf_counter()
            rows = index.rows_in(boxes)
            seconds[number, query] = time.perf_counter() - start
            equal[number, query] = np.array_equal(rows, expected)

    index.rows_in(boxes)
    reset_peak()
    before = status_mb("VmRSS")
    threads = [threading.Thread(target=ask, args=(number,)) for number in range(N_THREADS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wall = time.perf_counter() - start
    means = seconds.mean(axis=1)
    bench.note(
        concurrent={
            "threads": N_THREADS,
            "queries_each": N_QUERIES,
            "median_ms": 1e3 * statistics.median(seconds.ravel().tolist()),
            "p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
            "queries_per_s": seconds.size / wall,
            "slowest_to_fastest_thread": float(means.max() / means.min()),
            "equal": bool(equal.all()),
            "rss_growth_mb": status_mb("VmRSS") - before,
            "peak_rss_growth_mb": status_mb("VmHWM") - before,
        }
    )


def index_bytes(columns: SortedColumns) -> dict[str, int]:
    """Return the bytes of each part of an index."""
    parts: dict[str, NDArray[Any] | None] = {
        "codes": columns.codes,
        "bit_vectors": columns.prefix,
        "order": columns.order,
    }
    return {name: part.nbytes for name, part in parts.items() if part is not None}
