"""The notebook widget (layer 6): clicks in the browser become Session calls, and back.

Protocol
--------
Kernel to browser, synced traits, one page at most: `view` (rows, captions, scores, headline),
`marks` (labels of the rows shown, counts), `task` (what runs), `notice` (an error or a remark),
`docked` (the panel that is docked), and a trait for each part, see `explorer_part`. Thumbnails are
not state: one custom message a page, ``{"method": "thumbs", "args": [[rows]]}`` with one WebP
buffer a row (empty: no image).

Browser to kernel, events with plain values: ``label {rows, value}`` (the new value, -1, 0 or 1,
so a repeated message changes nothing), ``go {tab, page}``, ``refine``, ``cancel``, ``undo``,
``redo``, ``dock {name}`` (open a panel, "" closes it), ``part {part, action, data}`` (what a part
asks for), ``ready {rows}`` (a view was mounted, or lacks these images).

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
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets
from ipyvuetify.VuetifyTemplate import VuetifyTemplate

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.errors import Cancelled, ClipBranchesError, ImageReadError
from clipbranches_widget.explorer_lanes import Lane
from clipbranches_widget.explorer_part import Part, Progress
from clipbranches_widget.explorer_query import QueryPart
from clipbranches_widget.explorer_rules import RulesPart
from clipbranches_widget.explorer_view import Contents, Place, marks_view, page_view
from clipbranches_widget.session import Session

if TYPE_CHECKING:
    from clipbranches_widget.result import Result

log = logging.getLogger(__name__)

PARTS: tuple[type[Part], ...] = (QueryPart, RulesPart)
VUE_FOLDER = Path(__file__).parent / "vue"
THUMBNAIL_PX = 160
SEND_AFTER_S = 0.25
"""Thumbnails that take longer than this are sent in parts, so that a slow page fills visibly."""

IMAGES_FIRST_S = 0.05
"""A page waits this long for its pictures: those at hand arrive first, and nothing flickers."""

PROGRESS_EVERY_S = 0.1
MAX_ASKED = 400
"""Most thumbnails one message of a view can ask for; it asks again for the others."""

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

    template_file = (__file__, "vue/explorer.vue")
    _lanes: tuple[Lane, ...] = ()

    view = traitlets.Dict(help="The page shown; see `explorer_view.page_view`.").tag(sync=True)
    marks = traitlets.Dict(help="Labels of the page; see `explorer_view.marks_view`.").tag(
        sync=True
    )
    task = traitlets.Dict(IDLE, help="What runs: name, stage, fraction in 0..1.").tag(sync=True)
    notice = traitlets.Dict(help="Latest error or remark: kind, text, and a number.").tag(sync=True)
    docked = traitlets.Unicode(help="Name of the docked panel; empty for none.").tag(sync=True)
    query = traitlets.Dict(help="See `explorer_query`.").tag(sync=True)
    zoom = traitlets.Dict(help="See `explorer_zoom`.").tag(sync=True)
    rules = traitlets.Dict(help="See `explorer_rules`.").tag(sync=True)

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
        self._followed: tuple[Result | None, Result | None] = (None, None)
        self._parts = {part.name: part(self) for part in PARTS}
        self._n_notices = 0
        self._was_mounted = False
        super().__init__(
            task={"name": "open", "stage": "Opening the session", "fraction": 0.0},
            components={
                f"cbw-{file.stem}": file.read_text(encoding="utf-8")
                for file in sorted(VUE_FOLDER.glob("*.vue"))
                if file.stem != "explorer"
            },
        )
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

    def vue_refine(self, _data: object = None) -> None:
        """Run a round on the present labels."""
        cancel = self._cancel = threading.Event()
        self._work.replace(lambda is_stale: self._guard(self._refine, cancel, is_stale))

    def vue_cancel(self, _data: object = None) -> None:
        """Ask the running search or round to stop."""
        self._cancel.set()
        self._work.replace(lambda _is_stale: None)
        self._post(self.say, "Cancelled.")

    def vue_label(self, data: dict[str, Any]) -> None:
        """Give rows their label: 1 yes, -1 no, 0 none."""
        self._post(self._label, data)

    def vue_go(self, data: dict[str, Any]) -> None:
        """Show another page or tab."""
        self._post(self._go, data)

    def vue_dock(self, data: dict[str, Any]) -> None:
        """Open a panel, or close the open one."""
        self._post(self._dock, data)

    def vue_part(self, data: dict[str, Any]) -> None:
        """Let a part do what its component asks for."""
        self._post(self._act, data)

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

    # -- what parts may ask for: see `explorer_part.Host` ---------------------------------------

    @property
    def contents(self) -> Contents:
        """The latest reading of the session."""
        if self._contents is None:
            self._contents = self._adjusted(Contents.of(self.session))
        return self._contents

    @property
    def place(self) -> Place:
        """The tab and page shown."""
        return self._place

    def show(self, place: Place) -> None:
        """Show another tab or page."""
        self._place = self.contents.settle(place)
        rows = self.contents.page_rows(self._place)
        if rows != [item["row"] for item in self.view.get("items", [])]:
            sent = threading.Event()
            self._images.replace(
                lambda is_stale: self._guard(self._send_images, rows, is_stale, sent)
            )
            sent.wait(IMAGES_FIRST_S)
        with self.hold_sync():
            self.view = page_view(self.contents, self._place)
            self.update()

    def refresh(self, tab: str | None = None) -> None:
        """Read the session anew, let parts adjust it, and show the place, or another tab."""
        self._contents = self._adjusted(Contents.of(self.session))
        self.show(self._place if tab is None else Place(tab))

    def update(self, *parts: Part) -> None:
        """Show the present state of some parts; without any, of all."""
        shown = [part for part in self._parts.values() if not part.is_docked or self._is_open(part)]
        with self.hold_sync():
            for part in parts or shown:
                self.set_trait(part.name, part.state())
            others = [row for part in shown for row in part.rows()]
            self.marks = marks_view(self.contents, self._place, others)

    def say(self, text: str, kind: str = "info") -> None:
        """Show a remark, or an error."""
        self._n_notices += 1
        self.notice = {"kind": kind, "text": text, "number": self._n_notices}

    def work(
        self, name: str, stage: str, job: Callable[[Progress, Callable[[], bool]], None]
    ) -> None:
        """Run a slow job on the work lane; a later one outdates it and cancels a running round."""
        self._cancel.set()
        cancel = self._cancel = threading.Event()

        def progress(stage: str, fraction: float) -> None:
            self._post(self._set_task, name, stage, fraction)

        def run(is_stale: Callable[[], bool]) -> None:
            progress(stage, 0.0)
            try:
                job(progress, lambda: is_stale() or cancel.is_set())
            finally:
                self._post(self._set_task)

        self._work.replace(lambda is_stale: self._guard(run, is_stale))

    def post(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action` on the ui lane; what goes wrong is shown in the widget."""
        self._post(action, *args)

    def message(self, method: str, *args: Any, buffers: Iterable[bytes] = ()) -> None:
        """Call a method of the root component: ``jupyter_METHOD(...args, buffers)``."""
        self.send({"method": method, "args": list(args)}, buffers=list(buffers))

    # -- on the work lane ----------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Get ready while the user reads the page; if it cannot, a search will say why."""
        with contextlib.suppress(ClipBranchesError):
            self.session.warm_up()

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
        hits, result = self.session.hits, self.session.result
        is_same = self._contents is not None and (hits, result) == self._followed
        self._followed = hits, result
        self.refresh(None if is_same else "")

    def _adjusted(self, contents: Contents) -> Contents:
        for part in self._parts.values():
            contents = part.adjust(contents)
        return contents

    def _show_so_far(self, result: Result, n_before: int) -> None:
        """Show the answer of a running round as it stands; only the first one changes the tab."""
        self._contents = (self._contents or Contents.of(self.session)).with_result(result)
        self.show(self._place if n_before else Place("result"))

    def _go(self, data: dict[str, Any]) -> None:
        self.show(Place(str(data.get("tab", self._place.tab)), int(data.get("page", 0))))

    def _label(self, data: dict[str, Any]) -> None:
        rows, value = [int(row) for row in data["rows"]], int(data["value"])
        if value > 0:
            self.session.label(positive=rows)
        elif value < 0:
            self.session.label(negative=rows)
        else:
            self.session.unlabel(rows)

    def _dock(self, data: dict[str, Any]) -> None:
        name = str(data.get("name", ""))
        if self.docked:
            self._parts[self.docked].closed()
        self.docked = name if name in self._parts and self._parts[name].is_docked else ""
        if self.docked:
            self._parts[self.docked].opened()
        self.update()

    def _is_open(self, part: Part) -> bool:
        return part.name == self.docked

    def _act(self, data: dict[str, Any]) -> None:
        part = self._parts[str(data["part"])]
        part.handle(str(data["action"]), dict(data.get("data") or {}))

    def _step(self, action: Callable[[], str | None], verb: str) -> None:
        what = action()
        self.say(f"{verb}: {what}" if what else "Nothing left to undo or redo.")

    def _resend(self, data: dict[str, Any]) -> None:
        rows = self.session.catalog.check_rows(list(data.get("rows", []))[:MAX_ASKED]).tolist()
        if rows:
            sent = threading.Event()
            self._images.post(lambda: self._guard(self._send_images, rows, lambda: False, sent))

    def _set_task(self, name: str = "", stage: str = "", fraction: float = 0.0) -> None:
        self.task = {"name": name, "stage": stage, "fraction": round(fraction, 3)}

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
        self.message("thumbs", list(images), buffers=images.values())

    # -- errors -----------------------------------------------------------------------------------

    def _post(self, action: Callable[..., None], *args: Any) -> None:
        self._ui.post(lambda: self._guard(action, *args))

    def _guard(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action`; whatever goes wrong is shown in the widget, the unexpected also logged."""
        try:
            action(*args)
        except Cancelled:
            self._post(self.say, "Cancelled.")
        except ClipBranchesError as error:
            self._post(self.say, str(error), "error")
        except Exception as error:
            log.exception("the Explorer failed on %s", getattr(action, "__name__", action))
            text = f"Unexpected {type(error).__name__}: {error}. Try again; if it comes back, "
            self._post(self.say, text + "the traceback is in the kernel's log.", "error")
