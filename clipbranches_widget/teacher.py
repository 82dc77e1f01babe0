"""The teacher (layer 3): what the user means, learned on the full embedding from a few labels.

A logistic regression on the labelled rows, with a sample of the catalog as weak negatives and
the similarity to the query as a feature; where nothing is labelled yes, the query's nearest
images stand in. The more labels, the less it is regularised. It ranks the answer, and the trees
learn to imitate it (distillation): trees trained on thirty labels alone give poor, wide boxes.
Its scores are calibrated on labels held out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

POSITIVE_MASS = 1.0
FULL_NEGATIVE_MASS_AT, LEAST_NEGATIVE_MASS = 30, 0.3
"""The labelled no have the mass of the yes from so many labels on, and less, in proportion, below:
the first ones are the images nearest to the query, hardly unlike a yes."""
BACKGROUND_ROW_MASS = 0.015
"""Of each sampled row, so that a small catalog's background does not outweigh its labels."""

C_PER_LABEL = 2.5
C_RANGE = (50.0, 300.0)
C_WITHOUT_NO = 100.0
"""Inverse regularisation, in proportion to the number of labels: as a fixed prior on the weights
would have it, where each label is one observation. One value for all rounds is too much for the
first, or too little for the last. Without a no there is less to overfit."""

QUERY_FEATURE_SCALES = (0.05, 0.3)
"""Standard deviation of the feature that is the similarity to the query, least and most: how
readily the labels turn the query's own ranking up or down."""
QUERY_APART = (0.0, 0.06)
"""How far apart from its nearest images the query lies (`_apart`): at the first, and below, it is
one more example in their midst, which the images labelled yes say as well, and counts least; at
the second, and above, it says what no image says, and counts most."""

DECISION_LOGIT = -1.0
"""Above it a sampled row is a likely positive: labelled positives are the easiest ones, so 0 is
too strict."""

DEFAULT_SCORE_SHIFT = 0.153
"""Without enough labels to calibrate, the decision logit has the score of the default threshold."""
MIN_TO_CALIBRATE = 3
CALIBRATION_PRIOR = 3.0
MAX_LOG_SLOPE = 3.0
MAX_EXPONENT = 500.0

DIRECTION_BITS = 28

MIN_DEVIATION = 1e-6
MAX_REFITS = 4


@dataclass(frozen=True, slots=True)
class Teacher:
    """A linear model of the user's yes: ``logit = embedding . direction + offset``.

    Attributes
    ----------
    direction : (dim,) float32
    offset : float
    score_slope, score_shift : float
        ``score = sigmoid(score_slope * logit + score_shift)``: how likely a yes, calibrated on
        labels that the fit did not see; slope above 0.
    over_query : float or None
        How much better than the query alone the labels tell yes from no when held out: the
        difference of the areas under the ROC curve, -1 to 1; None without a query or with fewer
        than three labels of a kind.
    """

    direction: NDArray[np.float32]
    offset: float
    score_slope: float = 1.0
    score_shift: float = DEFAULT_SCORE_SHIFT
    over_query: float | None = None

    def logits(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits of (n, dim) embeddings: (n,) float32.

        For rows of a catalog every sum in float64 is exact, as in `vector_index`: their elements
        are multiples of 2**-24, those of the direction are rounded to 28 bits below its length.
        So a logit depends neither on which rows it came with nor on the machine.
        """
        products = np.einsum("ij,j->i", embeddings, self._on_grid(), dtype=np.float64)
        logits: NDArray[np.float32] = (products + self.offset).astype(np.float32)
        return logits

    def _on_grid(self) -> NDArray[np.float32]:
        """Return the direction as multiples of 2**-28 of a power of two above its length.

        These are float32 as well: they have no more digits than the direction had.
        """
        wide = self.direction.astype(np.float64)
        _, exponent = math.frexp(float(np.abs(wide).max(initial=0.0)))
        step = math.ldexp(1.0, exponent + math.ceil(math.log2(len(wide)) / 2) - DIRECTION_BITS)
        on_grid: NDArray[np.float32] = (np.rint(wide / step) * step).astype(np.float32)
        return on_grid

    def scores(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how likely a yes each of (n, dim) embeddings is: (n,) float32 in 0..1."""
        return self.score_of(self.logits(embeddings))

    def score_of(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores of (n,) logits: float32, rising with the logit."""
        wide = self.score_slope * logits.astype(np.float64) + self.score_shift
        wide = np.clip(wide, -MAX_EXPONENT, MAX_EXPONENT)
        scores: NDArray[np.float32] = (1.0 / (1.0 + np.exp(-wide))).astype(np.float32)
        return scores

    def logit_of(self, score: float) -> float:
        """Return the logit of a score in (0, 1): the inverse of `score_of`."""
        return (math.log(score / (1.0 - score)) - self.score_shift) / self.score_slope

    def to_dict(self) -> dict[str, Any]:
        """Return the model as plain values for JSON; floats survive exactly."""
        return {
            "direction": [float(each) for each in self.direction],
            "offset": self.offset,
            "score_slope": self.score_slope,
            "score_shift": self.score_shift,
            "over_query": self.over_query,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Teacher:
        """Read what `to_dict` returned; raises KeyError, TypeError, ValueError on others."""
        direction = np.array(value["direction"], dtype=np.float32)
        if direction.ndim != 1 or not np.isfinite(direction).all():
            raise ValueError("expected a direction of finite numbers")
        names = ("offset", "score_slope", "score_shift")
        offset, slope, shift = (float(value[name]) for name in names)
        if not all(map(math.isfinite, (offset, slope, shift))) or slope <= 0:
            raise ValueError("expected a finite offset, slope and shift, the slope above 0")
        over_query = value["over_query"]
        if over_query is not None and not -1 <= float(over_query) <= 1:
            raise ValueError("expected over_query between -1 and 1")
        return cls(
            direction, offset, slope, shift, None if over_query is None else float(over_query)
        )


def fit_teacher(
    *,
    positives: NDArray[np.float32],
    negatives: NDArray[np.float32],
    background: NDArray[np.float32],
    query: NDArray[np.float32] | None = None,
    query_images: NDArray[np.float32] | None = None,
) -> Teacher:
    """Fit the teacher, again without the background rows it takes for positives, and calibrate.

    Parameters
    ----------
    positives, negatives : (p, dim), (q, dim) float32
        Embeddings of labelled rows; either may be empty, not both `positives` and `query_images`.
    background : (b, dim) float32
        Embeddings of sampled rows without labels: weak negatives. Those that the first fit
        scores above the decision are likely positives, and never used as negatives.
    query : (dim,) float32, optional
        The query's embedding: the similarity to it is one more feature. It counts more where the
        query lies apart from the images, as texts do in CLIP (the modality gap).
    query_images : (k, dim) float32, optional
        The images nearest to the query, k >= 1: their mean is the positive where none is
        labelled, and they tell how far apart the query lies. Without them, it does.
    """
    prior = None
    if query is not None:
        prior = _QueryFeature.on(background, query, _query_feature_scale(query, query_images))
    if not len(positives) and query_images is not None:
        positives = query_images.mean(axis=0, keepdims=True)
    negative_mass, inverse_regularisation = _strengths(len(positives), len(negatives))

    def fit(
        yes: NDArray[np.float32], no: NDArray[np.float32], unlabelled: NDArray[np.float32]
    ) -> Teacher:
        return _fit(
            [
                (yes, POSITIVE_MASS, True),
                (no, negative_mass, False),
                (unlabelled, BACKGROUND_ROW_MASS * len(unlabelled), False),
            ],
            prior,
            inverse_regularisation,
        )

    unlikely = background
    teacher = fit(positives, negatives, unlikely)
    for _ in range(MAX_REFITS):
        fewer = background[teacher.logits(background) <= DECISION_LOGIT]
        if len(fewer) in (0, len(unlikely)):
            break
        unlikely = fewer
        teacher = fit(positives, negatives, unlikely)
    if min(len(positives), len(negatives)) < MIN_TO_CALIBRATE:
        return teacher
    halves = [
        (half, fit(positives[1 - half :: 2], negatives[1 - half :: 2], unlikely)) for half in (0, 1)
    ]
    unseen_yes = np.concatenate([other.logits(positives[half::2]) for half, other in halves])
    unseen_no = np.concatenate([other.logits(negatives[half::2]) for half, other in halves])
    slope, shift = calibrate(unseen_yes, unseen_no)
    over_query = None
    if query is not None:
        by_query = _roc_area(positives @ query, negatives @ query)
        over_query = _roc_area(unseen_yes, unseen_no) - by_query
    return replace(teacher, score_slope=slope, score_shift=shift, over_query=over_query)


def calibrate(yes: NDArray[np.float32], no: NDArray[np.float32]) -> tuple[float, float]:
    """Fit slope and shift of ``sigmoid(slope * logit + shift)`` to the logits of unseen labels.

    Platt scaling with his softened targets (J. Platt, *Probabilistic Outputs for Support Vector
    Machines*, 1999), and a weak prior on what is used without labels: slope 1.

    Parameters
    ----------
    yes, no : (p,), (q,) float32
        Logits of rows labelled yes and no by models that did not see them.

    Returns
    -------
    slope, shift : float
        Slope above 0: the order of rows stays.

    Examples
    --------
    >>> few = np.array([-1, 0, 1, 2], dtype=np.float32)
    >>> slope, shift = calibrate(few + 1, few - 1)
    >>> slope > 0, calibrate(few + 3, few + 1)[1] < shift
    (True, True)
    """
    from scipy.optimize import minimize

    logits = np.concatenate([yes, no]).astype(np.float64)
    target = np.repeat([(len(yes) + 1) / (len(yes) + 2), 1 / (len(no) + 2)], [len(yes), len(no)])

    def loss(parameters: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        slope = math.exp(parameters[0])
        wide = slope * logits + parameters[1]
        residual = 1 / (1 + np.exp(-np.clip(wide, -MAX_EXPONENT, MAX_EXPONENT))) - target
        away = parameters - np.array([0.0, DEFAULT_SCORE_SHIFT])
        value = (np.logaddexp(0, wide) - target * wide).sum() + CALIBRATION_PRIOR * (away @ away)
        gradient = np.array([(residual * logits).sum() * slope, residual.sum()])
        return float(value), gradient + 2 * CALIBRATION_PRIOR * away

    start = np.array([0.0, DEFAULT_SCORE_SHIFT])
    bounds = [(-MAX_LOG_SLOPE, MAX_LOG_SLOPE), (None, None)]
    log_slope, shift = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds).x
    return math.exp(log_slope), float(shift)


@dataclass(frozen=True, slots=True)
class _QueryFeature:
    """The similarity to the query, ``embedding . slope + shift``: mean 0 on the background."""

    slope: NDArray[np.float32]
    shift: float

    @classmethod
    def on(
        cls, background: NDArray[np.float32], query: NDArray[np.float32], deviation_wanted: float
    ) -> _QueryFeature | None:
        """Standardise on the background; None where the query tells nothing of it apart."""
        if not len(background):
            return None
        similarities = background @ query
        deviation = float(similarities.std())
        if deviation < MIN_DEVIATION:
            return None
        scale = deviation_wanted / deviation
        return cls((scale * query).astype(np.float32), -scale * float(similarities.mean()))


def _roc_area(yes: NDArray[np.float32], no: NDArray[np.float32]) -> float:
    """Return how often a yes has a larger value than a no, ties counting half."""
    difference = np.sign(yes[:, None] - no[None, :])
    return float(difference.mean() / 2 + 0.5)


def _strengths(n_yes: int, n_no: int) -> tuple[float, float]:
    """Return the mass of the labelled no and the inverse regularisation for so many labels."""
    n_labels = n_yes + n_no
    negative_mass = float(np.clip(n_labels / FULL_NEGATIVE_MASS_AT, LEAST_NEGATIVE_MASS, 1.0))
    if not n_no:
        return negative_mass, C_WITHOUT_NO
    return negative_mass, float(np.clip(C_PER_LABEL * n_labels, *C_RANGE))


def _query_feature_scale(query: NDArray[np.float32], images: NDArray[np.float32] | None) -> float:
    """Return how much the query is to count, from how far apart from the images it lies."""
    apart = QUERY_APART[1] if images is None or len(images) < 2 else _apart(query, images)
    return float(np.interp(apart, QUERY_APART, QUERY_FEATURE_SCALES))


def _apart(query: NDArray[np.float32], images: NDArray[np.float32]) -> float:
    """Return how much nearer its k >= 2 nearest images are to each other than to the query.

    The difference of mean cosine similarities: below 0 for a query among them, such as an image,
    above for one on the far side of a modality gap.
    """
    n_images = len(images)
    similarities = images @ images.T
    to_each_other = (similarities.sum() - np.trace(similarities)) / (n_images * (n_images - 1))
    return float(to_each_other - (images @ query).mean())


def _fit(
    groups: list[tuple[NDArray[np.float32], float, bool]],
    prior: _QueryFeature | None,
    inverse_regularisation: float,
) -> Teacher:
    """Fit one logistic regression on (rows, mass, is positive); a group shares its mass equally."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    groups = [group for group in groups if len(group[0])]
    rows = np.concatenate([group[0] for group in groups])
    if all(is_positive for _, _, is_positive in groups):
        return Teacher(rows.mean(axis=0), 0.0)
    target = np.concatenate([np.full(len(part), is_positive) for part, _, is_positive in groups])
    weights = np.concatenate([np.full(len(part), mass / len(part)) for part, mass, _ in groups])
    features = rows
    if prior is not None:
        features = np.column_stack([rows, rows @ prior.slope + np.float32(prior.shift)])
    model = LogisticRegression(C=inverse_regularisation, max_iter=1000)
    with threadpool_limits(1):  # a few thousand rows: threads only wait for each other
        model.fit(features, target, sample_weight=weights)
    coefficients, offset = model.coef_[0], float(model.intercept_[0])
    direction = coefficients[: rows.shape[1]]
    if prior is not None:
        direction = direction + coefficients[-1] * prior.slope
        offset += float(coefficients[-1]) * prior.shift
    return Teacher(direction.astype(np.float32), offset)
