"""Write the pieces of a catalog into a folder, block by block (layer 3).

Memory stays bounded: embeddings go to the disk as they come, one shard's items are held until the
shard is full, and the indexes are built shard by shard from the memory-mapped embeddings.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog_map import compute_map, save_map
from clipbranches_widget.column_build import build_sorted_columns, optional_files
from clipbranches_widget.column_model import (
    SAMPLE_ROWS,
    ColumnModel,
    TextTower,
    default_column_model,
)
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.integrity import (
    EMBEDDINGS_FILE,
    ITEMS_FILE,
    MANIFEST_FILE,
    SKIPPED_FILE,
)
from clipbranches_widget.manifest import Manifest, ShardEntry
from clipbranches_widget.shard_writer import (
    ShardWriter,
    WrittenShard,
    describe_files,
    shard_entry,
    shard_folder,
    write_skipped,
)
from clipbranches_widget.sorted_columns import ColumnParts
from clipbranches_widget.stage_bars import StageProgress
from clipbranches_widget.storage import FORMAT_VERSION, open_array, write_json
from clipbranches_widget.vector_index import build_vector_index

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 1_000_000


IndexShards = Callable[[ColumnModel, Sequence[WrittenShard]], tuple[ShardEntry, ...]]
"""Builds the indexes of shards, on saved columns, and says what the shards are then."""


class CatalogWriter:
    """Writes a catalog into an empty folder; use it as a context manager inside `staged_folder`.

    Parameters
    ----------
    folder
        Existing, empty.
    encoder_info
        The model that makes the embeddings.
    rows_per_shard
        A shard is closed when it holds so many rows; at least 1. None: `ROWS_PER_SHARD`.
    columns : "full", "bits" or "codes"
        What to store of the column index; see `SortedColumns`.
    first_row
        Row id of the first row: 0 for a new catalog.
    """

    def __init__(
        self,
        folder: Path,
        *,
        encoder_info: EncoderInfo,
        rows_per_shard: int | None = None,
        columns: ColumnParts = "full",
        first_row: int = 0,
    ) -> None:
        if rows_per_shard is not None and rows_per_shard < 1:
            raise CatalogError(f"expected rows_per_shard >= 1, got {rows_per_shard}")
        optional_files(columns)  # raises where it is unknown, before the work starts
        self.folder = folder
        self.encoder_info = encoder_info
        self.n_rows = 0
        self._first_row = first_row
        self.rows_per_shard = rows_per_shard
        self.columns: ColumnParts = columns
        self._shards: list[WrittenShard] = []
        self._open: ShardWriter | None = None

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close open files, also after an error."""
        if self._open is not None:
            self._open.close()

    def append(
        self,
        embeddings: NDArray[np.floating],
        items: pa.Table,
        thumbnails: Sequence[bytes] | None = None,
    ) -> None:
        """Append rows: they get the next row ids.

        Parameters
        ----------
        embeddings : (b, dim) float
            Norm 1; stored as float16.
        items
            b rows with the columns of a catalog but ``row``, in any order, then the user's. The
            same columns and types in every call.
        thumbnails
            b encoded images, empty bytes for none; None for no thumbnails at all.
        """
        n_thumbnails = len(embeddings) if thumbnails is None else len(thumbnails)
        if not len(embeddings) == len(items) == n_thumbnails:
            raise CatalogError(
                f"expected as many items and thumbnails as embeddings, got {len(items)}, "
                f"{n_thumbnails} and {len(embeddings)}"
            )
        rows_per_shard = self.rows_per_shard or ROWS_PER_SHARD
        start = 0
        while start < len(embeddings):
            shard = self._current()
            stop = min(len(embeddings), start + rows_per_shard - shard.n_rows)
            picked = slice(start, stop)
            shard.append(
                embeddings[picked],
                items.slice(start, stop - start),
                [b""] * (stop - start) if thumbnails is None else thumbnails[picked],
            )
            self.n_rows += stop - start
            start = stop
            if shard.n_rows == rows_per_shard:
                self._finish_shard()

    def take(self, folder: Path, n_rows: int) -> None:
        """Take over a shard that a `ShardWriter` wrote on the same disk, as the next rows.

        Its items get their rows from whatever indexes the shards.
        """
        self._finish_shard()
        place = shard_folder(self.folder, len(self._shards))
        place.parent.mkdir(exist_ok=True)
        folder.rename(place)
        self._shards.append(WrittenShard(place, self._first_row + self.n_rows, n_rows))
        self.n_rows += n_rows

    def finish(
        self,
        *,
        text_tower: TextTower | None = None,
        skipped: Sequence[tuple[str, str]] = (),
        source_root: Path | None = None,
        about: str = "",
        progress: StageProgress | None = None,
        with_map: bool = False,
        index_shards: IndexShards | None = None,
    ) -> None:
        """Build the indexes and write the manifest; nothing can be appended afterwards.

        Parameters
        ----------
        text_tower
            Names the columns by concepts; None names them by captions of typical images.
        skipped
            Images left out: (uri, reason).
        source_root
            Folder that relative uris start from.
        about
            Free text for the manifest, such as an attribution.
        progress
            Called now and then.
        with_map
            Compute the map, too.
        index_shards
            Builds the indexes elsewhere; None builds them here.
        """
        self._finish_shard()
        finish_catalog(
            self.folder,
            self._shards,
            encoder_info=self.encoder_info,
            index_shards=index_shards
            or (lambda model, _: self.finish_shards(model, progress=progress)),
            text_tower=text_tower,
            skipped=skipped,
            source_root=source_root,
            about=about,
            progress=progress,
            with_map=with_map,
        )

    def finish_shards(
        self,
        model: ColumnModel,
        *,
        skipped: Sequence[tuple[str, str]] = (),
        progress: StageProgress | None = None,
    ) -> tuple[ShardEntry, ...]:
        """Build the indexes of all shards, on columns that are there already; return the shards.

        Nothing can be appended afterwards. Images left out, (uri, reason), are kept with the
        last shard.
        """
        self._finish_shard()
        for number, shard in enumerate(self._shards):
            part = f" {number + 1}/{len(self._shards)}" if len(self._shards) > 1 else ""
            folder = shard.folder
            embeddings = open_array(folder / EMBEDDINGS_FILE, dtype=np.float16)
            build_vector_index(
                embeddings,
                folder / "vectors.usearch",
                progress=_labelled(progress, f"vector index{part}"),
            )
            build_sorted_columns(
                embeddings,
                model,
                folder,
                columns=self.columns,
                progress=_labelled(progress, f"column index{part}"),
            )
        if skipped and self._shards:
            write_skipped(self._shards[-1].folder / SKIPPED_FILE, skipped)
        return tuple(
            shard_entry(self.folder, shard, describe_files(shard.folder)) for shard in self._shards
        )

    def _current(self) -> ShardWriter:
        if self._open is None:
            folder = shard_folder(self.folder, len(self._shards))
            folder.parent.mkdir(exist_ok=True)
            self._open = ShardWriter(folder, dim=self.encoder_info.dim)
        return self._open

    def _finish_shard(self) -> None:
        if self._open is not None:
            n_rows = self._open.n_rows
            first_row = self._first_row + self.n_rows - n_rows
            self._open.finish(first_row)
            self._shards.append(WrittenShard(self._open.folder, first_row, n_rows))
            self._open = None


def finish_catalog(
    folder: Path,
    shards: Sequence[WrittenShard],
    *,
    encoder_info: EncoderInfo,
    index_shards: IndexShards,
    text_tower: TextTower | None = None,
    skipped: Sequence[tuple[str, str]] = (),
    source_root: Path | None = None,
    about: str = "",
    progress: StageProgress | None = None,
    with_map: bool = False,
) -> None:
    """Choose the columns of a new catalog, have its shards indexed, write the rest.

    Parameters
    ----------
    folder
        Of the catalog, with the shards in it.
    shards
        All of them, in the order of their rows; at least one.
    encoder_info, text_tower, skipped, source_root, about, progress, with_map, index_shards
        See `CatalogWriter`.
    """
    if not shards:
        raise CatalogError("expected at least one row, got none")
    model = _column_model(shards, text_tower, _labelled(progress, "column choice"))
    model.save(folder)
    entries = index_shards(model, shards)
    if with_map:
        embeddings = [open_array(s.folder / EMBEDDINGS_FILE, dtype=np.float16) for s in shards]
        save_map(folder, compute_map(embeddings, progress=_labelled(progress, "map")))
    write_skipped(folder / SKIPPED_FILE, skipped)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        encoder=asdict(encoder_info),
        n_rows=shards[-1].first_row + shards[-1].n_rows,
        column_model_hash=model.hash,
        n_columns=model.n_columns,
        pieces=describe_files(folder),
        shards=entries,
        source_root=str(source_root) if source_root is not None else None,
        about=about,
        created=_created(),
    )
    write_json(folder / MANIFEST_FILE, manifest.to_dict())


def _column_model(
    shards: Sequence[WrittenShard],
    text_tower: TextTower | None,
    progress: Callable[[int, int], None] | None,
) -> ColumnModel:
    """Fit the columns on an even sample of all shards."""
    if progress is not None:
        progress(0, 1)
    n_rows = shards[-1].first_row + shards[-1].n_rows
    share = max(1, -(-n_rows // SAMPLE_ROWS))
    vectors, captions = [], []
    for shard in shards:
        embeddings = open_array(shard.folder / EMBEDDINGS_FILE, dtype=np.float16)
        local_rows = np.arange(-shard.first_row % share, len(embeddings), share)
        vectors.append(embeddings[local_rows])
        known = _captions(shard.folder / ITEMS_FILE, local_rows)
        rows = (local_rows + shard.first_row).tolist()
        captions += [text or f"row {row}" for text, row in zip(known, rows, strict=True)]
    model = default_column_model(
        np.concatenate(vectors), encoder=text_tower, captions=captions, seed=0
    )
    if progress is not None:
        progress(1, 1)
    return model


def _captions(path: Path, local_rows: NDArray[np.int64]) -> list[str]:
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=["caption"]).column("caption")
    captions: list[str] = column.take(local_rows).to_pylist()
    return captions


def _created() -> dict[str, str]:
    packages = ("clipbranches_widget", "numpy", "pyarrow", "usearch")
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _labelled(progress: StageProgress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
