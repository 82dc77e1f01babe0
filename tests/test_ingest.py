"""Building catalogs: from images, from embeddings, whole or not at all."""

import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import CatalogError, CatalogExistsError
from clipbranches_widget.ingest import from_embeddings, index
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.source_table import caption_from_uri, items_table
from clipbranches_widget.sources import image_source

DIM = 12


def names(folder):
    """Return the names in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


class MosaicEncoder:
    """A real, tiny encoder: an image is its 2 x 2 mean colours. It has no text tower."""

    info = EncoderInfo("open_clip", "mosaic", "none", DIM, "weights-1")
    dim = DIM
    has_text = False
    image_size = 2

    def preprocess(self, image):
        small = image.convert("RGB").resize((2, 2), Image.Resampling.BOX)
        return np.asarray(small, np.float32).ravel() + 1

    def encode_tensors(self, tensors):
        rows = np.array(list(tensors), np.float32).reshape(-1, DIM)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def encode_images(self, images):
        return self.encode_tensors([self.preprocess(image) for image in images])

    def encode_text(self, texts):
        raise AssertionError(f"no text tower for {texts}")


@pytest.fixture
def pictures(tmp_path, rng):
    """Return a folder tree of nine pictures, three files that are none, and hidden ones."""
    folder = tmp_path / "pictures"
    names = [
        "b/red-panda_2.png",
        "a.jpg",
        "b/c/deep.PNG",
        "Z.webp",
        *(f"n{i}.png" for i in range(5)),
    ]
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        colours = rng.integers(0, 255, size=(6 + number, 8, 3), dtype=np.uint8)
        Image.fromarray(colours).save(file)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_bytes((folder / "n0.png").read_bytes())
    (folder / ".trash").mkdir()
    (folder / ".trash" / "x.png").write_bytes((folder / "n0.png").read_bytes())
    return folder


def build_index(source, path, **options):
    return index(source, path, encoder=MosaicEncoder(), progress=False, **options)


@pytest.fixture
def logged(caplog):
    caplog.set_level("WARNING", logger="clipbranches_widget")
    return caplog


@pytest.mark.parametrize("rows_per_shard", [1000, 2])
def test_a_folder(pictures, tmp_path, logged, rows_per_shard):
    catalog = build_index(
        pictures, tmp_path / "a.cbcat", rows_per_shard=rows_per_shard, batch_size=3, about="mine"
    )
    uris = catalog.items.column("uri").to_pylist()
    assert uris == ["Z.webp", "a.jpg", "b/c/deep.PNG", "b/red-panda_2.png"] + [
        f"n{i}.png" for i in range(5)
    ]
    assert catalog.caption(3) == "red panda 2"
    assert catalog.skipped.column("uri").to_pylist() == ["broken.png", "empty.jpg"]
    assert "empty" in catalog.skipped.column("reason")[1].as_py()
    assert "left out 2 of 11 images" in logged.text
    assert catalog.encoder_info == MosaicEncoder.info
    assert catalog.info()["about"] == "mine"
    assert len(catalog.shards) == -(-9 // rows_per_shard)
    for row, uri in enumerate(uris):
        with Image.open(pictures / uri) as image:
            expected = MosaicEncoder().encode_images([image])[0]
            assert catalog.items.column("width")[row].as_py() == image.width
            assert catalog.items.column("height")[row].as_py() == image.height
            assert catalog.image(row).size == image.size
        np.testing.assert_allclose(catalog.embeddings[row], expected, atol=1e-3)
        assert catalog.thumbnail(row)[8:12] == b"WEBP"
    assert len(set(catalog.items.column("content_hash").to_pylist())) == 9
    catalog.verify()


def test_an_image_that_is_gone_keeps_its_thumbnail(pictures, tmp_path, logged):
    catalog = build_index(pictures, tmp_path / "a.cbcat")
    (pictures / "Z.webp").unlink()
    with pytest.raises(OSError, match=r"the image of row 0: .*Z\.webp"):
        catalog.image(0)
    assert catalog.thumbnail(0)[8:12] == b"WEBP"
    assert len(catalog.thumbnail(0, size=4)) > 0


@pytest.mark.parametrize("kind", ["list", "series", "frame", "table"])
def test_lists_and_tables_keep_order_and_types(pictures, tmp_path, kind):
    paths = [pictures / "n3.png", pictures / "a.jpg", pictures / "n3.png"]
    columns = {
        "path": [str(path) for path in paths],
        "price": np.array([1.5, 2.5, 3.5], np.float32),
        "tags": [["x"], [], ["y", "z"]],
        "caption": ["first", None, ""],
    }
    source = {
        "list": paths,
        "series": pd.Series(columns["path"]),
        "frame": pd.DataFrame(columns),
        "table": pa.table(columns),
    }[kind]
    catalog = build_index(source, tmp_path / "a.cbcat", rows_per_shard=2)
    assert catalog.items.column("uri").to_pylist() == columns["path"]
    assert np.array_equal(catalog.embeddings[0], catalog.embeddings[2])
    captions = catalog.items.column("caption").to_pylist()
    if kind in {"list", "series"}:
        assert captions == ["n3", "a", "n3"]
        assert catalog.items.column_names[6:] == []
    else:
        assert captions == ["first", "a", "n3"]
        assert catalog.items.column("price").type == pa.float32()
        assert catalog.items.column("tags").to_pylist() == columns["tags"]


def test_progress_bars(pictures, tmp_path, logged, capsys):
    index(pictures, tmp_path / "a.cbcat", encoder=MosaicEncoder())
    shown = capsys.readouterr().err
    for stage in ("images", "column choice", "vector index", "column index"):
        assert f"{stage}: 100%" in shown


def test_no_readable_image_leaves_nothing(pictures, tmp_path):
    bad = [pictures / "broken.png", pictures / "empty.jpg"]
    with pytest.raises(CatalogError, match=r"at least one readable image, got 2.*broken\.png"):
        build_index(bad, tmp_path / "a.cbcat")
    assert names(tmp_path) == ["pictures"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda p: p / "none", "expected a folder of images at .*none, found nothing"),
        (lambda p: p / "a.jpg", "found a file: pass it in a list"),
        (lambda p: p / ".trash" / "..", None),
        (lambda _: 7, "expected a folder, a list of paths or a table, got int"),
        (lambda _: [], "expected at least one image, got an empty list"),
        (lambda p: [p / "a.jpg", None], "expected a path or uri as entry 1, got None"),
        (lambda _: pd.DataFrame({"file": ["a"]}), "or 'uri' or 'path', in the table, found 'file'"),
        (lambda _: pd.DataFrame({"uri": ["a"], "width": [1]}), "other names than width"),
        (lambda _: pd.DataFrame({"uri": ["a"], "path": ["a"]}), "other names than uri"),
        (lambda _: pd.DataFrame({"uri": ["a"], "score": [1]}), "other names than score"),
    ],
)
def test_sources(pictures, source, message):
    if message is None:
        assert len(image_source(source(pictures)).table) == 11
    else:
        with pytest.raises(CatalogError, match=message):
            image_source(source(pictures))


def test_a_folder_without_images(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CatalogError, match=r"found no file that ends in \.avif, \.bmp"):
        image_source(tmp_path)


@pytest.mark.parametrize(
    ("uri", "caption"),
    [
        ("a/b c/red-panda_02.final.JPG", "red panda 02 final"),
        ("openmoji:1F600", "1F600"),
        ("", ""),
        ("C:\\pictures\\old_house.png", "old house"),
        ("<b>x</b>.png", "b>"),
    ],
)
def test_captions_from_file_names(uri, caption):
    assert caption_from_uri(uri) == caption


def test_uris_of_other_schemes_are_kept():
    table = image_source(pd.DataFrame({"uri": ["openmoji:1F600"], "caption": ["grin"]})).table
    assert table.to_pylist() == [{"uri": "openmoji:1F600", "caption": "grin"}]


def test_emoji_are_a_source(tmp_path):
    source = pd.DataFrame(
        {
            "uri": ["openmoji:1F600", "openmoji:1F34E", "openmoji:0000"],
            "caption": ["grinning face", "red apple", "nothing"],
            "keywords": [["face", "smile"], ["fruit"], []],
        }
    )
    catalog = build_index(source, tmp_path / "a.cbcat")
    assert catalog.items.column("uri").to_pylist() == ["openmoji:1F600", "openmoji:1F34E"]
    assert catalog.items.column("keywords").to_pylist() == [["face", "smile"], ["fruit"]]
    assert catalog.skipped.column("uri").to_pylist() == ["openmoji:0000"]
    assert catalog.image(1).mode == "RGB"
    assert catalog.thumbnail(1)[8:12] == b"WEBP"


def test_either_encoder_or_model(pictures, tmp_path):
    with pytest.raises(CatalogError, match="expected either encoder or model"):
        build_index(pictures, tmp_path / "a.cbcat", model="ViT-L-14")


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 30), st.sampled_from([1, 2, 5])),
    rows_per_shard=st.integers(1, 31),
    dtype=st.sampled_from(["float16", "float32", "float64", "int8"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_shard_is_complete(tmp_path_factory, shape, rows_per_shard, dtype, seed):
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal(shape) * 20).astype(dtype)
    rows[~rows.any(axis=1)] = 1
    path = tmp_path_factory.mktemp("built") / "a.cbcat"
    catalog = from_embeddings(rows, path, rows_per_shard=rows_per_shard)
    exact = rows.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    assert np.array_equal(catalog.embeddings, exact.astype(np.float16))
    assert catalog.items.column("row").to_pylist() == list(range(shape[0]))
    model = ColumnModel.open(path)
    assert model.hash == catalog.column_model_hash
    for shard in catalog.shards:
        columns = SortedColumns.open(shard.path, n_columns=model.n_columns, n_rows=shard.n_rows)
        assert np.array_equal(columns.codes, model.codes(shard.embeddings))
    catalog.verify()


def test_embeddings_larger_than_a_block_come_from_a_memory_map(tmp_path, rng, monkeypatch):
    monkeypatch.setattr("clipbranches_widget.ingest._BLOCK_ELEMENTS", 256)
    rows = rng.standard_normal((100, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    catalog = from_embeddings(mapped, tmp_path / "a.cbcat", rows_per_shard=45)
    expected = from_embeddings(rows.tolist(), tmp_path / "b.cbcat")
    assert np.array_equal(catalog.embeddings, expected.embeddings)


@pytest.mark.parametrize("scale", [1e-300, 1e-20, 1e20, 1e300])
def test_embeddings_of_any_length_are_scaled(tmp_path, scale):
    catalog = from_embeddings(np.array([[3.0, -4.0]]) * scale, tmp_path / "a.cbcat")
    np.testing.assert_allclose(catalog.embeddings, [[0.6, -0.8]], atol=1e-3)


def with_value(value, rows):
    array = np.ones((9, 3))
    array[rows] = value
    return array


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (with_value(np.nan, [4]), "expected finite numbers, got NaN or infinity in rows 4: drop"),
        (with_value(np.inf, [0, 8]), "NaN or infinity in rows 0, 8"),
        (with_value(0, [1, 2, 3, 4, 5, 6]), "got all zeros in rows 1, 2, 3, 4, 5 and more"),
        (np.ones(3), r"expected embeddings of shape \(n >= 1, dim >= 1\), got \(3,\)"),
        (np.ones((0, 3)), r"got \(0, 3\)"),
        (np.ones((3, 0)), r"got \(3, 0\)"),
        ([[1, 2], [3]], "expected a 2-D array of embeddings"),
        (np.array([["a", "b"]]), "expected real numbers as embeddings, got dtype <U1"),
        (np.ones((2, 2), bool), "got dtype bool"),
        (np.ones((2, 2), complex), "got dtype complex128"),
    ],
)
def test_bad_embeddings_leave_nothing(tmp_path, embeddings, message):
    with pytest.raises(CatalogError, match=message):
        from_embeddings(embeddings, tmp_path / "a.cbcat")
    assert names(tmp_path) == []


def test_another_dimension_than_the_encoder(tmp_path):
    with pytest.raises(CatalogError, match="expected embeddings of dim 12, that of mosaic, got 3"):
        from_embeddings(np.ones((2, 3)), tmp_path / "a.cbcat", encoder=MosaicEncoder())


def test_items_keep_their_types(tmp_path):
    items = pd.DataFrame(
        {
            "path": ["x/green_tea.jpg", "y.jpg"],
            "kind": pd.Categorical(["tea", "other"]),
            "taken": pd.to_datetime(["2024-01-02", None]),
            "tags": [["a"], ["b", "c"]],
            "width": [640, 480],
            "good": [True, False],
        },
        index=[7, 9],
    )
    catalog = from_embeddings(np.eye(2), tmp_path / "a.cbcat", items=items, rows_per_shard=1)
    table = catalog.items
    assert table.column("caption").to_pylist() == ["green tea", "y"]
    assert table.column("width").to_pylist() == [640, 480]
    assert table.column("width").type == pa.int32()
    assert pa.types.is_dictionary(table.column("kind").type)
    assert table.column("kind").to_pylist() == ["tea", "other"]
    assert pa.types.is_timestamp(table.column("taken").type)
    assert table.column("tags").to_pylist() == [["a"], ["b", "c"]]
    assert table.column("good").type == pa.bool_()
    assert table.column_names[6:] == ["kind", "taken", "tags", "good"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (pd.DataFrame({"uri": ["a"]}), "as many items as embeddings, got 1 items and 2 embeddings"),
        (pd.DataFrame({"row": [0, 1]}), "expected other names than row for the columns of items"),
        (pd.DataFrame({"margin": [0, 1], "branch": [0, 1]}), "other names than branch, margin"),
        (pd.DataFrame({"uri": ["a", "b"], "path": ["a", "b"]}), "other names than uri"),
        (pd.DataFrame({"width": ["wide", "b"]}), "expected column 'width' to hold int32 values"),
        (pd.DataFrame({"x": [object(), object()]}), "expected items as a pandas DataFrame"),
        (["a", "b"], "expected items as a pandas DataFrame or pyarrow Table.*got list"),
    ],
)
def test_bad_items_leave_nothing(tmp_path, items, message):
    with pytest.raises(CatalogError, match=message):
        from_embeddings(np.eye(2), tmp_path / "a.cbcat", items=items)
    assert names(tmp_path) == []


def test_the_columns_of_a_catalog_can_be_given_back(tmp_path):
    first = from_embeddings(np.eye(3), tmp_path / "a.cbcat", items=pa.table({"x": [1, 2, 3]}))
    again = from_embeddings(
        first.embeddings, tmp_path / "b.cbcat", items=first.items.drop_columns(["row"])
    )
    assert again.items.equals(first.items)
    assert items_table(first.items, taken=()).equals(first.items)


def test_an_existing_catalog_is_never_touched(tmp_path):
    catalog = from_embeddings(np.eye(3), tmp_path / "a.cbcat")
    with pytest.raises(CatalogExistsError, match=r"a\.cbcat, but it exists: open it with"):
        from_embeddings(np.eye(4), tmp_path / "a.cbcat")
    with pytest.raises(CatalogExistsError, match="it exists"):
        build_index(tmp_path, tmp_path / "a.cbcat")
    catalog.verify()
    assert names(tmp_path) == ["a.cbcat"]


def test_rows_per_shard_is_checked(tmp_path):
    with pytest.raises(CatalogError, match="expected rows_per_shard >= 1, got 0"):
        from_embeddings(np.eye(3), tmp_path / "a.cbcat", rows_per_shard=0)


@pytest.mark.parametrize("columns", ["full", "bits", "codes"])
@pytest.mark.parametrize("build", [build_index, from_embeddings])
@pytest.mark.usefixtures("logged")
def test_parts_of_the_column_index(pictures, tmp_path, columns, build):
    source = pictures if build is build_index else np.tile(np.eye(3), (3, 1))
    catalog = build(source, tmp_path / "a.cbcat", columns=columns, rows_per_shard=5)
    assert catalog.info()["column_parts"] == columns
    catalog.verify()
    model = ColumnModel.open(catalog.path)
    for shard in catalog.shards:
        opened = SortedColumns.open(shard.path, n_columns=model.n_columns, n_rows=shard.n_rows)
        expected = SortedColumns.from_codes(model.codes(shard.embeddings), columns=columns)
        for name in ("codes", "offsets", "prefix", "order"):
            assert np.array_equal(getattr(opened, name), getattr(expected, name)), name


def test_unknown_parts_of_the_column_index(pictures, tmp_path):
    for build, source in ((build_index, pictures), (from_embeddings, np.eye(3))):
        with pytest.raises(CatalogError, match="'full', 'bits' or 'codes', got 'all'"):
            build(source, tmp_path / "a.cbcat", columns="all")
    assert names(tmp_path) == ["pictures"]


BUILD = """
import sys
import numpy as np
from clipbranches_widget.ingest import from_embeddings
rows = np.random.default_rng(0).standard_normal((3000, 64), dtype=np.float32)
print("ready", flush=True)
from_embeddings(rows, sys.argv[1], rows_per_shard=500)
print("built", flush=True)
"""


@pytest.mark.parametrize("wait_for", ["embeddings.npy", "vectors.usearch", "codes.npy"])
def test_a_build_killed_at_any_moment_leaves_nothing(tmp_path, wait_for):
    """Kill a real build when a given file of it appears; then build again."""
    target = tmp_path / "a.cbcat"
    with subprocess.Popen(
        [sys.executable, "-c", BUILD, str(target)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        deadline_s = time.monotonic() + 120
        while not list(tmp_path.glob(f".a.cbcat.building-*/shards/*/{wait_for}")):
            assert time.monotonic() < deadline_s
            assert process.poll() is None
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert process.stdout.read() == ""
    assert not target.exists()
    assert len(names(tmp_path)) == 2
    catalog = from_embeddings(np.eye(3), target)
    assert len(Catalog.open(target)) == len(catalog) == 3
    assert names(tmp_path) == ["a.cbcat"]
