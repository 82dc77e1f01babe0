"""Copy or link the image files of rows into a folder (layer 4).

A catalog is somebody's data: its paths may be hostile. Only files that hold an image are copied,
their names are made harmless, and nothing is ever written outside the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from threading import Event
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import unquote

from clipbranches_widget.errors import Cancelled, ExportError, ImageReadError
from clipbranches_widget.images import image_suffix, local_path, read_encoded

if TYPE_CHECKING:
    from clipbranches_widget.catalog import Catalog

MAX_NAME_BYTES = 180
"""Longest name of a file or folder that is written, in UTF-8; file systems allow 255."""

MAX_ENDING_CHARS = 20
"""Longest ending that is kept when a name is cut."""

DATASET_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
"""Endings that torchvision and Hugging Face's `datasets` take for those of images."""

_DRAWN = "openmoji:"
_FORBIDDEN = re.compile(r'[<>:"/\\|?*]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)", re.IGNORECASE)
_UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@dataclass(frozen=True, slots=True)
class CopiedImages:
    """What `Result.copy_images` did.

    Attributes
    ----------
    folder : Path
        Where the files are.
    written : mapping of int to Path
        The file of each row that was written, in the order of the rows.
    skipped : mapping of int to str
        The reason for each row that was not.
    """

    folder: Path
    written: Mapping[int, Path] = field(repr=False)
    skipped: Mapping[int, str] = field(repr=False)

    def __str__(self) -> str:
        """Say how many were written, and count the most frequent reasons of the others."""
        images = "image" if len(self.written) == 1 else "images"
        said = f"{len(self.written):,} {images} written to {self.folder}"
        if not self.skipped:
            return said
        reasons = Counter(self.skipped.values()).most_common(3)
        listed = "; ".join(f"{count:,} {reason}" for reason, count in reasons)
        n_others = len(self.skipped) - sum(count for _, count in reasons)
        others = f"; {n_others:,} for other reasons" if n_others else ""
        return f"{said}; {len(self.skipped):,} skipped: {listed}{others}"

    def __repr__(self) -> str:
        """Return what `str` says."""
        return f"<CopiedImages: {self}>"


def copy_images(
    catalog: Catalog,
    rows: Sequence[int],
    folder: str | Path,
    *,
    folders: Sequence[str] = (),
    for_dataset: bool = False,
    link: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, float], None] | None = None,
    cancel: Event | None = None,
) -> CopiedImages:
    """Write the image files of `rows` into `folder`; see `Result.copy_images`.

    Parameters
    ----------
    folders
        For each row, the name of a folder inside `folder`; none for all in `folder` itself.
    for_dataset
        No two names are the same, even in different folders, and all end as those of images.
    """
    place = Path(folder).expanduser().absolute()
    make_folder(place)
    root = place.resolve()
    written: dict[int, Path] = {}
    skipped: dict[int, str] = {}
    uris = [uri or "" for uri in catalog.lines(rows, ["uri"]).column("uri").to_pylist()]
    targets = _targets(rows, uris, folders, across=for_dataset)
    suffixes = DATASET_SUFFIXES if for_dataset else None
    for number, (row, target) in enumerate(targets):
        if cancel is not None and cancel.is_set():
            raise Cancelled(
                f"cancelled: {len(written):,} of {len(rows):,} images are in {place}; the same "
                "call writes the others"
            )
        if progress is not None:
            progress("Linking images" if link else "Copying images", number / len(rows))
        try:
            path = _write_one(
                catalog,
                row,
                root,
                root / target,
                link=link,
                overwrite=overwrite,
                suffixes=suffixes,
            )
            written[row] = place / path.relative_to(root)
        except ImageReadError as error:
            skipped[row] = str(error)
    if progress is not None:
        progress("Done", 1.0)
    return CopiedImages(place, MappingProxyType(written), MappingProxyType(skipped))


def make_folder(folder: Path) -> None:
    """Make a folder and those above it.

    Raises
    ------
    ExportError
        It cannot be made, or a file is there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"expected a folder at {folder}, or a place for one: {error.strerror or error}; "
            "choose another path"
        ) from error


def safe_name(name: str, *, instead: str = "image") -> str:
    r"""Return `name` as one that every file system takes and that shows what it is.

    Separators, control and invisible characters (also those that turn the direction of writing)
    go; so do leading and trailing dots and spaces. A name that is reserved or empty gets another.
    Longer names than `MAX_NAME_BYTES` are cut before their ending.

    Examples
    --------
    >>> safe_name("../../etc/pass\u202egpj.exe"), safe_name("CON.png"), safe_name("...")
    ('_.._etc_passgpj.exe', '_CON.png', 'image')
    """
    seen = "".join(char for char in name if unicodedata.category(char) not in _UNSEEN)
    plain = _FORBIDDEN.sub("_", unicodedata.normalize("NFC", seen)).strip(". ")
    if _RESERVED.fullmatch(plain.partition(".")[0].strip()):
        plain = f"_{plain}"
    ending = PurePosixPath(plain).suffix
    if len(ending) > MAX_ENDING_CHARS:  # words after a point
        ending = ""
    stem = plain.removesuffix(ending)
    room = MAX_NAME_BYTES - len(ending.encode())
    stem = stem.encode()[:room].decode(errors="ignore").rstrip(". ")
    return f"{stem}{ending}" or instead


def image_file(catalog: Catalog, row: int) -> Path | None:
    """Return the image file of a row; None where its image is in no file of this machine.

    Raises
    ------
    ImageReadError
        There is no such file, or it holds no image.
    """
    uri = catalog.uri(row)
    return None if uri.startswith(_DRAWN) else _source(catalog, uri)


def image_bytes(catalog: Catalog, row: int) -> bytes:
    """Return the encoded image of a row: as it is there, a drawing of the demo as PNG.

    Raises
    ------
    ImageReadError
        It cannot be had.
    """
    uri = catalog.uri(row)
    if uri.startswith(_DRAWN):
        drawn = BytesIO()
        catalog.image(row).save(drawn, "PNG")
        return drawn.getvalue()
    path = _source(catalog, uri)
    if path is None:
        return _encoded(uri)
    try:
        return path.read_bytes()
    except OSError:
        raise ImageReadError("cannot be read") from None


def _targets(
    rows: Sequence[int], uris: Sequence[str], folders: Sequence[str], *, across: bool = False
) -> Iterable[tuple[int, Path]]:
    """Return each row with its path in the folder: every one different, whatever the case.

    Names differ in each folder, or `across` all of them, with or without their ending.
    """
    names = [_file_name(uri) for uri in uris]
    places = [safe_name(each, instead="other") for each in folders] or [""] * len(rows)

    def key(place: str, name: str) -> tuple[str, str]:
        return ("", PurePosixPath(name).stem.casefold()) if across else (place, name.casefold())

    same = Counter(key(place, name) for place, name in zip(places, names, strict=True))
    taken: set[tuple[str, str]] = set()
    for row, place, name in zip(rows, places, names, strict=True):
        chosen = name
        if same[key(place, name)] > 1:
            chosen = _with_row(name, row)
        while key(place, chosen) in taken or (chosen != name and same[key(place, chosen)]):
            chosen = _with_row(chosen, row)
        taken.add(key(place, chosen))
        yield row, Path(place, chosen)


def _file_name(uri: str) -> str:
    """Return the name of the file that a uri leads to, made harmless.

    Of a file in an archive it is that file's; of a cell of a table, the table's and the row.
    """
    if uri.startswith(_DRAWN):
        return safe_name(uri.removeprefix(_DRAWN)) + ".png"
    kind, is_address, rest = uri.partition("://")
    inner, is_chained, outer = rest.partition("::")
    if is_address and is_chained:
        last = re.split(r"[/\\]", inner)[-1]
        is_cell = last.isdecimal() and kind not in {"zip", "tar"}
        return safe_name(f"{PurePosixPath(outer).stem}-{last}" if is_cell else last)
    name = unquote(rest.partition("?")[0]) if is_address else uri
    return safe_name(re.split(r"[/\\]", name)[-1])


def _with_row(name: str, row: int) -> str:
    ending = PurePosixPath(name).suffix
    return f"{name.removesuffix(ending)}-row{row}{ending}"


def _write_one(
    catalog: Catalog,
    row: int,
    root: Path,
    target: Path,
    *,
    link: bool,
    overwrite: bool,
    suffixes: frozenset[str] | None,
) -> Path:
    """Write one image, and return where; ImageReadError has the reason where it cannot be had."""
    source = image_file(catalog, row)
    if source is None and link:
        raise ImageReadError("has no file to link to: copy it instead")
    data = image_bytes(catalog, row) if source is None else b""
    if suffixes is not None and target.suffix.lower() not in suffixes:
        target = target.with_suffix(_suffix(source, data))
    elif data and not target.suffix:
        target = target.with_name(target.name + _suffix(source, data))
    make_folder(target.parent)
    if not target.parent.resolve().is_relative_to(root):
        raise ImageReadError("would be outside the folder: a link leads there")
    if os.path.lexists(target):
        _check_replaceable(target, source, overwrite=overwrite)
    temporary = target.with_name(f".{uuid.uuid4().hex[:12]}.tmp")
    try:
        if source is None:
            temporary.write_bytes(data)
        elif link:
            temporary.symlink_to(source)
        else:
            _copy(source, temporary)
        temporary.replace(target)
    except ImageReadError:
        raise
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror or error}: check the folder, the permissions "
            "and the free space" + ("; or copy the files, without link=True" if link else "")
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


def _suffix(source: Path | None, data: bytes) -> str:
    """Return the ending for the name of an image, from what it is."""
    if source is None:
        found = image_suffix(BytesIO(data))
    else:
        with source.open("rb") as file:
            found = image_suffix(file)
    return ".jpg" if found == ".mpo" else found  # a JPEG, with a second one behind it


def _encoded(uri: str) -> bytes:
    """Return an image that is not a file of this machine, encoded as it is there."""
    data = read_encoded(uri, None)
    if not image_suffix(BytesIO(data)):
        raise ImageReadError("is not an image")
    return data


def _check_replaceable(target: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise ImageReadError where what is at `target` has to stay."""
    if target.is_dir() and not target.is_symlink():
        raise ImageReadError("has the name of a folder that is there")
    if source is not None and target.exists() and target.samefile(source):
        raise ImageReadError("is there already")
    if not overwrite:
        raise ImageReadError("has the name of a file that is there: overwrite=True replaces it")


def _source(catalog: Catalog, uri: str) -> Path | None:
    """Return the image file that a uri names, None where it is not one of this machine's.

    Raises
    ------
    ImageReadError
        There is no such file, or it holds no image.
    """
    if not uri:
        raise ImageReadError("has no file: the catalog was built from embeddings alone")
    source_root = catalog.manifest.source_root
    try:
        path = local_path(uri, Path(source_root) if source_root else None)
    except ImageReadError:
        return None
    path = path.expanduser().absolute()
    try:
        is_there = path.is_file()
        is_image = is_there and _is_image(path)
    except (OSError, ValueError):
        raise ImageReadError("cannot be read") from None
    if not is_there:
        raise ImageReadError("is gone: no such file")
    if not is_image:
        raise ImageReadError("is not an image file")
    return path


def _is_image(path: Path) -> bool:
    with path.open("rb") as file:
        return bool(image_suffix(file))


def _copy(source: Path, target: Path) -> None:
    try:
        file = source.open("rb")
    except OSError:
        raise ImageReadError("cannot be read") from None
    with file, target.open("xb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
    shutil.copystat(source, target)
