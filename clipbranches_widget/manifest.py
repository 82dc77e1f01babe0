"""The manifest of a catalog, ``catalog.json``, as frozen values (layer 1). No I/O.

``catalog.json``::

    {"format": "clipbranches catalog", "format_version": 1,
     "encoder": {"kind", "model", "pretrained", "dim", "weights_hash"},
     "n_rows": 4495,
     "columns": {"hash": "...", "n_columns": 128},
     "pieces": {"columns.npz": PIECE, "skipped.parquet": PIECE, ...},
     "shards": [{"folder": "shards/0000", "first_row": 0, "n_rows": 4495,
                 "pieces": {"embeddings.npy": PIECE, ...}}, ...],
     "source_root": "/home/me/Pictures" or null,
     "about": "free text, such as an attribution",
     "created": {"clipbranches_widget": "0.1.0", "time_utc": "...", ...},
     "self": "BLAKE2b of everything else"}

and ``PIECE`` is ``{"bytes", "fingerprint", "checksum"}``, for arrays also ``"shape"`` and
``"dtype"``. Paths in it are relative, with forward slashes: a catalog folder can be moved.

A shard's pieces may lack ``order.npy``, ``prefix.npy`` or both; see `Manifest.column_parts`. One
that was appended may have its own ``skipped.parquet``. The catalog's pieces may hold one
``map-HASH.npy`` and one ``removed-HASH.npy``; see `Manifest.map_file` and `removed_file`. A catalog
whose first shard was rewritten has an ``"identity"``, too: what named it before.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from clipbranches_widget.errors import CatalogCorruptError

FORMAT_NAME = "clipbranches catalog"
COLUMN_FILES = ("codes.npy", "offsets.npy", "prefix.npy", "order.npy")

_NAME = re.compile(r"\w[\w.-]*")
_MAP_NAME = re.compile(r"map-[0-9a-f]+\.npy")
_REMOVED_NAME = re.compile(r"removed-[0-9a-f]+\.npy")
_ENCODER_KEYS = ("kind", "model", "pretrained", "dim", "weights_hash")


@dataclass(frozen=True, slots=True)
class Piece:
    """What the manifest knows of one file.

    Attributes
    ----------
    n_bytes
        Length of the file.
    fingerprint
        Cheap hash, checked on open.
    checksum
        BLAKE2b of all bytes, checked by ``Catalog.verify``.
    shape, dtype
        Of a ``.npy`` array; None for other files.
    """

    n_bytes: int
    fingerprint: str
    checksum: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """One shard: its folder, its rows ``first_row <= row < first_row + n_rows``, its files."""

    folder: str
    first_row: int
    n_rows: int
    pieces: Mapping[str, Piece]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of ``catalog.json``; see the module docstring."""

    format_version: int
    encoder: Mapping[str, Any]
    n_rows: int
    column_model_hash: str
    n_columns: int
    pieces: Mapping[str, Piece]
    shards: tuple[ShardEntry, ...]
    source_root: str | None = None
    about: str = ""
    created: Mapping[str, str] = field(default_factory=dict)
    identity: str = ""

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.encoder["dim"])

    @property
    def column_parts(self) -> str:
        """What every shard stores of the column index.

        "full"; "bits" without ``order.npy``; "codes" without ``prefix.npy`` too; "order" without
        ``prefix.npy`` alone, as in the first catalogs.
        """
        has_bits, has_order = (
            all(name in shard.pieces for shard in self.shards) for name in COLUMN_FILES[2:]
        )
        if has_bits:
            return "full" if has_order else "bits"
        return "order" if has_order else "codes"

    @property
    def column_bytes(self) -> int:
        """Bytes of the column index on disk, all shards together."""
        return sum(
            piece.n_bytes
            for shard in self.shards
            for name, piece in shard.pieces.items()
            if name in COLUMN_FILES
        )

    @property
    def map_file(self) -> str | None:
        """Name of the file with the map; None for a catalog without one."""
        return next(filter(_MAP_NAME.fullmatch, sorted(self.pieces)), None)

    def with_map(self, name: str | None, piece: Piece | None = None) -> Manifest:
        """Return this manifest with another map, or with none."""
        pieces = {key: kept for key, kept in self.pieces.items() if key != self.map_file}
        if name is not None and piece is not None:
            pieces[name] = piece
        return replace(self, pieces=pieces)

    @property
    def removed_file(self) -> str | None:
        """Name of the file with the removed rows; None where no row was removed."""
        return next(filter(_REMOVED_NAME.fullmatch, sorted(self.pieces)), None)

    def with_removed(self, name: str, piece: Piece) -> Manifest:
        """Return this manifest with another list of removed rows."""
        pieces = {key: kept for key, kept in self.pieces.items() if key != self.removed_file}
        return replace(self, pieces={**pieces, name: piece})

    def to_dict(self) -> dict[str, Any]:
        """Return what ``catalog.json`` holds, its own hash included."""
        body = {
            "format": FORMAT_NAME,
            "format_version": self.format_version,
            "encoder": dict(self.encoder),
            "n_rows": self.n_rows,
            "columns": {"hash": self.column_model_hash, "n_columns": self.n_columns},
            "pieces": _pieces_to_dict(self.pieces),
            "shards": [
                {
                    "folder": shard.folder,
                    "first_row": shard.first_row,
                    "n_rows": shard.n_rows,
                    "pieces": _pieces_to_dict(shard.pieces),
                }
                for shard in self.shards
            ],
            "source_root": self.source_root,
            "about": self.about,
            "created": dict(self.created),
            **({"identity": self.identity} if self.identity else {}),
        }
        return {**body, "self": _hash(body)}

    @classmethod
    def from_dict(cls, value: Any, *, supported_version: int) -> Manifest:
        """Read what `to_dict` wrote.

        Raises
        ------
        CatalogCorruptError
            Not a manifest, written by a newer format, edited by hand, or with shards that do
            not follow each other. The message has no path: the caller adds it.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT_NAME:
            raise CatalogCorruptError(f'expected "format": "{FORMAT_NAME}", got something else')
        version = value.get("format_version")
        if version != supported_version:
            raise CatalogCorruptError(
                f"expected format version {supported_version}, got {version}: open it with the "
                "release of clipbranches_widget that wrote it, upgrade "
                "(pip install --upgrade clipbranches_widget), or build the catalog again"
            )
        body = {key: item for key, item in value.items() if key != "self"}
        if value.get("self") != _hash(body):
            raise CatalogCorruptError(
                "its content does not match its own hash, so it was edited or damaged"
            )
        try:
            manifest = cls._from_body(body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CatalogCorruptError(f"an entry is missing or malformed ({error!r})") from error
        _check_rows(manifest)
        return manifest

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Manifest:
        return cls(
            format_version=int(body["format_version"]),
            encoder={name: body["encoder"][name] for name in _ENCODER_KEYS},
            n_rows=int(body["n_rows"]),
            column_model_hash=str(body["columns"]["hash"]),
            n_columns=int(body["columns"]["n_columns"]),
            pieces=_pieces_from_dict(body["pieces"]),
            shards=tuple(
                ShardEntry(
                    folder=_inside(shard["folder"]),
                    first_row=int(shard["first_row"]),
                    n_rows=int(shard["n_rows"]),
                    pieces=_pieces_from_dict(shard["pieces"]),
                )
                for shard in body["shards"]
            ),
            source_root=body["source_root"],
            about=str(body["about"]),
            created=dict(body["created"]),
            identity=str(body.get("identity", "")),
        )


def _pieces_to_dict(pieces: Mapping[str, Piece]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, piece in sorted(pieces.items()):
        entry = asdict(piece)
        entry["bytes"] = entry.pop("n_bytes")
        if piece.shape is None:
            del entry["shape"], entry["dtype"]
        else:
            entry["shape"] = list(piece.shape)
        result[name] = entry
    return result


def _pieces_from_dict(value: Mapping[str, Any]) -> dict[str, Piece]:
    return {
        _inside(name): Piece(
            n_bytes=int(entry["bytes"]),
            fingerprint=str(entry["fingerprint"]),
            checksum=str(entry["checksum"]),
            shape=tuple(entry["shape"]) if "shape" in entry else None,
            dtype=entry.get("dtype"),
        )
        for name, entry in value.items()
    }


def _check_rows(manifest: Manifest) -> None:
    next_row = 0
    for shard in manifest.shards:
        if shard.first_row != next_row or shard.n_rows < 1:
            raise CatalogCorruptError(
                f"expected {shard.folder} to start at row {next_row} and hold at least one, "
                f"got row {shard.first_row} and {shard.n_rows} rows"
            )
        next_row += shard.n_rows
    if next_row != manifest.n_rows or not manifest.shards:
        raise CatalogCorruptError(
            f"expected {manifest.n_rows} rows over all shards, got {next_row}"
        )


def _inside(path: Any) -> str:
    """Return a relative path that stays in the catalog's folder, or raise ValueError."""
    if not isinstance(path, str) or not all(_NAME.fullmatch(part) for part in path.split("/")):
        raise ValueError(f"expected a path inside the catalog, got {path!r}")
    return path


def _hash(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()
