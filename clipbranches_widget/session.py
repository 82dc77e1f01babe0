"""A search session on a catalog (layer 5): query, labels, rounds, undo, history.

Everything is a function of the events in the session file (`session_file`, `session_state`);
searches and rounds are computed from it when they are asked for.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.catalog import Catalog
from clipbranches_widget.errors import Cancelled, RefineError, SessionFileError
from clipbranches_widget.labels import LabelSet, RowIds, as_row_ids
from clipbranches_widget.refine import warm_up
from clipbranches_widget.session_events import Event, Round
from clipbranches_widget.session_labels import SessionLabels, label_decision
from clipbranches_widget.session_log import Decision, open_log
from clipbranches_widget.session_results import digest
from clipbranches_widget.session_state import SessionState

if TYPE_CHECKING:
    from clipbranches_widget.encoder import Encoder
    from clipbranches_widget.query_plan import BoxStrategy
    from clipbranches_widget.result import Result

Rows = int | Iterable[int] | NDArray[Any]


class Session(SessionLabels):
    """Search, label and refine, with every action saved at once.

    Each action is one line of the session file, on the disk before the method returns: a killed
    kernel loses at most the action in flight. Opening the file again restores the session.

    Safe to use from several threads. Several Session objects may share one file, in one kernel
    or many: each sees the other's actions before its own next action or reading, and undo takes
    back the latest action of any of them.

    Parameters
    ----------
    catalog : Catalog
        What to search.
    path : str or Path, optional
        The session file; one that exists is resumed. Default: a new file in the user's data
        folder, made by the first action (see `path`).
    encoder : Encoder, optional
        In place of loading the catalog's own model; it must be that model.

    Raises
    ------
    SessionFileError
        If the file is damaged, belongs to another catalog or cannot be made.
    EncoderError
        If `encoder` is not the catalog's model.
    """

    def __init__(
        self, catalog: Catalog, path: str | Path | None = None, *, encoder: Encoder | None = None
    ) -> None:
        if not isinstance(catalog, Catalog):
            raise TypeError(
                f"expected a Catalog, got {type(catalog).__name__}: "
                "open one with clipbranches_widget.open(path)"
            )
        if encoder is not None:
            catalog.check_encoder(encoder)
        super().__init__(catalog, open_log(catalog, path), encoder)
        self._refining = threading.Lock()
        self._results.start_loading()

    @classmethod
    def open(cls, path: str | Path, catalog: Catalog) -> Session:
        """Resume a session whose file must be there.

        Raises
        ------
        SessionFileError
            If there is none, it is damaged, or it belongs to another catalog.
        """
        if not Path(path).expanduser().is_file():
            raise SessionFileError(
                f"expected a session file at {path}, found none: "
                "Session(catalog, path) starts a new one there"
            )
        return cls(catalog, path)

    def label(self, positive: Rows = (), negative: Rows = ()) -> LabelSet:
        """Mark rows yes and no; a row that has a label takes the new one.

        Nothing happens, and nothing is written, when every row already has that label.

        Parameters
        ----------
        positive, negative
            Row ids: a list, an array, a Result such as ``hits[:5]``, or one integer.

        Returns
        -------
        LabelSet
            All labels of the session.

        Raises
        ------
        LabelError
            If a row is in both, or the rows are not integers.
        QueryError
            If the catalog has no such row.
        """
        added = LabelSet(self._rows(positive), self._rows(negative))

        self._log.commit(lambda state: label_decision(state, added))
        return self.labels

    def unlabel(self, rows: Rows) -> LabelSet:
        """Remove the labels of rows; `unlabel(session.labels.rows)` removes all.

        Nothing happens, and nothing is written, when none of the rows has a label.

        Returns and raises as `label`.
        """
        dropped = self._rows(rows)

        def decide(state: SessionState) -> Decision | None:
            labelled = np.intersect1d(dropped, state.labels.rows)
            return ("unlabel", {"rows": labelled.tolist()}) if labelled.size else None

        self._log.commit(decide)
        return self.labels

    def refine(
        self,
        *,
        threshold: float | None = None,
        seed: int = 0,
        strategy: BoxStrategy | None = None,
        progress: Callable[[str, float], None] | None = None,
        partial: Callable[[Result], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Find every image of the catalog that the labels and the latest query describe.

        Labels can be changed while it runs: the answer belongs to the labels it started with,
        and `is_stale` says that they differ. A second call waits for the first. Rules that are
        switched off or pinned (see `rules`) stay so in every later round. It learns from the
        whole catalog; rows that do not match the session's `filters` are left out of the answer.

        Parameters
        ----------
        threshold
            Lowest score of a match, between 0 and 1; None is the default of `refine`, 0.3.
        seed
            A whole number of at least 0. Same labels, query, threshold, seed and rules: same
            answer.
        strategy
            Force how the column index answers: "bits", "postings" or "scan". The answer is the
            same; ``print(result.plan)`` says which was chosen and why.
        progress
            Called with a stage's name and the fraction done.
        partial
            Called with the answer so far (`Result.is_complete` is False): a first page as soon
            as there is a model to rank by, then more and more rows.
        cancel
            Set it to stop within 100 ms; the session is then as before. With it, `progress` and
            `partial` are called on another thread.

        Raises
        ------
        RefineError
            If there is neither a yes label nor a query, or threshold or seed is out of range.
        QueryError
            If `strategy` is unknown, or needs a part of the column index that is not stored.
        Cancelled
            If `cancel` was set.
        """
        with self._refining:
            start = self._state
            done = Round(
                event_id=0,
                labels=start.labels,
                query=start.query,
                threshold=None if threshold is None else float(threshold),
                seed=_checked_seed(seed),
                catalog_rows=len(self._catalog),
                n_rows=0,
                digest="",
                rules=start.rules,
            )
            try:
                result = self._results.refine(
                    done,
                    strategy=strategy,
                    progress=progress,
                    partial=self._filtering(partial, start),
                    cancel=cancel,
                )
            except Cancelled:
                _ = self._state  # takes in, and tells, what other sessions did meanwhile
                raise
        done = replace(done, n_rows=len(result), digest=digest(result.rows))
        recorded: list[Round] = []

        def decide(state: SessionState) -> Decision:
            if cancel is not None and cancel.is_set():
                raise Cancelled("the round was cancelled: labels and results are as before")
            recorded[:] = [replace(done, event_id=state.last_id + 1)]
            self._results.keep(recorded[0], result)
            return "refine", done.to_parameters()

        self._log.commit(decide)
        return self._results.answer(recorded[0], self._state.filters)

    def warm_up(self) -> None:
        """Load the model and the libraries of a round, so that the first ones do not wait.

        Raises
        ------
        EncoderError
            If the catalog's model cannot be loaded; rounds are ready all the same.
        """
        warm_up()
        if self._catalog.encoder_info.kind != "none":
            _ = self.encoder

    def undo(self) -> str | None:
        """Take back the latest action: a search, label, round, way back, filter, rule's change.

        Returns
        -------
        str or None
            What was taken back, such as ``label 2 yes, 1 no``; None if there is nothing.
        """
        return self._step("undo")

    def redo(self) -> str | None:
        """Do again what the latest undo took back; any new action gives that up.

        Returns
        -------
        str or None
            What was done again; None if there is nothing.
        """
        return self._step("redo")

    def _rows(self, rows: Rows) -> RowIds:
        return self._catalog.check_rows(as_row_ids(rows))

    def _step(self, action: Literal["undo", "redo"]) -> str | None:
        targets: list[Event] = []

        def decide(state: SessionState) -> Decision | None:
            steps = (state.latest,) if action == "undo" else state.undone[-1:]
            targets.extend(step.event for step in steps if step.event is not None)
            return (action, {"of": targets[0].id}) if targets else None

        self._log.commit(decide)
        return targets[0].description if targets else None


def _checked_seed(seed: int) -> int:
    try:
        whole = operator.index(seed)
    except TypeError:
        whole = -1
    if whole < 0:
        raise RefineError(f"expected a seed that is a whole number of at least 0, got {seed!r}")
    return whole
