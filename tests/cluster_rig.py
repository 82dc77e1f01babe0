"""Catalogs, and what it means that two answers are the same, for the tests of clusters."""

import numpy as np
import pyarrow as pa
import pytest

import clipbranches_widget as cb
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet

DIM, N_CENTRES = 16, 40


def kills_workers(test):
    """Mark a test: distributed leaves the sockets of killed workers to the garbage collector."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignored(pytest.mark.usefixtures("nothing_left")(test))


def build(path, n_rows, rows_per_shard, *, seed=0):
    """Build a catalog of wide clusters, with a column to filter by."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(N_CENTRES, DIM))
    cluster = rng.integers(0, N_CENTRES, n_rows)
    embeddings = centres[cluster] + 0.8 * rng.normal(size=(n_rows, DIM))
    items = pa.table(
        {"caption": [f"image {row}" for row in range(n_rows)], "year": rng.integers(0, 50, n_rows)}
    )
    return from_embeddings(
        embeddings.astype(np.float32), path, items=items, rows_per_shard=rows_per_shard
    )


def remove_some(path):
    """Remove rows here and there; return the path."""
    rng = np.random.default_rng(3)
    cb.remove(path, rng.choice(len(cb.open(path)), 500, replace=False))
    return path


def labels_near(index, row, *, n=8):
    """Label the rows nearest to one yes, and some a little farther no."""
    near, _ = index.nearest(index.embeddings(np.array([row]))[0], 60 * n)
    return LabelSet(near[:n], near[40 * n :: n][:n])


def assert_same(one, other):
    """Compare all that a result holds."""
    for name in ("rows", "scores", "margins", "branch_ids"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "margins")
    names = "kind", "branches", "notes", "n_touched", "n_total", "seed", "query_text"
    for name in names:
        assert getattr(one, name) == getattr(other, name)
    assert np.array_equal(one.threshold, other.threshold, equal_nan=True)
    assert (one.pool is None) == (other.pool is None)
    if one.pool is not None:
        for name in ("rows", "scores", "box_ids"):
            assert np.array_equal(getattr(one.pool, name), getattr(other.pool, name))
        assert np.array_equal(one.pool.margins(), other.pool.margins())
