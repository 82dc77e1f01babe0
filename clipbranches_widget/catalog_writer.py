"""Write the pieces of a catalog into a folder, block by block (layer 3).

Memory stays bounded: embeddings go to the disk as they come, one shard's items are held until the
shard is full, and the indexes are built shard by shard from the memory-mapped embeddings.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
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
    ITEM_COLUMNS,
    ITEMS_FILE,
    MANIFEST_FILE,
    SKIPPED_FILE,
)
from clipbranches_widget.manifest import Manifest, Piece, ShardEntry
from clipbranches_widget.sorted_columns import ColumnParts
from clipbranches_widget.stage_bars import StageProgress
from clipbranches_widget.storage import (
    FORMAT_VERSION,
    ArrayAppender,
    array_header,
    checksum,
    fingerprint,
    open_array,
    write_json,
)
from clipbranches_widget.thumbnails import ThumbnailPackWriter
from clipbranches_widget.vector_index import build_vector_index

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_PER_SHARD = 1_000_000


class CatalogWriter:
    """Writes a catalog into an empty folder; use it as a context manager inside `staged_folder`.

    Parameters
    ----------
    folder
        Existing, empty.
    encoder_info
        The model that makes the embeddings.
    rows_per_shard
        A shard is closed when it holds so many rows; at least 1.
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
        rows_per_shard: int = ROWS_PER_SHARD,
        columns: ColumnParts = "full",
        first_row: int = 0,
    ) -> None:
        if rows_per_shard < 1:
            raise CatalogError(f"expected rows_per_shard >= 1, got {rows_per_shard}")
        optional_files(columns)  # raises where it is unknown, before the work starts
        self.folder = folder
        self.encoder_info = encoder_info
        self.n_rows = 0
        self._first_row = first_row
        self._rows_per_shard = rows_per_shard
        self._columns = columns
        self._shards: list[tuple[Path, int, int]] = []
        self._open: _ShardWriter | None = None

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
            self._open.close_files()

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
        start = 0
        while start < len(embeddings):
            shard = self._current()
            stop = min(len(embeddings), start + self._rows_per_shard - shard.n_rows)
            picked = slice(start, stop)
            shard.append(
                embeddings[picked],
                items.slice(start, stop - start),
                [b""] * (stop - start) if thumbnails is None else thumbnails[picked],
            )
            self.n_rows += stop - start
            start = stop
            if shard.n_rows == self._rows_per_shard:
                self._finish_shard()

    def finish(
        self,
        *,
        text_tower: TextTower | None = None,
        skipped: Sequence[tuple[str, str]] = (),
        source_root: Path | None = None,
        about: str = "",
        progress: StageProgress | None = None,
        with_map: bool = False,
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
        """
        self._finish_shard()
        if not self.n_rows:
            raise CatalogError("expected at least one row, got none")
        model = self._column_model(text_tower, _labelled(progress, "column choice"))
        model.save(self.folder)
        shards = self.finish_shards(model, progress=progress)
        if with_map:
            embeddings = [
                open_array(folder / EMBEDDINGS_FILE, dtype=np.float16)
                for folder, _, _ in self._shards
            ]
            save_map(self.folder, compute_map(embeddings, progress=_labelled(progress, "map")))
        _write_skipped(self.folder / SKIPPED_FILE, skipped)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            encoder=asdict(self.encoder_info),
            n_rows=self.n_rows,
            column_model_hash=model.hash,
            n_columns=model.n_columns,
            pieces=_pieces(self.folder),
            shards=shards,
            source_root=str(source_root) if source_root is not None else None,
            about=about,
            created=_created(),
        )
        write_json(self.folder / MANIFEST_FILE, manifest.to_dict())

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
        for number, (folder, _, _) in enumerate(self._shards):
            part = f" {number + 1}/{len(self._shards)}" if len(self._shards) > 1 else ""
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
                columns=self._columns,
                progress=_labelled(progress, f"column index{part}"),
            )
        if skipped and self._shards:
            _write_skipped(self._shards[-1][0] / SKIPPED_FILE, skipped)
        return tuple(
            ShardEntry(folder.relative_to(self.folder).as_posix(), first, n_rows, _pieces(folder))
            for folder, first, n_rows in self._shards
        )

    def _current(self) -> _ShardWriter:
        if self._open is None:
            folder = self.folder / "shards" / f"{len(self._shards):04d}"
            self._open = _ShardWriter(
                folder, first_row=self._first_row + self.n_rows, dim=self.encoder_info.dim
            )
        return self._open

    def _finish_shard(self) -> None:
        if self._open is not None:
            self._open.finish()
            self._shards.append((self._open.folder, self._open.first_row, self._open.n_rows))
            self._open = None

    def _column_model(
        self, text_tower: TextTower | None, progress: Callable[[int, int], None] | None
    ) -> ColumnModel:
        """Fit the columns on an even sample of all shards."""
        if progress is not None:
            progress(0, 1)
        share = max(1, -(-self.n_rows // SAMPLE_ROWS))
        vectors, captions = [], []
        for folder, first_row, _ in self._shards:
            embeddings = open_array(folder / EMBEDDINGS_FILE, dtype=np.float16)
            local_rows = np.arange(-first_row % share, len(embeddings), share)
            vectors.append(embeddings[local_rows])
            known = _captions(folder / ITEMS_FILE, local_rows)
            rows = (local_rows + first_row).tolist()
            captions += [text or f"row {row}" for text, row in zip(known, rows, strict=True)]
        model = default_column_model(
            np.concatenate(vectors), encoder=text_tower, captions=captions, seed=0
        )
        if progress is not None:
            progress(1, 1)
        return model


class _ShardWriter:
    """Writes one shard's embeddings, items and thumbnails."""

    def __init__(self, folder: Path, *, first_row: int, dim: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.first_row = first_row
        self.n_rows = 0
        self._items: list[pa.Table] = []
        self._embeddings = ArrayAppender(
            folder / EMBEDDINGS_FILE, dtype=np.float16, row_shape=(dim,)
        )
        self._thumbnails = ThumbnailPackWriter(folder)

    def append(
        self, embeddings: NDArray[np.floating], items: pa.Table, thumbnails: Sequence[bytes]
    ) -> None:
        self._embeddings.append(embeddings)
        self._items.append(items)
        for thumbnail in thumbnails:
            self._thumbnails.append(thumbnail)
        self.n_rows += len(embeddings)

    def finish(self) -> None:
        self.close_files()
        _write_items(self.folder / ITEMS_FILE, self._items, self.first_row, self.n_rows)

    def close_files(self) -> None:
        self._embeddings.close()
        self._thumbnails.close()


def _write_items(path: Path, tables: Sequence[pa.Table], first_row: int, n_rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    joined = pa.concat_tables(tables)
    user_columns = [name for name in joined.column_names if name not in ITEM_COLUMNS]
    rows = pa.array(np.arange(first_row, first_row + n_rows, dtype=np.int64))
    ordered = joined.select([*ITEM_COLUMNS[1:], *user_columns]).add_column(0, "row", rows)
    pq.write_table(ordered, path, compression="zstd", row_group_size=65_536)


def _write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "uri": pa.array([uri for uri, _ in skipped], pa.string()),
        "reason": pa.array([reason for _, reason in skipped], pa.string()),
    }
    pq.write_table(pa.table(columns), path)


def _captions(path: Path, local_rows: NDArray[np.int64]) -> list[str]:
    import pyarrow.parquet as pq

    column = pq.read_table(path, columns=["caption"]).column("caption")
    captions: list[str] = column.take(local_rows).to_pylist()
    return captions


def _pieces(folder: Path) -> dict[str, Piece]:
    """Describe the files directly in a folder."""
    return {file.name: describe_piece(file) for file in _files(folder)}


def _files(folder: Path) -> Iterator[Path]:
    return (entry for entry in sorted(folder.iterdir()) if entry.is_file())


def describe_piece(file: Path) -> Piece:
    """Return what a manifest says of a file; reads all of it."""
    shape, dtype = None, None
    if file.suffix == ".npy":
        shape, array_dtype = array_header(file)
        dtype = array_dtype.str
    return Piece(file.stat().st_size, fingerprint(file), checksum(file), shape, dtype)


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
