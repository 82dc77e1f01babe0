"""The Explorer's zoom (layer 6): one image, large, with everything known about it.

It walks through the whole ranking of the tab shown, beyond the page; the page behind follows. Its
picture is a message, ``{"method": "zoom_image", "args": [row, kind, problem]}`` with one buffer:
kind "full" for the image at up to `ZOOM_PX`, "small" for the thumbnail where the original cannot be
read, "none" for nothing at all; `problem` says why.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from clipbranches_widget.errors import ImageReadError
from clipbranches_widget.explorer_part import Part, Progress
from clipbranches_widget.explorer_view import shorten
from clipbranches_widget.thumbnails import thumbnail_webp

if TYPE_CHECKING:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.explorer_part import Host

ZOOM_PX = 1600
"""Longest side of the picture that is sent."""

MAX_FACTS = 200
MAX_FACT_CHARS = 5_000
"""Longest value of the table that is sent."""

N_LIKE = 600
"""Nearest images that "more like this" asks for."""


class ZoomPart(Part):
    """One image of the page, zoomed; nothing while none is."""

    name = "zoom"
    is_docked = False

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._row: int | None = None
        self._tab = ""
        self._rank: int | None = None

    def state(self) -> dict[str, Any]:
        """Return the zoomed image: its place in the ranking, its neighbours, its facts."""
        row = self._row
        if row is None:
            return {}
        contents, tab = self.host.contents, self.host.place.tab
        rank, before, after = self._places()
        scored = None if rank is None else contents.scored(tab, rank, [row])[0]
        branches = shown.branches if (shown := contents.shown(tab)) else ()
        branch = scored[1] if scored is not None and scored[1] < len(branches) else -1
        return {
            "row": row,
            "rank": rank,
            "n_rows": len(contents.ranked[tab]),
            "previous": contents.row_at(tab, before),
            "next": contents.row_at(tab, after),
            "caption": shorten(contents.session.catalog.caption(row), MAX_FACT_CHARS),
            "score": "" if scored is None else f"{scored[0]:.3f}",
            "branch": branch,
            "rule": shorten(branches[branch].text, MAX_FACT_CHARS) if branch >= 0 else "",
            "facts": facts(contents.session.catalog, row),
        }

    def rows(self) -> list[int]:
        """Return the zoomed row."""
        return [] if self._row is None else [self._row]

    def on_open(self, data: dict[str, Any]) -> None:
        """Zoom a row."""
        (self._row,) = self.host.session.catalog.check_rows([int(data["row"])]).tolist()
        self._tab, self._rank = "", None
        self.host.update(self)

    def on_close(self, _data: dict[str, Any]) -> None:
        """Zoom nothing."""
        self._row = None
        self.host.update(self)

    def on_step(self, data: dict[str, Any]) -> None:
        """Zoom the next image of the ranking, or the previous; its page is shown behind."""
        if self._row is None:
            return
        contents, place = self.host.contents, self.host.place
        _, before, after = self._places()
        rank = after if int(data["by"]) > 0 else before
        row = contents.row_at(place.tab, rank)
        if row is None:
            return
        self._row, self._tab, self._rank = row, place.tab, rank
        page = rank // contents.page_size
        if page == place.page:
            self.host.update(self)
        else:
            self.host.show(replace(place, page=page))

    def on_more(self, data: dict[str, Any]) -> None:
        """Search for images like a row, and zoom nothing."""
        row, session = int(data["row"]), self.host.session
        self.on_close({})

        def search(_progress: Progress, is_stale: Callable[[], bool]) -> None:
            if not is_stale():
                session.search(row=row, k=min(N_LIKE, len(session.catalog)))

        self.host.work("search", "Searching", search)

    def on_image(self, data: dict[str, Any]) -> None:
        """Send the pictures of some rows: the zoomed one first, then those likely to be next."""
        wanted = self.host.session.catalog.check_rows(list(data["rows"])[:3]).tolist()

        def send(is_stale: Callable[[], bool]) -> None:
            for row in wanted:
                if is_stale():
                    return
                kind, problem, picture = zoomed(self.host.session.catalog, row)
                self.host.message("zoom_image", row, kind, problem, buffers=[picture])

        self.host.aside(send)

    def _places(self) -> tuple[int | None, int, int]:
        """Return the rank of the row, and those before and after it in the tab shown.

        A row that has just left its tab, because its label changed, keeps its neighbours; one
        that was never there has none.
        """
        contents, tab = self.host.contents, self.host.place.tab
        near = self._rank if tab == self._tab else None
        if near is None:
            near = self.host.place.page * contents.page_size
        rank = None if self._row is None else contents.rank_of(tab, self._row, near)
        if rank is not None:
            self._tab, self._rank = tab, rank
            return rank, rank - 1, rank + 1
        if tab == self._tab and self._rank is not None:
            return None, self._rank - 1, self._rank
        return None, -1, -1


def zoomed(catalog: Catalog, row: int) -> tuple[str, str, bytes]:
    """Return the kind of picture there is, what is wrong with it, and its WebP bytes."""
    try:
        return "full", "", thumbnail_webp(catalog.image(row), ZOOM_PX)
    except ImageReadError as error:
        problem = str(error)
    try:
        return "small", problem, catalog.thumbnail(row)
    except ImageReadError:
        return "none", problem, b""


def facts(catalog: Catalog, row: int) -> list[tuple[str, str]]:
    """Return what the catalog says about an image: names and values, as plain text."""
    item = catalog.lines(row).to_pylist()[0]
    width, height = item.pop("width"), item.pop("height")
    size = f"{width} \u00d7 {height}" if width and height else ""
    item.pop("content_hash", None)
    first = {key: item.pop(key) for key in ("row", "caption", "uri")}
    named = [*first.items(), ("size", size), *item.items()]
    told = [(shorten(str(name), 200), as_text(value)) for name, value in named[:MAX_FACTS]]
    return [(name, text) for name, text in told if text]


def as_text(value: object) -> str:
    """Return a value of the items table as text; empty for a missing one.

    Examples
    --------
    >>> as_text(0.1 + 0.2), as_text(None), as_text(["a", 1]), as_text(b"abc")
    ('0.3', '', '["a", 1]', '3 bytes')
    """
    if value is None:
        return ""
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return shorten(str(value), MAX_FACT_CHARS)
