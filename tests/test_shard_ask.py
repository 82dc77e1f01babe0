"""Shards asked together answer as each of them does."""

import os

import numpy as np
import pytest

from clipbranches_widget import from_embeddings, remove
from clipbranches_widget.shard_ask import Ask, propose, propose_all
from clipbranches_widget.shard_search import nearest
from clipbranches_widget.vector_index import EXACT_BELOW, unit_query

N_SHARDS, DIM = 9, 8


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    """Nine shards, the second half of the rows around one point; a few removed from the third."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((EXACT_BELOW + 200, DIM)).astype(np.float32)
    rows[len(rows) // 2 :, 0] += 5
    per_shard = -(-len(rows) // N_SHARDS)
    path = tmp_path_factory.mktemp("shards") / "a.cbcat"
    from_embeddings(rows, path, rows_per_shard=per_shard, columns="codes")
    return remove(path, np.arange(2 * per_shard, 2 * per_shard + 40))


def ask(catalog, number, query, *, k, is_scanned=False):
    """Return what one shard is asked."""
    shard = catalog.shards[number]
    present = catalog.is_present[shard.first_row : shard.end]
    n_present = int(present.sum())
    allowed = None if n_present == shard.n_rows else present
    return Ask(number, query, k, 64, is_scanned, allowed, n_present, is_filtered=False)


@pytest.mark.parametrize("n_cores", [1, 2, 16])
def test_asked_together_each_shard_answers_as_alone(catalog, rng, monkeypatch, n_cores):
    monkeypatch.setattr(os, "cpu_count", lambda: n_cores)
    for _ in range(5):
        query = unit_query(rng.standard_normal(DIM), DIM)
        sizes = rng.choice([1, 12, 60, 256, 257, 1_000], N_SHARDS)
        asks = [
            ask(catalog, number, query, k=int(k), is_scanned=number == 5)
            for number, k in enumerate(sizes)
        ]
        together = propose_all(catalog, query, asks)
        for each, one in zip(asks, together, strict=True):
            alone = propose(catalog, each)
            assert np.array_equal(one.local_rows, alone.local_rows)
            assert np.array_equal(one.similarities, alone.similarities)
            assert one[2:] == alone[2:]


def test_one_shard_or_none_is_asked_alone(catalog, rng):
    query = unit_query(rng.standard_normal(DIM), DIM)
    asks = [ask(catalog, 4, query, k=10)]
    assert np.array_equal(
        propose_all(catalog, query, asks)[0].local_rows, propose(catalog, asks[0]).local_rows
    )
    assert propose_all(catalog, query, []) == []


def test_an_error_in_a_thread_is_raised(catalog, rng, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    query = unit_query(rng.standard_normal(DIM), DIM)
    wrong = unit_query(rng.standard_normal(DIM + 1), DIM + 1)
    asks = [ask(catalog, number, query, k=10) for number in range(N_SHARDS)]
    with pytest.raises(ValueError, match="dimension"):
        propose_all(catalog, wrong, asks)


def test_the_nearest_over_many_shards(catalog, rng):
    everything = catalog.embeddings.astype(np.float64)
    everything /= np.maximum(np.linalg.norm(everything, axis=1, keepdims=True), 1e-30)
    shares = []
    for _ in range(10):
        query = unit_query(rng.standard_normal(DIM), DIM)
        scores = np.where(catalog.is_present, everything @ query, -np.inf)
        best = np.argsort(-scores)[:60]
        found = nearest(catalog, query, 60)
        assert not found.is_exact
        assert catalog.is_present[found.rows].all()
        shares.append(np.isin(best, found.rows).mean())
    assert np.mean(shares) > 0.97
