"""The Explorer's pictures (layer 6): read beside the ui lane, sent in few messages.

Protocol
--------
Pictures are not state: custom messages with one WebP buffer a row, empty where there is no image.
``{"method": "thumbs", "args": [[rows]]}`` brings a page's pictures, `THUMBNAIL_PX` large, and then
those of the page after it; ``{"method": "sharp", "args": [[rows], size]}`` larger ones of `SIZES`,
which a view asks for when it shows them larger.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from clipbranches_widget.errors import ImageReadError
from clipbranches_widget.explorer_lanes import Lane

if TYPE_CHECKING:
    from clipbranches_widget.catalog import Catalog

log = logging.getLogger(__name__)

THUMBNAIL_PX = 160
SIZES = (THUMBNAIL_PX, 320, 640)
"""Pixels of the longest side that a view can ask for."""

SEND_AFTER_S = 0.25
"""Pictures that take longer than this are sent in parts, so that a slow page fills visibly."""

IMAGES_FIRST_S = 0.05
"""A page waits this long for its pictures: those at hand arrive first, and nothing flickers."""

MAX_ASKED = 400
"""Most pictures one message of a view can ask for; it asks again for the others."""


class Pictures:
    """Sends the pictures of a catalog.

    Parameters
    ----------
    catalog : Catalog
        Whose pictures.
    lane : Lane
        Where those of `THUMBNAIL_PX` are read; larger ones have a lane of their own.
    send : callable
        Sends one message to every view: see `explorer_part.Host.message`.
    guard : callable
        Runs a function with arguments, and shows what goes wrong.
    """

    def __init__(
        self, catalog: Catalog, lane: Lane, send: Callable[..., None], guard: Callable[..., None]
    ) -> None:
        self._catalog = catalog
        self._lane = lane
        self._send = send
        self._guard = guard
        self._ahead: set[int] = set()
        self.sharp_lane = Lane("explorer-sharp")

    def show(self, rows: Sequence[int], ahead: Sequence[int] = ()) -> None:
        """Send the pictures of a page that were not sent ahead, then those of the next page.

        Waits a moment for the page's own; a later page outdates what is left to send.
        """
        lacking = [row for row in rows if row not in self._ahead]
        done: set[int] = set()
        self._ahead = done
        sent = threading.Event()

        def work(is_stale: Callable[[], bool]) -> None:
            self._send_rows("thumbs", lacking, THUMBNAIL_PX, is_stale)
            sent.set()
            coming = [row for row in ahead if row not in set(rows)]
            done.update(self._send_rows("thumbs", coming, THUMBNAIL_PX, is_stale))

        self._lane.replace(lambda is_stale: self._guard(work, is_stale))
        if lacking:
            sent.wait(IMAGES_FIRST_S)

    def forget_ahead(self) -> None:
        """Send everything again when it is shown: a view came that has not got it."""
        self._ahead = set()

    def send(self, rows: Sequence[int], size: int) -> None:
        """Send pictures a view lacks, at the smallest of `SIZES` that is at least `size`.

        Asking for larger ones outdates the earlier such question.
        """
        rows = self._catalog.check_rows(list(rows)[:MAX_ASKED]).tolist()
        size = next((each for each in SIZES if each >= size), SIZES[-1])
        if not rows:
            return
        if size == THUMBNAIL_PX:
            self._lane.post(
                lambda: self._guard(self._send_rows, "thumbs", rows, size, lambda: False)
            )
            return
        self.sharp_lane.replace(
            lambda is_stale: self._guard(self._send_rows, "sharp", rows, size, is_stale)
        )

    def _send_rows(
        self, method: str, rows: Sequence[int], size: int, is_stale: Callable[[], bool]
    ) -> list[int]:
        """Send the pictures of `rows`, in one message unless they are slow; return those sent."""
        sent: list[int] = []
        ready: dict[int, bytes] = {}
        since = time.monotonic()
        for row in rows:
            if is_stale():
                break
            ready[row] = self._bytes(row, size)
            if time.monotonic() - since >= SEND_AFTER_S:
                sent += self._send_batch(method, ready, size)
                ready, since = {}, time.monotonic()
        return sent + self._send_batch(method, ready, size)

    def _send_batch(self, method: str, ready: dict[int, bytes], size: int) -> list[int]:
        rows = list(ready)
        if rows:
            size_told = () if size == THUMBNAIL_PX else (size,)
            self._send(method, rows, *size_told, buffers=ready.values())
        return rows

    def _bytes(self, row: int, size: int) -> bytes:
        """Return the row's picture, empty when the image is gone or broken."""
        try:
            return self._catalog.thumbnail(row, size=size)
        except ImageReadError as error:
            log.info("no picture of row %d: %s", row, error)
            return b""
