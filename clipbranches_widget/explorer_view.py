"""What the Explorer shows (layer 6): a session turned into small plain dicts for the browser.

Pure: no widget, no threads, no numerics. Everything here ends up in a synced trait, so it holds
one page of rows and never image bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.session_events import RULE_CHANGES

if TYPE_CHECKING:
    from clipbranches_widget.result import Result
    from clipbranches_widget.result_groups import Groups
    from clipbranches_widget.session import Session

PAGE_SIZE = 60
"""Images on a page, unless the user chose another of `PAGE_SIZES`."""

PAGE_SIZES = (60, 120, 240)

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
class Extra:
    """A tab that a part adds for as long as it is wanted.

    Attributes
    ----------
    text : str
        On the tab.
    headline : str
        What it shows, without the count.
    part : str
        Name of the part; its action ``close_tab`` takes the tab away.
    result : Result or None
        Whose scores and rules its rows have.
    """

    text: str
    headline: str
    part: str
    result: Result | None = None


@dataclass(frozen=True, slots=True)
class Contents:
    """One consistent reading of a session, enough to draw any page of it.

    Attributes
    ----------
    ranked : dict of str to (m,) int64 or range
        Rows of each tab that has any, in the order shown; never copied.
    hits, result : Result or None
        The latest search and the latest round.
    page_size : int
        Images on a page.
    extras : dict of str to Extra
        Tabs that parts added; their rows are in `ranked`.
    groups : dict of str to (rows, Groups)
        Of tabs with near-duplicates folded: all rows, and what stands for which. `ranked` has
        those that stand for others or for themselves alone.
    """

    session: Session
    ranked: dict[str, Rows]
    hits: Result | None
    result: Result | None
    page_size: int = PAGE_SIZE
    extras: dict[str, Extra] = field(default_factory=dict)
    groups: dict[str, tuple[Rows, Groups]] = field(default_factory=dict)

    @classmethod
    def of(cls, session: Session, page_size: int = PAGE_SIZE) -> Contents:
        """Read the session's labels, search and round."""
        labels = session.labels
        hits = session.hits
        result = session.result
        catalog = session.catalog
        has_removed = bool(len(catalog.removed_rows))
        everything: Rows = catalog.present_rows() if has_removed else range(len(catalog))
        ranked: dict[str, Rows] = {"catalog": everything}
        if hits is not None:
            ranked["hits"] = hits.rows
        if result is not None:
            ranked["result"] = result.rows
        for name, rows in (("yes", labels.positive), ("no", labels.negative)):
            if len(present := catalog.without_removed(rows)):
                ranked[name] = present
        return cls(session, ranked, hits, result, page_size)

    def with_result(self, result: Result) -> Contents:
        """Return these contents with another answer, as of a round that is still running."""
        groups = {tab: each for tab, each in self.groups.items() if tab != "result"}
        ranked: dict[str, Rows] = {**self.ranked, "result": result.rows}
        return replace(self, ranked=ranked, result=result, groups=groups)

    def with_tab(self, name: str, rows: Rows, extra: Extra) -> Contents:
        """Return these contents with one more tab."""
        ranked, extras = {**self.ranked, name: rows}, {**self.extras, name: extra}
        return replace(self, ranked=ranked, extras=extras)

    def with_groups(self, tab: str, rows: Rows, groups: Groups) -> Contents:
        """Return these contents with a tab that shows but `rows`, which stand for the others."""
        folded = {**self.groups, tab: (self.ranked[tab], groups)}
        return replace(self, ranked={**self.ranked, tab: rows}, groups=folded)

    def rows_of(self, tab: str) -> Rows:
        """Return all rows of a tab, those folded into others included."""
        return self.groups[tab][0] if tab in self.groups else self.ranked[tab]

    def best_tab(self) -> str:
        """Return the tab to open first: the later of search and round, else everything."""
        tabs = {"search": "hits", **dict.fromkeys(("refine", "go_back", *RULE_CHANGES), "result")}
        for event in reversed(self.session.history):
            if not event.undone and tabs.get(event.action) in self.ranked:
                return tabs[event.action]
        return "catalog"

    def settle(self, place: Place) -> Place:
        """Return `place` moved to a tab and page that exist."""
        tab = place.tab if place.tab in self.ranked else self.best_tab()
        return replace(place, tab=tab, page=min(max(place.page, 0), self.n_pages(tab) - 1))

    def n_pages(self, tab: str) -> int:
        """Return the number of pages of a tab: at least one."""
        return max(1, -(-len(self.ranked[tab]) // self.page_size))

    def page_rows(self, place: Place) -> list[int]:
        """Return the rows of one page; none beyond the last."""
        first = place.page * self.page_size
        return [int(row) for row in self.ranked[place.tab][first : first + self.page_size]]

    def row_at(self, tab: str, rank: int) -> int | None:
        """Return the row at a rank of a tab, counted from 0; None outside."""
        ranked = self.ranked[tab]
        return int(ranked[rank]) if 0 <= rank < len(ranked) else None

    def rank_of(self, tab: str, row: int, near: int = 0) -> int | None:
        """Return the rank of a row in a tab, None if it is not there.

        `O(1)` for the whole catalog and at rank `near`, else one pass over the tab's rows.
        """
        ranked = self.ranked[tab]
        if self.row_at(tab, near) == row:
            return near
        if isinstance(ranked, range):
            return ranked.index(row) if row in ranked else None
        found = np.flatnonzero(ranked == row)
        return int(found[0]) if found.size else None

    def scored(self, tab: str, first: int, rows: Sequence[int]) -> list[tuple[float, int] | None]:
        """Return score and branch id of `rows`, which a tab shows from rank `first` on.

        None for a row that the tab's search or round did not rank.
        """
        shown = self.shown(tab)
        if shown is None:
            return [None] * len(rows)
        ranks = np.arange(first, min(first + len(rows), len(shown)))
        if not np.array_equal(
            shown.rows[ranks], rows
        ):  # a part of the ranking, or in another order
            ranks = np.flatnonzero(np.isin(shown.rows, rows))
        known = {
            int(shown.rows[rank]): (float(shown.scores[rank]), int(shown.branch_ids[rank]))
            for rank in ranks
        }
        return [known.get(row) for row in rows]

    def shown(self, tab: str) -> Result | None:
        """Return the search or round that a tab belongs to."""
        if tab in self.extras:
            return self.extras[tab].result
        return {"hits": self.hits, "result": self.result}.get(tab)


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
    unit = " groups" if place.tab in contents.groups else ""
    first = place.page * contents.page_size
    shown = contents.shown(place.tab)
    return {
        "tab": place.tab,
        "page": place.page,
        "page_size": contents.page_size,
        "n_pages": contents.n_pages(place.tab),
        "n_rows": n_rows,
        "first": first,
        "range": f"{first + 1:,}\u2013{first + len(rows):,} of {n_rows:,}{unit}"
        if rows
        else "0 of 0",
        "headline": headline(contents, place),
        "notes": list(shown.notes) if shown is not None else [],
        "branches": [shorten(each.text, MAX_RULE_CHARS) for each in shown.branches]
        if shown
        else [],
        "items": _items(contents, place, rows),
        "extras": {
            name: {"text": extra.text, "part": extra.part}
            for name, extra in contents.extras.items()
        },
    }


def _items(contents: Contents, place: Place, rows: list[int]) -> list[dict[str, Any]]:
    """Return what a page shows of each image; `is_cut` where the caption goes on."""
    catalog, items = contents.session.catalog, []
    scores = contents.scored(place.tab, place.page * contents.page_size, rows)
    groups = contents.groups[place.tab][1] if place.tab in contents.groups else None
    for row, scored in zip(rows, scores, strict=True):
        caption = catalog.caption(row)
        item: dict[str, Any] = {"row": row, "caption": shorten(caption)}
        if len(caption) > MAX_CAPTION_CHARS:
            item["is_cut"] = True
        if scored is not None:
            item["score"], item["branch"] = f"{scored[0]:.3f}", scored[1]
        if groups is not None and (n_folded := groups.count(row)):
            item["folded"] = n_folded
        items.append(item)
    return items


def marks_view(contents: Contents, place: Place, others: Sequence[int] = ()) -> dict[str, Any]:
    """Return what a label changes: labels of the rows shown, counts, and what can be undone.

    `others` are rows that are shown beside the page.
    """
    session, labels = contents.session, contents.session.labels
    found = labels.among([*contents.page_rows(place), *others])
    signs = [(found.positive, 1), (found.negative, -1)]
    tabs = (*TABS, *contents.extras)
    return {
        "rows": {str(row): sign for rows, sign in signs for row in rows.tolist()},
        "n_yes": len(labels.positive),
        "n_no": len(labels.negative),
        "tabs": {tab: len(contents.rows_of(tab)) for tab in tabs if tab in contents.ranked},
        "is_stale": session.is_stale,
        "can_undo": session.can_undo,
        "can_redo": session.can_redo,
    }


def headline(contents: Contents, place: Place) -> str:
    """Say in one line what the page belongs to, with counts and times."""
    n_rows = len(contents.rows_of(place.tab))
    images = "image" if n_rows == 1 else "images"
    if place.tab in contents.extras:
        return f"{n_rows:,} {images} {contents.extras[place.tab].headline}"
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
        n_total = contents.session.catalog.n_present
        of = f" of {n_total:,}" if n_rows < n_total else ""
        return f"{n_rows:,}{of} {images} in the catalog"
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
