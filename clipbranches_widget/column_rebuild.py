"""Change which parts of the column index a finished catalog stores (layer 5).

Embeddings, codes and answers stay as they are. No file is changed in place, and a kill at any
moment leaves a catalog that opens; the next call finishes or cleans up. Inside the catalog::

    shards/0000/columns.rebuild/    new files and the journal of their build
    columns.pending.json            the next ``catalog.json``, once all new files are complete
    catalog.lock                    locked while a call runs: `catalog_lock`

From the moment that ``columns.pending.json`` exists, the change will happen: the files are moved
to their places, it becomes ``catalog.json``, and then the files that this one no longer lists
are deleted. Who has the catalog open goes on reading the old files.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from clipbranches_widget.array_build import ArrayBuild, ArrayFile
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_lock import only_writer
from clipbranches_widget.column_build import (
    BUILD_FORMAT,
    Progress,
    derive_parts,
    optional_arrays,
    optional_files,
)
from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.file_lock import sync_folder
from clipbranches_widget.integrity import MANIFEST_FILE, read_manifest
from clipbranches_widget.manifest import Manifest, ShardEntry
from clipbranches_widget.shard_writer import describe_piece
from clipbranches_widget.sorted_columns import (
    CODES_FILE,
    OFFSETS_FILE,
    ORDER_FILE,
    PREFIX_FILE,
    ColumnParts,
)
from clipbranches_widget.stage_bars import StageBars, StageProgress
from clipbranches_widget.storage import (
    FORMAT_VERSION,
    fingerprint,
    open_array,
    read_json,
    write_json,
)

PENDING_FILE, STAGE = "columns.pending.json", "columns.rebuild"

_OPTIONAL_FILES = {PREFIX_FILE, ORDER_FILE}


def rebuild_columns(
    path: str | Path, *, columns: ColumnParts = "full", progress: bool = False
) -> Catalog:
    """Change how much of its column index a catalog stores, without embedding anything again.

    Parameters
    ----------
    path
        Folder of the catalog.
    columns : "full", "bits" or "codes"
        9, 5 or 1 bytes per image and column. Answers are the same, but slower with less.
    progress
        Show progress bars.

    Returns
    -------
    Catalog
        Opened anew. Catalog objects that are open already keep working, in every process; they
        use what they had, or do without.

    Raises
    ------
    CatalogNotFoundError, CatalogCorruptError
        As of `Catalog.open`.
    CatalogError
        Unknown `columns`, a folder that cannot be written, or another call that runs.

    Notes
    -----
    A call that was interrupted or killed left a catalog that works; the same call again goes on
    where it stopped. New files need their space beside the old ones until the end.
    """
    wanted = set(optional_files(columns))
    folder = Catalog.open(path).path
    with only_writer(folder, "rebuild_columns"), StageBars(show=progress) as bars:
        settle(folder)
        manifest = read_manifest(folder)
        if any(wanted != _OPTIONAL_FILES & set(entry.pieces) for entry in manifest.shards):
            _prepare(folder, manifest, columns, bars)
            _finish(folder)
        _clean(folder, read_manifest(folder))
    return Catalog.open(folder)


def _prepare(
    folder: Path, manifest: Manifest, columns: ColumnParts, progress: StageProgress
) -> None:
    """Build the files that are missing, and write the next manifest as pending."""
    entries = []
    for number, entry in enumerate(manifest.shards):
        part = f" {number + 1}/{len(manifest.shards)}" if len(manifest.shards) > 1 else ""
        label = f"column index{part}"

        def report(done: int, total: int, label: str = label) -> None:
            progress(label, done, total)

        missing = _build_missing(folder / entry.folder, entry, manifest.n_columns, columns, report)
        dropped = _OPTIONAL_FILES - set(optional_files(columns))
        pieces = {name: piece for name, piece in entry.pieces.items() if name not in dropped}
        pieces |= {file.name: describe_piece(file) for file in missing}
        entries.append(replace(entry, pieces=pieces))
    write_json(folder / PENDING_FILE, replace(manifest, shards=tuple(entries)).to_dict())


def _build_missing(
    shard: Path, entry: ShardEntry, n_columns: int, columns: ColumnParts, report: Progress
) -> list[Path]:
    """Build the files that a shard lacks in its stage, or go on with that; return them."""
    arrays = optional_arrays(columns, n_columns=n_columns, n_rows=entry.n_rows)
    missing = {name: form for name, form in arrays.items() if name not in entry.pieces}
    if not missing:
        return []
    stage = shard / STAGE
    stage.mkdir(exist_ok=True)
    identity = {
        "format": BUILD_FORMAT,
        "codes": entry.pieces[CODES_FILE].checksum,
        "files": sorted(missing),
    }
    build = ArrayBuild(stage, missing, identity)
    codes = ArrayFile(shard / CODES_FILE, "|u1", (n_columns, entry.n_rows))
    derive_parts(build, codes, open_array(shard / OFFSETS_FILE, dtype=np.int64), progress=report)
    build.flush()
    return [file.path for file in build.files.values()]


def settle(folder: Path) -> None:
    """Carry out or drop the change that a killed call had announced, for whoever holds the lock.

    What it had only begun stays, for the next call to go on with.
    """
    _finish(folder)
    _remove_torn(folder)


def _finish(folder: Path) -> None:
    """Carry out a pending change; one that does not fit what is there is dropped."""
    pending, file = None, folder / PENDING_FILE
    with contextlib.suppress(CatalogCorruptError):
        pending = Manifest.from_dict(read_json(file), supported_version=FORMAT_VERSION)
    if pending is not None and _move_all(folder, read_manifest(folder), pending):
        write_json(folder / MANIFEST_FILE, pending.to_dict())
    file.unlink(missing_ok=True)


def _move_all(folder: Path, current: Manifest, pending: Manifest) -> bool:
    """Move new files to their places; return whether all of the pending manifest is there."""
    if _without_optional(current) != _without_optional(pending):
        return False
    for old, new in zip(current.shards, pending.shards, strict=True):
        shard = folder / new.folder
        for name in _OPTIONAL_FILES & set(new.pieces):
            built = shard / STAGE / name
            if name not in old.pieces and built.is_file():
                built.replace(shard / name)
            place = shard / name
            if not place.is_file() or fingerprint(place) != new.pieces[name].fingerprint:
                return False
        sync_folder(shard)
    return True


def _without_optional(manifest: Manifest) -> Manifest:
    shards = tuple(
        replace(
            entry,
            pieces={name: entry.pieces[name] for name in set(entry.pieces) - _OPTIONAL_FILES},
        )
        for entry in manifest.shards
    )
    return replace(manifest, shards=shards)


def _clean(folder: Path, manifest: Manifest) -> None:
    """Delete stages, and files that the manifest does not list."""
    for entry in manifest.shards:
        shard = folder / entry.folder
        for name in _OPTIONAL_FILES - set(entry.pieces):
            (shard / name).unlink(missing_ok=True)
        if (shard / STAGE).is_dir():
            shutil.rmtree(shard / STAGE)


def _remove_torn(folder: Path) -> None:
    """Delete what a kill left of an atomic write in the catalog's folder."""
    for name in (MANIFEST_FILE, PENDING_FILE):
        for torn in folder.glob(f".{name}.*.tmp"):
            torn.unlink()
