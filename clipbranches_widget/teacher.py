"""The teacher (layer 3): what the user means, learned on the full embedding from a few labels.

A logistic regression on the labelled rows, with a sample of the catalog as weak negatives and the
query as a weak positive. It ranks the answer, and the trees learn to imitate it (distillation):
trees trained on thirty labels alone give poor, wide boxes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POSITIVE_MASS = 1.0
NEGATIVE_MASS = 1.0
BACKGROUND_MASS = 10.0
QUERY_MASS = 0.3
REGULARISATION_C = 10.0
DECISION_LOGIT = -1.0
"""Where a score of one half lies: labelled positives are the easiest ones, so 0 is too strict."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """A linear model of the user's yes: ``logit = embedding . direction + offset``.

    Attributes
    ----------
    direction : (dim,) float32
    offset : float
    """

    direction: NDArray[np.float32]
    offset: float

    def logits(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of (n, dim) embeddings: (n,) float32.

        Each row is summed by itself in float64, so that its logit does not depend on which rows
        it came with.
        """
        products = np.einsum("ij,j->i", embeddings, self.direction, dtype=np.float64)
        logits: NDArray[np.float32] = (products + self.offset).astype(np.float32)
        return logits


def logit_to_score(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Map logits to scores in 0..1 (float32), strictly above 0.5 above the decision logit."""
    scores: NDArray[np.float32] = (
        1.0 / (1.0 + np.exp(DECISION_LOGIT - logits.astype(np.float64)))
    ).astype(np.float32)
    return scores


def score_to_logit(score: float) -> float:
    """Return the logit of a score in (0, 1): the inverse of `logit_to_score`."""
    return float(np.log(score / (1.0 - score)) + DECISION_LOGIT)


def fit_teacher(
    *,
    positives: NDArray[np.float32],
    negatives: NDArray[np.float32],
    background: NDArray[np.float32],
    query: NDArray[np.float32] | None,
) -> Teacher:
    """Fit the teacher, then fit it again without the background rows it takes for positives.

    Parameters
    ----------
    positives, negatives : (p, dim), (q, dim) float32
        Embeddings of labelled rows; either may be empty, not all of `positives` and `query`.
    background : (b, dim) float32
        Embeddings of sampled rows without labels: weak negatives. Those that the first fit
        scores above the decision are likely positives, and never used as negatives.
    query : (dim,) float32 or None
        The query as an image embedding would lie: see `refine`.
    """
    teacher = _fit(positives, negatives, background, query)
    if len(background):
        unlikely = background[teacher.logits(background) <= DECISION_LOGIT]
        if 0 < len(unlikely) < len(background):
            teacher = _fit(positives, negatives, unlikely, query)
    return teacher


def _fit(
    positives: NDArray[np.float32],
    negatives: NDArray[np.float32],
    background: NDArray[np.float32],
    query: NDArray[np.float32] | None,
) -> Teacher:
    """Fit one weighted logistic regression; each group of rows shares its mass equally."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    queries = np.empty((0, positives.shape[1]), np.float32) if query is None else query[None, :]
    groups = [
        (positives, POSITIVE_MASS, True),
        (queries, QUERY_MASS if len(positives) else POSITIVE_MASS, True),
        (negatives, NEGATIVE_MASS, False),
        (background, BACKGROUND_MASS, False),
    ]
    groups = [group for group in groups if len(group[0])]
    if not any(not is_positive for _, _, is_positive in groups):
        direction = np.concatenate([rows for rows, _, _ in groups]).mean(axis=0)
        return Teacher(direction.astype(np.float32), 0.0)
    rows = np.concatenate([group[0] for group in groups])
    target = np.concatenate([np.full(len(r), is_positive) for r, _, is_positive in groups])
    weights = np.concatenate([np.full(len(r), mass / len(r)) for r, mass, _ in groups])
    model = LogisticRegression(C=REGULARISATION_C, max_iter=1000)
    with threadpool_limits(1):  # a few thousand rows: threads only wait for each other
        model.fit(rows, target, sample_weight=weights)
    return Teacher(model.coef_[0].astype(np.float32), float(model.intercept_[0]))
