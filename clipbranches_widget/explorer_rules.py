"""The Explorer's panel of rules (layer 6): which found the matches, switched and pinned there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import QueryError
from clipbranches_widget.explorer_part import Host, Part
from clipbranches_widget.explorer_view import MAX_RULE_CHARS, Extra, shorten
from clipbranches_widget.kept_threads import start

if TYPE_CHECKING:
    from clipbranches_widget.branch import Branch
    from clipbranches_widget.explorer_view import Contents
    from clipbranches_widget.result import Result

TAB = "rule"
MAX_QUERY_CHARS = 4_000
"""Longest SQL or pandas text sent to the browser; those of single images can be far longer."""

MAX_EXAMPLE_CHARS = 80
CHANGES = ("switch_off", "switch_on", "pin", "unpin")


class RulesPart(Part):
    """The rules that found the matches.

    Changes are done one after the other, off the ui lane: unlike jobs of `Host.work`, none is
    dropped for a later one, and a running round goes on.
    """

    name = "rules"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._wishes: deque[Callable[[], object]] = deque()
        self._is_changing = False
        self._only = ""
        self._n_failed = 0
        self._seen: tuple[Result | None, list[dict[str, Any]]] = (None, [])

    def adjust(self, contents: Contents) -> Contents:
        """Add a tab with the matches of one rule, while it is shown alone and still there."""
        if not self._only:
            return contents
        branch = _by_key(contents.result, self._only)
        if contents.result is None or branch is None:
            self._only = ""
            return contents
        part = matches_of(contents.result, branch.id)
        text = f"R{branch.id + 1}"
        extra = Extra(f"Only {text}", f"found by rule {text}", self.name, part)
        return contents.with_tab(TAB, part.rows, extra)

    def state(self) -> dict[str, Any]:
        """Return the rules of the latest round, and what becomes of the wishes for them.

        Keys: branches (see `branch_view`), only (key of the rule shown alone, or empty), n_failed
        (changes that went wrong so far: their wishes are void).
        """
        result = self._complete()
        if self._seen[0] is not result:
            self._seen = result, branch_view(result)
        return {"branches": self._seen[1], "only": self._only, "n_failed": self._n_failed}

    def rows(self) -> list[int]:
        """Return the example rows."""
        return [item["row"] for branch in self._seen[1] for item in branch["examples"]]

    def on_change(self, data: dict[str, Any]) -> None:
        """Switch a rule, named by its key, off or on, pin or unpin it."""
        action, branch = str(data["action"]), self._branch(data)
        if action not in CHANGES:
            raise QueryError(f"expected one of {', '.join(CHANGES)}, got {action!r}")
        change = getattr(self.host.session, action)
        self._wishes.append(lambda: change(branch))
        self._change_next()

    def on_only(self, data: dict[str, Any]) -> None:
        """Show only the matches whose main rule is the one with a key."""
        self._only = key_of(self._branch(data))
        self.host.refresh(TAB)

    def on_close_tab(self, _data: dict[str, Any]) -> None:
        """Show the matches of every rule again."""
        self._only = ""
        self.host.refresh("result" if self.host.place.tab == TAB else None)

    def _complete(self) -> Result | None:
        """Return the result, the one before it while a round is still running."""
        result = self.host.contents.result
        return result if result is None or result.is_complete else self._seen[0]

    def _branch(self, data: dict[str, Any]) -> Branch:
        """Return the branch that the browser means, whatever its place in the list is by now."""
        branch = _by_key(self._complete(), str(data["key"]))
        if branch is None:
            raise QueryError(
                "expected a rule of the latest round, got one that is no longer listed: choose "
                "one of those shown"
            )
        return branch

    def _change_next(self) -> None:
        if self._is_changing or not self._wishes:
            return
        self._is_changing = True
        future = start("explorer-rules", self._wishes.popleft())
        future.add_done_callback(lambda done: self.host.post(self._changed, done))

    def _changed(self, done: Future[object]) -> None:
        self._is_changing = False
        self._n_failed += done.exception() is not None
        self._change_next()
        self.host.update(self)
        done.result()


def branch_view(result: Result | None) -> list[dict[str, Any]]:
    """Return the rules of a round, in branch order.

    Keys: id, key (stays the same from round to round), text, state, is_rule (False for the
    sources that are single images), n_rows (in the catalog), n_matches (of the answer, by main
    rule), n_yes, n_no, examples (row and caption), sql and pandas (empty where too long).
    """
    if result is None:
        return []
    known = result.branch_ids[result.branch_ids >= 0]
    n_matches = np.bincount(known, minlength=len(result.branches))
    return [
        {
            "id": branch.id,
            "key": key_of(branch),
            "text": shorten(branch.text, MAX_RULE_CHARS),
            "state": branch.state,
            "is_rule": branch.box is not None,
            "n_rows": branch.n_rows,
            "n_matches": int(n_matches[branch.id]),
            "n_yes": branch.n_positive,
            "n_no": branch.n_negative,
            "examples": [
                {"row": row, "caption": shorten(result.catalog.caption(row), MAX_EXAMPLE_CHARS)}
                for row in branch.example_rows
            ],
            "sql": _whole(branch.to_sql()),
            "pandas": _whole(branch.to_pandas_query()),
        }
        for branch in result.branches
    ]


def key_of(branch: Branch) -> str:
    """Return what a branch is called whatever its place in a list: its ranges, else its text.

    Examples
    --------
    >>> from clipbranches_widget.boxes import LeafBox
    >>> from clipbranches_widget.branch import Branch
    >>> key_of(Branch(4, "bird >= 0.3", 9, 0, 0, box=LeafBox.from_bounds({3: (8, 256)})))
    '3:8-256'
    """
    if branch.box is None:
        return branch.text
    ranges = " ".join(f"{column}:{low}-{high}" for column, low, high in branch.box.ranges)
    return ranges or branch.text


def matches_of(result: Result, branch_id: int) -> Result:
    """Return the part of an answer whose main rule is one branch, in the same order."""
    is_found = result.branch_ids == branch_id
    return replace(
        result,
        rows=result.rows[is_found],
        scores=result.scores[is_found],
        margins=result.margins[is_found],
        branch_ids=result.branch_ids[is_found],
    )


def _by_key(result: Result | None, key: str) -> Branch | None:
    branches = () if result is None else result.branches
    return next((branch for branch in branches if key_of(branch) == key), None)


def _whole(text: str) -> str:
    return text if len(text) <= MAX_QUERY_CHARS else ""
