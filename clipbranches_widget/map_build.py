"""Compute the map of a finished catalog (layer 5).

No file is changed in place, and a kill at any moment leaves a catalog that opens: the new map is a
new file, then ``catalog.json`` names it, then the old one is deleted. Who has the catalog open
goes on; `Catalog.map` follows.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_lock import only_writer
from clipbranches_widget.catalog_map import compute_map, save_map
from clipbranches_widget.errors import CatalogCorruptError, CatalogError
from clipbranches_widget.integrity import MANIFEST_FILE, check_catalog, read_manifest
from clipbranches_widget.map_layout import MAX_POINTS
from clipbranches_widget.shard_writer import describe_piece
from clipbranches_widget.stage_bars import StageBars, StageProgress
from clipbranches_widget.storage import write_json


def build_map(
    catalog: Catalog | str | Path,
    *,
    max_points: int = MAX_POINTS,
    seed: int = 0,
    progress: bool | StageProgress = False,
    cancel: threading.Event | None = None,
) -> Catalog:
    """Compute the map of a catalog, in place of the one it has or has not.

    Near images come to lie near each other; the directions mean nothing. `index` does this by
    itself; catalogs of embeddings and older ones have no map until this is called. It also
    repairs a catalog whose map, and nothing else, is damaged.

    Parameters
    ----------
    catalog
        An open catalog, or the folder of one.
    max_points
        Of a larger catalog, so many images are placed, drawn at random.
    seed
        Same catalog, seed and `max_points`: same map.
    progress
        Show a progress bar, or call a function with (stage, done, total).
    cancel
        Set it to stop within about a second; the catalog is then as before.

    Returns
    -------
    Catalog
        Opened anew; `Catalog.map` holds the map. Catalog objects that are open already see it,
        too, in every process.

    Raises
    ------
    CatalogNotFoundError, CatalogCorruptError
        As of `Catalog.open`.
    CatalogError
        `max_points` below 3, a folder that cannot be written, or a call of `rebuild_columns` or
        `build_map` that writes at this moment.
    MissingPackageError
        openTSNE is not installed.
    Cancelled
        `cancel` was set.

    Notes
    -----
    Takes about 4 s for 5,000 images and a minute for 100,000 or more, on two cores.
    """
    if max_points < 3:
        raise CatalogError(f"expected max_points of at least 3, got {max_points}")
    source = _without_map(catalog)
    is_cancelled = None if cancel is None else cancel.is_set
    with StageBars(show=progress is True) as bars:
        report = progress if callable(progress) else bars
        points = compute_map(
            [shard.embeddings for shard in source.shards],
            max_points=max_points,
            seed=seed,
            removed=source.removed_rows,
            progress=lambda done, total: report("map", done, total),
            is_cancelled=is_cancelled,
        )
    with only_writer(source.path, "build_map"):
        file = save_map(source.path, points)
        manifest = read_manifest(source.path).with_map(file.name, describe_piece(file))
        write_json(source.path / MANIFEST_FILE, manifest.to_dict())
        _clean(source.path, file.name)
    return Catalog.open(source.path)


def _without_map(catalog: Catalog | str | Path) -> Catalog:
    """Open a catalog; one whose map is damaged, without it."""
    if isinstance(catalog, Catalog):
        return catalog
    try:
        return Catalog.open(catalog)
    except CatalogCorruptError:
        folder = Path(catalog).expanduser().absolute()
        manifest = read_manifest(folder)
        if manifest.map_file is None:
            raise
        bare = manifest.with_map(None)
        check_catalog(folder, bare)
        return Catalog(folder, bare)


def _clean(folder: Path, kept: str) -> None:
    """Delete other maps and what a kill left of one being written."""
    for file in [*folder.glob("map-*.npy"), *folder.glob(".map-*.npy.*.tmp")]:
        if file.name != kept:
            with contextlib.suppress(OSError):  # in use, on Windows: the next call deletes it
                file.unlink()
