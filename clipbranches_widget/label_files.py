"""Labels in files and tables (layer 5): what each line says, and of which image.

A table has a column of labels, and columns that say which image is meant: `row`, `path` (or
``uri``, ``file_name``, ``filepath``), `content_hash`. A folder has images in a folder for each
label, at any depth, and may have a ``metadata.jsonl`` with the same columns. A session file has
row ids of its catalog.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipbranches_widget.arrow_layout import with_class_names
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.cells import arrow_batches, arrow_schema
from clipbranches_widget.errors import CatalogError, LabelError
from clipbranches_widget.imagefolder import METADATA_FILE
from clipbranches_widget.integrity import identity
from clipbranches_widget.label_values import ACCEPTED, Mapped, read_values, value_of
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.remote import scheme
from clipbranches_widget.row_export import LABEL_COLUMN, METADATA_KEY, RowExport, without_escape
from clipbranches_widget.session_events import Event
from clipbranches_widget.session_file import SessionFile, is_session_file, read_catalog_id
from clipbranches_widget.session_state import SessionState
from clipbranches_widget.source_datasets import is_dataset, saved_files
from clipbranches_widget.source_table import arrow_table
from clipbranches_widget.sources import SUFFIXES

PATH_COLUMNS = ("path", "uri", "file_name", "filepath")
_ARROW_SUFFIXES = frozenset((".parquet", ".arrow", ".feather"))
_IDENTIFYING = ("row", *PATH_COLUMNS, "content_hash")
_N_NAMED = 5


@dataclass(frozen=True, slots=True)
class LabelLine:
    """What one line says of one image.

    Attributes
    ----------
    label : int
        +1 or -1.
    row : int or None
        Row id, of whatever catalog.
    paths : tuple of str
        Paths or URLs that may name it, the likeliest first.
    content_hash : str
        Of the encoded image; empty where it is not known.
    file : Path or None
        The image itself, of a folder.
    """

    label: int
    row: int | None = None
    paths: tuple[str, ...] = ()
    content_hash: str = ""
    file: Path | None = None

    def __str__(self) -> str:
        """Return how people know it."""
        if self.file is not None:
            return str(self.file)
        return self.paths[0] if self.paths else self.content_hash or f"row {self.row}"


@dataclass(frozen=True, slots=True)
class LabelLines:
    """What a file of labels says.

    Attributes
    ----------
    lines : list of LabelLine
        Those with a label.
    n_unlabelled : int
        Lines, or images in other folders, without a label.
    catalog_id : str
        `integrity.identity` of the catalog that the row ids are of; empty where it is not known.
    """

    lines: list[LabelLine]
    n_unlabelled: int = 0
    catalog_id: str = ""


def read_labels(
    source: object, *, label_column: str | None = None, mapping: Mapped | None = None
) -> LabelLines:
    """Read labels of any source; see `Session.import_labels`.

    Raises
    ------
    LabelError
        It is no such source, has no such column, or holds other values.
    """
    if isinstance(source, str | Path):
        return _of_path(Path(source).expanduser().absolute(), label_column, mapping)
    if isinstance(source, RowExport):
        source = source.to_arrow()
    if is_dataset(source):
        return _of_dataset(source, label_column, mapping)
    if type(source).__module__.partition(".")[0] == "pandas":
        source = _plain(source, LABEL_COLUMN if label_column is None else label_column)
    try:
        table = arrow_table(source)
    except CatalogError as error:
        raise LabelError(
            "expected a table of labels, the path of a file of them or a folder of images, got "
            f"{type(source).__name__}"
        ) from error
    return _of_table(table, Path.cwd(), label_column, mapping)


def _plain(frame: Any, label_column: str) -> Any:
    """Return a pandas object with the wanted columns alone; in these, objects become text.

    Such are `Path` objects, and labels that are words and numbers.
    """
    there = list(getattr(frame, "columns", ()))
    if label_column not in there:
        return frame
    frame = frame[[name for name in there if name in {label_column, *_IDENTIFYING}]]
    is_object = [dtype.kind == "O" for dtype in frame.dtypes]
    texts = {name: frame[name].map(str, na_action="ignore") for name in frame.columns[is_object]}
    return frame.assign(**texts)


def _of_path(path: Path, label_column: str | None, mapping: Mapped | None) -> LabelLines:
    name = LABEL_COLUMN if label_column is None else label_column
    if path.is_dir():
        if not (path / "state.json").is_file():
            return _of_folder(path, mapping)
        table = _read_arrow([Path(file) for file in saved_files(str(path))], name)
        return _of_table(table, path, label_column, mapping)
    if not path.is_file():
        raise LabelError(f"expected a file or folder of labels at {path}, found none")
    kind = path.suffix.lower()
    if is_session_file(path):
        return _of_session(path)
    if kind in _ARROW_SUFFIXES:
        return _of_table(_read_arrow([path], name), path.parent, label_column, mapping)
    if kind in {".csv", ".tsv"}:
        columns = _of_csv(path)
    elif kind in {".jsonl", ".json", ".ndjson"}:
        columns = _of_json(path)
    else:
        raise LabelError(
            "expected labels as .csv, .tsv, .parquet, .arrow, .feather, .jsonl, a session file or "
            f"a folder, got {path}"
        )
    return _of_columns(columns, path.parent, label_column, mapping)


def _read_arrow(paths: Sequence[Path], label_column: str) -> Any:
    """Read the columns that are wanted: others may hold images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted, tables = {label_column, *_IDENTIFYING}, []
    try:
        for path in paths:
            if path.suffix.lower() == ".parquet":
                there = [name for name in pq.read_schema(path).names if name in wanted]
                tables.append(pq.read_table(path, columns=there))
            else:
                schema = arrow_schema(str(path))
                whole = pa.Table.from_batches(arrow_batches(str(path)), schema)
                tables.append(whole.select([name for name in schema.names if name in wanted]))
        return pa.concat_tables(tables)
    except (pa.ArrowException, OSError) as error:
        raise LabelError(f"expected Parquet or Arrow in {paths[0]}, got: {error}") from error


def _of_csv(path: Path) -> dict[str, list[Any]]:
    """Read a CSV as text: ``001`` stays so, and a path named NA, too.

    Many spreadsheets separate by semicolons; the header tells.
    """
    import pandas as pd

    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
        likeliest = "\t,;" if path.suffix.lower() == ".tsv" else ",;\t"
        separator = next((each for each in likeliest if each in header), ",")
        names = pd.read_csv(path, sep=separator, nrows=0, encoding="utf-8-sig").columns
        frame = pd.read_csv(
            path,
            sep=separator,
            dtype=str,
            keep_default_na=False,
            index_col=False,  # a comma at the end of each line moves no column
            usecols=range(len(names)),
            encoding="utf-8-sig",
        )
    except (ValueError, OSError) as error:
        raise LabelError(f"expected a table with a header in {path}, got: {error}") from error
    return {
        without_escape(name): [without_escape(value) for value in frame[name]]
        for name in frame.columns
    }


def _of_json(path: Path) -> dict[str, list[Any]]:
    """Read JSON Lines, or one list of objects."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            # Not splitlines: a caption may hold one of the rarer ends of a line.
            records = [json.loads(line) for line in text.split("\n") if line.strip()]
        names = dict.fromkeys(name for record in records for name in record)
        return {name: [record.get(name) for record in records] for name in names}
    except (ValueError, AttributeError, TypeError, OSError) as error:
        raise LabelError(f"expected a JSON object a line in {path}, got: {error}") from error


def _of_dataset(dataset: Any, label_column: str | None, mapping: Mapped | None) -> LabelLines:
    name = LABEL_COLUMN if label_column is None else label_column
    wanted = [column for column in (name, *_IDENTIFYING) if column in dataset.column_names]
    table = dataset.select_columns(wanted).with_format("arrow")[:] if wanted else None
    if table is None:
        raise _no_column(name, dataset.column_names)
    return _of_table(table, Path.cwd(), label_column, mapping)


def _of_table(
    table: Any, folder: Path, label_column: str | None, mapping: Mapped | None
) -> LabelLines:
    said = (table.schema.metadata or {}).get(METADATA_KEY)
    name = LABEL_COLUMN if label_column is None else label_column
    wanted = [column for column in (name, *_IDENTIFYING) if column in table.column_names]
    columns = {column: with_class_names(table, column).to_pylist() for column in wanted}
    if name not in columns:
        raise _no_column(name, table.column_names)
    return _of_columns(columns, folder, label_column, mapping, catalog_id=_catalog_id(said))


def _catalog_id(said: bytes | None) -> str:
    try:
        return str(json.loads(said)["catalog"]) if said else ""
    except (ValueError, LookupError, TypeError):
        return ""


def _of_columns(
    columns: dict[str, list[Any]],
    folder: Path,
    label_column: str | None,
    mapping: Mapped | None,
    *,
    catalog_id: str = "",
) -> LabelLines:
    """Turn columns into lines."""
    name = LABEL_COLUMN if label_column is None else label_column
    if name not in columns:
        raise _no_column(name, columns)
    labels = read_values(columns[name], mapping)
    if not any(column in columns for column in _IDENTIFYING if column != name):
        raise LabelError(
            f"expected a column that names the images ({', '.join(_IDENTIFYING)}), got "
            f"{', '.join(map(repr, columns))}"
        )
    rows = map(_row, columns.get("row", [None] * len(labels)))
    places = [columns[each] for each in PATH_COLUMNS if each in columns and each != name]
    hashes = columns.get("content_hash", [None] * len(labels))
    lines = [
        LabelLine(
            label,
            row,
            tuple(dict.fromkeys(p for each in found for p in candidates(each, folder))),
            str(content_hash or ""),
        )
        for label, row, content_hash, *found in zip(labels, rows, hashes, *places, strict=True)
        if label
    ]
    return LabelLines(lines, len(labels) - len(lines), catalog_id)


def candidates(text: object, folder: Path) -> list[str]:
    """Return the paths that a cell may mean: as it is, and from the folder of its file."""
    if not isinstance(text, str) or not text:
        return []
    if scheme(text) or text.startswith("openmoji:"):
        return [text]
    place = os.path.expanduser(text)  # noqa: PTH111 - that of Path raises for ~$a.jpg
    return [text, os.path.normpath(folder / place)]


def _row(value: object) -> int | None:
    try:
        number = float(str(value))
    except ValueError:
        return None
    return int(number) if number >= 0 and number.is_integer() else None


def _of_folder(folder: Path, mapping: Mapped | None) -> LabelLines:
    """Read images in a folder for each label; what is in none of these has no label."""
    known = _metadata(folder / METADATA_FILE)
    lines: list[LabelLine] = []
    others: dict[str, int] = {}
    files = sorted(
        file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()
    )
    for file in files:
        inside = file.relative_to(folder).parent.parts
        found = next((value for name in inside if (value := value_of(name, mapping))), 0)
        if not found:
            others["/".join(inside) or "."] = 1
            continue
        said = known.get(file.relative_to(folder).as_posix()) or known.get(file.name)
        paths = (str(file),) if said is None else (*said.paths, str(file))
        row, content_hash = (None, "") if said is None else (said.row, said.content_hash)
        lines.append(LabelLine(found, row, paths, content_hash, file))
    if not lines:
        there = ", ".join(map(repr, list(others)[:_N_NAMED])) or "no images"
        raise LabelError(
            f"expected images in folders whose names are {ACCEPTED} in {folder}, found {there}: "
            "say which folders are what with mapping={'cats': 'yes', 'dogs': 'no'}"
        )
    return LabelLines(lines, len(files) - len(lines))


def _metadata(file: Path) -> dict[str, LabelLine]:
    """Return what is said of each file name, with its folder and without where that is unique."""
    if not file.is_file():
        return {}
    columns = _of_json(file)
    if "file_name" not in columns:
        return {}
    names = columns["file_name"]
    columns = {name: columns[name] for name in ("row", "path", "content_hash") if name in columns}
    if not columns:
        return {}
    said = _of_columns({"label": [1] * len(names), **columns}, file.parent, None, None).lines
    whole = dict(zip(map(str, names), said, strict=True))
    bases = Counter(Path(name).name for name in whole)
    alone = {Path(name).name: line for name, line in whole.items() if bases[Path(name).name] == 1}
    return alone | whole


def _of_session(path: Path) -> LabelLines:
    """Read a session file: row ids, and where its catalog is still there, the images' names."""
    theirs, state = read_catalog_id(path), SessionState()
    for line in SessionFile(path, theirs, "").read():
        state = state.apply(Event.from_record(line.record))
    rows = state.labels.rows.tolist()
    lines = [LabelLine(state.labels.get(row), row) for row in rows]
    try:
        catalog = Catalog.open(theirs.name)
        if identity(catalog.manifest) == theirs.id:
            lines = _named(catalog, state.labels)
    except CatalogError:
        pass  # moved or gone: row ids will do for a session on the same catalog
    return LabelLines(lines, 0, theirs.id)


def _named(catalog: Catalog, labels: LabelSet) -> list[LabelLine]:
    rows = labels.rows
    lines = catalog.lines(rows, ["uri", "content_hash"]).to_pylist()
    root = Path(catalog.manifest.source_root or Path.cwd())
    return [
        LabelLine(
            labels.get(row), row, tuple(candidates(line["uri"], root)), line["content_hash"] or ""
        )
        for row, line in zip(rows.tolist(), lines, strict=True)
    ]


def _no_column(name: str, there: Iterable[str]) -> LabelError:
    return LabelError(
        f"expected a column {name!r} of labels, got {', '.join(map(repr, there))}: say which it is "
        "with label_column="
    )
