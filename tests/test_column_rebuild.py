"""Changing the stored parts of a column index: every transition, kills at every step, no stray."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clipbranches_widget import array_build, catalog_lock, column_build, column_rebuild
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.column_rebuild import rebuild_columns
from clipbranches_widget.errors import CatalogCorruptError, CatalogError, CatalogNotFoundError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.integrity import read_manifest
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.storage import write_json

PARTS = ("full", "bits", "codes")


def catalogs(folder, rows, rows_per_shard):
    """Return catalogs of the same images, by the parts of the column index that they store."""
    full = from_embeddings(rows, folder / "full", rows_per_shard=rows_per_shard)
    left_out = {
        "bits": {"order.npy"},
        "codes": {"order.npy", "prefix.npy"},
        "order": {"prefix.npy"},  # as the first catalogs were
    }
    for parts, names in left_out.items():
        target = folder / parts
        shutil.copytree(full.path, target, ignore=lambda _, found, n=names: n & set(found))
        shards = [
            replace(shard, pieces={k: v for k, v in shard.pieces.items() if k not in names})
            for shard in full.manifest.shards
        ]
        manifest = replace(full.manifest, shards=tuple(shards))
        write_json(target / "catalog.json", manifest.to_dict())
    return {parts: folder / parts for parts in ("full", *left_out)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return catalogs of three shards."""
    rows = np.random.default_rng(2).standard_normal((500, 4))
    return catalogs(tmp_path_factory.mktemp("built"), rows, rows_per_shard=220)


@pytest.fixture
def copy_of(built, tmp_path):
    return lambda parts: Path(shutil.copytree(built[parts], tmp_path / "a.cbcat"))


def tree(folder):
    """Return the content of every file below a folder, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def columns_of(catalog):
    n_columns = catalog.manifest.n_columns
    return [
        SortedColumns.open(shard.path, n_columns=n_columns, n_rows=shard.n_rows)
        for shard in catalog.shards
    ]


@pytest.mark.parametrize("after", PARTS)
@pytest.mark.parametrize("before", [*PARTS, "order"])
def test_every_change_gives_the_catalog_built_so(built, copy_of, before, after):
    folder = copy_of(before)
    files = {path: path.stat() for path in folder.rglob("*") if path.suffix != ".json"}
    reader = Catalog.open(folder)
    mapped, lazy = columns_of(reader)[1], Catalog.open(folder)
    catalog = rebuild_columns(folder, columns=after)
    assert catalog.info()["column_parts"] == after
    catalog.verify()
    assert tree(folder) == tree(built[after])
    for path, old in files.items():
        if path.is_file():
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == (old.st_ino, old.st_mtime_ns)
    # What was opened before goes on, with what it has or what is there.
    expected = SortedColumns.from_codes(np.array(mapped.codes))
    for columns in (mapped, columns_of(lazy)[1]):
        for name in ("codes", "offsets", "order", "prefix"):
            found = getattr(columns, name)
            assert found is None or np.array_equal(found, getattr(expected, name))
    reader.verify()


def test_progress_bars(copy_of, capsys):
    rebuild_columns(copy_of("codes"), progress=True)
    shown = capsys.readouterr().err
    for number in (1, 2, 3):
        assert f"column index {number}/3: 100%" in shown


def test_one_call_at_a_time(built, copy_of, monkeypatch):
    folder = copy_of("codes")

    def meanwhile(*_, **__):
        rebuild_columns(folder, columns="bits")

    with monkeypatch.context() as patch:
        patch.setattr(column_rebuild, "derive_parts", meanwhile)
        with pytest.raises(
            CatalogError, match=r"expected no other writer on .*, got rebuild_columns"
        ):
            rebuild_columns(folder)
    rebuild_columns(folder)
    assert tree(folder) == tree(built["full"])


def test_a_lock_file_that_was_removed_is_no_lock(copy_of, monkeypatch):
    folder = copy_of("codes")

    def too_late(lock):
        (folder / catalog_lock.LOCK_FILE).unlink()
        return True

    monkeypatch.setattr(catalog_lock, "try_lock", too_late)
    with pytest.raises(CatalogError, match="expected no other writer"):
        rebuild_columns(folder)


def test_what_cannot_be_rebuilt(tmp_path, copy_of):
    with pytest.raises(CatalogNotFoundError, match="expected a catalog"):
        rebuild_columns(tmp_path / "none")
    with pytest.raises(CatalogError, match="expected columns 'full', 'bits' or 'codes', got 7"):
        rebuild_columns(tmp_path / "none", columns=7)
    folder = copy_of("codes")
    (folder / catalog_lock.LOCK_FILE).mkdir()
    with pytest.raises(CatalogError, match="expected a catalog folder that can be written"):
        rebuild_columns(folder)
    next(folder.glob("shards/*/codes.npy")).write_bytes(b"")
    with pytest.raises(CatalogCorruptError, match=r"codes\.npy"):
        rebuild_columns(folder)


def test_columns_that_are_journaled_are_not_derived_again(built, copy_of, monkeypatch):
    monkeypatch.setattr(array_build, "_JOURNAL_S", 0)
    folder, derive, derived = copy_of("codes"), column_build._derive_column, []
    n_columns = Catalog.open(folder).manifest.n_columns

    def failing(chunks, column, *args, **options):
        derived.append(column)
        if len(derived) == n_columns + n_columns // 2:
            raise OSError("no space left on device")
        derive(chunks, column, *args, **options)

    monkeypatch.setattr(column_build, "_derive_column", failing)
    with pytest.raises(OSError, match="no space left"):
        rebuild_columns(folder)
    Catalog.open(folder).verify()
    n_before = len(derived)
    rebuild_columns(folder)
    assert len(derived) - n_before <= 2 * n_columns - n_columns // 4
    assert tree(folder) == tree(built["full"])


@pytest.mark.parametrize("damage", ["other", "torn", "content"])
def test_a_pending_change_that_does_not_fit_is_dropped(built, copy_of, monkeypatch, damage):
    folder = copy_of("codes")

    class KilledError(Exception):
        pass

    def killed(*_):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(column_rebuild, "_move_all", killed)
        with pytest.raises(KilledError):
            rebuild_columns(folder)
    pending = folder / column_rebuild.PENDING_FILE
    if damage == "other":
        write_json(pending, replace(read_manifest(folder), about="another").to_dict())
    elif damage == "torn":
        pending.write_text("{")
    else:
        stage = folder / "shards/0001" / column_rebuild.STAGE
        (stage / "order.npy").write_bytes(b"damaged")
    rebuild_columns(folder, columns="full")
    assert tree(folder) == tree(built["full"])


KILLS = """
import itertools, os, shutil, signal, sys
from pathlib import Path
from clipbranches_widget import array_build
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.column_rebuild import rebuild_columns

array_build._JOURNAL_S = 0
folders, before, after = Path(sys.argv[1]), *sys.argv[3:]
work = Path(sys.argv[2]) / "a.cbcat"

def tree(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

def killing(function, counter, limit):
    def counted(*args, **options):
        if next(counter) == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    return counted

expected = {parts: tree(folders / parts) for parts in (before, after)}
seen = []
for limit in itertools.count():
    shutil.copytree(folders / before, work)
    child = os.fork()
    if not child:
        counter = itertools.count()
        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
            setattr(os, name, killing(getattr(os, name), counter, limit))
        rebuild_columns(work, columns=after)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    catalog = Catalog.open(work)
    catalog.verify()
    seen.append(catalog.info()["column_parts"])
    wanted = before if limit % 3 == 0 and before != "order" else after
    rebuild_columns(work, columns=wanted)
    assert tree(work) == expected[wanted], (limit, set(tree(work)) ^ set(expected[wanted]))
    assert not [path for path in work.rglob("*") if path.is_dir() and not any(path.iterdir())]
    shutil.rmtree(work)
    if not status:
        break
assert seen == [before] * seen.count(before) + [after] * seen.count(after), seen
print(limit)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize(
    ("before", "after"), [("codes", "full"), ("full", "codes"), ("order", "bits")]
)
def test_a_kill_at_any_step_leaves_a_catalog_and_no_stray(tmp_path, before, after):
    """Kill before each change of the file system, then go on, or back."""
    catalogs(tmp_path, np.tile(np.eye(3), (50, 1)), rows_per_shard=80)  # three columns
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), str(tmp_path / "work"), before, after],
        capture_output=True,
        text=True,
        env={"OPENBLAS_NUM_THREADS": "1"},
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
