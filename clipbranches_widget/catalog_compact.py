"""Join small shards and erase removed rows (layer 6); row ids stay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_change import changing, commit, folder_of, placed
from clipbranches_widget.catalog_writer import ROWS_PER_SHARD, CatalogWriter
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.integrity import ITEMS_FILE, SKIPPED_FILE, identity
from clipbranches_widget.manifest import ShardEntry
from clipbranches_widget.shard import Shard
from clipbranches_widget.stage_bars import StageBars, StageProgress
from clipbranches_widget.thumbnails import ThumbnailPack

if TYPE_CHECKING:
    from clipbranches_widget.sorted_columns import ColumnParts

_BLOCK_ROWS = 16_384


def compact(
    catalog: Catalog | str | Path,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    progress: bool = False,
) -> Catalog:
    """Join neighbouring shards into larger ones, and erase what is stored of removed rows.

    Searches ask every shard, so many small ones, as appends make them, cost time. Answers stay
    the same, but for what the vector indexes, which are approximate, propose.

    Parameters
    ----------
    catalog
        An open catalog, or the folder of one.
    rows_per_shard
        Neighbours are joined where they hold no more than so many rows together; a shard that
        is larger stays.
    progress
        Show progress bars.

    Returns
    -------
    Catalog
        Opened anew. Catalogs and sessions that are open keep what they had.

    Raises
    ------
    CatalogNotFoundError, CatalogCorruptError
        As of `Catalog.open`.
    CatalogError
        ``rows_per_shard < 1``, a folder that cannot be written, or another writer that works on it.

    Notes
    -----
    The new shards need their space beside the old ones. Those appear in one step at the end, and
    these are deleted afterwards; while an open Catalog, in any process, still reads from them, they
    stay, and the next change of the catalog deletes them. A call that is killed or fails leaves
    the catalog as it was. On Windows, where an open file cannot be deleted, it is the same.
    """
    if rows_per_shard < 1:
        raise CatalogError(f"expected rows_per_shard >= 1, got {rows_per_shard}")
    folder = folder_of(catalog)
    with changing(folder, "compact") as (current, stage), StageBars(show=progress) as bars:
        groups = list(_groups(current, rows_per_shard))
        if any(_is_rewritten(current, group) for group in groups):
            _rewrite(current, stage, groups, bars)
    return Catalog.open(folder)


def _rewrite(
    catalog: Catalog, stage: Path, groups: Sequence[list[Shard]], progress: StageProgress
) -> None:
    """Write the shards of a compact catalog and let them take the place of the old ones."""
    model = ColumnModel.open(catalog.path)
    old = catalog.manifest
    kept: dict[int, ShardEntry] = {}
    new: dict[int, ShardEntry] = {}
    for group in groups:
        first = group[0]
        if not _is_rewritten(catalog, group):
            kept[first.first_row] = old.shards[first.number]
            continue
        part = stage / f"{first.number:04d}"
        part.mkdir()
        entry = _joined(catalog, group, part, model, progress)
        new[first.first_row] = replace(entry, folder=f"{part.name}/{entry.folder}")
    moved = dict(zip(new, placed(catalog.path, stage, list(new.values())), strict=True))
    shards = tuple(entry for _, entry in sorted((kept | moved).items()))
    commit(catalog.path, replace(old, shards=shards, identity=identity(old)))


def _groups(catalog: Catalog, rows_per_shard: int) -> Iterator[list[Shard]]:
    """Yield neighbouring shards that become one, in order: as many as fit, from the first on."""
    group: list[Shard] = []
    for shard in catalog.shards:
        if group and sum(each.n_rows for each in group) + shard.n_rows > rows_per_shard:
            yield group
            group = []
        group.append(shard)
    yield group


def _is_rewritten(catalog: Catalog, group: Sequence[Shard]) -> bool:
    """Return whether shards are joined, or hold something of removed rows."""
    return len(group) > 1 or bool(group[0].embeddings[group[0].among(catalog.removed_rows)].any())


def _joined(
    catalog: Catalog,
    group: Sequence[Shard],
    folder: Path,
    model: ColumnModel,
    progress: StageProgress,
) -> ShardEntry:
    """Write one shard from several."""
    n_rows = sum(shard.n_rows for shard in group)
    parts = catalog.manifest.column_parts
    with CatalogWriter(
        folder,
        encoder_info=catalog.encoder_info,
        rows_per_shard=n_rows,
        columns="full" if parts == "order" else cast("ColumnParts", parts),
        first_row=group[0].first_row,
    ) as writer:
        for shard in group:
            _copy(catalog, shard, writer)
            progress("shards", writer.n_rows, n_rows)
        (entry,) = writer.finish_shards(model, skipped=_skipped(catalog, group), progress=progress)
    return entry


def _copy(catalog: Catalog, shard: Shard, writer: CatalogWriter) -> None:
    """Append a shard's rows to a writer; of removed ones nothing but their line."""
    import pyarrow.parquet as pq

    items = pq.read_table(shard.file(ITEMS_FILE)).drop_columns(["row"])
    thumbnails = ThumbnailPack.open(shard.path, shard.n_rows)
    removed = shard.among(catalog.removed_rows)
    gone = set(removed.tolist())
    for start in range(0, shard.n_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, shard.n_rows)
        block = np.array(shard.embeddings[start:stop])
        block[removed[(removed >= start) & (removed < stop)] - start] = 0
        pictures = [
            b"" if row in gone else thumbnails.get(row) or b"" for row in range(start, stop)
        ]
        writer.append(block, items.slice(start, stop - start), pictures)


def _skipped(catalog: Catalog, group: Sequence[Shard]) -> list[tuple[str, str]]:
    """Return what was left out when the shards were appended."""
    import pyarrow.parquet as pq

    found: list[tuple[str, str]] = []
    for shard in group:
        if SKIPPED_FILE in catalog.manifest.shards[shard.number].pieces:
            table = pq.read_table(shard.file(SKIPPED_FILE))
            found += zip(*(table.column(n).to_pylist() for n in ("uri", "reason")), strict=True)
    return found
