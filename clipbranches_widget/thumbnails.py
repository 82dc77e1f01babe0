"""Small WebP pictures of images: made, packed in a catalog, cached on disk (layer 1).

A thumbnail is bounded in bytes as well as in pixels: sixty of them travel in one widget
message. Aspect is kept, alpha is laid over white.

On disk, in each shard: ``thumbnails.bin``, the WebP files one after the other, and
``thumbnails.npy``, int64 offsets, one more than rows; row i is ``bin[offsets[i]:offsets[i+1]]``
and an empty range means that the row has no packed thumbnail. Such rows are drawn when first
asked for and kept by `ThumbnailCache` in the user's cache folder.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.npy import map_array

if TYPE_CHECKING:
    from PIL.Image import Image

THUMBNAIL_PX = 160
"""Default longest side of a thumbnail."""

MAX_BYTES_AT_160_PX = 10_240
"""Byte bound at 160 px; other sizes scale with the area."""

_QUALITIES = (80, 65, 50, 35, 20)


def thumbnail_webp(image: Image, size: int = THUMBNAIL_PX) -> bytes:
    """Return `image` as WebP no larger than `size` x `size` pixels, aspect kept.

    Quality falls from 80 to 20 until the bytes fit 10 KB at 160 px (in proportion to the
    area for other sizes); an image that is noise even then loses pixels. Images smaller than
    `size` are not enlarged.

    Parameters
    ----------
    image
        Any PIL image; RGB is fastest.
    size
        Pixels of the longest side, at least 1.

    Examples
    --------
    >>> from PIL import Image
    >>> data = thumbnail_webp(Image.new("RGB", (640, 320), "red"), size=64)
    >>> Image.open(BytesIO(data)).size
    (64, 32)
    """
    max_bytes = max(MAX_BYTES_AT_160_PX * size * size // (160 * 160), 512)
    small = _on_white(image)
    small.thumbnail((size, size), reducing_gap=2.0)
    while True:
        for quality in _QUALITIES:
            buffer = BytesIO()
            small.save(buffer, "WEBP", quality=quality, method=2)
            if buffer.tell() <= max_bytes:
                return buffer.getvalue()
        if max(small.size) <= 8:  # the container alone is larger than the bound
            return buffer.getvalue()
        small.thumbnail((max(small.width * 3 // 4, 1), max(small.height * 3 // 4, 1)))


def _on_white(image: Image) -> Image:
    """Return a copy of `image` as RGB, alpha over white."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image.copy()
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, rgba).convert("RGB")


class ThumbnailPackWriter:
    """Write the thumbnails of one shard, row by row, into an existing folder.

    Use as a context manager, or call `close`: the offsets are written only then, so a pack cut off
    half way does not open.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._file = (self._folder / "thumbnails.bin").open("wb")
        self._offsets = [0]

    def append(self, data: bytes) -> None:
        """Add the next row's thumbnail; empty bytes mean none."""
        self._file.write(data)
        self._offsets.append(self._offsets[-1] + len(data))

    def close(self) -> None:
        """Finish the pack. A second call does nothing."""
        if self._file.closed:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        np.save(self._folder / "thumbnails.npy", np.asarray(self._offsets, np.int64))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


class ThumbnailPack:
    """The packed thumbnails of one shard, memory-mapped, read-only.

    Reading is thread-safe: a lookup slices an immutable map.
    """

    def __init__(self, offsets: NDArray[np.int64], data: mmap.mmap | bytes) -> None:
        self._offsets = offsets
        self._data = data

    @classmethod
    def open(cls, folder: Path, n_rows: int) -> Self:
        """Map the pack in `folder`.

        Raises
        ------
        CatalogCorruptError
            A file is missing or damaged, or the pack is not one of `n_rows` rows.
        """
        folder = Path(folder)
        offsets_path, data_path = folder / "thumbnails.npy", folder / "thumbnails.bin"
        repair = "delete both thumbnails files to draw them on demand, or rebuild the catalog"
        try:
            offsets = map_array(offsets_path)
            n_bytes = data_path.stat().st_size
        except (OSError, ValueError, EOFError) as error:
            raise CatalogCorruptError(
                f"{folder}: thumbnails cannot be read: {error}; {repair}"
            ) from error
        if offsets.dtype != np.int64 or offsets.shape != (n_rows + 1,):
            raise CatalogCorruptError(
                f"{offsets_path}: expected {n_rows + 1} int64 offsets, got {offsets.dtype} "
                f"{offsets.shape}; {repair}"
            )
        end = int(offsets[-1])
        if int(offsets[0]) != 0 or end != n_bytes or bool((np.diff(offsets) < 0).any()):
            raise CatalogCorruptError(
                f"{data_path}: expected {end} bytes in ascending offsets, got {n_bytes}; {repair}"
            )
        if n_bytes == 0:  # an empty file cannot be mapped
            return cls(offsets, b"")
        with data_path.open("rb") as file:
            return cls(offsets, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def get(self, local_row: int) -> bytes | None:
        """Return the WebP bytes of a row of this shard, None where none was packed.

        Raises
        ------
        IndexError
            `local_row` is outside [0, rows).
        """
        if not 0 <= local_row < len(self):
            raise IndexError(f"expected a row below {len(self)}, got {local_row}")
        data = self._data[int(self._offsets[local_row]) : int(self._offsets[local_row + 1])]
        return data or None


class ThumbnailCache:
    """Thumbnails made on demand, kept in the user's cache folder up to a number of bytes.

    Several processes may share the folder: files are written under a temporary name and renamed.
    A cache that cannot be written (disk full, read-only) still returns what it was asked for.

    Parameters
    ----------
    folder
        None: ``thumbnails`` in platformdirs' cache folder of this package.
    max_bytes
        When writes pass it, the files unused for longest go until four fifths are left.
    """

    def __init__(self, folder: Path | None = None, *, max_bytes: int = 512 * 1024 * 1024) -> None:
        if folder is None:
            import platformdirs

            folder = Path(platformdirs.user_cache_dir("clipbranches_widget")) / "thumbnails"
        self.folder = Path(folder)
        self.max_bytes = max_bytes
        self._lock = Lock()
        self._n_bytes: int | None = None  # measured on the first write

    def get(self, key: str, make: Callable[[], bytes]) -> bytes:
        """Return the thumbnail stored under `key`, made by `make` when there is none.

        Parameters
        ----------
        key
            Names the image and the size, such as ``"<content hash>-160"``. Any text is safe.
        make
            Called without a lock held; its errors pass through and nothing is stored.
        """
        name = blake2b(key.encode(), digest_size=16).hexdigest()
        path = self.folder / name[:2] / f"{name}.webp"
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if data:
                os.utime(path)  # the age that `_shrink` goes by
                return data
        data = make()
        with contextlib.suppress(OSError):
            self._store(path, data)
        return data

    def _store(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        with self._lock:
            if self._n_bytes is None:
                self._n_bytes = sum(n_bytes for _, n_bytes, _ in self._files())
            else:
                self._n_bytes += len(data)
            if self._n_bytes > self.max_bytes:
                self._n_bytes = self._shrink()

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return age, bytes and path of every stored file."""
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):  # another process may delete it meanwhile
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return found

    def _shrink(self) -> int:
        """Delete the files unused for longest; return the bytes left."""
        files = sorted(self._files())
        n_bytes = sum(size for _, size, _ in files)
        for _, size, path in files:
            if n_bytes <= self.max_bytes * 4 // 5:
                break
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
                n_bytes -= size
        return n_bytes
