"""The notebook widget (layer 6): clicks in the browser become Session calls, and back.

Protocol
--------
Kernel to browser, synced traits, one page at most: `view` (rows, captions, scores, headline),
`marks` (labels of the rows shown, counts), `task` (what runs), `notice` (an error or a remark),
`docked` (the panel that is docked), and a trait for each part, see `explorer_part`. Pictures are
not state but messages, see `explorer_images`; so are captions too long for a page,
``{"method": "caption", "args": [row, text]}``.

Browser to kernel, events with plain values: ``label {rows, value}`` (the new value, -1, 0 or 1,
so a repeated message changes nothing), ``go {tab, page, page_size}``, ``refine``, ``cancel``,
``undo``, ``redo``, ``dock {name}`` (open a panel, "" closes it), ``part {part, action, data}``
(what a part asks for), ``ready {rows, size, is_new}`` (a view was mounted, or lacks these images),
``tell {row}`` (the whole caption).

Threads
-------
An event handler only posts a job. `_ui` owns all state and traits of the widget; `_work` runs
searches and rounds; `_images` reads pictures. `Session` has its own lock.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import traitlets
from ipyvuetify.VuetifyTemplate import VuetifyTemplate

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.errors import ClipBranchesError
from clipbranches_widget.explorer_audit import AuditPart
from clipbranches_widget.explorer_export import ExportPart
from clipbranches_widget.explorer_groups import GroupsPart
from clipbranches_widget.explorer_images import THUMBNAIL_PX, Pictures
from clipbranches_widget.explorer_jobs import ExplorerJobs
from clipbranches_widget.explorer_lanes import Lane
from clipbranches_widget.explorer_map import MapPart
from clipbranches_widget.explorer_part import Part
from clipbranches_widget.explorer_picture import OPENING_S, Poster, Snapshot, snapshot
from clipbranches_widget.explorer_query import QueryPart
from clipbranches_widget.explorer_rounds import RoundsPart
from clipbranches_widget.explorer_rules import RulesPart
from clipbranches_widget.explorer_scores import ScoresPart, kept_threshold
from clipbranches_widget.explorer_suggest import SuggestPart
from clipbranches_widget.explorer_view import (
    PAGE_SIZE,
    PAGE_SIZES,
    Contents,
    Place,
    marks_view,
    page_view,
    shorten,
)
from clipbranches_widget.explorer_zoom import ZoomPart
from clipbranches_widget.session import Session

if TYPE_CHECKING:
    from clipbranches_widget.result import Result
    from clipbranches_widget.session_events import Round, Search

PARTS: tuple[type[Part], ...] = (
    ScoresPart,  # first: another threshold gives the answer that the others pick from
    QueryPart,
    ZoomPart,
    RulesPart,
    RoundsPart,
    SuggestPart,
    AuditPart,
    MapPart,
    ExportPart,
    GroupsPart,  # last: it folds what the others have picked
)
VUE_FOLDER = Path(__file__).parent / "vue"
PROGRESS_EVERY_S = 0.1
MAX_TOLD_CHARS = 20_000
"""Longest caption that is sent at all."""


class Explorer(ExplorerJobs, VuetifyTemplate):
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
    docked = traitlets.Unicode(help="Name of the docked panel; empty for none.").tag(sync=True)
    query = traitlets.Dict(help="See `explorer_query`.").tag(sync=True)
    zoom = traitlets.Dict(help="See `explorer_zoom`.").tag(sync=True)
    rules = traitlets.Dict(help="See `explorer_rules`.").tag(sync=True)
    rounds = traitlets.Dict(help="See `explorer_rounds`.").tag(sync=True)
    scores = traitlets.Dict(help="See `explorer_scores`.").tag(sync=True)
    suggest = traitlets.Dict(help="See `explorer_suggest`.").tag(sync=True)
    audit = traitlets.Dict(help="See `explorer_audit`.").tag(sync=True)
    map = traitlets.Dict(help="See `explorer_map`.").tag(sync=True)
    export = traitlets.Dict(help="See `explorer_export`.").tag(sync=True)
    groups = traitlets.Dict(help="See `explorer_groups`.").tag(sync=True)

    def __init__(self, source: Session | Catalog) -> None:
        if isinstance(source, Catalog):
            source = Session(source)
        if not isinstance(source, Session):
            raise TypeError(
                f"expected a Session or a Catalog, got {type(source).__name__}: "
                "use cb.Explorer(cb.Session(cb.demo()))"
            )
        self.session = source
        self._make_lanes()
        self._pictures = Pictures(source.catalog, self._images, self.message, self._guard)
        reading = (self._images, self._pictures.sharp_lane, self._aside)
        self._lanes = (self._ui, self._work, *reading)
        self._place = Place(tab="")
        self._page_size = PAGE_SIZE
        self._poster = Poster()
        self._contents: Contents | None = None
        self._followed: tuple[Search | None, Round | None] = (None, None)
        self._parts = {part.name: part(self) for part in PARTS}
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
            f"<Explorer of {self.session.catalog.n_present:,} images: "
            f"{len(labels.positive)} yes, {len(labels.negative)} no>"
        )

    def snapshot(self) -> Snapshot:
        """Return a static picture of what is shown, for a cell of its own or a report."""
        return snapshot(self.contents, self._place)

    def _draw(self) -> Snapshot:
        return snapshot(self._contents, self._place)  # None while the session is being opened

    def _ipython_display_(self) -> None:
        """Show the widget, and a picture of it for where no widget can run."""
        opened = threading.Event()
        self._post(opened.set)
        opened.wait(OPENING_S)
        self._poster.display(self._repr_mimebundle_(), self._draw)

    def close(self) -> None:
        """Stop the threads, let go of the session, and remove the widget from the page."""
        if self._lanes:  # ipywidgets also closes what never got through __init__
            self._stop_observing()
            self._cancel.set()
            self._poster.close()
        for lane in self._lanes:
            lane.close()
        super().close()

    # -- events from the browser: post and return -------------------------------------------

    def vue_refine(self, _data: object = None) -> None:
        """Run a round on the present labels, those of clicks that came before among them."""
        self._post(self.refine)

    def vue_label(self, data: dict[str, Any]) -> None:
        """Give rows their label: 1 yes, -1 no, 0 none."""
        self._post(self._label, data)

    def vue_go(self, data: dict[str, Any]) -> None:
        """Show another page or tab."""
        self._post(self._go, data)

    def vue_dock(self, data: dict[str, Any]) -> None:
        """Open a panel, or close the open one."""
        self._post(self._dock, data)

    def vue_part(self, data: dict[str, Any], buffers: Iterable[memoryview] = ()) -> None:
        """Let a part do what its component asks for; it finds bytes under ``buffers``."""
        sent = {"buffers": [bytes(each) for each in buffers]} if buffers else {}
        self._post(self._act, {**data, "data": {**(data.get("data") or {}), **sent}})

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

    def vue_tell(self, data: dict[str, Any]) -> None:
        """Send a caption that was too long for the page."""
        self._post(self._tell, data)

    # -- what parts may ask for: see `explorer_part.Host` ---------------------------------------

    @property
    def contents(self) -> Contents:
        """The latest reading of the session."""
        if self._contents is None:
            self._contents = self._adjusted(Contents.of(self.session, self._page_size))
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
            following = replace(self._place, page=self._place.page + 1)
            self._pictures.show(rows, ahead=self.contents.page_rows(following))
        with self.hold_sync():
            self.view = page_view(self.contents, self._place)
            self.update()
        self._poster.follow(self._draw)

    def refresh(self, tab: str | None = None) -> None:
        """Read the session anew, let parts adjust it, and show the place, or another tab."""
        self._contents = self._adjusted(Contents.of(self.session, self._page_size))
        self.show(self._place if tab is None else Place(tab))

    def update(self, *parts: Part) -> None:
        """Show the present state of some parts; without any, of all."""
        shown = [part for part in self._parts.values() if not part.is_docked or self._is_open(part)]
        with self.hold_sync():
            for part in parts or shown:
                self.set_trait(part.name, part.state())
            others = [row for part in shown for row in part.rows()]
            self.marks = marks_view(self.contents, self._place, others)

    def refine(self, *, threshold: float | None = None) -> None:
        """Run a round on the present labels; without a threshold, at that of the latest one."""
        cancel = self._cancel = threading.Event()
        self._work.replace(lambda is_stale: self._guard(self._refine, threshold, cancel, is_stale))

    def message(self, method: str, *args: Any, buffers: Iterable[bytes] = ()) -> None:
        """Call a method of the root component: ``jupyter_METHOD(...args, buffers)``."""
        self.send({"method": method, "args": list(args)}, buffers=list(buffers))

    # -- on the work lane ----------------------------------------------------------------------

    def _warm_up(self) -> None:
        """Get ready while the user reads the page; if it cannot, a search will say why."""
        with contextlib.suppress(ClipBranchesError):
            self.session.warm_up()

    def _refine(
        self, threshold: float | None, cancel: threading.Event, is_stale: Callable[[], bool]
    ) -> None:
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
        if threshold is None:
            threshold = kept_threshold(self.session.result)
        try:
            self.session.refine(
                threshold=threshold, progress=progress, partial=partial, cancel=cancel
            )
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
        asked = self.session.asked
        is_same = self._contents is not None and asked == self._followed
        self._followed = asked
        self.refresh(None if is_same else "")

    def _adjusted(self, contents: Contents) -> Contents:
        for part in self._parts.values():
            contents = part.adjust(contents)
        return contents

    def _show_so_far(self, result: Result, n_before: int) -> None:
        """Show the answer of a running round as it stands; only the first one changes the tab."""
        self._contents = (self._contents or Contents.of(self.session, self._page_size)).with_result(
            result
        )
        self.show(self._place if n_before else Place("result"))

    def _go(self, data: dict[str, Any]) -> None:
        page, size = int(data.get("page", 0)), int(data.get("page_size", self._page_size))
        if size in PAGE_SIZES and size != self._page_size:
            self._page_size = size
            self._contents = replace(self.contents, page_size=size)
        self.show(Place(str(data.get("tab", self._place.tab)), page))

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
        if data.get("is_new"):
            self._pictures.forget_ahead()
        self._pictures.send(list(data.get("rows", [])), int(data.get("size", THUMBNAIL_PX)))

    def _tell(self, data: dict[str, Any]) -> None:
        row = int(data["row"])
        self.message("caption", row, shorten(self.session.catalog.caption(row), MAX_TOLD_CHARS))
