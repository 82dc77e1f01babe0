"""The Explorer's panel of rules (layer 6)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipbranches_widget.explorer_part import Part
from clipbranches_widget.explorer_view import MAX_RULE_CHARS, shorten

if TYPE_CHECKING:
    from clipbranches_widget.result import Result


class RulesPart(Part):
    """The rules that found the matches."""

    name = "rules"

    def state(self) -> dict[str, Any]:
        """Return the rules of the latest round."""
        return {"branches": branch_view(self.host.contents.result)}


def branch_view(result: Result | None) -> list[dict[str, Any]]:
    """Return the rules of the latest round with their counts, in branch order."""
    if result is None:
        return []
    return [
        {
            "id": branch.id,
            "text": shorten(branch.text, MAX_RULE_CHARS),
            "n_rows": branch.n_rows,
            "n_yes": branch.n_positive,
            "n_no": branch.n_negative,
        }
        for branch in result.branches
    ]
