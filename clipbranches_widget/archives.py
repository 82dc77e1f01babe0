"""Single files out of zip and tar archives, by fsspec's chained URLs (layer 2).

``zip://inside/a.jpg::/data/photos.zip`` names a member of an archive, which may itself be a path
or a URL. A zip is opened once and kept; of a tar only the table of its members is kept. A member
of a compressed tar can be read only by unpacking all that comes before it.
"""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Generator
from functools import lru_cache
from pathlib import Path
from typing import IO

from clipbranches_widget.errors import CatalogError, ImageReadError
from clipbranches_widget.remote import driver_errors, local_path, open_file, reason

KINDS = ("zip", "tar")

_Stamp = tuple[int, int] | None


def member_uri(kind: str, name: str, archive: str) -> str:
    """Return the chained URL of a member.

    >>> member_uri("tar", "a/0001.jpg", "/data/00000.tar")
    'tar://a/0001.jpg::/data/00000.tar'
    """
    return f"{kind}://{name}::{archive}"


def read_member(uri: str) -> bytes:
    """Return one file of an archive, by the URL that `member_uri` made.

    Raises
    ------
    ImageReadError
        No such archive or member, or it is damaged.
    """
    kind, _, rest = uri.partition("://")
    name, chained, archive = rest.partition("::")
    if not chained or kind not in KINDS:
        raise ImageReadError(
            f"{uri}: expected {kind}://FILE::ARCHIVE, got no archive; add ::PATH of the archive"
        )
    try:
        if kind == "zip":
            return _zip(archive, _stamp(archive)).read(name)
        return _read_tar_member(archive, name)
    except KeyError as error:
        raise ImageReadError(f"{uri}: no such file in the archive") from error
    except CatalogError as error:
        raise ImageReadError(f"{uri}: {error}") from error
    except driver_errors() as error:
        raise ImageReadError(f"{uri}: cannot be read: {reason(error)}") from error


def read_span(path: Path, offset: int, n_bytes: int) -> bytes:
    """Return some bytes of a local file; raises ImageReadError where they are not there."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read(n_bytes)
    except OSError as error:
        raise ImageReadError(f"{path}: cannot be read: {error}") from error
    if len(data) != n_bytes:
        raise ImageReadError(f"{path}: expected {n_bytes} bytes at {offset}, got {len(data)}")
    return data


def walk_tar(
    file: IO[bytes], name: str
) -> Generator[tuple[tarfile.TarInfo, tarfile.TarFile], None, None]:
    """Yield each regular file of a tar, plain or compressed, in order, and the tar to read it from.

    Raises
    ------
    CatalogError
        It is no tar, or it ends early.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:*", errors="replace") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined] # tarfile would keep them all
                if info.isreg():
                    yield info, tar
    except driver_errors() as error:
        raise CatalogError(
            f"{name}: expected a whole tar archive, got: {reason(error)}; copy or download it again"
        ) from error


def is_plain_tar(file: IO[bytes]) -> bool:
    """Return whether a tar is not compressed; the file is at its start again afterwards."""
    head = file.read(265)
    file.seek(0)
    return head[257:262] == b"ustar"


def _read_tar_member(archive: str, name: str) -> bytes:
    path = local_path(archive)
    members, plain = _tar_members(archive, _stamp(archive))
    offset, n_bytes = members[name]
    if plain and path is not None:
        return read_span(path, offset, n_bytes)
    with open_file(archive) as file:
        if plain:
            file.seek(offset)
            return file.read(n_bytes)
        for info, tar in walk_tar(file, archive):
            if info.name == name:
                member = tar.extractfile(info)
                if member is not None:
                    return member.read()
    raise KeyError(name)


# What is cached can be read again at any time, and a changed local file has another stamp.
@lru_cache(maxsize=8)
def _zip(archive: str, stamp: _Stamp) -> zipfile.ZipFile:  # noqa: ARG001 - part of the key
    path = local_path(archive)
    return zipfile.ZipFile(path if path is not None else open_file(archive))


@lru_cache(maxsize=32)
def _tar_members(
    archive: str,
    stamp: _Stamp,  # noqa: ARG001 - part of the key
) -> tuple[dict[str, tuple[int, int]], bool]:
    """Return where each member lies, and whether the tar is not compressed."""
    with open_file(archive) as file:
        plain = is_plain_tar(file)
        return {
            info.name: (info.offset_data, info.size) for info, _ in walk_tar(file, archive)
        }, plain


def _stamp(archive: str) -> _Stamp:
    path = local_path(archive)
    if path is None:
        return None
    status = path.stat()
    return status.st_mtime_ns, status.st_size
