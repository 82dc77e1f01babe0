"""A catalog on a Dask cluster of several processes answers as one on this machine, bit for bit."""

import asyncio
import gc
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cluster_rig import assert_same, build, labels_near, remove_some
from distributed import Client, LocalCluster
from hypothesis import given
from hypothesis import strategies as st

import clipbranches_widget as cb
from clipbranches_widget import audit, cluster_crew, cluster_worker
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.cluster_client import worker_threads
from clipbranches_widget.cluster_crew import shares
from clipbranches_widget.cluster_requests import Count
from clipbranches_widget.cluster_worker import Served, serve
from clipbranches_widget.errors import Cancelled, ClusterError, MissingPackageError, QueryError
from clipbranches_widget.kept_rows import KeptRows
from clipbranches_widget.open_index import index_of
from clipbranches_widget.refine import answer_again, learn, refine
from clipbranches_widget.search import search
from clipbranches_widget.suggest import suggest

SHAPES = {1: (26_000, 26_000), 8: (28_000, 3_500)}
"""Rows, and rows a shard: large enough for the graphs, and for a sample of the rows."""


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as workers,
        Client(workers) as client,
    ):
        yield client


@pytest.fixture(scope="module", params=[1, 3, 8])
def path(request, tmp_path_factory):
    """A catalog with removed rows, of one, three or eight shards."""
    if request.param == 3:
        return request.getfixturevalue("three_shards")
    path = tmp_path_factory.mktemp("catalogs") / f"{request.param}.cbcat"
    assert len(build(path, *SHAPES[request.param]).shards) == request.param
    return remove_some(path)


@pytest.fixture(scope="module")
def here(path):
    """The indexes on this machine, answered by several threads."""
    index = CatalogIndex(cb.open(path), n_threads=4)
    index.columns.loader.wait()
    return index


@pytest.fixture(scope="module")
def there(path, client):
    """The indexes on the cluster."""
    return index_of(cb.open(path, client=client))


@pytest.fixture(scope="module")
def small(tmp_path_factory, client):
    """A path of three shards that are scanned, and a sample of themselves."""
    path = tmp_path_factory.mktemp("small") / "small.cbcat"
    build(path, 1_500, 600)
    return path


def rounds(index):
    """Give the answers of some rounds: plain, with a query, under rules, with another seed."""
    query = index.embeddings(np.array([11]))[0]
    labels = labels_near(index, 11)
    plain = refine(index, labels=labels)
    yield plain
    boxes = [branch.box for branch in plain.branches if branch.box is not None]
    rules = {"off": boxes[:1], "pinned": boxes[-1:] if len(boxes) > 1 else []}
    yield refine(index, labels=labels, **rules)
    yield answer_again(index, plain.model, labels=labels, **rules)
    yield answer_again(index, plain.model, labels=labels)
    yield refine(index, labels=labels, query=query, query_text="eleven", threshold=0.5, seed=3)
    yield plain.at(0.1)


def test_searches_are_the_same(path, here, there, client):
    local, far = here.catalog, there.catalog
    rng = np.random.default_rng(1)
    few = rng.random(len(local)) < 0.002
    most = rng.random(len(local)) < 0.9
    alone = np.zeros(len(local), dtype=bool)
    for vector in (local.embeddings_of([5])[0], rng.normal(size=16)):
        for k in (1, 60, 5_000):
            assert_same(search(local, vector, k), search(far, vector, k))
        for only in (few, most, alone):
            assert_same(search(local, vector, 40, only=only), search(far, vector, 40, only=only))
        hidden = local.present_rows()[:50]
        assert_same(
            search(local, vector, 9, exclude=hidden), search(far, vector, 9, exclude=hidden)
        )
    assert len(search(far, vector, 9, only=alone)) == 0


def test_rounds_are_the_same_serial_in_threads_and_on_workers(path, here, there):
    serial = CatalogIndex(cb.open(path), n_threads=1)
    serial.columns.loader.wait()
    for one, threads, workers in zip(rounds(serial), rounds(here), rounds(there), strict=True):
        assert len(one) > 10
        assert_same(one, threads)
        assert_same(one, workers)
        assert one.plan == workers.plan
    labels = labels_near(here, 30)
    for strategy in ("bits", "postings", "scan"):
        local, far = (refine(each, labels=labels, strategy=strategy) for each in (here, there))
        assert far.plan.strategy == strategy
        assert_same(local, far)


@pytest.mark.parametrize("path", [3, 8], indirect=True)
def test_what_a_round_learns_and_proposes_is_the_same(here, there):
    labels = labels_near(here, 70)
    one, other = (learn(index, labels=labels) for index in (here, there))
    for name in ("rows", "is_random", "codes", "logits", "target"):
        assert np.array_equal(getattr(one.sample, name), getattr(other.sample, name))
    assert one.boxes == other.boxes
    local, far = (refine(index, labels=labels) for index in (here, there))
    for result in (None, search(here.catalog, here.embeddings(np.array([3]))[0], 50), local):
        asked = result if result is not local else far
        first = suggest(here, result, labels, 20, skip=local.rows[:3], seed=4)
        second = suggest(there, asked, labels, 20, skip=local.rows[:3], seed=4)
        assert np.array_equal(first.rows, second.rows)
        assert first.reasons == second.reasons
    first, second = (audit.propose(*each, labels) for each in ((here, local), (there, far)))
    assert np.array_equal(first.rows, second.rows)
    assert np.array_equal(first.stratum_ids, second.stratum_ids)


@pytest.mark.parametrize("path", [3, 8], indirect=True)
def test_a_session_works_as_on_one_machine(path, client, tmp_path):
    def story(catalog, name):
        session = cb.Session(catalog, tmp_path / name)
        hits = session.search(row=17, k=120)
        yield hits
        session.label(positive=hits.rows[:8], negative=hits.rows[80:90])
        yield session.refine()
        yield session.switch_off(0)
        session.filter({"year": (0, 25)})
        yield session.result
        yield session.search(row=18, k=30)
        session.filter()
        session.label(positive=session.suggest(3).rows[:1])
        yield session.refine(threshold=0.4)
        session.undo()
        yield session.result
        yield session.round(1)
        yield session.save_concept("mine", tmp_path / f"{name}.json").apply(catalog)
        rows = session.result.rows[:200]
        yield cb.export_columns(catalog, rows=rows)

    local, far = cb.open(path), cb.open(path, client=client)
    index_of(local).columns.loader.wait()
    for one, other in zip(story(local, "here"), story(far, "there"), strict=True):
        if isinstance(one, cb.Result):
            assert len(one)
            assert_same(one, other)
        else:
            assert one.equals(other)
    written = [(tmp_path / name).read_text().split('"digest"')[1:] for name in ("here", "there")]
    assert [line[:40] for line in written[0]] == [line[:40] for line in written[1]]


def test_a_small_catalog_is_its_own_sample(small, client):
    here, there = CatalogIndex(cb.open(small)), index_of(cb.open(small, client=client))
    for one, other in zip(rounds(here), rounds(there), strict=True):
        assert_same(one, other)
    hits = search(there.catalog, np.ones(16), 2_000)
    assert (len(hits), hits.notes) == (1_500, ())


def test_little_moves_in_a_round(tmp_path, client):
    """Less than 1 % of the codes, once the sample is there; what moves hardly grows with them."""
    build(tmp_path / "large.cbcat", 110_000, 27_500)
    there = index_of(cb.open(tmp_path / "large.cbcat", client=client))
    codes = len(there.catalog) * there.model.n_columns
    labels = labels_near(there, 90)
    refine(there, labels=labels)
    before, trips = there.bytes_moved, there.n_round_trips
    refine(there, labels=labels)
    assert 0 < there.bytes_moved - before < 0.01 * codes
    assert there.n_round_trips - trips <= 8
    before, trips = there.bytes_moved, there.n_round_trips
    search(there.catalog, np.ones(16), 60)
    assert 0 < there.bytes_moved - before < 20_000
    assert there.n_round_trips - trips <= 2


def test_a_round_goes_on_while_the_catalog_grows(small, client, tmp_path):
    path = tmp_path / "growing.cbcat"
    shutil.copytree(small, path)
    far, near = cb.open(path, client=client), cb.open(path)
    more = np.random.default_rng(9).normal(size=(700, 16)).astype(np.float32)
    cb.append_embeddings(path, more)
    cb.remove(path, range(50))
    for catalog in (far, near):
        assert len(catalog) == 1_500
    for one, other in zip(rounds(index_of(near)), rounds(index_of(far)), strict=True):
        assert_same(one, other)
    newer = cb.open(path, client=client)
    assert_same(search(newer, more[3], 5), search(cb.open(path), more[3], 5))
    assert search(newer, more[3], 1).rows[0] == 1_503


@pytest.mark.parametrize("path", [8], indirect=True)
def test_a_cancelled_round_leaves_nothing_running(there, client):
    cancel, stages = threading.Event(), []

    def progress(stage, _fraction):
        stages.append(stage)
        if stage == "index":
            cancel.set()

    with pytest.raises(Cancelled, match="labels and results are as before"):
        refine(there, labels=labels_near(there, 5), progress=progress, cancel=cancel)
    assert stages[-1] == "index"
    until(lambda: gc.collect() >= 0 and not client.futures)


@pytest.mark.parametrize("path", [8], indirect=True)
def test_partial_answers_come_and_only_grow(there):
    seen = []
    labels = labels_near(there, 5)
    result = refine(there, labels=labels, partial=lambda partial: seen.append(partial.rows))
    assert set(seen[0].tolist()) <= set(result.rows.tolist())


def test_workers_let_go_of_a_catalog_that_is_gone(small, client):
    def served():
        names = client.run(lambda dask_worker: list(dask_worker.plugins)).values()
        return {name for each in names for name in each if name.startswith("clipbranches-small")}

    gc.collect()
    until(lambda: not served())
    catalog = cb.open(small, client=client)
    search(catalog, np.ones(16), 3)
    assert len(served()) == 1
    del catalog
    gc.collect()
    until(lambda: not served())


def test_what_is_no_open_client_is_refused(small, client, monkeypatch):
    with pytest.raises(ClusterError, match=r"expected a dask.distributed Client, got str"):
        cb.open(small, client="tcp://127.0.0.1:8786")
    closed = Client(client.scheduler.address)
    catalog = cb.open(small, client=closed)
    closed.close()
    with pytest.raises(ClusterError, match="got one that is closed: connect again"):
        cb.open(small, client=closed)
    with pytest.raises(ClusterError, match="got one that is closed: connect again"):
        search(catalog, np.ones(16), 3)
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'clipbranches_widget\[dask\]'"):
        cb.open(small, client=client)


def test_labels_survive_a_lost_cluster(small, client, tmp_path):
    lost = Client(client.scheduler.address)
    session = cb.Session(cb.open(small, client=lost), tmp_path / "one.jsonl")
    session.search(row=3)
    session.label(positive=[1, 2, 3], negative=[800])
    lost.close()
    with pytest.raises(ClusterError, match="open the catalog again"):
        session.refine()
    session.label(positive=[4])
    again = cb.Session(cb.open(small, client=client), tmp_path / "one.jsonl")
    assert again.labels.positive.tolist() == [1, 2, 3, 4]
    assert len(again.refine())


def test_no_worker_is_said():
    with (
        LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as nobody,
        Client(nobody) as client,
        pytest.raises(ClusterError, match=r"found none within 0.1 s .*: start some"),
    ):
        worker_threads(client, wait_s=0.1)


@pytest.fixture
def alone():
    """Return a cluster of one worker in this process, its client, and what that worker serves."""
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address=":0") as workers,
        Client(workers) as client,
    ):

        def served():
            (worker,) = workers.workers.values()
            return [each for each in worker.plugins.values() if isinstance(each, Served)]

        yield workers, client, served


def test_a_worker_without_the_folder_fetches_the_catalog(small, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    url = "memory://fetched.cbcat"
    cb.copy_catalog(small, url, progress=False)
    _, client, _ = alone
    catalog = cb.open(url, client=client)
    assert catalog.url == url
    gone, request = tmp_path / "not here", Count(tuple(range(len(catalog.shards))))
    expected = index_of(catalog).stats
    shutil.rmtree(tmp_path / "cache")  # as on a machine that never had it
    for name, place in (("with", url), ("without", None), ("wrong", "memory://nothing.cbcat")):
        client.register_plugin(Served(name, gone, catalog.manifest, place), name=name)
    found = client.submit(serve, "with", request, pure=False).result()
    assert np.array_equal(found[0].offsets, expected.offsets)
    with pytest.raises(ClusterError, match="all machines need it at the same path"):
        client.submit(serve, "without", request, pure=False).result()
    with pytest.raises(ClusterError, match=r"to fetch memory://nothing.cbcat, but it could not"):
        client.submit(serve, "wrong", request, pure=False).result()


def start_when(workers, is_so):
    """Start a worker when something holds."""
    until(is_so)
    workers.scale(1)


@pytest.mark.timeout(60)
def test_a_request_of_a_worker_that_is_gone_is_answered_by_another(small, alone, monkeypatch):
    monkeypatch.setattr(cluster_crew, "KNOW_WORKERS_S", 1_000.0)
    workers, client, _ = alone
    catalog = cb.open(small, client=client)
    expected = search(catalog, np.ones(16), 5)
    workers.scale(0)
    until(lambda: not client.nthreads())
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(start_when, workers, lambda: workers.scheduler.unrunnable)
        assert_same(search(catalog, np.ones(16), 5), expected)
        started.result()
    until(lambda: gc.collect() >= 0 and not client.futures)


@pytest.mark.timeout(60)
def test_an_answer_that_is_lost_before_it_is_fetched_is_computed_again(small, alone, monkeypatch):
    workers, client, _ = alone
    catalog = cb.open(small, client=client)
    expected = search(catalog, np.ones(16), 5)
    gather, lost = workers.scheduler.gather, []

    async def loses(keys, serializers=None):
        if not lost:
            lost.extend(keys)
            workers.scale(0)
            while workers.scheduler.workers:
                await asyncio.sleep(0.01)
        return await gather(keys, serializers)

    monkeypatch.setitem(workers.scheduler.handlers, "gather", loses)
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(start_when, workers, lambda: lost and workers.scheduler.unrunnable)
        assert_same(search(catalog, np.ones(16), 5), expected)
        started.result()


def test_workers_close_what_nobody_asks_for(small, alone, tmp_path, monkeypatch):
    _, client, served = alone
    other = tmp_path / "other.cbcat"
    build(other, 300, 300, seed=1)
    catalogs = [cb.open(path, client=client) for path in (small, other)]
    answers = [search(catalog, np.ones(16), 5) for catalog in catalogs]
    first, second = served()
    assert first._shards
    assert second._shards
    monkeypatch.setattr(cluster_worker, "KEPT_OPEN_S", 0.0)
    with first.used():
        assert_same(search(catalogs[1], np.ones(16), 5), answers[1])
        assert first._shards
    assert not second._shards
    assert_same(search(catalogs[0], np.ones(16), 5), answers[0])
    assert not first._shards
    monkeypatch.setattr(cluster_worker, "KEPT_OPEN_S", 600.0)
    assert_same(search(catalogs[0], np.ones(16), 5), answers[0])
    assert first._shards
    monkeypatch.setattr(cluster_worker, "MAX_USED", 0.0)
    assert_same(search(catalogs[1], np.ones(16), 5), answers[1])
    assert not first._shards


def test_workers_without_the_files_are_named(small, client, tmp_path):
    path = tmp_path / "moved.cbcat"
    shutil.copytree(small, path)
    catalog = cb.open(path, client=client)
    index_of(catalog)
    path.rename(tmp_path / "elsewhere.cbcat")
    with pytest.raises(ClusterError, match=r"moved.cbcat on worker tcp:.*, found no folder"):
        search(catalog, np.ones(16), 3)


def test_other_files_on_a_worker_are_refused(small, client, tmp_path):
    path = tmp_path / "other.cbcat"
    shutil.copytree(small, path)
    catalog = cb.open(path, client=client)
    index_of(catalog)
    codes = path / "shards" / "0001" / "codes.npy"
    codes.write_bytes(codes.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ClusterError, match=r"worker tcp:.* the files that the client has: .*codes"):
        refine(index_of(catalog), labels=labels_near(CatalogIndex(cb.open(small)), 5))


def test_another_release_on_a_worker_is_refused(small, client, monkeypatch):
    monkeypatch.setattr(cluster_worker, "__version__", "0.0.1")
    catalog = cb.open(small, client=client)
    with pytest.raises(ClusterError, match=r"expected clipbranches_widget 0.0.1 on worker tcp:"):
        search(catalog, np.ones(16), 3)


@pytest.mark.parametrize("path", [8], indirect=True)
def test_bad_questions_are_refused_as_before(there):
    with pytest.raises(QueryError, match="expected a strategy among"):
        refine(there, labels=labels_near(there, 5), strategy="magic")


@given(
    sizes=st.dictionaries(st.integers(0, 500), st.integers(1, 1_000), min_size=1, max_size=40),
    workers=st.dictionaries(st.text(min_size=1), st.integers(1, 16), min_size=1, max_size=8),
)
def test_every_shard_is_dealt_once_and_fairly(sizes, workers):
    dealt = shares(sizes, workers)
    assert sorted(number for numbers in dealt.values() for number in numbers) == sorted(sizes)
    for address, numbers in dealt.items():
        fair = sum(sizes.values()) * workers[address] / sum(workers.values())
        assert sum(sizes[number] for number in numbers) <= fair + max(sizes.values())


def test_only_few_shards_move_when_a_worker_is_lost():
    sizes = dict.fromkeys(range(400), 1_000)
    workers = {f"tcp://10.0.0.{n}:80": 4 for n in range(8)}
    before = {number: who for who, numbers in shares(sizes, workers).items() for number in numbers}
    lost = workers.popitem()[0]
    after = {number: who for who, numbers in shares(sizes, workers).items() for number in numbers}
    kept = [number for number, who in before.items() if who != lost]
    assert sum(before[number] != after[number] for number in kept) < 0.1 * len(sizes)


@given(st.lists(st.lists(st.integers(0, 60), max_size=30), max_size=8))
def test_kept_rows_are_those_fetched(asked):
    values = np.random.default_rng(0).integers(0, 255, (61, 3)).astype(np.uint8)
    kept = KeptRows(3, np.uint8, max_bytes=3 * 40)
    for rows in (np.array(each, dtype=np.int64) for each in asked):
        missing = kept.missing(rows)
        assert set(missing.tolist()) <= set(rows.tolist())

        def fetch(new, missing=missing):
            assert np.array_equal(new, missing)
            return values[new]

        assert np.array_equal(kept.get(rows, fetch), values[rows])
        assert not len(kept.missing(rows))


def until(is_so, limit_s=20.0):
    """Wait until a condition holds."""
    end = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)
