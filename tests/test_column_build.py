"""Building column indexes on disk: as in memory, in bounded memory, and after kills."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from clipbranches_widget import array_build, column_build
from clipbranches_widget.array_build import JOURNAL_FILE, ArrayBuild, ArrayFile
from clipbranches_widget.column_build import build_sorted_columns
from clipbranches_widget.column_model import ColumnModel, default_column_model, equi_depth_edges
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.sorted_columns import SortedColumns

DIM, N_COLUMNS = 6, 5
PARTS = ("full", "bits", "codes")
FILES = {
    "full": ["codes.npy", "offsets.npy", "order.npy", "prefix.npy"],
    "bits": ["codes.npy", "offsets.npy", "prefix.npy"],
    "codes": ["codes.npy", "offsets.npy"],
}


def whole_rows(rng, n):
    """Return embeddings of small integers: their products are exact in any order of summing."""
    return rng.integers(-8, 9, size=(n, DIM)).astype(np.float16)


@pytest.fixture
def model(rng):
    anchors = rng.integers(-4, 5, size=(N_COLUMNS, DIM)).astype(np.float32)
    edges = equi_depth_edges(whole_rows(rng, 900).astype(np.float32) @ anchors.T)
    return ColumnModel("centroids", tuple("abcde"), anchors, edges)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(column_build, "BLOCK_ROWS", 64)
    monkeypatch.setattr(column_build, "_CHUNK_CODES", 128 * N_COLUMNS)
    monkeypatch.setattr(column_build, "_SORT_ROWS", 192)


@pytest.fixture
def journal_at_once(monkeypatch):
    monkeypatch.setattr(array_build, "_JOURNAL_S", 0)


def assert_index_of(folder, codes, columns):
    """Check that the files, all of them and no other, equal the index built in memory."""
    n_columns, n_rows = codes.shape
    assert sorted(path.name for path in folder.iterdir()) == FILES[columns]
    opened = SortedColumns.open(folder, n_columns=n_columns, n_rows=n_rows)
    expected = SortedColumns.from_codes(codes, columns=columns)
    for name in ("codes", "offsets", "order", "prefix"):
        found, wanted = getattr(opened, name), getattr(expected, name)
        assert (found is None) == (wanted is None), name
        assert found is None or np.array_equal(found, wanted), name


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("columns", PARTS)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_the_index_on_disk_is_that_in_memory(tmp_path, rng, model, n, columns):
    embeddings = whole_rows(rng, n)
    build_sorted_columns(embeddings, model, tmp_path, columns=columns)
    assert_index_of(tmp_path, model.codes(embeddings), columns)


@pytest.mark.parametrize("columns", PARTS)
@pytest.mark.parametrize("n", [1, 64, 128, 129, 192, 193, 1000, 1344])
@pytest.mark.usefixtures("small_chunks")
def test_chunks_make_no_difference(tmp_path, rng, model, n, columns):
    embeddings = whole_rows(rng, n)
    build_sorted_columns(embeddings, model, tmp_path, columns=columns, n_threads=2)
    assert_index_of(tmp_path, model.codes(embeddings), columns)


def test_threads_and_memory_maps_make_no_difference(tmp_path, rng):
    embeddings = rng.standard_normal((70_000, 24)).astype(np.float16)
    np.save(tmp_path / "embeddings.npy", embeddings)
    model = default_column_model(embeddings[:2000], encoder=None, n_columns=7)
    built = []
    for n_threads in (1, 2, None):
        for mode in ("r", "c", None):
            folder = tmp_path / f"{n_threads}-{mode}"
            folder.mkdir()
            rows = np.load(tmp_path / "embeddings.npy", mmap_mode=mode)
            build_sorted_columns(rows, model, folder, n_threads=n_threads)
            built.append(content(folder))
    assert all(each == built[0] for each in built)
    with threadpool_limits(1, user_api="blas"):
        assert_index_of(tmp_path / "1-r", model.codes(embeddings), "full")


def test_changes_in_a_copy_on_write_map_are_kept(tmp_path, rng, model):
    np.save(tmp_path / "embeddings.npy", whole_rows(rng, 500))
    changed = np.load(tmp_path / "embeddings.npy", mmap_mode="c")
    changed[:] += 1
    expected = changed.copy()
    folder = tmp_path / "index"
    folder.mkdir()
    build_sorted_columns(changed, model, folder)
    assert np.array_equal(changed, expected)
    assert_index_of(folder, model.codes(expected), "full")


def test_files_are_those_of_numpy(tmp_path, rng, model):
    embeddings = whole_rows(rng, 321)
    build_sorted_columns(embeddings, model, tmp_path)
    for file in tmp_path.iterdir():
        np.save(tmp_path / "again.npy", np.load(file))
        assert (tmp_path / "again.npy").read_bytes() == file.read_bytes()


def test_an_index_that_is_there_is_replaced(tmp_path, rng, model):
    for n, columns in ((300, "full"), (200, "codes"), (100, "bits"), (100, "full")):
        embeddings = whole_rows(rng, n)
        build_sorted_columns(embeddings, model, tmp_path, columns=columns)
        assert_index_of(tmp_path, model.codes(embeddings), columns)


@pytest.mark.parametrize("columns", PARTS)
def test_progress_is_monotone_and_complete(tmp_path, rng, model, small_chunks, columns):
    seen = []
    build_sorted_columns(
        whole_rows(rng, 1000),
        model,
        tmp_path,
        columns=columns,
        progress=lambda *at: seen.append(at),
    )
    total = 1000 if columns == "codes" else 2000
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert len(seen) > 8


class StopError(Exception):
    pass


def stop_at(limit, error=StopError):
    """Return a progress callback that raises at `limit` rows, and the list of what it got."""
    seen = []

    def progress(done, total):
        seen.append(done)
        if done >= limit:
            raise error

    return progress, seen


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
@pytest.mark.usefixtures("small_chunks", "journal_at_once")
def test_a_stopped_build_is_continued(tmp_path, rng, model, error):
    embeddings = whole_rows(rng, 2000)
    starts = []
    for limit in (512, 1500, 2800, 4000):
        progress, seen = stop_at(limit, error)
        with pytest.raises(error):
            build_sorted_columns(embeddings, model, tmp_path, progress=progress, n_threads=2)
        assert (tmp_path / JOURNAL_FILE).is_file()
        assert not (tmp_path / "offsets.npy").exists()
        starts.append(seen[0])
    assert starts == [0, 512, 1536, 2800]
    seen = []
    build_sorted_columns(embeddings, model, tmp_path, progress=lambda *at: seen.append(at))
    assert seen[0] == seen[-1] == (4000, 4000)
    assert_index_of(tmp_path, model.codes(embeddings), "full")


def changed_model(model):
    return ColumnModel(model.kind, model.names, model.anchors * 2, model.edges)


@pytest.mark.parametrize(
    "change",
    [
        lambda e, m, _: (e[:-1], m, "full"),
        lambda e, m, _: (e.astype(np.float32), m, "full"),
        lambda e, m, _: (e[::-1].copy(), m, "full"),
        lambda e, m, _: (e, changed_model(m), "full"),
        lambda e, m, _: (e, m, "bits"),
        lambda e, m, _: (e, m, "codes"),
        lambda e, m, folder: ((folder / "order.npy").unlink(), (e, m, "full"))[1],
        lambda e, m, folder: ((folder / JOURNAL_FILE).write_text("{"), (e, m, "full"))[1],
        lambda e, m, folder: ((folder / JOURNAL_FILE).write_text("[]"), (e, m, "full"))[1],
    ],
    ids=["rows", "dtype", "content", "model", "bits", "codes", "file", "torn", "no-journal"],
)
@pytest.mark.usefixtures("small_chunks", "journal_at_once")
def test_another_build_starts_afresh(tmp_path, rng, model, change):
    embeddings = whole_rows(rng, 2000)
    progress, _ = stop_at(3000)
    with pytest.raises(StopError):
        build_sorted_columns(embeddings, model, tmp_path, progress=progress)
    embeddings, model, columns = change(embeddings, model, tmp_path)
    seen = []
    build_sorted_columns(
        embeddings, model, tmp_path, columns=columns, progress=lambda *at: seen.append(at)
    )
    assert seen[0][0] == 0
    assert_index_of(tmp_path, model.codes(embeddings), columns)


def test_an_error_in_a_thread_stops_the_build(tmp_path, rng, model, small_chunks, monkeypatch):
    def full_disk(self, pieces):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrayFile, "write", full_disk)
        with pytest.raises(OSError, match="no space left"):
            build_sorted_columns(whole_rows(rng, 900), model, tmp_path)
    embeddings = whole_rows(rng, 900)
    build_sorted_columns(embeddings, model, tmp_path)
    assert_index_of(tmp_path, model.codes(embeddings), "full")


def test_unknown_parts_and_too_many_rows_are_refused(tmp_path, model):
    with pytest.raises(CatalogError, match="expected columns 'full', 'bits' or 'codes', got 'all'"):
        build_sorted_columns(np.ones((3, DIM)), model, tmp_path, columns="all")
    many = np.broadcast_to(np.zeros(DIM, np.float16), (2**32, DIM))
    with pytest.raises(CatalogError, match=r"at most 4,294,967,295 rows.*make smaller shards"):
        build_sorted_columns(many, model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_pieces_are_read_as_they_were_written(tmp_path):
    file = ArrayFile(tmp_path / "a.npy", "<u4", (3, 10))
    assert not file.exists()
    file.create()
    assert file.exists()
    file.write([(25, np.arange(5, dtype=np.uint32)), (0, np.full(2, 7, np.uint32))])
    assert file.read(24, 3).tolist() == [0, 0, 1]
    expected = np.zeros((3, 10), np.uint32)
    expected[0, :2], expected[2, 5:] = 7, np.arange(5)
    assert np.array_equal(np.load(file.path), expected)
    assert not ArrayFile(file.path, "<u4", (3, 11)).exists()


def test_a_journal_waits_a_second(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(array_build.time, "monotonic", lambda: now[0])
    build = ArrayBuild(tmp_path, {"a.npy": ("|u1", (4,))}, {"x": 1})

    def journaled():
        return json.loads((tmp_path / JOURNAL_FILE).read_text())["done"]

    build.advance(n=1)
    assert journaled() == {}
    now[0] += 1.5
    build.advance(n=2)
    assert journaled() == {"n": 2}
    build.advance(n=3)
    assert journaled() == {"n": 2}
    build.flush()
    assert journaled() == ArrayBuild(tmp_path, {"a.npy": ("|u1", (4,))}, {"x": 1}).done == {"n": 3}
    build.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"]


def test_files_are_flushed_before_the_journal_speaks_of_them(tmp_path, monkeypatch):
    """A power loss cannot be tried here; the order of events can."""
    events, write = [], array_build.write_json
    sync = ArrayFile.sync

    def synced(file):
        events.append(file.path.name)
        sync(file)

    def journaled(path, value):
        events.append(dict(value["done"]))
        write(path, value)

    monkeypatch.setattr(ArrayFile, "sync", synced)
    monkeypatch.setattr(array_build, "write_json", journaled)
    build = ArrayBuild(tmp_path, {"a.npy": ("|u1", (4,)), "b.npy": ("|u1", (4,))}, {})
    build.advance(n=1)
    build.flush()
    assert events == [{}, "a.npy", "b.npy", {"n": 1}]


def test_what_a_kill_left_of_the_last_write_is_removed(tmp_path, rng, model):
    (tmp_path / ".offsets.npy.0123456789ab.tmp").touch()
    (tmp_path / f".{JOURNAL_FILE}.0123456789ab.tmp").touch()
    embeddings = whole_rows(rng, 10)
    build_sorted_columns(embeddings, model, tmp_path)
    assert_index_of(tmp_path, model.codes(embeddings), "full")


SETUP = """
import json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
from clipbranches_widget import array_build, column_build
from clipbranches_widget.column_model import ColumnModel, equi_depth_edges

folder = Path(sys.argv[1])
n_rows, n_columns, dim = map(int, sys.argv[2:5])
rng = np.random.default_rng(1)
embeddings = rng.integers(-8, 9, size=(n_rows, dim)).astype(np.float16)
anchors = rng.integers(-4, 5, size=(n_columns, dim)).astype(np.float32)
edges = equi_depth_edges(embeddings[:5000].astype(np.float32) @ anchors.T)
model = ColumnModel("centroids", tuple(map(str, range(n_columns))), anchors, edges)
"""

KILLS = """
column_build.BLOCK_ROWS, column_build._CHUNK_CODES, column_build._SORT_ROWS = 64, 64, 192
array_build._JOURNAL_S = 0
log = folder.with_name("rows.log")
encode, derive = column_build._codes, column_build._derive_column

def slow_codes(model, rows):
    start = (rows.ctypes.data - embeddings.ctypes.data) // embeddings.strides[0]
    with log.open("a") as file:
        file.write(f"{start} ")
    time.sleep(0.004)
    return encode(model, rows)

def slow_column(chunks, column, *args, **options):
    with log.open("a") as file:
        file.write(f"{n_rows + column} ")
    time.sleep(0.004)
    derive(chunks, column, *args, **options)

column_build._codes, column_build._derive_column = slow_codes, slow_column
random.seed(7)
n_kills, is_done = 0, False
while not is_done:
    journal = folder / array_build.JOURNAL_FILE
    done = json.loads(journal.read_text())["done"] if journal.is_file() else {}
    first = done.get("n_rows", 0)
    if first == n_rows:
        first += done.get("n_columns", 0)
    log.write_text("")
    child = os.fork()
    if not child:
        column_build.build_sorted_columns(embeddings, model, folder, n_threads=2)
        os._exit(0)
    time.sleep(random.random() * 0.12)
    is_done = os.waitpid(child, os.WNOHANG)[0] != 0
    if not is_done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        n_kills += 1
    started = [int(word) for word in log.read_text().split()]
    assert not started or min(started) == first, (first, started)
    assert n_kills < 500
np.save(folder.with_name("expected.npy"), model.codes(embeddings))
print(n_kills)
"""

MEMORY = """
from clipbranches_widget.storage import open_array
import threadpoolctl

np.save(folder / "embeddings.npy", embeddings)
del embeddings
column_build._CHUNK_CODES, column_build._SORT_ROWS = 2**18, 2**17
Path("/proc/self/clear_refs").write_text("5")

def peak_kib():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

before = peak_kib()
rows = open_array(folder / "embeddings.npy")
column_build.build_sorted_columns(rows, model, folder, n_threads=2)
print(peak_kib() - before)
"""


def run(script, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", SETUP + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={"OPENBLAS_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_a_build_killed_again_and_again_ends_the_same_and_redoes_nothing(tmp_path):
    folder = tmp_path / "shard"
    folder.mkdir()
    assert int(run(KILLS, folder, 3000, 16, DIM)) >= 10
    assert_index_of(folder, np.load(tmp_path / "expected.npy"), "full")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measured on Linux")
@pytest.mark.parametrize("n_rows", [400_000, 3_000_000])
def test_memory_does_not_grow_with_the_rows(tmp_path, n_rows):
    """The files of 3 million rows have 210 MB; the embeddings, memory-mapped, 48 MB."""
    growth_kib = int(run(MEMORY, tmp_path, n_rows, 8, 8))
    assert growth_kib < 30_000
