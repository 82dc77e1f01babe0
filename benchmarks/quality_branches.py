"""Decision branches, the model of CLIP-Branches, for `quality.py`.

Written anew after Lülf, Lima Martins, Vaz Salles, Zhou, Gieseke: *Fast Search-By-Classification
for Large-Scale Databases Using Index-Aware Decision Trees and Random Forests*, PVLDB 16 (11), 2023
(arXiv 2306.02670), and the settings of the application of *CLIP-Branches* (SIGIR 2024, arXiv
2406.13322): an ensemble of 25 on 32 features, with 64 random subsets of 4 features, 32 of 6 and
8 of 8, those on which its k-d trees are built. What is done:

1. Each member learns from a bootstrap sample of the labels and `n_sample` random rows as no.
2. While there are yes rows and fewer than 30 boxes: pick a random yes row, and grow a box around
   it in each of a random half of the subsets. The box with the least weighted Gini impurity,
   inside and outside, is kept; every training row in it is removed.
3. A box starts at the picked row: its first feature (features in random order) reaches to the
   nearest rows on both sides, each other one to the nearest yes rows. Then, feature by feature and
   side by side, the rows that only this border keeps out are looked at, nearest first, at most
   min(50, 1.5 x number of yes) distinct values: the border moves to where the impurity is least,
   half-way to the next value; without a yes among them or without a gain, half-way to the nearest;
   where no rows are left, it falls.
4. A row is in the answer when more than half of the members have it in a box. It ranks by votes.

Differences: boxes are compared with all rows directly, which gives the rows that k-d trees would;
a row on a start box's border counts as inside from the start. The 32 features are the first 32
principal components of the embedding (the application trains CLIP heads of 32 dimensions), or 32
of the catalog's own columns, whichever is better on the concepts for settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from quality_branch_loops import member_boxes, vote
from quality_users import Outcome, Task

N_MEMBERS = 25
N_FEATURES = 32
SUBSETS = ((64, 4), (32, 6), (8, 8))
MAX_BOXES = 30
MAX_CANDIDATES = 50


@dataclass(frozen=True)
class Branches:
    """The ensemble; see the module."""

    features: Literal["pca", "columns"] = "pca"
    n_sample: int = 500

    def __call__(self, task: Task) -> Outcome:
        """Answer one round."""
        n_rows = len(task.collection)
        yes, no = task.labels.positive, task.labels.negative
        if not len(yes):
            return Outcome(task.text, np.zeros(n_rows, dtype=np.bool_))
        rng = np.random.default_rng(task.seed)
        table = task.collection.pca
        if self.features == "columns":
            chosen = np.linspace(0, task.collection.columns.shape[1] - 1, N_FEATURES).astype(int)
            table = np.ascontiguousarray(task.collection.columns[:, chosen])
        subsets, sizes = _subsets(rng)
        rows = np.concatenate([yes, no, task.background[: self.n_sample]])
        is_yes = np.arange(len(rows)) < len(yes)
        votes = np.zeros(n_rows, dtype=np.float32)
        n_candidates = min(MAX_CANDIDATES, max(1, int(1.5 * len(yes))))
        for _ in range(N_MEMBERS):
            drawn = rng.integers(0, len(rows), len(rows))
            while not is_yes[drawn].any():
                drawn = rng.integers(0, len(rows), len(rows))
            seed = int(rng.integers(2**31))
            boxes = member_boxes(
                table[rows[drawn]], is_yes[drawn], subsets, sizes, n_candidates, MAX_BOXES, seed
            )
            vote(table, *boxes, votes)
        return Outcome(votes, votes > N_MEMBERS // 2)


def _subsets(rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the feature subsets: (s, 8) int64, and how many of each line count."""
    widest = max(size for _, size in SUBSETS)
    lines, sizes = [], []
    for n_subsets, size in SUBSETS:
        for _ in range(n_subsets):
            line = rng.choice(N_FEATURES, size, replace=False)
            lines.append(np.pad(line, (0, widest - size)))
            sizes.append(size)
    return np.array(lines, dtype=np.int64), np.array(sizes, dtype=np.int64)
