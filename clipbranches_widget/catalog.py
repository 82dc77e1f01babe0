"""A catalog on disk: its manifest, shards, items and images (layer 2). Metadata, no queries.

A catalog is a folder, by custom named ``*.cbcat``::

    catalog.json            manifest: see `clipbranches_widget.manifest`
    columns.json, .npz      the column model, one for all shards
    skipped.parquet         images that could not be read: uri, reason
    map-HASH.npy            a place on a plane for each image; may be left out
    removed-HASH.npy        rows that were removed; left out where none was
    shards/0000/
        items.parquet       row (int64, catalog-wide), uri, caption (string), width, height
                            (int32), content_hash (string), then the user's columns
        embeddings.npy      (n, dim) float16, norm 1
        vectors.usearch     HNSW graph, key = local row
        codes.npy, offsets.npy               the column index,
        prefix.npy, order.npy                and parts of it that can be left out
        thumbnails.bin, thumbnails.npy       WebP bytes and (n + 1,) int64 offsets
        skipped.parquet                      of an appended shard: what was left out

Row ids are catalog-wide and permanent: row r of a shard that starts at row s is its local row
r - s. No file in the folder is ever changed in place. `Catalog.open` looks at every file but
reads only a bounded sample of each; `Catalog.verify` reads everything.
"""

from __future__ import annotations

import os
import weakref
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.catalog_map import CatalogMap, current_map
from clipbranches_widget.catalog_rows import CatalogRows
from clipbranches_widget.catalog_store import folder_at, is_remote
from clipbranches_widget.cluster_client import check_client
from clipbranches_widget.encoder import EncoderInfo
from clipbranches_widget.errors import (
    CatalogCorruptError,
    CatalogNotFoundError,
    EncoderError,
    ImageReadError,
)
from clipbranches_widget.file_lock import hold
from clipbranches_widget.images import read_image, resolve
from clipbranches_widget.integrity import (
    ITEMS_FILE,
    MANIFEST_FILE,
    SKIPPED_FILE,
    check_catalog,
    check_content,
    pieces,
    read_manifest,
)
from clipbranches_widget.remote import scheme
from clipbranches_widget.thumbnails import (
    THUMBNAIL_PX,
    ThumbnailCache,
    ThumbnailPack,
    thumbnail_webp,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from distributed import Client
    from PIL import Image

    from clipbranches_widget.encoder import Encoder


class Catalog(CatalogRows):
    """Images with their embeddings and indexes, read-only. Create it with `Catalog.open`.

    Safe to use from several threads. Two objects opened on the same folder are independent, and
    each keeps what it was opened on: `append`, `remove` and `compact` show in those opened
    afterwards. The length is the number of row ids, those of removed rows included.

    Attributes
    ----------
    path : Path
    manifest : Manifest
    shards : tuple of Shard
    removed_rows : (m,) int64
        Rows that `remove` hid, ascending.
    client : distributed.Client or None
        Of the cluster whose workers search it; None: this process does.
    url : str or None
        Where it was fetched from; None for a folder.
    """

    @classmethod
    def open(cls, path: str | Path, *, client: Client | None = None) -> Catalog:
        """Open a catalog folder and check that its pieces belong together.

        Existence, size, a sampled fingerprint and the header of every file are checked, at a
        cost of at most 4 MiB read per file. `verify` reads everything.

        Parameters
        ----------
        path
            The folder, or its URL, such as ``s3://bucket/photos.cbcat``: it is fetched once into
            the user's cache folder, and again what is new when the catalog there has grown.
        client : distributed.Client, optional
            Of a Dask cluster whose machines have the folder at the same path, or fetch it from
            the URL: its workers keep the shards open and search them, and only results move. The
            answers are the same.

        Raises
        ------
        CatalogNotFoundError
            No catalog at `path`.
        CatalogCorruptError
            A piece is missing, damaged or belongs to another catalog, or the format is newer;
            the message names the piece and the repair.
        ClusterError
            `client` is none, or is closed.
        """
        if client is not None:
            check_client(client)
        folder = folder_at(path)
        if not (folder / MANIFEST_FILE).is_file():
            raise CatalogNotFoundError(
                f"expected a catalog (a folder with {MANIFEST_FILE}) at {folder}, found "
                f"{'another folder' if folder.is_dir() else 'none'}: build one with "
                "clipbranches_widget.index(images, path) or clipbranches_widget.demo()"
            )
        manifest = read_manifest(folder)
        while True:
            held = [hold(folder / entry.folder / ITEMS_FILE) for entry in manifest.shards]
            try:
                check_catalog(folder, manifest)
                catalog = cls(folder, manifest, client)
                catalog.url = str(path) if is_remote(path) else None
            except CatalogCorruptError:
                _let_go(held)
                newer = read_manifest(folder)
                if newer == manifest:
                    raise
                manifest = newer  # files were dropped meanwhile, by a writer
            except BaseException:
                _let_go(held)
                raise
            else:
                weakref.finalize(catalog, _let_go, held)
                return catalog

    def __repr__(self) -> str:
        """Return one line: path, size, model."""
        model = self.encoder_info.model or "no encoder"
        shards = "1 shard" if len(self.shards) == 1 else f"{len(self.shards)} shards"
        size = f"{self.n_present:,} images"
        return f"<Catalog {self.path.name}: {size}, {model} ({self.dim}-d), {shards}>"

    @property
    def encoder_info(self) -> EncoderInfo:
        """The model that made the embeddings; kind "none" where it is not known."""
        return EncoderInfo(**self.manifest.encoder)

    @property
    def column_model_hash(self) -> str:
        """Name of the column model that the column index was built with."""
        return self.manifest.column_model_hash

    @cached_property
    def skipped(self) -> pa.Table:
        """Images that were left out when it was built or grew: uri and reason (strings)."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        entries = zip(self.shards, self.manifest.shards, strict=True)
        of_shards = [s.file(SKIPPED_FILE) for s, entry in entries if SKIPPED_FILE in entry.pieces]
        return pa.concat_tables(
            pq.read_table(file) for file in (self.path / SKIPPED_FILE, *of_shards)
        )

    @property
    def map(self) -> CatalogMap | None:
        """Where the images lie on the map; None where none was computed yet.

        Follows `build_map`, also one of another process.
        """
        found = current_map(self.path, self.manifest, self.opened)
        if found is None or not len(self.removed_rows):
            return found
        present = found  # for the closure: a map that is there
        return self.opened(("present map", found.name), lambda: present.without(self.removed_rows))

    def info(self) -> dict[str, Any]:
        """Return what there is to know about the catalog, as plain values."""
        encoder = self.encoder_info
        return {
            "path": str(self.path),
            "n_images": self.n_present,
            "n_removed": len(self.removed_rows),
            "n_skipped": len(self.skipped),
            "n_shards": len(self.shards),
            "encoder": encoder.kind,
            "model": encoder.model,
            "pretrained": encoder.pretrained,
            "dim": self.dim,
            "n_columns": self.manifest.n_columns,
            "column_parts": self.manifest.column_parts,
            "column_bytes": self.manifest.column_bytes,
            "has_map": self.manifest.map_file is not None,
            "bytes_on_disk": sum(piece.n_bytes for _, piece in pieces(self.path, self.manifest)),
            "source_root": self.manifest.source_root,
            "about": self.manifest.about,
            "format_version": self.manifest.format_version,
            "created": dict(self.manifest.created),
        }

    def verify(self) -> None:
        """Read every byte of every file and compare it with the checksums of the manifest.

        Raises
        ------
        CatalogCorruptError
            The first file that differs, by name. Cost: the whole catalog is read.
        """
        check_content(self.path, read_manifest(self.path))

    def uri(self, row: int) -> str:
        """Return where the image comes from; empty where that is not known."""
        return str(self._item("uri", row) or "")

    def caption(self, row: int) -> str:
        """Return the image's caption: plain text, possibly empty. Escape it before showing."""
        return str(self._item("caption", row) or "")

    def image(self, row: int) -> Image.Image:
        """Read an original image, RGB.

        Raises
        ------
        ImageReadError
            The catalog has no originals, or this one is gone or damaged; the message names it.
            (Its thumbnail is still there.)
        """
        uri = self.uri(row)
        if not uri:
            raise ImageReadError(
                f"row {row} has no image: this catalog was built from embeddings alone; give "
                "from_embeddings an items table with a 'uri' column"
            )
        try:
            return resolve(uri, root=self._root)
        except ImageReadError as error:
            raise ImageReadError(f"the image of row {row}: {error}") from error

    def thumbnail(self, row: int, size: int = THUMBNAIL_PX) -> bytes:
        """Return a small WebP image, at most `size` pixels wide and high.

        From the catalog's own pack where that is large enough; else drawn from the original and
        kept in the user's cache folder. Where the original is gone the packed one is returned.

        Raises
        ------
        ImageReadError
            Neither exists.
        """
        packed = self._packed_thumbnail(row)
        if packed is not None and size == THUMBNAIL_PX:
            return packed
        if packed is not None and size < THUMBNAIL_PX:
            return thumbnail_webp(read_image(packed), size)
        cache = self.opened("thumbnail cache", ThumbnailCache)
        try:
            return cache.get(
                f"{self._image_key(row)}-{size}", lambda: thumbnail_webp(self.image(row), size)
            )
        except ImageReadError:
            if packed is None:
                raise
            return packed

    def check_encoder(self, encoder: Encoder) -> None:
        """Check that an encoder is the one this catalog was built with.

        Raises
        ------
        EncoderError
            It is another model, other weights, or another dimension.
        """
        ours, theirs = self.encoder_info, encoder.info
        if ours.kind == "none" and ours.dim == theirs.dim:
            return
        same_model = (ours.kind, ours.model, ours.dim) == (theirs.kind, theirs.model, theirs.dim)
        if not same_model or ours.weights_hash != theirs.weights_hash:
            raise EncoderError(
                f"expected the encoder of this catalog, {ours}, got {theirs}: use "
                "load_encoder(catalog.encoder_info), or index the images with the other model"
            )

    def _packed_thumbnail(self, row: int) -> bytes | None:
        (shard, _, local_rows), *_ = self._by_shard(self.check_rows(row))
        pack = self.opened(
            ("thumbnails", shard.number), lambda: ThumbnailPack.open(shard.path, shard.n_rows)
        )
        return pack.get(int(local_rows[0]))

    def _image_key(self, row: int) -> str:
        """Name the content of an image: by its hash, or else by its place and date."""
        content_hash = self._item("content_hash", row)
        if content_hash:
            return str(content_hash)
        uri = self.uri(row)
        if scheme(uri):
            return uri
        file = Path(self._root or "", uri)
        changed = file.stat().st_mtime_ns if file.is_file() else 0
        return f"{file}|{changed}"

    @property
    def _root(self) -> Path | None:
        return Path(self.manifest.source_root) if self.manifest.source_root else None

    def _item(self, column: str, row: int) -> Any:
        return self.lines(row, [column]).column(0)[0].as_py()


def _let_go(held: list[int | None]) -> None:
    for descriptor in held:
        if descriptor is not None:
            os.close(descriptor)
