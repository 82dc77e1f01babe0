"""What the labels of an audit tell (layer 0, above `intervals`): estimates, and advice in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from clipbranches_widget.intervals import (
    Draw,
    Estimate,
    Melded,
    count_interval,
    melded,
    ratio_interval,
    sum_interval,
)

if TYPE_CHECKING:
    import pandas as pd

GOOD_RECALL = 0.9
"""Recall that is good enough to stop, and precision that is."""

WIDE = 0.3
MORE = (20, 50, 100, 200)
"""How many more labels the advice considers."""

NOT_KNOWN = float("nan")


@dataclass(frozen=True, slots=True)
class Counted:
    """One stratum of an audit: how many of its rows were proposed, and what labels they got.

    Attributes
    ----------
    name : str
    n_proposed : int
    draw : Draw
        `Draw.n_drawn` are those that count as drawn.
    """

    name: str
    n_proposed: int
    draw: Draw


@dataclass(frozen=True, slots=True)
class AuditReport:
    """Precision and recall of an answer, with 95 % confidence intervals.

    Attributes
    ----------
    precision : Estimate
        Share of the answer that are matches.
    recall : Estimate
        Share of the catalog's matches that are in the answer; 1 where there are none.
    recall_nearby : Estimate
        The same among all rows but the far ones: how well the answer ends where it should.
    n_matches : Estimate
        Matches in the catalog, a count.
    strata : tuple of Counted
    n_missing : int
        Proposed rows without a label.
    advice : str
        What to do next.
    """

    precision: Estimate
    recall: Estimate
    recall_nearby: Estimate
    n_matches: Estimate
    strata: tuple[Counted, ...]
    n_missing: int
    advice: str

    @property
    def n_labelled(self) -> int:
        """Proposed rows with a label."""
        return sum(stratum.n_proposed for stratum in self.strata) - self.n_missing

    def to_pandas(self) -> pd.DataFrame:
        """Return one line a stratum: stratum, n_rows, n_proposed, n_labelled, n_yes."""
        import pandas as pd

        return pd.DataFrame(
            {
                "stratum": [each.name for each in self.strata],
                "n_rows": [each.draw.n_rows for each in self.strata],
                "n_proposed": [each.n_proposed for each in self.strata],
                "n_labelled": [each.draw.n_drawn - each.draw.n_unsure for each in self.strata],
                "n_yes": [each.draw.n_yes for each in self.strata],
            }
        )

    def __str__(self) -> str:
        """Return a few lines: the figures, and what to do next."""
        matches = self.n_matches
        about = "not known yet" if math.isnan(matches.value) else f"about {matches.value:,.0f}"
        lines = [
            f"precision: {self.precision}",
            f"recall: {self.recall}",
            f"recall among rows near the answer: {self.recall_nearby}",
            f"matches in the catalog: {about} ({matches.low:,.0f} to {matches.high:,.0f})",
            f"{self.n_labelled} rows labelled, {self.n_missing} without a label; 95 % confidence",
            self.advice,
        ]
        return "\n".join(lines)


def report_on(
    strata: Sequence[Counted],
    known_inside: Draw,
    known_outside: Draw,
    *,
    n_answer: int,
    n_missing: int,
) -> AuditReport:
    """Turn counts into a report.

    Parameters
    ----------
    strata : sequence of Counted
        The first is the answer's, the last the far rows.
    known_inside, known_outside : Draw
        Rows that were labelled before the audit.
    n_answer : int
        Rows of the answer.
    n_missing : int
        Proposed rows without a label.
    """
    inside, *outside = [stratum.draw for stratum in strata]
    hits, missed = [known_inside, inside], [known_outside, *outside]
    low, high = count_interval(inside)
    n_yes = _total(hits)
    precision = Estimate(NOT_KNOWN, 0.0, 1.0)
    if n_answer:
        precision = _estimate(
            n_yes / n_answer,
            (known_inside.least + low) / n_answer,
            (known_inside.most + high) / n_answer,
        )
    parts = melded(hits, missed)
    report = AuditReport(
        precision=precision,
        recall=_recall(hits, missed, parts),
        recall_nearby=_recall(hits, missed[:-1]),
        n_matches=_estimate(n_yes + _total(missed), *sum_interval([*parts[0], *parts[1]])),
        strata=tuple(strata),
        n_missing=n_missing,
        advice="",
    )
    return replace(report, advice=_advice(report, hits, missed))


def _estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value if math.isnan(value) else min(max(value, low), high), low, high)


def _total(draws: Sequence[Draw]) -> float:
    """Return the estimated matches of known rows, the first of `draws`, and of samples."""
    known, *sampled = draws
    return known.least + sum(draw.estimate for draw in sampled)


def _recall(
    hits: Sequence[Draw],
    missed: Sequence[Draw],
    parts: tuple[Sequence[Melded], Sequence[Melded]] | None = None,
) -> Estimate:
    """Return recall; `parts` are the melded `hits` and `missed`, if there already."""
    n_hits, n_missed = _total(hits), _total(missed)
    low, high = ratio_interval(*(parts or melded(hits, missed)))
    n_matches = n_hits + n_missed
    value = n_hits / n_matches if n_matches else (1.0 if low == high else NOT_KNOWN)
    return _estimate(value, low, high)


def _advice(report: AuditReport, hits: Sequence[Draw], missed: Sequence[Draw]) -> str:
    """Say whether to stop, to improve the answer, or what to label next."""
    precision, recall = report.precision, report.recall
    labels_left = f"label the {report.n_missing} proposed rows that have no label yet"
    if not any(stratum.draw.n_drawn for stratum in report.strata) and report.n_missing:
        return f"{labels_left}, in their order".capitalize()
    if precision.high < GOOD_RECALL and len(report.strata) and not math.isnan(precision.value):
        wrong = math.floor(100 * (1 - precision.high))
        start = f"Keep going: at least {wrong} % of the answer is wrong"
        return f"{start}; mark wrong rows no and refine, or raise the threshold."
    if recall.low >= GOOD_RECALL:
        share = math.floor(100 * recall.low)
        found = f"at least {share} % of the matches are in the answer with 95 % confidence"
        return f"Stop: {found}." if precision.low >= GOOD_RECALL else f"{_inside(report, found)}."
    if recall.high < GOOD_RECALL:
        lost = math.floor(100 * (1 - recall.high))
        return (
            f"Keep going: at least {lost} % of the matches are outside the answer; mark those "
            "found outside yes and refine again."
        )
    if report.n_missing:
        return f"{labels_left}.".capitalize()
    return _more_outside(report, hits, missed)


def _inside(report: AuditReport, found: str) -> str:
    """Say what is known of an answer that is complete but perhaps not pure."""
    inside = report.strata[0].draw
    if report.precision.width > WIDE and inside.n_drawn < inside.n_rows:
        n = min(MORE[0], inside.n_rows - inside.n_drawn)
        return f"Label {n} more rows of the answer to narrow precision; {found}"
    return f"Stop: {found}, of the answer {report.precision} are matches"


def _more_outside(report: AuditReport, hits: Sequence[Draw], missed: Sequence[Draw]) -> str:
    """Say how many more labels outside the answer would settle recall, or that none would."""
    known, *outside = missed
    gains = []
    for at, draw in enumerate(outside):
        n = min(MORE[0], draw.n_rows - draw.n_drawn - draw.n_more_yes - draw.n_more_no)
        tried = [known, *outside[:at], _extended(draw, n), *outside[at + 1 :]]
        gains.append(_recall(hits, tried).low if n else -1.0)
    at = max(range(len(outside)), key=gains.__getitem__)
    draw, name = outside[at], report.strata[1 + at].name
    low = report.recall.low
    for n in MORE:
        if n <= draw.n_rows - draw.n_drawn - draw.n_more_yes - draw.n_more_no:
            tried = [known, *outside[:at], _extended(draw, n), *outside[at + 1 :]]
            low = _recall(hits, tried).low
            if low >= GOOD_RECALL:
                return (
                    f"Label {n} more {name} rows to narrow recall: if they are as the others, "
                    f"it is at least {math.floor(100 * low)} %."
                )
    return (
        f"Recall cannot be known better than at least {math.floor(100 * low)} % with {MORE[-1]} "
        f"more labels: matches are rare among the {draw.n_rows:,} {name} rows. Among the rows "
        f"near the answer, recall is {report.recall_nearby}."
    )


def _extended(draw: Draw, n: int) -> Draw:
    """Return a sample with `n` more labels, matches as often as before."""
    n_sure = draw.n_drawn - draw.n_unsure
    n_yes = round(n * draw.n_yes / n_sure) if n_sure else 0
    return replace(draw, n_drawn=draw.n_drawn + n, n_yes=draw.n_yes + n_yes)
