"""Find the rows that labels of a file are about (layer 5).

A line is about the first of these that there is:

1. the row of its row id, where the file says that it is of this catalog, or where the path or the
   content hash in the line is that of the row;
2. the row with its path or URL;
3. the row with its content hash; of several the lowest.

A row whose content hash is known and another than that in the line is not meant, whatever else
says so (unless the caller says that row ids are right). Rows that were removed are passed over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from clipbranches_widget.errors import LabelError
from clipbranches_widget.images import content_hash
from clipbranches_widget.integrity import identity
from clipbranches_widget.label_files import LabelLine, LabelLines
from clipbranches_widget.labels import LabelSet, as_row_ids
from clipbranches_widget.remote import scheme

if TYPE_CHECKING:
    from clipbranches_widget.catalog import Catalog

By = Literal["row", "path", "content_hash"]

_N_NAMED = 5


@dataclass(frozen=True, slots=True)
class ImportedLabels:
    """What `Session.import_labels` did.

    Attributes
    ----------
    labels : LabelSet
        What the file says, by row of the catalog.
    matched : mapping of str to int
        Lines that were matched by "row", "path" and "content_hash".
    unmatched : tuple of str
        Names of the images that are not in the catalog.
    n_unlabelled : int
        Lines, or images of a folder, that have no label.
    n_changed : int
        Rows whose label is another than before.
    """

    labels: LabelSet
    matched: Mapping[str, int]
    unmatched: tuple[str, ...] = field(default=(), repr=False)
    n_unlabelled: int = 0
    n_changed: int = 0

    def __str__(self) -> str:
        """Say what was matched how, and name the first that were not."""
        n_matched = sum(self.matched.values())
        words = {"row": "row", "path": "path", "content_hash": "content"}
        how = ", ".join(f"{count:,} by {words[by]}" for by, count in self.matched.items() if count)
        yes, no = len(self.labels.positive), len(self.labels.negative)
        said = f"{n_matched:,} labels matched" + (f" ({how})" if how else "")
        said += f": {yes:,} yes, {no:,} no; {self.n_changed:,} changed"
        if self.unmatched:
            said += f"; {len(self.unmatched):,} not in the catalog: {_named(self.unmatched)}"
        return f"{said}; {self.n_unlabelled:,} without a label" if self.n_unlabelled else said


def matched_labels(catalog: Catalog, said: LabelLines, by: By | None = None) -> ImportedLabels:
    """Return the labels that a file gives to rows of a catalog; see the module.

    Parameters
    ----------
    by
        Match by this alone; "row" then trusts the row ids.

    Raises
    ------
    LabelError
        If an image is both yes and no, or only row ids of an unknown catalog are there.
    """
    if by is not None and by not in get_args(By):
        raise LabelError(f"expected by='row', 'path', 'content_hash' or None, got {by!r}")
    found = _Match(catalog, said, by).rows()
    rows: dict[int, int] = {}
    both: dict[int, str] = {}
    for line, (row, _) in zip(said.lines, found, strict=True):
        if row is not None and rows.setdefault(row, line.label) != line.label:
            both[row] = str(line)
    if both:
        raise LabelError(
            f"expected each image to be yes or no, got both for {len(both):,}: "
            f"{_named(tuple(both.values()))}: drop one of the two; nothing was changed"
        )
    ways = Counter(how for row, how in found if row is not None)
    yes, no = (as_row_ids([row for row, v in rows.items() if v == sign]) for sign in (1, -1))
    return ImportedLabels(
        LabelSet(yes, no),
        MappingProxyType({how: ways[how] for how in get_args(By)}),
        tuple(str(line) for line, (row, _) in zip(said.lines, found, strict=True) if row is None),
        said.n_unlabelled,
    )


Found = tuple[int | None, By]


class _Match:
    """Lines on their way to rows."""

    def __init__(self, catalog: Catalog, said: LabelLines, by: By | None) -> None:
        self._catalog = catalog
        self._lines = said.lines
        self._by = by
        root = catalog.manifest.source_root
        self._root = Path(root) if root else None
        self._is_same = said.catalog_id == identity(catalog.manifest)
        self._found: list[Found] = [(None, "row")] * len(said.lines)

    def rows(self) -> list[Found]:
        """Return for each line its row and how it was found; None where it is not there."""
        ways: dict[By, Callable[[list[int]], None]] = {
            "row": self._by_row,
            "path": self._by_path,
            "content_hash": self._by_content,
        }
        for way, match in ways.items():
            if self._by in {None, way}:
                match([at for at, (row, _) in enumerate(self._found) if row is None])
        self._check_rows_alone()
        return self._found

    def _check_rows_alone(self) -> None:
        """Raise where row ids are all there is, and nothing says of which catalog."""
        is_known = self._is_same or self._by == "row"
        lines = [
            line for line, (row, _) in zip(self._lines, self._found, strict=True) if row is None
        ]
        if is_known or not lines or len(lines) < len(self._lines):
            return
        if any(line.paths or line.content_hash or line.file for line in lines):
            return
        raise LabelError(
            "expected paths or content hashes beside the row ids, which may be those of another "
            "catalog: write the labels with session.export_labels(), or say by='row' if they are "
            "of this one"
        )

    def _by_row(self, waiting: list[int]) -> None:
        catalog = self._catalog
        places = [
            at
            for at in waiting
            if (row := self._lines[at].row) is not None
            and row < len(catalog)
            and bool(catalog.is_present[row])
        ]
        rows = np.array([self._lines[at].row for at in places], dtype=np.int64)
        items = catalog.lines(rows, ["uri", "content_hash"]).to_pylist()
        for at, row, item in zip(places, rows.tolist(), items, strict=True):
            if self._by == "row" or self._is_row(self._lines[at], item):
                self._found[at] = (row, "row")

    def _is_row(self, line: LabelLine, item: Mapping[str, str | None]) -> bool:
        """Return whether a row id may be believed, of which this is known in the catalog."""
        if not _agrees(line, item["content_hash"]):
            return False  # tables of several catalogs in one name the first of them alone
        is_content = bool(line.content_hash and item["content_hash"])
        return self._is_same or is_content or bool(item["uri"] and item["uri"] in self._forms(line))

    def _by_path(self, waiting: list[int]) -> None:
        forms = {at: self._forms(self._lines[at]) for at in waiting}
        rows = self._rows_with("uri", {form for each in forms.values() for form in each})
        named = np.unique(np.fromiter(rows.values(), np.int64, len(rows)))
        hashes = self._catalog.lines(named, ["content_hash"]).column("content_hash").to_pylist()
        hash_of = dict(zip(named.tolist(), hashes, strict=True))
        for at, each in forms.items():
            line = self._lines[at]
            there = dict.fromkeys(rows[form] for form in each if form in rows)
            agreeing = [row for row in there if _agrees(line, hash_of[row])]
            if len(agreeing) > 1 and not (line.content_hash and hash_of[agreeing[0]]):
                one, other = (self._catalog.uri(row) for row in agreeing[:2])
                raise LabelError(
                    f"expected paths that name one image, got {line.paths[0]!r}, which is {one!r} "
                    f"of the catalog, and {other!r} from the folder of the labels: write whole "
                    "paths, "
                    "or a column content_hash; nothing was changed"
                )
            if agreeing:
                self._found[at] = (agreeing[0], "path")

    def _by_content(self, waiting: list[int]) -> None:
        wanted = {at: _hash_of(self._lines[at]) for at in waiting}
        rows = self._rows_with("content_hash", {value for value in wanted.values() if value})
        for at, value in wanted.items():
            if value in rows:
                self._found[at] = (rows[value], "content_hash")

    def _rows_with(self, column: str, wanted: Collection[str]) -> dict[str, int]:
        """Return the lowest row that is there for each value of a column."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not wanted:
            return {}
        values = self._catalog.item_store.columns([column]).column(column)
        mask = pc.is_in(values, value_set=pa.array(list(wanted), values.type))
        rows = self._catalog.without_removed(np.flatnonzero(mask.to_numpy()).astype(np.int64))
        found = zip(values.take(rows[::-1]).to_pylist(), rows[::-1].tolist(), strict=True)
        return {str(value): row for value, row in found}

    def _forms(self, line: LabelLine) -> Sequence[str]:
        """Return what the catalog may call an image: as in the file, or from its own folder."""
        forms = dict.fromkeys(line.paths)
        if self._root is not None:
            for text in line.paths:
                if not scheme(text) and Path(text).is_relative_to(self._root):
                    forms[Path(text).relative_to(self._root).as_posix()] = None
        return [form for form in forms if form]


def _agrees(line: LabelLine, stored: str | None) -> bool:
    """Return whether the content may be the same."""
    return not line.content_hash or not stored or line.content_hash == stored


def _hash_of(line: LabelLine) -> str:
    if line.content_hash or line.file is None:
        return line.content_hash
    try:
        return content_hash(line.file.read_bytes())
    except OSError:
        return ""


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _N_NAMED:,} more" if len(names) > _N_NAMED else ""
    return ", ".join(names[:_N_NAMED]) + more
