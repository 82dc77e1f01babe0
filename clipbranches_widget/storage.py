"""Files on disk: atomic writes, read-only memory maps, fingerprints (layer 1).

Nothing here knows what a catalog is. Every file appears complete or not at all: it is written
under a temporary name beside its place, flushed to the disk and renamed. Whole folders likewise:

``.NAME.building-TOKEN/``
    a folder under construction, beside the place ``NAME`` it will be renamed to;
``.NAME.building-TOKEN.lock``
    an empty file that its builder keeps locked. The lock dies with the process, so the next
    build of ``NAME`` knows which folders are left over from a killed one, and removes them.

Arrays are plain ``.npy`` files without pickled objects.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from clipbranches_widget.errors import CatalogCorruptError, CatalogExistsError
from clipbranches_widget.file_lock import sync_folder
from clipbranches_widget.npy import map_array, read_header

FORMAT_VERSION: int = 1
"""Version of the catalog format that this package writes and reads."""

REBUILD = "build the catalog again from its images or embeddings, or restore the file from a copy"

_WHOLE_FILE_BYTES = 4 * 2**20
_SAMPLED_BLOCKS = 64
_BLOCK_BYTES = 16 * 2**10
_CHECKSUM_READ_BYTES = 4 * 2**20


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes `path` when the block succeeds.

    Parameters
    ----------
    path
        Final place; what was there is replaced in one step.

    Yields
    ------
    Path
        A path in the same folder for the caller to write. On an error it is removed and
        `path` keeps its old content.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block succeeds.

    Every file is flushed to the disk before the rename, so that after a crash or a kill at any
    moment `path` either is complete or does not exist. Left-overs of killed builds of the same
    `path` are removed first; a build still running in another process is left alone.

    Raises
    ------
    CatalogExistsError
        Something is at `path` already, or appeared there meanwhile.
    """
    _check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_stale_stages(path)
    stage = path.with_name(f".{path.name}.building-{uuid.uuid4().hex[:12]}")
    lock_path = _lock_path(stage)
    with lock_path.open("wb") as lock:
        try_lock(lock)
        try:
            stage.mkdir()
            yield stage
            sync_tree(stage)
            _check_free(path)
            try:
                stage.rename(path)
            except OSError as error:
                _check_free(path)
                raise error from None
            sync_folder(path.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            lock_path.unlink(missing_ok=True)


def remove_stale_stages(path: Path) -> list[Path]:
    """Remove folders that killed builds of `path` left beside it; return what was removed."""
    removed = []
    for lock_path in sorted(path.parent.glob(f".{_escaped(path.name)}.building-*.lock")):
        with contextlib.suppress(FileNotFoundError), lock_path.open("r+b") as lock:
            if not try_lock(lock):
                continue
            stage = lock_path.with_suffix("")
            shutil.rmtree(stage, ignore_errors=True)
            lock_path.unlink(missing_ok=True)
            removed.append(stage)
    return removed


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON, atomically; NaN and infinities are refused."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic_file(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    CatalogCorruptError
        The file is missing, unreadable or not JSON; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CatalogCorruptError(f"expected a file at {path}, found none: {REBUILD}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        message = f"{path} is not readable JSON ({error}): {REBUILD}"
        raise CatalogCorruptError(message) from error


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write an array as ``.npy``, atomically, in C order; object arrays are refused."""
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)


def array_header(path: Path) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return shape and dtype from the header of a ``.npy`` file, and check the file's length.

    Raises
    ------
    CatalogCorruptError
        The file is missing, is no C-ordered ``.npy`` file, or its length is not what the
        header announces.
    """
    try:
        with path.open("rb") as file:
            shape, fortran_order, dtype = read_header(file)
            n_header = file.tell()
        n_bytes = path.stat().st_size
    except FileNotFoundError as error:
        raise CatalogCorruptError(f"expected an array at {path}, found none: {REBUILD}") from error
    except (OSError, ValueError) as error:
        raise CatalogCorruptError(f"{path} is not a .npy array ({error}): {REBUILD}") from error
    expected = n_header + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if fortran_order or dtype.hasobject or n_bytes != expected:
        form = f"{expected} bytes of C-ordered {dtype}"
        message = f"{path}: expected {form}, got {n_bytes}: {REBUILD}"
        raise CatalogCorruptError(message)
    return shape, dtype


def open_array(
    path: Path,
    *,
    dtype: DTypeLike | None = None,
    shape: tuple[int | None, ...] | None = None,
) -> NDArray[Any]:
    """Memory-map a ``.npy`` file read-only.

    Parameters
    ----------
    path
        The file.
    dtype
        Expected dtype, or None to accept any but objects.
    shape
        Expected shape; None in place of a length accepts any.

    Returns
    -------
    NDArray
        A read-only view of the file; nothing is read until it is used. (An array with no
        elements is an ordinary empty array: there is nothing to map.)

    Raises
    ------
    CatalogCorruptError
        The file is missing or truncated, or dtype or shape differ.
    """
    actual_shape, actual_dtype = array_header(path)
    if dtype is not None and actual_dtype != np.dtype(dtype):
        message = f"{path}: expected dtype {np.dtype(dtype)}, got {actual_dtype}: {REBUILD}"
        raise CatalogCorruptError(message)
    if shape is not None and not _shape_matches(actual_shape, shape):
        message = f"{path}: expected shape {shape}, got {actual_shape}: {REBUILD}"
        raise CatalogCorruptError(message)
    if 0 in actual_shape:
        empty = np.empty(actual_shape, dtype=actual_dtype)
        empty.flags.writeable = False
        return empty
    return map_array(path)


class ArrayAppender:
    """Write a ``.npy`` file row block by row block, when the final row count is not yet known.

    NumPy leaves room in the header for the first axis to grow, so the header is rewritten in
    place by `close`. The file is not atomic by itself: use it inside a `staged_folder`.

    Parameters
    ----------
    path
        File to create.
    dtype
        Of the array.
    row_shape
        Shape of one row: the array has shape ``(n_rows, *row_shape)``.
    """

    def __init__(self, path: Path, *, dtype: DTypeLike, row_shape: tuple[int, ...]) -> None:
        self.n_rows = 0
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._file: IO[bytes] = path.open("w+b")
        self._n_header = self._write_header()

    def append(self, rows: NDArray[Any]) -> None:
        """Append rows of shape ``(b, *row_shape)``, cast to the file's dtype."""
        if rows.shape[1:] != self._row_shape:
            raise ValueError(f"expected rows of shape {self._row_shape}, got {rows.shape[1:]}")
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)
        self.n_rows += len(rows)

    def close(self) -> None:
        """Write the final shape into the header and close the file."""
        if self._file.closed:
            return
        self._file.seek(0)
        n_header = self._write_header()
        self._file.close()
        if n_header != self._n_header:
            raise ValueError(f"the .npy header grew from {self._n_header} to {n_header} bytes")

    def _write_header(self) -> int:
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self.n_rows, *self._row_shape),
            },
        )
        return self._file.tell()


def fingerprint(path: Path) -> str:
    """Return a cheap hash of a file: its size and a sample of its bytes.

    Files up to 4 MiB are read whole. Of larger ones, 64 blocks of 16 KiB are read: the first,
    the last and 62 evenly spaced between, so the cost does not grow with the file.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_bytes(b"cat"); fingerprint(folder / "a")
    '3-3327dd2c7b9d982f'
    """
    n_bytes = path.stat().st_size
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        if n_bytes <= _WHOLE_FILE_BYTES:
            digest.update(file.read())
        else:
            last = n_bytes - _BLOCK_BYTES
            for number in range(_SAMPLED_BLOCKS):
                file.seek(last * number // (_SAMPLED_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return f"{n_bytes}-{digest.hexdigest()}"


def checksum(path: Path) -> str:
    """Return the BLAKE2b hash (32 hex digits) of all bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_CHECKSUM_READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _check_free(path: Path) -> None:
    if os.path.lexists(path):
        message = (
            f"expected nothing at {path}, but it exists: open it with clipbranches_widget.open, "
            "remove it, or choose another path"
        )
        raise CatalogExistsError(message)


def _shape_matches(actual: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(actual) == len(expected) and all(
        e is None or a == e for a, e in zip(actual, expected, strict=True)
    )


def _lock_path(stage: Path) -> Path:
    return stage.with_name(stage.name + ".lock")


def _escaped(name: str) -> str:
    """Escape the wildcards of `Path.glob` in a file name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def try_lock(file: IO[bytes]) -> bool:
    """Lock an open file without waiting; return whether it worked. Closing it unlocks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush every file below a folder to the disk, and the folders' entries of them."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        sync_folder(Path(parent))
