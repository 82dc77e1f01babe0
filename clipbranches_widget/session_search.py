"""Searching in a session, and filters on what is shown (layer 5, above `session_advice`)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clipbranches_widget.counts import whole_count
from clipbranches_widget.errors import QueryError
from clipbranches_widget.row_filter import Condition, checked_filters
from clipbranches_widget.search import query_vector
from clipbranches_widget.session_advice import SessionAdvice
from clipbranches_widget.session_events import Event, Query, QueryKind, Search

if TYPE_CHECKING:
    from PIL import Image

    from clipbranches_widget.encoder import Encoder
    from clipbranches_widget.result import Result
    from clipbranches_widget.session_log import Decision
    from clipbranches_widget.session_state import SessionState


class SessionSearch(SessionAdvice):
    """The part of `Session` that searches, and says which rows are shown at all."""

    def search(
        self,
        text: str | None = None,
        *,
        image: str | Path | bytes | Image.Image | None = None,
        vector: ArrayLike | None = None,
        row: int | Iterable[int] | NDArray[Any] | None = None,
        k: int = 60,
    ) -> Result:
        """Find the `k` images nearest to a text, an image, an embedding or other rows.

        A text can hold several phrases: ``beach + sunset^2 -people`` adds up beach and twice
        sunset, and takes people away. A plus or a minus counts only at the start of a word, so
        that *t-shirt* stays one phrase; a phrase goes on to the next sign; ``^`` and a number
        above 0 at its end is its weight, by default 1, for a phrase that is taken away 0.5;
        quotes keep a phrase with signs together, as in ``"c+ -b" + beach``.

        The file keeps the query's embedding: reopening needs neither the image nor the model.
        With filters (see `filter`) the `k` nearest of the rows that match them are found.

        Parameters
        ----------
        text, image, vector, row
            Exactly one: words; an image, its path or its bytes; an embedding of shape (dim,); a
            row id, or several, whose mean is searched for. Only `text` and `row` go together, for
            images like both.
        k
            Number of hits, at most the whole catalog.

        Raises
        ------
        QueryError
            If not exactly one is given, it does not fit the catalog, a phrase or weight is
            missing or wrong, or the phrases cancel each other out.
        EncoderError
            If a text or image is given and the catalog's model cannot be loaded.
        ImageReadError
            If the image cannot be read.
        """
        options: dict[QueryKind, object] = {
            "text": text,
            "image": image,
            "vector": vector,
            "row": row,
        }
        given = [kind for kind, value in options.items() if value is not None]
        encoder = self._query_encoder() if {"text", "image"} & {*given} else None
        found, words = query_vector(
            self._catalog, encoder, text=text, image=image, vector=vector, row=row
        )
        return self._search(Query.of(given[-1], words, found), k)

    def search_again(self, event: Event | int, *, k: int = 60) -> Result:
        """Search for what an earlier search was for; needs neither its image nor the model.

        Parameters
        ----------
        event
            A search of `history`, undone or not, or its id.
        k
            Number of hits, at most the whole catalog.

        Raises
        ------
        QueryError
            If the session has no such search, or k < 1.
        """
        event_id = event.id if isinstance(event, Event) else event
        for known in self._log.latest().events:
            if known.id == event_id and known.action == "search":
                return self._search(Search.from_parameters(known.id, known.parameters).query, k)
        raise QueryError(
            f"expected a search of this session or its event id, got {event!r}: see session.history"
        )

    def filter(self, conditions: Mapping[str, Condition] | None = None) -> int:
        """Show only rows that match all conditions, in every search and round from now on.

        A round learns from the whole catalog as before; rows that do not match are then left out
        of its answer, also those with a label. Counts of `Result.branches`, `audit`, `suggest`
        and `save_concept` are about the whole catalog. One action, which undo takes back; nothing
        happens, and nothing is written, when the conditions are those of now.

        Parameters
        ----------
        conditions
            For each column of ``catalog.items`` what must hold; they replace those of before,
            and none lets every row pass. By the type of the column:

            - text: a text that it contains, upper and lower case alike: ``{"caption": "red"}``;
            - number: ``(min, max)``, both closed, None for an open end: ``{"width": (300, None)}``;
            - date or time: the same with dates, times or their ISO texts; a day counts as a
              whole, without a zone in UTC;
            - true/false: True or False;
            - all but the last: a list of values, any of them: ``{"group": ["animals", "food"]}``.

            Missing values match nothing.

        Returns
        -------
        int
            How many rows of the catalog match.

        Raises
        ------
        QueryError
            If there is no such column, or the condition does not fit its type.
        """
        filters = checked_filters(conditions or {}, self._catalog.item_store.schema)
        n_passing = int(np.count_nonzero(self._results.passing(filters)))

        def decide(state: SessionState) -> Decision | None:
            stored = {"filters": [one.to_dict() for one in filters]}
            return ("filter", stored) if state.filters != filters else None

        self._log.commit(decide)
        return n_passing

    def _search(self, query: Query, k: int) -> Result:
        filters = self._state.filters
        hits = self._results.search(query, whole_count(k, "k"), filters)
        done = Search(0, query, operator.index(k))

        def decide(state: SessionState) -> Decision:
            asked = replace(done, event_id=state.last_id + 1)
            self._results.keep((asked, filters) if filters else asked, hits)
            return "search", done.to_parameters()

        self._log.commit(decide)
        return hits

    def _filtering(
        self, partial: Callable[[Result], None] | None, state: SessionState
    ) -> Callable[[Result], None] | None:
        """Return what takes answers so far and hands on the rows that match the filters."""
        if partial is None or not state.filters:
            return partial
        passing = self._results.passing(state.filters)
        return lambda result: partial(result.filtered(passing))

    def _query_encoder(self) -> Encoder | None:
        is_none = self._encoder is None and self._catalog.encoder_info.kind == "none"
        return None if is_none else self.encoder
