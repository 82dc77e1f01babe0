import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipbranches_widget.boxes import CodeRange
from clipbranches_widget.column_model import (
    Coder,
    ColumnModel,
    default_column_model,
    equi_depth_edges,
    spread_columns,
    vocabulary,
)
from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.sorted_columns import (
    PREFIX_EDGES,
    SortedColumns,
    prefix_bits,
    sort_column,
)


def unit_rows(rng, n, dim=16):
    rows = rng.normal(size=(n, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class WordTower:
    """A text tower that gives every phrase a fixed random direction."""

    def encode_text(self, texts):
        vectors = [unit_rows(np.random.default_rng(list(text.encode())), 1)[0] for text in texts]
        return np.stack(vectors)


@given(hnp.arrays(np.uint8, st.integers(1, 300)))
def test_sorted_column_lists_each_code_in_row_order(codes):
    order, offsets = sort_column(codes)
    assert order.dtype == np.uint32
    assert offsets[0] == 0
    assert offsets[-1] == len(codes)
    for code in range(256):
        rows = order[offsets[code] : offsets[code + 1]]
        assert np.array_equal(rows, np.flatnonzero(codes == code))


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 200))), st.data())
def test_posting_list_and_count_equal_the_scan(codes, data):
    index = SortedColumns.from_codes(codes)
    column = data.draw(st.integers(0, codes.shape[0] - 1))
    low = data.draw(st.integers(0, 255))
    code_range = CodeRange(column, low, data.draw(st.integers(low + 1, 256)))
    expected = np.flatnonzero((codes[column] >= low) & (codes[column] < float(code_range.high)))
    assert index.count(code_range) == len(expected)
    assert np.array_equal(np.sort(index.posting_list(code_range)), expected)


@settings(max_examples=15)
@given(st.sampled_from([1, 2, 9, 300]), st.integers(0, 2**32 - 1))
def test_a_code_holds_the_values_between_its_edges(n, seed):
    embeddings = unit_rows(np.random.default_rng(seed), n)
    model = default_column_model(embeddings, encoder=None, n_columns=8)
    values, codes = model.values(embeddings), model.codes(embeddings)
    for column, edges in enumerate(model.edges):
        assert np.all(np.diff(edges) >= 0)
        bounds = np.concatenate([[-np.inf], edges, [np.inf]])
        at = codes[column].astype(int)
        assert np.all(bounds[at] <= values[:, column])
        assert np.all(values[:, column] < bounds[at + 1])


def test_edges_cut_a_continuous_column_into_equal_shares(rng):
    values = rng.normal(size=(25_600, 1)).astype(np.float32)
    codes = np.searchsorted(equi_depth_edges(values)[0], values[:, 0], side="right")
    counts = np.bincount(codes, minlength=256)
    assert counts.max() <= 101
    assert counts.min() >= 99


def test_constant_column_has_one_code():
    assert np.unique(np.searchsorted(equi_depth_edges(np.ones((9, 1), np.float32))[0], [1])).size


def test_concept_columns_come_from_the_vocabulary_and_differ(rng):
    embeddings = unit_rows(rng, 500)
    model = default_column_model(embeddings, encoder=WordTower(), n_columns=32, n_concepts=32)
    assert model.kind == "concepts"
    assert set(model.names) <= set(vocabulary())
    assert len(set(model.names)) == model.n_columns
    assert 16 <= model.n_columns <= 32


@pytest.mark.parametrize("n_distinct", [1, 5, 8, 9])
def test_few_distinct_rows_are_their_own_centroids(rng, n_distinct):
    distinct = unit_rows(rng, n_distinct)
    often = np.repeat(distinct[:1], 200, axis=0)  # one row alone at the start
    model = default_column_model(np.concatenate([often, distinct]), encoder=None, n_columns=8)
    assert model.n_columns == min(n_distinct, 8)
    if n_distinct <= 8:
        assert np.allclose(model.anchors, np.unique(distinct, axis=0), atol=1e-6)


def test_half_of_the_columns_are_centroids_named_by_concepts(rng):
    embeddings = unit_rows(rng, 500)
    model = default_column_model(embeddings, encoder=WordTower(), n_columns=21)
    assert model.kind == "concepts"
    assert len(set(model.names)) == model.n_columns == 21
    assert set(model.names[:11]) <= set(vocabulary())
    centroids = model.anchors[11:]
    assert np.linalg.norm(centroids, axis=1) == pytest.approx(1, abs=1e-5)
    by_caption = default_column_model(embeddings, encoder=None, n_columns=10)
    assert np.array_equal(by_caption.anchors, centroids)
    vectors = WordTower().encode_text(vocabulary())
    away = vectors - vectors.mean(axis=0)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    best = (centroids - embeddings.mean(axis=0)) @ away.T
    for name, similarities in zip(model.names[11:], best, strict=True):
        first = vocabulary()[int(similarities.argmax())]
        assert name.startswith(f"like {first}, ")


def test_centroids_are_named_by_the_nearest_caption(rng):
    embeddings = unit_rows(rng, 5)
    captions = ["a", "b", "c", "d", ""]
    model = default_column_model(embeddings, encoder=None, captions=captions)
    assert model.kind == "centroids"
    assert sorted(model.names) == ["like 'a'", "like 'b'", "like 'c'", "like 'd'", "like row 4"]


def test_spread_columns_prefers_independent_columns(rng):
    base = rng.normal(size=(200, 3))
    values = np.column_stack([base[:, 0], base[:, 0] * 2 + 1, base[:, 1], base[:, 2], np.ones(200)])
    assert set(spread_columns(values.astype(np.float32), 5).tolist()) in ({0, 2, 3}, {1, 2, 3})
    assert spread_columns(np.ones((4, 3), np.float32), 2).tolist() == [0]


def test_model_survives_the_disk_and_refuses_other_arrays(tmp_path, rng):
    model = default_column_model(unit_rows(rng, 300), encoder=None, n_columns=8)
    model.save(tmp_path)
    assert ColumnModel.open(tmp_path).hash == model.hash
    np.savez(tmp_path / "columns.npz", anchors=model.anchors, edges=model.edges + 1)
    with pytest.raises(CatalogCorruptError, match=r"columns\.npz does not belong to columns\.json"):
        ColumnModel.open(tmp_path)
    (tmp_path / "columns.npz").write_bytes(b"not a zip")
    with pytest.raises(CatalogCorruptError, match="expected arrays 'anchors' and 'edges'"):
        ColumnModel.open(tmp_path)


def test_files_of_another_shape_or_kind_are_refused(tmp_path, rng):
    codes = rng.integers(0, 256, size=(3, 100), dtype=np.uint8)
    built = SortedColumns.from_codes(codes)
    arrays = {name: getattr(built, name) for name in ("codes", "offsets", "order", "prefix")}
    for name, array in arrays.items():
        np.save(tmp_path / f"{name}.npy", array)
    opened = SortedColumns.open(tmp_path, n_columns=3, n_rows=100)
    for name, array in arrays.items():
        assert np.array_equal(getattr(opened, name), array)
        assert not getattr(opened, name).flags.writeable
        np.save(tmp_path / f"{name}.npy", array[:2])
        with pytest.raises(CatalogCorruptError, match=rf"{name}\.npy: expected shape"):
            SortedColumns.open(tmp_path, n_columns=3, n_rows=100)
        np.save(tmp_path / f"{name}.npy", array.astype(np.float32))
        with pytest.raises(CatalogCorruptError, match=rf"{name}\.npy: expected dtype"):
            SortedColumns.open(tmp_path, n_columns=3, n_rows=100)
        np.save(tmp_path / f"{name}.npy", array)


def test_parts_can_be_left_out(tmp_path, rng):
    codes = rng.integers(0, 256, size=(3, 100), dtype=np.uint8)
    built = SortedColumns.from_codes(codes)
    np.save(tmp_path / "codes.npy", built.codes)
    np.save(tmp_path / "offsets.npy", built.offsets)
    opened = SortedColumns.open(tmp_path, n_columns=3, n_rows=100)
    assert opened.order is None
    assert opened.prefix is None
    whole = CodeRange(0, 0, 256)
    assert opened.count(whole) == 100
    with pytest.raises(ValueError, match="expected an index with its sorted order"):
        opened.posting_list(whole)


@given(hnp.arrays(np.uint8, st.integers(1, 300)))
def test_prefix_bits_say_which_codes_are_below_each_edge(codes):
    bits = np.unpackbits(prefix_bits(codes).view(np.uint8), axis=1, bitorder="little")
    expected = codes < np.array(PREFIX_EDGES)[:, None]
    assert np.array_equal(bits[:, : len(codes)], expected)
    assert not bits[:, len(codes) :].any()


EDGES = st.one_of(
    hnp.arrays(np.float32, 255, elements=st.floats(allow_nan=False, width=32)),
    hnp.arrays(np.float32, 255, elements=st.floats(-1, 1, width=32)),
    hnp.arrays(np.float32, 255, elements=st.sampled_from([-1, 0, 0.25, 0.5])),
    st.integers(0, 2**32 - 1).map(
        lambda seed: np.random.default_rng(seed).standard_normal(255, dtype=np.float32)
    ),
)


@settings(max_examples=200)
@given(EDGES, hnp.arrays(np.float32, st.integers(0, 20), elements=st.floats(width=32)))
def test_coding_by_buckets_is_searching_the_edges(edges, others):
    edges = np.sort(edges)
    with np.errstate(over="ignore"):  # next to the largest float is infinity
        above, below = (np.nextafter(edges, np.float32(end)) for end in (np.inf, -np.inf))
    values = np.concatenate([edges, above, below, others, np.float32([0, -0.0, np.inf, -np.inf])])
    assert np.array_equal(Coder(edges)(values), np.searchsorted(edges, values, side="right"))
