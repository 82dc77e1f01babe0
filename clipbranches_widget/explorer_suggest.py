"""The Explorer's panel of suggestions (layer 6): images whose label would teach most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipbranches_widget.explorer_computed import Computed
from clipbranches_widget.explorer_part import Host, Part
from clipbranches_widget.explorer_view import MAX_RULE_CHARS, shorten

if TYPE_CHECKING:
    from clipbranches_widget.result import Result
    from clipbranches_widget.suggest import Suggestions

N_SUGGESTED = 12
MAX_PASSED = 2_000
"""After so many images seen and passed over, the first ones may come again."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What suggestions are asked for: the answer to improve, and the rows shown before."""

    latest: Result | None
    passed: tuple[int, ...] = ()


class SuggestPart(Part):
    """A row of suggestions, which stays as it is until more are asked for or the answer changes."""

    name = "suggest"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._batch = Batch(None)
        self._found = Computed(host, self._suggest, lambda: host.update(self))
        self._shown: Suggestions | None = None

    def state(self) -> dict[str, Any]:
        """Return the suggestions with their reasons, and what they are drawn from.

        Keys: items, basis ("round", "search" or "none"), n_passed (rows shown before, which names
        the batch), is_busy.
        """
        session = self.host.session
        latest = session.result if session.result is not None else session.hits
        if latest is not None and latest.unfiltered is not None:
            latest = latest.unfiltered  # whatever filters hide
        if latest is not self._batch.latest:
            self._batch = Batch(latest)
        found = self._found.get(self._batch)
        if found is not None or not self._found.is_running:
            self._shown = found
        shown = self._shown
        rows_and_reasons = () if shown is None else zip(shown, shown.reasons, strict=True)
        return {
            "items": [
                {
                    "row": row,
                    "caption": shorten(session.catalog.caption(row)),
                    "reason": shorten(reason, MAX_RULE_CHARS),
                }
                for row, reason in rows_and_reasons
            ],
            "basis": {None: "none", "search": "search", "refine": "round"}[
                None if latest is None else latest.kind
            ],
            "n_passed": len(self._batch.passed),
            "is_busy": found is None and self._found.is_running,
        }

    def rows(self) -> list[int]:
        """Return the suggested rows."""
        return [] if self._shown is None else list(self._shown)

    def on_more(self, data: dict[str, Any]) -> None:
        """Ask for other suggestions than those of the batch `n_passed`, and any before."""
        passed = self._batch.passed
        if self._found.is_running or int(data["n_passed"]) != len(passed):
            return  # asked for already
        self._batch = Batch(self._batch.latest, (*passed, *self.rows())[-MAX_PASSED:])
        self.host.update(self)

    def _suggest(self, batch: Batch) -> Suggestions:
        return self.host.session.suggest(N_SUGGESTED, skip=batch.passed)
