"""Nearest rows of a shard: exact scores, deterministic order, recall of the graph."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipbranches_widget.errors import CatalogCorruptError, QueryError
from clipbranches_widget.vector_index import (
    EXACT_BELOW,
    VectorIndex,
    build_vector_index,
    exact_similarities,
    ranked,
    unit_query,
)


def unit_rows(rows):
    """Return rows of norm 1 as float16."""
    rows = np.asarray(rows, dtype=np.float64)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def clustered(rng, n_rows, dim, n_clusters):
    """Return rows around random centres, the cosine within a cluster about 0.55."""
    centres = rng.standard_normal((n_clusters, dim))
    rows = centres[rng.integers(n_clusters, size=n_rows)]
    return unit_rows(rows + 0.9 * rng.standard_normal((n_rows, dim)))


def brute_force(embeddings, vector, k):
    """Rank by cosine similarity in 80-bit arithmetic, rounded to float32; ties by row."""
    rows, query = embeddings.astype(np.longdouble), np.asarray(vector, dtype=np.longdouble)
    query = query / np.sqrt((query**2).sum())
    similarities = ((rows * query).sum(axis=1) / np.sqrt((rows**2).sum(axis=1))).astype(np.float32)
    order = sorted(range(len(rows)), key=lambda row: (-similarities[row], row))[:k]
    return np.array(order), similarities[order]


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Return (embeddings, path) of an index large enough for the graph to answer."""
    rng = np.random.default_rng(5)
    embeddings = clustered(rng, EXACT_BELOW + 1000, 48, 300)
    path = tmp_path_factory.mktemp("big") / "vectors.usearch"
    build_vector_index(embeddings, path)
    return embeddings, path


# Few distinct small integers make ties and duplicates; rows of zeros are left out.
tied_rows = st.lists(
    st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any), min_size=1, max_size=30
)


@settings(max_examples=60)
@given(rows=tied_rows, query=st.lists(st.integers(-2, 2), min_size=3, max_size=3).filter(any))
def test_search_equals_brute_force_for_every_k(tmp_path_factory, rows, query):
    embeddings = unit_rows(rows)
    path = tmp_path_factory.mktemp("index") / "vectors.usearch"
    build_vector_index(embeddings, path)
    index = VectorIndex.open(path, embeddings)
    for k in range(1, len(rows) + 2):
        found, similarities = index.search(query, k)
        expected, expected_similarities = brute_force(embeddings, query, k)
        np.testing.assert_allclose(similarities, expected_similarities, atol=2e-7)
        assert len(found) == min(k, len(rows))
        assert len(set(found.tolist())) == len(found)
        # Where rounding decides between nearly equal rows, equal rows still tie by row id.
        all_similarities = exact_similarities(embeddings, unit_query(query, 3))
        order = sorted(range(len(rows)), key=lambda row: (-all_similarities[row], row))
        assert found.tolist() == order[:k]
        if len(np.unique(embeddings, axis=0)) == 1:
            assert found.tolist() == expected.tolist()


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32 - 1), dim=st.sampled_from([1, 2, 7, 64, 512]), k=st.integers(1, 70)
)
def test_the_float32_pass_misses_nothing(tmp_path_factory, seed, dim, k):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(dim)
    rows = base + 10.0 ** rng.uniform(-5, 1) * rng.standard_normal((400, dim))
    embeddings = unit_rows(rows[rng.integers(len(rows), size=len(rows))])
    query = rng.standard_normal(dim) if rng.random() < 0.5 else base
    path = tmp_path_factory.mktemp("index") / "vectors.usearch"
    build_vector_index(embeddings, path)
    found, similarities = VectorIndex.open(path, embeddings).search(query, k)
    everything = exact_similarities(embeddings, unit_query(query, dim))
    order = np.lexsort((np.arange(len(rows)), -everything))[:k]
    assert found.tolist() == order.tolist()
    assert np.array_equal(similarities, everything[order])


@given(seed=st.integers(0, 2**32 - 1), dim=st.integers(1, 700))
def test_similarities_do_not_depend_on_the_split_or_the_order_of_sums(seed, dim):
    rng = np.random.default_rng(seed)
    embeddings = unit_rows(rng.standard_normal((60, dim)) * rng.exponential(size=dim))
    vector = rng.standard_normal(dim)
    query = unit_query(vector, dim)
    whole = exact_similarities(embeddings, query)
    cut = int(rng.integers(60))
    parts = [exact_similarities(part, query) for part in (embeddings[:cut], embeddings[cut:])]
    assert np.array_equal(np.concatenate(parts), whole)
    some = rng.integers(60, size=20)
    assert np.array_equal(exact_similarities(embeddings, query, some), whole[some])
    shuffled = rng.permutation(dim)
    assert np.array_equal(exact_similarities(embeddings[:, shuffled], query[shuffled]), whole)
    np.testing.assert_allclose(whole, exact_cosine(embeddings, vector), rtol=0, atol=1.3e-7)


def exact_cosine(embeddings, vector):
    """Return the cosine in 80-bit arithmetic."""
    rows, query = embeddings.astype(np.longdouble), vector.astype(np.longdouble)
    norms = np.sqrt((rows**2).sum(axis=1)) * np.sqrt((query**2).sum())
    return ((rows * query).sum(axis=1) / norms).astype(np.float64)


@given(
    values=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=40),
    k=st.integers(1, 45),
)
def test_ranked_is_a_stable_sort(values, k):
    similarities = np.array(values, dtype=np.float32)
    rows = np.arange(len(values), dtype=np.int64)[::-1].copy()
    best, best_similarities = ranked(rows, similarities, k)
    expected = sorted(zip(-similarities, rows, strict=True))[:k]
    assert best.tolist() == [row for _, row in expected]
    assert best_similarities.tolist() == [-value for value, _ in expected]


def test_recall_of_the_graph_on_clustered_rows(big, rng):
    embeddings, path = big
    index = VectorIndex.open(path, embeddings)
    assert not index.is_exact(60)
    hits = 0
    for _ in range(40):
        start = embeddings[rng.integers(len(embeddings))].astype(np.float64)
        vector = start + 0.1 * rng.standard_normal(48)
        found, similarities = index.search(vector, 60)
        nearest, exact = index.search(vector, 60, exact=True)
        hits += len(np.intersect1d(found, nearest))
        everything = exact_similarities(embeddings, unit_query(vector, 48))
        assert np.array_equal(similarities, everything[found])
        assert np.array_equal(exact, everything[nearest])
        assert np.array_equal(np.lexsort((found, -similarities)), np.arange(60))
    assert hits / (40 * 60) >= 0.95


def test_a_row_finds_itself_among_many_copies(tmp_path, rng):
    """Copies fill each other's links in a graph; search still finds k of them."""
    distinct = unit_rows(rng.standard_normal((EXACT_BELOW // 100, 16)))
    embeddings = np.repeat(distinct, 101, axis=0)
    path = tmp_path / "vectors.usearch"
    build_vector_index(embeddings, path)
    index = VectorIndex.open(path, embeddings)
    found, similarities = index.search(distinct[7], 60)
    assert len(found) == 60
    assert similarities[0] == 1.0


def test_all_rows_come_back_when_k_is_large(big):
    embeddings, path = big
    index = VectorIndex.open(path, embeddings)
    assert index.is_exact(len(embeddings))
    found, _ = index.search(embeddings[3], 10 * len(embeddings))
    assert np.array_equal(np.sort(found), np.arange(len(embeddings)))


def test_threads_get_the_same_answers(big, rng):
    embeddings, path = big
    index = VectorIndex.open(path, embeddings)
    queries = rng.standard_normal((24, 48))
    alone = [index.search(query, 30)[0].tolist() for query in queries]
    fresh = VectorIndex.open(path, embeddings)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda query: fresh.search(query, 30)[0].tolist(), queries))
    assert together == alone


def test_progress_reaches_the_end(tmp_path, rng):
    seen = []
    embeddings = unit_rows(rng.standard_normal((5000, 4)))
    build_vector_index(
        embeddings, tmp_path / "v", progress=lambda done, total: seen.append((done, total))
    )
    assert seen == [(4096, 5000), (5000, 5000)]


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([1.0, 2.0], r"expected a query vector of shape \(3,\), got \(2,\): embed the query"),
        ([[1.0, 2.0, 3.0]], r"shape \(3,\), got \(1, 3\)"),
        ([0.0, 0.0, 0.0], "expected a query vector with a direction, got all zeros"),
        ([1.0, float("nan"), 0.0], "expected finite numbers"),
        ([1.0, float("-inf"), 0.0], "expected finite numbers"),
        (["a", "b", "c"], "expected a vector of 3 numbers"),
        ([[1.0], [2.0, 3.0]], "expected a vector of 3 numbers"),
    ],
)
def test_bad_queries(vector, message):
    with pytest.raises(QueryError, match=message):
        unit_query(vector, 3)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e300])
def test_queries_of_any_length_are_the_same(scale):
    assert np.array_equal(unit_query([3 * scale, -4 * scale], 2), unit_query([3, -4], 2))


def test_bad_k(tmp_path):
    build_vector_index(unit_rows([[1, 0]]), tmp_path / "v")
    with pytest.raises(QueryError, match="expected k >= 1, got 0"):
        VectorIndex.open(tmp_path / "v", unit_rows([[1, 0]])).search([1, 0], 0)


def test_a_wrong_file_is_refused(tmp_path, rng):
    embeddings = unit_rows(rng.standard_normal((50, 8)))
    path = tmp_path / "vectors.usearch"
    with pytest.raises(CatalogCorruptError, match=r"vectors\.usearch, found none: build"):
        VectorIndex.open(path, embeddings)
    build_vector_index(embeddings, path)
    with pytest.raises(CatalogCorruptError, match="expected 49 rows of dim 8, got 50 of dim 8"):
        VectorIndex.open(path, embeddings[:49])
    with pytest.raises(CatalogCorruptError, match="expected 50 rows of dim 7, got 50 of dim 8"):
        VectorIndex.open(path, embeddings[:, :7])
    for content in (b"", b"not an index", path.read_bytes()[:40]):
        path.write_bytes(content)
        with pytest.raises(CatalogCorruptError, match=r"expected a USearch index at .*found none"):
            VectorIndex.open(path, embeddings)
