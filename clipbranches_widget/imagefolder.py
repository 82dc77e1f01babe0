"""Images in a folder for each label, as torchvision and Hugging Face read them (layer 4).

::

    README.md         tells `datasets.load_dataset` that every file is part of the data set
    metadata.jsonl    a line an image: file_name, label and the other columns
    yes/ no/ ...      the images

Without the README, `datasets` takes a file or folder named such as ``test`` or ``val`` for a split
and leaves out all others. The folder appears complete or not at all.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import ExportError
from clipbranches_widget.image_copy import CopiedImages, copy_images, make_folder, safe_name
from clipbranches_widget.labels import LABEL_WORDS

if TYPE_CHECKING:
    import pyarrow as pa

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet

METADATA_FILE = "metadata.jsonl"
README_FILE = "README.md"

_README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: "**"
---
Images in a folder for each label; `metadata.jsonl` has a line for each of them. Read with
`datasets.load_dataset(folder)` or, images and folders alone,
`torchvision.datasets.ImageFolder(folder)`.
"""
_LINES_AT_ONCE = 1000


def label_folders(
    labels: LabelSet | None, rows: Sequence[int], unlabelled: str | None
) -> list[str | None]:
    """Return for each row the folder of its label; `unlabelled` for those that have none.

    Raises
    ------
    ExportError
        If `unlabelled` is the name of a label or no name.
    """
    if unlabelled is not None:
        name = safe_name(unlabelled, instead="")
        if not name or name != unlabelled or name.casefold() in LABEL_WORDS.values():
            raise ExportError(
                "expected the name of a folder other than yes and no for the images without a "
                f"label, or None to leave them out, got {unlabelled!r}"
            )
    values = [0 if labels is None else labels.get(row) for row in rows]
    return [LABEL_WORDS.get(value, unlabelled) for value in values]


def write_imagefolder(
    catalog: Catalog,
    rows: Sequence[int],
    folders: Sequence[str | None],
    columns: pa.Table,
    place: str | Path,
    *,
    metadata: bool,
    link: bool,
    progress: Callable[[str, float], None] | None,
    cancel: Event | None,
) -> CopiedImages:
    """Write images into folders, and what is known of them beside; see `Result.to_imagefolder`.

    Parameters
    ----------
    folders
        For each row the name of its folder; None leaves it out.
    columns
        A line for each row: what goes into the metadata.

    Raises
    ------
    ExportError
        `place` is not an empty folder or a new one, or cannot be written.
    Cancelled
        `cancel` was set; nothing is left behind.
    """
    target = _empty_place(place)
    temporary = target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex[:12]}.tmp")
    kept = [position for position, folder in enumerate(folders) if folder is not None]
    try:
        copied = copy_images(
            catalog,
            [rows[position] for position in kept],
            temporary,
            folders=[str(folders[position]) for position in kept],
            for_dataset=True,
            link=link,
            progress=progress,
            cancel=cancel,
        )
        if metadata:
            files = {row: file.relative_to(temporary) for row, file in copied.written.items()}
            _write_metadata(temporary, rows, columns, files)
        _put(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    written = {row: target / file.relative_to(temporary) for row, file in copied.written.items()}
    return replace(copied, folder=target, written=MappingProxyType(written))


def _empty_place(place: str | Path) -> Path:
    """Return where to write, which is new or an empty folder."""
    target = Path(place).expanduser().absolute()
    if target.is_symlink():
        target = target.resolve()
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(
            f"expected a new or empty folder, found files in {target}: labels may have changed "
            "since they were written, so delete it or choose another path"
        )
    if target.is_mount():  # known before all is copied: the finished folder takes its place
        raise ExportError(
            f"expected a folder that can be replaced, got {target}, where a disk or volume is "
            f"mounted: write to a new folder in it, such as {target / 'images'}"
        )
    make_folder(target.parent)
    return target


def _put(temporary: Path, target: Path) -> None:
    try:
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    except OSError as error:
        raise ExportError(
            f"cannot write {target}: {error.strerror or error}: something else wrote there; choose "
            "another path"
        ) from error


def _write_metadata(
    folder: Path, rows: Sequence[int], columns: pa.Table, files: dict[int, Path]
) -> None:
    positions = [position for position, row in enumerate(rows) if row in files]
    lines = columns.take(np.array(positions, dtype=np.int64))
    unknown = [name for name in lines.column_names if lines[name].null_count == len(lines)]
    lines = lines.drop_columns(unknown)  # a type cannot be read from nulls alone
    lines = lines.rename_columns(_names_for_datasets(lines.column_names))
    (folder / README_FILE).write_text(_README, encoding="utf-8")
    with (folder / METADATA_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for line in _lines(lines):
            whole = {"file_name": files[int(line["row"])].as_posix(), **line}
            file.write(json.dumps(whole, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _names_for_datasets(names: Sequence[str]) -> list[str]:
    """Rename columns that `datasets` would take for the image itself, or for paths of others."""
    renamed: list[str] = []
    for name in names:
        new = re.sub(r"(^|_)file_name(s?)$", r"\1filename\2", name)
        while new in {*renamed, *(set(names) - {name}), "image"}:
            new = f"source_{new}"
        renamed.append(new)
    return renamed


def _lines(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(_LINES_AT_ONCE):
        for line in batch.to_pylist():
            yield {name: _plain(value) for name, value in line.items()}


def _plain(value: Any) -> Any:
    """Return a value that JSON has: no NaN and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value
