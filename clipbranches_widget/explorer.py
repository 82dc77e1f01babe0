"""The notebook widget (layer 6): clicks in the browser become Session calls, and back.

Protocol
--------
Kernel to browser, synced traits, one page at most: `view` (rows, captions, scores, headline),
`marks` (labels of those rows, counts), `branches` (rules of the round), `task` (what runs),
`notice` (an error or a remark). Thumbnails are not state: one custom message a page,
``{"method": "thumbs", "args": [[rows]]}`` with one WebP buffer a row (empty: no image).

Browser to kernel, events with plain values: ``search {text}``, ``label {row, value}`` (the new
value, -1, 0 or 1, so a repeated message changes nothing), ``go {tab, page}``, ``refine``,
``cancel``, ``undo``, ``redo``, ``ready {rows}`` (a view was mounted and lacks these images).

Threads
-------
An event handler only posts a job. `_ui` owns all state and traits of the widget; `_work` runs
searches and rounds; `_images` reads thumbnails. `Session` has its own lock.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import traitlets
from ipyvuetify.VuetifyTemplate import VuetifyTemplate

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.errors import Cancelled, ClipBranchesError, ImageReadError
from clipbranches_widget.explorer_lanes import Lane
from clipbranches_widget.explorer_view import (
    Contents,
    Place,
    branch_view,
    marks_view,
    page_view,
)
from clipbranches_widget.session import Session

if TYPE_CHECKING:
    from clipbranches_widget.result import Result

log = logging.getLogger(__name__)

N_HITS = 600
"""Nearest images a search from the widget asks for: ten pages."""

THUMBNAIL_PX = 160
SEND_AFTER_S = 0.25
"""Thumbnails that take longer than this are sent in parts, so that a slow page fills visibly."""

IMAGES_FIRST_S = 0.05
"""A page waits this long for its pictures: those at hand arrive first, and nothing flickers."""

PROGRESS_EVERY_S = 0.1
IDLE: dict[str, Any] = {"name": "", "stage": "", "fraction": 0.0}


class Explorer(VuetifyTemplate):
    """A widget to search a catalog, mark images yes or no, and get every match.

    It acts on a `Session`, so cells and widget see at once what the other did, and several
    Explorers on one session stay in step.

    Parameters
    ----------
    source : Session or Catalog
        A session, or a catalog for which a new session is made (see `session`).

    Attributes
    ----------
    session : Session
        What the widget acts on; use it from cells.
    """

    template_file = (__file__, "explorer.vue")
    _lanes: tuple[Lane, ...] = ()

    view = traitlets.Dict(help="The page shown; see `explorer_view.page_view`.").tag(sync=True)
    marks = traitlets.Dict(help="Labels of the page; see `explorer_view.marks_view`.").tag(
        sync=True
    )
    branches = traitlets.List(traitlets.Dict(), help="Rules of the latest round.").tag(sync=True)
    task = traitlets.Dict(IDLE, help="What runs: name, stage, fraction in 0..1.").tag(sync=True)
    notice = traitlets.Dict(help="Latest error or remark: kind, text, and a number.").tag(sync=True)

    def __init__(self, source: Session | Catalog) -> None:
        if isinstance(source, Catalog):
            source = Session(source)
        if not isinstance(source, Session):
            raise TypeError(
                f"expected a Session or a Catalog, got {type(source).__name__}: "
                "use cb.Explorer(cb.Session(cb.demo()))"
            )
        self.session = source
        self._ui = Lane("explorer-ui")
        self._work = Lane("explorer-work")
        self._images = Lane("explorer-images")
        self._lanes = (self._ui, self._work, self._images)
        self._cancel = threading.Event()
        self._place = Place(tab="")
        self._contents: Contents | None = None
        self._n_notices = 0
        self._was_mounted = False
        super().__init__(task={"name": "open", "stage": "Opening the session", "fraction": 0.0})
        self._stop_observing = source.observe(self._on_session_change)
        self._post(self._open)

    def __repr__(self) -> str:
        """Return one line: this is what a saved notebook shows where no widget can run."""
        labels = self.session.labels
        return (
            f"<Explorer of {len(self.session.catalog):,} images: "
            f"{len(labels.positive)} yes, {len(labels.negative)} no>"
        )

    def close(self) -> None:
        """Stop the threads, let go of the session, and remove the widget from the page."""
        if self._lanes:  # ipywidgets also closes what never got through __init__
            self._stop_observing()
            self._cancel.set()
        for lane in self._lanes:
            lane.close()
        super().close()

    # -- events from the browser: post and return -------------------------------------------

    def vue_search(self, data: dict[str, Any]) -> None:
        """Search by text; a later search outdates this one and a running round is cancelled."""
        text = str(data.get("text", ""))
        self._cancel.set()
        self._work.replace(lambda is_stale: self._guard(self._search, text, is_stale))

    def vue_refine(self, _data: object = None) -> None:
        """Run a round on the present labels."""
        cancel = self._cancel = threading.Event()
        self._work.replace(lambda is_stale: self._guard(self._refine, cancel, is_stale))

    def vue_cancel(self, _data: object = None) -> None:
        """Ask the running search or round to stop."""
        self._cancel.set()
        self._work.replace(lambda _is_stale: None)
        self._post(self._say, "Cancelled.")

    def vue_label(self, data: dict[str, Any]) -> None:
        """Give one row its label: 1 yes, -1 no, 0 none."""
        self._post(self._label, data)

    def vue_go(self, data: dict[str, Any]) -> None:
        """Show another page or tab."""
        self._post(self._go, data)

    def vue_undo(self, _data: object = None) -> None:
        """Undo the latest label change or round."""
        self._post(self._step, self.session.undo, "Undid")

    def vue_redo(self, _data: object = None) -> None:
        """Do again what was undone."""
        self._post(self._step, self.session.redo, "Redid")

    def vue_ready(self, data: dict[str, Any]) -> None:
        """Send images that a view lacks, and get ready for the first search."""
        self._post(self._resend, data)
        if not self._was_mounted:
            self._was_mounted = True
            self._work.post(lambda: self._guard(self._warm_up))

    # -- on the work lane ----------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Get ready while the user reads the page; if it cannot, a search will say why."""
        with contextlib.suppress(ClipBranchesError):
            self.session.warm_up()

    def _search(self, text: str, is_stale: Callable[[], bool]) -> None:
        self._post(self._set_task, "search", "Searching", 0.0)
        try:
            if not is_stale():
                self.session.search(text, k=min(N_HITS, len(self.session.catalog)))
        finally:
            self._post(self._set_task)

    def _refine(self, cancel: threading.Event, is_stale: Callable[[], bool]) -> None:
        last_stage, last_time = "", 0.0

        def progress(stage: str, fraction: float) -> None:
            nonlocal last_stage, last_time
            if is_stale():
                cancel.set()
            now = time.monotonic()
            if stage != last_stage or now - last_time >= PROGRESS_EVERY_S:
                last_stage, last_time = stage, now
                self._post(self._set_task, "refine", stage, fraction)

        n_shown = 0

        def partial(result: Result) -> None:
            nonlocal n_shown
            self._post(self._show_so_far, result, n_shown)
            n_shown += 1

        self._post(self._set_task, "refine", "Starting", 0.0)
        is_done = False
        try:
            self.session.refine(progress=progress, partial=partial, cancel=cancel)
            is_done = True
        finally:
            self._post(self._set_task)
            if n_shown and not is_done:
                self._post(self._refresh)

    # -- on the ui lane: the only writer of state and traits -------------------------------------

    def _on_session_change(self, _change: str) -> None:
        """Follow the session, whoever changed it: this widget, another one, or a cell."""
        self._post(self._refresh)

    def _open(self) -> None:
        try:
            self._refresh()
        finally:
            self._set_task()

    def _refresh(self) -> None:
        """Read the session anew; a new search or round is shown, anything else keeps the page."""
        before, self._contents = self._contents, Contents.of(self.session)
        same = before is not None and (before.hits, before.result) == (
            self._contents.hits,
            self._contents.result,
        )
        self._show(self._place if same else Place(self._contents.best_tab()))

    def _show_so_far(self, result: Result, n_before: int) -> None:
        """Show the answer of a running round as it stands; only the first one changes the tab."""
        self._contents = (self._contents or Contents.of(self.session)).with_result(result)
        self._show(self._place if n_before else Place("result"))

    def _show(self, place: Place) -> None:
        contents = self._contents or Contents.of(self.session)
        self._place = contents.settle(place)
        rows = contents.page_rows(self._place)
        if rows != [item["row"] for item in self.view.get("items", [])]:
            sent = threading.Event()
            self._images.replace(
                lambda is_stale: self._guard(self._send_images, rows, is_stale, sent)
            )
            sent.wait(IMAGES_FIRST_S)
        with self.hold_sync():
            self.branches = branch_view(contents.result)
            self.view = page_view(contents, self._place)
            self.marks = marks_view(contents, self._place)

    def _go(self, data: dict[str, Any]) -> None:
        self._show(Place(str(data.get("tab", self._place.tab)), int(data.get("page", 0))))

    def _label(self, data: dict[str, Any]) -> None:
        row, value = int(data["row"]), int(data["value"])
        if value > 0:
            self.session.label(positive=[row])
        elif value < 0:
            self.session.label(negative=[row])
        else:
            self.session.unlabel([row])

    def _step(self, action: Callable[[], str | None], verb: str) -> None:
        what = action()
        self._say(f"{verb}: {what}" if what else "Nothing left to undo or redo.")

    def _resend(self, data: dict[str, Any]) -> None:
        shown = {item["row"] for item in self.view.get("items", [])}
        rows = [row for row in map(int, data.get("rows", [])) if row in shown]
        if rows:
            sent = threading.Event()
            self._images.post(lambda: self._guard(self._send_images, rows, lambda: False, sent))

    def _set_task(self, name: str = "", stage: str = "", fraction: float = 0.0) -> None:
        self.task = {"name": name, "stage": stage, "fraction": round(fraction, 3)}

    def _say(self, text: str, kind: str = "info") -> None:
        self._n_notices += 1
        self.notice = {"kind": kind, "text": text, "number": self._n_notices}

    # -- on the images lane ------------------------------------------------------------------------

    def _send_images(
        self, rows: list[int], is_stale: Callable[[], bool], sent: threading.Event
    ) -> None:
        """Send the pictures of `rows`, in one message unless they are slow; set `sent`."""
        ready: dict[int, bytes] = {}
        since = time.monotonic()
        for row in rows:
            if is_stale():
                return
            ready[row] = self._image_bytes(row)
            if time.monotonic() - since >= SEND_AFTER_S:
                self._send_batch(ready)
                ready, since = {}, time.monotonic()
        if ready:
            self._send_batch(ready)
        sent.set()

    def _image_bytes(self, row: int) -> bytes:
        """Return the row's thumbnail, empty when the image is gone or broken."""
        try:
            return self.session.catalog.thumbnail(row, size=THUMBNAIL_PX)
        except ImageReadError as error:
            log.info("no thumbnail for row %d: %s", row, error)
            return b""

    def _send_batch(self, images: dict[int, bytes]) -> None:
        self.send({"method": "thumbs", "args": [list(images)]}, buffers=list(images.values()))

    # -- errors -----------------------------------------------------------------------------------

    def _post(self, action: Callable[..., None], *args: Any) -> None:
        self._ui.post(lambda: self._guard(action, *args))

    def _guard(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action`; whatever goes wrong is shown in the widget, the unexpected also logged."""
        try:
            action(*args)
        except Cancelled:
            self._post(self._say, "Cancelled.")
        except ClipBranchesError as error:
            self._post(self._say, str(error), "error")
        except Exception as error:
            log.exception("the Explorer failed on %s", getattr(action, "__name__", action))
            text = f"Unexpected {type(error).__name__}: {error}. Try again; if it comes back, "
            self._post(self._say, text + "the traceback is in the kernel's log.", "error")
