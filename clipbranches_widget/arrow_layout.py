"""Which column of a Parquet file, Arrow file or data set is what (layer 5). Pure.

The images are in the one column of bytes, or of structs of ``bytes`` and ``path`` (what Hugging
Face writes for its `Image` feature); where there is none, in the paths or URLs of ``uri`` or
``path``. ``image_column`` decides where several could be meant. The caption is ``caption``, or what
``caption_column`` says. Numbers of a Hugging Face `ClassLabel` become its names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.errors import CatalogError
from clipbranches_widget.remote import join, scheme
from clipbranches_widget.source_table import (
    Chunk,
    caption_from_uri,
    cell_bytes,
    free_name,
    with_captions,
)

if TYPE_CHECKING:
    import pyarrow as pa

PATH_COLUMNS = ("uri", "path")


@dataclass(frozen=True, slots=True)
class Layout:
    """What the columns of a table are for.

    Attributes
    ----------
    image
        The column with the images.
    has_bytes
        Whether it holds their bytes, not their places.
    caption
        The column with the captions, None for none.
    kept
        The other columns that go into the catalog: (name, name there).
    classes
        Names of the classes that the numbers of a column stand for.
    """

    image: str
    has_bytes: bool
    caption: str | None
    kept: tuple[tuple[str, str], ...]
    classes: Mapping[str, Sequence[str]]

    @property
    def columns(self) -> list[str]:
        """All columns that are read."""
        wanted = [self.image, *(name for name, _ in self.kept)]
        return [*wanted, self.caption] if self.caption is not None else wanted


def find_layout(
    schema: pa.Schema, *, where: str, image_column: str | None, caption_column: str | None
) -> Layout:
    """Find out what the columns of a table are for; see the module.

    Raises
    ------
    CatalogError
        No column of images, or several; the message names the columns there are.
    """
    image = image_column if image_column is not None else _image_column(schema, where)
    caption = caption_column
    if caption is None and "caption" in schema.names and image != "caption":
        caption = "caption"
    for name in (image, caption):
        if name is not None and schema.names.count(name) != 1:
            raise CatalogError(
                f"expected a column {name!r} in {where}, found {_listed(schema.names)}"
            )
    has_bytes = _holds_bytes(schema.field(image).type)
    if not has_bytes and not _is_text(schema.field(image).type):
        raise CatalogError(
            f"expected image bytes, paths or URLs in column {image!r} of {where}, got "
            f"{schema.field(image).type}"
        )
    if caption is not None and not _is_text(schema.field(caption).type):
        raise CatalogError(
            f"expected texts in the caption column {caption!r} of {where}, got "
            f"{schema.field(caption).type}"
        )
    kept: list[tuple[str, str]] = []
    for field in schema:
        if field.name not in (image, caption) and not _holds_bytes(field.type):
            kept.append((field.name, free_name(field.name, taken=[name for _, name in kept])))
    return Layout(image, has_bytes, caption, tuple(kept), _classes(schema))


def chunk_of(
    table: pa.Table, layout: Layout, *, cell_uri: Callable[[int], str], folder: str
) -> Chunk:
    """Turn some lines of a table into a chunk of a source.

    Parameters
    ----------
    table
        With the columns that `layout` asks for.
    cell_uri
        The uri of the image bytes in a line, counted from 0 in `table`.
    folder
        Where relative paths start from.
    """
    images = table.column(layout.image)
    captions: list[str | None] = [None] * len(table)
    if layout.caption is not None:
        captions = table.column(layout.caption).to_pylist()
    rest = kept_columns(table, layout)
    if not layout.has_bytes:
        places = [place_of(path, folder) for path in images.to_pylist()]
        return Chunk(with_captions(places, captions, rest))
    paths, is_there = _paths(images)
    uris = [
        cell_uri(line) if there or not path else place_of(path, folder)
        for line, (path, there) in enumerate(zip(paths, is_there, strict=True))
    ]
    captions = [
        caption or (caption_from_uri(path) if path else None)
        for caption, path in zip(captions, paths, strict=True)
    ]
    return Chunk(with_captions(uris, captions, rest), cell_bytes(images))


def kept_columns(table: pa.Table, layout: Layout) -> pa.Table:
    """Return the user's columns under the names and types that they have in the catalog."""
    import pyarrow as pa

    columns = {}
    for name, new_name in layout.kept:
        column = table.column(name)
        if name in layout.classes:
            column = _class_names(column, layout.classes[name])
        columns[new_name] = column.cast(_plain_type(column.type))
    if not columns:
        return pa.table({"none": pa.nulls(len(table))}).select([])
    return pa.table(columns)


def with_class_names(table: pa.Table, name: str) -> pa.ChunkedArray:
    """Return a column of a table, numbers of a `ClassLabel` as the names of their classes."""
    column, names = table.column(name), _classes(table.schema).get(name)
    return column if names is None else _class_names(column, names)


def place_of(path: str | None, folder: str) -> str:
    """Return the absolute path or the URL of an image that a table names; "" for none."""
    if not path:
        return ""
    if scheme(path):
        return path
    local = Path(path).expanduser()
    return str(local) if local.is_absolute() else join(folder, path)


def _image_column(schema: pa.Schema, where: str) -> str:
    candidates = [str(field.name) for field in schema if _holds_bytes(field.type)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise CatalogError(
            f"expected one column of images in {where}, found {_listed(candidates)}: say which "
            "with image_column="
        )
    paths = [name for name in PATH_COLUMNS if name in schema.names]
    if not paths:
        raise CatalogError(
            f"expected a column of image bytes, or 'uri' or 'path', in {where}, found "
            f"{_listed(schema.names)}: say with image_column= which holds the images, their paths "
            "or their URLs"
        )
    return paths[0]


def _paths(images: pa.ChunkedArray) -> tuple[list[str | None], list[bool]]:
    """Return the path in each cell of an image column, and whether there are bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = images.type
    if not pa.types.is_struct(kind):
        return [None] * len(images), images.is_valid().to_pylist()
    there = pc.struct_field(images, "bytes").is_valid().to_pylist()
    if kind.get_field_index("path") < 0:
        return [None] * len(images), there
    return pc.struct_field(images, "path").to_pylist(), there


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and _holds_bytes(kind.field(place).type)
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _plain_type(kind: Any) -> Any:
    """Return the type of a column's values: of one type in every chunk, whatever its encoding."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return kind.value_type
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def _classes(schema: pa.Schema) -> dict[str, Sequence[str]]:
    """Read the class names that Hugging Face's `datasets` writes beside an Arrow schema."""
    said = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(said)["info"]["features"] if said else {}
        named = {name: feature.get("names") for name, feature in features.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {name: names for name, names in named.items() if isinstance(names, list)}


def _class_names(column: pa.ChunkedArray, names: Sequence[str]) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc

    numbers = column.cast(pa.int64())
    known = pc.and_(pc.greater_equal(numbers, 0), pc.less(numbers, len(names)))
    return pc.take(
        pa.array([str(name) for name in names], pa.string()), pc.if_else(known, numbers, None)
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(str(name)) for name in names) or "none"
