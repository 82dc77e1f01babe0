"""Where images are: folders, patterns, zip archives, memory, a web server; and what is refused."""

import functools
import http.server
import io
import sys
import threading
import zipfile

import fsspec
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from drawn_images import assert_holds, build, pictures
from hypothesis import given
from hypothesis import strategies as st

import clipbranches_widget as cb
from clipbranches_widget.archives import member_uri
from clipbranches_widget.cli import main
from clipbranches_widget.errors import CatalogError, ImageReadError, MissingPackageError
from clipbranches_widget.images import load
from clipbranches_widget.remote import expand_braces, join, matches, numbered, parent, tree
from clipbranches_widget.sources import find, image_source


@pytest.fixture(scope="module")
def images():
    return pictures(12)


@pytest.fixture
def photos(tmp_path, images):
    """Return a folder with 12 pictures in a tree, hidden files and a text."""
    folder = tmp_path / "photos"
    for number, data in enumerate(images):
        place = folder / f"{'abc'[number % 3]}" / f"red panda_{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    (folder / "a" / ".hidden.png").write_bytes(images[0])
    (folder / ".trash").mkdir()
    (folder / ".trash" / "x.png").write_bytes(images[0])
    (folder / "notes.txt").write_text("no image")
    return folder


def in_order(folder, images):
    """Return the pictures of `photos` in the order of their paths."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.glob("[abc]/red*"))
    return [images[int(name.rpartition("_")[2].removesuffix(".png"))] for name in names]


@pytest.fixture
def memory():
    """Return fsspec's file system in memory, empty."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


@pytest.fixture
def server(photos):
    """Serve `photos` at a port of this machine; yields its address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(photos))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_a_pattern_of_images(tmp_path, photos, images):
    catalog = build(f"{photos}/a/*.png", tmp_path / "a.cbcat")
    assert_holds(catalog, [images[number] for number in (0, 3, 6, 9)])
    assert image_source(f"{photos}/**/*.png").n_images == 12
    assert image_source(f"{photos}/{{a,c}}/*_1?.png").n_images == 1
    with pytest.raises(CatalogError, match=r"expected files that match .*\*\.bmp, found none"):
        image_source(f"{photos}/*.bmp")


def test_a_folder_whose_name_looks_like_a_pattern(tmp_path, photos, images):
    odd = photos.rename(tmp_path / "photos [2024] {a,b}")
    assert_holds(build(str(odd), tmp_path / "a.cbcat"), in_order(odd, images))


@pytest.mark.parametrize("form", ["folder", "slash", "pattern", "list"])
def test_memory(tmp_path, photos, images, memory, form):
    memory.put(str(photos), "/album", recursive=True)
    names = sorted(path.relative_to(photos).as_posix() for path in photos.glob("[abc]/red*"))
    source = {
        "folder": "memory://album",
        "slash": "memory://album/",
        "pattern": "memory://album/**/red*.png",
        "list": [f"memory://album/{name}" for name in names],
    }[form]
    catalog = build(source, tmp_path / "a.cbcat")
    expected = in_order(photos, images)
    if form == "pattern":  # in the order of the numbers
        assert sorted(catalog.items.column("uri").to_pylist(), key=numbered) == (
            catalog.items.column("uri").to_pylist()
        )
        assert len(catalog) == 12
    else:
        assert_holds(catalog, expected)
        assert catalog.caption(0) == "red panda 0"
        assert catalog.uri(0) == "memory://album/a/red panda_0.png"
    memory.rm("/album", recursive=True)
    with pytest.raises(ImageReadError, match=r"image of row 0: memory://.*: no such file"):
        catalog.image(0)
    assert catalog.thumbnail(0)[8:12] == b"WEBP"


@pytest.mark.parametrize("form", ["file", "memory", "inside", "pattern"])
def test_a_zip_archive(tmp_path, photos, images, memory, form):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(photos.rglob("*.png")):
            archive.write(path, path.relative_to(tmp_path).as_posix())
        archive.writestr("__MACOSX/photos/a/red panda_0.png", images[5])
        archive.writestr("read.me", "no image")
    (tmp_path / "photos.zip").write_bytes(buffer.getvalue())
    memory.pipe("/photos.zip", buffer.getvalue())
    place = f"{tmp_path}/photos.zip"
    source, expected = {
        "file": (place, in_order(photos, images)),
        "memory": ("memory://photos.zip", in_order(photos, images)),
        "inside": (f"zip://photos/b::{place}", [images[number] for number in (1, 10, 4, 7)]),
        "pattern": (f"zip://photos/a/*.png::{place}", [images[number] for number in (0, 3, 6, 9)]),
    }[form]
    catalog = build(source, tmp_path / "a.cbcat")
    assert_holds(catalog, expected)
    assert catalog.caption(0).startswith("red panda")
    with fsspec.open(catalog.uri(2)) as file:  # anybody can
        assert file.read() == expected[2]
    with pytest.raises(ImageReadError, match="no such file in the archive"):
        load(member_uri("zip", "none.png", place))


def test_tables_and_data_in_a_zip_archive(tmp_path, images):
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(tmp_path / "a.parquet", "a.parquet")
    catalog = build(tmp_path / "a.zip", tmp_path / "a.cbcat")
    assert_holds(catalog, images)
    assert catalog.uri(3) == f"parquet://image/3::zip://a.parquet::{tmp_path}/a.zip"


def test_a_damaged_zip_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK no archive")
    with pytest.raises(CatalogError, match=r"a\.zip: cannot be listed"):
        image_source(tmp_path / "a.zip")
    with pytest.raises(ImageReadError, match="cannot be read"):
        load(f"zip://a.png::{tmp_path}/a.zip")


def test_a_web_server(tmp_path, images, server):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    urls = [f"{server}/{'abc'[i % 3]}/red%20panda_{i}.png" for i in range(12)]
    table = pd.DataFrame({"path": [*urls, f"{server}/none.png"], "n": range(13)})
    catalog = build(table, tmp_path / "a.cbcat")
    assert_holds(catalog, images)
    assert catalog.items.column("n").to_pylist() == list(range(12))
    assert catalog.skipped.to_pylist() == [
        {"uri": f"{server}/none.png", "reason": f"{server}/none.png: no such file"}
    ]
    assert catalog.caption(10) == "red panda 10"
    listed = build(f"{server}/b/", tmp_path / "d.cbcat")  # by the links of the server's page
    assert_holds(listed, [images[number] for number in (1, 10, 4, 7)])
    many = build([f"{url}?{again}" for again in range(20) for url in urls], tmp_path / "c.cbcat")
    assert_holds(many, images * 20, readable=False)
    one = build(f"{urls[4]}?size=small", tmp_path / "b.cbcat")
    assert_holds(one, images[4:5])


def test_remote_images_are_fetched_many_at_a_time(tmp_path, images):
    """The server answers only when eight requests are there."""
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    together = threading.Barrier(8, timeout=30)

    class Patient(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            together.wait()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(images[int(self.path.rpartition("/")[2])])

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Patient) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        urls = [f"http://127.0.0.1:{running.server_port}/{number}" for number in range(8)]
        try:
            catalog = build(urls, tmp_path / "a.cbcat")
        finally:
            running.shutdown()
            thread.join()
    assert_holds(catalog, images[:8], readable=False)


def test_a_table_on_a_web_server(tmp_path, images, photos, server):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    pq.write_table(pa.table({"image": images}), photos / "a.parquet")
    catalog = build(f"{server}/a.parquet", tmp_path / "a.cbcat")
    assert_holds(catalog, images)


def test_a_server_that_is_not_there(tmp_path, images):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    with pytest.raises(ImageReadError, match=r"127.0.0.1:9/a.png: cannot be read"):
        load("http://127.0.0.1:9/a.png")
    with pytest.raises(CatalogError, match="at least one readable image, got 1 that are not"):
        build(["http://127.0.0.1:9/a.png"], tmp_path / "a.cbcat")


@pytest.mark.parametrize(
    ("url", "package"),
    [
        ("s3://bucket/photos", "s3fs"),
        ("gs://bucket/a.parquet", "gcsfs"),
        ("http://127.0.0.1:9/a.parquet", "aiohttp"),
        ("zip://a::s3://bucket/a.zip", "s3fs"),
    ],
)
def test_a_driver_that_is_missing_is_named_with_its_command(monkeypatch, url, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    for protocol in ("s3", "gs", "http"):  # forget the drivers that other tests loaded
        known = sys.modules["fsspec.registry"]._registry
        monkeypatch.delitem(known, protocol, raising=False)
    with pytest.raises(MissingPackageError, match=f"pip install {package}"):
        image_source(url)
    with pytest.raises(MissingPackageError, match=f"pip install {package}"):
        load(url.replace("zip://a::", ""))


@pytest.mark.parametrize("url", ["ssh://host/a.png", "simplecache::ssh://host/a.png", "xy://a.png"])
def test_other_protocols_are_refused(tmp_path, url):
    with pytest.raises(CatalogError, match=r"expected a path or a URL of .*zip, got"):
        image_source(url.replace("simplecache::", ""))
    with pytest.raises(CatalogError, match=r"expected a path or a URL of .* as entry 0, got"):
        image_source([url.replace("simplecache::", "")])
    with pytest.raises(ImageReadError, match=r"no such file|expected a path or a URL"):
        load(url)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["a.png", "a.parquet"],
            r"files of one kind in .*, found 1 \.png, 1 \.parquet: pass a pat",
        ),
        (["a.tar", "b.parquet"], r"files of one kind in .*, found 1 \.tar, 1 \.parquet"),
        (["a.txt", "b/c.csv"], r"expected images in .*, found no file .*, but 1 \.txt, 1 \.csv"),
        (["catalog.json"], "expected images in .*, found a catalog: open it with open"),
        (["a.npy"], "found NumPy files: give them to from_embeddings"),
        (["img_emb/img_emb_0.npy"], "found output of clip-retrieval: give them to from_embeddings"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(CatalogError, match=message):
        image_source(tmp_path)


def test_options_without_a_meaning_are_refused(tmp_path, photos):
    with pytest.raises(CatalogError, match="image_column only for tables, tars and data sets, got"):
        image_source(photos, image_column="x")
    with pytest.raises(CatalogError, match="expected items and check_order only with embeddings"):
        build(photos, tmp_path / "a.cbcat", check_order=32)
    with pytest.raises(CatalogError, match="got an empty text"):
        find("")


def test_images_win_over_archives_that_lie_deeper(photos):
    (photos / "a" / "backup.tar").touch()
    assert image_source(photos).n_images == 12


@pytest.mark.parametrize("kind", ["folder", "parquet", "embeddings"])
def test_the_command_takes_the_same(tmp_path, photos, images, capsys, kind):
    target = tmp_path / "a.cbcat"
    encoder = cb.bundled_encoder()
    paths = [f"{photos}/{'abc'[i % 3]}/red panda_{i}.png" for i in range(12)]
    pq.write_table(
        pa.table({"photo": paths, "said": [f"s{i}" for i in range(12)]}), tmp_path / "a.pq"
    )
    command = ["index", {"folder": str(photos)}.get(kind, f"{tmp_path}/a.pq"), str(target)]
    columns = ["--image-column", "photo", "--caption-column", "said"]
    if kind == "embeddings":
        rows = encoder.encode_images([load(path).image for path in paths])
        np.save(tmp_path / "a.npy", rows)
        command[1] = f"{tmp_path}/a.npy"
        columns += ["--items", f"{tmp_path}/a.pq", "--check-order", "8"]
    command += [] if kind == "folder" else columns
    assert main([*command, "--demo-encoder", "--quiet", "--no-map"]) == 0
    assert "12 images, clipbranches-demo" in capsys.readouterr().out
    catalog = cb.open(target)
    assert catalog.caption(11) == ("red panda 8" if kind == "folder" else "s11")
    assert catalog.image(0).mode == "RGB"
    if kind == "embeddings":
        np.save(tmp_path / "a.npy", np.roll(rows, 2, axis=0))
        command[2] = str(tmp_path / "b.cbcat")
        assert main([*command, "--demo-encoder", "--quiet", "--no-map"]) == 1
        assert "shifted by -2 rows" in capsys.readouterr().err
        assert main([*command, "--quiet"]) == 1
        assert "which model made the embeddings" in capsys.readouterr().err


names = st.text("ab01_-. /{},", min_size=1, max_size=12)


@given(st.lists(names, max_size=8))
def test_numbered_is_an_order(texts):
    once = sorted(texts, key=numbered)
    assert [numbered(text) for text in once] == sorted(map(numbered, texts))
    assert numbered("1²2") != numbered("1²3")
    digits = [f"part-{number}.tar" for number in range(0, 120, 7)]
    assert sorted(sorted(digits), key=numbered) == digits


@given(names)
def test_braces_are_written_out_or_left(text):
    found = expand_braces(text)
    assert found
    if "{" not in text or "}" not in text:
        assert found == [text]


@given(st.sampled_from(["/a/b", "zip://a::/x.zip", "zip://::/x.zip", "s3://b/k"]), st.just("c.jpg"))
def test_parent_undoes_join(folder, name):
    assert parent(join(folder, name)) == folder


def test_what_is_not_there_has_no_files(tmp_path, memory):
    assert tree(str(tmp_path / "none")) == tree("memory://none") == []
    assert matches(f"{tmp_path}/*.png") == []
    assert matches("a{1..3}.tar") == ["a1.tar", "a2.tar", "a3.tar"]
    with pytest.raises(CatalogError, match="expected images in memory://none, found no file"):
        image_source("memory://none")
