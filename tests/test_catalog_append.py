"""Appending to a catalog: what is added and left out, two writers, readers, columns, kills."""

import gc
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from drawn_images import DIM, TileEncoder, assert_holds, build, picture, pictures
from hypothesis import given, settings
from hypothesis import strategies as st

import clipbranches_widget as cb
from clipbranches_widget import catalog_append, catalog_change, catalog_lock
from clipbranches_widget.catalog_lock import only_writer
from clipbranches_widget.cli import main
from clipbranches_widget.errors import CatalogCorruptError, CatalogError, EncoderError, QueryError
from clipbranches_widget.integrity import read_manifest


def write(folder, numbers):
    """Write pictures into a folder, named by their numbers; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number:03d}.png").write_bytes(picture(number))
    return folder


def add(catalog, source, **options):
    return cb.append(catalog, source, encoder=TileEncoder(), progress=False, **options)


def files(folder):
    """Return what tells whether a file was rewritten, by its path."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name != "catalog.json"
    }


def strays(folder):
    """Return what lies in a catalog's folder and is no part of the catalog."""
    manifest = read_manifest(folder)
    listed = {"catalog.json", *manifest.pieces}
    listed |= {f"{one.folder}/{name}" for one in manifest.shards for name in one.pieces}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return there - listed


@pytest.fixture
def grown(tmp_path):
    """Return the folder of a catalog of pictures 0 to 4."""
    return build(write(tmp_path / "first", range(5)), tmp_path / "a.cbcat").path


def test_only_new_images_are_added_and_nothing_is_rewritten(grown, tmp_path):
    before, reader = files(grown), cb.open(grown)
    more = write(tmp_path / "more", [3, 5, 6])
    (more / "007.png").write_bytes(b"no image")
    (more / "copy.png").write_bytes(picture(5))
    added = add(grown, more)
    assert (added.n_added, added.first_row) == (2, 5)
    assert str(added) == "2 images added from row 5 on, 3 left out"
    uris, reasons = added.skipped.to_pydict().values()
    assert [Path(uri).name for uri in uris] == ["003.png", "007.png", "copy.png"]
    assert reasons[0] == "already in the catalog as row 3"
    assert "not an image" in reasons[1]
    assert reasons[2] == "already in the catalog as row 5"
    assert_holds(added.catalog, pictures(7))
    assert cb.open(grown).skipped.equals(added.skipped)
    after = files(grown)
    assert {path: after[path] for path in before} == before
    assert not strays(grown)
    assert len(reader) == 5  # what was open goes on as it was
    assert reader.items.num_rows == 5
    reader.verify()


def test_the_decoders_and_the_model_see_only_what_is_new(grown, tmp_path):
    seen = []

    class Watching(TileEncoder):
        def preprocess(self, image):
            seen.append("decoded")
            return super().preprocess(image)

        def encode_tensors(self, tensors):
            seen.extend("embedded" for _ in tensors)
            return super().encode_tensors(tensors)

    more = write(tmp_path / "more", [0, 1, 2, 3, 4, 5])
    cb.append(grown, more, encoder=Watching(), progress=False)
    assert sorted(seen) == ["decoded", "embedded"]


def test_nothing_new_changes_nothing(grown, tmp_path):
    before = (grown / "catalog.json").read_bytes()
    added = add(cb.open(grown), tmp_path / "first")
    assert (added.n_added, added.first_row, len(added.skipped)) == (0, 5, 5)
    assert (grown / "catalog.json").read_bytes() == before
    assert not strays(grown)


def test_the_same_folder_keeps_short_paths_and_another_gets_whole_ones(grown, tmp_path):
    write(tmp_path / "first", [5])
    add(grown, tmp_path / "first")
    catalog = add(grown, write(tmp_path / "other", [6])).catalog
    assert catalog.uri(5) == "005.png"
    assert catalog.uri(6) == str(tmp_path / "other" / "006.png")
    assert_holds(catalog, pictures(7))


def test_images_that_were_removed_do_not_come_back(grown, tmp_path):
    cb.remove(grown, 2)
    added = add(grown, write(tmp_path / "more", [2, 5]))
    assert added.skipped.column("reason").to_pylist() == ["removed from the catalog as row 2"]
    assert (len(added.catalog), added.catalog.n_present) == (6, 5)


@pytest.fixture
def vectors(rng):
    return rng.standard_normal((60, DIM))


def table(n, start=0):
    rows = range(start, start + n)
    return pd.DataFrame(
        {
            "uri": [f"{row}.png" for row in rows],
            "price": [row / 2 for row in rows],
            "kind": pd.Categorical([["cup", "hat"][row % 2] for row in rows]),
        }
    )


def test_user_columns_fit_or_are_refused(tmp_path, vectors):
    folder = cb.from_embeddings(vectors[:30], tmp_path / "a", items=table(30)).path
    types = cb.open(folder).items.schema
    reordered = table(10, 30)[["kind", "uri", "price"]]
    cb.append_embeddings(folder, vectors[30:40], items=reordered)
    bare = pa.table({"uri": ["x"] * 5, "price": pa.array([1] * 5, pa.int64())})
    catalog = cb.append_embeddings(folder, vectors[40:45], items=bare).catalog
    assert catalog.items.schema.equals(types)
    assert (
        catalog.items.column("price").to_pylist()[28:]
        == [*(r / 2 for r in range(28, 40)), 1] + [1] * 4
    )
    assert catalog.items.column("kind").null_count == 5
    before = (folder / "catalog.json").read_bytes()
    for items, message in (
        (table(5).assign(size=1), r"expected the columns of the catalog \(price, kind\), got also"),
        (table(5).assign(price="dear"), "expected column 'price' to hold double, as in the"),
    ):
        with pytest.raises(CatalogError, match=message):
            cb.append_embeddings(folder, vectors[:5], items=items)
    assert (folder / "catalog.json").read_bytes() == before
    assert not strays(folder)


def test_embeddings_are_compared_by_their_hashes_only(tmp_path, vectors):
    hashed = pa.table({"uri": ["a", "b", "c"], "content_hash": ["h1", "h2", None]})
    folder = cb.from_embeddings(vectors[:3], tmp_path / "a", items=hashed).path
    more = pa.table({"uri": list("defgh"), "content_hash": ["h2", "h3", "h3", None, None]})
    added = cb.append_embeddings(folder, vectors[:5], items=more)
    assert added.n_added == 3
    assert added.catalog.items.column("uri").to_pylist() == list("abcegh")
    assert added.skipped.to_pydict() == {
        "uri": ["d", "f"],
        "reason": ["already in the catalog as row 1", "already in the catalog as row 3"],
    }
    assert cb.append_embeddings(folder, vectors[:5]).n_added == 5


def test_what_cannot_be_appended(grown, tmp_path, vectors):
    other = TileEncoder()
    other.info = replace(other.info, weights_hash="weights-2")
    with pytest.raises(EncoderError, match="expected the encoder of this catalog"):
        cb.append(grown, tmp_path / "first", encoder=other)
    with pytest.raises(CatalogError, match="expected either encoder or device"):
        cb.append(grown, tmp_path / "first", encoder=TileEncoder(), device="cpu")
    with pytest.raises(CatalogError, match="expected embeddings of dim 48, as the catalog's"):
        cb.append_embeddings(grown, vectors[:, :7])
    np.save(tmp_path / "e.npy", vectors)
    with pytest.raises(CatalogError, match=r"found embeddings in .*append_embeddings"):
        add(grown, tmp_path / "e.npy")
    with pytest.raises(CatalogError, match="expected an encoder for check_order"):
        cb.append_embeddings(grown, vectors, check_order=3)
    bare = cb.from_embeddings(vectors, tmp_path / "bare").path
    with pytest.raises(EncoderError, match="made from embeddings alone"):
        cb.append(bare, tmp_path / "first", progress=False)
    assert not strays(grown)
    assert not strays(bare)


def test_the_second_writer_is_told_who_works(grown, tmp_path):
    more = write(tmp_path / "more", [5])
    who = (
        r"expected no other writer on .*a\.cbcat, got compact that runs in process \d+ on .* since"
    )
    with only_writer(grown, "compact"):
        for change in (
            lambda: add(grown, more),
            lambda: cb.remove(grown, 1),
            lambda: cb.compact(grown),
            lambda: cb.rebuild_columns(grown, columns="codes"),
        ):
            with pytest.raises(CatalogError, match=who):
                change()
        assert len(cb.open(grown)) == 5  # reading goes on
    (grown / catalog_lock.LOCK_FILE).write_text("left by a kill")
    assert add(grown, more).n_added == 1


def test_readers_see_the_old_or_the_new_catalog(grown, tmp_path):
    """Open, read and search while a writer appends, removes and compacts, again and again."""
    stop, problems, seen = threading.Event(), [], set()

    def read():
        while not stop.is_set():
            try:
                catalog = cb.open(grown)
                n_rows = len(catalog)
                found = cb.Session(catalog).search(vector=np.ones(DIM), k=50)
                assert len(found) == catalog.n_present
                assert catalog.items.num_rows == n_rows
                assert all(catalog.thumbnail(row) for row in found.rows[:3])
                seen.add(n_rows)
            except Exception as error:
                problems.append(error)
                return

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        for number in range(5, 13):
            add(grown, write(tmp_path / str(number), [number]))
            if number % 3 == 0:
                cb.remove(grown, number)
                cb.compact(grown)
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not problems
    assert len(seen) > 1
    gc.collect()  # the readers' catalogs, which hold old shards
    cb.compact(grown)
    assert not strays(grown)


def test_parts_of_the_column_index_are_those_of_the_catalog(tmp_path, vectors):
    for parts in ("bits", "codes"):
        folder = cb.from_embeddings(vectors[:40], tmp_path / parts, columns=parts).path
        catalog = cb.append_embeddings(folder, vectors[40:]).catalog
        assert catalog.info()["column_parts"] == parts
        full = cb.rebuild_columns(folder)
        assert full.info()["column_parts"] == "full"
        full.verify()


@settings(max_examples=15)
@given(
    n_first=st.integers(1, 40),
    cuts=st.lists(st.integers(1, 59), max_size=6),
    rows_per_shard=st.integers(3, 30),
)
def test_rows_do_not_depend_on_how_they_came(tmp_path_factory, n_first, cuts, rows_per_shard):
    rows = np.random.default_rng(1).standard_normal((60, 6))
    folder = cb.from_embeddings(rows[:n_first], tmp_path_factory.mktemp("c") / "a").path
    bounds = sorted({n_first, 60, *(cut for cut in cuts if cut > n_first)})
    for low, high in pairwise(bounds):
        cb.append_embeddings(folder, rows[low:high], rows_per_shard=rows_per_shard)
    catalog = cb.open(folder)
    whole = cb.from_embeddings(rows, folder.parent / "whole")
    assert catalog.items.column("row").to_pylist() == list(range(60))
    assert np.array_equal(catalog.embeddings, whole.embeddings)
    assert all(shard.n_rows <= max(rows_per_shard, n_first) for shard in catalog.shards)


def test_a_pending_change_of_columns_is_carried_out_first(grown, tmp_path, monkeypatch):
    from clipbranches_widget import column_rebuild

    class KilledError(Exception):
        pass

    def killed(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(column_rebuild, "_finish", killed)
        with pytest.raises(KilledError):
            cb.rebuild_columns(grown, columns="codes")
        patch.undo()
        patch.setattr(column_rebuild, "_move_all", killed)
        with pytest.raises(KilledError):
            cb.rebuild_columns(grown, columns="codes")
    assert (grown / column_rebuild.PENDING_FILE).is_file()
    catalog = add(grown, write(tmp_path / "more", [5])).catalog
    assert catalog.info()["column_parts"] == "codes"
    assert_holds(catalog, pictures(6))
    assert not (grown / column_rebuild.PENDING_FILE).exists()


def test_an_error_on_the_way_leaves_the_old_catalog(grown, tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    before = (grown / "catalog.json").read_bytes()
    for module, name in ((catalog_append, "commit"), (catalog_change, "sync_tree")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(OSError, match="no space left"):
                add(grown, write(tmp_path / "more", [5]))
        assert (grown / "catalog.json").read_bytes() == before
        assert not strays(grown)
        assert [path.name for path in (grown / "shards").iterdir()] == ["0000"]


def test_a_damaged_catalog_is_not_appended_to(grown, tmp_path):
    catalog = cb.open(grown)
    next(grown.glob("shards/*/codes.npy")).write_bytes(b"")
    for given_as in (grown, catalog):
        with pytest.raises(CatalogCorruptError, match=r"codes\.npy"):
            add(given_as, write(tmp_path / "more", [5]))


def test_a_row_of_no_catalog_cannot_be_removed(grown):
    with pytest.raises(QueryError, match="expected row ids from 0 to 4, got 5"):
        cb.remove(grown, [1, 5])


def test_the_command_line(tmp_path, vectors, capsys):
    folder = cb.from_embeddings(vectors[:40], tmp_path / "a").path
    np.save(tmp_path / "more.npy", vectors[40:])
    table(20).assign(content_hash=["same"] * 20)[["uri", "content_hash"]].to_parquet(
        tmp_path / "items.parquet"
    )
    (folder / "shards" / ".DS_Store").write_bytes(b"not ours")
    more = ["append", str(folder), str(tmp_path / "more.npy"), "--quiet"]
    assert main(more) == 0
    assert main([*more, "--items", str(tmp_path / "items.parquet")]) == 0
    said = capsys.readouterr()
    assert "20 images added from row 40 on\n" in said.out
    assert "1 image added from row 60 on, 19 left out\n" in said.out
    assert "skipped 1.png: already in the catalog as row 60\n" in said.err
    assert main(["remove", str(folder), "3", "60"]) == 0
    assert main(["compact", str(folder), "--quiet"]) == 0
    assert "59 images, no encoder (48-d), 1 shard>" in capsys.readouterr().out
    assert main(["remove", str(folder), "61"]) == 1
    images = str(write(tmp_path / "images", [1]))
    assert main(["append", str(folder), images, "--check-order", "3"]) == 1
    assert "only with embeddings" in capsys.readouterr().err
    assert (folder / "shards" / ".DS_Store").is_file()


STEPS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
import numpy as np
import pyarrow.parquet, threadpoolctl, usearch.index  # once, for all children
import clipbranches_widget as cb
from clipbranches_widget import catalog_append, catalog_compact, catalog_remove

what, source, work = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
rows = np.random.default_rng(0).standard_normal((9, 3))

def change():
    if what == "append":
        cb.append_embeddings(work, rows)
    elif what == "remove":
        cb.remove(work, [1, 45])
    else:
        cb.compact(work)

def look():
    catalog = cb.open(work)
    catalog.verify()
    return len(catalog), catalog.n_present, len(catalog.shards), catalog.embeddings.tobytes()

def killing(function, counter, limit):
    def counted(*args, **options):
        if next(counter) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return counted

def run(task, limit=-1):
    # In a child each time: threads of native code do not survive a fork.
    child = os.fork()
    if not child:
        try:
            counter = itertools.count()
            for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
                setattr(os, name, killing(getattr(os, name), counter, limit))
            task()
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

shutil.copytree(source, work)
before = look()
assert not run(change)
after = look()
shutil.rmtree(work)
assert before != after
seen = []
for limit in itertools.count():
    shutil.copytree(source, work)
    status = run(change, limit)
    assert status in (0, signal.SIGKILL), status
    now = look()
    assert now in (before, after), limit
    seen.append(now == after)
    if now == before and limit % 5 == 0:
        assert not run(change)
        assert look() == after
    else:
        assert not run(lambda: cb.remove(work, 0))  # any writer cleans up
    manifest = cb.open(work).manifest
    listed = {"catalog.json", *manifest.pieces}
    listed |= {f"{one.folder}/{name}" for one in manifest.shards for name in one.pieces}
    there = {path.relative_to(work).as_posix() for path in work.rglob("*") if path.is_file()}
    assert there == listed, (limit, there ^ listed)
    shutil.rmtree(work)
    if not status:
        break
assert seen == sorted(seen), seen  # before, up to one step, and after from then on
assert not seen[0]
print(limit)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("what", ["append", "remove", "compact"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_catalog(tmp_path, what):
    """Kill before each change of the file system, then look, and let another writer clean up."""
    rows = np.random.default_rng(3).standard_normal((50, 3))
    folder = cb.from_embeddings(rows[:30], tmp_path / "source").path
    cb.append_embeddings(folder, rows[30:40])
    cb.append_embeddings(folder, rows[40:])
    if what == "compact":
        cb.remove(folder, [2, 31, 32])
    done = subprocess.run(
        [sys.executable, "-c", STEPS, what, str(folder), str(tmp_path / "work")],
        capture_output=True,
        text=True,
        env={"OPENBLAS_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > (5 if what == "remove" else 15)


WRITER = """
import sys
import numpy as np
import clipbranches_widget as cb
rows = np.random.default_rng(int(sys.argv[2])).standard_normal((400, 8))
print("started", flush=True)
cb.append_embeddings(sys.argv[1], rows)
cb.compact(sys.argv[1])
print("done", flush=True)
"""


def test_kills_at_random_moments(tmp_path, rng):
    """A handful of what ``benchmarks/growth_kills.py`` does two hundred times."""
    folder = cb.from_embeddings(rng.standard_normal((300, 8)), tmp_path / "a").path
    first = np.array(cb.open(folder).embeddings)
    for number in range(4):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(folder), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        with writer:
            assert writer.stdout.readline() == "started\n"
            threading.Event().wait(float(rng.uniform(0, 0.4)))
            writer.kill()
        catalog = cb.open(folder)
        catalog.verify()
        assert (len(catalog) - 300) % 400 == 0
        assert np.array_equal(catalog.embeddings[:300], first)
    shutil.rmtree(folder / "change.stage", ignore_errors=True)
