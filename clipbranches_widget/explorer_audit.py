"""The Explorer's panel of the audit (layer 6): a random sample to label, and what it tells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from clipbranches_widget.audit import STRATA
from clipbranches_widget.errors import QueryError
from clipbranches_widget.explorer_computed import Computed
from clipbranches_widget.explorer_part import Host, Part
from clipbranches_widget.explorer_view import shorten
from clipbranches_widget.session_results import digest

if TYPE_CHECKING:
    from clipbranches_widget.audit import Audit
    from clipbranches_widget.audit_report import AuditReport
    from clipbranches_widget.intervals import Estimate
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.result import Result

SIZES = (30, 60, 120)
MAX_ROWS = 400
"""Most images of one audit in the widget."""


@dataclass(frozen=True, slots=True)
class Order:
    """An audit that was asked for: how many images; `number` tells orders apart."""

    number: int
    n: int


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """An audit, and the answer that it is about."""

    audit: Audit
    answer: Result


class AuditPart(Part):
    """An audit of the answer, image by image, and its report after every label.

    The labels are the session's. An image that is skipped stays without a label, which
    `Audit.report` accounts for: its limits hold whether it is a match or not.
    """

    name = "audit"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._order: Order | None = None
        self._drawing = Computed(host, self._draw, self._begin)
        self._drawn: Drawn | None = None
        self._skipped: set[int] = set()
        self._report = self._new_report()
        self._digest: tuple[Result | None, str] = (None, "")

    def state(self) -> dict[str, Any]:
        """Return the audit, or what one would be about.

        Keys: sizes, n_answer and threshold of the present answer (None without one), is_filtered
        (whether filters hide some of it: an audit is of all of it), is_busy;
        with an audit also items, skipped (rows), about (n_rows and threshold of the answer
        audited), is_former (whether that is not the present answer), report (None until the
        first one is computed), is_counting.
        """
        shown, labels = self.host.session.result, self.host.session.labels
        result = _whole(shown)
        state: dict[str, Any] = {
            "sizes": list(SIZES),
            "n_answer": None if result is None else len(result),
            "threshold": None if result is None else result.threshold,
            "is_filtered": shown is not result,
            "is_busy": self._drawing.is_running,
        }
        if self._drawn is None:
            return state
        audit, answer = self._drawn.audit, self._drawn.answer
        report = self._report.get((audit, labels))
        catalog = self.host.session.catalog
        return state | {
            "items": [{"row": row, "caption": shorten(catalog.caption(row))} for row in audit],
            "skipped": [row for row in audit if row in self._skipped],
            "about": {"n_rows": len(answer), "threshold": answer.threshold},
            "is_former": self._digest_of(result) != audit.digest,
            "is_full": len(audit) >= MAX_ROWS,
            "report": report or self._report.latest,
            "is_counting": report is None and self._report.is_running,
        }

    def rows(self) -> list[int]:
        """Return the rows of the audit."""
        return [] if self._drawn is None else list(self._drawn.audit)

    def on_start(self, data: dict[str, Any]) -> None:
        """Draw an audit of the present answer; the former one is given up, its labels stay."""
        n = int(data["n"])
        if n not in SIZES:
            raise QueryError(f"expected an audit of {', '.join(map(str, SIZES))} images, got {n}")
        if not self._drawing.is_running:
            number = 0 if self._order is None else self._order.number + 1
            self._order = Order(number, n)
            self._drawing.get(self._order)
            self.host.update(self)

    def on_more(self, data: dict[str, Any]) -> None:
        """Draw more images, from one stratum if `only` names one; `n_before` is what there was."""
        drawn = self._audited()
        if int(data["n_before"]) == len(drawn.audit):
            only = str(data.get("only") or "")
            n = min(int(data["n"]), MAX_ROWS - len(drawn.audit))
            self._drawn = Drawn(drawn.audit.more(n, only=only or None), drawn.answer)
            self.host.update()

    def on_skip(self, data: dict[str, Any]) -> None:
        """Pass over an image without a label; or, with `value` false, ask about it again."""
        row = int(data["row"])
        if row in self._audited().audit.rows:
            change = self._skipped.add if data.get("value", True) else self._skipped.discard
            change(row)
            self.host.update(self)

    def on_revisit(self, _data: dict[str, Any]) -> None:
        """Ask about the skipped images again."""
        self._skipped.clear()
        self.host.update(self)

    def _audited(self) -> Drawn:
        if self._drawn is None:
            raise QueryError("expected an audit that is under way, there is none: start one")
        return self._drawn

    def _draw(self, order: Order) -> Drawn:
        session = self.host.session
        while True:  # again, should a round end between the two readings
            answer = _whole(session.result)
            audit = session.audit(order.n)
            if answer is not None and digest(answer.rows) == audit.digest:
                return Drawn(audit, answer)

    def _begin(self) -> None:
        if self._order is not None and (drawn := self._drawing.get(self._order)) is not None:
            self._drawn, self._report = drawn, self._new_report()
            self._skipped.clear()
        self.host.update()

    def _new_report(self) -> Computed[tuple[Audit, LabelSet], dict[str, Any]]:
        host = self.host
        return Computed(
            host, lambda asked: report_view(asked[0].report(asked[1])), lambda: host.update(self)
        )

    def _digest_of(self, result: Result | None) -> str:
        """Return the digest of an answer, computed once for each."""
        if self._digest[0] is not result:
            self._digest = result, "" if result is None else digest(result.rows)
        return self._digest[1]


def _whole(result: Result | None) -> Result | None:
    """Return an answer with the images that filters hide."""
    return result if result is None or result.unfiltered is None else result.unfiltered


def report_view(report: AuditReport) -> dict[str, Any]:
    """Return a report as plain values.

    Keys: measures (name, text, value, low and high as shares, about), matches, advice, n_labelled,
    n_missing, n_counted (labels that count: not those behind too many images without one),
    strata.
    """
    draws = {each.name: each.draw for each in report.strata}
    n_far = draws[STRATA[-1]].n_rows
    ends = f"the same, leaving out the {n_far:,} images far from the answer"
    measures = [
        ("Precision", report.precision, "share of the answer that is right"),
        ("Recall", report.recall, "share of all matches in the catalog that the answer holds"),
        ("Recall nearby", report.recall_nearby, f"{ends}: how well it ends where it should"),
    ]
    return {
        "measures": [
            {"name": name, "about": about, **estimate_view(estimate)}
            for name, estimate, about in measures
        ],
        "matches": matches_text(report.n_matches),
        "advice": report.advice,
        "n_labelled": report.n_labelled,
        "n_missing": report.n_missing,
        "n_counted": sum(draw.n_drawn - draw.n_unsure for draw in draws.values()),
        "strata": [{"name": name, "n_rows": draws[name].n_rows} for name in STRATA],
    }


def estimate_view(estimate: Estimate) -> dict[str, Any]:
    """Return an estimate of a share as text and numbers; `value` is None where it is not known."""
    return {
        "text": str(estimate),
        "value": None if math.isnan(estimate.value) else estimate.value,
        "low": estimate.low,
        "high": estimate.high,
    }


def matches_text(matches: Estimate) -> str:
    """Say how many matches the catalog has.

    Examples
    --------
    >>> from clipbranches_widget.intervals import Estimate
    >>> matches_text(Estimate(430.2, 410, 903))
    'about 430 matches in the catalog (410 to 903)'
    >>> matches_text(Estimate(float("nan"), 0, 5000))
    '0 to 5,000 matches in the catalog'
    """
    interval = f"{matches.low:,.0f} to {matches.high:,.0f}"
    if math.isnan(matches.value):
        return f"{interval} matches in the catalog"
    return f"about {matches.value:,.0f} matches in the catalog ({interval})"
