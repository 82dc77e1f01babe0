"""Build the column index of one shard on disk (layer 3); see `clipbranches_widget.sorted_columns`.

Two passes. The first turns embeddings into codes, chunks of rows in parallel. The second derives
the optional files from the codes, columns in parallel: prefix bits chunk by chunk, the sorted
order by a counting sort, since where the rows of each code start is known from the first pass.

Memory does not depend on the number of rows: see `build_sorted_columns`.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.array_build import ArrayBuild, ArrayFile
from clipbranches_widget.boxes import N_CODES
from clipbranches_widget.column_model import BLOCK_ROWS, ColumnModel
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.npy import drop_pages
from clipbranches_widget.sorted_columns import (
    CODES_FILE,
    OFFSETS_FILE,
    ORDER_FILE,
    PREFIX_EDGES,
    PREFIX_FILE,
    ColumnParts,
    n_words,
    prefix_bits,
)
from clipbranches_widget.storage import save_array

BUILD_FORMAT = 1
"""Changes when the files of half a build cannot be continued by new code."""

MAX_ROWS = 2**32 - 1
"""Of a shard: its rows are uint32."""

_CHUNK_CODES = 2**23
_SORT_ROWS = 2**20
_SAMPLED_ROWS = 64

_OPTIONAL: Mapping[ColumnParts, tuple[str, ...]] = {
    "full": (PREFIX_FILE, ORDER_FILE),
    "bits": (PREFIX_FILE,),
    "codes": (),
}

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Gets (done, total)."""


def optional_files(columns: str) -> tuple[str, ...]:
    """Return the files beside codes and offsets that a `ColumnParts` stands for.

    Raises
    ------
    CatalogError
        `columns` is none of the three.
    """
    for name in get_args(ColumnParts):
        if columns == name:
            return _OPTIONAL[name]
    raise CatalogError(
        f"expected columns 'full', 'bits' or 'codes', got {columns!r}: 'full' stores 9 bytes per "
        "image and column and answers fastest, 'bits' 5, 'codes' 1"
    )


def optional_arrays(
    columns: str, *, n_columns: int, n_rows: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return dtype and shape of each of the `optional_files`."""
    forms: dict[str, tuple[str, tuple[int, ...]]] = {
        PREFIX_FILE: ("<u8", (n_columns, len(PREFIX_EDGES), n_words(n_rows))),
        ORDER_FILE: ("<u4", (n_columns, n_rows)),
    }
    return {name: forms[name] for name in optional_files(columns)}


def build_sorted_columns(
    embeddings: NDArray[np.floating],
    model: ColumnModel,
    folder: Path,
    *,
    columns: ColumnParts = "full",
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the column index of a shard into its folder.

    A build that was killed is continued by the next call with the same arguments; it redoes what
    was not yet journaled: that of the last second, or of as long as the disk took to flush. Until
    the build is finished, the folder holds a journal (`clipbranches_widget.array_build`) and no
    ``offsets.npy``.

    Parameters
    ----------
    embeddings : (n, dim) float
        Any number of rows below 2**32; may be memory-mapped, and is read in blocks.
    model : ColumnModel
        Gives the D columns.
    folder
        Existing folder of the shard, used by one process at a time. An index in it is replaced.
    columns : "full", "bits" or "codes"
        What to store; see `SortedColumns`.
    n_threads
        None: one per core. The files do not depend on it.
    progress
        Called with (done, total) rows, in this thread; each row counts once for its codes and,
        except for "codes", once more for what is derived from them. Starts at what an earlier
        call has done and ends at the total.

    Raises
    ------
    CatalogError
        Too many rows, or unknown `columns`.

    Notes
    -----
    Memory, for any n: in each thread 8 MiB of codes and a block of 16,384 rows, at ``6 * dim +
    8 * D`` bytes a row of float16; afterwards 30 MiB to sort 2**20 rows. With dim = 512, D = 128
    and two threads that is 150 MiB. Written bytes wait in the system's cache, as of any program.
    """
    n_rows, n_columns = len(embeddings), model.n_columns
    optional = optional_arrays(columns, n_columns=n_columns, n_rows=n_rows)
    if n_rows > MAX_ROWS:
        raise CatalogError(
            f"expected at most {MAX_ROWS:,} rows in a shard, got {n_rows:,}: make smaller shards, "
            "such as rows_per_shard=100_000_000"
        )
    stale = [folder / name for name in {OFFSETS_FILE, PREFIX_FILE, ORDER_FILE} - set(optional)]
    for file in (*stale, *folder.glob(f".{OFFSETS_FILE}.*.tmp")):
        file.unlink(missing_ok=True)
    chunk_rows = max(1, _CHUNK_CODES // (n_columns * BLOCK_ROWS)) * BLOCK_ROWS
    identity = {
        "format": BUILD_FORMAT,
        "column_model": model.hash,
        "embeddings": [*embeddings.shape, embeddings.dtype.str, _sampled_hash(embeddings)],
        "columns": columns,
        "chunk_rows": chunk_rows,
    }
    arrays = {CODES_FILE: ("|u1", (n_columns, n_rows)), **optional}
    build = ArrayBuild(folder, arrays, identity)
    total = 2 * n_rows if optional else n_rows

    def report(done: int) -> None:
        if progress is not None:
            progress(done, total)

    n_derived = n_rows * int(build.done.get("n_columns", 0)) // n_columns
    report(int(build.done.get("n_rows", 0)) + n_derived)
    counts = _write_codes(
        embeddings, model, build, chunk_rows=chunk_rows, n_threads=n_threads, report=report
    )
    offsets = np.concatenate(
        (np.zeros((n_columns, 1), np.int64), counts.cumsum(axis=1)), axis=1, dtype=np.int64
    )
    if optional:
        derive_parts(
            build,
            build.files[CODES_FILE],
            offsets,
            n_threads=n_threads,
            progress=lambda done, of: report(n_rows + n_rows * done // of),
        )
    build.flush()
    save_array(folder / OFFSETS_FILE, offsets)
    build.close()


def derive_parts(
    build: ArrayBuild,
    codes: ArrayFile,
    offsets: NDArray[np.int64],
    *,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Fill ``prefix.npy`` and ``order.npy``, those of them that `build` has, from the codes.

    Parameters
    ----------
    build : ArrayBuild
        The files to fill; keeps the number of finished columns as ``done["n_columns"]``.
    codes : ArrayFile
        (D, n) uint8, complete.
    offsets : (D, 257) int64
        Of `SortedColumns`.
    n_threads
        None: one per core.
    progress
        Called with (done, total) columns.
    """
    n_columns = codes.shape[0]
    n_done = int(build.done.get("n_columns", 0))
    prefix, order = build.files.get(PREFIX_FILE), build.files.get(ORDER_FILE)

    def derive(column: int, stop: threading.Event) -> None:
        line = _chunks_of(codes, column, stop)
        _derive_column(line, column, offsets[column], prefix=prefix, order=order)

    def finished(_: None) -> None:
        nonlocal n_done
        n_done += 1
        build.advance(n_columns=n_done)
        if progress is not None:
            progress(n_done, n_columns)

    if progress is not None:
        progress(n_done, n_columns)
    _in_order(derive, range(n_done, n_columns), n_threads, finished)


def _write_codes(
    embeddings: NDArray[np.floating],
    model: ColumnModel,
    build: ArrayBuild,
    *,
    chunk_rows: int,
    n_threads: int | None,
    report: Callable[[int], None],
) -> NDArray[np.int64]:
    """Write the codes of all rows; return how many rows have each code, (D, 256) int64."""
    from threadpoolctl import threadpool_limits

    n_rows, codes_file = len(embeddings), build.files[CODES_FILE]
    n_done = int(build.done.get("n_rows", 0))
    counts = np.zeros((model.n_columns, N_CODES), np.int64)
    if n_done:
        stored = np.frombuffer(bytes.fromhex(build.done["counts"]), "<i8")
        counts += stored.reshape(counts.shape)

    def encode(start: int, _: threading.Event) -> NDArray[np.int64]:
        codes = _codes(model, embeddings[start : start + chunk_rows])
        codes_file.write((column * n_rows + start, line) for column, line in enumerate(codes))
        return np.stack([np.bincount(line, minlength=N_CODES) for line in codes])

    def finished(chunk_counts: NDArray[np.int64]) -> None:
        nonlocal n_done
        counts[:] += chunk_counts
        n_done = min(n_done + chunk_rows, n_rows)
        build.advance(n_rows=n_done, counts=counts.astype("<i8").tobytes().hex())
        report(n_done)

    with threadpool_limits(1, user_api="blas"):  # the chunks are the parallel work
        _in_order(encode, range(n_done, n_rows, chunk_rows), n_threads, finished)
    return counts


def _derive_column(
    chunks: Iterator[tuple[int, NDArray[np.uint8]]],
    column: int,
    offsets: NDArray[np.int64],
    *,
    prefix: ArrayFile | None,
    order: ArrayFile | None,
) -> None:
    """Write one column's prefix bits and sorted order; (257,) `offsets` are those of the column."""
    free = offsets[:-1].copy()
    for start, codes in chunks:
        if prefix is not None:
            n_edges, n_line = prefix.shape[1:]
            bits = prefix_bits(codes)
            at = column * n_edges * n_line + start // 64
            prefix.write((at + edge * n_line, line) for edge, line in enumerate(bits))
        if order is not None:
            rows = np.argsort(codes, kind="stable").astype(np.uint32)
            rows += np.uint32(start)
            counts = np.bincount(codes, minlength=N_CODES)
            runs = _runs(rows, counts, free)
            order.write((column * order.shape[1] + at, run) for at, run in runs)
            free += counts


def _runs(
    rows: NDArray[np.uint32], counts: NDArray[np.int64], free: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.uint32]]]:
    """Cut sorted `rows` where their places in the column part; yield (place, rows).

    ``counts`` and ``free``, both (256,): rows of each code, and the column's next free place for
    it. A chunk that is the whole column stays in one piece.
    """
    present = np.flatnonzero(counts)
    sources = (counts.cumsum() - counts)[present]
    places = free[present]
    first = np.flatnonzero(np.diff(places - sources, prepend=-1))
    bounds = [*sources[first].tolist(), len(rows)]
    for place, low, high in zip(places[first].tolist(), bounds[:-1], bounds[1:], strict=True):
        yield place, rows[low:high]


def _chunks_of(
    codes: ArrayFile, column: int, stop: threading.Event
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (first row, a multiple of 64, codes) of one column until `stop` is set."""
    n_rows = codes.shape[1]
    for start in range(0, n_rows, _SORT_ROWS):
        if stop.is_set():
            return
        yield start, codes.read(column * n_rows + start, min(_SORT_ROWS, n_rows - start))


def _in_order(
    task: Callable[[int, threading.Event], T],
    items: Iterable[int],
    n_threads: int | None,
    finished: Callable[[T], None],
) -> None:
    """Run `task(item, stop)` in threads; call `finished` here with each result, in item order.

    An exception, of a task, of `finished` or an interrupt, sets the event and waits for the
    tasks that run; the others do not start.
    """
    stop = threading.Event()
    n_threads = os.cpu_count() if n_threads is None else n_threads
    with ThreadPoolExecutor(n_threads, thread_name_prefix="column-build") as pool:
        try:
            for result in pool.map(lambda item: task(item, stop), items):
                finished(result)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _sampled_hash(embeddings: NDArray[np.floating]) -> str:
    """Return a hash of up to 64 rows, evenly spaced, the first and the last among them."""
    picked = np.linspace(0, max(len(embeddings) - 1, 0), _SAMPLED_ROWS).astype(np.int64)
    digest = hashlib.blake2b(digest_size=16)
    for row in np.unique(picked).tolist():
        sampled = embeddings[row : row + 1]
        digest.update(sampled.tobytes())
        drop_pages(sampled)
    return digest.hexdigest()


def _codes(model: ColumnModel, embeddings: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return `model.codes(embeddings)`, with one block of a memory map in memory at a time."""
    codes = np.empty((model.n_columns, len(embeddings)), np.uint8)
    for start in range(0, len(embeddings), BLOCK_ROWS):
        block = embeddings[start : start + BLOCK_ROWS]
        codes[:, start : start + BLOCK_ROWS] = model.codes(block)
        drop_pages(block)
    return codes
