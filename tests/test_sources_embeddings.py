"""Embeddings that are there already: NumPy files, and what clip-retrieval inference writes."""

import json

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_images import DIM, TileEncoder, build, embedding, pictures
from hypothesis import given, settings
from hypothesis import strategies as st

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.order_check import check_order, nearest
from clipbranches_widget.source_embeddings import ArrayEmbeddings

PART_ROWS = (5, 7, 4)


@pytest.fixture(scope="module")
def images():
    return pictures(120)


@pytest.fixture(scope="module")
def vectors(images):
    return np.stack([embedding(data) for data in images])


@pytest.fixture(scope="module")
def photos(images, tmp_path_factory):
    """Return the paths of the images on disk."""
    folder = tmp_path_factory.mktemp("photos")
    for number, data in enumerate(images):
        (folder / f"{number}.png").write_bytes(data)
    return [str(folder / f"{number}.png") for number in range(len(images))]


def write_part(folder, part, vectors, image_paths, metadata=None, *, digits=1):
    """Write one part as clip-retrieval's `OutputSink` does (clip_inference/writer.py)."""
    for name in ("img_emb", "text_emb", "metadata"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    number = str(part).zfill(digits)
    np.save(folder / "img_emb" / f"img_emb_{number}.npy", vectors.astype(np.float16))
    np.save(folder / "text_emb" / f"text_emb_{number}.npy", vectors.astype(np.float16))
    captions = [f"caption of {path.rpartition('/')[2]}" for path in image_paths]
    frame = pd.DataFrame({"image_path": image_paths, "caption": captions})
    if metadata is not None:
        frame["metadata"] = [json.dumps(one) for one in metadata]
        parsed = pd.json_normalize(frame["metadata"].apply(json.loads))
        frame = frame.join(parsed).drop(columns=["metadata"])
    frame.to_parquet(folder / "metadata" / f"metadata_{number}.parquet")


@pytest.fixture
def output(tmp_path, vectors, photos):
    """Return the output of three runs' parts, number 2, 9 and 10."""
    start = 0
    for part, n_rows in zip((2, 9, 10), PART_ROWS, strict=True):
        rows = range(start, start + n_rows)
        said = [{"similarity": i / 8, "width": 16 + i % 5, "NSFW": "UNLIKELY"} for i in rows]
        if part == 9:
            said[0]["similarity"] = 3  # a whole number among the others
            said = [{**one, "exif": "{}"} for one in said]
        paths = [photos[i] for i in rows]
        write_part(tmp_path / "out", part, vectors[start : start + n_rows], paths, said)
        start += n_rows
    return tmp_path / "out"


@pytest.mark.parametrize("form", ["path", "memory", "index"])
def test_the_output_of_clip_retrieval(tmp_path, output, vectors, photos, form):
    source, target = output, tmp_path / "a.cbcat"
    if form == "memory":
        fsspec.filesystem("memory").put(str(output), "/clip-out", recursive=True)
        source = "memory://clip-out"
    options = {"encoder": TileEncoder(), "rows_per_shard": 6, "check_order": 32}
    if form == "index":
        catalog = build(source, target, **options)
    else:
        catalog = from_embeddings(source, target, **options)
    n_rows = sum(PART_ROWS)
    np.testing.assert_allclose(catalog.embeddings, vectors[:n_rows], atol=2e-3)
    items = catalog.items
    assert items.column("uri").to_pylist() == photos[:n_rows]
    assert items.column("caption").to_pylist() == [f"caption of {i}.png" for i in range(n_rows)]
    assert items.column("width").to_pylist() == [16 + i % 5 for i in range(n_rows)]
    assert items.column_names[6:] == ["similarity", "NSFW", "exif"]
    assert items.column("similarity").to_pylist()[5:7] == [3.0, 6 / 8]
    assert items.column("exif").to_pylist() == [None] * 5 + ["{}"] * 7 + [None] * 4
    assert catalog.encoder_info == TileEncoder.info
    assert catalog.image(9).size == (20, 12)
    catalog.verify()


def test_numbers_with_zeros_in_front_are_paired_by_number(tmp_path, vectors, photos):
    for part in (8, 9, 10, 100):
        write_part(tmp_path, part, vectors[part : part + 1], [photos[part]], digits=1)
    file = tmp_path / "metadata" / "metadata_9.parquet"
    file.rename(tmp_path / "metadata" / "metadata_0009.parquet")
    catalog = from_embeddings(tmp_path, tmp_path / "a.cbcat", encoder=TileEncoder(), check_order=4)
    assert catalog.items.column("uri").to_pylist() == [photos[i] for i in (8, 9, 10, 100)]


@pytest.mark.parametrize("has_url", [True, False])
def test_parts_made_from_webdataset_name_keys_and_urls(tmp_path, vectors, has_url):
    said = [{"key": f"{i:09d}", "url": f"https://example.org/{i}.jpg"} for i in range(5)]
    if not has_url:
        said = [{"key": one["key"]} for one in said]
    keys = [one["key"] for one in said]
    write_part(tmp_path, 0, vectors[:5], keys, said)
    catalog = from_embeddings(tmp_path, tmp_path / "a.cbcat")
    uris = catalog.items.column("uri").to_pylist()
    assert uris == ([one["url"] for one in said] if has_url else [""] * 5)
    assert catalog.items.column("image_path").to_pylist() == keys
    assert catalog.items.column("key").to_pylist() == keys


def test_relative_image_paths_are_found_beside_the_output(tmp_path, images, vectors, monkeypatch):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(images[number])
    paths = [f"photos/{i}.png" for i in range(3)]
    write_part(tmp_path / "out", 0, vectors[:3], paths)
    expected = [str(tmp_path / path) for path in paths]
    for number, folder in enumerate((tmp_path, tmp_path / "out" / "metadata")):
        monkeypatch.chdir(folder)
        catalog = from_embeddings(tmp_path / "out", tmp_path / f"{number}.cbcat")
        assert catalog.items.column("uri").to_pylist() == expected


def test_other_columns_of_clip_retrieval(tmp_path, vectors, photos):
    said = [{"file": photos[i], "title": f"title {i}"} for i in range(4)]
    write_part(tmp_path, 0, vectors[:4], [f"{i}" for i in range(4)], said)
    options = {"image_column": "file", "caption_column": "title"}
    catalog = from_embeddings(tmp_path, tmp_path / "a.cbcat", **options)
    assert catalog.items.column("uri").to_pylist() == photos[:4]
    assert catalog.caption(2) == "title 2"
    assert catalog.items.column("source_caption").to_pylist()[0] == "caption of 0"


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


def cut_metadata(folder):
    file = folder / "metadata" / "metadata_9.parquet"
    pq.write_table(pq.read_table(file).slice(1), file)


def other_dim(folder):
    np.save(folder / "img_emb" / "img_emb_9.npy", np.ones((7, 3), np.float16))


@pytest.mark.parametrize(
    ("change", "inside", "message"),
    [
        (rename("metadata/metadata_9.parquet", "x"), "", r"other half for img_emb/img_emb_9\.npy"),
        (rename("img_emb/img_emb_9.npy", "x"), "", r"other half for metadata/metadata_9\.parquet"),
        (
            rename("metadata", "meta"),
            "",
            r"half for img_emb/img_emb_2\.npy, img_emb/img_emb_9\.npy",
        ),
        (rename("img_emb", "x"), "", "found only embeddings of texts: run clip-retrieval"),
        (cut_metadata, "", r"as many lines in .*_9\.parquet as rows in .*_9\.npy, got 6 and 7"),
        (other_dim, "", r"dim 48 as in .*_2\.npy, got 3 in .*_9\.npy"),
        (
            lambda _: None,
            "img_emb",
            "expected img_emb/.*found only what is in img_emb: pass the fo",
        ),
        (lambda _: None, "metadata", "found only what is in metadata: pass the folder above it"),
    ],
)
def test_wrong_layouts_are_named(tmp_path, output, change, inside, message):
    change(output)
    for place in (output / inside, f"{output / inside}/"):
        with pytest.raises(CatalogError, match=message):
            from_embeddings(place, tmp_path / "a.cbcat")
    assert not (tmp_path / "a.cbcat").exists()


def test_index_asks_which_model_made_the_embeddings(tmp_path, output):
    with pytest.raises(CatalogError, match=r"which model made the embeddings in .*: name it with"):
        build(output, tmp_path / "a.cbcat", encoder=None)
    with pytest.raises(CatalogError, match=r"expected no items beside .*: its metadata/ has them"):
        build(output, tmp_path / "a.cbcat", items=pa.table({"x": [1]}))
    with pytest.raises(CatalogError, match="expected an encoder for check_order, got none"):
        from_embeddings(output, tmp_path / "a.cbcat", check_order=32)
    np.save(tmp_path / "a.npy", np.ones((2, 3)))
    with pytest.raises(CatalogError, match="expected embeddings of dim 48, that of tiles, got 3"):
        build(tmp_path / "a.npy", tmp_path / "a.cbcat")


# NumPy files


@pytest.mark.parametrize("items", ["table", "parquet", "arrow", "none"])
def test_a_numpy_file_and_a_table(tmp_path, vectors, photos, items):
    np.save(tmp_path / "a.npy", vectors)
    table = pa.table({"file": photos, "n": range(len(photos)), "width": range(len(photos))})
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as f, pa.ipc.new_file(f, table.schema) as sink:
        sink.write_table(table)
    given = {"table": table, "none": None}.get(items, tmp_path / f"a.{items}")
    options = {} if items == "none" else {"image_column": "file", "check_order": 32}
    catalog = from_embeddings(
        tmp_path / "a.npy", tmp_path / "a.cbcat", items=given, encoder=TileEncoder(), **options
    )
    np.testing.assert_allclose(catalog.embeddings, vectors, atol=1e-3)
    if items != "none":
        assert catalog.items.column("uri").to_pylist() == photos
        assert catalog.items.column("n").to_pylist() == list(range(len(photos)))
        assert catalog.items.column("width").to_pylist() == list(range(len(photos)))


@pytest.mark.parametrize("place", ["path", "memory"])
def test_numpy_files_in_the_order_of_their_numbers(tmp_path, vectors, photos, place):
    for part in range(12):
        np.save(tmp_path / f"e{part}.npy", vectors[part * 10 : part * 10 + 10].astype(np.float16))
    pattern = f"{tmp_path}/e*.npy"
    if place == "memory":
        files = [f"{tmp_path}/e{part}.npy" for part in range(12)]
        fsspec.filesystem("memory").put(files, [f"/npy/e{part}.npy" for part in range(12)])
        pattern = "memory://npy/e*.npy"
    items = pa.table({"uri": photos})
    catalog = from_embeddings(
        pattern, tmp_path / "a.cbcat", items=items, encoder=TileEncoder(), check_order=20
    )
    np.testing.assert_allclose(catalog.embeddings, vectors, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"no array", r"expected a NumPy file \(\.npy\) at .*a\.npy, got: "),
        ("a.npy", np.ones(3), r"shape \(n >= 1, dim >= 1\) in .*a\.npy, got float64 \(3,\)"),
        ("a.npy", np.array([["x"]]), r"expected real embeddings .*, got <U1 \(1, 1\)"),
        ("a.npy", np.array([[{}]], object), r"got object \(1, 1\)"),
        ("a.png", b"", "found a file: pass it in a list"),
        ("a.parquet", b"", "expected embeddings at .*, found images or a table of them"),
        ("b.txt", b"", r"expected a folder of images at .*a\.npy, found nothing"),
    ],
)
def test_files_that_are_no_embeddings(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(CatalogError, match=message):
        from_embeddings(tmp_path / name.replace("b.txt", "a.npy"), tmp_path / "a.cbcat")


def test_a_numpy_file_that_was_cut_short_and_one_of_another_dim(tmp_path, vectors):
    np.save(tmp_path / "a.npy", vectors)
    whole = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(whole[:-100])
    with pytest.raises(CatalogError, match=r"expected a NumPy file \(\.npy\) at .*a\.npy, got"):
        from_embeddings(tmp_path / "a.npy", tmp_path / "a.cbcat")
    np.save(tmp_path / "a.npy", vectors)
    np.save(tmp_path / "b.npy", vectors[:, :5])
    with pytest.raises(CatalogError, match="expected embeddings of one dim in all files, got"):
        from_embeddings(f"{tmp_path}/*.npy", tmp_path / "a.cbcat")
    items = pa.table({"uri": ["a", "b"]})
    with pytest.raises(CatalogError, match="as many items as embeddings, got 2 items and 120"):
        from_embeddings(tmp_path / "a.npy", tmp_path / "a.cbcat", items=items)
    with pytest.raises(CatalogError, match=r"columns x in items, found \['uri'\]"):
        from_embeddings(tmp_path / "a.npy", "a.cbcat", items=items, image_column="x")


def test_bad_rows_are_counted_over_all_parts(tmp_path, vectors):
    np.save(tmp_path / "a.npy", vectors[:10])
    bad = vectors[:10].copy()
    bad[3] = 0
    np.save(tmp_path / "b.npy", bad)
    with pytest.raises(CatalogError, match="got all zeros in rows 13: drop"):
        from_embeddings(f"{tmp_path}/*.npy", tmp_path / "a.cbcat")


# The check of order


def source_of(vectors, photos, n_parts=3):
    items = pa.table({"uri": photos})
    return ArrayEmbeddings(np.array_split(vectors, n_parts), items)


def test_the_check_passes_where_all_is_in_order(vectors, photos):
    found = check_order(source_of(vectors * 7, photos), TileEncoder(), 32)
    assert len(found.rows) == 32
    assert np.array_equal(found.rows, np.unique(found.rows))
    assert found.similarities.min() > 0.999
    one = check_order(source_of(vectors[:1], photos[:1], n_parts=1), TileEncoder(), 32)
    assert one.rows.tolist() == [0]


@settings(max_examples=20)
@given(shift=st.integers(-100, 100).filter(bool), n_images=st.integers(8, 64))
def test_a_shift_is_found_and_named(vectors, photos, shift, n_images):
    source = source_of(np.roll(vectors, shift, axis=0), photos)
    with pytest.raises(
        CatalogError, match=r"got a median of -?0\.\d\d, and others in rows"
    ) as error:
        check_order(source, TileEncoder(), n_images)
    wrapped = shift - 120 if shift > 0 else shift + 120  # what is rolled out comes in again
    said = [f"shifted by {-one:+d} rows against the embeddings" for one in (shift, wrapped)]
    assert any(text in str(error.value) for text in said) or "different orders" in str(error.value)


def test_metadata_that_lost_a_line_half_way(tmp_path, vectors, photos):
    """The median is fine, but the rows of the second part are not."""
    np.save(tmp_path / "a.npy", vectors[:119])
    lost = photos[:80] + photos[81:]
    message = (
        r"median of 1\.00, and others in rows .* shifted by -1 rows .*, from row \d+ or before on"
    )
    with pytest.raises(CatalogError, match=message):
        from_embeddings(
            tmp_path / "a.npy",
            tmp_path / "a.cbcat",
            items=pa.table({"uri": lost}),
            encoder=TileEncoder(),
            check_order=32,
        )
    assert not (tmp_path / "a.cbcat").exists()


def test_another_order(vectors, photos, rng):
    source = source_of(vectors[rng.permutation(120)], photos)
    with pytest.raises(CatalogError, match=r"that of row \d+ is in row \d+\): .*different orders"):
        check_order(source, TileEncoder(), 32)


def test_embeddings_of_another_model(vectors, photos, rng):
    source = source_of(rng.standard_normal(vectors.shape), photos)
    with pytest.raises(CatalogError, match="made by another model than tiles / none"):
        check_order(source, TileEncoder(), 32)


def test_some_images_that_changed_since_are_a_warning(vectors, photos, rng, caplog):
    changed = vectors.copy()
    changed[::10] = rng.standard_normal((12, DIM))
    caplog.set_level("WARNING", logger="clipbranches_widget")
    check_order(source_of(changed, photos), TileEncoder(), 120)
    assert "differ from their embeddings, such as that of row" in caplog.text


def test_images_that_are_gone(vectors, photos, tmp_path):
    some = [path if row % 2 else str(tmp_path / "gone.png") for row, path in enumerate(photos)]
    assert len(check_order(source_of(vectors, some), TileEncoder(), 32).rows) > 20
    with pytest.raises(CatalogError, match="to read 32 images for the check of order, got 0; row"):
        check_order(source_of(vectors, [""] * 120), TileEncoder(), 32)


def test_equal_images_are_no_other_order(vectors, photos):
    same = np.tile(vectors[:4], (30, 1))
    check_order(source_of(same, photos[:4] * 30), TileEncoder(), 32)


@given(n_rows=st.integers(1, 40), n_parts=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_nearest_equals_all_at_once(n_rows, n_parts, seed):
    rng = np.random.default_rng(seed)
    stored = rng.integers(-3, 4, (n_rows, 3)).astype(np.float16)
    query = rng.standard_normal((4, 3)).astype(np.float32)
    rows, best = nearest(query, np.array_split(stored, n_parts))
    lengths = np.maximum(np.linalg.norm(stored.astype(np.float64), axis=1), 1e-30)
    cosines = query @ (stored / lengths[:, None]).T
    np.testing.assert_allclose(best, cosines.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(cosines[np.arange(4), rows], cosines.max(axis=1), atol=1e-5)


def test_an_existing_catalog_is_not_touched(tmp_path, output):
    first = build(output, tmp_path / "a.cbcat")
    with pytest.raises(CatalogError, match="it exists"):
        build(output, tmp_path / "a.cbcat")
    assert len(Catalog.open(tmp_path / "a.cbcat")) == len(first)
