"""Switching rules of a session off and on, and pinning them (layer 4, above `session_view`)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from clipbranches_widget.branch import Branch
from clipbranches_widget.errors import RefineError
from clipbranches_widget.session_events import RULE_CHANGES, Action, Event, Rule
from clipbranches_widget.session_view import SessionView

if TYPE_CHECKING:
    from clipbranches_widget.result import Result
    from clipbranches_widget.session_log import Decision
    from clipbranches_widget.session_state import SessionState


class SessionRules(SessionView):
    """The part of `Session` that is about the rules of its rounds.

    Each method takes a `Branch` of a result, its id in the latest result's `branches`, or a
    `Rule` of the session; is one action that undo takes back; and returns the latest result under
    the new rules (None without a round), computed anew from the same labels, query and seed.
    Nothing happens, and nothing is written, when the rule is in that state already. Each raises
    RefineError if there is no such branch, or if it is not a rule: the rows near the examples
    and those labelled yes are single images.
    """

    def switch_off(self, branch: Branch | Rule | int) -> Result | None:
        """Leave a rule out, and the rows that only switched-off rules hold, from now on.

        Rows inside it that another rule holds, or that are labelled yes, stay in the answer. The
        branch stays listed in `Result.branches`, in its place, with the state "off".
        """
        return self._change("switch_off", branch)

    def switch_on(self, branch: Branch | Rule | int) -> Result | None:
        """Take back that a rule was switched off."""
        return self._change("switch_on", branch)

    def pin(self, branch: Branch | Rule | int) -> Result | None:
        """Keep a rule in every later round, whatever that one learns; switches it on.

        The rows inside are scored as all candidates are: those below the threshold are no match.
        """
        return self._change("pin", branch)

    def unpin(self, branch: Branch | Rule | int) -> Result | None:
        """Take back that a rule was pinned: later rounds hold it only if they choose it."""
        return self._change("unpin", branch)

    def _change(self, action: Action, branch: Branch | Rule | int) -> Result | None:
        rule = self._rule(branch)
        state, possible = RULE_CHANGES[action]

        def decide(session: SessionState) -> Decision | None:
            before = next((each.state for each in session.rules if each.is_same(rule)), "on")
            changed = {"rule": replace(rule, state=state).to_dict()}
            return (action, changed) if before in possible else None

        self._commit_answered(decide)
        return self.result

    def _commit_answered(self, decide: Callable[[SessionState], Decision | None]) -> None:
        """Commit an event whose result is computed first, so that no observer waits for it."""
        state = self._state
        if (decision := decide(state)) is None:
            return
        ahead = state.apply(Event(state.last_id + 1, datetime.now(UTC), *decision))
        if ahead.asked is not None:
            self._results.answer(ahead.asked, ahead.filters)
        self._log.commit(decide)

    def _rule(self, branch: Branch | Rule | int) -> Rule:
        """Return the rule that a caller means."""
        if isinstance(branch, Rule):
            return branch
        if isinstance(branch, Branch):
            return self._results.rule(branch)
        result = self.result
        if result is None:
            raise RefineError("expected a round before its rules are changed: call refine() first")
        try:
            number = operator.index(branch)
        except TypeError as error:
            raise RefineError(
                f"expected a branch, a rule or the id of a branch, got {branch!r}: "
                "see session.result.branches and session.rules"
            ) from error
        if not 0 <= number < len(result.branches):
            raise RefineError(
                f"expected the id of one of the {len(result.branches)} branches, from 0, got "
                f"{number}: see session.result.branches"
            )
        return self._results.rule(result.branches[number])
