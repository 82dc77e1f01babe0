"""Building catalogs on the workers of a cluster: the same as on one machine, whatever dies."""

import _thread
import contextlib
import io
import os
import signal
import tarfile
import threading
import time
from itertools import pairwise
from typing import ClassVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cluster_rig import kills_workers
from drawn_images import TileEncoder, build, picture
from word_encoder import WordEncoder, captions

import clipbranches_widget.cluster_ingest as module
from clipbranches_widget import cluster_client
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.cluster_ingest import shard_rows
from clipbranches_widget.errors import CatalogError, ClusterError, EncoderError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.sources import image_source

N = 96
BATCH = 4
SHARDS = {1: N, 3: N // 3, 8: N // 8}
BROKEN = frozenset((0, 5, 6, 7, 40, 41, 42, 43, 44, 45, 46, 47, 60, 95))
NAMES = ("embeddings.npy", "thumbnails.bin")


def content(number):
    return b"no image" if number in BROKEN else picture(number)


@contextlib.contextmanager
def cluster(*, processes, n_workers=2, n_threads=1, **options):
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=n_threads,
            processes=processes,
            dashboard_address="127.0.0.1:0",
            **options,
        ) as made,
        Client(made) as client,
    ):
        yield made, client


@pytest.fixture(scope="module")
def clients():
    with cluster(processes=False) as (_, threads), cluster(processes=True) as (_, processes):
        yield {"threads": threads, "processes": processes}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return the same pictures as a folder, a list, Parquet files and tars."""
    place = tmp_path_factory.mktemp("sources")
    folder = place / "folder"
    folder.mkdir()
    for number in range(N):
        (folder / f"{number:03}.png").write_bytes(content(number))
    tables = place / "tables"
    tables.mkdir()
    for part, numbers in enumerate(np.array_split(np.arange(N), [N // 5, N // 2])):
        table = pa.table(
            {
                "image": [content(number) for number in numbers],
                "caption": [f"picture {number}" for number in numbers],
                "price": [None if number % 3 else number / 2 for number in numbers],
            }
        )
        pq.write_table(table, tables / f"{part}.parquet", row_group_size=7)
    tars = place / "tars"
    tars.mkdir()
    for part, numbers in enumerate(np.array_split(np.arange(N), 3)):
        ending, mode = (".tar.gz", "w:gz") if part == 1 else (".tar", "w")
        with tarfile.open(tars / f"{part}{ending}", mode) as tar:
            for number in numbers:
                fields = b'{"even": true}' if number % 2 == 0 else b'{"size": 3}'
                for name, data in ((f"{number}.png", content(number)), (f"{number}.json", fields)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {
        "folder": folder,
        "list": sorted(folder.iterdir(), reverse=True),
        "parquet": tables,
        "tars": tars,
    }


@pytest.fixture(scope="module")
def serial(sources, tmp_path_factory):
    """Return the catalog of each source, built here."""
    place = tmp_path_factory.mktemp("serial")
    return {
        kind: build(source, place / f"{kind}.cbcat", batch_size=BATCH)
        for kind, source in sources.items()
    }


def assert_same(catalog, expected):
    """Check that two catalogs hold the same, however they are cut into shards."""
    assert catalog.items.equals(expected.items)
    assert catalog.skipped.equals(expected.skipped)
    for name in ("column_model_hash", "source_root", "about", "encoder"):
        assert getattr(catalog.manifest, name) == getattr(expected.manifest, name)
    for one in (catalog, expected):
        one.verify()
    ours, theirs = (
        {
            "embeddings": np.concatenate([shard.embeddings for shard in one.shards]),
            "codes": np.concatenate(
                [np.load(shard.path / "codes.npy") for shard in one.shards], axis=1
            ),
        }
        for one in (catalog, expected)
    )
    for name, array in ours.items():
        assert np.array_equal(array, theirs[name]), name
    rows = range(len(expected))
    assert [catalog.thumbnail(r) for r in rows] == [expected.thumbnail(r) for r in rows]


def assert_alone(path):
    """Check that nothing is beside a catalog, nor in it that is none of it."""
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert {entry.name for entry in path.iterdir()} == {
        "catalog.json",
        "columns.json",
        "columns.npz",
        "shards",
        "skipped.parquet",
    }
    for shard in (path / "shards").iterdir():
        listed = next(
            s for s in Catalog.open(path).manifest.shards if s.folder.endswith(shard.name)
        )
        assert {file.name for file in shard.iterdir()} == set(listed.pieces)


@pytest.mark.parametrize("kind", ["folder", "list", "parquet", "tars"])
@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_the_same_catalog(clients, sources, serial, tmp_path, workers, kind):  # noqa: PLR0917
    for n_shards, rows in SHARDS.items():
        path = tmp_path / str(n_shards) / "a.cbcat"
        options = {"rows_per_shard": rows, "client": clients[workers]}
        catalog = build(sources[kind], path, batch_size=BATCH, **options)
        assert len(catalog.shards) == n_shards
        assert_same(catalog, serial[kind])
        assert_alone(path)


@pytest.mark.parametrize("n_shards", SHARDS)
@pytest.mark.parametrize("workers", ["threads", "processes"])
def test_embeddings(clients, tmp_path, workers, n_shards):
    said = captions(N)
    vectors = WordEncoder().encode_text([text[:200] for text in said])
    items = pa.table({"caption": said, "size": np.arange(N) % 7})
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    options = {"items": items, "encoder": WordEncoder(), "columns": "bits", "about": "words"}
    expected = from_embeddings(vectors, tmp_path / "here" / "a.cbcat", **options)
    catalog = from_embeddings(
        vectors,
        tmp_path / "there" / "a.cbcat",
        rows_per_shard=SHARDS[n_shards],
        client=clients[workers],
        **options,
    )
    assert len(catalog.shards) == n_shards
    assert catalog.manifest.column_parts == "bits"
    assert catalog.items.equals(expected.items)
    assert catalog.manifest.column_model_hash == expected.manifest.column_model_hash
    for name in ("embeddings.npy", "codes.npy"):
        ours, theirs = (
            np.concatenate([np.load(s.path / name) for s in one.shards], axis=int(name[0] == "c"))
            for one in (catalog, expected)
        )
        assert np.array_equal(ours, theirs)
    catalog.verify()
    assert_alone(tmp_path / "there" / "a.cbcat")


def test_the_bundled_model_is_loaded_on_workers(clients, sources, tmp_path):
    options = {"encoder": None, "model": "bundled", "batch_size": 4, "rows_per_shard": 8}
    readable = [path for n, path in enumerate(reversed(sources["list"])) if n not in BROKEN][:12]
    expected = build(readable, tmp_path / "a.cbcat", **options)
    options |= {"client": clients["threads"], "device": "cpu"}
    catalog = build(readable, tmp_path / "b.cbcat", **options)
    assert_same(catalog, expected)


def test_on_the_command_line(clients, sources, tmp_path, capsys, monkeypatch):
    from clipbranches_widget.cli import main

    monkeypatch.setattr(cluster_client, "CONNECT_TIMEOUT_S", 0.2)
    few = tmp_path / "few"
    few.mkdir()
    for number in range(12):
        (few / f"{number:02}.png").write_bytes(content(number))
    command = ["index", str(few), str(tmp_path / "a.cbcat"), "--demo-encoder", "--no-map"]
    command += ["--quiet", "--batch-size", "4", "--device", "cpu", "--scheduler"]
    assert main([*command, "tcp://127.0.0.1:1"]) == 1
    assert "expected a Dask scheduler at tcp://127.0.0.1:1" in capsys.readouterr().err
    assert main([*command, clients["threads"].scheduler.address]) == 0
    assert "skipped 05.png" in capsys.readouterr().err
    assert len(Catalog.open(tmp_path / "a.cbcat")) == 12 - len(BROKEN & set(range(12)))


def killer(place, pattern, act, n_times, rng):
    """Return a thread that acts each time a file of a new name appears, after a random while."""
    stop = threading.Event()
    acted = []

    def watch():
        seen = set()
        wanted = int(rng.integers(1, 4))
        while not stop.is_set() and len(acted) < n_times:
            new = {str(path) for path in place.glob(pattern)} - seen
            seen |= new
            wanted -= len(new)
            if wanted <= 0:
                act()
                acted.append(seen)
                wanted = int(rng.integers(1, 4))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread, stop, acted


class SlowEncoder(TileEncoder):
    """Takes long enough for a build to be in the middle of something."""

    def encode_tensors(self, tensors):
        time.sleep(0.03)
        return super().encode_tensors(tensors)


@pytest.fixture(scope="module")
def mortal():
    with cluster(processes=True) as made:
        yield made


@pytest.mark.parametrize("n_shards", SHARDS)
@pytest.mark.parametrize("phase", ["part", "index"])
@kills_workers
def test_workers_are_killed(mortal, sources, serial, tmp_path, rng, phase, n_shards):  # noqa: PLR0917
    made, client = mortal

    def kill_one():
        running = [n.process.pid for n in made.workers.values() if n.process.pid is not None]
        if running:
            os.kill(int(rng.choice(running)), signal.SIGKILL)

    pattern = f".a.cbcat.building-*/work/{phase}-*.*/*"
    thread, stop, acted = killer(tmp_path, pattern, kill_one, 2, rng)
    try:
        catalog = build(
            sources["folder"],
            tmp_path / "a.cbcat",
            encoder=SlowEncoder(),
            batch_size=BATCH,
            rows_per_shard=SHARDS[n_shards],
            client=client,
        )
    finally:
        stop.set()
        thread.join()
    assert acted
    assert_same(catalog, serial["folder"])
    assert_alone(tmp_path / "a.cbcat")


def test_all_workers_are_gone(sources, tmp_path, rng, monkeypatch):
    monkeypatch.setattr(module, "WAIT_FOR_WORKERS_S", 0.5)
    with cluster(processes=True, n_workers=1) as (made, client):
        pattern = ".a.cbcat.building-*/work/part-*.*"
        thread, stop, _ = killer(tmp_path, pattern, lambda: made.scale(0), 1, rng)
        with pytest.raises(ClusterError, match="all are gone, and no other came: start some"):
            build(
                sources["folder"],
                tmp_path / "a.cbcat",
                encoder=SlowEncoder(),
                batch_size=1,
                rows_per_shard=8,
                client=client,
            )
        stop.set()
        thread.join()
        assert list(tmp_path.iterdir()) == []


class DeadlyEncoder(TileEncoder):
    """Takes its worker with it."""

    def encode_tensors(self, _):
        os.kill(os.getpid(), signal.SIGKILL)


@kills_workers
def test_a_chunk_that_kills_its_workers_is_named(sources, tmp_path):
    import dask

    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        cluster(processes=True, n_workers=1) as (_, client),
        pytest.raises(ClusterError, match=r"embed chunk 1 of 3 \(images 0 to 31 .* died") as caught,
    ):
        build(
            sources["folder"],
            tmp_path / "a.cbcat",
            encoder=DeadlyEncoder(),
            batch_size=BATCH,
            rows_per_shard=32,
            client=client,
        )
    assert "out of memory" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


class FailingEncoder(TileEncoder):
    def __init__(self, error):
        self.error = error

    def encode_tensors(self, _):
        raise self.error


@pytest.mark.parametrize(
    "error", [EncoderError("expected room for 4 images"), ZeroDivisionError("a mistake")]
)
def test_an_error_of_the_encoder_arrives(clients, sources, tmp_path, error):
    with pytest.raises(type(error), match=str(error)) as caught:
        build(
            sources["folder"],
            tmp_path / "a.cbcat",
            encoder=FailingEncoder(error),
            rows_per_shard=64,
            client=clients["processes"],
        )
    assert "while a worker was to embed chunk" in caught.value.__notes__[0]
    assert list(tmp_path.iterdir()) == []


def test_stopping_leaves_nothing_and_frees_the_workers(clients, sources, serial, tmp_path, rng):
    pattern = ".a.cbcat.building-*/work/part-*.*"
    thread, stop, _ = killer(tmp_path, pattern, _thread.interrupt_main, 1, rng)
    options = {"batch_size": BATCH, "client": clients["processes"], "rows_per_shard": 12}
    with pytest.raises(KeyboardInterrupt):
        build(sources["folder"], tmp_path / "a.cbcat", encoder=SlowEncoder(), **options)
    stop.set()
    thread.join()
    assert list(tmp_path.iterdir()) == []
    catalog = build(sources["folder"], tmp_path / "a.cbcat", **options)
    assert_same(catalog, serial["folder"])
    assert_alone(tmp_path / "a.cbcat")


class WatchedEncoder(TileEncoder):
    """Notes how many calls each copy of it serves at the same time, in this process."""

    running: ClassVar = {}
    most: ClassVar = {}

    def encode_tensors(self, tensors):
        self.running[id(self)] = self.running.get(id(self), 0) + 1
        self.most[id(self)] = max(self.running[id(self)], self.most.get(id(self), 0))
        time.sleep(0.005)
        self.running[id(self)] -= 1
        return super().encode_tensors(tensors)


@pytest.mark.parametrize("resources", [None, {"GPU": 1}])
def test_one_model_a_worker_and_one_task_at_a_time(
    sources, serial, tmp_path, monkeypatch, resources
):
    monkeypatch.setattr(WatchedEncoder, "running", {})
    monkeypatch.setattr(WatchedEncoder, "most", {})
    options = {} if resources is None else {"resources": resources}
    with cluster(processes=False, n_threads=3, **options) as (_, client):
        catalog = build(
            sources["folder"],
            tmp_path / "a.cbcat",
            encoder=WatchedEncoder(),
            batch_size=BATCH,
            rows_per_shard=8,
            client=client,
        )
    assert_same(catalog, serial["folder"])
    assert len(WatchedEncoder.most) <= 2
    assert set(WatchedEncoder.most.values()) == {1}


class LockedEncoder(TileEncoder):
    def __init__(self):
        self.lock = threading.Lock()


def test_an_encoder_that_cannot_travel(clients, sources, tmp_path):
    with pytest.raises(EncoderError, match="LockedEncoder, which cannot be pickled"):
        build(
            sources["folder"],
            tmp_path / "a.cbcat",
            encoder=LockedEncoder(),
            client=clients["threads"],
        )
    assert list(tmp_path.iterdir()) == []


def test_nothing_readable_and_things_that_are_no_client(clients, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for number in range(5):
        (bad / f"{number}.png").write_bytes(b"none")
    with pytest.raises(CatalogError, match="at least one readable image, got 5"):
        build(bad, tmp_path / "a.cbcat", client=clients["processes"], rows_per_shard=2)
    with pytest.raises(ClusterError, match=r"expected a dask\.distributed Client, got str"):
        build(bad, tmp_path / "a.cbcat", client="tcp://127.0.0.1:8786")
    assert list(tmp_path.iterdir()) == [bad]


def test_images_that_only_this_machine_sees(sources):
    with pytest.raises(ClusterError, match=r"001\.png can be read here and not there \(gone\)"):
        module._check_seen([("001.png", "gone")], sources["folder"])
    module._check_seen([("000.png", "gone")], sources["folder"])  # here neither


def test_progress_counts_every_image(clients, sources, tmp_path, monkeypatch):
    from clipbranches_widget import ingest

    told = []

    class Noted(ingest.StageBars):
        def _advance(self, stage, done, total):
            told.append((stage, done, total))

    monkeypatch.setattr(ingest, "StageBars", Noted)
    build(
        sources["folder"],
        tmp_path / "a.cbcat",
        rows_per_shard=30,
        batch_size=10,
        client=clients["threads"],
    )
    images = [(done, total) for stage, done, total in told if stage == "images"]
    assert images == sorted(images)
    assert images[-1] == (N, N)
    assert ("shards indexed", 4, 4) in told


@pytest.mark.parametrize(
    ("n_rows", "n_workers", "limit", "multiple"),
    [(96, 2, 12, 4), (96, 2, 3, 4), (10**7, 4, None, 64), (50, 3, None, 64), (10**9, 1, None, 7)],
)
def test_shards_hold_whole_batches(n_rows, n_workers, limit, multiple):
    rows = shard_rows(n_rows, n_workers, limit, multiple=multiple)
    assert rows >= 1
    assert limit is None or rows <= limit
    assert rows % multiple == 0 or rows == limit < multiple


def sources_in_memory(folder):
    """Return sources of images by the way they are read."""
    data = [content(number) for number in range(N)]
    dataset = datasets.Dataset.from_dict({"image": data, "label": list(range(N))})
    dataset.save_to_disk(folder / "saved")
    saved = datasets.load_from_disk(folder / "saved")
    feather = pa.table({"image": data, "label": list(range(N))})
    with pa.ipc.new_file(str(folder / "a.arrow"), feather.schema) as writer:
        writer.write_table(feather, max_chunksize=11)
    return {
        "bytes": feather,
        "arrow": folder / "a.arrow",
        "data set": dataset,
        "saved": saved,
        "shuffled": saved.shuffle(seed=1),
    }


def lines(source):
    """Return all lines of a source, and its images."""
    tables, images = [], []
    for chunk in source.chunks():
        tables.append(chunk.table)
        found = [None] * len(chunk.table) if chunk.images is None else list(chunk.images)
        assert len(found) == len(chunk.table)
        images += [image() if callable(image) else image for image in found]
    return pa.concat_tables(tables), images


def test_parts_are_the_whole(sources, tmp_path, rng):
    import pickle

    for kind, source in {**sources, **sources_in_memory(tmp_path)}.items():
        whole = image_source(source)
        expected, expected_images = lines(whole)
        cuts = [0, *sorted(rng.choice(np.arange(1, N), 4, replace=False).tolist()), N]
        tables, images = [], []
        for number, (start, stop) in enumerate(pairwise(cuts)):
            part = whole.part(start, stop, tmp_path / f"{kind}-{number}")
            sent = pickle.dumps(part)
            assert len(sent) < 20_000, kind
            part = pickle.loads(sent)
            assert part.n_images == stop - start
            assert part.root == whole.root
            table, found = lines(part)
            tables.append(table)
            images += found
        assert pa.concat_tables(tables).equals(expected), kind
        assert images == expected_images, kind
