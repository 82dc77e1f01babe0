"""Reading a session (layer 4, above `session_results`): its state, history and observers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipbranches_widget.session_log import SessionLog
from clipbranches_widget.session_results import LazyEncoder, SessionResults

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.encoder import Encoder
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.result import Result
    from clipbranches_widget.session_events import Event, Query, Round, Rule, Search
    from clipbranches_widget.session_state import SessionState


class SessionView:
    """What can be read of a session; `Session` adds the actions.

    Every reading first takes in what other Session objects appended to the file.

    Parameters
    ----------
    catalog
        What is searched.
    log
        The session's events.
    encoder
        In place of loading the catalog's own model.
    """

    def __init__(self, catalog: Catalog, log: SessionLog, encoder: Encoder | None) -> None:
        self._catalog = catalog
        self._log = log
        self._encoder = encoder
        self._results = SessionResults(catalog)

    @property
    def catalog(self) -> Catalog:
        """The catalog that is searched."""
        return self._catalog

    @property
    def path(self) -> Path:
        """The session file; it appears with the first action."""
        return self._log.path

    @property
    def encoder(self) -> Encoder:
        """The catalog's model, loaded when first needed (seconds; this imports torch)."""
        if self._encoder is not None:
            return self._encoder
        return self._catalog.opened("encoder", lambda: LazyEncoder(self._catalog)).get()

    @property
    def labels(self) -> LabelSet:
        """All labels: an immutable set."""
        return self._state.labels

    @property
    def query(self) -> Query | None:
        """The latest search: its kind, words and embedding; None before the first."""
        return self._state.query

    @property
    def query_text(self) -> str:
        """The latest search in words; empty before the first."""
        query = self._state.query
        return "" if query is None else query.text

    @property
    def hits(self) -> Result | None:
        """The latest search's result, under the present `filters`; None before the first."""
        state = self._state
        return None if state.search is None else self._results.hits(state.search, state.filters)

    @property
    def result(self) -> Result | None:
        """The latest round's result, under the present `rules` and `filters`; None before it.

        In a reopened session it is computed again from the recorded labels, query, threshold,
        seed and rules; should it differ from the recorded answer, its `notes` say so.
        """
        state = self._state
        return None if state.asked is None else self._results.answer(state.asked, state.filters)

    @property
    def asked(self) -> tuple[Search | None, Round | None]:
        """What `hits` and `result` answer, whatever the filters."""
        state = self._state
        return state.search, state.asked

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that are switched off or pinned, the latest last: see `Rule.state`."""
        return self._state.rules

    @property
    def filters(self) -> dict[str, Any]:
        """What rows must match to be shown, by column: what `Session.filter` takes."""
        return {one.column: one.condition for one in self._state.filters}

    @property
    def filter_texts(self) -> dict[str, str]:
        """The same in words, such as ``width >= 300``."""
        return {one.column: str(one) for one in self._state.filters}

    @property
    def passing(self) -> NDArray[np.bool_]:
        """Which rows of the catalog match the filters: (n,) bool, read-only; all without any."""
        return self._results.passing(self._state.filters)

    @property
    def is_stale(self) -> bool:
        """Whether labels or query differ from those that `result` was computed from."""
        return self._state.is_stale

    @property
    def can_undo(self) -> bool:
        """Whether `undo` has something to take back."""
        return self._state.latest.event is not None

    @property
    def can_redo(self) -> bool:
        """Whether `redo` has something to do again."""
        return bool(self._state.undone)

    @property
    def history(self) -> list[Event]:
        """Every event, oldest first, undone ones included (see `Event.undone`)."""
        state, events, _ = self._log.latest()
        applied = state.applied_ids()
        return [
            event
            if event.id in applied or event.action in {"undo", "redo"}
            else replace(event, undone=True)
            for event in events
        ]

    def catch_up(self) -> int:
        """Read what other Session objects appended to the file; return how many events."""
        n_before = len(self._log.remembered.events)
        return len(self._log.latest().events) - n_before

    def observe(self, callback: Callable[[str], object]) -> Callable[[], None]:
        """Call `callback` after each action, whoever took it; return a function that stops it.

        The callback gets "search", "label" (also for unlabel), "refine", "switch_off",
        "switch_on", "pin", "unpin", "go_back", "filter", "undo" or "redo", in the thread that
        acted or caught up, with no lock held: read the session for its state.
        Its errors are logged and go no further.
        """
        return self._log.observe(callback)

    def __repr__(self) -> str:
        state = self._log.remembered.state
        query = "no query" if state.query is None else repr(state.query.text)
        labels = f"{state.labels.positive.size} yes / {state.labels.negative.size} no"
        latest = "no round"
        if state.asked is not None:
            is_counted = state.asked is state.round
            latest = f"round: {state.asked.n_rows:,} found" if is_counted else "round: new rules"
        return f"<Session on {self._catalog.path.name}: {query}, {labels}, {latest}, {self.path}>"

    @property
    def _state(self) -> SessionState:
        return self._log.latest().state
