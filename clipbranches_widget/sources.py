"""Recognise what to index: folders, tables, archives, data sets, embeddings (layer 8).

=========================================  ====================================================
what is given                              what it is taken for
=========================================  ====================================================
folder, path or URL, with images           its tree, sorted by path: `source_table`
pattern such as ``photos/**/*.jpg``        these images
list or Series of paths or URLs            these images, in that order
DataFrame or Arrow table                   paths or URLs, or image bytes: `arrow_layout`
``.parquet``, ``.arrow``, ``.feather``     the same in files: `source_parquet`
``.tar``, ``.tar.gz``                      samples of WebDataset: `source_tar`
``.zip``                                   the same as a folder with what is in it
`datasets.Dataset`, ``save_to_disk``       `source_datasets`
folder with ``img_emb``, ``.npy``          embeddings that are there already: `source_embeddings`
=========================================  ====================================================

Files may be given as a folder of them, a list, or a pattern: ``*``, ``{0000..0127}``. Everything
may be a path or a URL (see `remote`). What is in a folder decides; two kinds at once are refused,
but a tar beside a Parquet file of the same name is its table of contents (img2dataset).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from clipbranches_widget import cells
from clipbranches_widget.arrow_layout import chunk_of, find_layout
from clipbranches_widget.errors import CatalogError
from clipbranches_widget.remote import (
    PROTOCOLS,
    check_protocols,
    expand_braces,
    has_magic,
    join,
    local_path,
    matches,
    numbered,
    scheme,
    tree,
)
from clipbranches_widget.source_datasets import (
    DatasetSource,
    is_dataset,
    saved_files,
    saved_splits,
)
from clipbranches_widget.source_embeddings import (
    EMBEDDINGS,
    LAYOUT,
    METADATA,
    ClipRetrievalEmbeddings,
)
from clipbranches_widget.source_parquet import (
    ARROW_SUFFIXES,
    PARQUET_SUFFIXES,
    TableFilesSource,
)
from clipbranches_widget.source_table import (
    MEASURED_COLUMNS,
    RESULT_COLUMNS,
    DivisibleSource,
    TableSource,
    arrow_table,
    items_table,
    with_captions,
)
from clipbranches_widget.source_tar import TAR_SUFFIXES, TarSource

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Source: TypeAlias = (
    "str | Path | Sequence[str | Path] | pd.Series[Any] | pd.DataFrame | pa.Table | Any"
)
Kind: TypeAlias = Literal["images", "tar", "table", "clip-retrieval", "npy"]

SUFFIXES = frozenset(
    (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""File name endings that are taken for images in a folder, compared without case."""

_NAMES: dict[Kind, str] = {
    "images": "images",
    "tar": ".tar archives",
    "table": "Parquet or Arrow files",
    "npy": "NumPy files",
    "clip-retrieval": "output of clip-retrieval",
}


@dataclass(frozen=True, slots=True)
class Found:
    """What a path, URL or pattern leads to.

    Attributes
    ----------
    kind
        What it is taken for.
    files
        References of the files, or for a `folder` their names in it.
    folder
        Where the names start from; None where `files` are references.
    """

    kind: Kind
    files: Sequence[str]
    folder: str | None = None


def image_source(
    source: Source, *, image_column: str | None = None, caption_column: str | None = None
) -> DivisibleSource:
    """Return the images of any supported source; see the module.

    Parameters
    ----------
    source
        What the module lists, or what `find` found.
    image_column
        Which column holds the images, their paths or their URLs, where several could be meant; of
        a tar, which extension.
    caption_column
        Which column holds the captions, if not ``caption``.

    Raises
    ------
    CatalogError
        No images in it, several kinds at once, a column name that is taken, or a missing path.
    """
    chosen = {"image_column": image_column, "caption_column": caption_column}
    if is_dataset(source):
        return DatasetSource(source, **chosen)
    if hasattr(source, "column_names") or hasattr(source, "columns"):
        return _table_source(source, **chosen)
    found = source if isinstance(source, Found) else _find_any(source)
    if found.kind == "tar":
        return TarSource(found.files, suffixes=SUFFIXES, **chosen)
    if found.kind == "table":
        return TableFilesSource(found.files, **chosen)
    if found.kind != "images":
        raise CatalogError(
            f"expected images, found {_NAMES[found.kind]}: give them to from_embeddings(source, "
            "path, encoder=...)"
        )
    for option, value in chosen.items():
        if value is not None:
            raise CatalogError(
                f"expected {option} only for tables, tars and data sets, got {value!r}"
            )
    return _images(found)


def _find_any(source: object) -> Found:
    """Find out what a path, URL, pattern or a list of files leads to."""
    if isinstance(source, str | Path):
        return find(source)
    if not isinstance(source, Iterable) or isinstance(source, bytes):
        raise CatalogError(
            f"expected a folder, a list of paths or a table, got {type(source).__name__}: URLs, "
            "patterns of files and a datasets.Dataset will do, too"
        )
    return _listed(list(source))


def find(source: str | Path) -> Found:
    """Find out what a path, URL or pattern leads to.

    Raises
    ------
    CatalogError
        To nothing, or to several kinds of files.
    """
    text = str(source)
    if not text:
        raise CatalogError("expected a folder, a file or a URL, got an empty text")
    try:
        check_protocols(text)
    except ValueError as error:
        raise CatalogError(str(error)) from error
    path = local_path(text)
    if path is not None:
        text = str(path.absolute())
        if path.is_dir():
            return _in_folder(text)
        if path.is_file():
            return _file(text)
    if has_magic(text) or expand_braces(text) != [text]:
        files = matches(text)
        if not files:
            raise CatalogError(f"expected files that match {source}, found none")
        return _of_one_kind(files, str(source))
    if path is not None:
        raise CatalogError(f"expected a folder of images at {text}, found nothing")
    return _file(text) if _kind(text) or _is_zip(text) else _in_folder(text)


def _file(reference: str) -> Found:
    """Return what one file is."""
    if _is_zip(reference):
        return _in_folder(f"zip://::{reference}")
    kind = _kind(reference)
    if kind is None or (kind == "images" and local_path(reference) is not None):
        raise CatalogError(
            f"expected a folder of images at {reference}, found a file: pass it in a list, "
            "[path], or pass a .parquet, .arrow, .tar or .zip file"
        )
    return Found(kind, [reference])


def _in_folder(folder: str) -> Found:
    """Return what a folder holds: in it and below it, or at its top for tables and archives."""
    names = tree(folder)
    top = {name for name in names if "/" not in name}
    _refuse_other_folders(folder, names, top)
    if any(EMBEDDINGS.fullmatch(name) or METADATA.fullmatch(name) for name in names):
        return Found("clip-retrieval", names, folder)
    if {"state.json", "dataset_info.json"} <= top:
        return Found("table", saved_files(folder))
    images = [name for name in names if _kind(name) == "images"]
    others = sorted((name for name in top if _kind(name) not in (None, "images")), key=numbered)
    if images and not others:
        return Found("images", images, folder)
    if not images and not others:
        raise CatalogError(
            f"expected images in {folder}, found no file that ends in "
            f"{', '.join(sorted(SUFFIXES))}, nor .parquet, .arrow or .tar at its top"
            + (f", but {_counted(names)}" if names else "")
        )
    return _of_one_kind([join(folder, name) for name in [*images, *others]], folder)


def _refuse_other_folders(folder: str, names: Sequence[str], top: set[str]) -> None:
    """Raise CatalogError for folders that are nearly right, naming the one that is."""
    if "catalog.json" in top:
        raise CatalogError(f"expected images in {folder}, found a catalog: open it with open(path)")
    if "dataset_dict.json" in top:
        splits = ", ".join(join(folder, name) for name in saved_splits(folder)) or "a split"
        raise CatalogError(
            f"expected one data set in {folder}, found a dict of them: pass one of {splits}"
        )
    inside = folder.rstrip("/").rpartition("/")[2]
    if inside in ("img_emb", "metadata", "text_emb") and any(
        name.startswith(f"{inside}_") for name in top
    ):
        raise CatalogError(
            f"expected {LAYOUT}, found only what is in {inside}: pass the folder above it"
        )
    if any(name.startswith("text_emb/") for name in names) and not any(
        name.startswith("img_emb/") for name in names
    ):
        raise CatalogError(
            f"expected {LAYOUT} in {folder}, found only embeddings of texts: run clip-retrieval "
            "inference with --enable_image True"
        )


def _of_one_kind(files: Sequence[str], where: str) -> Found:
    """Return what all files are."""
    kinds = {file: _kind(file) for file in files}
    there = {kind for kind in kinds.values() if kind is not None}
    if there == {"tar", "table"}:
        tars = [file for file in files if kinds[file] == "tar"]
        tables = {file.rpartition(".")[0] for file in files if kinds[file] == "table"}
        if all(tar.removesuffix(".tar") in tables for tar in tars):
            return Found("tar", tars)  # img2dataset writes 00000.parquet beside 00000.tar
    if len(there) != 1 or None in kinds.values():
        raise CatalogError(
            f"expected files of one kind in {where}, found {_counted(files)}: pass a pattern such "
            f"as {join(where, '**/*.jpg') if not has_magic(where) else '*.tar'}, or a list"
        )
    return Found(there.pop(), files)


def _listed(paths: list[Any]) -> Found:
    """Return what a list of paths or URLs holds: images, unless all are other known files."""
    uris = _absolute(paths)
    if not uris:
        raise CatalogError("expected at least one image, got an empty list")
    if {_kind(uri) for uri in uris} <= {"tar", "table", "npy"}:
        return _of_one_kind(uris, "the list")
    return Found("images", uris)


def _images(found: Found) -> TableSource:
    """Return images by their places."""
    if found.folder is None:
        return TableSource(with_captions(found.files, [""] * len(found.files)))
    path = local_path(found.folder)
    uris = [name if path is not None else join(found.folder, name) for name in found.files]
    return TableSource(with_captions(uris, [""] * len(uris)), root=path)


def _table_source(
    source: Any, *, image_column: str | None, caption_column: str | None
) -> TableSource:
    """Return the images of a table in memory: by place, or by the bytes in it."""
    table = arrow_table(source)
    names = table.column_names
    if image_column is None and caption_column is None and {"uri", "path"} & set(names):
        items = items_table(table, taken=RESULT_COLUMNS | MEASURED_COLUMNS.keys())
        uris = _absolute(items.column("uri").to_pylist())
        captions = items.column("caption").to_pylist()
        rest = items.drop_columns(["uri", "caption"])
        if not uris:
            raise CatalogError("expected at least one image, got an empty table")
        return TableSource(with_captions(uris, captions, rest))
    layout = find_layout(
        table.schema, where="the table", image_column=image_column, caption_column=caption_column
    )
    if not len(table):
        raise CatalogError("expected at least one image, got an empty table")
    chunk = chunk_of(
        table.select(layout.columns),
        layout,
        cell_uri=lambda line: cells.unsaved_uri(layout.image, line),
        folder=str(Path.cwd()),
    )
    images = table.column(layout.image) if layout.has_bytes else None
    return TableSource(chunk.table, images=images)


def clip_retrieval_source(
    found: Found, *, image_column: str | None = None, caption_column: str | None = None
) -> ClipRetrievalEmbeddings:
    """Return the embeddings of a folder that `find` took for output of clip-retrieval."""
    return ClipRetrievalEmbeddings(
        found.folder or ".",
        found.files,
        suffixes=SUFFIXES,
        image_column=image_column,
        caption_column=caption_column,
    )


def _kind(reference: str) -> Kind | None:
    """Return what the ending of a file's name says."""
    name = reference.partition("::")[0].lower()
    if scheme(name) in ("http", "https"):
        name = name.partition("?")[0]
    if name.endswith(TAR_SUFFIXES):
        return "tar"
    if name.endswith((*PARQUET_SUFFIXES, *ARROW_SUFFIXES)):
        return "table"
    if name.endswith(".npy"):
        return "npy"
    return "images" if f".{name.rpartition('.')[2]}" in SUFFIXES else None


def _is_zip(reference: str) -> bool:
    return reference.partition("::")[0].lower().endswith(".zip")


def _counted(names: Sequence[str]) -> str:
    """Say how many files there are of each ending."""
    endings = Counter(f".{name.rpartition('.')[2]}" if "." in name else name for name in names)
    shown = [f"{count:,} {ending}" for ending, count in endings.most_common(6)]
    return ", ".join(shown)


def _absolute(paths: Sequence[Any]) -> list[str]:
    known = PROTOCOLS.union(cells.KINDS, (cells.UNSAVED,))
    result = []
    for number, path in enumerate(paths):
        if not isinstance(path, str | Path) or not str(path):
            raise CatalogError(f"expected a path or uri as entry {number}, got {path!r}")
        text = str(path)
        if scheme(text) and scheme(text) not in known:
            raise CatalogError(
                f"expected a path or a URL of {', '.join(sorted(PROTOCOLS))} as entry {number}, "
                f"got {text!r}"
            )
        is_uri = bool(scheme(text)) or text.startswith("openmoji:")
        result.append(text if is_uri else str(Path(text).expanduser().absolute()))
    return result
