"""How a finished catalog is changed (layer 5): one writer, new files, then the manifest, then tidy.

No file that a reader may have is changed in place. New shards are built in ``change.stage/``, moved
to names in ``shards/`` that no manifest lists, and appear when ``catalog.json`` is replaced, in one
step. A kill before that leaves the catalog as it was, a kill after it the changed one; what it
leaves lying is deleted by the next writer. Old shards are deleted when nobody reads them any more:
every open `Catalog` holds its own (`file_lock.hold`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_lock import NOT_AT_A_URL, only_writer
from clipbranches_widget.catalog_store import is_remote
from clipbranches_widget.column_rebuild import settle
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.file_lock import delete_unless_held, sync_folder
from clipbranches_widget.integrity import ITEMS_FILE, MANIFEST_FILE, check_catalog, read_manifest
from clipbranches_widget.manifest import Manifest, ShardEntry
from clipbranches_widget.storage import sync_tree, write_json

STAGE, SHARDS = "change.stage", "shards"


def folder_of(catalog: Catalog | str | Path) -> Path:
    """Return the folder of an open catalog, or of one that can be opened.

    Raises
    ------
    CatalogNotFoundError, CatalogCorruptError
        As of `Catalog.open`.
    CatalogError
        It is at a URL.
    """
    if not isinstance(catalog, Catalog) and is_remote(catalog):
        raise CatalogError(NOT_AT_A_URL)
    return catalog.path if isinstance(catalog, Catalog) else Catalog.open(catalog).path


@contextlib.contextmanager
def changing(folder: Path, what: str) -> Iterator[tuple[Catalog, Path]]:
    """Be the one writer of a catalog; yield it as it is now, and an empty folder for new shards.

    Raises
    ------
    CatalogError
        Another writer works, or the folder cannot be written.
    """
    with only_writer(folder, what):
        settle(folder)
        _tidy(folder)
        stage = folder / STAGE
        stage.mkdir()
        try:
            manifest = read_manifest(folder)
            check_catalog(folder, manifest)
            yield Catalog(folder, manifest), stage  # not opened: so that it holds no old shards
        finally:
            _tidy(folder)


def placed(folder: Path, stage: Path, entries: Sequence[ShardEntry]) -> tuple[ShardEntry, ...]:
    """Flush new shards to the disk and move them beside the others, still in no manifest.

    Names are above all that are there, so that none ever stands for two contents at a time.
    """
    sync_tree(stage)
    first = max((int(path.name) for path in _numbered(folder)), default=-1) + 1
    moved = []
    for number, entry in enumerate(entries, start=first):
        name = f"{SHARDS}/{number:04d}"
        (stage / entry.folder).rename(folder / name)
        moved.append(replace(entry, folder=name))
    sync_folder(folder / SHARDS)
    return tuple(moved)


def commit(folder: Path, manifest: Manifest) -> None:
    """Let the changed catalog take the place of the old one, in one step."""
    write_json(folder / MANIFEST_FILE, manifest.to_dict())


def _tidy(folder: Path) -> None:
    """Delete what is no part of the catalog, unless somebody still reads it."""
    manifest = read_manifest(folder)
    shutil.rmtree(folder / STAGE, ignore_errors=True)
    listed = {entry.folder for entry in manifest.shards}
    for shard in _numbered(folder):
        if f"{SHARDS}/{shard.name}" not in listed and delete_unless_held(shard / ITEMS_FILE):
            shutil.rmtree(shard, ignore_errors=True)
    for file in [*folder.glob("removed-*.npy"), *folder.glob(".removed-*.npy.*.tmp")]:
        if file.name != manifest.removed_file:
            with contextlib.suppress(OSError):  # in use, on Windows
                file.unlink()


def _numbered(folder: Path) -> list[Path]:
    """Return the folders that are, were or were to be shards."""
    return [p for p in (folder / SHARDS).iterdir() if p.name.isdecimal() and p.is_dir()]
