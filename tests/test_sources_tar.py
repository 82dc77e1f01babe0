"""WebDataset archives, written by the webdataset library."""

import io
import json
import tarfile
import tracemalloc

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from drawn_images import assert_holds, build, picture, pictures
from webdataset.tariterators import group_by_keys, tar_file_expander

from clipbranches_widget.errors import CatalogError, ImageReadError
from clipbranches_widget.images import load
from clipbranches_widget.json_columns import JsonColumns
from clipbranches_widget.sources import image_source

N = 30


@pytest.fixture(scope="module")
def images():
    return pictures(N)


def write_tar(path, samples):
    with webdataset.TarWriter(str(path)) as sink:
        for sample in samples:
            sink.write(sample)


def sample(number, data):
    said = {
        "price": number / 2,
        "n": number,
        "width": 512,
        "exif": {"iso": 100},
        "tags": ["a", "b"],
    }
    if number == 4:
        said["license"] = "CC0"
    return {
        "__key__": f"sample{number:06d}",
        "png": data,
        "txt": f"caption {number}",
        "json": said,
        "cls": number % 3,
    }


@pytest.fixture
def shards(tmp_path, images):
    """Return a folder of 3 archives of 10 samples each, the last one compressed."""
    for shard in range(3):
        numbers = range(shard * 10, shard * 10 + 10)
        name = f"train-{shard:04d}.tar" + (".gz" if shard == 2 else "")
        write_tar(tmp_path / name, [sample(number, images[number]) for number in numbers])
    return tmp_path


@pytest.mark.parametrize("form", ["folder", "pattern", "list", "memory"])
def test_samples(shards, tmp_path, images, form, tmp_path_factory):
    files = [*(f"{shards}/train-{i:04d}.tar" for i in range(2)), f"{shards}/train-0002.tar.gz"]
    if form == "memory":
        fsspec.filesystem("memory").put(files, [f"/tars/{f.rpartition('/')[2]}" for f in files])
    source = {
        "folder": shards,
        "pattern": f"{shards}/train-*",
        "list": files,
        "memory": "memory://tars",
    }[form]
    catalog = build(source, tmp_path_factory.mktemp("out") / "a.cbcat", rows_per_shard=17)
    assert_holds(catalog, images)
    items = catalog.items
    assert items.column("caption").to_pylist() == [f"caption {i}" for i in range(N)]
    assert items.column("key").to_pylist() == [f"sample{i:06d}" for i in range(N)]
    assert items.column("price").to_pylist() == [i / 2 for i in range(N)]
    assert items.schema.field("n").type == pa.int64()
    assert items.column("cls").to_pylist() == [i % 3 for i in range(N)]
    assert items.column("tags").to_pylist() == [["a", "b"]] * N
    assert items.column("exif").to_pylist() == ['{"iso": 100}'] * N
    assert items.column("license").to_pylist() == [None] * 4 + ["CC0"] + [None] * 25
    assert items.column("source_width").to_pylist() == [512] * N
    place = "memory://tars" if form == "memory" else shards
    assert catalog.uri(13).replace(":///", "://") == (
        f"tar://sample000013.png::{place}/train-0001.tar".replace(":///", "://")
    )
    with fsspec.open(catalog.uri(13)) as file:  # anybody can
        assert file.read() == images[13]


def test_the_reference_reader_sees_the_same(shards, images):
    source = image_source(f"{shards}/train-{{0000..0001}}.tar")
    ours = [(row["key"], row["caption"]) for c in source.chunks() for row in c.table.to_pylist()]
    theirs = []
    for shard in range(2):
        with (shards / f"train-{shard:04d}.tar").open("rb") as stream:
            files = tar_file_expander([{"url": "", "stream": stream}])
            theirs += [(row["__key__"], row["txt"].decode()) for row in group_by_keys(files)]
    assert ours == theirs


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["json 0", "json 1"]),
        ({"caption_column": "alt.txt"}, ["alt 0", "alt 1"]),
        ({"caption_column": "title"}, ["title 0", "title 1"]),
    ],
)
def test_which_caption(tmp_path, images, options, expected):
    samples = [
        {
            "__key__": f"a/{i}",
            "png": images[i],
            "alt.txt": f"alt {i}",
            "json": {"caption": f"json {i}", "title": f"title {i}"},
        }
        for i in range(2)
    ]
    write_tar(tmp_path / "a.tar", samples)
    catalog = build(tmp_path / "a.tar", tmp_path / "a.cbcat", **options)
    assert catalog.items.column("caption").to_pylist() == expected
    assert catalog.items.column("key").to_pylist() == ["a/0", "a/1"]


def test_several_images_a_sample(tmp_path, images):
    samples = [
        {"__key__": str(i), "input.png": images[i], "output.png": images[10 + i]} for i in range(3)
    ]
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(
        CatalogError, match=r"sample '0' of .*a\.tar, found input\.png, output\.png"
    ):
        image_source(tmp_path / "a.tar")
    catalog = build(tmp_path / "a.tar", tmp_path / "a.cbcat", image_column="output.png")
    assert_holds(catalog, images[10:13])
    with pytest.raises(CatalogError, match=r"expected images in .* and none called \.mask\.png"):
        image_source(tmp_path / "a.tar", image_column="mask.png")
    with pytest.raises(
        CatalogError, match=r"captions in 'title' of .*: name an extension \(\.input"
    ):
        image_source(tmp_path / "a.tar", image_column="input.png", caption_column="title")


def test_samples_without_an_image_are_passed_over(tmp_path, images, caplog):
    samples = [{"__key__": "0", "txt": "lost"}, {"__key__": "1", "png": images[1]}]
    write_tar(tmp_path / "a.tar", samples)
    caplog.set_level("WARNING", logger="clipbranches_widget")
    catalog = build(tmp_path / "a.tar", tmp_path / "a.cbcat")
    assert_holds(catalog, images[1:2])
    assert catalog.caption(0) == "1"
    assert "passed over 1 samples without an image" in caplog.text


def test_files_that_are_not_samples(tmp_path, images):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in [
            ("README", b"about"),
            ("__meta__.json", b"{}"),
            ("x/.hidden.png", images[0]),
            ("x/a b.PNG", images[1]),
            ("x/a b.json", b"not JSON"),
            ("y/c.jpg", b"no image"),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    catalog = build(tmp_path / "a.tar", tmp_path / "a.cbcat")
    assert_holds(catalog, images[1:2])
    assert catalog.caption(0) == "a b"
    assert catalog.skipped.column("uri").to_pylist() == [f"tar://y/c.jpg::{tmp_path}/a.tar"]


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_a_damaged_archive_is_found_before_the_work(tmp_path, images, kind):
    file = tmp_path / f"a.{kind}"
    write_tar(file, [sample(number, images[number]) for number in range(9)])
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(CatalogError, match=rf"a\.{kind}: expected a whole tar archive"):
        image_source(file)
    file.write_bytes(b"not a tar at all")
    with pytest.raises(CatalogError, match="expected a whole tar archive"):
        image_source(file)


def test_an_archive_without_images(tmp_path):
    write_tar(tmp_path / "a.tar", [{"__key__": "0", "txt": "x", "npy": np.eye(2)}])
    with pytest.raises(
        CatalogError, match=r"expected images in .*, found files ending in \.npy, \.txt"
    ):
        image_source(tmp_path / "a.tar")


def test_an_archive_that_changed_or_went(tmp_path, images):
    write_tar(tmp_path / "a.tar", [sample(i, images[i]) for i in range(2)])
    uri = f"tar://sample000001.png::{tmp_path}/a.tar"
    assert load(uri).image.size == (17, 13)
    write_tar(tmp_path / "a.tar", [sample(i, images[i + 5]) for i in range(9)])
    assert load(uri).content_hash == load("x", data=images[6]).content_hash
    with pytest.raises(ImageReadError, match="no such file in the archive"):
        load(f"tar://none.png::{tmp_path}/a.tar")
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ImageReadError, match=r"a\.tar: .*No such file"):
        load(uri)
    with pytest.raises(ImageReadError, match="expected tar://FILE::ARCHIVE, got no archive"):
        load("tar://none.png")


def test_a_tar_beside_its_table_of_contents(tmp_path, images):
    """What img2dataset writes: 00000.tar, 00000.parquet, 00000_stats.json."""
    for part in range(2):
        write_tar(tmp_path / f"{part:05d}.tar", [sample(part, images[part])])
        pq.write_table(pa.table({"url": ["x"]}), tmp_path / f"{part:05d}.parquet")
        (tmp_path / f"{part:05d}_stats.json").write_text("{}")
    assert_holds(build(tmp_path, tmp_path / "a.cbcat"), images[:2])
    (tmp_path / "00001.parquet").unlink()
    with pytest.raises(CatalogError, match=r"files of one kind in .*2 \.tar, 1 \.parquet"):
        image_source(tmp_path)


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_an_archive_is_not_read_into_memory(tmp_path, rng, kind):
    """An archive of 80 MB of images is handed out while less than 10 MB are in memory."""
    write_tar(
        tmp_path / f"a.{kind}",
        ({"__key__": str(i), "png": picture(i) + rng.bytes(2_000_000)} for i in range(40)),
    )
    tracemalloc.start()
    try:
        source = image_source(tmp_path / f"a.{kind}")
        for chunk in source.chunks():
            for image in chunk.images:
                assert len(image() if callable(image) else image) > 2_000_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10_000_000


def test_names_and_texts_that_are_not_unicode(tmp_path, images):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="latin-1") as tar:
        for name, data in [
            ("caf\xe9.png", images[0]),
            ("caf\xe9.txt", b"a \xff caption"),
            ("caf\xe9.json", b'{"half": "\\ud800", "list": ["\\ud800"]}'),
            ("b.png", images[1]),
            ("b.json", b'{"caption": "\\ud800 b"}'),
        ]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    catalog = build(tmp_path / "a.tar", tmp_path / "a.cbcat")
    assert_holds(catalog, images[:2])
    assert catalog.items.column("caption").to_pylist() == ["a \ufffd caption", "? b"]
    assert catalog.items.column("half").to_pylist() == ["?", None]
    assert catalog.items.column("list").to_pylist() == ['["?"]', None]


def columns_of(lines):
    columns = JsonColumns()
    for line in lines:
        columns.append(line)
    return columns.table()


def test_json_fields_become_the_narrowest_columns(monkeypatch):
    lines = [
        {"a": 1, "b": 1, "c": "x", "d": None, "e": True, "f": [1], "width": 3, "g": 2**70},
        {"a": 2, "b": 2.5, "c": 7, "d": None, "e": False, "f": [2, 3], "h": {"x": 1}},
        {"a": None, "b": None, "c": ["y"], "e": None, "f": [], "g": "é"},
    ]
    for rows in (16_384, 1):  # in one block, and joined from blocks
        monkeypatch.setattr("clipbranches_widget.json_columns._BLOCK_ROWS", rows)
        table = columns_of(lines)
        assert table.to_pydict() == {
            "a": [1, 2, None],
            "b": [1.0, 2.5, None],
            "c": ["x", "7", '["y"]'],
            "d": [None] * 3,
            "e": [True, False, None],
            "f": [[1], [2, 3], []],
            "source_width": [3, None, None],
            "g": [str(2**70), None, "é"],
            "h": [None, '{"x": 1}', None],
        }
        assert table.schema.field("a").type == pa.int64()
        assert table.schema.field("b").type == pa.float64()
        assert table.schema.field("e").type == pa.bool_()
    assert json.loads(table.column("h")[1].as_py()) == {"x": 1}
