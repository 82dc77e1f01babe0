"""Arrays under construction (layer 2): ``.npy`` files written in pieces, resumable after a kill.

The files have their final names and sizes from the start. Beside them lies, until the build is
finished,

``columns.building.json``
    what is built (the *identity*) and what of it is safely on the disk (*done*). The files are
    flushed before it says so, and it is replaced atomically, so that after a kill or a power loss
    at any moment a build of the same identity continues, and redoes nothing that it says is done.

Nothing here is memory-mapped: written pages of a map count as memory of the process.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import CatalogCorruptError
from clipbranches_widget.file_lock import sync_folder
from clipbranches_widget.storage import array_header, read_json, write_json

JOURNAL_FILE = "columns.building.json"

_JOURNAL_S = 1.0


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """A C-ordered ``.npy`` file that is read and written in pieces, from any thread.

    Attributes
    ----------
    path
        The file.
    dtype
        Of the array, such as "<u4".
    shape
        Of the array.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Length of the array in the file, without the header."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def create(self) -> None:
        """Write the header and reserve the length; the values are 0 (a sparse file)."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": self.dtype, "fortran_order": False, "shape": self.shape}
        )
        with self.path.open("wb") as stream:
            stream.write(header.getvalue())
            stream.truncate(len(header.getvalue()) + self.n_bytes)

    def exists(self) -> bool:
        """Return whether the file is there with the right header and length."""
        try:
            return array_header(self.path) == (self.shape, np.dtype(self.dtype))
        except CatalogCorruptError:
            return False

    def write(self, pieces: Iterable[tuple[int, NDArray[Any]]]) -> None:
        """Write (flat index of the first element, C-contiguous values) pairs."""
        start, size = self._span()
        with self.path.open("r+b") as stream:
            for index, values in pieces:
                stream.seek(start + index * size)
                stream.write(values.astype(self.dtype, copy=False).data)

    def read(self, index: int, count: int) -> NDArray[Any]:
        """Return a copy of `count` elements from flat `index` on, (count,)."""
        start, size = self._span()
        return np.fromfile(self.path, self.dtype, count, offset=start + index * size)

    def sync(self) -> None:
        """Flush everything written so far to the disk."""
        with self.path.open("r+b") as stream:
            os.fsync(stream.fileno())

    def _span(self) -> tuple[int, int]:
        """Return where the array starts in the file and the bytes of an element."""
        return self.path.stat().st_size - self.n_bytes, np.dtype(self.dtype).itemsize


class ArrayBuild:
    """Files under construction in one folder, with a journal. One process at a time.

    Parameters
    ----------
    folder
        Existing folder.
    arrays
        File name -> (dtype, shape).
    identity
        JSON values that determine the content of the files. A journal with the same ones is
        continued; else the files are created anew.

    Attributes
    ----------
    files : dict of str to ArrayFile
        By file name.
    done : dict
        JSON values: what has been written. Empty in a build that starts.
    """

    def __init__(
        self,
        folder: Path,
        arrays: Mapping[str, tuple[str, tuple[int, ...]]],
        identity: Mapping[str, Any],
    ) -> None:
        self.files = {name: ArrayFile(folder / name, *form) for name, form in arrays.items()}
        self._folder = folder
        self._identity = dict(identity)
        for torn in folder.glob(f".{JOURNAL_FILE}.*.tmp"):
            torn.unlink()
        found = self._journaled()
        self.done: dict[str, Any] = found or {}
        if found is None:
            self._create()
        self._write_journal()

    def advance(self, **done: Any) -> None:
        """Update `done` with what has been written, and journal it about once a second.

        Other threads may go on writing meanwhile.
        """
        self.done |= done
        if time.monotonic() >= self._next_s:
            self.flush()

    def flush(self) -> None:
        """Flush the files to the disk, then journal `done`."""
        for file in self.files.values():
            file.sync()
        self._write_journal()

    def close(self) -> None:
        """Remove the journal: the files are complete, and flushed."""
        self._journal.unlink()
        sync_folder(self._folder)

    @property
    def _journal(self) -> Path:
        return self._folder / JOURNAL_FILE

    def _journaled(self) -> dict[str, Any] | None:
        """Return what an earlier build of the same identity did, None if there is none."""
        try:
            journal = read_json(self._journal)
        except CatalogCorruptError:
            return None
        if not isinstance(journal, dict) or journal.get("identity") != self._identity:
            return None
        if not all(file.exists() for file in self.files.values()):
            return None
        done: dict[str, Any] = journal["done"]
        return done

    def _create(self) -> None:
        """Start anew; the old journal goes first, since it speaks of the old files."""
        self._journal.unlink(missing_ok=True)
        sync_folder(self._folder)
        for file in self.files.values():
            file.create()

    def _write_journal(self) -> None:
        write_json(self._journal, {"identity": self._identity, "done": self.done})
        self._next_s = time.monotonic() + _JOURNAL_S
