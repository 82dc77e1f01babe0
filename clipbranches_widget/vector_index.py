"""Nearest rows of one shard by cosine similarity (layer 2): a thin wrapper around USearch.

On disk: ``vectors.usearch``, a USearch HNSW graph over the embeddings as 8-bit integers, key =
local row, memory-mapped when it is opened. The graph only proposes rows, two and a half times as
many as are asked for; the float16 embeddings decide. Shards of fewer than `EXACT_BELOW` rows have
a graph too, for other tools, but are scanned: the answer is then exact.

Similarities are always exact, whichever way the rows were found: the float32 nearest to
``a . q / |a|`` in real arithmetic. This is possible because the elements of a float16 row of norm
1 are multiples of 2**-24; with the unit query rounded to multiples of 2**-28, every partial sum
is a multiple of 2**-52 below 2, which float64 holds without rounding. So the order of summation,
the BLAS, the block size and the split into shards cannot change a bit of the result, and equal
rows tie exactly.

Why these numbers (512-d, k = 60, two busy cores; "hard" are 30,000 rows in a narrow cone as of
CLIP, mean cosine .40, with queries far outside of it, as texts are):

- Scanning costs 0.8 us a row: 4 ms for 5,000 rows, 16 for 20,000, 66 for 100,000. The graph takes
  about 1 to 3 ms at any size. It is thus faster from some 3,000 rows on, but misses rows, and up
  to 25,000 a scan takes 20 ms of the 50 that a search may take: hence `EXACT_BELOW`.
- Graph of 8-bit integers: built in 11 s, 660 bytes a row, recall .994 (hard). Of float16: 43 to
  48 s, 1,172 bytes, recall .994. bfloat16: 21 to 26 s, .993. With two outlying dimensions of .75
  and -.3, as CLIP has, 8 bits reach .994 too. 24 links: 18 s, .998.
- `EXPANSION_SEARCH` 256 / 512 / 1,024: recall .962 / .994 / 1.0 in .7 / 1.8 / 3.6 ms (hard); on
  100,000 rows in well separated clusters .999 from 64 on.
- Without proposals to spare (k instead of 2 k + 32) 8 bits lose: .875 instead of .962.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipbranches_widget.errors import CatalogCorruptError, QueryError
from clipbranches_widget.npy import drop_pages
from clipbranches_widget.storage import REBUILD, atomic_file

EXACT_BELOW = 25_000
CONNECTIVITY = 16
EXPANSION_ADD = 128
EXPANSION_SEARCH = 512

EXACT_SHARE = 0.1
"""Scanned when more than this share of the rows is asked for."""

_BLOCK_ELEMENTS = 2**18
_ADD_ROWS = 4096
_QUERY_STEP = 2.0**-28
_NORM_SLACK = 1e-3


def unit_query(vector: ArrayLike, dim: int) -> NDArray[np.float64]:
    """Check a query vector and scale it to norm 1, on the grid that makes sums exact.

    Parameters
    ----------
    vector : (dim,) real
        Any length but zero.
    dim
        Expected length.

    Returns
    -------
    NDArray[np.float64]
        Shape (dim,), multiples of 2**-28.

    Raises
    ------
    QueryError
        Not a vector of `dim` finite numbers, or all zero.

    Examples
    --------
    >>> unit_query([3, 4], 2)
    array([0.6, 0.8])
    """
    try:
        query = np.asarray(vector, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise QueryError(f"expected a vector of {dim} numbers, got {vector!r}") from error
    if query.shape != (dim,):
        raise QueryError(
            f"expected a query vector of shape ({dim},), got {query.shape}: embed the query with "
            "the model this catalog was built with (catalog.encoder_info)"
        )
    if not np.isfinite(query).all():
        raise QueryError("expected finite numbers in the query vector, got NaN or infinity")
    largest = np.abs(query).max(initial=0.0)
    if largest == 0.0:
        raise QueryError("expected a query vector with a direction, got all zeros")
    query = query / largest
    query /= np.sqrt(np.square(query).sum())
    on_grid: NDArray[np.float64] = np.rint(query / _QUERY_STEP) * _QUERY_STEP
    return on_grid


def exact_similarities(
    embeddings: NDArray[np.float16],
    query: NDArray[np.float64],
    rows: NDArray[np.int64] | None = None,
) -> NDArray[np.float32]:
    """Return the exact cosine similarity of rows to a query, correctly rounded to float32.

    Parameters
    ----------
    embeddings : (n, dim) float16
        Rows of norm 1 up to float16 rounding; may be memory-mapped, is read in blocks.
    query : (dim,) float64
        From `unit_query`.
    rows : (m,) int64, optional
        Which rows; all by default.

    Returns
    -------
    NDArray[np.float32]
        Shape (m,) or (n,). Cost: O(m dim).
    """
    n_rows = len(embeddings) if rows is None else len(rows)
    result = np.empty(n_rows, dtype=np.float32)
    block_rows = max(1, _BLOCK_ELEMENTS // len(query))
    for start in range(0, n_rows, block_rows):
        picked = slice(start, start + block_rows)
        block = embeddings[picked if rows is None else rows[picked]].astype(np.float64)
        norms = np.sqrt(np.einsum("ij,ij->i", block, block))
        result[picked] = block @ query / np.where(norms > 0, norms, 1.0)
    return result


def ranked(
    rows: NDArray[np.int64], similarities: NDArray[np.float32], k: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the `k` best rows: similarity descending, ties by row ascending.

    Examples
    --------
    >>> rows, similarities = ranked(np.array([4, 2, 3]), np.float32([0.5, 0.5, 0.9]), 2)
    >>> rows.tolist()
    [3, 2]
    """
    if 4 * k < len(rows):
        threshold = np.partition(similarities, len(rows) - k)[len(rows) - k]
        kept = np.flatnonzero(similarities >= threshold)
        rows, similarities = rows[kept], similarities[kept]
    order = np.lexsort((rows, -similarities))[:k]
    return rows[order], similarities[order]


def n_candidates(k: int, n_rows: int) -> int:
    """Return how many rows the graph is asked for to find `k`: more, as exact scores reorder."""
    return min(2 * k + 32, n_rows)


def build_vector_index(
    embeddings: NDArray[np.float16],
    path: Path,
    *,
    n_threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Build the HNSW graph of a shard and write it atomically.

    Parameters
    ----------
    embeddings : (n, dim) float16
        Unit-norm rows, n >= 1; may be memory-mapped. The graph is held in memory while it is
        built: (dim + about 150) bytes a row. Rows of zeros are erased ones, and left out.
    path
        The file to write.
    n_threads
        None: one per core.
    progress
        Gets (rows added, n).

    Notes
    -----
    Threads insert concurrently, so two builds of the same rows give two graphs that differ in
    a few links; what one graph answers never varies.
    """
    index = _new_index(embeddings.shape[1])
    n_rows = len(embeddings)
    for start in range(0, n_rows, _ADD_ROWS):
        part = embeddings[start : start + _ADD_ROWS]
        block = np.asarray(part)
        keys = np.arange(start, start + len(block), dtype=np.uint64)
        if not (is_there := block.any(axis=1)).all():
            keys, block = keys[is_there], block[is_there]
        if len(keys):
            index.add(keys, block, threads=n_threads or 0)
        drop_pages(part)
        if progress is not None:
            progress(min(start + _ADD_ROWS, n_rows), n_rows)
    with atomic_file(path) as temporary:
        index.save(str(temporary))


class VectorIndex:
    """Nearest rows of one shard.

    Create it with `VectorIndex.open`. Safe to use from several threads.
    """

    def __init__(self, path: Path, embeddings: NDArray[np.float16]) -> None:
        self._path = path
        self._embeddings = embeddings
        self._graph: Any = None
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, path: Path, embeddings: NDArray[np.float16], *, n_removed: int = 0
    ) -> VectorIndex:
        """Open ``vectors.usearch`` of a shard with these (n, dim) float16 `embeddings`.

        The graph is mapped at the first search that needs it. It may lack up to `n_removed` rows.

        Raises
        ------
        CatalogCorruptError
            The file is missing, is no USearch index, or holds other rows or another dimension.
        """
        _check_header(path, n_rows=len(embeddings), n_removed=n_removed, dim=embeddings.shape[1])
        return cls(path, embeddings)

    def is_exact(self, k: int) -> bool:
        """Return whether `search` scans all rows for this `k`, so that nothing can be missed."""
        n_rows = len(self._embeddings)
        return n_rows < EXACT_BELOW or k > EXACT_SHARE * n_rows

    def search(
        self, vector: ArrayLike, k: int, *, exact: bool | None = None, expansion: int | None = None
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the `k` nearest rows.

        Parameters
        ----------
        vector : (dim,) real
            Of any length but zero.
        k
            How many, at least 1; more than there are rows gives all of them.
        exact
            True scans, False asks the graph, None decides by `is_exact`.
        expansion
            How many rows the graph looks at, at least: more find more; default
            `EXPANSION_SEARCH`. Its proposals are never fewer than `n_candidates`.

        Returns
        -------
        local_rows : (min(k, n),) int64
            Similarity descending, ties by row ascending.
        similarities : (min(k, n),) float32
            Exact cosine similarities, also where the graph proposed the rows.

        Raises
        ------
        QueryError
            A bad vector or k < 1.
        """
        if k < 1:
            raise QueryError(f"expected k >= 1, got {k}")
        query = unit_query(vector, self._embeddings.shape[1])
        k = min(k, len(self._embeddings))
        scan = self.is_exact(k) if exact is None else exact
        looked_at = EXPANSION_SEARCH if expansion is None else expansion
        rows = self._scan(query, k) if scan else self.candidates(query, k, expansion=looked_at)
        return ranked(rows, exact_similarities(self._embeddings, query, rows), k)

    def proposals(self, rows: NDArray[np.float16], k: int, *, expansion: int) -> NDArray[np.int64]:
        """Return what the graph holds for the nearest rows of many others, on all cores.

        Parameters
        ----------
        rows : (m, dim) float16
            Of norm 1.
        k
            How many for each, at least 1.
        expansion
            How many rows the graph looks at, at least.

        Returns
        -------
        NDArray[np.int64]
            Local rows, (m, min(k, n)), roughly in order; -1 where the graph found fewer.
            Searches of the same index wait meanwhile: not for long, where m is some hundreds.
        """
        k = min(k, len(self._embeddings))
        with self._lock:
            graph = self._opened()
            graph.expansion_search = max(expansion, k)
            matches = graph.search(rows, k)
        keys = np.asarray(matches.keys).reshape(len(rows), k).astype(np.int64)
        counts = np.asarray(matches.counts).reshape(len(rows))
        keys[np.arange(k) >= counts[:, None]] = -1
        return keys

    def _scan(self, query: NDArray[np.float64], k: int) -> NDArray[np.int64]:
        """Return a superset of the `k` nearest rows: a float32 pass with a proven error bound.

        The dot product of norm-1 vectors in float32 is off by at most ``dim * 2**-24`` (Higham,
        Accuracy and Stability, section 3.1), twice that with the rounding of the query; dividing
        by a norm within `_NORM_SLACK` of 1 moves it by no more than that slack.
        """
        n_rows, dim = self._embeddings.shape
        if 4 * k >= n_rows:
            return np.arange(n_rows, dtype=np.int64)
        query32 = query.astype(np.float32)
        approximate = np.empty(n_rows, dtype=np.float32)
        block_rows = max(1, _BLOCK_ELEMENTS // dim)
        for start in range(0, n_rows, block_rows):
            block = self._embeddings[start : start + block_rows].astype(np.float32)
            np.dot(block, query32, out=approximate[start : start + block_rows])
        kth = np.partition(approximate, n_rows - k)[n_rows - k]
        slack = 2 * (_NORM_SLACK + 2 * (dim + 2) * 2.0**-24)
        return np.flatnonzero(approximate >= kth - np.float32(slack))

    def candidates(
        self, query: NDArray[np.float64], k: int, *, expansion: int
    ) -> NDArray[np.int64]:
        """Return what the graph proposes for the `k` nearest: more, as exact scores decide.

        Parameters
        ----------
        query : (dim,) float64
            From `unit_query`.
        k
            How many are wanted, at least 1.
        expansion
            How many rows the graph looks at, at least.

        Returns
        -------
        NDArray[np.int64]
            Local rows, ascending, `n_candidates` or a few less.
        """
        n_wanted = n_candidates(k, len(self._embeddings))
        with self._lock:  # searches of one graph share a scratch buffer per worker
            graph = self._opened()
            graph.expansion_search = max(expansion, n_wanted)
            matches = graph.search(query.astype(np.float32), n_wanted, threads=1)
        return np.unique(np.asarray(matches.keys)).astype(np.int64)

    def _opened(self) -> Any:
        """Map the graph, once; the caller holds the lock."""
        if self._graph is None:
            graph = _new_index(self._embeddings.shape[1])
            graph.view(str(self._path))
            self._graph = graph
        return self._graph


def _new_index(dim: int) -> Any:
    from usearch.index import Index

    return Index(
        ndim=dim,
        metric="ip",
        dtype="i8",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        expansion_search=EXPANSION_SEARCH,
    )


def _check_header(path: Path, *, n_rows: int, n_removed: int, dim: int) -> None:
    from usearch.index import Index

    header: dict[str, Any] | None
    try:
        header = Index.metadata(str(path)) if path.exists() else None
    except (RuntimeError, ValueError, OSError):
        header = None
    if header is None:
        raise CatalogCorruptError(f"expected a USearch index at {path}, found none: {REBUILD}")
    found = (int(header.get("count_present", -1)), header.get("dimensions"))
    if not n_rows - n_removed <= found[0] <= n_rows or found[1] != dim:
        raise CatalogCorruptError(
            f"{path}: expected {n_rows} rows of dim {dim}, got {found[0]} of dim {found[1]}: "
            f"{REBUILD}"
        )
