"""The catalog of the benchmark: embeddings, index, labels, and trees trained as the product does.

200 unit-norm Gaussian clusters in as many dimensions as columns, float16, seeded. A concept is the
direction of one cluster; its 30 positives are drawn from the 0.6 % of rows nearest to it (fewer
for a rare concept), its 30 negatives from the next 6 %.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from box_measure import reset_peak, status_mb
from numpy.typing import NDArray

from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.column_build import build_sorted_columns
from clipbranches_widget.column_model import ColumnModel
from clipbranches_widget.distil import N_NEAR_POSITIVE
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import learn
from clipbranches_widget.round_model import RoundModel
from clipbranches_widget.sorted_columns import ColumnParts, SortedColumns, snapped
from clipbranches_widget.teacher import DECISION_LOGIT, Teacher
from clipbranches_widget.trees import TreeEnsemble, fit_forest

if TYPE_CHECKING:
    import xgboost as xgb

N_CLUSTERS = 200
SPREAD = 0.6
BLOCK_ROWS = 2**18
N_LABELS, N_BACKGROUND = 30, 500
POSITIVE_SHARE, NEGATIVE_SHARE = 0.006, 0.06
N_BISECTIONS = 8


def centres(dim: int) -> NDArray[np.float32]:
    """Return the unit-norm cluster centres, (200, dim) float32."""
    vectors = np.random.default_rng(0).standard_normal((N_CLUSTERS, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_embeddings(path: Path, n_rows: int, dim: int) -> NDArray[np.float16]:
    """Write (n_rows, dim) float16 embeddings block by block; return them memory-mapped."""
    middle, rng = centres(dim), np.random.default_rng(1)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (n_rows, dim))
    scale = np.float32(SPREAD / np.sqrt(dim))
    for start in range(0, n_rows, BLOCK_ROWS):
        n = min(BLOCK_ROWS, n_rows - start)
        block = middle[rng.integers(0, N_CLUSTERS, n)]
        block += scale * rng.standard_normal((n, dim), dtype=np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
        out[start : start + n] = block
    out.flush()
    del out
    mapped: NDArray[np.float16] = np.load(path, mmap_mode="r")
    return mapped


def build(
    embeddings: NDArray[np.float16], model: ColumnModel, folder: Path, columns: ColumnParts
) -> tuple[SortedColumns, dict[str, Any]]:
    """Build and open an index; return it and what the build took."""
    folder.mkdir()
    reset_peak()
    before, start = status_mb("VmRSS"), time.perf_counter()
    build_sorted_columns(embeddings, model, folder, columns=columns)
    seconds = time.perf_counter() - start
    n_bytes = sum(file.stat().st_size for file in folder.glob("*.npy"))
    n_rows = len(embeddings)
    figures = {
        "seconds": seconds,
        "bytes": n_bytes,
        "bytes_per_row_and_column": n_bytes / (n_rows * model.n_columns),
        "peak_rss_mb": status_mb("VmHWM"),
        "rss_before_mb": before,
    }
    return SortedColumns.open(folder, n_columns=model.n_columns, n_rows=n_rows), figures


@dataclass(frozen=True)
class LightRows:
    """What `refine.learn` asks of a `Catalog`: n rows, none of them removed."""

    n_present: int
    removed_rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.n_present


@dataclass(frozen=True)
class LightColumns:
    """What `refine.learn` asks of a `ColumnModel`."""

    n_columns: int


class LightIndex:
    """What `refine.learn` asks of an `Index`, on plain arrays; nearest rows are exact."""

    def __init__(self, embeddings: NDArray[np.float16], columns: ColumnIndex) -> None:
        self._embeddings = embeddings
        self._found: dict[tuple[bytes, int], tuple[NDArray[np.int64], NDArray[np.float32]]] = {}
        self.catalog = LightRows(len(embeddings))
        self.columns = columns
        self.model = LightColumns(columns.shards[0].n_columns)

    def present(self, labels: LabelSet) -> tuple[LabelSet, int]:
        """Return the labels, and how many are of removed rows: none."""
        return labels, 0

    def nearest_of_each(
        self, wanted: Sequence[tuple[NDArray[np.floating], int]]
    ) -> list[NDArray[np.int64]]:
        """Return the k rows nearest to each of several (vector, k)."""
        return [self.nearest(vector, k)[0] for vector, k in wanted]

    def sampled(
        self, teacher: Teacher, rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return a teacher's logits of `rows`, and their codes."""
        return teacher.logits(self.embeddings(rows)), self.columns.codes(rows)

    def embeddings(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings of `rows`, in their order."""
        return np.asarray(self._embeddings[rows], dtype=np.float32)

    def nearest(
        self, vector: NDArray[np.floating], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the k rows nearest to a vector, best first; remembered."""
        query = np.asarray(vector, dtype=np.float32)
        if (query.tobytes(), k) not in self._found:
            self.prefetch(query[None, :], k)
        return self._found[query.tobytes(), k]

    def prefetch(self, vectors: NDArray[np.float32], k: int) -> None:
        """Find the nearest rows of several vectors in one pass over the embeddings."""
        rows = [np.empty(0, np.int64) for _ in vectors]
        values = [np.empty(0, np.float32) for _ in vectors]
        for start in range(0, len(self._embeddings), BLOCK_ROWS):
            block = np.asarray(self._embeddings[start : start + BLOCK_ROWS], dtype=np.float32)
            for number, line in enumerate(vectors @ block.T):
                full = len(values[number]) == k
                new = np.flatnonzero(line > values[number][-1]) if full else np.arange(len(line))
                value = np.concatenate([values[number], line[new]])
                best = np.argsort(-value, kind="stable")[:k]
                rows[number] = np.concatenate([rows[number], new + start])[best]
                values[number] = value[best]
        for vector, *found in zip(vectors, rows, values, strict=True):
            self._found[vector.tobytes(), k] = (found[0], found[1])


def similarities(
    embeddings: NDArray[np.float16], direction: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the products of all rows with a direction, (n,) float32, block by block."""
    out = np.empty(len(embeddings), dtype=np.float32)
    for start in range(0, len(out), BLOCK_ROWS):
        block = np.asarray(embeddings[start : start + BLOCK_ROWS], dtype=np.float32)
        np.dot(block, direction, out=out[start : start + len(block)])
    return out


def label(
    embeddings: NDArray[np.float16], positive_share: float = POSITIVE_SHARE
) -> tuple[LabelSet, NDArray[np.int64]]:
    """Return yes and no rows of a concept, and random rows that are neither."""
    rng = np.random.default_rng(2)
    n_rows, dim = embeddings.shape
    distance = -similarities(embeddings, centres(dim)[0])
    n_near = max(2 * N_LABELS, round(positive_share * n_rows))
    n_next = n_near + round(NEGATIVE_SHARE * n_rows)
    order = np.argpartition(distance, [n_near, n_next])
    positive = rng.choice(order[:n_near], N_LABELS, replace=False)
    negative = rng.choice(order[n_near:n_next], N_LABELS, replace=False)
    background = rng.choice(n_rows, N_BACKGROUND, replace=False)
    return LabelSet(positive, negative), np.setdiff1d(background, [*positive, *negative])


def plain_trees(
    columns: ColumnIndex, labels: LabelSet, background: NDArray[np.int64]
) -> xgb.Booster:
    """Boost 50 trees of depth 3 on the codes of the labelled and the background rows."""
    import xgboost as xgb

    rows = np.concatenate([labels.positive, labels.negative, background])
    target = np.isin(rows, labels.positive)
    matrix = xgb.DMatrix(columns.codes(rows).T.astype(np.float32), target, nthread=1)
    settings = {
        "objective": "binary:logistic",
        "max_depth": 3,
        "tree_method": "hist",
        "max_bin": 256,
        "nthread": 1,
        "seed": 0,
    }
    return xgb.train(settings, matrix, num_boost_round=50)


@dataclass(frozen=True)
class Distilled:
    """A round's model at one threshold.

    Attributes
    ----------
    name : str
    target : float
        The share of rows that its boxes should hold.
    share : float
        The share that they do hold.
    boxes : tuple of LeafBox
        The model's, or only the first of them where no threshold gives few enough rows.
    """

    name: str
    target: float
    share: float
    boxes: tuple[LeafBox, ...]
    model: RoundModel
    booster: xgb.Booster

    @property
    def limit_logit(self) -> float:
        """Above this logit the teacher says yes."""
        return self.teacher.logit_of(self.model.threshold)

    @property
    def teacher(self) -> Teacher:
        """What the trees imitate."""
        return self.model.teacher


def distil(index: LightIndex, labels: LabelSet, name: str, target: float) -> Distilled:
    """Learn a round as the product does, at the threshold whose boxes hold `target` of the rows.

    Bisects the threshold; takes the largest share tried that is not above the target, else the
    first boxes of the model with the smallest.
    """
    index.prefetch(index.embeddings(labels.positive), N_NEAR_POSITIVE)
    low, high = DECISION_LOGIT - 12.0, DECISION_LOGIT + 6.0
    tried: list[tuple[float, RoundModel]] = []
    for _ in range(N_BISECTIONS):
        logit = (low + high) / 2
        threshold = 1 / (1 + np.exp(DECISION_LOGIT - logit))
        model = learn(index, labels=labels, threshold=threshold)  # type: ignore[arg-type]
        tried.append((share_of(index, model.boxes), model))
        low, high = (logit, high) if tried[-1][0] > target else (low, logit)
    below = [each for each in tried if 0 < each[0] <= target]
    pick, among = (max, below) if below else (min, tried)
    share, model = pick(among, key=lambda each: each[0])
    boxes = model.boxes
    while share > target and len(boxes) > 1:
        boxes = boxes[:-1]
        share = share_of(index, boxes)
    sample = model.sample
    booster = fit_forest(snapped(sample.codes), sample.target, sample.weights(), seed=0)
    again = TreeEnsemble.from_booster(booster)
    assert np.array_equal(again.margins(sample.codes), model.forest.margins(sample.codes))
    return Distilled(name, target, share, boxes, model, booster)


def share_of(index: LightIndex, boxes: Sequence[LeafBox]) -> float:
    """Return the share of rows inside any of the boxes."""
    return len(index.columns.rows_in(boxes)) / len(index.catalog)
