"""The Explorer's groups (layer 6): near-duplicates on the page folded into one image each.

Off until the user asks for it. Only what is shown is folded: labels, rounds, counts on the tabs
and the export are about single images. The tabs of labelled images are never folded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import QueryError
from clipbranches_widget.explorer_computed import Computed
from clipbranches_widget.explorer_part import Host, Part
from clipbranches_widget.explorer_view import shorten
from clipbranches_widget.result_groups import DEFAULT_SIMILARITY, Groups, fold

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.explorer_view import Contents

MAX_GROUPED = 20_000
"""Images of a tab that are grouped, from the best on: some seconds of computing."""

MAX_MEMBERS = 120
"""Images of an open group that are shown."""

SIMILARITIES = (0.99, 0.98, 0.96, 0.94, 0.92, 0.90)
UNFOLDED = ("yes", "no")


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """The rows of a tab to group."""

    catalog: Catalog
    tab: str
    rows: NDArray[np.int64]
    similarity: float

    def __eq__(self, other: object) -> bool:
        """Return whether the same is asked for."""
        return (
            isinstance(other, _Asked)
            and (self.tab, self.similarity) == (other.tab, other.similarity)
            and np.array_equal(self.rows, other.rows)
        )

    def __hash__(self) -> int:
        """Return a hash of the tab and the similarity."""
        return hash((self.tab, self.similarity))


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """The answer: places of the rows that stay."""

    asked: _Asked
    places: NDArray[np.int64]
    groups: Groups


class GroupsPart(Part):
    """Near-duplicates of the tab shown, and one group of them when it is open.

    It must come after every part that picks rows: it folds what is left.
    """

    name = "groups"
    is_docked = False

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._is_on = False
        self._similarity = DEFAULT_SIMILARITY
        self._row: int | None = None
        self._known: dict[str, _Found] = {}
        self._found = Computed(host, _fold, host.refresh)

    def adjust(self, contents: Contents) -> Contents:
        """Return the contents with the tabs folded whose groups are known."""
        if not self._is_on:
            return contents
        if (latest := self._found.latest) is not None:
            self._known[latest.asked.tab] = latest
        for tab in tuple(contents.ranked):
            known = self._known.get(tab)
            if known is not None and known.asked == self._asked(contents, tab):
                rows = np.asarray(contents.ranked[tab], dtype=np.int64)
                kept = np.append(rows[known.places], rows[MAX_GROUPED:])
                contents = contents.with_groups(tab, kept, known.groups)
        return contents

    def state(self) -> dict[str, Any]:
        """Return whether groups are shown, how many, and the open one.

        Keys: is_on, similarity, similarities (to choose from); and when on, is_computing,
        can_group (not for labelled images), n_images, n_groups, n_grouped (images that were
        compared), is_exact, open (see `_open`), the last five as soon as they are known.
        """
        state: dict[str, Any] = {
            "is_on": self._is_on,
            "similarity": self._similarity,
            "similarities": sorted({*SIMILARITIES, self._similarity}, reverse=True),
        }
        if not self._is_on:
            return state
        contents, tab = self.host.contents, self.host.place.tab
        state["can_group"] = can_group = _can_group(contents, tab)
        found = contents.groups.get(tab)
        if found is None:
            if can_group:
                self._found.get(self._asked(contents, tab))
            return {**state, "is_computing": can_group}
        rows, groups = found
        return state | {
            "is_computing": False,
            "n_images": len(rows),
            "n_groups": len(contents.ranked[tab]),
            "n_grouped": groups.n_grouped,
            "is_exact": groups.is_exact,
            "open": self._open(groups),
        }

    def rows(self) -> list[int]:
        """Return the rows of the open group that are shown."""
        return self._members()[:MAX_MEMBERS]

    def on_show(self, data: dict[str, Any]) -> None:
        """Group or do not, and at which similarity."""
        similarity = float(data.get("similarity", self._similarity))
        if not 0.0 < similarity <= 1.0:
            raise QueryError(f"expected a similarity above 0 and up to 1, got {similarity}")
        self._is_on, self._similarity = bool(data["is_on"]), similarity
        self._row = None
        self._known.clear()
        self.host.refresh()

    def on_open(self, data: dict[str, Any]) -> None:
        """Show the group of a row."""
        self._row = int(data["row"])
        self.host.update(self)

    def on_close(self, _data: dict[str, Any]) -> None:
        """Show no group."""
        self._row = None
        self.host.update(self)

    def on_label(self, data: dict[str, Any]) -> None:
        """Give every image of the open group a label: 1 yes, -1 no, 0 none; one undo takes it."""
        rows, value, session = self._members(), int(data["value"]), self.host.session
        if not rows:
            return
        if value > 0:
            session.label(positive=rows)
        elif value < 0:
            session.label(negative=rows)
        else:
            session.unlabel(rows)

    def _asked(self, contents: Contents, tab: str) -> _Asked:
        rows = np.asarray(contents.ranked[tab][:MAX_GROUPED], dtype=np.int64)
        return _Asked(contents.session.catalog, tab, rows, self._similarity)

    def _members(self) -> list[int]:
        """Return the rows of the open group, the one that stands for it first."""
        found = self.host.contents.groups.get(self.host.place.tab)
        if self._row is None or found is None or self._row not in found[1]:
            return []
        return [self._row, *found[1][self._row].tolist()]

    def _open(self, groups: Groups) -> dict[str, Any] | None:
        """Return the open group: n_rows; members, of which each has row, caption, similarity."""
        members = self._members()
        if not members:
            self._row = None  # it stays closed when an undo brings the same images back
            return None
        catalog = self.host.session.catalog
        shown = zip(members, [1.0, *groups.similarities_of(members[0]).tolist()], strict=True)
        return {
            "n_rows": len(members),
            "members": [
                {
                    "row": row,
                    "caption": shorten(catalog.caption(row)),
                    "similarity": f"{similarity:.3f}",
                }
                for row, similarity in list(shown)[:MAX_MEMBERS]
            ],
        }


def _can_group(contents: Contents, tab: str) -> bool:
    """Tell whether a tab can be folded: not labelled images, nor what a running round shows."""
    if tab == "result" and contents.result is not None:
        return contents.result.is_complete
    return tab not in UNFOLDED


def _fold(asked: _Asked) -> _Found:
    return _Found(asked, *fold(asked.catalog, asked.rows, asked.similarity))
