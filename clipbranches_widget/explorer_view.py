"""What the Explorer shows (layer 6): a session turned into small plain dicts for the browser.

Pure: no widget, no threads, no numerics. Everything here ends up in a synced trait, so it holds
one page of rows and never image bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from clipbranches_widget.result import Result
    from clipbranches_widget.session import Session

PAGE_SIZE = 60
"""Images on a page."""

MAX_CAPTION_CHARS = 200
"""Longest caption sent to the browser; longer ones end in an ellipsis."""

MAX_RULE_CHARS = 400
"""Longest rule text sent to the browser."""

Rows = NDArray[np.int64] | range

TABS = ("hits", "result", "yes", "no", "catalog")
"""What a page can show: the search, the round's answer, the labels, or every image."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the user is: a tab and a page of it, counted from 0."""

    tab: str = "catalog"
    page: int = 0


@dataclass(frozen=True, slots=True)
class Contents:
    """One consistent reading of a session, enough to draw any page of it.

    Attributes
    ----------
    ranked : dict of str to (m,) int64 or range
        Rows of each tab that has any, in the order shown; never copied.
    hits, result : Result or None
        The latest search and the latest round.
    """

    session: Session
    ranked: dict[str, Rows]
    hits: Result | None
    result: Result | None

    @classmethod
    def of(cls, session: Session) -> Contents:
        """Read the session's labels, search and round."""
        labels = session.labels
        hits = session.hits
        result = session.result
        ranked: dict[str, Rows] = {"catalog": range(len(session.catalog))}
        if hits is not None:
            ranked["hits"] = hits.rows
        if result is not None:
            ranked["result"] = result.rows
        if len(labels.positive):
            ranked["yes"] = labels.positive
        if len(labels.negative):
            ranked["no"] = labels.negative
        return cls(session, ranked, hits, result)

    def with_result(self, result: Result) -> Contents:
        """Return these contents with the answer of a round that is still running."""
        return replace(self, ranked={**self.ranked, "result": result.rows}, result=result)

    def best_tab(self) -> str:
        """Return the tab to open first: the later of search and round, else everything."""
        tabs = {"search": "hits", "refine": "result"}
        for event in reversed(self.session.history):
            if not event.undone and tabs.get(event.action) in self.ranked:
                return tabs[event.action]
        return "catalog"

    def settle(self, place: Place) -> Place:
        """Return `place` moved to a tab and page that exist."""
        tab = place.tab if place.tab in self.ranked else self.best_tab()
        n_pages = max(1, -(-len(self.ranked[tab]) // PAGE_SIZE))
        return replace(place, tab=tab, page=min(max(place.page, 0), n_pages - 1))

    def page_rows(self, place: Place) -> list[int]:
        """Return the rows of one page."""
        first = place.page * PAGE_SIZE
        return [int(row) for row in self.ranked[place.tab][first : first + PAGE_SIZE]]


def page_view(contents: Contents, place: Place) -> dict[str, Any]:
    """Return everything one page shows except labels, rules and images.

    Parameters
    ----------
    contents : Contents
        The session's state.
    place : Place
        A settled place (see `Contents.settle`).
    """
    rows = contents.page_rows(place)
    n_rows = len(contents.ranked[place.tab])
    first = place.page * PAGE_SIZE
    shown = {"hits": contents.hits, "result": contents.result}.get(place.tab)
    catalog = contents.session.catalog
    items = [{"row": row, "caption": shorten(catalog.caption(row))} for row in rows]
    if shown is not None:
        for offset, item in enumerate(items):
            item["score"] = f"{float(shown.scores[first + offset]):.3f}"
            item["branch"] = int(shown.branch_ids[first + offset])
    return {
        "tab": place.tab,
        "page": place.page,
        "n_pages": max(1, -(-n_rows // PAGE_SIZE)),
        "n_rows": n_rows,
        "range": f"{first + 1:,}\u2013{first + len(rows):,} of {n_rows:,}" if rows else "0 of 0",
        "headline": headline(contents, place),
        "notes": list(shown.notes) if shown is not None else [],
        "branches": [shorten(each.text, MAX_RULE_CHARS) for each in shown.branches]
        if shown
        else [],
        "items": items,
    }


def marks_view(contents: Contents, place: Place, others: Sequence[int] = ()) -> dict[str, Any]:
    """Return what a label changes: labels of the rows shown, counts, and what can be undone.

    `others` are rows that are shown beside the page.
    """
    session, labels = contents.session, contents.session.labels
    rows = {*contents.page_rows(place), *others}
    return {
        "rows": {str(row): sign for row in rows if (sign := labels.get(row))},
        "n_yes": len(labels.positive),
        "n_no": len(labels.negative),
        "tabs": {tab: len(contents.ranked[tab]) for tab in TABS if tab in contents.ranked},
        "is_stale": session.is_stale,
        "can_undo": session.can_undo,
        "can_redo": session.can_redo,
    }


def headline(contents: Contents, place: Place) -> str:
    """Say in one line what the page belongs to, with counts and times."""
    n_rows = len(contents.ranked[place.tab])
    images = "image" if n_rows == 1 else "images"
    if place.tab == "result" and (result := contents.result) is not None:
        share = result.n_touched / max(result.n_total, 1)
        took = seconds_text(result.timings)
        if not result.is_complete:
            return f"{n_rows:,} matching {images} so far{took}"
        return f"{n_rows:,} matching {images}{took} \u00b7 {percent(share)} of the catalog scored"
    if place.tab == "hits" and (hits := contents.hits) is not None:
        about = f" to \u201c{shorten(hits.query_text, 80)}\u201d" if hits.query_text else ""
        return f"{n_rows:,} nearest {images}{about}{seconds_text(hits.timings)}"
    if place.tab == "catalog":
        return f"{n_rows:,} {images} in the catalog"
    return f"{n_rows:,} {images} marked {place.tab}"


def seconds_text(timings: Any) -> str:
    """Return `` in 0.21 s`` or `` in 12 ms`` from a result's timings, empty when unknown."""
    seconds = timings.get("total")
    if seconds is None:
        return ""
    return f" in {seconds:.2f} s" if seconds >= 0.1 else f" in {seconds * 1000:.0f} ms"


def percent(share: float) -> str:
    """Return a share as a percentage that is never rounded down to nothing.

    Examples
    --------
    >>> percent(0.0341), percent(1.0), percent(0.0004), percent(0.0)
    ('3.4 %', '100 %', '< 0.1 %', '0 %')
    """
    if 0 < share < 0.001:
        return "< 0.1 %"
    return f"{share * 100:.1f}".removesuffix(".0") + " %"


def shorten(text: str, limit: int = MAX_CAPTION_CHARS) -> str:
    """Return `text` cut to `limit` characters, with an ellipsis when something was cut.

    Examples
    --------
    >>> shorten("a long caption", 8)
    'a long \u2026'
    """
    return text if len(text) <= limit else text[: limit - 1] + "\u2026"
