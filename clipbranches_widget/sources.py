"""What images to index, and what is known about them, as one table (layer 1).

Turns a folder, a list of paths or a table into the columns ``uri`` and ``caption`` (strings)
followed by the user's own columns, typed as they came.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeAlias

from clipbranches_widget.errors import CatalogError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Source: TypeAlias = "str | Path | Sequence[str | Path] | pd.Series[Any] | pd.DataFrame | pa.Table"

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""File name endings that are taken for images in a folder, compared without case."""

SCHEMES = ("openmoji:", "file://", "http://", "https://", "s3://", "gs://")
RESULT_COLUMNS = frozenset(("row", "score", "margin", "branch"))
MEASURED_COLUMNS = {"width": "int32", "height": "int32", "content_hash": "string"}

_SEPARATORS = re.compile(r"[_\-.+\s]+")


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Images to index.

    Attributes
    ----------
    table
        Columns uri and caption (string), then the user's. Deterministic order.
    root
        Folder that relative uris start from; None where they are absolute.
    """

    table: pa.Table
    root: Path | None


def image_source(source: Source) -> ImageSource:
    """Read any supported source.

    Parameters
    ----------
    source
        A folder (its tree, sorted by path, hidden files ignored, `SUFFIXES` only), a sequence or
        Series of paths, or a table with a column ``uri`` or ``path`` and optionally ``caption``
        and columns of your own.

    Raises
    ------
    CatalogError
        No images in it, a column name that is taken, or a missing path.
    """
    if isinstance(source, str | Path):
        return _folder_source(Path(source).expanduser().absolute())
    if hasattr(source, "column_names") or hasattr(source, "columns"):
        table = items_table(source, taken=RESULT_COLUMNS | MEASURED_COLUMNS.keys())
        if "uri" not in table.column_names:
            raise CatalogError(
                f"expected a column 'uri' or 'path', got {table.column_names}: rename the column "
                "that holds the image paths"
            )
        uris = _absolute(table.column("uri").to_pylist())
        captions = table.column("caption").to_pylist()
        rest = table.drop_columns(["uri", "caption"])
    elif not isinstance(source, Iterable) or isinstance(source, bytes):
        raise CatalogError(
            f"expected a folder, a list of paths or a table, got {type(source).__name__}"
        )
    else:
        uris = _absolute(list(source))
        captions = [""] * len(uris)
        rest = None
    if not uris:
        raise CatalogError("expected at least one image, got an empty list")
    return ImageSource(_joined(uris, captions, rest), root=None)


def items_table(items: Any, *, taken: Iterable[str] = RESULT_COLUMNS) -> pa.Table:
    """Turn a DataFrame or Arrow table into catalog items.

    ``path`` is taken for ``uri``; both it and ``caption`` become strings (caption: empty where
    missing). Columns that the catalog measures itself get their type, where they are allowed.

    Raises
    ------
    CatalogError
        Two columns of one name, a name in `taken`, or values that have no Arrow type.
    """
    import pyarrow as pa

    try:
        table = (
            items
            if isinstance(items, pa.Table)
            else pa.Table.from_pandas(items, preserve_index=False)
        )
    except (pa.ArrowException, TypeError, ValueError, AttributeError) as error:
        raise CatalogError(
            f"expected items as a pandas DataFrame or pyarrow Table of plain columns, got "
            f"{type(items).__name__}: {error}"
        ) from error
    names = ["uri" if name == "path" else str(name) for name in table.column_names]
    clashes = sorted({name for name in names if name in set(taken) or names.count(name) > 1})
    if clashes:
        raise CatalogError(
            f"expected other names than {', '.join(clashes)} for the columns of items ('path' and "
            "'uri' are one): these are filled in by the catalog; rename or drop them"
        )
    table = table.rename_columns(names).replace_schema_metadata(None)
    for name, kind in {"uri": "string", "caption": "string", **MEASURED_COLUMNS}.items():
        if name in names:
            table = _cast(table, name, pa.type_for_alias(kind))
    if "caption" not in names:
        table = table.append_column("caption", pa.array([""] * len(table), pa.string()))
    return table


def caption_from_uri(uri: str) -> str:
    """Return a file's name without suffix, separators turned into spaces.

    >>> caption_from_uri("/home/me/red_panda-02.final.JPG")
    'red panda 02 final'
    """
    if uri.startswith(SCHEMES):
        uri = uri.partition(":")[2]
    return _SEPARATORS.sub(" ", PurePosixPath(uri.replace("\\", "/")).stem).strip()


def fill_captions(uris: Sequence[str | None], captions: Sequence[str | None]) -> list[str]:
    """Return the captions, made from the uri where they are missing or empty."""
    return [c or caption_from_uri(u or "") for u, c in zip(uris, captions, strict=True)]


def _folder_source(folder: Path) -> ImageSource:
    if not folder.is_dir():
        what = "a file: pass it in a list, [path]" if folder.is_file() else "nothing"
        raise CatalogError(f"expected a folder of images at {folder}, found {what}")
    uris = sorted(_image_files(folder))
    if not uris:
        raise CatalogError(
            f"expected images in {folder}, found no file that ends in {', '.join(sorted(SUFFIXES))}"
        )
    return ImageSource(_joined(uris, [""] * len(uris), None), root=folder)


def _image_files(folder: Path) -> Iterable[str]:
    """Yield the images under a folder as relative paths with forward slashes."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                yield Path(parent, name).relative_to(folder).as_posix()


def _absolute(paths: Sequence[Any]) -> list[str]:
    result = []
    for number, path in enumerate(paths):
        if not isinstance(path, str | Path) or not str(path):
            raise CatalogError(f"expected a path or uri as entry {number}, got {path!r}")
        text = str(path)
        plain = text.startswith(SCHEMES)
        result.append(text if plain else str(Path(text).expanduser().absolute()))
    return result


def _joined(uris: list[str], captions: Sequence[str | None], rest: pa.Table | None) -> pa.Table:
    import pyarrow as pa

    columns = {
        "uri": pa.array(uris, pa.string()),
        "caption": pa.array(fill_captions(uris, captions), pa.string()),
    }
    if rest is not None:
        columns |= {name: rest.column(name) for name in rest.column_names}
    return pa.table(columns)


def _cast(table: pa.Table, name: str, kind: Any) -> pa.Table:
    import pyarrow as pa

    position = table.column_names.index(name)
    try:
        column = table.column(name).cast(kind)
    except pa.ArrowException as error:
        raise CatalogError(f"expected column {name!r} to hold {kind} values: {error}") from error
    return table.set_column(position, name, column)
