"""Files by path or URL: the one place that imports fsspec (layer 1).

A *reference* is a local path or a URL of one of `PROTOCOLS`, also a chained one of fsspec,
``zip://inside.parquet::s3://bucket/outside.zip``. Local paths never reach fsspec. Other protocols
are refused: a catalog is somebody's data, and fsspec knows some that run commands or log in.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from clipbranches_widget.errors import CatalogError, ImageReadError, MissingPackageError

DRIVERS = {
    "http": "aiohttp",
    "https": "aiohttp",
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
"""Protocols that need a package of their own, and its name."""

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 15, 60
"""How long a web server may take to answer, and to send the next bytes."""

_COPY_BYTES = 2**22

PROTOCOLS = frozenset((*DRIVERS, "file", "memory", "tar", "zip"))

# Errors of drivers that have no builtin for a parent: known once the driver is imported.
_DRIVER_ERRORS = {
    "aiohttp": ("ClientError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "gcsfs.retry": ("HttpError",),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_NUMBERS = re.compile(r"(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def scheme(reference: str) -> str:
    """Return the protocol of a URL, "" for a path.

    >>> scheme("s3://bucket/a.jpg"), scheme("pictures/a.jpg"), scheme("C:/a.jpg")
    ('s3', '', '')
    """
    found = _SCHEME.match(reference)
    return found[1].lower() if found else ""


def local_path(reference: str) -> Path | None:
    """Return the path of a local file, None for what is elsewhere or in an archive."""
    kind = scheme(reference)
    if kind == "file":
        return Path(url2pathname(urlsplit(reference).path))
    return None if kind else Path(reference).expanduser()


def read_bytes(url: str) -> bytes:
    """Return the content of a remote file.

    Raises
    ------
    ImageReadError
        It cannot be had; the message is the reason.
    MissingPackageError
        The protocol's driver is not installed.
    """
    try:
        filesystem, path = _filesystem(url)
        data: bytes = filesystem.cat_file(path)
    except FileNotFoundError as error:
        raise ImageReadError(f"{url}: no such file") from error
    except driver_errors() as error:
        raise ImageReadError(f"{url}: cannot be read: {reason(error)}") from error
    return data


def open_file(reference: str) -> IO[bytes]:
    """Open a file for reading; the caller closes it.

    Raises
    ------
    CatalogError
        It cannot be opened; the message is the reason.
    MissingPackageError
        The protocol's driver is not installed.
    """
    path = local_path(reference)
    try:
        if path is not None:
            return path.open("rb")
        filesystem, inner = _filesystem(reference)
        file: IO[bytes] = filesystem.open(inner, "rb")
        with contextlib.suppress(AttributeError):
            file.filesystem = filesystem  # type: ignore[attr-defined] # an archive closes with it
    except FileNotFoundError as error:
        raise CatalogError(f"expected a file at {reference}, found none") from error
    except driver_errors() as error:
        raise CatalogError(f"{reference}: cannot be read: {reason(error)}") from error
    return file


def current_bytes(url: str) -> bytes | None:
    """Return the content of a small remote file as it is now; None where there is none.

    Raises
    ------
    CatalogError
        It cannot be read; the message is the reason.
    MissingPackageError
        The protocol's driver is not installed.
    """
    filesystem, path = _filesystem(url)
    try:
        filesystem.invalidate_cache()  # what was listed or asked before may have changed
        data: bytes = filesystem.cat_file(path)
    except FileNotFoundError:
        return None
    except driver_errors() as error:
        raise CatalogError(f"{url}: cannot be read: {reason(error)}") from error
    return data


def copy_here(url: str, file: Path, *, most: int) -> None:
    """Write the content of a remote file to a new local one; raises as `open_file` does.

    At most one byte more than `most` is written, so that a file that is too large is seen to be.
    """
    n_left = most + 1
    with open_file(url) as stream, file.open("wb") as target:
        try:
            while n_left > 0 and (block := stream.read(min(n_left, _COPY_BYTES))):
                target.write(block)
                n_left -= len(block)
        except driver_errors() as error:
            raise CatalogError(f"{url}: cannot be read: {reason(error)}") from error


def copy_there(file: Path, url: str) -> None:
    """Write a local file to a URL.

    Raises
    ------
    CatalogError
        It cannot be written; the message is the reason.
    """
    filesystem, path = _filesystem(url)
    try:
        filesystem.put_file(str(file), path)
    except driver_errors() as error:
        raise CatalogError(
            f"{url}: cannot be written: {reason(error)}; check the place and the rights to it"
        ) from error


def remove_there(urls: Sequence[str]) -> None:
    """Delete remote files, as far as they are there and that is possible."""
    for url in urls:
        filesystem, path = _filesystem(url)
        with contextlib.suppress(*driver_errors()):
            filesystem.rm_file(path)


def read_text(reference: str) -> str:
    """Return a small text file; raises as `open_file` does."""
    with open_file(reference) as file:
        return file.read().decode("utf-8", errors="replace")


def tree(folder: str) -> list[str]:
    """Return the names of all files under a folder, relative, with forward slashes, sorted.

    Hidden files and folders are left out. Empty where there is no such folder.
    """
    path = local_path(folder)
    if path is not None:
        return sorted(_local_tree(path))
    try:
        filesystem, inner = _filesystem(folder)
        found = [str(name) for name in filesystem.find(inner)]
    except FileNotFoundError:
        return []
    except driver_errors() as error:
        raise CatalogError(f"{folder}: cannot be listed: {reason(error)}") from error
    top = inner.strip("/")
    names = (name.strip("/") for name in found)
    relative = (name.removeprefix(top).lstrip("/") for name in names if name.startswith(top))
    return sorted(name for name in relative if name and not _is_hidden(name))


def matches(pattern: str) -> list[str]:
    """Return the files that a pattern names, in the order of the numbers in their names.

    ``*``, ``?``, ``[...]`` and ``**`` as a shell takes them; ``{00..12}`` and ``{a,b}`` are
    written out and need not exist.
    """
    found: list[str] = []
    for one in expand_braces(pattern):
        if not has_magic(one):
            found.append(one)
        elif local_path(one) is not None:
            names = glob.glob(str(local_path(one)), recursive=True)  # noqa: PTH207 - absolute too
            found += sorted((name for name in names if Path(name).is_file()), key=numbered)
        else:
            found += _remote_matches(one)
    return found


def has_magic(reference: str) -> bool:
    """Return whether a reference is a pattern; the ``?`` of a web address is none."""
    if scheme(reference) in ("http", "https"):
        return "*" in reference
    return glob.has_magic(reference)


def expand_braces(pattern: str) -> list[str]:
    """Write out the braces of a pattern.

    >>> expand_braces("{a,b}-{08..10}.tar")[:4]
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar']
    """
    parts = _BRACES.split(pattern)
    choices = [
        [part] if number % 2 == 0 else list(_choices(part)) for number, part in enumerate(parts)
    ]
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def numbered(name: str) -> list[tuple[int, int, str]]:
    """Return a sorting key that puts ``part_10`` after ``part_2``.

    >>> sorted(["b", "part_10", "part_2"], key=numbered)
    ['b', 'part_2', 'part_10']
    """
    parts = _NUMBERS.split(name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def join(folder: str, name: str) -> str:
    """Return the reference of a file in a folder, also in a folder of an archive.

    >>> join("zip://in::/a.zip", "b.jpg"), join("/pictures", "b.jpg")
    ('zip://in/b.jpg::/a.zip', '/pictures/b.jpg')
    """
    inner, chained, outer = folder.partition("::")
    slash = "" if inner.endswith("/") else "/"
    return f"{inner}{slash}{name}{chained}{outer}"


def parent(reference: str) -> str:
    """Return the folder that a file lies in."""
    inner, chained, outer = reference.partition("::")
    head, slash, _ = inner.rpartition("/")
    if head.endswith(":/"):  # the top of an archive
        head = f"{head}/"
    return f"{head or slash or '.'}{chained}{outer}"


def driver_errors() -> tuple[type[BaseException], ...]:
    """Return what a file system, an archive or a server can raise when it cannot be read.

    Not `Exception`: a mistake of ours and Ctrl-C must surface.
    """
    errors: list[type[BaseException]] = [
        EOFError,
        LookupError,
        NotImplementedError,
        OSError,
        RuntimeError,
        ValueError,
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
    ]
    for name, kinds in _DRIVER_ERRORS.items():
        module = sys.modules.get(name)
        errors += [getattr(module, kind) for kind in kinds if hasattr(module, kind)]
    return tuple(errors)


def reason(error: BaseException) -> str:
    """Return what the driver said, or at least the kind of its error."""
    return str(error).strip() or type(error).__name__


def check_protocols(url: str) -> None:
    """Raise ValueError where any protocol of a chained URL is not one of `PROTOCOLS`."""
    for link in url.split("::"):
        kind = scheme(link)
        if kind and kind not in PROTOCOLS:
            raise ValueError(
                f"expected a path or a URL of {', '.join(sorted(PROTOCOLS))}, got {kind}://"
            )


def _filesystem(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it."""
    check_protocols(url)
    import fsspec.core

    try:
        filesystem, path = fsspec.core.url_to_fs(url, **_options(url))
    except ImportError as error:
        names = {DRIVERS[kind] for link in url.split("::") if (kind := scheme(link)) in DRIVERS}
        package = " ".join(sorted(names)) or "fsspec"
        raise MissingPackageError(
            f"expected the package {package} to read {url}, got none; run: pip install {package}"
        ) from error
    return filesystem, path


def _options(url: str) -> dict[str, Any]:
    """Return what the driver of a URL is told: a web server that hangs is given up."""
    if scheme(url) not in ("http", "https"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=READ_TIMEOUT_S
    )
    return {"client_kwargs": {"timeout": timeout}}


def _remote_matches(pattern: str) -> list[str]:
    inner, chained, outer = pattern.partition("::")
    try:
        filesystem, path = _filesystem(pattern)
        said = set(path.split("/"))
        names = [
            name
            for name in sorted(map(str, filesystem.glob(path)), key=numbered)
            if not _is_hidden("/".join(part for part in name.split("/") if part not in said))
        ]
    except driver_errors() as error:
        raise CatalogError(f"{pattern}: cannot be listed: {reason(error)}") from error
    if chained:
        return [f"{scheme(inner)}://{name.lstrip('/')}::{outer}" for name in names]
    return [str(filesystem.unstrip_protocol(name)) for name in names]


def _local_tree(folder: Path) -> Iterator[str]:
    for above, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        place = Path(above).relative_to(folder)
        yield from ((place / name).as_posix() for name in files if not name.startswith("."))


def _is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _choices(inside: str) -> Iterable[str]:
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",") if "," in inside else [f"{{{inside}}}"]
    first, last = numbers.groups()
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
