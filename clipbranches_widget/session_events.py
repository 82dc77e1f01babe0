"""What can happen in a session (layer 2): events, and the searches and rounds they record.

All are frozen values with a plain JSON form, which is what the session file holds. No I/O.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.conditions import RuleState
from clipbranches_widget.errors import SessionFileError
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.row_filter import ColumnFilter

if TYPE_CHECKING:
    from numpy.typing import NDArray

Action = Literal[
    "search",
    "label",
    "unlabel",
    "refine",
    "switch_off",
    "switch_on",
    "pin",
    "unpin",
    "go_back",
    "filter",
    "undo",
    "redo",
]
RULE_CHANGES: Mapping[str, tuple[RuleState, tuple[RuleState, ...]]] = {
    "switch_off": ("off", ("on", "pinned")),
    "switch_on": ("on", ("off",)),
    "pin": ("pinned", ("on", "off")),
    "unpin": ("on", ("pinned",)),
}
"""For each action on a rule: the state it leads to, and those it can start from."""
_WORDS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "search": lambda values: f"search {values['query']['text']!r}",
    "label": lambda values: f"label {len(values['positive'])} yes, {len(values['negative'])} no",
    "unlabel": lambda values: f"unlabel {len(values['rows'])}",
    "refine": lambda values: f"refine, {values['n_rows']} found",
    "go_back": lambda values: f"go back to round {values['number']}",
    "filter": lambda values: f"filter {_filters_in_words(values['filters'])}",
    "undo": lambda values: f"undo of {values['of']}",
    "redo": lambda values: f"redo of {values['of']}",
}
QueryKind = Literal["text", "image", "vector", "row"]
_STORED_VECTOR = np.dtype("<f4")


def _filters_in_words(stored: Sequence[Mapping[str, Any]]) -> str:
    return " and ".join(str(ColumnFilter.from_dict(one)) for one in stored) or "off"


@dataclass(frozen=True, slots=True, repr=False)
class Event:
    """One action on a session.

    Attributes
    ----------
    id : int
        Grows with every event of a session, from 1.
    at : datetime
        When it happened, UTC.
    action : str
        search, label, unlabel, refine, switch_off, switch_on, pin, unpin, go_back, filter, undo
        or redo.
    parameters : mapping
        What the session file holds of it, plain JSON values; embeddings are base64 float32.
    undone : bool
        Whether the session's present state is without it.
    """

    id: int
    at: datetime
    action: Action
    parameters: Mapping[str, Any] = field(hash=False)
    undone: bool = False

    @property
    def description(self) -> str:
        """Say what was done, in a few words."""
        if self.action in RULE_CHANGES:
            return f"{self.action.replace('_', ' ')} {self.parameters['rule']['text']!r}"
        return _WORDS[self.action](self.parameters)

    def to_record(self) -> dict[str, Any]:
        """Return the JSON object of the session file."""
        at = self.at.isoformat(timespec="milliseconds")
        return {"id": self.id, "at": at, "action": self.action, **self.parameters}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Event:
        """Read what `to_record` wrote.

        Raises
        ------
        SessionFileError
            If the record has no id, time or known action.
        """
        parameters = dict(record)
        try:
            event_id, at = int(parameters.pop("id")), datetime.fromisoformat(parameters.pop("at"))
            action = parameters.pop("action")
        except (KeyError, TypeError, ValueError) as error:
            raise SessionFileError(
                f"expected an event with id, at and action, got {error!r}"
            ) from error
        if action not in get_args(Action):
            raise SessionFileError(
                f"expected one of the actions {', '.join(get_args(Action))}, got {action!r}: "
                "was it written by a newer release? upgrade this package"
            )
        return cls(event_id, at, action, parameters)

    def __repr__(self) -> str:
        undone = " (undone)" if self.undone else ""
        return f"<Event {self.id} {self.at:%Y-%m-%d %H:%M:%S} {self.description}{undone}>"


@dataclass(frozen=True, slots=True)
class Query:
    """What was searched for: words for people, the embedding for the index.

    Attributes
    ----------
    kind : str
        text, image, vector or row.
    text : str
        The text itself, or words for the image, vector or row.
    data : bytes
        The embedding, (dim,) float32 little-endian: `vector` as an array.
    """

    kind: QueryKind
    text: str
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, kind: QueryKind, text: str, vector: NDArray[np.float32]) -> Query:
        """Make a query from its embedding, shape (dim,)."""
        return cls(kind, text, np.asarray(vector, _STORED_VECTOR).tobytes())

    @property
    def vector(self) -> NDArray[np.float32]:
        """The embedding: shape (dim,), float32, read-only."""
        return np.frombuffer(self.data, _STORED_VECTOR).astype(np.float32, copy=False)

    def to_dict(self) -> dict[str, str]:
        """Return the JSON object of the session file."""
        vector = base64.b64encode(self.data).decode("ascii")
        return {"kind": self.kind, "text": self.text, "vector": vector}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Query:
        """Read what `to_dict` wrote; KeyError, TypeError or ValueError if it is not that."""
        kind, text = stored["kind"], stored["text"]
        data = base64.b64decode(stored["vector"], validate=True)
        if kind not in get_args(QueryKind) or not isinstance(text, str) or len(data) % 4:
            raise ValueError(f"no such query: {kind!r}, {text!r}, {len(data)} bytes")
        return cls(kind, text, data)


@dataclass(frozen=True, slots=True)
class Search:
    """A search: its hits are the `k` rows nearest to the query."""

    event_id: int
    query: Query
    k: int

    def to_parameters(self) -> dict[str, Any]:
        """Return the event's parameters."""
        return {"query": self.query.to_dict(), "k": self.k}

    @classmethod
    def from_parameters(cls, event_id: int, stored: Mapping[str, Any]) -> Search:
        """Read what `to_parameters` wrote; KeyError, TypeError or ValueError if it is not that."""
        return cls(event_id, Query.from_dict(stored["query"]), int(stored["k"]))


@dataclass(frozen=True, slots=True)
class Rule:
    """A box that the user switched off or pinned.

    Attributes
    ----------
    box : LeafBox
        Its ranges alone: a box of another round with the same ranges is the same rule.
    text : str
        The rule in words.
    columns : str
        Hash of the column model that the ranges belong to.
    state : str
        off or pinned; "on" only on its way out of the session's rules.
    """

    box: LeafBox
    text: str
    columns: str
    state: RuleState = "on"

    @classmethod
    def of(cls, box: LeafBox, text: str, columns: str) -> Rule:
        """Make a rule of a box, whatever tree it is from."""
        return cls(LeafBox(box.ranges), text, columns)

    def is_same(self, other: Rule) -> bool:
        """Return whether both are about the same box, in whatever state."""
        return (self.box.ranges, self.columns) == (other.box.ranges, other.columns)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the session file."""
        ranges = [list(each) for each in self.box.ranges]
        return {"ranges": ranges, "text": self.text, "columns": self.columns, "state": self.state}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Rule:
        """Read what `to_dict` wrote; KeyError, TypeError or ValueError if it is not that."""
        ranges = [(int(column), int(low), int(high)) for column, low, high in stored["ranges"]]
        box = LeafBox.from_bounds({column: (low, high) for column, low, high in ranges})
        state, text, columns = stored["state"], stored["text"], stored["columns"]
        if len(box.ranges) != len(ranges) or any(column < 0 for column, _, _ in ranges):
            raise ValueError(f"no such ranges: {stored['ranges']!r}")
        if state not in get_args(RuleState) or not isinstance(text, str):
            raise ValueError(f"no such rule: {state!r}, {text!r}")
        return cls(box, text, str(columns), state)

    def __str__(self) -> str:
        """Return the rule and its state, on one line."""
        return f"{self.text} ({self.state})"


@dataclass(frozen=True, slots=True)
class Round:
    """A refinement: all it was computed from, and how to recognise its answer.

    Attributes
    ----------
    event_id : int
        Of the event that made it.
    labels, query, threshold, seed
        What it was computed from; the labels and query may since have changed.
    catalog_rows : int
        Length of the catalog at that time.
    n_rows : int
        Rows found.
    digest : str
        Of the ranked row ids; empty where they are not recorded.
    rules : tuple of Rule
        Those switched off or pinned.
    """

    event_id: int
    labels: LabelSet
    query: Query | None
    threshold: float | None
    seed: int
    catalog_rows: int
    n_rows: int
    digest: str
    rules: tuple[Rule, ...] = ()

    def to_parameters(self) -> dict[str, Any]:
        """Return the event's parameters; those of rounds without rules name none."""
        rules = {"rules": [rule.to_dict() for rule in self.rules]} if self.rules else {}
        return {
            "labels": self.labels.to_dict(),
            "query": None if self.query is None else self.query.to_dict(),
            "threshold": self.threshold,
            "seed": self.seed,
            "catalog_rows": self.catalog_rows,
            "n_rows": self.n_rows,
            "digest": self.digest,
            **rules,
        }

    @classmethod
    def from_parameters(cls, event_id: int, stored: Mapping[str, Any]) -> Round:
        """Read what `to_parameters` wrote; KeyError, TypeError or ValueError if it is not that."""
        threshold = None if stored["threshold"] is None else float(stored["threshold"])
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold {threshold} is not finite")
        return cls(
            event_id=event_id,
            labels=LabelSet.from_dict(stored["labels"]),
            query=None if stored["query"] is None else Query.from_dict(stored["query"]),
            threshold=threshold,
            seed=int(stored["seed"]),
            catalog_rows=int(stored["catalog_rows"]),
            n_rows=int(stored["n_rows"]),
            digest=str(stored["digest"]),
            rules=tuple(Rule.from_dict(rule) for rule in stored.get("rules", ())),
        )
