"""Ranked rows over all shards, from every kind of query."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import EncoderError, ImageReadError, QueryError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.search import query_vector, search
from clipbranches_widget.shard_ask import open_vector_index
from clipbranches_widget.vector_index import EXACT_BELOW, exact_similarities, unit_query

DIM = 4


class ColourEncoder:
    """A real, tiny encoder: mean colour of an image, colour words for text."""

    info = EncoderInfo("open_clip", "colours", "none", DIM, "weights-1")
    dim = DIM
    has_text = True
    image_size = 8

    def encode_text(self, texts):
        words = {"red": 0, "green": 1, "blue": 2}
        rows = np.zeros((len(texts), DIM), np.float32)
        for row, text in enumerate(texts):
            rows[row, words.get(text.split()[0], 3)] = 1
        return rows

    def encode_images(self, images):
        means = [np.asarray(image, np.float32).reshape(-1, 3).mean(axis=0) for image in images]
        rows = np.pad(np.array(means), ((0, 0), (0, 1)), constant_values=1)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def preprocess(self, image):
        raise AssertionError(f"a query is one image, {image}: encode_images serves")

    def encode_tensors(self, tensors):
        raise AssertionError(f"a query is one image, {tensors}: encode_images serves")


class ImageOnlyEncoder(ColourEncoder):
    has_text = False


class OtherWeights(ColourEncoder):
    info = EncoderInfo("open_clip", "colours", "none", DIM, "weights-2")


@pytest.fixture(scope="module")
def vectors():
    """Return 41 rows with many ties: 12 distinct ones."""
    rng = np.random.default_rng(11)
    return rng.integers(-1, 2, size=(12, DIM))[rng.integers(12, size=41)] + np.float32(0.5)


@pytest.fixture(scope="module")
def catalogs(tmp_path_factory, vectors):
    """Return the same rows as one shard, six shards, and one shard a row."""
    folder = tmp_path_factory.mktemp("catalogs")
    return [
        from_embeddings(
            vectors, folder / f"{n}.cbcat", encoder=ColourEncoder.info, rows_per_shard=n
        )
        for n in (100, 7, 1)
    ]


@settings(max_examples=40)
@given(
    query=st.lists(st.integers(-2, 2), min_size=DIM, max_size=DIM).filter(any),
    k=st.integers(1, 45),
    excluded=st.lists(st.integers(0, 40), max_size=41),
    only=st.none() | st.lists(st.booleans(), min_size=41, max_size=41),
)
def test_shards_change_nothing_and_brute_force_agrees(catalogs, query, k, excluded, only):
    mask = None if only is None else np.array(only)
    results = [search(catalog, query, k, exclude=excluded, only=mask) for catalog in catalogs]
    everything = exact_similarities(catalogs[0].embeddings, unit_query(query, DIM))
    passing = [True] * 41 if only is None else only
    allowed = [row for row in range(41) if row not in excluded and passing[row]]
    expected = sorted(allowed, key=lambda row: (-everything[row], row))[:k]
    for result in results:
        assert result.rows.tolist() == expected
        assert np.array_equal(result.scores, everything[expected])
        assert result.rows.dtype == np.int64
        assert result.scores.dtype == np.float32
        assert (result.n_touched, result.n_total, result.notes) == (sum(passing), 41, ())


def test_a_search_result(catalogs):
    result = search(catalogs[1], [1, 0, 0, 0], 5, query_text="red things")
    assert (result.kind, len(result), result.query_text) == ("search", 5, "red things")
    assert result.catalog is catalogs[1]
    assert np.isnan(result.margins).all()
    assert (result.branch_ids == -1).all()
    assert result.timings["total"] > 0
    assert result.to_pandas()["row"].tolist() == result.rows.tolist()


def test_the_index_of_a_shard_is_opened_once(catalogs):
    shard = catalogs[1].shards[2]
    assert open_vector_index(catalogs[1], shard) is open_vector_index(catalogs[1], shard)


def test_large_shards_ask_the_graph_and_say_so(tmp_path, rng):
    rows = rng.standard_normal((EXACT_BELOW + 100, 8)).astype(np.float32)
    catalog = from_embeddings(rows, tmp_path / "a.cbcat", rows_per_shard=EXACT_BELOW + 50)
    result = search(catalog, rows[5], 60, exclude=[5])
    assert "approximate vector index" in result.notes[0]
    assert len(result) == 60
    assert 5 not in result
    assert result.n_touched < len(catalog) / 10
    everything = search(catalog, rows[5], len(catalog))
    assert everything.notes == ()
    assert np.array_equal(np.sort(everything.rows), np.arange(len(catalog)))
    assert len(np.intersect1d(result.rows, everything.rows[:61])) >= 55
    assert np.array_equal(search(catalog, rows[5], 60, exclude=[5]).rows, result.rows)


@pytest.mark.parametrize(
    ("vector", "k", "exclude", "message"),
    [
        ([1, 0, 0], 3, None, r"expected a query vector of shape \(4,\), got \(3,\)"),
        ([0, 0, 0, 0], 3, None, "got all zeros"),
        ([np.nan, 0, 0, 0], 3, None, "got NaN"),
        ([1, 0, 0, 0], 0, None, "expected k >= 1, got 0"),
        ([1, 0, 0, 0], 2.5, None, "expected k as a whole number, got 2.5"),
        ([1, 0, 0, 0], 3, [41], "expected row ids from 0 to 40, got 41"),
    ],
)
def test_bad_searches(catalogs, vector, k, exclude, message):
    with pytest.raises(QueryError, match=message):
        search(catalogs[1], vector, k, exclude=exclude)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return a catalog that asks the graph; every eighth row is far from the others."""
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((2 * EXACT_BELOW, 8)).astype(np.float32)
    rows[:, 0] = np.where(np.arange(len(rows)) % 8, -1, 6)
    return from_embeddings(rows, tmp_path_factory.mktemp("large") / "a.cbcat")


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_a_filtered_search_of_a_large_shard(large, rng, share):
    only = rng.random(len(large)) < share
    result = search(large, large.embeddings[5], 60, only=only)
    everything = search(large, large.embeddings[5], len(large))
    expected = everything.rows[only[everything.rows]][:60]
    assert only[result.rows].all()
    assert len(result) == 60
    if share < 0.5:
        assert result.notes == ()
        assert result.rows.tolist() == expected.tolist()
        assert result.n_touched == only.sum()
    else:
        assert "approximate vector index" in result.notes[0]
        assert len(np.intersect1d(result.rows, expected)) >= 55
        assert result.n_touched < len(large) / 10


def test_a_filter_far_from_the_query_is_answered_all_the_same(large):
    query = [1, 0, 0, 0, 0, 0, 0, 0]
    only = np.arange(len(large)) % 8 != 0
    result = search(large, query, 60, only=only)
    everything = search(large, query, len(large))
    assert result.rows.tolist() == everything.rows[only[everything.rows]][:60].tolist()
    assert result.notes == ()


def test_a_mask_of_another_catalog_is_refused(catalogs):
    with pytest.raises(QueryError, match="expected a mask of 41 rows, got"):
        search(catalogs[0], [1, 0, 0, 0], 3, only=np.ones(40, bool))


def test_phrases_rows_and_both(catalogs):
    catalog, encoder = catalogs[0], ColourEncoder()
    vector, said = query_vector(catalog, encoder, text="red^2 + green -blue")
    np.testing.assert_allclose(vector, np.array([2, 1, -0.5, 0]) / np.sqrt(5.25), atol=1e-7)
    assert said == "red^2 + green -blue"
    of_rows, _ = query_vector(catalog, None, row=[3, 4, 3])
    units = catalog.embeddings[[3, 4]].astype(float)
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    expected = units.sum(axis=0) / np.linalg.norm(units.sum(axis=0))
    np.testing.assert_allclose(of_rows, expected, atol=1e-6)
    both, said = query_vector(catalog, encoder, text="red", row=[3, 4])
    total = of_rows + np.array([1, 0, 0, 0])
    np.testing.assert_allclose(both, total / np.linalg.norm(total), atol=1e-6)
    assert said == "red, more like rows 3, 4"


def test_text_queries(catalogs):
    vector, said = query_vector(catalogs[0], ColourEncoder(), text="green apples")
    assert vector.tolist() == [0, 1, 0, 0]
    assert vector.dtype == np.float32
    assert said == "green apples"


@pytest.mark.parametrize("kind", ["path", "string", "bytes", "image"])
def test_image_queries(catalogs, tmp_path, kind):
    image = Image.new("RGB", (16, 16), (0, 0, 255))
    file = tmp_path / "blue.png"
    image.save(file)
    given = {"path": file, "string": str(file), "bytes": file.read_bytes(), "image": image}[kind]
    vector, said = query_vector(catalogs[0], ColourEncoder(), image=given)
    assert vector.argmax() == 2
    assert said == ("image blue.png" if kind in {"path", "string"} else "an image")


def test_row_queries_find_themselves_without_an_encoder(catalogs):
    for catalog in catalogs:
        vector, said = query_vector(catalog, None, row=17)
        assert said == "more like row 17"
        np.testing.assert_allclose(np.linalg.norm(vector), 1, atol=1e-6)
        assert 17 in search(catalog, vector, 12)
        assert search(catalog, vector, 1).scores[0] == pytest.approx(1, abs=1e-6)


def test_vector_queries(catalogs):
    vector, said = query_vector(catalogs[0], None, vector=[0, 3, 0, 4])
    np.testing.assert_allclose(vector, [0, 0.6, 0, 0.8], atol=1e-7)
    assert said == "a vector"


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "expected exactly one of text, image, vector and row, got none"),
        ({"text": "a", "vector": [1, 0, 0, 0]}, "got text and vector; only text and row go"),
        ({"image": b"", "row": 1}, "got image and row"),
        ({"text": "  "}, "expected some words to search for, got '  '"),
        ({"text": 7}, "expected some words to search for, got 7"),
        ({"row": 41}, "expected row ids from 0 to 40, got 41"),
        ({"row": []}, "expected one row id or several, got none"),
        ({"row": [1, 99]}, "expected row ids from 0 to 40, got 99"),
        ({"row": "12"}, "expected row ids"),
        ({"text": "red -red^1"}, "cancel each other out"),
        ({"text": "-red"}, "got only what to leave out"),
        ({"vector": [1, 2]}, r"expected a query vector of shape \(4,\)"),
        ({"vector": [0, 0, 0, 0]}, "got all zeros"),
    ],
)
def test_bad_queries(catalogs, query, message):
    with pytest.raises(QueryError, match=message):
        query_vector(catalogs[0], ColourEncoder(), **query)


def test_an_unreadable_query_image(catalogs, tmp_path):
    with pytest.raises(ImageReadError, match=r"none\.png: no such file"):
        query_vector(catalogs[0], ColourEncoder(), image=tmp_path / "none.png")


def test_queries_that_need_an_encoder(catalogs):
    with pytest.raises(QueryError, match=r"expected an encoder for a query by text.*row= or vec"):
        query_vector(catalogs[0], None, text="red")
    with pytest.raises(QueryError, match="expected an encoder for a query by image"):
        query_vector(catalogs[0], None, image=Image.new("RGB", (2, 2)))
    with pytest.raises(QueryError, match="expected an encoder with a text tower"):
        query_vector(catalogs[0], ImageOnlyEncoder(), text="red")
    with pytest.raises(EncoderError, match="expected the encoder of this catalog"):
        query_vector(catalogs[0], OtherWeights(), text="red")


def test_threads_share_a_catalog(catalogs):
    from concurrent.futures import ThreadPoolExecutor

    catalog = Catalog.open(catalogs[1].path)
    expected = search(catalogs[1], [1, 2, 3, 4], 20).rows
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda _: search(catalog, [1, 2, 3, 4], 20).rows, range(40))
    assert all(np.array_equal(rows, expected) for rows in found)
