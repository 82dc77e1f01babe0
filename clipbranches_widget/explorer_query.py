"""The Explorer's query bar (layer 6): words, an image, examples; former searches; filters.

State: `text` and `kind` of the latest search, its `phrases` where it has several; `history`, the
latest distinct searches ``{id, kind, text, picture}``; `filters`, ``{column, text, test,
values}``; how many of the catalog's rows match, `n_passing` of `n_total`; `columns`, what can be
filtered, once it was asked for. `picture` numbers the upload that a search by image came from:
the view that sent it shows it.

An image comes as buffers of at most 1 MiB, ``image {number, name, n_bytes}`` each, until the bytes
are complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import ImageReadError, QueryError
from clipbranches_widget.explorer_lanes import Lane
from clipbranches_widget.explorer_part import Host, Part, Progress
from clipbranches_widget.explorer_view import Contents, shorten
from clipbranches_widget.images import read_image
from clipbranches_widget.item_columns import MAX_CATEGORIES, summaries
from clipbranches_widget.query_text import phrases_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from clipbranches_widget.result import Result

Key = tuple[str, str, str]
"""Kind, words and embedding of a query."""

N_HITS = 2_000
"""Nearest images a search from the widget asks for."""

N_HISTORY = 20
MAX_UPLOAD_BYTES = 20 * 2**20
MAX_COLUMNS = 24
MAX_TEXT_CHARS = 2_000
MAX_NAME_CHARS = 120


class QueryPart(Part):
    """The query bar: what is searched for, and which rows are shown."""

    name = "query"
    is_docked = False

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._seen: tuple[Result | None] | None = None
        self._now: Key | None = None
        self._passing: tuple[NDArray[np.bool_], NDArray[np.int64]] | None = None
        self._history: list[dict[str, Any]] = []
        self._columns: list[dict[str, Any]] = []
        self._lane = Lane("explorer-columns")
        self._upload: tuple[int, bytearray] = (0, bytearray())
        self._pictures: dict[Key, int] = {}  # number of the upload that a query came from

    def state(self) -> dict[str, Any]:
        """Return the latest search, those before it, and the filters."""
        session = self.host.session
        n_total = session.catalog.n_present
        kind, text, _ = self._now or ("", "", "")
        return {
            "text": text[:MAX_TEXT_CHARS],
            "kind": kind,
            "picture": 0 if self._now is None else self._pictures.get(self._now, 0),
            "phrases": _phrases(text) if kind == "text" else [],
            "history": self._history,
            "filters": _filters(session.filters, session.filter_texts),
            "n_passing": len(self._rows_passing()[1]) if session.filters else n_total,
            "n_total": n_total,
            "columns": self._columns,
        }

    def adjust(self, contents: Contents) -> Contents:
        """Leave out rows that do not match the filters; note the searches when one was added."""
        if self._seen is None or self._seen[0] is not contents.hits:
            self._seen = (contents.hits,)
            self._note_searches()
        session = contents.session
        if not session.filters:
            return contents
        passing, rows_passing = self._rows_passing()
        ranked = dict(contents.ranked)
        ranked["catalog"] = rows_passing
        for tab in ("yes", "no"):
            if tab in ranked:
                rows = np.asarray(ranked[tab], dtype=np.int64)
                ranked[tab] = rows[passing[rows]]
        return replace(contents, ranked=ranked)

    def _rows_passing(self) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
        """Return which rows match the filters, as a mask and as row ids."""
        passing = self.host.session.passing
        if self._passing is None or self._passing[0] is not passing:
            self._passing = passing, np.flatnonzero(passing)
        return self._passing

    # -- searches -------------------------------------------------------------------------------

    def on_search(self, data: dict[str, Any]) -> None:
        """Search by text; a later search outdates this one, and a running round is cancelled."""
        text = str(data.get("text", ""))
        self._search(lambda k: self.host.session.search(text, k=k))

    def on_again(self, data: dict[str, Any]) -> None:
        """Search for what an earlier search was for."""
        event_id = int(data["id"])
        self._search(lambda k: self.host.session.search_again(event_id, k=k))

    def on_like_yes(self, _data: dict[str, Any]) -> None:
        """Search for images like those marked yes."""
        rows = self.host.session.labels.positive
        if not len(rows):
            raise QueryError("expected images marked yes to search by, found none: mark one first")
        self._search(lambda k: self.host.session.search(row=rows, k=k))

    def on_image(self, data: dict[str, Any]) -> None:
        """Take a piece of an image; search by it when it is complete."""
        number, n_bytes = int(data["number"]), int(data["n_bytes"])
        if not 0 < n_bytes <= MAX_UPLOAD_BYTES:
            raise QueryError(
                f"expected an image of 1 byte to {MAX_UPLOAD_BYTES // 2**20} MB, got {n_bytes:,} "
                "bytes: save it smaller, or search by its path in a cell with "
                "session.search(image=path)"
            )
        if number != self._upload[0]:
            self._upload = number, bytearray()
        received = self._upload[1]
        for piece in data.get("buffers", ()):
            received += piece
        if len(received) < n_bytes:
            return
        self._upload = 0, bytearray()
        name = shorten(str(data.get("name", "")) or "image", MAX_NAME_CHARS)
        content = bytes(received)

        def search(k: int) -> None:
            try:
                image = read_image(content)
            except ImageReadError as error:
                raise ImageReadError(f"{name} cannot be searched by: {error}") from error
            image.__dict__["filename"] = name  # as Pillow names what it opened from a file
            self.host.session.search(image=image, k=k)
            self.host.post(self._name_picture, number)

        self._search(search)

    def _search(self, search: Callable[[int], object]) -> None:
        def job(_progress: Progress, is_stale: Callable[[], bool]) -> None:
            if not is_stale():
                search(min(N_HITS, len(self.host.session.catalog)))

        self.host.work("search", "Searching", job)

    def _name_picture(self, number: int) -> None:
        """Remember which upload the latest search came from; the browser has the picture."""
        if (query := self.host.session.query) is not None:
            self._pictures[_key(query.to_dict())] = number
            self._note_searches()
            self.host.update(self)

    def _note_searches(self) -> None:
        """List the latest distinct searches, the present one first."""
        session = self.host.session
        distinct: dict[Key, int] = {}
        for event in reversed(session.history):
            if event.action == "search":
                distinct.setdefault(_key(event.parameters["query"]), event.id)
            if len(distinct) > N_HISTORY:
                break
        now = None if session.query is None else _key(session.query.to_dict())
        self._now = now
        keys = [key for key in (now,) if key in distinct]
        keys += [key for key in distinct if key != now]
        self._history = [
            {
                "id": distinct[kind, text, vector],
                "kind": kind,
                "text": shorten(text),
                "picture": self._pictures.get((kind, text, vector), 0),
            }
            for kind, text, vector in keys[:N_HISTORY]
        ]

    # -- filters --------------------------------------------------------------------------------

    def on_columns(self, _data: dict[str, Any]) -> None:
        """Look at the columns, once, and show what can be filtered."""
        if not self._columns:
            self._lane.post(self._read_columns)

    def on_filter(self, data: dict[str, Any]) -> None:
        """Set the condition on one column, or take it away where nothing is left of it."""
        session = self.host.session
        column = str(data["column"])
        others = {name: one for name, one in session.filters.items() if name != column}
        condition = _condition(str(data.get("test", "")), list(data.get("values", [])))
        session.filter(others if condition is None else {**others, column: condition})

    def on_clear_filters(self, _data: dict[str, Any]) -> None:
        """Let every row pass."""
        self.host.session.filter()

    def _read_columns(self) -> None:
        with suppress(OSError):
            catalog = self.host.session.catalog
            items = catalog.items
            if len(catalog.removed_rows):
                items = items.filter(catalog.is_present)
            found = summaries(items)[:MAX_COLUMNS]
            self._columns = [asdict(each) for each in found]
        self.host.post(self.host.update, self)


def _key(stored: Mapping[str, str]) -> Key:
    """Return what tells two queries apart."""
    return stored["kind"], stored["text"], stored["vector"]


def _phrases(text: str) -> list[dict[str, Any]]:
    """Return the phrases of a text query where there are several, as they were understood."""
    try:
        phrases = phrases_of(text)
    except QueryError:  # of a session file from elsewhere
        return []
    if len(phrases) < 2:
        return []
    return [{"text": shorten(one.text, 80), "weight": one.weight} for one in phrases]


def _filters(filters: Mapping[str, Any], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the filters as the browser's controls need them."""
    shown = []
    for column, condition in filters.items():
        test = {bool: "is", str: "contains", tuple: "range"}.get(type(condition), "any_of")
        values = list(condition) if isinstance(condition, list | tuple) else [condition]
        values = values if len(values) <= MAX_CATEGORIES else []
        text = shorten(texts.get(column, column), 120)
        shown.append({"column": column, "text": text, "test": test, "values": values})
    return shown


def _condition(test: str, values: list[Any]) -> Any:
    """Return a condition from what the controls hold; None for none."""
    if test == "range":
        ends = tuple(None if value in {"", None} else value for value in values[:2])
        return None if ends in {(), (None, None)} else ends
    if test == "contains":
        return str(values[0]) or None if values else None
    if test == "is":
        return bool(values[0]) if values else None
    return values or None
