"""Simulated users of `quality.py`: they label what a method shows them, round by round.

A user looks for one concept, types its name, and labels the first unlabelled images of the
ranking: before the first round that of the text, afterwards the method's own. With noise, each
row's label is wrong with that probability, the same rows for every method. With *same labels* a
method gets those that the users of our method gathered. With the start *3 yes* the user marks the
first three members in the text's ranking, and nothing else.

The figures of a round; labelled rows are left out unless said otherwise:

ap
    Average precision of the ranking; NaN with fewer than 5 members left. Rows of the same score
    are ranked by the text, which favours methods with coarse scores. A method that shows more
    members early leaves fewer and harder ones, so this compares methods fairly with the same
    labels only.
ap_all, recall_at_r
    Over all rows: those labelled yes first, those labelled no last. R is the number of members.
page, text_page
    Share of members among the first 60 of the ranking, and of the text's.
precision, recall, f1
    Of the returned set, labelled rows as labelled. NaN for methods that only rank.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from quality_data import Collection, Concept

from clipbranches_widget.labels import LabelSet

N_PAGE = 60
MIN_MEMBERS = 5
N_BACKGROUND = 2_000

Figures = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Task:
    """One round's question.

    Attributes
    ----------
    collection : Collection
    concept : Concept
        Methods use its `query` and `vector` only.
    text : (n,) float32
        Similarity of every row to the query.
    labels : LabelSet
    background : (b,) int64
        Random rows without labels: the same for every method.
    seed : int
    """

    collection: Collection
    concept: Concept
    text: NDArray[np.float32]
    labels: LabelSet
    background: NDArray[np.int64]
    seed: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a method answers.

    Attributes
    ----------
    scores : (n,) float32
        Of every row, higher is better.
    answer : (n,) bool, optional
        The returned set; None where a method only ranks.
    seconds : float, optional
        Where the method's own clock differs from the whole call.
    facts : dict
        More figures of the round.
    beside : dict of str to Outcome
        Answers of other methods that rest on the same training.
    """

    scores: NDArray[np.float32]
    answer: NDArray[np.bool_] | None = None
    seconds: float | None = None
    facts: Figures = field(default_factory=dict)
    beside: dict[str, Outcome] = field(default_factory=dict)


class Method(Protocol):
    """Answers from labels and text."""

    def __call__(self, task: Task) -> Outcome:
        """Answer one round."""
        ...


@dataclass(frozen=True)
class Behaviour:
    """How users behave.

    Attributes
    ----------
    rounds, n_labels : int
        Labels a round.
    noise : float
        Share of wrong labels.
    start : "search" or "3 yes"
    """

    rounds: int = 4
    n_labels: int = 20
    noise: float = 0.0
    start: str = "search"


class User:
    """One simulated user of one concept.

    Parameters
    ----------
    collection : Collection
    concept : Concept
    behaviour : Behaviour
    seed : int
    """

    def __init__(
        self, collection: Collection, concept: Concept, behaviour: Behaviour, seed: int = 0
    ) -> None:
        self.collection, self.concept, self.behaviour = collection, concept, behaviour
        n_rows = len(collection)
        self.truth = np.zeros(n_rows, dtype=np.bool_)
        self.truth[concept.members] = True
        rng = np.random.default_rng(seed)
        self._told = self.truth ^ (rng.random(n_rows) < behaviour.noise)
        self._background = rng.choice(n_rows, min(N_BACKGROUND, n_rows // 2), replace=False)
        self.text: NDArray[np.float32] = collection.embeddings @ concept.vector
        self.by_text = np.argsort(-self.text, kind="stable")
        self._seed = seed

    def rank(self, scores: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return all rows, best score first, ties by the text."""
        order: NDArray[np.int64] = self.by_text[np.argsort(-scores[self.by_text], kind="stable")]
        return order

    def label(self, labels: LabelSet, ranking: NDArray[np.int64]) -> LabelSet:
        """Label the first unlabelled rows of a ranking."""
        n_shown = self.behaviour.n_labels + len(labels)
        new = ranking[:n_shown][~np.isin(ranking[:n_shown], labels.rows)][: self.behaviour.n_labels]
        return labels.with_labels(new[self._told[new]], new[~self._told[new]])

    def first_labels(self) -> LabelSet:
        """Return the labels before the first round."""
        if self.behaviour.start == "search":
            return self.label(LabelSet(), self.by_text)
        return LabelSet(positive=self.by_text[self.truth[self.by_text]][:3])

    def task(self, labels: LabelSet) -> Task:
        """Return what a method is asked."""
        background = self._background[~np.isin(self._background, labels.rows)]
        return Task(self.collection, self.concept, self.text, labels, background, self._seed)

    def figures(self, labels: LabelSet, outcome: Outcome) -> Figures:
        """Hold an answer against the truth."""
        ranking = self.rank(outcome.scores)
        is_open = np.ones(len(self.truth), dtype=np.bool_)
        is_open[labels.rows] = False
        rest = ranking[is_open[ranking]]
        hits = self.truth[rest]
        whole = self.truth[np.concatenate([labels.positive, rest, labels.negative])]
        n_members = len(self.concept.members)
        text_hits = self.truth[self.by_text[: N_PAGE + len(labels)]]
        text_hits = text_hits[is_open[self.by_text[: N_PAGE + len(labels)]]]
        found = {
            "ap": average_precision(hits, at_least=MIN_MEMBERS),
            "ap_all": average_precision(whole),
            "recall_at_r": float(whole[:n_members].mean()),
            "page": float(hits[:N_PAGE].mean()),
            "text_page": float(text_hits[:N_PAGE].mean()),
            "n_yes": float(len(labels.positive)),
        }
        if outcome.answer is not None:
            answer = outcome.answer.copy()
            answer[labels.positive], answer[labels.negative] = True, False
            right = float((answer & self.truth).sum())
            found["precision"] = right / max(float(answer.sum()), 1.0)
            found["recall"] = right / n_members
            found["f1"] = 2 * right / (float(answer.sum()) + n_members)
        return found | outcome.facts


def average_precision(hits: NDArray[np.bool_], *, at_least: int = 1) -> float:
    """Return the mean precision at each hit of a ranking; NaN with fewer hits than `at_least`."""
    places = np.flatnonzero(hits)
    if len(places) < at_least:
        return float("nan")
    return float((np.arange(1, len(places) + 1) / (places + 1)).mean())


def simulate(
    user: User, name: str, method: Method, given: Sequence[LabelSet] | None = None
) -> Iterator[tuple[int, str, LabelSet, Figures]]:
    """Run a user's rounds with one method.

    Parameters
    ----------
    user : User
    name : str
    method : Method
    given : sequence of LabelSet, optional
        The labels of each round; by default the user labels what the method shows.

    Yields
    ------
    round, name, labels, figures
        Rounds from 1; of the method itself first, then of those beside it.
    """
    labels = user.first_labels()
    for number in range(1, user.behaviour.rounds + 1):
        if given is not None:
            labels = given[number - 1]
        task = user.task(labels)
        start = time.perf_counter()
        outcome = method(task)
        seconds = time.perf_counter() - start
        for who, each in ((name, outcome), *outcome.beside.items()):
            figures = user.figures(labels, each)
            figures["seconds"] = seconds if each.seconds is None else each.seconds
            yield number, who, labels, figures
        if given is None:
            labels = user.label(labels, user.rank(outcome.scores))
