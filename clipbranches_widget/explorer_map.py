"""The Explorer's map (layer 6): the catalog as points, their colours, and a lasso.

Points are not state but messages, ``{"method": "bulk", "args": ["map", kind, ...]}``, sent anew
whenever a view asks (action ``points``) and when they change:

``points, key``
    buffers: places (m, 2) uint16, and row ids (m,) uint32, both little-endian;
``colors, key``
    buffer: the class of each point, (m,) uint8; `state` says what the classes are;
``labels, key``
    buffers: indices of the points marked yes, and of those marked no, uint32;
``lasso, key``
    buffer: indices of the points in the lasso, uint32.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import Cancelled, QueryError
from clipbranches_widget.explorer_part import Host, Part
from clipbranches_widget.explorer_view import Contents, Extra, shorten
from clipbranches_widget.map_build import build_map
from clipbranches_widget.map_layout import MIN_ROWS, estimated_seconds, is_available

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clipbranches_widget.catalog_map import CatalogMap
    from clipbranches_widget.result import Result

COLORINGS = ("score", "branch", "answer", "label")
N_SHADES = 16
N_BRANCHES = 7
"""Branches with a colour of their own; the others share one."""

OTHER_BRANCHES = N_BRANCHES + 1
CONFIRM_ABOVE = 500
"""More rows are labelled only when the user confirmed it."""

MAX_CORNERS = 2_000
PROGRESS_EVERY_S = 0.2


class MapPart(Part):
    """The map of the catalog: colours, a lasso, and what is done with the images in it."""

    name = "map"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._map: CatalogMap | None = None
        self._by = "score"
        self._legend: list[dict[str, Any]] = []
        self._lasso: NDArray[np.int64] | None = None
        self._is_filter = False
        self._is_asked = False
        self._sent: dict[str, object] = {}
        self._fraction: float | None = None
        self._cancel = threading.Event()

    def adjust(self, contents: Contents) -> Contents:
        """Return the contents with a tab of the images in the lasso, if it was asked for."""
        if not self._is_filter or self._lasso is None:
            return contents
        extra = Extra("On the map", "picked on the map", self.name, contents.result)
        return contents.with_tab("lasso", self._lasso, extra)

    def opened(self) -> None:
        """Read the map."""
        self._map = self.host.session.catalog.map

    def closed(self) -> None:
        """Send nothing more; a lasso stays for as long as its tab is there."""
        self._is_asked = False
        self._sent.clear()
        if not self._is_filter:
            self._lasso = None

    def state(self) -> dict[str, Any]:
        """Return what there is of a map, and send what changed of it.

        Keys: status ("none", "computing" or "ready"), n_rows; without a map: seconds (about how
        long it takes), can_compute, fraction; with one: key, n_points, by, legend (of {id, text,
        n}), scale (what the shades of scores mean: low, high, text), summary, lasso (None, or n,
        n_yes, n_no, is_filter, confirm_above).
        """
        n_rows = len(self.host.session.catalog)
        if self._map is None:
            return {
                "status": "none" if self._fraction is None else "computing",
                "n_rows": n_rows,
                "seconds": round(estimated_seconds(n_rows)),
                "can_compute": n_rows < MIN_ROWS or is_available(),
                "fraction": self._fraction or 0.0,
            }
        if self._is_asked:
            self._send_changes()
        return {
            "status": "ready",
            "key": self._map.name,
            "n_rows": n_rows,
            "n_points": len(self._map),
            "by": self._by,
            "legend": self._legend,
            "scale": score_scale(self.host.contents),
            "summary": self._summary(),
            "lasso": self._lasso_view(),
        }

    # -- actions ---------------------------------------------------------------------------------

    def on_points(self, _data: dict[str, Any]) -> None:
        """Send everything: a view was mounted."""
        self._sent.clear()
        self._is_asked = True
        self.host.update(self)

    def on_color(self, data: dict[str, Any]) -> None:
        """Colour the points by another property."""
        by = str(data.get("by"))
        if by not in COLORINGS:
            raise QueryError(f"expected one of {', '.join(COLORINGS)} to colour by, got {by!r}")
        self._by = by
        self.host.update(self)

    def on_lasso(self, data: dict[str, Any]) -> None:
        """Pick the points inside a polygon: ``corners``, flat, in units of the map."""
        if self._map is None:
            return
        flat = np.asarray(data.get("corners", []), dtype=np.float64)
        if flat.ndim != 1 or flat.size % 2 or flat.size > 2 * MAX_CORNERS:
            raise QueryError(
                f"expected up to {MAX_CORNERS} corners x, y, x, y, ..., got {flat.size} numbers: "
                "reload the page, it is of another release than the kernel"
            )
        self._lasso = self._map.inside(flat.reshape(-1, 2))
        if self._is_filter and len(self._lasso):
            self.host.refresh("lasso")
        else:
            self._drop_tab()
            self.host.update(self)

    def on_show(self, _data: dict[str, Any]) -> None:
        """Show the images in the lasso on the page."""
        if self._lasso is not None and len(self._lasso):
            self._is_filter = True
            self.host.refresh("lasso")

    def on_close_tab(self, _data: dict[str, Any]) -> None:
        """Take the tab of the lasso away; the lasso stays."""
        self._drop_tab()
        self.host.update(self)

    def on_clear(self, _data: dict[str, Any]) -> None:
        """Drop the lasso and its tab."""
        self._lasso = None
        self._drop_tab()
        self.host.update(self)

    def on_label(self, data: dict[str, Any]) -> None:
        """Give all images in the lasso one label, as one action that can be undone."""
        rows, value = self._lasso, int(data["value"])
        if rows is None or not len(rows):
            return
        if len(rows) > CONFIRM_ABOVE and not data.get("is_confirmed"):
            raise QueryError(
                f"expected a confirmation to label {len(rows):,} images at once, more than "
                f"{CONFIRM_ABOVE}: press the button again"
            )
        if value > 0:
            self.host.session.label(positive=rows)
        elif value < 0:
            self.host.session.label(negative=rows)
        else:
            self.host.session.unlabel(rows)

    def on_compute(self, _data: dict[str, Any]) -> None:
        """Compute the map beside everything else."""
        if self._fraction is not None or self._map is not None:
            return
        self._fraction, self._cancel = 0.0, threading.Event()
        # A daemon: leaving the kernel must not wait for it, and a kill leaves the catalog whole.
        threading.Thread(
            target=self._compute, args=(self._cancel,), name="explorer-map", daemon=True
        ).start()
        self.host.update(self)

    def on_cancel(self, _data: dict[str, Any]) -> None:
        """Stop computing the map."""
        self._cancel.set()

    # -- computing, in a thread of its own ---------------------------------------------------------

    def _compute(self, cancel: threading.Event) -> None:
        last_time = 0.0

        def progress(_stage: str, done: int, total: int) -> None:
            nonlocal last_time
            if time.monotonic() - last_time >= PROGRESS_EVERY_S:
                last_time = time.monotonic()
                self.host.post(self._show_fraction, done / total)

        try:
            build_map(self.host.session.catalog, progress=progress, cancel=cancel)
        except Exception as error:  # raised again on the ui lane, which shows it
            self.host.post(self._computed, error)
        else:
            self.host.post(self._computed, None)

    def _show_fraction(self, fraction: float) -> None:
        if self._fraction is not None:
            self._fraction = round(fraction, 3)
            self.host.update(self)

    def _computed(self, error: Exception | None) -> None:
        self._fraction = None
        self._map = self.host.session.catalog.map
        self.host.update(self)
        if isinstance(error, Cancelled):
            self.host.say("Cancelled.")
        elif error is not None:
            raise error

    # -- what is shown -----------------------------------------------------------------------------

    def _drop_tab(self) -> None:
        if self._is_filter:
            self._is_filter = False
            self.host.refresh()

    def _send_changes(self) -> None:
        """Send the points, colours, labels and lasso that the views do not have yet."""
        assert self._map is not None  # noqa: S101 - asked only with a map
        contents, labels = self.host.contents, self.host.session.labels
        key = self._map.name
        if self._is_new("points", key):
            rows = self._map.rows.astype("<u4").tobytes()
            self._send("points", self._map.points.astype("<u2").tobytes(), rows)
        if self._is_new("colors", (key, self._by, contents.result, contents.hits)):
            classes, self._legend = point_classes(contents, self._map, self._by)
            self._send("colors", classes.tobytes())
        if self._is_new("labels", (key, labels)):
            self._send("labels", self._places(labels.positive), self._places(labels.negative))
        if self._is_new("lasso", (key, self._lasso)):
            none = np.empty(0, dtype=np.int64)
            self._send("lasso", self._places(none if self._lasso is None else self._lasso))

    def _is_new(self, kind: str, what: object) -> bool:
        """Return whether `what` was not yet sent; compares its parts by identity."""
        parts = what if isinstance(what, tuple) else (what,)
        before = self._sent.get(kind)
        self._sent[kind] = parts
        return not (
            isinstance(before, tuple)
            and all(
                a is b or (isinstance(a, str) and a == b)
                for a, b in zip(before, parts, strict=True)
            )
        )

    def _send(self, kind: str, *buffers: bytes) -> None:
        assert self._map is not None  # noqa: S101 - asked only with a map
        self.host.message("bulk", self.name, kind, self._map.name, buffers=buffers)

    def _places(self, rows: NDArray[np.int64]) -> bytes:
        assert self._map is not None  # noqa: S101 - asked only with a map
        return self._map.places_of(rows).astype("<u4").tobytes()

    def _lasso_view(self) -> dict[str, Any] | None:
        if self._lasso is None:
            return None
        found = self.host.session.labels.among(self._lasso)
        return {
            "n": len(self._lasso),
            "n_yes": len(found.positive),
            "n_no": len(found.negative),
            "is_filter": self._is_filter,
            "confirm_above": CONFIRM_ABOVE,
        }

    def _summary(self) -> str:
        """Say in a sentence what the map shows, for those who do not see it."""
        assert self._map is not None  # noqa: S101 - asked only with a map
        labels, result = self.host.session.labels, self.host.contents.result
        n_points, n_rows = len(self._map), self._map.n_rows
        many = f"{n_points:,} images" if n_points == n_rows else f"{n_points:,} of {n_rows:,}"
        yes, no = (len(self._map.places_of(each)) for each in (labels.positive, labels.negative))
        text = f"Map of {many}, near ones lie close together; {yes:,} marked yes, {no:,} marked no"
        if result is not None:
            text += f", {len(self._map.places_of(result.rows)):,} in the answer"
        return text + "."


def point_classes(
    contents: Contents, catalog_map: CatalogMap, by: str
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """Return the class of each point, 0 for a plain one, and the legend.

    Parameters
    ----------
    contents : Contents
    catalog_map : CatalogMap
    by : str
        "score": 1 to `N_SHADES`, equal parts of `score_scale`. "branch": 1 to `N_BRANCHES` for
        the branches with most images, then `OTHER_BRANCHES`. "answer": 1. "label": all plain.

    Returns
    -------
    classes : (m,) uint8
    legend : list of dict
        id, text, n (points of that class); empty for "score" and "label".
    """
    classes = np.zeros(len(catalog_map), dtype=np.uint8)
    result = contents.result
    if by == "score" and (scored := scored_rows(contents)) is not None:
        rows, scores = scored
        low, high = score_range(contents)
        shades = np.floor((scores - low) / max(high - low, 1e-9) * N_SHADES).astype(np.int64)
        _paint(classes, catalog_map, rows, 1 + np.clip(shades, 0, N_SHADES - 1))
    elif by == "answer" and result is not None:
        _paint(classes, catalog_map, result.rows, np.ones(len(result), dtype=np.int64))
        return classes, [_entry(classes, 1, "in the answer"), _entry(classes, 0, "other images")]
    elif by == "branch" and result is not None and result.branches:
        return classes, _paint_branches(classes, catalog_map, result)
    return classes, []


def scored_rows(contents: Contents) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Return the rows that have a score, with it: of the latest round, else of the search."""
    result, hits = contents.result, contents.hits
    if result is not None:
        scored = result if result.pool is None else result.pool
        return scored.rows, scored.scores
    return None if hits is None else (hits.rows, hits.scores)


def score_range(contents: Contents) -> tuple[float, float]:
    """Return the scores of the first and the last shade."""
    if contents.result is not None:
        return 0.0, 1.0
    if contents.hits is None or not len(contents.hits):
        return 0.0, 1.0
    return float(contents.hits.scores.min()), float(contents.hits.scores.max())


def score_scale(contents: Contents) -> dict[str, str] | None:
    """Return what the shades of a score mean, None where nothing has one."""
    if scored_rows(contents) is None:
        return None
    low, high = score_range(contents)
    text = "similarity to the search" if contents.result is None else "score of the round"
    return {"low": f"{low:.2f}", "high": f"{high:.2f}", "text": text}


def _paint_branches(
    classes: NDArray[np.uint8], catalog_map: CatalogMap, result: Result
) -> list[dict[str, Any]]:
    counts = np.bincount(result.branch_ids[result.branch_ids >= 0], minlength=len(result.branches))
    largest = np.argsort(-counts, kind="stable")[:N_BRANCHES]
    class_of = np.full(len(result.branches), OTHER_BRANCHES, dtype=np.int64)
    class_of[largest] = np.arange(1, len(largest) + 1)
    has_branch = result.branch_ids >= 0
    _paint(classes, catalog_map, result.rows[has_branch], class_of[result.branch_ids[has_branch]])
    legend = [
        _entry(classes, number, f"R{branch + 1}: {shorten(result.branches[branch].text, 80)}")
        for number, branch in enumerate(largest.tolist(), start=1)
    ]
    if len(counts) > N_BRANCHES:
        legend.append(_entry(classes, OTHER_BRANCHES, "other rules"))
    return [*(entry for entry in legend if entry["n"]), _entry(classes, 0, "not in the answer")]


def _paint(
    classes: NDArray[np.uint8],
    catalog_map: CatalogMap,
    rows: NDArray[np.int64],
    values: NDArray[np.int64],
) -> None:
    """Give the points of `rows` their classes; rows that are not on the map are left out."""
    found = np.minimum(np.searchsorted(catalog_map.rows, rows), max(len(classes) - 1, 0))
    is_there = catalog_map.rows[found] == rows
    classes[found[is_there]] = values[is_there]


def _entry(classes: NDArray[np.uint8], number: int, text: str) -> dict[str, Any]:
    return {"id": number, "text": text, "n": int((classes == number).sum())}
