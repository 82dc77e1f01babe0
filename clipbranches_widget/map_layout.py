"""Place embeddings on a plane so that near images stay near (layer 2). Pure: arrays in and out.

t-SNE [1]_ by openTSNE [2]_, from the nearest neighbours that `nearest_neighbors` finds: by
Barnes-Hut [3]_ for some thousand rows, by interpolation and FFT [4]_ for more.

Why openTSNE: of umap-learn, PaCMAP, scikit-learn's TSNE and openTSNE it alone reports progress,
can be stopped, and compiles nothing when it is first used. Two cores, both busy with other work;
the share of the 15 nearest rows that stay among the 15 nearest on the map:

- 4,495 rows of the demo catalog: as done here 4 s of one core, .69; openTSNE as it comes 30 s, .70;
  umap-learn 28 s of compiling in each process and then 3.5 s, .63; PaCMAP 16 s of importing and
  6 s, .58; scikit-learn 38 s, .71.
- 100,000 rows of sentences (384-d): as done here 56 s of processor time, .36; umap-learn 273 s,
  .17. Neighbours by openTSNE's own Annoy would take 65 s in place of 12 to 18.

Below `FFT_FROM` rows one thread is used: two need three times the processor time.

The result depends only on the embeddings and the seed; not on the number of threads.

References
----------
.. [1] van der Maaten and Hinton (2008), Visualizing data using t-SNE, JMLR 9.
.. [2] Poličar, Stražar and Zupan (2024), openTSNE: a modular Python library for t-SNE
   dimensionality reduction and embedding, J. Stat. Softw. 109(3).
.. [3] van der Maaten (2014), Accelerating t-SNE using tree-based algorithms, JMLR 15.
.. [4] Linderman et al. (2019), Fast interpolation-based t-SNE, Nature Methods 16.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import Cancelled, MissingPackageError

if TYPE_CHECKING:
    from types import ModuleType

MAX_POINTS = 100_000
"""Images on a map; of a larger catalog, a random sample is placed."""

MIN_ROWS = 50
"""Fewer rows are placed by their two principal components: there is no neighbourhood to keep."""

PERPLEXITY = 15
N_NEIGHBORS = 3 * PERPLEXITY
EARLY_STEPS, LATE_STEPS = 100, 250
FFT_FROM = 10_000

_EXACT_BELOW = 8_192
_CLUSTER_ROWS = 400
_N_PROBES = 16
_MAX_CANDIDATES = 40 * _CLUSTER_ROWS
_BLOCK_ELEMENTS = 2**23
_ASK_EVERY_STEPS = 5
_NEIGHBOR_SHARE = 0.25
_MAX_THREADS = 8

Progress = Callable[[float], None]
"""Gets the fraction done, 0 to 1."""


def is_available() -> bool:
    """Return whether openTSNE is installed; imports nothing."""
    return find_spec("openTSNE") is not None


def estimated_seconds(n_rows: int) -> float:
    """Return about how long `layout` takes on two free cores.

    >>> [round(estimated_seconds(n)) for n in (20, 4495, 100_000, 5_000_000)]
    [0, 4, 42, 42]
    """
    n_points = min(n_rows, MAX_POINTS)
    return 0.0 if n_points < MIN_ROWS else 2.0 + 4e-4 * n_points


def layout(
    embeddings: NDArray[np.floating],
    *,
    seed: int = 0,
    progress: Progress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> NDArray[np.float32]:
    """Return a place in the unit square for each embedding.

    Parameters
    ----------
    embeddings : (n, dim) float
        Norm 1; at most `MAX_POINTS` rows are meant. Equal rows come to lie close together.
    seed
        Of the clusters in which neighbours are looked for.
    progress
        Called now and then.
    is_cancelled
        Asked several times a second.

    Returns
    -------
    NDArray[np.float32]
        (n, 2), one scale for both axes, centred; at least one axis spans 0..1.

    Raises
    ------
    MissingPackageError
        openTSNE is not installed, and there are `MIN_ROWS` rows or more.
    Cancelled
        `is_cancelled` returned true.
    """
    report = progress or (lambda _fraction: None)
    stop = is_cancelled or (lambda: False)
    rows = np.ascontiguousarray(embeddings, dtype=np.float32)
    start = principal_components(rows)
    if len(rows) < MIN_ROWS or not start.any():
        return _in_unit_square(start)
    tsne = _open_tsne()
    near = nearest_neighbors(
        rows,
        N_NEIGHBORS if len(rows) > N_NEIGHBORS else len(rows) - 1,
        seed=seed,
        progress=lambda fraction: report(_NEIGHBOR_SHARE * fraction),
        is_cancelled=stop,
    )
    places = _optimised(tsne, start, near, report, stop)
    return _in_unit_square(places)


def principal_components(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the coordinates of `rows` on their two directions of largest variance, (n, 2).

    Zeros where there is no such direction. The sign is that which makes the largest weight of a
    direction positive.
    """
    coordinates = np.zeros((len(rows), 2))
    centred = rows - rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    values, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    # Equal rows differ from their mean by rounding alone: no direction.
    floor = 1e-8 * len(rows) * float(np.abs(rows).max(initial=0.0)) ** 2
    for axis, column in enumerate(range(len(values) - 1, max(len(values) - 3, -1), -1)):
        if values[column] > floor:
            direction = vectors[:, column]
            sign = np.sign(direction[np.argmax(np.abs(direction))])
            coordinates[:, axis] = centred @ (sign * direction)
    return coordinates


def nearest_neighbors(
    rows: NDArray[np.float32],
    k: int,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    is_cancelled: Callable[[], bool] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the `k` nearest other rows of each row, and their Euclidean distances, nearest first.

    Exact below `_EXACT_BELOW` rows. Of more, each row is compared with those of the 16 clusters
    nearest to its own, of some 400 rows each: 80 to 100 % of the neighbours are found, the near
    ones more often than the far.

    Parameters
    ----------
    rows : (n, dim) float32
        Norm 1.
    k
        1 <= k < n.

    Returns
    -------
    neighbors : (n, k) int64
    distances : (n, k) float64

    Examples
    --------
    >>> rows = np.float32([[1, 0], [0.8, 0.6], [0, 1]])
    >>> nearest_neighbors(rows, 1)[0].ravel().tolist()
    [1, 0, 1]
    """
    n_rows = len(rows)
    members, near = _clusters(rows, seed)
    neighbors = np.empty((n_rows, k), dtype=np.int64)
    similarities = np.empty((n_rows, k), dtype=np.float32)
    n_done = 0
    for cluster, own in enumerate(members):
        candidates = _candidates(members, near[cluster], k + 1)
        step = max(1, _BLOCK_ELEMENTS // len(candidates))
        for first in range(0, len(own), step):
            if is_cancelled is not None and is_cancelled():
                raise Cancelled("the map was cancelled: the catalog is as before")
            block = own[first : first + step]
            found = rows[block] @ rows[candidates].T
            found[block[:, None] == candidates] = -np.inf
            best = np.argpartition(found, -k, axis=1)[:, -k:]
            values = np.take_along_axis(found, best, axis=1)
            order = np.argsort(-values, axis=1, kind="stable")
            neighbors[block] = candidates[np.take_along_axis(best, order, axis=1)]
            similarities[block] = np.take_along_axis(values, order, axis=1)
            n_done += len(block)
            if progress is not None:
                progress(n_done / n_rows)
    squared = 2.0 - 2.0 * similarities.astype(np.float64)
    return neighbors, np.sqrt(np.maximum(squared, 0.0))


def _clusters(
    rows: NDArray[np.float32], seed: int
) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
    """Return the rows of each cluster, ascending, and for each the clusters by their nearness."""
    n_rows = len(rows)
    n_clusters = 1 if n_rows < _EXACT_BELOW else n_rows // _CLUSTER_ROWS
    picked = np.random.default_rng(seed).choice(n_rows, n_clusters, replace=False)
    centres = rows[np.sort(picked)]
    for is_last in (False, False, True):
        owner = np.concatenate(
            [
                np.argmax(rows[first : first + 8192] @ centres.T, axis=1)
                for first in range(0, n_rows, 8192)
            ]
        )
        order = np.argsort(owner, kind="stable")
        edges = np.searchsorted(owner[order], np.arange(1, n_clusters))
        members = np.split(order, edges)
        if not is_last:
            for cluster, own in enumerate(members):
                total = rows[own].sum(axis=0)
                norm = float(np.linalg.norm(total))
                if norm > 0:
                    centres[cluster] = total / norm
    return members, np.argsort(-(centres @ centres.T), axis=1, kind="stable")


def _candidates(
    members: list[NDArray[np.int64]], near: NDArray[np.int64], n_needed: int
) -> NDArray[np.int64]:
    """Return the rows of the nearest clusters, at least `n_needed`, never very many."""
    counts = np.cumsum([len(members[cluster]) for cluster in near.tolist()])
    n_probes = max(min(_N_PROBES, len(near)), int(np.searchsorted(counts, n_needed)) + 1)
    joined = np.concatenate([members[cluster] for cluster in near[:n_probes].tolist()])
    if len(joined) > _MAX_CANDIDATES:  # one crowded cluster, of equal images for instance
        joined = joined[np.linspace(0, len(joined) - 1, _MAX_CANDIDATES).astype(np.int64)]
    return joined


def _optimised(
    tsne: ModuleType,
    start: NDArray[np.float64],
    near: tuple[NDArray[np.int64], NDArray[np.float64]],
    report: Progress,
    stop: Callable[[], bool],
) -> NDArray[np.float64]:
    from openTSNE.affinity import PerplexityBasedNN
    from openTSNE.nearest_neighbors import PrecomputedNeighbors

    n_done, is_stopped = 0, False

    def follow(_iteration: int, _error: float, _places: Any) -> bool:
        nonlocal n_done, is_stopped
        n_done += _ASK_EVERY_STEPS
        share = n_done / (EARLY_STEPS + LATE_STEPS)
        report(_NEIGHBOR_SHARE + (1 - _NEIGHBOR_SHARE) * share)
        is_stopped = is_stopped or stop()
        return is_stopped

    is_small = len(start) < FFT_FROM
    n_jobs = 1 if is_small else min(os.cpu_count() or 1, _MAX_THREADS)
    affinities = PerplexityBasedNN(
        knn_index=PrecomputedNeighbors(*near),
        perplexity=min(PERPLEXITY, near[0].shape[1] / 3),
        n_jobs=n_jobs,
    )
    fitted = tsne.TSNE(
        early_exaggeration_iter=EARLY_STEPS,
        n_iter=LATE_STEPS,
        initialization=start / (start[:, 0].std() * 1e4),
        negative_gradient_method="bh" if is_small else "fft",
        n_jobs=n_jobs,
        random_state=0,
        callbacks=follow,
        callbacks_every_iters=_ASK_EVERY_STEPS,
    ).fit(affinities=affinities)
    if is_stopped:
        raise Cancelled("the map was cancelled: the catalog is as before")
    return np.asarray(fitted, dtype=np.float64)


def _in_unit_square(places: NDArray[np.float64]) -> NDArray[np.float32]:
    """Scale both axes alike and centre the places in 0..1."""
    low, high = places.min(axis=0), places.max(axis=0)
    span = float((high - low).max())
    if span == 0.0:
        return np.full(places.shape, 0.5, dtype=np.float32)
    scaled: NDArray[np.float64] = 0.5 + (places - (low + high) / 2) / span
    np.clip(scaled, 0.0, 1.0, out=scaled)
    return scaled.astype(np.float32)


def _open_tsne() -> ModuleType:
    try:
        import openTSNE
    except ImportError as error:
        raise MissingPackageError(
            "expected openTSNE, which computes the map, got no such package; "
            "run: pip install openTSNE"
        ) from error
    module: ModuleType = openTSNE
    return module
