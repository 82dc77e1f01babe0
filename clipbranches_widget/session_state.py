"""What a session's events mean (layer 3): a pure reducer, `SessionState.apply`. No I/O.

Everything a session knows follows from its list of events. Each event makes a new `Step`, except
that `undo` steps back to the one before, and `redo` forward again; any other event after an undo
drops what could have been redone.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from clipbranches_widget.errors import LabelError, SessionFileError
from clipbranches_widget.labels import LabelSet, RowIds, as_row_ids
from clipbranches_widget.session_events import (
    RULE_CHANGES,
    Event,
    Query,
    Round,
    Rule,
    Search,
)


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
    touched: RowIds = field(default_factory=lambda: as_row_ids(()))
    old: LabelSet = field(default_factory=LabelSet)
    new: LabelSet = field(default_factory=LabelSet)


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
        return SessionState(labels, step, (), event.id)

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
        return SessionState(labels, before, (*self.undone, self.latest), event.id)

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
        return SessionState(labels, step, self.undone[:-1], event.id)


def _next_step(state: SessionState, event: Event) -> Step:
    """Return the step that an event other than undo and redo makes."""
    values = event.parameters
    plain = Step(
        event, before=state.latest, search=state.search, round=state.round, rules=state.rules
    )
    if event.action == "search":
        return replace(plain, search=Search.from_parameters(event.id, values))
    if event.action == "refine":
        return replace(plain, round=Round.from_parameters(event.id, values))
    if event.action in RULE_CHANGES:
        return replace(plain, rules=_changed_rules(state.rules, event))
    if event.action == "label":
        new = LabelSet(_listed(values["positive"]), _listed(values["negative"]))
        return replace(plain, touched=new.rows, old=state.labels.among(new.rows), new=new)
    rows = _listed(values["rows"])
    old = state.labels.among(rows)
    if len(old) != rows.size:
        raise LabelError(f"expected labelled rows to unlabel, got {rows.tolist()}")
    return replace(plain, touched=rows, old=old)


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
