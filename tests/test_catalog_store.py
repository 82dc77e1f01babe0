"""Catalogs at URLs: fetched whole and once, put in place whole or not at all, never changed."""

import http.server
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import fsspec
import pytest
from word_encoder import build_catalog

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_append import append, append_embeddings
from clipbranches_widget.catalog_compact import compact
from clipbranches_widget.catalog_remove import remove
from clipbranches_widget.catalog_store import copy_catalog
from clipbranches_widget.column_rebuild import rebuild_columns
from clipbranches_widget.errors import (
    CatalogCorruptError,
    CatalogError,
    CatalogExistsError,
    CatalogNotFoundError,
    MissingPackageError,
)
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.map_build import build_map

PROGRAM = """
import sys
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_store import copy_catalog
if sys.argv[1] == "open":
    print(len(Catalog.open(sys.argv[2])))
else:
    copy_catalog(sys.argv[2], sys.argv[3])
"""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Return the folder that the catalogs of this test are fetched to."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda name: str(folder / name))
    return folder / "clipbranches_widget" / "catalogs"


@pytest.fixture
def memory():
    """Return the URL of a bucket in memory, empty again afterwards."""
    yield "memory://bucket"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/bucket"):
        filesystem.rm("/bucket", recursive=True)


@pytest.fixture
def catalog(tmp_path):
    return build_catalog(tmp_path / "a.cbcat", 60)


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; takes files, too."""

    def do_GET(self):
        self.server.read.append(self.path)
        super().do_GET()

    def do_POST(self):
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.server.written.append(self.path)
        if self.server.accepts(self.path):
            file = Path(self.translate_path(self.path))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            self.send_response(201)
        else:
            self.send_response(507)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp", reason="fsspec reads http with it")
    shown = tmp_path / "www"
    shown.mkdir()

    def handler(*request):
        return Server(*request, directory=str(shown))

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.read, running.written, running.accepts = [], [], lambda _: True
        running.folder, running.url = shown, f"http://127.0.0.1:{running.server_port}"
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def content(folder):
    """Return all files below a folder, by their names."""
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def program(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_built_at_a_url(memory, cache, tmp_path):
    url = f"{memory}/deep/b.cbcat"
    built = build_catalog_at(url)
    assert len(built) == 60
    built.verify()
    filesystem = fsspec.filesystem("memory")
    there = {
        name.removeprefix("/bucket/deep/b.cbcat/"): filesystem.cat_file(name)
        for name in filesystem.find("/bucket/deep/b.cbcat")
    }
    assert there == content(built.path)
    assert cache in built.path.parents
    before = built.path.stat().st_ino
    assert Catalog.open(url).path.stat().st_ino == before
    with pytest.raises(CatalogExistsError, match="a catalog is there: open it with"):
        build_catalog_at(url)


def build_catalog_at(url):
    """Build the catalog of `word_encoder` at a URL."""
    import numpy as np
    from word_encoder import WordEncoder, captions

    vectors = WordEncoder().encode_text([text[:200] for text in captions(60)])
    return from_embeddings(vectors + np.float32(0), url)


def test_a_local_url_is_a_path(catalog, tmp_path, cache):
    opened = Catalog.open(catalog.path.as_uri())
    assert opened.path == catalog.path
    built = build_catalog_at((tmp_path / "c.cbcat").as_uri())
    assert built.path == tmp_path / "c.cbcat"
    assert not cache.exists()


def test_fetched_once_and_then_what_is_new(catalog, server, rng):
    url = f"{server.url}/a.cbcat"
    copy_catalog(catalog.path, server.folder / "a.cbcat")
    first = Catalog.open(url)
    assert content(first.path) == content(catalog.path)
    first.verify()
    n_files = len(content(catalog.path))
    assert len([path for path in server.read if not path.endswith("catalog.json")]) == n_files - 1
    server.read.clear()
    assert Catalog.open(f"{url}/").path == first.path
    assert server.read == ["/a.cbcat/catalog.json"]
    append_embeddings(server.folder / "a.cbcat", rng.standard_normal((9, catalog.dim)))
    server.read.clear()
    second = Catalog.open(url)
    assert (len(first), len(second)) == (60, 69)
    assert {path.split("/")[2] for path in server.read} == {"catalog.json", "shards"}
    assert all(path.startswith("/a.cbcat/shards/0001") for path in server.read[1:])
    second.verify()
    assert content(first.path) == content(catalog.path)


def test_two_processes_fetch_at_the_same_time(catalog, server, cache):
    copy_catalog(catalog.path, server.folder / "a.cbcat")
    running = [program("open", f"{server.url}/a.cbcat") for _ in range(2)]
    said = [each.communicate() for each in running]
    assert [out for out, _ in said] == ["60\n", "60\n"], said
    pieces = [path for path in server.read if not path.endswith("catalog.json")]
    assert len(pieces) == len(set(pieces))
    (place,) = cache.iterdir()
    assert sorted(entry.name for entry in place.iterdir() if entry.is_file()) == [
        "fetch.lock",
        "origin.json",
    ]


@pytest.mark.parametrize("name", ["columns.npz", "shards/0000/embeddings.npy", "catalog.json"])
@pytest.mark.parametrize("how", ["damaged", "cut", "gone"])
def test_what_is_not_whole_is_not_opened(catalog, server, cache, name, how):
    copy_catalog(catalog.path, server.folder / "a.cbcat")
    file = server.folder / "a.cbcat" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    changed = {"damaged": bytes(data), "cut": file.read_bytes()[:-9]}
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(changed[how])
    expected = CatalogError if how == "gone" else CatalogCorruptError
    with pytest.raises(expected, match=rf"a\.cbcat.*({name}|found none)"):
        Catalog.open(f"{server.url}/a.cbcat")
    left = [path for path in cache.rglob("*") if path.is_file()]
    assert {path.name for path in left} <= {"origin.json", "fetch.lock"}


def test_no_catalog_no_driver_no_server(memory):
    with pytest.raises(CatalogNotFoundError, match=r"catalog\.json\) at memory://bucket/none"):
        Catalog.open(f"{memory}/none")
    with pytest.raises(CatalogError, match="cannot be read"):
        Catalog.open("http://127.0.0.1:1/a.cbcat")
    with pytest.raises((CatalogError, MissingPackageError), match="abfs"):
        Catalog.open("abfs://container/a.cbcat")


def test_a_failed_upload_leaves_no_catalog(catalog, server):
    server.accepts = lambda path: "codes" not in path
    url = f"{server.url}/b.cbcat"
    with pytest.raises(CatalogError, match=r"codes\.npy: cannot be written"):
        copy_catalog(catalog.path, url)
    assert not (server.folder / "b.cbcat" / "catalog.json").exists()
    with pytest.raises(CatalogNotFoundError, match="found none"):
        Catalog.open(url)
    server.accepts = lambda _: True
    copy_catalog(catalog.path, url)
    assert server.written[-1] == "/b.cbcat/catalog.json"
    assert content(Catalog.open(url).path) == content(catalog.path)


def test_a_killed_upload_leaves_no_catalog(catalog, server):
    url = f"{server.url}/b.cbcat"
    halfway, proceed = threading.Event(), threading.Event()

    def accepts(path):
        if "codes" in path:
            halfway.set()
            proceed.wait(60)
        return True

    server.accepts = accepts
    running = program("put", catalog.path, url)
    assert halfway.wait(60)
    running.kill()
    running.communicate()
    proceed.set()
    assert not (server.folder / "b.cbcat" / "catalog.json").exists()
    with pytest.raises(CatalogNotFoundError, match="found none"):
        Catalog.open(url)
    copy_catalog(catalog.path, url)
    assert content(Catalog.open(url).path) == content(catalog.path)


def test_a_failed_upload_clears_away_what_it_can(catalog, memory, monkeypatch):
    filesystem = fsspec.filesystem("memory")
    monkeypatch.setattr(type(filesystem), "put_file", refusing(type(filesystem).put_file))
    with pytest.raises(CatalogError, match="cannot be written: disk full"):
        copy_catalog(catalog.path, f"{memory}/b.cbcat")
    assert filesystem.find("/bucket") == []


def refusing(put_file):
    """Return a `put_file` of a store that has no room for the manifest."""

    def put(self, local, remote, **options):
        if remote.endswith("catalog.json"):
            raise OSError("disk full")
        return put_file(self, local, remote, **options)

    return put


def test_copies_between_all_places(catalog, memory, tmp_path):
    places = [catalog.path, f"{memory}/b.cbcat", tmp_path / "c.cbcat", tmp_path / "d.cbcat"]
    for source, target in pairwise(places):
        copy_catalog(source, target, progress=False)
        assert content(Catalog.open(target).path) == content(catalog.path)
    copy_catalog(f"{memory}/b.cbcat", f"{memory}/e.cbcat")
    for target in (f"{memory}/b.cbcat", tmp_path / "c.cbcat"):
        with pytest.raises(CatalogExistsError, match="expected nothing at"):
            copy_catalog(catalog.path, target)
    fsspec.filesystem("memory").pipe_file("/bucket/other/notes.txt", b"mine")
    with pytest.raises(CatalogExistsError, match=r"found notes\.txt: choose another"):
        copy_catalog(catalog.path, f"{memory}/other")
    (catalog.path / "columns.npz").write_bytes(b"damaged")
    with pytest.raises(CatalogCorruptError, match=r"columns\.npz"):
        copy_catalog(catalog.path, f"{memory}/f.cbcat")
    with pytest.raises(CatalogNotFoundError, match="found none"):
        Catalog.open(f"{memory}/f.cbcat")


@pytest.mark.parametrize(
    "change",
    [
        lambda catalog: append(catalog, ["/nowhere/x.png"]),
        lambda catalog: append_embeddings(catalog, [[1.0] * 48]),
        lambda catalog: remove(catalog, [1]),
        compact,
        build_map,
        lambda catalog: rebuild_columns(getattr(catalog, "path", catalog), columns="codes"),
    ],
)
def test_what_is_at_a_url_is_not_changed(catalog, memory, change, tmp_path):
    url = f"{memory}/b.cbcat"
    copy_catalog(catalog.path, url)
    opened = Catalog.open(url)
    for given in (url, opened):
        with pytest.raises(CatalogError, match="not changed in place: copy it"):
            change(given)
    opened.verify()
    assert content(opened.path) == content(catalog.path)


def test_workers_need_a_folder(memory):
    with pytest.raises(CatalogError, match="expected a folder that all workers see, got memory://"):
        from_embeddings([[1.0, 0.0]], f"{memory}/a.cbcat", client="any")
