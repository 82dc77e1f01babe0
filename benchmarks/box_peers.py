"""What people would use instead: the same boxes and trees in other systems, all threads."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from box_data import Distilled, similarities
from box_measure import Bench, Rows, n_runs, reset_peak, seconds_of
from numpy.typing import NDArray

from clipbranches_widget.box_query import n_cores
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.vector_index import VectorIndex, build_vector_index

if TYPE_CHECKING:
    import polars as pl
    import xgboost as xgb

INPLACE_ALL = "XGBoost inplace_predict, all threads"
INPLACE_ONE = "XGBoost inplace_predict, 1 thread"
NUMPY, NUMPY_BUFFERED = "NumPy masks", "NumPy masks, buffers reused"
MAX_MATRIX_BYTES = 4 * 10**9
PREDICT_BLOCK_ROWS = 1_000_000
MAX_FOREST_ELEMENTS = 10_000_000 * 32
MAX_GRAPH_ROWS = 1_000_000
N_FOREST_TREES, FOREST_DEPTH = 25, 3


class RowMajor:
    """All codes as the float32 matrix that XGBoost and scikit-learn take.

    Whole where it fits `MAX_MATRIX_BYTES`, else one block of `PREDICT_BLOCK_ROWS` at a time.
    """

    def __init__(self, codes: NDArray[np.uint8]) -> None:
        self._codes = codes
        self.n_bytes = 4 * codes.size
        self._whole = self._block(0, codes.shape[1]) if self.n_bytes <= MAX_MATRIX_BYTES else None

    @property
    def what(self) -> str:
        """Say how the matrix is given to a model."""
        if self._whole is not None:
            return "float32 matrix prepared before"
        return f"blocks of {PREDICT_BLOCK_ROWS:,} rows, each converted outside of the timing"

    def timed(
        self, call: Callable[[NDArray[np.float32]], Rows], runs: int | None = None
    ) -> tuple[Rows, list[float]]:
        """Time a call on every block, each warmed once; return all rows, and seconds a run."""
        parts, seconds = [], np.empty(0)
        for first, block in self._blocks():
            result: list[Rows] = []
            warm = seconds_of(lambda block=block, result=result: result.append(call(block)))
            if not len(seconds):
                n_blocks = self._codes.shape[1] / len(block)
                seconds = np.zeros(runs or n_runs(warm * n_blocks))
            seconds += [seconds_of(lambda block=block: call(block)) for _ in seconds]
            parts.append(result[0] + first)
        return np.concatenate(parts), seconds.tolist()

    def _blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        n_rows = self._codes.shape[1]
        if self._whole is not None:
            yield 0, self._whole
            return
        for first in range(0, n_rows, PREDICT_BLOCK_ROWS):
            yield first, self._block(first, min(n_rows, first + PREDICT_BLOCK_ROWS))

    def _block(self, first: int, stop: int) -> NDArray[np.float32]:
        return np.ascontiguousarray(self._codes[:, first:stop].T, dtype=np.float32)


def inplace_predict(
    bench: Bench,
    task: str,
    matrix: RowMajor,
    booster: xgb.Booster,
    *,
    one_thread: bool = True,
    runs: int | None = None,
) -> Rows:
    """Predict all rows with XGBoost; return those with a margin above 0: the reference."""

    def above(block: NDArray[np.float32]) -> Rows:
        return np.flatnonzero(booster.inplace_predict(block, predict_type="margin") > 0)

    rows: Rows = np.empty(0, np.int64)
    threads = {INPLACE_ALL: n_cores()} | ({INPLACE_ONE: 1} if one_thread else {})
    for system, n_threads in threads.items():
        booster.set_param({"nthread": n_threads})
        before = reset_peak()
        rows, seconds = matrix.timed(above, runs)
        facts = {"bytes_read": matrix.n_bytes, "note": matrix.what, "rss_before_mb": before}
        bench.add(task, system, seconds, rows, rows_touched=bench.figures["rows"], **facts)
    return rows


def random_forest(
    bench: Bench,
    task: str,
    matrix: RowMajor,
    codes: NDArray[np.uint8],
    *,
    labels: LabelSet,
    background: NDArray[np.int64],
) -> None:
    """Predict all rows with scikit-learn: another model, so its rows are its own."""
    from sklearn.ensemble import RandomForestClassifier

    systems = {
        f"scikit-learn random forest, {'1 thread' if jobs == 1 else 'all threads'}": jobs
        for jobs in (n_cores(), 1)
    }
    if codes.size > MAX_FOREST_ELEMENTS:
        for system in systems:
            bench.leave_out(task, system, "more than 10M rows x 32 columns: minutes a run")
        return
    rows = np.concatenate([labels.positive, labels.negative, background])
    model = RandomForestClassifier(N_FOREST_TREES, max_depth=FOREST_DEPTH, random_state=0)
    model.fit(codes[:, rows].T.astype(np.float32), np.isin(rows, labels.positive))

    def predicted(block: NDArray[np.float32]) -> Rows:
        return np.flatnonzero(model.predict(block))

    for system, jobs in systems.items():
        model.set_params(n_jobs=jobs)
        before = reset_peak()
        found, seconds = matrix.timed(predicted)
        facts = {"bytes_read": matrix.n_bytes, "note": f"another model; {matrix.what}"}
        facts |= {"rows_touched": codes.shape[1], "rss_before_mb": before}
        bench.add(task, system, seconds, found, **facts)


def naive_rows(codes: NDArray[np.uint8], boxes: Sequence[LeafBox]) -> Rows:
    """Return the rows of boxes by comparisons as anyone would write them: the reference, too."""
    inside = np.zeros(codes.shape[1], dtype=np.bool_)
    for box in boxes:
        mask = np.ones(codes.shape[1], dtype=np.bool_)
        for column, low, high in box.ranges:
            if low > 0:
                mask &= codes[column] >= low
            if high < 256:
                mask &= codes[column] < high
        inside |= mask
    return np.flatnonzero(inside)


def buffered_rows(codes: NDArray[np.uint8], boxes: Sequence[LeafBox]) -> Rows:
    """Return the same without new arrays: what NumPy can do when its memory is managed by hand."""
    inside, mask, bound = np.zeros((3, codes.shape[1]), dtype=np.bool_)
    for box in boxes:
        mask[:] = True
        for column, low, high in box.ranges:
            if low > 0:
                np.logical_and(mask, np.greater_equal(codes[column], low, out=bound), out=mask)
            if high < 256:
                np.logical_and(mask, np.less(codes[column], high, out=bound), out=mask)
        inside |= mask
    return np.flatnonzero(inside)


def numpy_masks(
    bench: Bench, codes: NDArray[np.uint8], boxes: Sequence[LeafBox], task: str, expected: Rows
) -> None:
    """Compare and AND whole columns."""
    facts = _column_facts(codes, boxes)
    for system, rows in ((NUMPY, naive_rows), (NUMPY_BUFFERED, buffered_rows)):
        bench.measure(
            task, system, lambda rows=rows: rows(codes, boxes), expected=expected, **facts
        )


def frames(
    bench: Bench,
    codes: NDArray[np.uint8],
    tasks: Sequence[tuple[str, Sequence[LeafBox], Rows]],
    folder: Path,
) -> None:
    """Filter the codes as a table: Polars and DuckDB, in memory and from one Parquet file."""
    import polars as pl

    frame = pl.DataFrame({f"c{number}": line for number, line in enumerate(codes)})
    frame = frame.with_columns(row=pl.int_range(len(frame), dtype=pl.UInt32))
    path = folder / "codes.parquet"
    frame.write_parquet(path)
    bench.note(parquet_bytes=path.stat().st_size)
    for task, boxes, expected in tasks:
        facts = _column_facts(codes, boxes)
        condition = _polars_condition(boxes)

        def in_memory(condition: pl.Expr = condition) -> Rows:
            return _collected(frame.lazy().filter(condition))

        def over_parquet(condition: pl.Expr = condition) -> Rows:
            return _collected(pl.scan_parquet(path).filter(condition))

        bench.measure(task, "Polars, in memory", in_memory, expected=expected, **facts)
        facts["bytes_read"] = None
        bench.measure(task, "Polars, Parquet", over_parquet, expected=expected, **facts)
    _duckdb(bench, frame, codes, tasks, path)
    path.unlink()


def _duckdb(
    bench: Bench,
    frame: pl.DataFrame,
    codes: NDArray[np.uint8],
    tasks: Sequence[tuple[str, Sequence[LeafBox], Rows]],
    path: Path,
) -> None:
    """Ask DuckDB in SQL: a table in memory, and the Parquet file."""
    import duckdb

    with duckdb.connect() as connection:
        connection.register("frame", frame)
        connection.execute("CREATE TABLE codes AS SELECT * FROM frame")
        connection.unregister("frame")
        for task, boxes, expected in tasks:
            facts = _column_facts(codes, boxes)
            for system, table in (("in memory", "codes"), ("Parquet", f"read_parquet('{path}')")):
                sql = f"SELECT row FROM {table} WHERE {sql_condition(boxes)}"

                def selected(sql: str = sql) -> Rows:
                    rows: Rows = connection.execute(sql).fetchnumpy()["row"]
                    return rows

                if system == "Parquet":
                    facts["bytes_read"] = None
                bench.measure(task, f"DuckDB, {system}", selected, expected=expected, **facts)


def sql_condition(boxes: Sequence[LeafBox]) -> str:
    """Return boxes as the condition of a WHERE."""
    return " OR ".join("(" + (" AND ".join(_sql_bounds(box)) or "TRUE") + ")" for box in boxes)


def _sql_bounds(box: LeafBox) -> Iterator[str]:
    for column, low, high in box.ranges:
        if low > 0:
            yield f"c{column} >= {low}"
        if high < 256:
            yield f"c{column} < {high}"


def _polars_condition(boxes: Sequence[LeafBox]) -> pl.Expr:
    import polars as pl

    conditions = []
    for box in boxes:
        bounds = [pl.lit(value=True)]
        for column, low, high in box.ranges:
            bounds += [pl.col(f"c{column}") >= low] if low > 0 else []
            bounds += [pl.col(f"c{column}") < high] if high < 256 else []
        conditions.append(reduce(operator.and_, bounds[1:] or bounds))
    return reduce(operator.or_, conditions)


def _collected(found: pl.LazyFrame) -> Rows:
    return found.select("row").collect()["row"].to_numpy()


def _column_facts(codes: NDArray[np.uint8], boxes: Sequence[LeafBox]) -> dict[str, Any]:
    """Say what a scan must read at least: each column that the boxes name, once."""
    n_columns = len({each.column for box in boxes for each in box.ranges})
    return {"rows_touched": codes.shape[1], "bytes_read": n_columns * codes.shape[1]}


def vector_top_k(
    bench: Bench,
    embeddings: NDArray[np.float16],
    rounds: Sequence[tuple[str, Distilled, Rows]],
    folder: Path,
) -> None:
    """Ask for as many rows nearest to the teacher's direction as the boxes hold.

    Other rows by nature: both are compared with the teacher's own positives.
    """
    n_rows = len(embeddings)
    graph = None
    if n_rows <= MAX_GRAPH_ROWS:
        path = folder / "vectors.usearch"
        build_s = seconds_of(lambda: build_vector_index(embeddings, path))
        bench.note(vector_index={"build_s": build_s, "bytes": path.stat().st_size})
        graph = VectorIndex.open(path, embeddings)
    for task, distilled, expected in rounds:
        teacher, k = distilled.teacher, len(expected)
        logits = similarities(embeddings, teacher.direction) + np.float32(teacher.offset)
        wanted = np.flatnonzero(logits > distilled.limit_logit)

        def exact(teacher: Any = teacher, k: int = k) -> Rows:
            near = similarities(embeddings, teacher.direction)
            return np.argpartition(-near, k - 1)[:k]

        facts = {"bytes_read": embeddings.nbytes, "note": "float16 scan by blocks; other rows"}
        top = bench.measure(task, "vector top-k, exact scan", exact, rows_touched=n_rows, **facts)
        recall = {
            "boxes": _recall(expected, wanted),
            "vector top-k, exact scan": _recall(top, wanted),
        }
        if graph is None:
            reason = f"more than {MAX_GRAPH_ROWS:,} rows: the graph takes too long to build"
            bench.leave_out(task, "vector top-k, HNSW", reason)
        else:

            def approximate(teacher: Any = teacher, k: int = k) -> Rows:
                return graph.search(teacher.direction, k, exact=False)[0]

            note = "usearch, 1 thread; other rows"
            top = bench.measure(task, "vector top-k, HNSW", approximate, note=note)
            recall["vector top-k, HNSW"] = _recall(top, wanted)
        recalls = bench.figures.setdefault("recall_of_teacher_positives", {})
        recalls[task] = {"teacher_positives": len(wanted), "k": k, **recall}
        bench.record.save()


def _recall(found: Rows, wanted: Rows) -> float:
    return float(np.isin(wanted, found).mean()) if len(wanted) else float("nan")
