"""Write the pieces of one shard, and describe files for the manifest (layer 4)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.integrity import EMBEDDINGS_FILE, ITEM_COLUMNS, ITEMS_FILE
from clipbranches_widget.manifest import Piece, ShardEntry
from clipbranches_widget.storage import ArrayAppender, array_header, checksum, fingerprint
from clipbranches_widget.thumbnails import ThumbnailPackWriter

if TYPE_CHECKING:
    import pyarrow as pa

ITEMS_GROUP_ROWS = 8_192
"""Items are stored in groups of rows: small ones, since a page of results reads some of each."""


@dataclass(frozen=True, slots=True)
class WrittenShard:
    """A shard with embeddings, items and thumbnails; its indexes may be missing.

    Attributes
    ----------
    folder
        Where it is.
    first_row, n_rows
        Its rows are ``first_row <= row < first_row + n_rows``.
    """

    folder: Path
    first_row: int
    n_rows: int


class ShardWriter:
    """Writes one shard's embeddings, items and thumbnails into a new folder."""

    def __init__(self, folder: Path, *, dim: int) -> None:
        folder.mkdir()
        self.folder = folder
        self.n_rows = 0
        self._items: list[pa.Table] = []
        self._embeddings = ArrayAppender(
            folder / EMBEDDINGS_FILE, dtype=np.float16, row_shape=(dim,)
        )
        self._thumbnails = ThumbnailPackWriter(folder)

    def append(
        self, embeddings: NDArray[np.floating], items: pa.Table, thumbnails: Sequence[bytes]
    ) -> None:
        """Append rows; see `CatalogWriter.append`."""
        self._embeddings.append(embeddings)
        self._items.append(items)
        for thumbnail in thumbnails:
            self._thumbnails.append(thumbnail)
        self.n_rows += len(embeddings)

    def finish(self, first_row: int) -> None:
        """Write the items of the rows, at least one, and close the files."""
        self.close()
        write_items(self.folder / ITEMS_FILE, self._items, first_row)

    def close(self) -> None:
        """Close the files, also of a shard without rows."""
        self._embeddings.close()
        self._thumbnails.close()


def shard_folder(catalog: Path, number: int) -> Path:
    """Return the folder of a shard of a new catalog."""
    return catalog / "shards" / f"{number:04d}"


def shard_entry(catalog: Path, shard: WrittenShard, pieces: Mapping[str, Piece]) -> ShardEntry:
    """Return what the manifest says of a shard."""
    place = shard.folder.relative_to(catalog).as_posix()
    return ShardEntry(place, shard.first_row, shard.n_rows, pieces)


def write_items(path: Path, tables: Sequence[pa.Table], first_row: int) -> None:
    """Write the items of a shard, without their rows, under the rows from `first_row` on."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    joined = pa.concat_tables(tables)
    user_columns = [name for name in joined.column_names if name not in ITEM_COLUMNS]
    rows = pa.array(np.arange(first_row, first_row + len(joined), dtype=np.int64))
    ordered = joined.select([*ITEM_COLUMNS[1:], *user_columns]).add_column(0, "row", rows)
    pq.write_table(ordered, path, compression="zstd", row_group_size=ITEMS_GROUP_ROWS)


def write_skipped(path: Path, skipped: Sequence[tuple[str, str]]) -> None:
    """Write the images that were left out: (uri, reason)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "uri": pa.array([uri for uri, _ in skipped], pa.string()),
        "reason": pa.array([reason for _, reason in skipped], pa.string()),
    }
    pq.write_table(pa.table(columns), path)


def describe_files(folder: Path) -> dict[str, Piece]:
    """Describe the files directly in a folder; reads all of them, one a thread."""
    files = [entry for entry in sorted(folder.iterdir()) if entry.is_file()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(
            zip([file.name for file in files], pool.map(describe_piece, files), strict=True)
        )


def describe_piece(file: Path) -> Piece:
    """Return what a manifest says of a file; reads all of it."""
    shape, dtype = None, None
    if file.suffix == ".npy":
        shape, array_dtype = array_header(file)
        dtype = array_dtype.str
    return Piece(file.stat().st_size, fingerprint(file), checksum(file), shape, dtype)
