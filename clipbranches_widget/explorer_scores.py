"""The Explorer's panel of scores (layer 6): how they spread, and a threshold to try."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from clipbranches_widget.errors import QueryError
from clipbranches_widget.explorer_computed import Computed
from clipbranches_widget.explorer_part import Host, Part
from clipbranches_widget.refine import DEFAULT_THRESHOLD

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from clipbranches_widget.explorer_view import Contents
    from clipbranches_widget.labels import LabelSet
    from clipbranches_widget.result import Result

N_BINS = 40
N_STEPS = 100
"""The threshold moves in hundredths."""

MAX_TICKS = 150
"""Labels drawn of each kind, at most: evenly picked where there are more."""


class ScoresPart(Part):
    """The scores of the latest round, and a threshold that changes only what is shown.

    It must come before every part that picks among the rows of the answer: the answer at another
    threshold is that of the whole round.
    """

    name = "scores"

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._result: Result | None = None
        self._chosen: float | None = None
        self._is_open = False
        self._curve = Computed(host, curve, lambda: host.update(self))
        self._answer = Computed(host, _at, host.refresh)

    def adjust(self, contents: Contents) -> Contents:
        """Return the contents with the answer at the chosen threshold, as soon as it is there."""
        before, self._result = self._result, contents.result
        if self._chosen is not None and not _is_same_round(before, self._result):
            self._chosen = None
            self.host.post(self.host.update, self)
        if self._chosen is None or self._result is None:
            return contents
        answer = self._answer.get((self._result, self._chosen))
        return contents if answer is None else contents.with_result(answer)

    def opened(self) -> None:
        """Show the scores from now on."""
        self._is_open = True

    def closed(self) -> None:
        """Show no more than the chosen threshold."""
        self._is_open = False

    def state(self) -> dict[str, Any]:
        """Return the threshold, and of an open panel the scores.

        Keys: chosen (None: the round's own), own; and when open, as soon as they are computed,
        those of `curve`, yes and no (scores of labelled images), n_elsewhere (labelled images
        that the round did not score).
        """
        result = self._result
        if result is None or result.pool is None:
            return {"chosen": None, "own": None}
        threshold = {"chosen": self._chosen, "own": result.threshold}
        curve = self._curve.get(result) if self._is_open else None
        if curve is None:
            return threshold
        return threshold | curve | ticks(result, self.host.session.labels)

    def on_at(self, data: dict[str, Any]) -> None:
        """Show the answer at another threshold; None for the round's own."""
        asked = data.get("threshold")
        chosen = None if asked is None else float(asked)
        if chosen is not None and not 0.0 < chosen < 1.0:
            raise QueryError(f"expected a threshold between 0 and 1, got {chosen}")
        if self._result is None or chosen == self._result.threshold:
            chosen = None
        self._chosen = chosen
        self.host.refresh("result" if self._result is not None else None)
        self.host.update(self)

    def on_keep(self, data: dict[str, Any]) -> None:
        """Run a round at a threshold, which the rounds after it keep."""
        self.host.refine(threshold=float(data["threshold"]))


def curve(result: Result) -> dict[str, Any]:
    """Return how the scores of a round spread, and what each threshold would give.

    Keys: bins (images in each of `N_BINS` equal parts of 0..1), n_scored, n_total, learned_for
    (the threshold below which images may be missing); thresholds, ascending, with n_rows and
    expected_precision (None where there are no rows) of each.
    """
    pool, model = result.pool, result.model
    assert pool is not None and model is not None  # noqa: S101, PT018 - of a complete round
    steps = sorted({*(n / N_STEPS for n in range(1, N_STEPS)), result.threshold})
    preview = result.preview(steps)
    return {
        "bins": np.histogram(pool.scores, N_BINS, (0.0, 1.0))[0].tolist(),
        "n_scored": len(pool.rows),
        "n_total": result.n_total,
        "learned_for": model.threshold,
        "thresholds": steps,
        "n_rows": preview["n_rows"].tolist(),
        "expected_precision": [
            None if np.isnan(each) else round(each, 4)
            for each in preview["expected_precision"].tolist()
        ],
    }


def ticks(result: Result, labels: LabelSet) -> dict[str, Any]:
    """Return the scores of labelled images: yes, no, and n_elsewhere for those without a score."""
    assert result.pool is not None  # noqa: S101 - of a complete round
    yes, no = (_scores_of(result, rows) for rows in (labels.positive, labels.negative))
    return {
        "yes": _picked(yes),
        "no": _picked(no),
        "n_elsewhere": len(labels) - len(yes) - len(no),
    }


def kept_threshold(result: Result | None) -> float | None:
    """Return the threshold for the round after `result`: the same, None for the usual one."""
    return None if result is None or result.threshold == DEFAULT_THRESHOLD else result.threshold


def _at(asked: tuple[Result, float]) -> Result:
    result, threshold = asked
    return result.at(threshold)


def _scores_of(result: Result, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    pool = result.pool
    assert pool is not None  # noqa: S101 - of a complete round
    if not len(pool.rows):
        return pool.scores
    places = np.minimum(np.searchsorted(pool.rows, rows), len(pool.rows) - 1)
    scores: NDArray[np.float32] = pool.scores[places[pool.rows[places] == rows]]
    return scores


def _picked(scores: NDArray[np.float32]) -> list[float]:
    ranked = np.sort(scores)
    if len(ranked) > MAX_TICKS:
        ranked = ranked[np.linspace(0, len(ranked) - 1, MAX_TICKS).astype(np.int64)]
    return [round(score, 3) for score in ranked.tolist()]


def _is_same_round(before: Result | None, after: Result | None) -> bool:
    """Tell whether two answers are of one round, perhaps under other rules."""
    if before is None or after is None or before.labels is None or after.labels is None:
        return before is after
    one, two = ((each.labels, each.threshold, each.seed) for each in (before, after))
    return one == two and before.query_text == after.query_text
