"""Whether the files of a catalog are there, whole, and belong together (layer 2).

`check_catalog` reads a bounded sample of each file, `check_content` every byte. Every failure is a
`CatalogCorruptError` that names the file and the repair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.manifest import Manifest, Piece, ShardEntry
from clipbranches_widget.storage import (
    FORMAT_VERSION,
    REBUILD,
    array_header,
    checksum,
    fingerprint,
    read_json,
)

MANIFEST_FILE = "catalog.json"
SKIPPED_FILE = "skipped.parquet"
ITEMS_FILE = "items.parquet"
EMBEDDINGS_FILE = "embeddings.npy"
MAP_REPAIR = (
    "the map alone is damaged; compute it again with clipbranches_widget.build_map(PATH) or "
    "clipbranches map PATH"
)
ITEM_COLUMNS = ("row", "uri", "caption", "width", "height", "content_hash")


def read_manifest(folder: Path) -> Manifest:
    """Read ``catalog.json`` of a catalog folder."""
    file = folder / MANIFEST_FILE
    value = read_json(file)
    try:
        return Manifest.from_dict(value, supported_version=FORMAT_VERSION)
    except CatalogCorruptError as error:
        raise CatalogCorruptError(f"{file}: {error}: {REBUILD}") from error


def identity(manifest: Manifest) -> str:
    """Return what names a catalog for ever: the content of its first shard as it was built."""
    return manifest.identity or manifest.shards[0].pieces[EMBEDDINGS_FILE].checksum


def pieces(folder: Path, manifest: Manifest) -> Iterator[tuple[Path, Piece]]:
    """Yield every file that the manifest lists, and what it says of it."""
    for name, piece in manifest.pieces.items():
        yield folder / name, piece
    for entry in manifest.shards:
        for name, piece in entry.pieces.items():
            yield folder / entry.folder / name, piece


def check_catalog(folder: Path, manifest: Manifest) -> None:
    """Check existence, size, header and sampled fingerprint of every file, and their agreement.

    At most 4 MiB are read of each file.
    """
    for file, piece in pieces(folder, manifest):
        with _repair_of(file, manifest):
            _check_piece(file, piece)
    for name in sorted({"columns.json", "columns.npz", SKIPPED_FILE} - set(manifest.pieces)):
        message = f"expected {folder / name} in the manifest, found no entry: {REBUILD}"
        raise CatalogCorruptError(message)
    header = read_json(folder / "columns.json")
    found = header.get("hash") if isinstance(header, dict) else None
    if found != manifest.column_model_hash:
        raise CatalogCorruptError(
            f"{folder / 'columns.json'}: expected column model {manifest.column_model_hash}, got "
            f"{found}: {REBUILD}"
        )
    _check_map(folder, manifest)
    _check_removed(folder, manifest)
    for entry in manifest.shards:
        _check_shard(folder / entry.folder, entry, dim=manifest.dim, n_columns=manifest.n_columns)


def check_shard_files(folder: Path, entry: ShardEntry, names: Iterable[str]) -> None:
    """Check existence, size, header and sampled fingerprint of some files of one shard."""
    for name in names:
        _check_piece(folder / entry.folder / name, entry.pieces[name])


def check_content(folder: Path, manifest: Manifest) -> None:
    """Compare every byte of every file with the checksums of the manifest."""
    for file, piece in pieces(folder, manifest):
        with _repair_of(file, manifest):
            _check_piece(file, piece)
            if checksum(file) != piece.checksum:
                message = f"{file}: its content changed since the catalog was built: {REBUILD}"
                raise CatalogCorruptError(message)


@contextlib.contextmanager
def _repair_of(file: Path, manifest: Manifest) -> Iterator[None]:
    """Name another repair where the map is damaged: it needs neither images nor embeddings."""
    try:
        yield
    except CatalogCorruptError as error:
        if file.name != manifest.map_file:
            raise
        raise CatalogCorruptError(str(error).replace(REBUILD, MAP_REPAIR)) from error


def _check_piece(file: Path, piece: Piece) -> None:
    """Check a file against the manifest without reading all of it."""
    try:
        n_bytes = file.stat().st_size
        sampled = fingerprint(file)
    except OSError as error:  # also one that a writer deletes meanwhile
        raise CatalogCorruptError(f"expected a file at {file}, found none: {REBUILD}") from error
    if n_bytes != piece.n_bytes:
        message = f"{file}: expected {piece.n_bytes} bytes, got {n_bytes}: {REBUILD}"
        raise CatalogCorruptError(message)
    if piece.shape is not None:
        shape, dtype = array_header(file)
        if (shape, dtype.str) != (piece.shape, piece.dtype):
            message = (
                f"{file}: expected {piece.dtype} {piece.shape}, got {dtype.str} {shape}: {REBUILD}"
            )
            raise CatalogCorruptError(message)
    if sampled != piece.fingerprint:
        message = f"{file}: its content changed since the catalog was built: {REBUILD}"
        raise CatalogCorruptError(message)


def _check_map(folder: Path, manifest: Manifest) -> None:
    """Check that the map, if there is one, has the form of one of at most these rows."""
    if manifest.map_file is None:
        return
    piece = manifest.pieces[manifest.map_file]
    shape = piece.shape or ()
    if piece.dtype != "<u2" or len(shape) != 2 or shape[1] != 2 or shape[0] > manifest.n_rows:
        raise CatalogCorruptError(
            f"{folder / manifest.map_file}: expected <u2 (at most {manifest.n_rows}, 2), got "
            f"{piece.dtype} {piece.shape}: {MAP_REPAIR}"
        )


def _check_removed(folder: Path, manifest: Manifest) -> None:
    """Check that the list of removed rows, if there is one, has the form of one."""
    if manifest.removed_file is None:
        return
    piece = manifest.pieces[manifest.removed_file]
    shape = piece.shape or ()
    if piece.dtype != "<i8" or len(shape) != 1 or shape[0] > manifest.n_rows:
        raise CatalogCorruptError(
            f"{folder / manifest.removed_file}: expected <i8 (at most {manifest.n_rows},), got "
            f"{piece.dtype} {piece.shape}: {REBUILD}"
        )


def _check_shard(folder: Path, entry: ShardEntry, *, dim: int, n_columns: int) -> None:
    """Check that the files of a shard hold the same number of rows."""
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {
        EMBEDDINGS_FILE: ("<f2", (entry.n_rows, dim)),
        "codes.npy": ("|u1", (n_columns, entry.n_rows)),
        "offsets.npy": ("<i8", (n_columns, 257)),
        "thumbnails.npy": ("<i8", (entry.n_rows + 1,)),
    }
    required = {ITEMS_FILE, "vectors.usearch", "thumbnails.bin", *arrays}
    for name in sorted(required - set(entry.pieces)):
        message = f"expected {folder / name} in the manifest, found no entry: {REBUILD}"
        raise CatalogCorruptError(message)
    optional: dict[str, tuple[str, tuple[int, ...]]] = {
        "prefix.npy": ("<u8", (n_columns, 31, -(-entry.n_rows // 64))),
        "order.npy": ("<u4", (n_columns, entry.n_rows)),
    }
    arrays |= {name: form for name, form in optional.items() if name in entry.pieces}
    for name, expected in arrays.items():
        piece = entry.pieces[name]
        if (piece.dtype, piece.shape) != expected:
            message = f"expected {expected[0]} {expected[1]}, got {piece.dtype} {piece.shape}"
            raise CatalogCorruptError(f"{folder / name}: {message}: {REBUILD}")
    _check_items(folder / ITEMS_FILE, n_rows=entry.n_rows)


def _check_items(file: Path, *, n_rows: int) -> None:
    """Check the row count and the columns that the Parquet footer announces."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        footer = pq.read_metadata(file)
    except (pa.ArrowInvalid, OSError) as error:
        message = f"{file} is not a Parquet file ({error}): {REBUILD}"
        raise CatalogCorruptError(message) from error
    if footer.num_rows != n_rows:
        message = f"{file}: expected {n_rows} rows, got {footer.num_rows}: {REBUILD}"
        raise CatalogCorruptError(message)
    names = footer.schema.to_arrow_schema().names
    if tuple(names[: len(ITEM_COLUMNS)]) != ITEM_COLUMNS:
        message = f"{file}: expected columns {', '.join(ITEM_COLUMNS)}, got {', '.join(names)}"
        raise CatalogCorruptError(f"{message}: {REBUILD}")
