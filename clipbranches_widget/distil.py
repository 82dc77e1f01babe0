"""Distillation (layer 3): a teacher's decision becomes a few leaf boxes worth reading.

Trees trained on thirty labels alone give poor, wide boxes. So the teacher scores thousands of
rows, shallow trees learn to imitate its decision, and a greedy cover picks the leaves that hold
its positives at the least cost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.index_protocol import Index
from clipbranches_widget.removed_rows import nth_present
from clipbranches_widget.teacher import Teacher
from clipbranches_widget.trees import TreeEnsemble

if TYPE_CHECKING:
    from clipbranches_widget.catalog import Catalog
    from clipbranches_widget.labels import LabelSet

SLACK_LOGITS = 0.3
"""The trees imitate a decision this much more generous than the threshold: it costs rows read and
wins coverage; the teacher's own threshold is applied afterwards."""

SAMPLE_ALL_BELOW = 20_000
N_RANDOM = 5_000
N_NEAR_TEACHER = 300
N_NEAR_POSITIVE = 30
MAX_POSITIVES_SEARCHED = 50
NEAR_QUANTILE = 0.9
POSITIVE_MASS, FAR_MASS, NEAR_MASS = 1.0, 8.0, 2.0
"""Training masses of positives, of negatives far from them and near to them: heavier negatives
make boxes that hold fewer rows, at little coverage."""

COVER_SHARE = 0.95
COVER_TIMES = 2
"""Boxes asked for a positive of a sampled catalog: the second is what holds positives that the
sample never saw. A catalog that is its own sample has none, so one is enough."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The rows that the trees learn from.

    Attributes
    ----------
    rows : (m,) int64
        Ascending.
    is_random : (m,) bool
        Drawn at random from the catalog: they estimate counts over all of it.
    codes : (D, m) uint8
    logits : (m,) float32
        The teacher's.
    target : (m,) bool
        What the trees learn: the teacher's decision with slack; labels override it.
    """

    rows: NDArray[np.int64]
    is_random: NDArray[np.bool_]
    codes: NDArray[np.uint8]
    logits: NDArray[np.float32]
    target: NDArray[np.bool_]

    def weights(self) -> NDArray[np.float32]:
        """Return (m,) float32 training weights; each group shares its mass equally."""
        weights = np.zeros(len(self.rows), dtype=np.float32)
        near = self.logits > np.quantile(self.logits, NEAR_QUANTILE)
        for group, mass in (
            (self.target, POSITIVE_MASS),
            (~self.target & ~near, FAR_MASS),
            (~self.target & near, NEAR_MASS),
        ):
            weights[group] = mass / max(int(group.sum()), 1)
        return weights


def random_rows(catalog: Catalog, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draw the rows that stand for the whole catalog, in random order: all of a small one."""
    if catalog.n_present <= SAMPLE_ALL_BELOW:
        places = rng.permutation(catalog.n_present)
    else:
        places = rng.choice(catalog.n_present, size=N_RANDOM, replace=False)
    return nth_present(places, catalog.removed_rows)


def draw_sample(
    index: Index,
    teacher: Teacher,
    labels: LabelSet,
    random_rows: NDArray[np.int64],
    limit_logit: float,
) -> Sample:
    """Draw the rows that the trees learn from: random ones, near ones and the labelled.

    `limit_logit` is the teacher's decision; the target is generous by `SLACK_LOGITS`.
    """
    parts = [random_rows, labels.positive, labels.negative]
    if len(random_rows) < index.catalog.n_present:
        positives = index.embeddings(labels.positive[:MAX_POSITIVES_SEARCHED])
        parts += index.nearest_of_each(
            [
                (teacher.direction, N_NEAR_TEACHER),
                *((vector, N_NEAR_POSITIVE) for vector in positives),
            ]
        )
    rows = np.unique(np.concatenate(parts))
    logits, codes = index.sampled(teacher, rows)
    target = logits > limit_logit - SLACK_LOGITS
    target[np.isin(rows, labels.positive)] = True
    target[np.isin(rows, labels.negative)] = False
    return Sample(rows, np.isin(rows, random_rows), codes, logits, target)


def choose_boxes(forest: TreeEnsemble, sample: Sample, n_rows: int) -> list[LeafBox]:
    """Pick positive leaves greedily until the sample's positives are covered.

    Each step takes the leaf with most positives still to cover, per row of the catalog it is
    estimated to hold. Stops at 95 % of what is asked for (`COVER_TIMES`), or when no leaf adds
    any.

    Parameters
    ----------
    forest : TreeEnsemble
    sample : Sample
    n_rows : int
        Rows of the catalog that are not removed.
    """
    leaves = [box for boxes in forest.leaf_boxes() for box in boxes if box.value > 0]
    if not leaves or not sample.target.any():
        return []
    holds = np.stack([box.contains(sample.codes) for box in leaves])
    n_random = int(sample.is_random.sum())
    times = 1 if n_random == n_rows else COVER_TIMES
    cost = holds[:, sample.is_random].sum(axis=1) * (n_rows / n_random) + 1.0
    holds = holds[:, sample.target]
    needs = np.full(holds.shape[1], times)
    demand = times * len(needs)
    chosen: list[LeafBox] = []
    while needs.sum() > (1.0 - COVER_SHARE) * demand:
        gain = holds[:, needs > 0].sum(axis=1)
        best = int((gain / cost).argmax())
        if gain[best] == 0:
            break
        needs = np.maximum(needs - holds[best], 0)
        holds[best] = False
        chosen.append(leaves[best])
    return chosen
