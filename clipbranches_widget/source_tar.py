"""Images in tar archives, in the layout of WebDataset (layer 6).

Files that follow each other and share a name up to its first dot are one sample: ``0001.jpg``,
``0001.txt`` and ``0001.json`` are an image, its caption and its columns; the rest of the name after
that dot is the file's extension. Folders belong to the name. Files whose name starts with ``__``
or a dot, or has none, are passed over, and so are extensions other than these:

=====================  ==================================================================
``.jpg`` ... or x.jpg  the image; of several, ``image_column="x.jpg"`` says which
``.txt``               the caption, unless ``caption_column`` names another extension or a
                       field of the JSON; without ``.txt`` the JSON's ``caption`` serves
``.json``              an object: each field becomes a column; objects inside it stay text
``.cls``               the class, as column ``cls``
=====================  ==================================================================

The sample's name is kept as column ``key``. The archives are read twice: first everything but the
images, so that the columns have one type throughout and a damaged archive is found before the work
starts, then the images. Those of a plain local tar are read by the decoder threads where they lie;
a compressed or remote one is streamed. What stays in memory is the table of samples.
"""

from __future__ import annotations

import json
import logging
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.archives import is_plain_tar, member_uri, read_span, walk_tar
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.images import Encoded
from clipbranches_widget.json_columns import JsonColumns, as_text
from clipbranches_widget.remote import local_path, open_file
from clipbranches_widget.source_table import (
    Chunk,
    ImageSource,
    stored_lines,
    with_captions,
    write_lines,
)

if TYPE_CHECKING:
    import pyarrow as pa

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")
_CHUNK_ROWS = 1024
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sample:
    """What one sample holds; images as extension -> (member, offset, bytes)."""

    key: str
    images: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Archive:
    """One tar: its images, where each lies, (n, 2), and whether it can be read there."""

    file: str
    plain: bool
    members: pa.Array
    spans: NDArray[np.int64]


class TarSource:
    """Images of WebDataset archives; see the module.

    Parameters
    ----------
    files
        References, at least one.
    suffixes
        Endings of image files, lower case, with the dot.
    image_column, caption_column
        An extension, or for the caption a field of the JSON.

    Raises
    ------
    CatalogError
        An archive is damaged, or has no images, or several in a sample.
    """

    def __init__(
        self,
        files: Sequence[str],
        *,
        suffixes: frozenset[str],
        image_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        import pyarrow as pa

        self._suffixes = suffixes
        self._image = image_column.lower().lstrip(".") if image_column else None
        self._caption = caption_column
        self._archives: list[_Archive] = []
        captions: list[pa.Array] = []
        self._columns = JsonColumns()
        found: set[str] = set()
        n_without = 0
        for file in files:
            n_without += self._scan(file, found, captions)
        self._captions = pa.chunked_array(captions, pa.string())
        if not len(self._captions):
            raise CatalogError(
                f"expected images in {files[0]}, found files ending in "
                f"{', '.join(sorted(found)) or 'nothing'}"
                + (f" and none called .{self._image}" if self._image else "")
            )
        if caption_column and self._captions.null_count == len(self._captions):
            raise CatalogError(
                f"expected captions in {caption_column!r} of {files[0]}, found none: name an "
                f"extension ({', '.join(sorted(found))}) or a field of the JSON"
            )
        if n_without:
            _log.warning("passed over %d samples without an image", n_without)
        self._rest = self._columns.table()

    @property
    def root(self) -> Path | None:
        """None: all uris are absolute."""
        return None

    @property
    def n_images(self) -> int:
        """Samples with an image, of all archives."""
        return len(self._captions)

    def chunks(self) -> Iterator[Chunk]:
        """Yield the samples of all archives, some at a time."""
        first = 0
        for archive in self._archives:
            images = _images(archive.file, plain=archive.plain, spans=archive.spans)
            for start in range(0, len(archive.members), _CHUNK_ROWS):
                lines = self._lines(archive, start, _CHUNK_ROWS, first + start)
                yield Chunk(lines, islice(images, len(lines)))
            first += len(archive.members)

    def part(self, start: int, stop: int, file: Path) -> ImageSource:
        """Write some samples without their images to a file; see `DivisibleSource`."""
        import pyarrow as pa

        tables: list[pa.Table] = []
        archives: list[tuple[str, bool, int]] = []
        first = 0
        for archive in self._archives:
            n_members = len(archive.members)
            low, high = max(start - first, 0), min(stop - first, n_members)
            if low < high:
                lines = self._lines(archive, low, high - low, first + low)
                for number, name in enumerate(("offset", "bytes")):
                    lines = lines.append_column(name, pa.array(archive.spans[low:high, number]))
                tables.append(lines)
                archives.append((archive.file, archive.plain, high - low))
            first += n_members
        write_lines(file, pa.concat_tables(tables))
        return StoredSamples(file, stop - start, tuple(archives))

    def _lines(self, archive: _Archive, start: int, n_rows: int, first: int) -> pa.Table:
        """Return samples of an archive from its `start` on, which is `first` of all."""
        members = archive.members.slice(start, n_rows).to_pylist()
        uris = [member_uri("tar", name, archive.file) for name in members]
        captions = self._captions.slice(first, len(members)).to_pylist()
        return with_captions(uris, captions, self._rest.slice(first, len(members)))

    def _scan(self, file: str, found: set[str], captions: list[pa.Array]) -> int:
        """Note all samples of an archive; returns how many have no image."""
        import pyarrow as pa

        n_without = 0
        members: list[str] = []
        spans: list[tuple[int, int]] = []
        said: list[str | None] = []
        with open_file(file) as stream:
            plain = is_plain_tar(stream) and local_path(file) is not None
            for sample in _samples(stream, file, self._suffixes, found):
                image = self._image_of(sample, file)
                if image is None:
                    n_without += 1
                    continue
                member, offset, n_bytes = image
                members.append(member)
                spans.append((offset, n_bytes))
                said.append(self._caption_of(sample))
                self._columns.append({"key": sample.key, **sample.values})
        places = np.array(spans, np.int64).reshape(-1, 2)
        self._archives.append(_Archive(file, plain, pa.array(members, pa.string()), places))
        captions.append(pa.array(said, pa.string()))
        return n_without

    def _image_of(self, sample: _Sample, file: str) -> tuple[str, int, int] | None:
        if self._image is not None:
            return sample.images.get(self._image)
        if len(sample.images) > 1:
            raise CatalogError(
                f"expected one image in sample {sample.key!r} of {file}, found "
                f"{', '.join(sorted(sample.images))}: say which with image_column="
            )
        return next(iter(sample.images.values()), None)

    def _caption_of(self, sample: _Sample) -> str | None:
        names = [self._caption.lower().lstrip(".")] if self._caption else ["txt"]
        said = next((sample.texts.pop(name) for name in names if name in sample.texts), None)
        if said is None:
            value = sample.values.pop(self._caption or "caption", None)
            said = as_text(value)
        sample.values |= sample.texts
        return said


@dataclass(frozen=True, slots=True)
class StoredSamples:
    """Samples that an Arrow file lists, in the archives that they come from.

    Attributes
    ----------
    file
        uri and caption, the user's columns, then where the image lies in its archive.
    n_images
        Its lines.
    archives
        Reference, whether it is not compressed, and how many lines are of it: in their order.
    """

    file: Path
    n_images: int
    archives: tuple[tuple[str, bool, int], ...]

    @property
    def root(self) -> Path | None:
        """None: all uris are absolute."""
        return None

    def chunks(self) -> Iterator[Chunk]:
        """Yield the samples, an archive at a time."""
        import pyarrow as pa

        stored = pa.concat_tables(stored_lines(self.file))
        places = stored.num_columns - 2
        first = 0
        for name, plain, n_rows in self.archives:
            lines = stored.slice(first, n_rows)
            spans = np.stack([lines.column(places + i).to_numpy() for i in (0, 1)], axis=1)
            yield Chunk(lines.select(range(places)), _images(name, plain=plain, spans=spans))
            first += n_rows


def _images(file: str, *, plain: bool, spans: NDArray[np.int64]) -> Iterator[Encoded]:
    """Yield images of an archive in order, or how to read them; spans are (n, 2)."""
    path = local_path(file)
    if plain and path is not None:
        for offset, n_bytes in spans.tolist():
            yield partial(read_span, path, offset, n_bytes)
        return
    wanted = iter(spans[:, 0].tolist())
    offset = next(wanted, None)
    with open_file(file) as stream, closing(walk_tar(stream, file)) as members:
        for info, tar in members:
            if info.offset_data == offset:
                yield _content(tar, info)
                offset = next(wanted, None)
                if offset is None:
                    return
    raise CatalogError(f"{file}: changed while it was read; start again")


def _samples(
    stream: Any, file: str, suffixes: frozenset[str], found: set[str]
) -> Iterator[_Sample]:
    """Yield the samples of a tar without their images; notes the extensions in `found`."""
    sample: _Sample | None = None
    with closing(walk_tar(stream, file)) as members:
        for info, tar in members:
            parts = _NAME.fullmatch(info.name)
            if parts is None or PurePosixPath(info.name).name.startswith((".", "__")):
                continue
            key, extension = parts[1], parts[2].lower()
            found.add(f".{extension}")
            if sample is None or sample.key != key:
                if sample is not None:
                    yield sample
                sample = _Sample(key)
            _note(sample, extension, info, tar, suffixes)
    if sample is not None:
        yield sample


def _note(
    sample: _Sample,
    extension: str,
    info: tarfile.TarInfo,
    tar: tarfile.TarFile,
    suffixes: frozenset[str],
) -> None:
    kind = extension.rpartition(".")[2]
    if f".{kind}" in suffixes:
        sample.images[extension] = (info.name, info.offset_data, info.size)
    elif kind in ("txt", "text", "caption"):
        sample.texts[extension] = _text(tar, info)
    elif kind == "cls":
        text = _text(tar, info).strip()
        sample.values[extension] = int(text) if text.lstrip("-").isdecimal() else text
    elif kind == "json":
        try:
            value = json.loads(_text(tar, info))
        except ValueError:
            return  # a sample is not lost for its notes
        if isinstance(value, dict):
            sample.values = {**value, **sample.values}
        else:
            sample.values[extension] = value


def _content(tar: tarfile.TarFile, info: tarfile.TarInfo) -> bytes:
    member = tar.extractfile(info)
    return member.read() if member is not None else b""


def _text(tar: tarfile.TarFile, info: tarfile.TarInfo) -> str:
    return _content(tar, info).decode("utf-8", errors="replace")
