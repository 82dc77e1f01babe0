"""The Explorer's query bar (layer 6)."""

from __future__ import annotations

from typing import Any

from clipbranches_widget.explorer_part import Part, Progress

N_HITS = 600
"""Nearest images a search from the widget asks for: ten pages."""


class QueryPart(Part):
    """The query bar: search by words."""

    name = "query"
    is_docked = False

    def state(self) -> dict[str, Any]:
        """Return the latest search: text."""
        return {"text": self.host.session.query_text[:2000]}

    def on_search(self, data: dict[str, Any]) -> None:
        """Search by text; a later search outdates this one, and a running round is cancelled."""
        text, session = str(data.get("text", "")), self.host.session

        def search(_progress: Progress, is_stale: Any) -> None:
            if not is_stale():
                session.search(text, k=min(N_HITS, len(session.catalog)))

        self.host.work("search", "Searching", search)
