"""Parquet and Arrow files, tables in memory, Hugging Face data sets: written by their libraries."""

import datetime as dt
import itertools

import datasets
import fsspec
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from drawn_images import assert_holds, build, picture, pictures
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget.cells import read_cell
from clipbranches_widget.errors import CatalogError, ImageReadError
from clipbranches_widget.source_table import Chunk, RowStream
from clipbranches_widget.sources import image_source

N = 200  # more than a batch of any source


@pytest.fixture(scope="module", autouse=True)
def _offline_and_silent():
    datasets.disable_progress_bars()


@pytest.fixture(scope="module")
def images():
    return pictures(N)


@pytest.fixture
def table(images):
    """Return images with columns of many types."""
    return pa.table(
        {
            "image": images,
            "caption": pa.array([f"picture {i}" if i % 3 else None for i in range(N)]),
            "price": pa.array(np.arange(N, dtype=np.float32)),
            "taken": pa.array([dt.date(2024, 1, 1) + dt.timedelta(i) for i in range(N)]),
            "tags": pa.array([["a"] * (i % 3) for i in range(N)]),
            "width": pa.array(range(N)),
            "kind": pa.array(["red", "blue"] * (N // 2)).dictionary_encode(),
        }
    )


def assert_columns(catalog):
    items = catalog.items
    assert items.column_names[6:] == ["price", "taken", "tags", "source_width", "kind"]
    assert items.schema.field("price").type == pa.float32()
    assert items.schema.field("taken").type == pa.date32()
    assert items.column("tags").to_pylist()[:4] == [[], ["a"], ["a", "a"], []]
    assert items.column("source_width").to_pylist() == list(range(N))
    assert items.column("kind").to_pylist() == ["red", "blue"] * (N // 2)
    assert items.column("caption").to_pylist() == [
        f"picture {i}" if i % 3 else "" for i in range(N)
    ]


@pytest.mark.parametrize("kind", ["parquet", "feather", "stream", "polars"])
@pytest.mark.parametrize("rows_per_shard", [1000, 70])
def test_image_bytes_in_a_file(tmp_path, images, table, kind, rows_per_shard):
    file = tmp_path / ("images.parquet" if kind in {"parquet", "polars"} else "images.arrow")
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=90)
    elif kind == "polars":
        pl.from_arrow(table).write_parquet(file)
    elif kind == "feather":
        pyarrow.feather.write_feather(table, str(file), chunksize=90)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    catalog = build(file, tmp_path / "a.cbcat", rows_per_shard=rows_per_shard)
    assert_holds(catalog, images)
    assert_columns(catalog)
    form = "parquet" if file.suffix == ".parquet" else "arrow"
    assert catalog.uri(131) == f"{form}://image/131::{file}"


def test_several_files_are_one_source_in_the_order_of_their_numbers(tmp_path, images):
    for part in range(11):
        columns = {"photo": images[part * 3 : part * 3 + 3], "n": [part] * 3}
        if part > 5:
            columns["n"] = [float(part)] * 3
            columns["late"] = ["x"] * 3
        pq.write_table(pa.table(columns), tmp_path / f"part-{part}.parquet")
    expected = [part for part in range(11) for _ in range(3)]
    for source in (tmp_path, f"{tmp_path}/*.parquet", f"{tmp_path}/part-{{0..10}}.parquet"):
        found = image_source(source)
        assert found.n_images == 33
        joined = pa.concat_tables(chunk.table for chunk in found.chunks())
        assert joined.column("n").to_pylist() == expected
        assert joined.column("late").null_count == 18
    catalog = build([tmp_path / f"part-{i}.parquet" for i in range(11)], tmp_path / "a.cbcat")
    assert_holds(catalog, images[:33])
    assert catalog.items.schema.field("n").type == pa.float64()


def test_columns_of_other_types_are_refused(tmp_path):
    pq.write_table(pa.table({"image": [picture(0)], "n": [1]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [picture(1)], "n": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(
        CatalogError, match=r"b\.parquet to have the types of those in .*a\.parquet"
    ):
        image_source(tmp_path)


def test_paths_in_a_file_start_from_its_folder(tmp_path, images):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        (folder / f"old_{number}.png").write_bytes(images[number])
    places = ["photos/old_0.png", str(folder / "old_1.png"), (folder / "old_2.png").as_uri(), None]
    table = pa.table({"URL": places, "TEXT": ["first", None, "third", "none"]})
    pq.write_table(table, tmp_path / "list.parquet")
    catalog = build(
        tmp_path / "list.parquet",
        tmp_path / "a.cbcat",
        image_column="URL",
        caption_column="TEXT",
    )
    assert_holds(catalog, images[:3])
    assert catalog.items.column("caption").to_pylist() == ["first", "old 1", "third"]
    assert catalog.skipped.to_pylist() == [
        {"uri": "", "reason": "expected the path or URL of an image, got none"}
    ]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"a": [b""], "b": [b""]},
            {},
            "one column of images in .*, found 'a', 'b': say which with",
        ),
        ({"a": ["x"]}, {}, "'uri' or 'path', in .*, found 'a': say with image_column="),
        ({"a": [b""]}, {"image_column": "b"}, "expected a column 'b' in .*, found 'a'"),
        ({"a": [b""]}, {"caption_column": "b"}, "expected a column 'b' in .*, found 'a'"),
        ({"a": [1]}, {"image_column": "a"}, "paths or URLs in column 'a' of .*, got int64"),
        (
            {"a": [b""], "caption": [1]},
            {},
            "texts in the caption column 'caption' of .*, got int64",
        ),
        ({"image": pa.array([], pa.binary())}, {}, "at least one image in .*, found no lines"),
    ],
)
def test_tables_that_do_not_say_where_the_images_are(tmp_path, columns, options, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(CatalogError, match=message):
        image_source(tmp_path / "a.parquet", **options)


def test_a_second_column_of_images_is_left_out(tmp_path, images):
    table = pa.table({"before": images[:5], "after": images[5:10], "n": range(5)})
    pq.write_table(table, tmp_path / "a.parquet")
    catalog = build(tmp_path / "a.parquet", tmp_path / "a.cbcat", image_column="after")
    assert_holds(catalog, images[5:10])
    assert catalog.items.column_names[6:] == ["n"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_damaged_file_is_named(tmp_path, table, kind):
    file = tmp_path / f"images.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        pyarrow.feather.write_feather(table, str(file))
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(
        CatalogError, match=rf"images\.{kind}: expected a whole Parquet or Arrow file"
    ):
        image_source(file)


def test_bytes_that_are_no_image_are_left_out(tmp_path, images):
    table = pa.table({"image": [images[0], b"not an image", None, images[1]], "n": range(4)})
    pq.write_table(table, tmp_path / "a.parquet")
    catalog = build(tmp_path / "a.parquet", tmp_path / "a.cbcat")
    assert_holds(catalog, images[:2])
    assert catalog.items.column("n").to_pylist() == [0, 3]
    reasons = catalog.skipped.column("reason").to_pylist()
    assert "not an image" in reasons[0]
    assert "expected image bytes there, got NoneType" in reasons[1]


def test_an_image_whose_file_is_gone_keeps_its_thumbnail(tmp_path, images):
    pq.write_table(pa.table({"image": images[:3]}), tmp_path / "a.parquet")
    catalog = build(tmp_path / "a.parquet", tmp_path / "a.cbcat")
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ImageReadError, match=r"image of row 1: parquet://image/1::.*found none"):
        catalog.image(1)
    assert catalog.thumbnail(1)[8:12] == b"WEBP"


@pytest.mark.parametrize("where", ["local", "memory"])
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_cells_that_are_not_there(tmp_path, images, kind, where):
    file = tmp_path / f"a.{kind}"
    table = pa.table({"the image": images[:3], "n": range(3)})
    if kind == "parquet":
        pq.write_table(table, file, row_group_size=2)
    else:
        pyarrow.feather.write_feather(table, str(file), chunksize=2)
    if where == "memory":
        fsspec.filesystem("memory").pipe(f"/cells/a.{kind}", file.read_bytes())
        file = f"memory://cells/a.{kind}"
    assert read_cell(f"{kind}://the%20image/2::{file}") == images[2]
    for place in ("the%20image/3", "image/0"):
        with pytest.raises(ImageReadError, match="no such column or row in the file"):
            read_cell(f"{kind}://{place}::{file}")
    with pytest.raises(ImageReadError, match="expected image bytes there, got int"):
        read_cell(f"{kind}://n/0::{file}")
    with pytest.raises(ImageReadError, match=rf"expected {kind}://COLUMN/ROW::FILE"):
        read_cell(f"{kind}://image::{file}")


@pytest.mark.parametrize("kind", ["frame", "table", "polars"])
def test_image_bytes_in_memory(tmp_path, images, kind):
    columns = {"image": images[:9], "caption": [f"c{i}" for i in range(9)], "n": range(9)}
    source = {"frame": pd.DataFrame, "table": pa.table, "polars": pl.DataFrame}[kind](columns)
    catalog = build(source, tmp_path / "a.cbcat")
    assert_holds(catalog, images[:9], readable=False)
    assert catalog.caption(4) == "c4"
    assert catalog.items.column("n").to_pylist() == list(range(9))
    with pytest.raises(ImageReadError, match=r"row 4: unsaved://image/4: .* given in memory"):
        catalog.image(4)


# Hugging Face


@pytest.fixture
def dataset(images):
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=["cat", "dog", "bird"]),
            "note": datasets.Value("string"),
        }
    )
    columns = {
        "image": [{"bytes": data, "path": f"red_panda_{i}.png"} for i, data in enumerate(images)],
        "label": [i % 4 - 1 for i in range(N)],  # -1: no label
        "note": [f"note {i}" for i in range(N)],
    }
    return datasets.Dataset.from_dict(columns, features=features)


def labels(rows):
    return [None if i % 4 == 0 else ("cat", "dog", "bird")[i % 4 - 1] for i in rows]


@pytest.mark.parametrize("form", ["folder", "object", "parquet", "arrow file", "memory"])
def test_a_data_set(tmp_path, images, dataset, form):
    saved = tmp_path / "saved"
    dataset.save_to_disk(saved, num_shards=3)
    if form == "parquet":
        dataset.to_parquet(tmp_path / "a.parquet")
    if form == "memory":
        fsspec.filesystem("memory").put(str(saved), "/hf", recursive=True)
    source = {
        "folder": saved,
        "object": datasets.load_from_disk(saved),
        "parquet": tmp_path / "a.parquet",
        "arrow file": f"{saved}/data-*.arrow",
        "memory": "memory://hf",
    }[form]
    catalog = build(source, tmp_path / "a.cbcat", rows_per_shard=150)
    assert_holds(catalog, images)
    assert catalog.items.column("label").to_pylist() == labels(range(N))
    assert catalog.items.column("note").to_pylist() == [f"note {i}" for i in range(N)]
    assert catalog.caption(7) == "red panda 7"
    if form == "object":
        assert catalog.uri(199) == f"arrow://image/65::{saved}/data-00002-of-00003.arrow"


def test_a_shuffled_and_filtered_data_set_keeps_its_order(tmp_path, images, dataset):
    dataset.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    chosen = loaded.shuffle(seed=3).filter(lambda note: note.endswith("7"), input_columns="note")
    rows = [int(note.removeprefix("note ")) for note in chosen["note"]]
    assert rows != sorted(rows)
    catalog = build(chosen, tmp_path / "a.cbcat")
    assert_holds(catalog, [images[row] for row in rows])
    assert catalog.items.column("label").to_pylist() == labels(rows)


@pytest.mark.parametrize("form", ["memory", "slice"])
def test_a_data_set_that_is_not_its_files_has_thumbnails_only(tmp_path, images, dataset, form):
    if form == "slice":
        dataset.save_to_disk(tmp_path / "saved")
        dataset = datasets.load_from_disk(tmp_path / "saved")
    catalog = build(dataset.select(range(20, 40)), tmp_path / "a.cbcat")
    assert_holds(catalog, images[20:40], readable=False)
    with pytest.raises(ImageReadError, match=r"unsaved://image/3: .* save the data set, and index"):
        catalog.image(3)


def test_columns_that_were_added_or_renamed(tmp_path, images, dataset):
    """The files are still the images' where they are; where they are not, nobody pretends."""
    dataset.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved").remove_columns("label")
    more = loaded.add_column("n", list(range(N)))
    catalog = build(more, tmp_path / "a.cbcat")
    assert_holds(catalog, images)
    assert catalog.items.column_names[6:] == ["note", "n"]
    renamed = build(loaded.rename_column("image", "photo"), tmp_path / "b.cbcat")
    assert_holds(renamed, images, readable=False)
    assert renamed.uri(5) == "unsaved://photo/5"


def test_a_data_set_of_paths(tmp_path, images):
    paths = []
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(images[number])
        paths.append(str(tmp_path / f"{number}.png"))
    dataset = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    catalog = build(dataset, tmp_path / "a.cbcat")
    assert_holds(catalog, images[:4])
    assert catalog.items.column("uri").to_pylist() == paths


def test_data_sets_that_are_none(tmp_path, dataset):
    both = datasets.DatasetDict({"train": dataset, "test": dataset})
    with pytest.raises(CatalogError, match="one data set, got a DatasetDict of 'train', 'test'"):
        image_source(both)
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(
        CatalogError, match=r"a dict of them: pass one of .*/both/train, .*/both/test"
    ):
        image_source(tmp_path / "both")
    with pytest.raises(CatalogError, match="knows its length, got a IterableDataset: pass a"):
        image_source(dataset.to_iterable_dataset())
    with pytest.raises(CatalogError, match="got an empty data set"):
        image_source(dataset.select([]))
    with pytest.raises(
        CatalogError, match="'uri' or 'path', in the data set, found 'label', 'note'"
    ):
        image_source(dataset.remove_columns("image"))
    dataset.save_to_disk(tmp_path / "bad")
    (tmp_path / "bad" / "state.json").write_text("{}")
    with pytest.raises(CatalogError, match=r"list of Arrow files in .*state\.json"):
        image_source(tmp_path / "bad")


class Counted:
    """A source of numbered lines in chunks of given sizes."""

    root = None

    def __init__(self, sizes):
        self.sizes = sizes
        self.n_images = sum(sizes)

    def chunks(self):
        first = 0
        for size in self.sizes:
            numbers = range(first, first + size)
            uris = pa.array([f"{number}" for number in numbers], pa.string())
            yield Chunk(pa.table({"uri": uris}), (str(number).encode() for number in numbers))
            first += size


@given(
    sizes=st.lists(st.integers(0, 9), max_size=8),
    ahead=st.integers(0, 20),
    batch=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_lines_are_there_until_they_are_forgotten(sizes, ahead, batch, seed):
    """Batches are taken in order while the stream is `ahead` images further, as in `embed`."""
    stream = RowStream(Counted(sizes))
    given_out = iter(stream)
    n_rows = sum(sizes)
    rng = np.random.default_rng(seed)
    n_given = 0
    for start in range(0, n_rows, batch):
        stop = min(start + batch, n_rows)
        for uri, image in itertools.islice(given_out, stop + ahead - n_given):
            assert uri.encode() == image
            n_given += 1
        kept = rng.random(stop - start) < 0.6
        for chosen in (kept, ~kept):
            positions = (np.flatnonzero(chosen) + start).tolist()
            if positions:
                assert stream.take(positions).column("uri").to_pylist() == [*map(str, positions)]
        stream.forget(stop - 1)
        assert sum(len(table) for _, table in stream._pending) <= ahead + 2 * max(sizes)
    assert list(given_out) == []


def test_a_table_is_read_batch_by_batch(tmp_path, rng):
    """A file of 96 MB is indexed while far less than that is ever in memory."""
    noise = [picture(i) + rng.bytes(1_000_000) for i in range(96)]
    pq.write_table(
        pa.table({"image": noise}), tmp_path / "a.parquet", compression="none", row_group_size=8
    )
    del noise
    source = image_source(tmp_path / "a.parquet")
    before, most = pa.total_allocated_bytes(), 0
    for chunk in source.chunks():
        for data in chunk.images:
            assert len(data) > 1_000_000
            most = max(most, pa.total_allocated_bytes() - before)
    assert (tmp_path / "a.parquet").stat().st_size > 96_000_000
    assert most < 40_000_000
