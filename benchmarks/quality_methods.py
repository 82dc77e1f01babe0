"""What people would use instead, in `quality.py`: each reads the whole catalog every round.

text
    Cosine similarity to the query; labels are not used.
rocchio
    Similarity to ``a query + b mean(yes) - c mean(no)`` (Rocchio, 1971).
knn + text
    Mean similarity to the three nearest yes rows, minus ``no_weight`` times that to the three
    nearest no rows, plus ``text_weight`` times the similarity to the query; all standardised.
logistic, svm
    Logistic regression and linear SVM (squared hinge) on the full embedding; every unlabelled
    row of a random sample of 2,000 is a weak negative. Classes share masses: yes 1, no
    ``no_mass``, sample ``sample_mass``. The text is a prior in up to three ways: a weak yes of
    mass .3 (``query_as``: the query's vector itself, or the mean of the ten images nearest to it),
    a feature of standard deviation ``feature``, and ``blend`` times its standardised similarity
    added to the standardised decision value. With ``refit`` the sampled rows that look like a yes
    are dropped and the model is fitted again, once. Answer: decision value above ``limit``.
xgboost, random forest
    Trained on the labels and ``n_sample`` sampled rows as no, on the indexed columns. Answer:
    above one half. Without a yes they rank by the text.

The settings are chosen on concepts apart from those that measure (`quality_tuning.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from quality_users import Outcome, Task

Floats = NDArray[np.float32]
QUERY_MASS = 0.3
N_NEAR_QUERY = 10
N_NEIGHBOURS = 3


def standardised(values: Floats) -> Floats:
    """Return values with mean 0 and standard deviation 1."""
    spread: Floats = (values - values.mean()) / max(float(values.std()), 1e-9)
    return spread


def labelled_rows(task: Task) -> tuple[Floats, Floats, Floats]:
    """Return the embeddings of yes, no and sampled rows."""
    rows = task.collection.embeddings
    return rows[task.labels.positive], rows[task.labels.negative], rows[task.background]


def text_only(task: Task) -> Outcome:
    """Rank by the text."""
    return Outcome(task.collection.embeddings @ task.concept.vector)


@dataclass(frozen=True)
class Rocchio:
    """See the module."""

    query: float = 1.0
    yes: float = 1.0
    no: float = 0.5

    def __call__(self, task: Task) -> Outcome:
        """Answer one round."""
        vector = self.query * task.concept.vector
        yes, no, _ = labelled_rows(task)
        if len(yes):
            vector = vector + self.yes * yes.mean(axis=0)
        if len(no):
            vector = vector - self.no * no.mean(axis=0)
        return Outcome(task.collection.embeddings @ vector.astype(np.float32))


@dataclass(frozen=True)
class Neighbours:
    """See the module."""

    no_weight: float = 0.5
    text_weight: float = 0.5

    def __call__(self, task: Task) -> Outcome:
        """Answer one round."""
        scores = self.text_weight * standardised(task.text)
        yes, no, _ = labelled_rows(task)
        for examples, weight in ((yes, 1.0), (no, -self.no_weight)):
            if len(examples) and weight:
                near = task.collection.embeddings @ examples.T
                k = min(N_NEIGHBOURS, len(examples))
                nearest = np.partition(near, -k, axis=1)[:, -k:].mean(axis=1)
                scores = scores + weight * standardised(nearest)
        return Outcome(scores.astype(np.float32))


@dataclass(frozen=True)
class Linear:
    """See the module: logistic regression, and linear SVM."""

    loss: Literal["logistic", "hinge"] = "logistic"
    c: float = 10.0
    no_mass: float = 0.3
    sample_mass: float = 10.0
    query_as: Literal["vector", "images", "nothing"] = "images"
    feature: float = 0.0
    blend: float = 0.0
    refit: bool = True
    limit: float = -1.0

    def __call__(self, task: Task) -> Outcome:
        """Answer one round."""
        values = self.decision(task)
        scores = values
        if self.blend:
            scores = standardised(values) + self.blend * standardised(task.text)
        return Outcome(scores, values > self.limit)

    def decision(self, task: Task) -> Floats:
        """Return the decision values of all rows: (n,) float32."""
        yes, no, sample = labelled_rows(task)
        query = self._query(task)
        prior = self._prior(task)
        direction, offset = self._fit(yes, no, sample, query, prior)
        if self.refit:
            unlikely = sample[sample @ direction + offset <= self.limit]
            if 0 < len(unlikely) < len(sample):
                direction, offset = self._fit(yes, no, unlikely, query, prior)
        values: Floats = task.collection.embeddings @ direction + np.float32(offset)
        return values

    def _query(self, task: Task) -> Floats:
        """Return what stands for the query among the yes rows: (0 or 1, dim)."""
        vector = task.concept.vector
        if self.query_as == "vector":
            return vector[None, :]
        if self.query_as == "nothing" and len(task.labels.positive):
            return np.empty((0, len(vector)), dtype=np.float32)
        near = np.argsort(-task.text, kind="stable")[: N_NEAR_QUERY + len(task.labels.negative)]
        near = near[~np.isin(near, task.labels.negative)][:N_NEAR_QUERY]
        mean: Floats = task.collection.embeddings[near].mean(axis=0, keepdims=True)
        return mean

    def _prior(self, task: Task) -> tuple[Floats, float] | None:
        """Return the text as a feature, ``embedding . slope + shift``."""
        if not self.feature:
            return None
        scale = self.feature / max(float(task.text.std()), 1e-9)
        return (scale * task.concept.vector).astype(np.float32), -scale * float(task.text.mean())

    def _fit(
        self, yes: Floats, no: Floats, sample: Floats, query: Floats, prior: Any
    ) -> tuple[Floats, float]:
        """Return direction and offset in the embedding."""
        query_mass = QUERY_MASS if len(yes) else 1.0
        groups = [
            (yes, 1.0, 1),
            (query, query_mass, 1),
            (no, self.no_mass, 0),
            (sample, self.sample_mass, 0),
        ]
        groups = [group for group in groups if len(group[0])]
        rows = np.concatenate([group[0] for group in groups])
        target = np.concatenate([np.full(len(part), label) for part, _, label in groups])
        weights = np.concatenate([np.full(len(part), m / len(part)) for part, m, _ in groups])
        features = rows
        if prior is not None:
            features = np.column_stack([rows, rows @ prior[0] + np.float32(prior[1])])
        model = self._model().fit(features, target, sample_weight=weights)
        direction, offset = model.coef_[0], float(model.intercept_[0])
        if prior is not None:
            last, direction = float(direction[-1]), direction[:-1]
            direction, offset = direction + last * prior[0], offset + last * prior[1]
        return direction.astype(np.float32), offset

    def _model(self) -> Any:
        from sklearn.linear_model import LogisticRegression
        from sklearn.svm import LinearSVC

        if self.loss == "logistic":
            return LogisticRegression(C=self.c, max_iter=1000)
        return LinearSVC(C=self.c, dual=False, max_iter=2000)


@dataclass(frozen=True)
class Boosted:
    """XGBoost on labels and sampled rows; see the module."""

    n_sample: int = 500
    depth: int = 3
    n_trees: int = 50
    rate: float = 0.3

    def __call__(self, task: Task) -> Outcome:
        """Answer one round."""
        import xgboost as xgb

        if not len(task.labels.positive):
            return _no_answer(task)
        rows, target, weights = training_rows(task, self.n_sample)
        columns = task.collection.columns
        data = xgb.DMatrix(columns[rows], target, weight=weights, nthread=1)
        options = {
            "objective": "binary:logistic",
            "max_depth": self.depth,
            "learning_rate": self.rate,
            "min_child_weight": 0.01,
            "base_score": 0.5,
            "nthread": 1,
            "seed": task.seed,
        }
        booster = xgb.train(options, data, self.n_trees)
        booster.set_param({"nthread": 1})
        scores = booster.inplace_predict(columns)
        return Outcome(scores.astype(np.float32), scores > 0.5)


@dataclass(frozen=True)
class Forest:
    """Random forest on labels and sampled rows; see the module."""

    n_sample: int = 500
    n_trees: int = 50
    min_leaf: int = 1

    def __call__(self, task: Task) -> Outcome:
        """Answer one round."""
        from sklearn.ensemble import RandomForestClassifier

        if not len(task.labels.positive):
            return _no_answer(task)
        rows, target, weights = training_rows(task, self.n_sample)
        columns = task.collection.columns
        model = RandomForestClassifier(
            self.n_trees, min_samples_leaf=self.min_leaf, random_state=task.seed, n_jobs=1
        )
        model.fit(columns[rows], target, sample_weight=weights)
        scores = model.predict_proba(columns)[:, 1]
        return Outcome(scores.astype(np.float32), scores > 0.5)


def training_rows(
    task: Task, n_sample: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Return rows, targets and weights of labels and sampled rows; both classes weigh the same."""
    n_sample = max(n_sample, 0 if len(task.labels.negative) else 200)
    yes, no = task.labels.positive, task.labels.negative
    rows = np.concatenate([yes, no, task.background[:n_sample]])
    target = np.zeros(len(rows), dtype=np.float32)
    target[: len(yes)] = 1.0
    share = len(yes) / len(rows)
    weights = np.where(target > 0, 0.5 / share, 0.5 / (1.0 - share)).astype(np.float32)
    return rows, target, weights


def _no_answer(task: Task) -> Outcome:
    return Outcome(task.text, np.zeros(len(task.collection), dtype=np.bool_))
