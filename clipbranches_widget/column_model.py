"""The column model (layer 2): what the indexed columns mean, one model for all shards.

A column is the similarity of the embedding to a named *anchor*: a concept phrase embedded by the
catalog's own text tower, or a k-means centroid named by what it holds. Half and half where there
is a text tower, as ``benchmarks/columns.py`` decided: concepts alone read best, but boxes on them
hold twice the rows. Its values are cut into 256 codes, equi-depth on a sample, so a box of codes
means the same on every shard and after appending.

On disk: ``columns.json`` (format, names, kind, hash) and ``columns.npz`` with ``anchors`` (D, dim)
float32 and ``edges`` (D, 255) float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES
from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.npy import read_arrays
from clipbranches_widget.storage import atomic_file, read_json, write_json

N_COLUMNS = 128
"""Columns of a new catalog: the accuracy of 128 is that of 256 within noise, and 64 loses some."""
BLOCK_ROWS = 16_384
SAMPLE_ROWS = 50_000

_N_BUCKETS = 16_384
_UNCLEAR = N_CODES
_ANCHOR_STEPS = 2.0**28
_PRODUCT_ROWS = 2048


class TextTower(Protocol):
    """What the column model needs of an encoder."""

    def encode_text(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return unit-norm embeddings, (n, dim) float32."""
        ...


@dataclass(frozen=True)
class ColumnModel:
    """The map from embeddings to codes.

    Attributes
    ----------
    kind : "concepts" or "centroids"
        Where the anchors come from; "concepts" may have centroids among them.
    names : tuple of str
        A readable name a column, D of them.
    anchors : (D, dim) float32
        Unit-norm anchor vectors.
    edges : (D, 255) float32
        Inner bin edges, ascending: code ``c`` holds ``edges[c - 1] <= value < edges[c]``.
    """

    kind: Literal["concepts", "centroids"]
    names: tuple[str, ...]
    anchors: NDArray[np.float32]
    edges: NDArray[np.float32]

    @property
    def n_columns(self) -> int:
        """The number of columns, D."""
        return len(self.names)

    @cached_property
    def hash(self) -> str:
        """Hex digest that names this model: same hash, same codes."""
        digest = hashlib.blake2b("\0".join((self.kind, *self.names)).encode(), digest_size=16)
        digest.update(np.ascontiguousarray(self.anchors).tobytes())
        digest.update(np.ascontiguousarray(self.edges).tobytes())
        return digest.hexdigest()

    @cached_property
    def _coders(self) -> tuple[Coder, ...]:
        return tuple(Coder(edges) for edges in self.edges)

    def values(self, embeddings: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return the column values of (n, dim) embeddings: (n, D) float32 similarities.

        Of float16 rows of norm 1 they are exact, so that a row has the same code whatever rows
        are around it, on any number of threads and on any machine; see `exact_products`.
        """
        return exact_products(embeddings, self.anchors)

    def codes(self, embeddings: NDArray[np.floating]) -> NDArray[np.uint8]:
        """Return the codes of (n, dim) embeddings: (D, n) uint8, one contiguous row a column."""
        out = np.empty((self.n_columns, len(embeddings)), dtype=np.uint8)
        for start in range(0, len(embeddings), BLOCK_ROWS):
            block = slice(start, start + BLOCK_ROWS)
            values = np.ascontiguousarray(self.values(embeddings[block]).T)
            for column, coder in enumerate(self._coders):
                out[column, block] = coder(values[column])
        return out

    def save(self, folder: Path) -> None:
        """Write ``columns.json`` and ``columns.npz`` into `folder`."""
        with atomic_file(folder / "columns.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, anchors=self.anchors, edges=self.edges)
        write_json(
            folder / "columns.json",
            {"kind": self.kind, "names": list(self.names), "hash": self.hash},
        )

    @classmethod
    def open(cls, folder: Path) -> ColumnModel:
        """Read the model of a catalog folder; raises CatalogCorruptError when pieces disagree."""
        header = read_json(folder / "columns.json")
        try:
            anchors, edges = read_arrays(folder / "columns.npz", ("anchors", "edges"))
        except (OSError, ValueError, KeyError, EOFError) as error:
            raise CatalogCorruptError(
                f"expected arrays 'anchors' and 'edges' in {folder / 'columns.npz'}, got {error}; "
                "restore the file from a backup or build the catalog again"
            ) from error
        model = cls(header["kind"], tuple(header["names"]), anchors, edges)
        if model.hash != header["hash"]:
            raise CatalogCorruptError(
                f"columns.npz does not belong to columns.json in {folder}: expected hash "
                f"{header['hash']}, got {model.hash}; restore both from one backup or build the "
                "catalog again"
            )
        return model


class Coder:
    """Cuts the values of one column into codes: ``searchsorted(edges, values, side="right")``.

    The result is the same for every value, at a tenth of the cost: the span of the edges is cut
    into equal buckets. Subtraction, scaling and truncation keep the order of floats, also when
    they round, so a value in a bucket without an edge has as many edges below it as its bucket.
    Only the few values that share a bucket with an edge are searched for.

    Parameters
    ----------
    edges : (255,) float32
        Ascending, possibly with duplicates or infinities.

    Examples
    --------
    >>> Coder(np.arange(255, dtype=np.float32))(np.float32([-1, 0, 0.5, 254])).tolist()
    [0, 1, 1, 255]
    """

    def __init__(self, edges: NDArray[np.float32]) -> None:
        self._edges = edges
        self._low, self._high = edges[0], edges[-1]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            self._scale = np.float32(_N_BUCKETS - 1) / (self._high - self._low)
        self._has_buckets = bool(np.isfinite(self._scale) and self._scale > 0)
        if self._has_buckets:
            n_edges = np.bincount(self._buckets(edges), minlength=_N_BUCKETS)
            self._codes = np.where(n_edges == 0, n_edges.cumsum(), _UNCLEAR).astype(np.int16)

    def __call__(self, values: NDArray[np.float32]) -> NDArray[np.integer]:
        """Return the codes of (n,) values, NaN as the last: (n,) integers from 0 to 255."""
        if not self._has_buckets:
            return np.searchsorted(self._edges, values, side="right")
        codes = self._codes.take(self._buckets(values))
        unclear = np.flatnonzero(codes == _UNCLEAR)
        codes[unclear] = np.searchsorted(self._edges, values[unclear], side="right")
        return codes

    def _buckets(self, values: NDArray[np.float32]) -> NDArray[np.int32]:
        """Return the bucket of each value; that of the lowest edge for NaN."""
        scaled = np.fmin(np.fmax(values, self._low), self._high)
        scaled -= self._low
        scaled *= self._scale
        buckets: NDArray[np.int32] = scaled.astype(np.int32)
        return buckets


def default_column_model(
    embeddings: NDArray[np.floating],
    *,
    encoder: TextTower | None,
    captions: Sequence[str] | None = None,
    n_columns: int = N_COLUMNS,
    n_concepts: int | None = None,
    seed: int = 0,
) -> ColumnModel:
    """Fit the column model of a new catalog on a sample of its rows.

    Parameters
    ----------
    embeddings : (n, dim) float
        Unit-norm embeddings, n >= 1; may be memory-mapped, at most 50,000 rows are read.
    encoder : TextTower or None
        Embeds the concept vocabulary; None: all columns are k-means centroids.
    captions : sequence of n str, optional
        Name the centroids by the captions nearest to them, where there is no text tower.
    n_columns : int
        Upper bound of D; fewer when the catalog or the vocabulary has less to offer.
    n_concepts : int, optional
        How many columns are concepts where there is a text tower; default: half of them.
    seed : int
        Of the sample and of k-means.
    """
    n_rows = len(embeddings)
    rng = np.random.default_rng(seed)
    picked = np.sort(rng.choice(n_rows, size=min(n_rows, SAMPLE_ROWS), replace=False))
    sample = np.asarray(embeddings[picked], dtype=np.float32)
    kind: Literal["concepts", "centroids"] = "centroids"
    if encoder is None:
        anchors = _centroids(sample, n_columns, seed)
        names = _named_by_captions(anchors, sample, picked, captions)
    else:
        kind = "concepts"
        concepts = vocabulary()
        vectors = encoder.encode_text(concepts)
        wanted = n_columns - n_columns // 2 if n_concepts is None else min(n_concepts, n_columns)
        with _one_blas_thread():
            kept = spread_columns(sample[:10_000] @ vectors.T, wanted)
        names, anchors = tuple(concepts[i] for i in kept), vectors[kept]
        if wanted < n_columns:
            centroids = _centroids(sample, n_columns - wanted, seed)
            names += _named_by_concepts(centroids - sample.mean(axis=0), concepts, vectors)
            anchors = np.concatenate([anchors, centroids])
    anchors = np.ascontiguousarray(anchors, dtype=np.float32)
    return ColumnModel(kind, names, anchors, equi_depth_edges(exact_products(sample, anchors)))


def exact_products(
    embeddings: NDArray[np.floating], anchors: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return ``embeddings @ anchors.T``, each number rounded once: (n, D) float32.

    With float32 sums, the last bit of half of the products depends on how many rows are multiplied
    at once, and where among them a row is. Elements of float16 rows of norm 1 are multiples of
    2**-24; with anchors rounded to multiples of 2**-28 float64 holds every partial sum, in any
    order.

    Parameters
    ----------
    embeddings : (n, dim) float16, or float32 with the values of float16
        Norm 1; other values are as exact as float64 gets.
    anchors : (D, dim) float32
        Norm 1.
    """
    on_grid = np.rint(anchors.T.astype(np.float64) * _ANCHOR_STEPS) / _ANCHOR_STEPS
    out = np.empty((len(embeddings), len(anchors)), dtype=np.float32)
    for start in range(0, len(embeddings), _PRODUCT_ROWS):
        block = slice(start, start + _PRODUCT_ROWS)
        out[block] = np.asarray(embeddings[block], dtype=np.float64) @ on_grid
    return out


def equi_depth_edges(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return 255 ascending edges a column that cut (n, D) values into 256 equal shares: (D, 255).

    Every edge is one of the values (no interpolation), so equal values share a code.
    """
    shares = np.arange(1, N_CODES) / N_CODES
    edges = np.quantile(values, shares, axis=0, method="higher").T
    return np.ascontiguousarray(edges, dtype=np.float32)


def vocabulary() -> tuple[str, ...]:
    """Return the bundled everyday concepts, the candidates for column anchors."""
    text = files("clipbranches_widget").joinpath("vocabulary.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line and not line.startswith("#"))


def spread_columns(values: NDArray[np.float32], n_columns: int) -> NDArray[np.int64]:
    """Choose columns of (n, m) `values` by pivoted Cholesky of their correlation: (<= n_columns,).

    Greedy: each step keeps the column with most variance that the kept ones do not explain
    linearly (Harbrecht, Peters, Schneider 2012, algorithm 1). Columns are standardised first, so
    that loud concepts do not win over telling ones; constant columns are never kept, except the
    first where all are constant.

    Examples
    --------
    >>> x = np.array([[0, 0, 1], [1, 2, 0], [2, 4, 1], [3, 6, 0]], dtype=np.float32)
    >>> spread_columns(x, 3).tolist()
    [0, 2]
    """
    centred = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    norms = np.linalg.norm(centred, axis=0)
    scale = np.where(norms > 1e-6 * max(norms.max(initial=0.0), 1e-12), norms, np.inf)
    centred /= scale
    residual = np.square(centred).sum(axis=0)
    kept: list[int] = []
    basis = np.empty((0, values.shape[1]))
    while len(kept) < n_columns and residual.max(initial=0.0) > 1e-6:
        best = int(residual.argmax())
        row = centred[:, best] @ centred - basis[:, best] @ basis
        row /= np.sqrt(residual[best])
        basis = np.vstack([basis, row])
        residual = np.maximum(residual - row**2, 0.0)
        residual[best] = 0.0
        kept.append(best)
    return np.array(kept or [0], dtype=np.int64)


def _one_blas_thread() -> AbstractContextManager[Any]:
    """Compute products on one thread: with more, their last bits depend on how many."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[Any] = threadpool_limits(1, user_api="blas")
    return limits


def _centroids(sample: NDArray[np.float32], n_centroids: int, seed: int) -> NDArray[np.float32]:
    """Cluster the sample: unit-norm centroids, at most `n_centroids`."""
    from sklearn.cluster import MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    if (distinct := _few_distinct(sample, n_centroids)) is not None:
        centroids = distinct
    else:
        kmeans = MiniBatchKMeans(n_centroids, random_state=seed, n_init=1, batch_size=4096)
        with threadpool_limits(1):  # batches are small: threads only wait for each other
            centroids = kmeans.fit(sample).cluster_centers_.astype(np.float32)
    norms = np.linalg.norm(centroids, axis=1, keepdims=True)
    unit: NDArray[np.float32] = np.ascontiguousarray(
        centroids / np.where(norms > 0, norms, 1), dtype=np.float32
    )
    return unit


def _few_distinct(sample: NDArray[np.float32], n_most: int) -> NDArray[np.float32] | None:
    """Return the distinct rows, sorted, where they are `n_most` at most, else None."""
    for rows in (sample[: 4 * n_most], sample):  # sorting all of them is slow, and hardly needed
        distinct: NDArray[np.float32] = np.unique(rows, axis=0)
        if len(distinct) > n_most:
            return None
    return distinct


def _named_by_captions(
    anchors: NDArray[np.float32],
    sample: NDArray[np.float32],
    sample_rows: NDArray[np.int64],
    captions: Sequence[str] | None,
) -> tuple[str, ...]:
    """Name each centroid by the row nearest to it."""
    nearest = sample_rows[(sample @ anchors.T).argmax(axis=0)]
    names: list[str] = []
    for column, row in enumerate(nearest.tolist()):
        caption = captions[row] if captions is not None else ""
        name = f"like {caption!r}" if caption else f"like row {row}"
        names.append(f"{name} ({column})" if name in names else name)
    return tuple(names)


def _named_by_concepts(
    centred: NDArray[np.float32], concepts: Sequence[str], vectors: NDArray[np.float32]
) -> tuple[str, ...]:
    """Name each centroid by the two concepts nearest to it, both centred.

    Centred, because texts and images of CLIP lie apart (the modality gap): without it one concept
    would be the nearest to everything.
    """
    away = vectors - vectors.mean(axis=0)
    away /= np.maximum(np.linalg.norm(away, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    order = np.argsort(-(centred @ away.T), axis=1, kind="stable")[:, :2]
    names: list[str] = []
    for column, nearest in enumerate(order.tolist()):
        name = "like " + ", ".join(concepts[number] for number in nearest)
        names.append(f"{name} ({column})" if name in names else name)
    return tuple(names)
