"""Which image contents a catalog has already (layer 3), by the hash of the encoded file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.integrity import ITEMS_FILE
from clipbranches_widget.removed_rows import is_among

if TYPE_CHECKING:
    import pyarrow as pa

_KEY_BYTES = 8


class KnownContent:
    """The contents of a catalog, and of what is being appended to it.

    16 bytes a row in memory, next to the hashes themselves; a lookup takes microseconds.

    Parameters
    ----------
    catalog : Catalog
        As it is before the append.
    """

    def __init__(self, catalog: Catalog) -> None:
        import pyarrow as pa

        self._removed = catalog.removed_rows
        self._texts: pa.ChunkedArray = pa.chunked_array(
            [chunk for shard in catalog.shards for chunk in _hashes(shard.file(ITEMS_FILE)).chunks],
            pa.string(),
        )
        keys = np.concatenate([_keys(chunk) for chunk in self._texts.chunks])
        self._rows = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]
        self._new: dict[str, int] = {}
        self._next_row = len(catalog)

    def check(self, content_hash: str) -> str | None:
        """Return why an image is left out that the catalog has already; None for a new one.

        Safe to call from several threads; knows nothing of images that were `take`n.
        """
        key = _key(content_hash)
        at = int(np.searchsorted(self._keys, key))
        while at < len(self._keys) and self._keys[at] == key:
            row = int(self._rows[at])
            if self._texts[row].as_py() == content_hash:
                if is_among(np.array([row]), self._removed)[0]:
                    return f"removed from the catalog as row {row}"
                return f"already in the catalog as row {row}"
            at += 1
        return None

    def take(self, content_hash: str | None) -> str | None:
        """Give an image the next row id, or return why it is left out: an earlier one is the same.

        To be called in the order of the rows, for those that `check` let pass.
        """
        if content_hash:
            if (row := self._new.get(content_hash)) is not None:
                return f"already in the catalog as row {row}"
            self._new[content_hash] = self._next_row
        self._next_row += 1
        return None


def _hashes(file: Path) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(file, columns=["content_hash"]).column(0).cast(pa.string())


def _keys(texts: pa.StringArray) -> NDArray[np.uint64]:
    """Return the last 8 bytes of each text as a number, 0 bytes in front of shorter ones."""
    filled = texts.fill_null("")
    _, ends, data = filled.buffers()
    if not len(filled):
        return np.empty(0, dtype=np.uint64)
    bounds = np.frombuffer(ends, np.int32)[filled.offset : filled.offset + len(filled) + 1]
    stored = b"" if data is None else data
    content = np.concatenate((np.zeros(_KEY_BYTES, np.uint8), np.frombuffer(stored, np.uint8)))
    back = np.arange(_KEY_BYTES)
    starts = bounds[1:].astype(np.int64)  # `_KEY_BYTES` more in `content`, as many before its end
    picked = content[starts[:, None] + back]
    lengths = np.diff(bounds)
    picked[back < _KEY_BYTES - lengths[:, None]] = 0
    keys: NDArray[np.uint64] = np.ascontiguousarray(picked).view("<u8").ravel()
    return keys


def _key(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(text.encode()[-_KEY_BYTES:].rjust(_KEY_BYTES, b"\0"), "little"))
