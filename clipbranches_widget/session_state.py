"""What a session's events mean (layer 3): a pure reducer, `SessionState.apply`. No I/O.

Everything a session knows follows from its list of events. Each event makes a new `Step`, except
that `undo` steps back to the one before, and `redo` forward again; any other event after an undo
drops what could have been redone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import NamedTuple

import numpy as np

from clipbranches_widget.errors import LabelError, SessionFileError
from clipbranches_widget.labels import LabelSet, RowIds, as_row_ids
from clipbranches_widget.row_filter import ColumnFilter
from clipbranches_widget.session_events import (
    RULE_CHANGES,
    Event,
    Query,
    Round,
    Rule,
    Search,
)

N_HITS = 60
"""Hits of a search of which only the query is known."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One event other than undo and redo: where it led, and how to take it back.

    Attributes
    ----------
    event : Event or None
        What led here; None at the start.
    before : Step or None
        Where an undo leads; None at the start.
    search, round : Search, Round or None
        The latest of each.
    rules : tuple of Rule
        Those switched off or pinned, the latest last.
    filters : tuple of ColumnFilter
        What rows must match to be shown; a return to a round does not change them.
    touched : (n,) int64
        Rows that the event labelled or unlabelled.
    old, new : LabelSet
        The labels of those rows before and after it.
    """

    event: Event | None = None
    before: Step | None = field(default=None, repr=False)
    search: Search | None = None
    round: Round | None = None
    rules: tuple[Rule, ...] = ()
    filters: tuple[ColumnFilter, ...] = ()
    touched: RowIds = field(default_factory=lambda: as_row_ids(()))
    old: LabelSet = field(default_factory=LabelSet)
    new: LabelSet = field(default_factory=LabelSet)


class DoneRound(NamedTuple):
    """A round of the file: what it recorded, when, and the step before it."""

    recorded: Round
    at: datetime
    before: Step


@dataclass(frozen=True, slots=True, eq=False)
class SessionState:
    """The result of a list of events: where the session stands, and what can be redone.

    Attributes
    ----------
    labels : LabelSet
        The labels.
    latest : Step
        The latest step that is not undone.
    undone : tuple of Step
        What `redo` leads to: the last one first.
    last_id : int
        Of the latest event; 0 before the first.
    rounds : tuple of DoneRound
        Every round, in the order of the file, also those undone or left behind.

    Examples
    --------
    >>> from datetime import UTC, datetime
    >>> def event(id, action, **parameters):
    ...     return Event(id, datetime.now(UTC), action, parameters)
    >>> state = SessionState().apply(event(1, "label", positive=[12, 40], negative=[7]))
    >>> state = state.apply(event(2, "unlabel", rows=[12]))
    >>> state.labels
    LabelSet(positive=[40], negative=[7])
    >>> state.apply(event(3, "undo", of=2)).labels
    LabelSet(positive=[12, 40], negative=[7])
    """

    labels: LabelSet = field(default_factory=LabelSet)
    latest: Step = field(default_factory=Step)
    undone: tuple[Step, ...] = ()
    last_id: int = 0
    rounds: tuple[DoneRound, ...] = field(default=(), repr=False)

    @property
    def search(self) -> Search | None:
        """The latest search."""
        return self.latest.search

    @property
    def round(self) -> Round | None:
        """The latest round, as it was recorded."""
        return self.latest.round

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules that are switched off or pinned, the latest last."""
        return self.latest.rules

    @property
    def filters(self) -> tuple[ColumnFilter, ...]:
        """What rows must match to be shown."""
        return self.latest.filters

    @property
    def asked(self) -> Round | None:
        """The latest round under the present rules: what the session's result answers."""
        if self.round is None or self.round.rules == self.rules:
            return self.round
        return replace(self.round, rules=self.rules, n_rows=0, digest="")

    @property
    def query(self) -> Query | None:
        """What the latest search was for."""
        return None if self.search is None else self.search.query

    @property
    def is_stale(self) -> bool:
        """Whether labels or query differ from those that the latest round was computed from."""
        return self.round is not None and (
            self.round.labels != self.labels or self.round.query != self.query
        )

    def apply(self, event: Event) -> SessionState:
        """Return the state after one more event.

        Raises
        ------
        SessionFileError
            If the event cannot follow: its id does not grow, its parameters are not those of
            its action, or it undoes or redoes something else than the state would.
        """
        if event.id <= self.last_id:
            raise SessionFileError(f"expected an event id above {self.last_id}, got {event.id}")
        if event.action == "undo":
            return self._undo(event)
        if event.action == "redo":
            return self._redo(event)
        try:
            step = _next_step(self, event)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SessionFileError(
                f"event {event.id} has no valid parameters for {event.action!r}: {error!r}"
            ) from error
        labels = _relabelled(self.labels, step.touched, step.new)
        rounds = self.rounds
        if event.action == "refine" and step.round is not None:
            rounds = (*rounds, DoneRound(step.round, event.at, self.latest))
        return SessionState(labels, step, (), event.id, rounds)

    def applied_ids(self) -> frozenset[int]:
        """Return the ids of the events that the present state is made of."""
        ids, step = set(), self.latest
        while step.event is not None and step.before is not None:
            ids.add(step.event.id)
            step = step.before
        return frozenset(ids)

    def _undo(self, event: Event) -> SessionState:
        target, before = self.latest.event, self.latest.before
        if target is None or before is None or event.parameters.get("of") != target.id:
            present = "nothing" if target is None else f"event {target.id}"
            raise SessionFileError(
                f"event {event.id} undoes event {event.parameters.get('of')}, but {present} is "
                "there to undo: a line before it was lost or changed"
            )
        labels = _relabelled(self.labels, self.latest.touched, self.latest.old)
        undone = (*self.undone, self.latest)
        return replace(self, labels=labels, latest=before, undone=undone, last_id=event.id)

    def _redo(self, event: Event) -> SessionState:
        target = self.undone[-1].event if self.undone else None
        if target is None or event.parameters.get("of") != target.id:
            present = "nothing" if target is None else f"event {target.id}"
            raise SessionFileError(
                f"event {event.id} redoes event {event.parameters.get('of')}, but {present} is "
                "there to redo: a line before it was lost or changed"
            )
        step = self.undone[-1]
        labels = _relabelled(self.labels, step.touched, step.new)
        undone = self.undone[:-1]
        return replace(self, labels=labels, latest=step, undone=undone, last_id=event.id)


def _next_step(state: SessionState, event: Event) -> Step:
    """Return the step that an event other than undo and redo makes."""
    values = event.parameters
    plain = Step(
        event,
        before=state.latest,
        search=state.search,
        round=state.round,
        rules=state.rules,
        filters=state.filters,
    )
    if event.action == "search":
        return replace(plain, search=Search.from_parameters(event.id, values))
    if event.action == "refine":
        return replace(plain, round=Round.from_parameters(event.id, values))
    if event.action in RULE_CHANGES:
        return replace(plain, rules=_changed_rules(state.rules, event))
    if event.action == "filter":
        return replace(plain, filters=tuple(map(ColumnFilter.from_dict, values["filters"])))
    if event.action == "go_back":
        event_id, _for_people = int(values["to"]), int(values["number"])
        return _step_back(state, plain, event_id)
    return _step_of_labels(state, plain, event)


def _step_of_labels(state: SessionState, plain: Step, event: Event) -> Step:
    """Return the step that labels or unlabels rows."""
    values = event.parameters
    if event.action == "label":
        new = LabelSet(_listed(values["positive"]), _listed(values["negative"]))
        return replace(plain, touched=new.rows, old=state.labels.among(new.rows), new=new)
    rows = _listed(values["rows"])
    old = state.labels.among(rows)
    if len(old) != rows.size:
        raise LabelError(f"expected labelled rows to unlabel, got {rows.tolist()}")
    return replace(plain, touched=rows, old=old)


def _step_back(state: SessionState, plain: Step, event_id: int) -> Step:
    """Return the step that sets everything to what a round was computed from.

    That is what the round recorded: labels, search and rules may have changed while it ran.
    """
    done = next((done for done in state.rounds if done.recorded.event_id == event_id), None)
    if done is None:
        raise ValueError(f"event {event_id} is no round before it")
    return replace(
        plain,
        search=_search_of(done),
        round=done.recorded,
        rules=done.recorded.rules,
        touched=as_row_ids(np.union1d(state.labels.rows, done.recorded.labels.rows)),
        old=state.labels,
        new=done.recorded.labels,
    )


def _search_of(done: DoneRound) -> Search | None:
    """Return the search whose query a round was computed from: the latest before it."""
    query, step = done.recorded.query, done.before
    if query is None:
        return None
    while step.search is None or step.search.query != query:
        if step.before is None:  # it was undone while the round ran
            return Search(done.recorded.event_id, query, N_HITS)
        step = step.before
    return step.search


def _changed_rules(rules: tuple[Rule, ...], event: Event) -> tuple[Rule, ...]:
    """Return the rules after one of them was switched or pinned."""
    changed = Rule.from_dict(event.parameters["rule"])
    state, possible = RULE_CHANGES[event.action]
    before = next((rule.state for rule in rules if rule.is_same(changed)), "on")
    if changed.state != state or before not in possible:
        raise ValueError(f"a rule that was {before} cannot become {changed.state} by it")
    others = tuple(rule for rule in rules if not rule.is_same(changed))
    return others if state == "on" else (*others, changed)


def _relabelled(labels: LabelSet, rows: RowIds, new: LabelSet) -> LabelSet:
    """Give `rows` their labels in `new`, or none."""
    if not rows.size:
        return labels
    return labels.without(rows).with_labels(new.positive, new.negative)


def _listed(rows: object) -> RowIds:
    """Read row ids of a record, where they can only be a list."""
    if not isinstance(rows, list):
        raise TypeError(f"expected a list of rows, got {rows!r}")
    return as_row_ids(rows)
