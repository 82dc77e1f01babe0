"""Catalogs at URLs: fetched into a cache folder, put in place from a folder (layer 3).

A catalog at a URL is never read there: it is fetched whole, once, and opened from the user's cache
folder, in platformdirs' terms ``clipbranches_widget/catalogs``::

    NAME-KEY/origin.json        the URL; KEY is its hash
    NAME-KEY/fetch.lock         locked while a process fetches; others wait, and find it done
    NAME-KEY/VERSION/           the catalog, of the manifest with that hash

Each file is compared with the manifest, and a version appears when all are there. One that is
fetched later, after the catalog at the URL grew, shares by hard links what it has in common. The
folders may be deleted at any time while no process uses them.

A catalog that is put at a URL is written with ``catalog.json`` last: until then nothing is there
that could be opened.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

from clipbranches_widget.catalog_lock import ORIGIN_FILE
from clipbranches_widget.errors import (
    CatalogCorruptError,
    CatalogError,
    CatalogExistsError,
    CatalogNotFoundError,
)
from clipbranches_widget.file_lock import locked
from clipbranches_widget.integrity import MANIFEST_FILE, check_content, pieces, read_manifest
from clipbranches_widget.manifest import Manifest, Piece
from clipbranches_widget.remote import (
    copy_here,
    copy_there,
    current_bytes,
    local_path,
    remove_there,
    scheme,
    tree,
)
from clipbranches_widget.stage_bars import StageBars
from clipbranches_widget.storage import FORMAT_VERSION, checksum, staged_folder

T = TypeVar("T")

SHOWN_BYTES = 2**26
"""More than that to copy is worth a progress bar."""

_N_COPIES = 8
_OURS = re.compile(
    r"shards/\d+/[\w.-]+|columns\.(json|npz)|skipped\.parquet|(map|removed)-[0-9a-f]+\.npy"
)


def is_remote(path: str | Path) -> bool:
    """Return whether a path is a URL, but not one of a local file.

    >>> is_remote("s3://bucket/a.cbcat"), is_remote("a.cbcat"), is_remote("file:///data/a.cbcat")
    (True, False, False)
    """
    return scheme(str(path)) not in ("", "file")


def folder_at(path: str | Path) -> Path:
    """Return the folder of a catalog: the path itself, or the copy of what is at a URL.

    Raises
    ------
    CatalogNotFoundError
        No catalog at the URL.
    CatalogCorruptError
        What came is not what its manifest says.
    CatalogError
        The URL cannot be read.
    MissingPackageError
        The protocol's driver is not installed.
    """
    return _fetched(str(path)) if is_remote(path) else _here(path)


@contextlib.contextmanager
def new_catalog(path: str | Path) -> Iterator[Path]:
    """Yield a folder in which a catalog is built, which then appears at a path or URL.

    Raises
    ------
    CatalogExistsError
        Something is there already.
    """
    if not is_remote(path):
        with staged_folder(_here(path)) as stage:
            yield stage
        return
    url = str(path)
    _check_free(url)
    with tempfile.TemporaryDirectory(prefix="clipbranches-") as above:
        stage = Path(above) / "catalog"
        stage.mkdir()
        yield stage
        _put(stage, url)
        with contextlib.suppress(OSError, CatalogError):  # else it is fetched again
            _keep(stage, url)


def copy_catalog(source: str | Path, target: str | Path, *, progress: bool = True) -> None:
    """Copy a catalog from one place to another, each a folder or a URL, and check every byte.

    Parameters
    ----------
    source
        Of a catalog; one in a folder must not change meanwhile.
    target
        Where nothing is yet. The copy appears when it is complete.
    progress
        Show a progress bar.

    Raises
    ------
    CatalogNotFoundError, CatalogCorruptError, CatalogExistsError
        No whole catalog at `source`, or something at `target`.
    CatalogError
        A URL cannot be read or written.

    Examples
    --------
    >>> import clipbranches_widget as cb
    >>> cb.copy_catalog("photos.cbcat", "s3://bucket/photos.cbcat")  # doctest: +SKIP
    """
    if is_remote(target):
        _check_free(str(target))
        folder = folder_at(source)
        check_content(folder, _manifest(folder))
        _put(folder, str(target), progress=progress)
        return
    if is_remote(source):
        url = str(source)
        text = _manifest_text(url)
        with staged_folder(_here(target)) as stage:
            _fetch(url, text, stage, {}, progress=progress)
        return
    folder = _here(source)
    manifest = _manifest(folder)
    with staged_folder(_here(target)) as stage:
        for file, _ in [(folder / MANIFEST_FILE, None), *pieces(folder, manifest)]:
            place = stage / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
        check_content(stage, manifest)


def _here(path: str | Path) -> Path:
    place = local_path(str(path)) if scheme(str(path)) else Path(path).expanduser()
    assert place is not None  # noqa: S101 - is_remote was asked
    return place.absolute()


def _manifest(folder: Path) -> Manifest:
    if not (folder / MANIFEST_FILE).is_file():
        raise CatalogNotFoundError(
            f"expected a catalog (a folder with {MANIFEST_FILE}) at {folder}, found none"
        )
    return read_manifest(folder)


def _at(url: str, name: str) -> str:
    return f"{url.rstrip('/')}/{name}"


def _manifest_text(url: str) -> bytes:
    text = current_bytes(_at(url, MANIFEST_FILE))
    if text is None:
        raise CatalogNotFoundError(
            f"expected a catalog (a folder with {MANIFEST_FILE}) at {url}, found none: build one "
            "with clipbranches_widget.index(images, url), or copy one there with "
            "clipbranches_widget.copy_catalog(path, url)"
        )
    return text


def _parsed(url: str, text: bytes) -> Manifest:
    try:
        return Manifest.from_dict(json.loads(text), supported_version=FORMAT_VERSION)
    except (ValueError, CatalogCorruptError) as error:
        raise CatalogCorruptError(f"{_at(url, MANIFEST_FILE)}: {error}: copy it again") from error


def _cache_of(url: str) -> Path:
    """Return the folder of all versions of a catalog."""
    import platformdirs

    url = url.rstrip("/")
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[:60]
    key = blake2b(url.encode(), digest_size=8).hexdigest()
    cache = Path(platformdirs.user_cache_dir("clipbranches_widget"))
    return cache / "catalogs" / f"{name}-{key}"


def _version(text: bytes) -> str:
    return blake2b(text, digest_size=8).hexdigest()


def _fetched(url: str) -> Path:
    """Return the folder with the catalog that is at a URL now; fetches what is not there yet."""
    text = _manifest_text(url)
    place = _cache_of(url) / _version(text)
    if (place / MANIFEST_FILE).is_file():
        return place
    with _only_one(url):
        if not (place / MANIFEST_FILE).is_file():
            with staged_folder(place) as stage:
                _fetch(url, text, stage, _known_files(place.parent), progress=True)
    return place


@contextlib.contextmanager
def _only_one(url: str) -> Iterator[None]:
    """Be the only process that changes the cache of a URL; wait for the others."""
    cache = _cache_of(url)
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ORIGIN_FILE).write_text(json.dumps({"url": url}), encoding="utf-8")
    with (cache / "fetch.lock").open("ab", buffering=0) as lock, locked(lock):
        yield


def _keep(stage: Path, url: str) -> None:
    """Make a catalog that was put at a URL the copy of it."""
    place = _cache_of(url) / _version((stage / MANIFEST_FILE).read_bytes())
    with _only_one(url), staged_folder(place) as copy:
        for entry in stage.iterdir():
            shutil.move(entry, copy / entry.name)


def _known_files(cache: Path) -> dict[str, Path]:
    """Return the files of all versions in a cache, by their checksums."""
    known: dict[str, Path] = {}
    for folder in cache.iterdir():
        if not folder.name.startswith(".") and (folder / MANIFEST_FILE).is_file():
            with contextlib.suppress(CatalogCorruptError):
                manifest = read_manifest(folder)
                known |= {piece.checksum: file for file, piece in pieces(folder, manifest)}
    return known


def _fetch(url: str, text: bytes, stage: Path, known: dict[str, Path], *, progress: bool) -> None:
    """Write the catalog at a URL, whose manifest is `text`, into a folder."""
    wanted = list(pieces(stage, _parsed(url, text)))
    new = [(file, piece) for file, piece in wanted if not _linked(file, piece, known)]

    def one(job: tuple[Path, Piece]) -> int:
        file, piece = job
        address = _at(url, file.relative_to(stage).as_posix())
        file.parent.mkdir(parents=True, exist_ok=True)
        copy_here(address, file, most=piece.n_bytes)
        if file.stat().st_size != piece.n_bytes or checksum(file) != piece.checksum:
            raise CatalogCorruptError(
                f"{address}: expected {piece.n_bytes} bytes with checksum {piece.checksum}, as "
                f"the manifest says, got {file.stat().st_size} others: it changed meanwhile, "
                "then try again, or it is damaged, then put the catalog there again"
            )
        return piece.n_bytes

    _each(one, new, sum(piece.n_bytes for _, piece in new), "fetch", show=progress)
    (stage / MANIFEST_FILE).write_bytes(text)


def _linked(file: Path, piece: Piece, known: dict[str, Path]) -> bool:
    """Take a file over from another version, where one has it, whole."""
    other = known.get(piece.checksum)
    if other is None:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(other, file)
    except OSError:
        return False
    if checksum(file) == piece.checksum:
        return True
    file.unlink()
    return False


def _put(folder: Path, url: str, *, progress: bool = True) -> None:
    """Write the catalog in a folder to a URL, the manifest last; nothing stays after an error."""
    files = [(file, piece.n_bytes) for file, piece in pieces(folder, read_manifest(folder))]
    last = _at(url, MANIFEST_FILE)

    def one(job: tuple[Path, int]) -> int:
        file, n_bytes = job
        copy_there(file, _at(url, file.relative_to(folder).as_posix()))
        return n_bytes

    try:
        _each(one, files, sum(n for _, n in files), "upload", show=progress)
        _check_free(url)
        copy_there(folder / MANIFEST_FILE, last)
    except CatalogExistsError:
        raise  # of another writer, with the same names: what is there is left alone
    except BaseException:
        names = (file.relative_to(folder).as_posix() for file, _ in files)
        remove_there([last, *(_at(url, name) for name in names)])
        raise


def _each(
    work: Callable[[T], int], jobs: Iterable[T], n_bytes: int, what: str, *, show: bool
) -> None:
    """Copy several files at a time, with a progress bar over their bytes."""
    done = 0
    pool = ThreadPoolExecutor(_N_COPIES, "clipbranches-copy")
    with StageBars(show=show and n_bytes > SHOWN_BYTES) as bars:
        try:
            for each in pool.map(work, jobs):
                done += each
                bars(what, done, n_bytes)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _check_free(url: str) -> None:
    """Raise CatalogExistsError unless nothing is at a URL, or what a killed upload left there."""
    if current_bytes(_at(url, MANIFEST_FILE)) is not None:
        raise CatalogExistsError(
            f"expected nothing at {url}, but a catalog is there: open it with "
            "clipbranches_widget.open, remove it, or choose another URL"
        )
    others = [name for name in tree(url) if not _OURS.fullmatch(name)]
    if others:
        raise CatalogExistsError(
            f"expected nothing at {url}, found {', '.join(others[:3])}: choose another URL"
        )
