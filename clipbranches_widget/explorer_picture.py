"""A static picture of the Explorer for where no widget can run (layer 6).

Shown in a notebook, an Explorer leaves two outputs: the live view, and below it a picture of the
state, plain HTML with small pictures in it. While the live view works, its style sheet hides the
picture; in a saved notebook without a kernel, in an export or on a web page that shows notebooks,
the picture is what remains. It follows the state in place, by the display id of its own output,
so that the live view is never drawn anew.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from clipbranches_widget.contact_sheet import Sheet, panel_html
from clipbranches_widget.explorer_lanes import Lane
from clipbranches_widget.explorer_view import headline, shorten
from clipbranches_widget.result_export import rule_lines, tile_of
from clipbranches_widget.thumbnails import THUMBNAIL_PX

if TYPE_CHECKING:
    from clipbranches_widget.explorer_view import Contents, Place

log = logging.getLogger(__name__)

MAX_TILES = 12
TILE_PX = 112
MAX_TILE_BYTES = 6_000
"""Pictures of the page that are larger are made smaller, which costs some milliseconds each."""

MAX_RULES = 6
MAX_CAPTION = 80
MAX_LINE = 200
SETTLE_S = 1.0
"""The picture is drawn once the state has been quiet for so long."""

OPENING_S = 0.7
"""A cell that shows an Explorer waits at most this long for what there is to draw."""

_NOTHING = Sheet("Image explorer", facts=["The session is being opened."])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A picture of an Explorer's state, as HTML that needs nothing else.

    The last line of a cell shows it; `html` is its source.
    """

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def snapshot(contents: Contents | None, place: Place) -> Snapshot:
    """Draw the first images of a page, what they were found by, and counts.

    At most 150 KB: twelve small pictures, and texts that are cut. Without contents it
    says that the session is being opened.
    """
    return Snapshot(panel_html(_NOTHING if contents is None else _sheet(contents, place)))


def _sheet(contents: Contents, place: Place) -> Sheet:
    session, labels = contents.session, contents.session.labels
    place = contents.settle(place)
    rows = contents.page_rows(place)[:MAX_TILES]
    scores = contents.scored(place.tab, place.page * contents.page_size, rows)
    tiles = []
    for row, scored in zip(rows, scores, strict=True):
        tile = tile_of(session.catalog, row, size=THUMBNAIL_PX, max_caption=MAX_CAPTION)
        if len(tile.image) > MAX_TILE_BYTES:
            tile = tile_of(session.catalog, row, size=TILE_PX, max_caption=MAX_CAPTION)
        score, branch = scored if scored is not None else (None, -1)
        said = "" if score is None else f"{score:.3f}"
        rule = f"R{branch + 1}" if branch >= 0 else ""
        tiles.append(replace(tile, label=labels.get(row), score=said, rule=rule))
    shown = contents.shown(place.tab)
    branches = [] if shown is None else rule_lines(shown.branches, MAX_RULES)
    query = session.query_text
    counts = f"{len(labels.positive):,} yes, {len(labels.negative):,} no"
    facts = [f"{headline(contents, place)} \u00b7 {counts} \u00b7 {session.catalog.path.name}"]
    if shown is not None and len(shown.branches) > MAX_RULES:
        facts.append(f"{len(shown.branches)} rules, of which {MAX_RULES} are shown")
    return Sheet(
        title=shorten(query, MAX_LINE) if query else "Image explorer",
        facts=[shorten(fact, MAX_LINE) for fact in facts],
        rules=[(name, shorten(text, MAX_LINE)) for name, text in branches],
        notes=["A picture of the Explorer: run the cell to search, label and refine."],
        tiles=tiles,
        n_left_out=len(contents.ranked[place.tab]) - len(rows),
    )


class Poster:
    """The picture in the outputs of the cells that show an Explorer.

    Nothing is drawn unless it was shown in a kernel. All outputs share one display id.
    """

    def __init__(self) -> None:
        self._lane = Lane("explorer-picture")
        self._closed = threading.Event()
        self._display_id = ""
        self._publish: Callable[..., object] | None = None

    def display(self, bundle: dict[str, Any], draw: Callable[[], Snapshot]) -> None:
        """Show a widget's `bundle` and, in a kernel, the picture below it."""
        from IPython.core.getipython import get_ipython

        if (shell := get_ipython()) is None:
            return
        self._publish = shell.display_pub.publish
        self._publish(bundle)
        if getattr(shell, "kernel", None) is not None:
            self._display_id = self._display_id or f"clipbranches-{uuid.uuid4().hex}"
            self._show(draw())

    def follow(self, draw: Callable[[], Snapshot]) -> None:
        """Draw the picture anew once no later call has come for a moment."""
        if self._display_id:
            self._lane.replace(lambda is_stale: self._redraw(draw, is_stale))

    def close(self) -> None:
        """Follow no more; the picture stays."""
        self._closed.set()
        self._lane.close()

    def _redraw(self, draw: Callable[[], Snapshot], is_stale: Callable[[], bool]) -> None:
        for _ in range(10):
            if self._closed.wait(SETTLE_S / 10) or is_stale():
                return
        try:
            picture = draw()
            if not is_stale():
                self._show(picture, update=True)
        except Exception:  # a picture is not worth an alert in the widget
            log.exception("the static picture of the Explorer could not be drawn")

    def _show(self, picture: Snapshot, *, update: bool = False) -> None:
        bundle = {"text/html": picture.html, "text/plain": "Picture of the Explorer"}
        if self._publish is not None:
            self._publish(bundle, transient={"display_id": self._display_id}, update=update)
