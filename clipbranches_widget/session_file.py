"""The durable log of a session: one JSON object a line, append-only (layer 1).

On disk: the first line is the header ``{"format", "version", "written_by", "catalog"}``, each
further line one record. A record counts once its line break is on the disk: an append is one
write and one fsync, so that a process killed at any moment loses at most the record it was
writing. Bytes after the last line break are such a record: readers pass over them, the next
append cuts them off.

Several objects, in one process or many, may share a file. None keeps it open: each read and
append opens it, takes the operating system's lock on it and starts at a `Position` that the
caller holds, so there is no state here to get out of step.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clipbranches_widget.errors import SessionFileError
from clipbranches_widget.file_lock import locked, sync_folder

FORMAT = "clipbranches_widget session"
FORMAT_VERSION = 1
_MAGIC = json.dumps({"format": FORMAT})[:-1].encode()


class Position(NamedTuple):
    """How far a reader got: the byte after a complete line, and the lines before it."""

    offset: int = 0
    n_lines: int = 0


class Line(NamedTuple):
    """One record, the number of its line (the header is line 1) and where it ends."""

    record: dict[str, Any]
    number: int
    end: Position


@dataclass(frozen=True, slots=True)
class CatalogId:
    """Which catalog a session belongs to.

    Attributes
    ----------
    id : str
        Stays the same while the catalog only grows.
    name : str
        Where it was, for people.
    n_rows : int
        Its length when the file was made; row ids are for ever, so it may grow but not shrink.
    """

    id: str
    name: str
    n_rows: int


@dataclass(frozen=True, slots=True)
class SessionFile:
    """A session log at `path`, for one catalog; made by the first append, or by `create`.

    Parameters
    ----------
    path
        The file; its folder is created with it.
    catalog
        The catalog it must belong to.
    written_by
        Version of this package, kept in the header for whoever reads the file.
    """

    path: Path
    catalog: CatalogId
    written_by: str

    def create(self) -> None:
        """Write the header if there is no file yet, and check it if there is.

        Raises
        ------
        SessionFileError
            If the file cannot be made, is no session file or belongs to another catalog.
        """
        with self.exclusive(Position()):
            pass

    def read(self, position: Position = Position()) -> list[Line]:  # noqa: B008 - immutable
        """Return the complete records after `position`, oldest first.

        Costs one ``stat`` when there are none. A file that is not there has no records.

        Raises
        ------
        SessionFileError
            If a line is no record, the header does not fit, or the file became shorter.
        """
        try:
            if self.path.stat().st_size == position.offset:
                return []
            with self.path.open("rb", buffering=0) as stream, locked(stream, shared=True):
                return self._parse(stream, position)[0]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise self._failure("read", error) from error

    @contextlib.contextmanager
    def exclusive(self, position: Position) -> Iterator[LockedLog]:
        """Hold the file against every other reader and writer; yield what is new, and `append`.

        Raises
        ------
        SessionFileError
            As `read`; and if the file was there at `position` but is gone, or cannot be written.
        """
        resources = contextlib.ExitStack()
        try:
            stream = resources.enter_context(self._open_for_writing(is_new=position.offset == 0))
            resources.enter_context(locked(stream))
        except FileNotFoundError as error:
            resources.close()
            raise SessionFileError(
                f"expected the session file {self.path}, but it is gone: put it back, or keep "
                "the labels with Session(catalog, new_path).label(positive=old.labels.positive, "
                "negative=old.labels.negative)"
            ) from error
        except OSError as error:
            resources.close()
            raise self._failure("open", error) from error
        with resources:
            lines, end = self._parse(stream, position)
            log = LockedLog(self, stream, lines, end)
            if end.offset == 0:
                log.append(self._header())
            yield log

    def _open_for_writing(self, *, is_new: bool) -> io.FileIO:
        if is_new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                io.FileIO(self.path, "x").close()
                sync_folder(self.path.parent)
        return io.FileIO(self.path, "r+")

    def _parse(self, stream: io.FileIO, position: Position) -> tuple[list[Line], Position]:
        """Read on from `position`; return the records and the end of the last complete line."""
        stream.seek(0, os.SEEK_END)
        if stream.tell() < position.offset:
            raise SessionFileError(
                f"{self.path} is shorter than when it was last read: something else replaced or "
                "cut it; open it again with Session(catalog, path)"
            )
        stream.seek(position.offset)
        data = stream.readall()
        lines, end = [], position
        for raw in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            end = Position(end.offset + len(raw), end.n_lines + 1)
            record = _json_object(raw)
            if end.n_lines == 1:
                self._check_header(record)
            elif record is None:
                raise SessionFileError(
                    f"{self.path}, line {end.n_lines} is damaged: expected one JSON object, got "
                    f"{raw[:60]!r}: keep a copy of the file, then delete that line and open it "
                    "again (only the action of that line is lost), or restore a backup"
                )
            else:
                lines.append(Line(record, end.n_lines, end))
        torn_header = data[: len(_MAGIC)]
        if end.offset == 0 and torn_header != _MAGIC[: len(torn_header)]:
            raise self._not_a_session()
        return lines, end

    def _check_header(self, header: dict[str, Any] | None) -> None:
        if header is None or header.get("format") != FORMAT:
            raise self._not_a_session()
        version = header.get("version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise SessionFileError(
                f"{self.path}: expected session format up to {FORMAT_VERSION}, got {version}, "
                f"written by clipbranches_widget {header.get('written_by')}: upgrade this package"
            )
        try:
            theirs = CatalogId(**header["catalog"])
            is_shorter = self.catalog.n_rows < theirs.n_rows
        except (KeyError, TypeError) as error:
            raise SessionFileError(f"{self.path}, line 1: the header names no catalog") from error
        if theirs.id != self.catalog.id or is_shorter:
            raise SessionFileError(
                f"{self.path} belongs to the catalog {theirs.name} ({theirs.n_rows} rows, id "
                f"{theirs.id}), got {self.catalog.name} ({self.catalog.n_rows} rows, id "
                f"{self.catalog.id}): open it with that catalog, or choose another path"
            )

    def _header(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "written_by": self.written_by,
            "catalog": asdict(self.catalog),
        }

    def _not_a_session(self) -> SessionFileError:
        return SessionFileError(
            f"{self.path} is not a session file: expected a first line that starts with "
            f"{_MAGIC.decode()}: choose another path"
        )

    def _failure(self, verb: str, error: OSError) -> SessionFileError:
        return SessionFileError(
            f"cannot {verb} the session file {self.path}: {error.strerror or error}: check the "
            "folder, the permissions and the free space, or choose another path"
        )


class LockedLog:
    """A session file held by `SessionFile.exclusive`.

    Attributes
    ----------
    lines : list of Line
        The records that others appended since the caller's position.
    """

    def __init__(
        self, file: SessionFile, stream: io.FileIO, lines: list[Line], end: Position
    ) -> None:
        self.lines = lines
        self._file = file
        self._stream = stream
        self._end = end

    def append(self, record: Mapping[str, Any]) -> Line:
        """Write one record to the disk; return it as a reader would see it.

        Raises
        ------
        SessionFileError
            If it cannot be written; the file is then as before.
        """
        data = json.dumps(dict(record), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
        try:
            try:
                self._write(data)
            except OSError:
                self._stream.truncate(self._end.offset)
                raise
        except OSError as error:
            raise self._file._failure("write", error) from error  # noqa: SLF001 - same module
        self._end = Position(self._end.offset + len(data), self._end.n_lines + 1)
        return Line(json.loads(data), self._end.n_lines, self._end)

    def _write(self, data: bytes) -> None:
        self._stream.truncate(self._end.offset)  # a torn line of a killed process
        self._stream.seek(self._end.offset)
        rest = memoryview(data)
        while rest:
            rest = rest[self._stream.write(rest) :]
        os.fsync(self._stream.fileno())


def read_catalog_id(path: Path) -> CatalogId:
    """Return which catalog a session file belongs to.

    Raises
    ------
    SessionFileError
        It cannot be read, or is no session file.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            return CatalogId(**json.loads(stream.readline())["catalog"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SessionFileError(
            f"expected a session file, whose first line names its catalog, at {path}, got: "
            f"{error!r}"
        ) from error


def is_session_file(path: Path) -> bool:
    """Return whether a file begins as a session file does; False where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def _json_object(raw: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None
