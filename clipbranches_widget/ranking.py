"""Which of the scored rows are the answer, and in which order (layer 2). Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.labels import LabelSet


def ranked_at(
    rows: NDArray[np.int64],
    scores: NDArray[np.float32],
    labels: LabelSet,
    threshold: float,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Pick and rank the rows of an answer: best first, ties by row.

    Labelled rows are as labelled: a no is never in, a yes always, at the threshold where its own
    score is below it.

    Parameters
    ----------
    rows : (m,) int64
        Ascending, distinct.
    scores : (m,) float32
    labels : LabelSet
    threshold : float
        Lowest score of an answer, compared as float32; closed.

    Returns
    -------
    positions : (k,) int64
        Where in `rows` the answer is.
    scores : (k,) float32
        Of the answer, descending.

    Examples
    --------
    >>> rows, scores = np.array([3, 5, 8, 9]), np.array([0.2, 0.9, 0.5, 0.7], np.float32)
    >>> positions, ranked = ranked_at(rows, scores, LabelSet([3], [9]), 0.5)
    >>> rows[positions].tolist(), ranked.tolist()
    ([5, 3, 8], [0.8999999761581421, 0.5, 0.5])
    """
    limit = np.float32(threshold)
    is_yes = np.isin(rows, labels.positive)
    lifted = np.where(is_yes, np.maximum(scores, limit), scores)
    kept = np.flatnonzero((lifted >= limit) & ~np.isin(rows, labels.negative))
    positions = kept[np.argsort(-lifted[kept], kind="stable")]
    return positions, lifted[positions]
