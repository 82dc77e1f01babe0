"""The rounds of a session: what each found, how two differ, going back (above `session_rules`)."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.errors import RefineError
from clipbranches_widget.refine import DEFAULT_THRESHOLD
from clipbranches_widget.session_rules import SessionRules

if TYPE_CHECKING:
    from clipbranches_widget.result import Result
    from clipbranches_widget.session_events import Round, Rule
    from clipbranches_widget.session_log import Decision
    from clipbranches_widget.session_state import DoneRound, SessionState


@dataclass(frozen=True, slots=True)
class PastRound:
    """One round of a session, as its file records it.

    Attributes
    ----------
    number : int
        From 1, in the order of the file; stays for ever.
    event_id : int
        Of its event in `Session.history`.
    at : datetime
        When it was done, UTC.
    parent : int or None
        Number of the round before it in its own line: the latest one at that time, which after
        `Session.go_back` is the one gone back to. None for a first round.
    query_text : str
        What was searched for; empty where nothing was.
    n_yes, n_no : int
        Labels it learned from.
    rules : tuple of Rule
        Those that were switched off or pinned.
    n_rows : int
        Images it found, when it was done.
    threshold : float
        Lowest score of a match.
    seed : int
        Of the round.
    is_current : bool
        Whether it is the round that the session stands on.
    undone : bool
        Whether it was undone, or done on a line that undo gave up. It can be gone back to.
    """

    number: int
    event_id: int
    at: datetime
    parent: int | None
    query_text: str
    n_yes: int
    n_no: int
    rules: tuple[Rule, ...]
    n_rows: int
    threshold: float
    seed: int
    is_current: bool
    undone: bool

    def __str__(self) -> str:
        """Return the round on one line."""
        about = f" for {self.query_text!r}" if self.query_text else ""
        marks = [name for name in ("is_current", "undone") if getattr(self, name)]
        more = "".join(f", {mark.removeprefix('is_')}" for mark in marks)
        labels = f"{self.n_yes} yes, {self.n_no} no"
        return f"round {self.number}{about}: {self.n_rows:,} found from {labels}{more}"


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """How the answers of two rounds differ.

    Attributes
    ----------
    before, after : int
        Their numbers.
    gained : (m,) int64
        Rows that only `after` found, in its order.
    lost : (n,) int64
        Rows that only `before` found, in its order.
    kept : (k,) int64
        Rows that both found, in the order of `after`.
    """

    before: int
    after: int
    gained: NDArray[np.int64]
    lost: NDArray[np.int64]
    kept: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        before: int,
        after: int,
        rows_before: NDArray[np.int64],
        rows_after: NDArray[np.int64],
    ) -> Comparison:
        """Compare ranked rows, (p,) and (q,): `O((p + q) log (p + q))`.

        Examples
        --------
        >>> Comparison.of(1, 2, np.array([7, 3, 5]), np.array([5, 9, 7]))
        <Comparison of rounds 1 and 2: 1 gained, 1 lost, 2 kept>
        """
        is_kept = np.isin(rows_after, rows_before)
        lost = rows_before[~np.isin(rows_before, rows_after)]
        return cls(before, after, rows_after[~is_kept], lost, rows_after[is_kept])

    def __repr__(self) -> str:
        """Return one line with the counts."""
        counts = f"{len(self.gained):,} gained, {len(self.lost):,} lost, {len(self.kept):,} kept"
        return f"<Comparison of rounds {self.before} and {self.after}: {counts}>"


class SessionRounds(SessionRules):
    """The part of `Session` that is about its rounds.

    Rounds are numbered from 1 in the order of the file. None is ever deleted: those undone, or
    left behind by going back, keep their number and can be compared and gone back to.
    """

    @property
    def rounds(self) -> tuple[PastRound, ...]:
        """Every round, oldest first, those undone or left behind included."""
        state = self._state
        applied = state.applied_ids()
        numbers = {done.recorded.event_id: n for n, done in enumerate(state.rounds, start=1)}
        return tuple(_past_round(state, done, numbers, applied) for done in state.rounds)

    def round(self, number: int) -> Result:
        """Return the answer of a round, under the rules it was done with, whatever the filters.

        Computed again from what the file records, where it is no longer in memory; should it
        then differ from the recorded answer, its `notes` say so.

        Parameters
        ----------
        number
            As in `rounds`.

        Raises
        ------
        RefineError
            If there is no such round.
        """
        state = self._state
        result = self._results.answer(_done(state, number).recorded)
        self._results.touch((state.search, state.asked), state.filters)
        return result

    def compare(self, before: int, after: int) -> Comparison:
        """Return which rows one round gained and lost against another, whatever the filters.

        Parameters
        ----------
        before, after
            Numbers as in `rounds`, in either order.

        Raises
        ------
        RefineError
            If there is no such round.
        """
        state = self._state
        asked = [_done(state, number).recorded for number in (before, after)]
        rows = [self._results.rows(each) for each in asked]
        return Comparison.of(operator.index(before), operator.index(after), *rows)

    def go_back(self, number: int) -> Result:
        """Set labels, search, rules and result to those of a round; go on from there.

        One action, which undo takes back. Rounds done since stay in `rounds`, and the next one
        branches off from this; filters stay as they are. Nothing happens, and nothing is
        written, when the session is there already.

        Parameters
        ----------
        number
            As in `rounds`; also one that was undone.

        Returns
        -------
        Result
            The round's answer, under the present filters.

        Raises
        ------
        RefineError
            If there is no such round.
        """
        recorded = _done(self._state, number).recorded

        def decide(state: SessionState) -> Decision | None:
            to = {"to": recorded.event_id, "number": operator.index(number)}
            return None if _stands_on(state, recorded) else ("go_back", to)

        self._commit_answered(decide)
        return self._results.answer(recorded, self._state.filters)


def _done(state: SessionState, number: int) -> DoneRound:
    """Return a round by its number."""
    n_rounds = len(state.rounds)
    if not n_rounds:
        raise RefineError(f"expected a session with rounds, got round {number!r}: refine() first")
    try:
        wanted = operator.index(number)
    except TypeError:
        wanted = 0
    if not 1 <= wanted <= n_rounds:
        raise RefineError(
            f"expected the number of a round from 1 to {n_rounds}, got {number!r}: "
            "see session.rounds"
        )
    return state.rounds[wanted - 1]


def _stands_on(state: SessionState, recorded: Round) -> bool:
    """Return whether going back to a round would change nothing."""
    return state.asked is recorded and not state.is_stale


def _past_round(
    state: SessionState, done: DoneRound, numbers: dict[int, int], applied: frozenset[int]
) -> PastRound:
    recorded, before = done.recorded, done.before.round
    return PastRound(
        number=numbers[recorded.event_id],
        event_id=recorded.event_id,
        at=done.at,
        parent=None if before is None else numbers[before.event_id],
        query_text="" if recorded.query is None else recorded.query.text,
        n_yes=len(recorded.labels.positive),
        n_no=len(recorded.labels.negative),
        rules=recorded.rules,
        n_rows=recorded.n_rows,
        threshold=DEFAULT_THRESHOLD if recorded.threshold is None else recorded.threshold,
        seed=recorded.seed,
        is_current=state.round is recorded,
        undone=recorded.event_id not in applied,
    )
