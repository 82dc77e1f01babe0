"""The Explorer's panel of rounds (layer 6): a timeline, what each gained and lost, going back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipbranches_widget.errors import QueryError
from clipbranches_widget.explorer_computed import Computed
from clipbranches_widget.explorer_part import Host, Part, Progress
from clipbranches_widget.explorer_view import Extra, shorten

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from clipbranches_widget.explorer_view import Contents
    from clipbranches_widget.session_rounds import Comparison, PastRound

TAB = "difference"
N_SHOWN = 60
"""Images shown of those gained, and of those lost."""

MAX_ROUNDS = 200
"""Most rounds in the timeline: the latest."""

MAX_QUERY_CHARS, MAX_CAPTION_CHARS = 80, 80

Pair = tuple[int, int]


class RoundsPart(Part):
    """Every round of the session, with what it gained and lost against the one before it."""

    name = "rounds"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._rounds: tuple[PastRound, ...] = ()
        self._compared = Computed(host, self._compare, self._arrived)
        self._counts: dict[Pair, tuple[int, int] | None] = {}
        self._chosen: int | None = None
        self._shown: Comparison | None = None
        self._tab: tuple[NDArray[Any], Extra] | None = None

    def _compare(self, pair: Pair) -> tuple[Pair, Comparison]:
        return pair, self.host.session.compare(*pair)

    def _arrived(self) -> None:
        if self._compared.latest is not None:
            self._take(*self._compared.latest)
        self.host.update(self)

    def _take(self, pair: Pair, found: Comparison) -> None:
        self._counts[pair] = len(found.gained), len(found.lost)
        if pair == self._pair(self._chosen):
            self._shown = found

    def adjust(self, contents: Contents) -> Contents:
        """Add a tab with all that a round gained or lost, while it is wanted."""
        return contents if self._tab is None else contents.with_tab(TAB, *self._tab)

    def state(self) -> dict[str, Any]:
        """Return the timeline, and of a chosen round the difference to the one before it.

        Keys: rounds, n_earlier (rounds that are not listed), is_there (whether going back to the
        current round would change nothing), is_filtered (whether filters hide some of what is
        counted), and shown, None or a dict of number, against (None for a round with none before
        it), n_kept, gained and lost; these are dicts of n and items, the first ones with row and
        caption, None until they are computed.
        """
        self._rounds = self.host.session.rounds
        listed = self._rounds[-MAX_ROUNDS:]
        self._compare_next(listed)
        return {
            "rounds": [self._card(each) for each in listed],
            "n_earlier": len(self._rounds) - len(listed),
            "is_there": self._is_there(),
            "is_filtered": bool(self.host.session.filters),
            "shown": self._difference(),
        }

    def rows(self) -> list[int]:
        """Return the rows of the difference shown."""
        if self._shown is None:
            return []
        parts = (self._shown.gained, self._shown.lost)
        return [int(row) for part in parts for row in part[:N_SHOWN]]

    def on_show(self, data: dict[str, Any]) -> None:
        """Show what a round gained and lost; of none, close the difference."""
        number = data.get("number")
        self._chosen = None if number is None else self._round(int(number)).number
        self._shown = None
        self.host.update(self)

    def on_all(self, data: dict[str, Any]) -> None:
        """Show all that the chosen round gained or lost in a tab of the page."""
        if self._shown is None:
            raise QueryError("expected a round whose difference is shown: click a round first")
        what, found = str(data["what"]), self._shown
        if what not in ("gained", "lost"):
            raise QueryError(f"expected gained or lost, got {what!r}")
        rows = found.gained if what == "gained" else found.lost
        in_round = f"{what} in round {found.after}"
        extra = Extra(in_round.capitalize(), f"{in_round}, against round {found.before}", self.name)
        self._tab = rows, extra
        self.host.refresh(TAB)

    def on_close_tab(self, _data: dict[str, Any]) -> None:
        """Take the tab of a difference away."""
        self._tab = None
        self.host.refresh("result" if self.host.place.tab == TAB else None)

    def on_go_back(self, data: dict[str, Any]) -> None:
        """Set the session to where a round stood."""
        number, session = self._round(int(data["number"])).number, self.host.session

        def go_back(_progress: Progress, is_stale: Callable[[], bool]) -> None:
            if not is_stale():
                session.go_back(number)

        self.host.work("go_back", f"Going back to round {number}", go_back)

    def closed(self) -> None:
        """Close the difference too."""
        self._chosen = self._shown = None

    def _round(self, number: int) -> PastRound:
        self._rounds = self.host.session.rounds
        if not 1 <= number <= len(self._rounds):
            raise QueryError(
                f"expected the number of a round from 1 to {len(self._rounds)}, got {number}: "
                "choose one of those shown"
            )
        return self._rounds[number - 1]

    def _pair(self, number: int | None) -> Pair | None:
        """Return which two rounds the difference of a round is of."""
        if number is None or number > len(self._rounds):
            return None
        parent = self._rounds[number - 1].parent
        return None if parent is None else (parent, number)

    def _compare_next(self, listed: tuple[PastRound, ...]) -> None:
        """Compute the chosen difference, else the counts of the latest round without any."""
        pair = self._pair(self._chosen)
        wanted = None if pair is None or self._shown is not None else pair
        if wanted is None:
            pairs = (self._pair(each.number) for each in reversed(listed))
            wanted = next((one for one in pairs if one and one not in self._counts), None)
        if wanted is None or self._compared.is_running:
            return
        self._counts.setdefault(wanted, None)  # asked for once: what fails is not tried again
        kept = self._compared.get(wanted)
        if kept is not None:
            self._take(*kept)

    def _card(self, each: PastRound) -> dict[str, Any]:
        pair = self._pair(each.number)
        counts = None if pair is None else self._counts.get(pair)
        return {
            "number": each.number,
            "parent": each.parent,
            "at": each.at.isoformat(timespec="seconds"),
            "query": shorten(each.query_text, MAX_QUERY_CHARS),
            "n_yes": each.n_yes,
            "n_no": each.n_no,
            "n_rules": len(each.rules),
            "n_rows": each.n_rows,
            "threshold": each.threshold,
            "is_current": each.is_current,
            "undone": each.undone,
            "n_gained": None if counts is None else counts[0],
            "n_lost": None if counts is None else counts[1],
        }

    def _is_there(self) -> bool:
        session = self.host.session
        rules = next((each.rules for each in self._rounds if each.is_current), None)
        return rules == session.rules and not session.is_stale

    def _difference(self) -> dict[str, Any] | None:
        if self._chosen is None or self._chosen > len(self._rounds):
            return None
        found, pair = self._shown, self._pair(self._chosen)
        parts: dict[str, Any] = {"gained": None, "lost": None, "n_kept": None}
        if found is not None:
            parts = {"gained": self._items(found.gained), "lost": self._items(found.lost)}
            parts["n_kept"] = len(found.kept)
        return {"number": self._chosen, "against": None if pair is None else pair[0], **parts}

    def _items(self, rows: NDArray[Any]) -> dict[str, Any]:
        catalog = self.host.session.catalog
        return {
            "n": len(rows),
            "items": [
                {"row": row, "caption": shorten(catalog.caption(row), MAX_CAPTION_CHARS)}
                for row in rows[:N_SHOWN].tolist()
            ],
        }
