"""Shallow XGBoost trees over codes, and the leaf boxes they are made of (layer 3).

Columns hold integer codes, and XGBoost goes left on ``x < threshold`` in float32, so for codes a
split is exactly ``code < ceil(threshold)``. Margins are float32 sums: the base margin first, then
one leaf a tree, in tree order. Both make every margin equal XGBoost's own, bit for bit.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES, LeafBox
from clipbranches_widget.errors import RefineError

if TYPE_CHECKING:
    import xgboost as xgb

_N_CHECK_ROWS = 64


@dataclass(frozen=True, slots=True)
class Tree:
    """One binary tree in arrays, one entry a node; node 0 is the root.

    Attributes
    ----------
    column : (m,) int32
        Split column.
    threshold : (m,) int32
        Go left when ``code < threshold``, 0..256.
    left, right : (m,) int32
        Child nodes; -1 at a leaf.
    value : (m,) float32
        Leaf value; 0 at a split.
    """

    column: NDArray[np.int32]
    threshold: NDArray[np.int32]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float32]

    def leaf_values(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the value of the leaf each row of (D, n) codes ends in: (n,) float32."""
        node = np.zeros(codes.shape[1], dtype=np.int32)
        rows = np.flatnonzero(self.left[node] >= 0)
        while len(rows):
            at = node[rows]
            goes_left = codes[self.column[at], rows] < self.threshold[at]
            node[rows] = np.where(goes_left, self.left[at], self.right[at])
            rows = rows[self.left[node[rows]] >= 0]
        return self.value[node]


@dataclass(frozen=True, slots=True)
class TreeEnsemble:
    """Trees whose leaf values are summed: margin = base margin + one leaf a tree."""

    base_margin: np.float32
    trees: tuple[Tree, ...]
    n_columns: int

    @classmethod
    def from_booster(cls, booster: xgb.Booster) -> TreeEnsemble:
        """Read a booster trained on codes and check that the margins agree bit for bit.

        Raises
        ------
        RefineError
            Not a single-output tree booster with numeric splits, or margins that differ from
            `Booster.predict` on random codes.
        """
        model = json.loads(bytes(booster.save_raw("json")))
        learner = model["learner"]
        kind = learner["gradient_booster"]["name"]
        shape = learner["learner_model_param"]
        if kind != "gbtree" or int(shape["num_class"]) > 1 or int(shape["num_target"]) > 1:
            raise RefineError(
                f"expected a 'gbtree' booster with one output, got {kind!r} with "
                f"{shape['num_class']} classes and {shape['num_target']} targets; train one "
                "booster a target"
            )
        n_columns = int(shape["num_feature"])
        trees = tuple(_tree(node) for node in learner["gradient_booster"]["model"]["trees"])
        ensemble = cls(_base_margin(model, n_columns), trees, n_columns)
        ensemble._check(booster)
        return ensemble

    def _check(self, booster: xgb.Booster) -> None:
        rng = np.random.default_rng(0)
        codes = rng.integers(0, N_CODES, (self.n_columns, _N_CHECK_ROWS), dtype=np.uint8)
        expected = predict_margins(booster, codes)
        if not np.array_equal(self.margins(codes), expected):
            raise RefineError(
                "expected margins equal to Booster.predict, got other ones: this version of "
                "xgboost stores or sums trees in another way; install xgboost>=3.0,<4"
            )

    def margins(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the margins of (D, n) codes: (n,) float32, as `Booster.predict` sums them.

        For few rows; `ColumnIndex.margins` has the quicker loops.
        """
        total = np.full(codes.shape[1], self.base_margin, dtype=np.float32)
        for tree in self.trees:
            total += tree.leaf_values(codes)
        return total

    def leaf_boxes(self) -> list[list[LeafBox]]:
        """Return the leaf boxes of each tree; leaves that no code reaches are left out."""
        return [_leaf_boxes(tree, index) for index, tree in enumerate(self.trees)]


def predict_margins(booster: xgb.Booster, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return XGBoost's own margins of (D, n) codes: the full scan that our answers must equal."""
    margins: NDArray[np.float32] = booster.inplace_predict(
        codes.T.astype(np.float32), predict_type="margin"
    )
    return margins


def fit_forest(
    codes: NDArray[np.uint8],
    target: NDArray[np.bool_],
    weights: NDArray[np.float32],
    *,
    seed: int,
    n_trees: int = 30,
    max_depth: int = 4,
) -> xgb.Booster:
    """Train a random forest of shallow trees on codes.

    Parallel trees of one round rather than a boosted sequence: each tree alone imitates the
    target, so its positive leaves are boxes that mean something by themselves.

    Parameters
    ----------
    codes : (D, n) uint8
    target : (n,) bool
    weights : (n,) float32
        Rescaled to mean 1, so that XGBoost's regularisation does not depend on their unit.
    seed : int
        Same seed, same forest: training runs on one thread (with more, small training sets take
        30 times as long on a busy machine).
    """
    import xgboost as xgb

    matrix = xgb.DMatrix(
        codes.T.astype(np.float32),
        target.astype(np.float32),
        weight=weights / weights.mean(),
        nthread=1,
    )
    settings: dict[str, Any] = {
        "objective": "binary:logistic",
        "base_score": 0.5,
        "num_parallel_tree": n_trees,
        "max_depth": max_depth,
        "learning_rate": 1.0,
        "subsample": 0.8,
        "colsample_bynode": 0.3,
        "tree_method": "hist",
        "max_bin": N_CODES,
        "nthread": 1,
        "seed": seed,
    }
    return xgb.train(settings, matrix, num_boost_round=1)


def _base_margin(model: dict[str, Any], n_columns: int) -> np.float32:
    """Return the margin before any tree, by asking the stored booster with all leaves at zero.

    How the stored base score becomes a margin depends on the objective and its clamping; only
    XGBoost knows all of it. The leaves of `model` are zeroed in place.
    """
    import xgboost as xgb

    for tree in model["learner"]["gradient_booster"]["model"]["trees"]:
        for node, child in enumerate(tree["left_children"]):
            if child < 0:
                tree["split_conditions"][node] = 0.0
    leafless = xgb.Booster({"nthread": 1})
    leafless.load_model(bytearray(json.dumps(model).encode()))
    return np.float32(predict_margins(leafless, np.zeros((n_columns, 1), dtype=np.uint8))[0])


def _tree(stored: dict[str, Any]) -> Tree:
    """Read one tree of XGBoost's JSON model."""
    if any(stored["split_type"]):
        raise RefineError(
            "expected numeric splits, got categorical ones; train on codes as plain float32"
        )
    left = np.array(stored["left_children"], dtype=np.int32)
    conditions = np.array(stored["split_conditions"], dtype=np.float32)
    is_leaf = left < 0
    return Tree(
        column=np.where(is_leaf, 0, stored["split_indices"]).astype(np.int32),
        threshold=np.where(is_leaf, 0, np.clip(np.ceil(conditions), 0, N_CODES)).astype(np.int32),
        left=left,
        right=np.array(stored["right_children"], dtype=np.int32),
        value=np.where(is_leaf, conditions, np.float32(0)).astype(np.float32),
    )


def _leaf_boxes(tree: Tree, index: int) -> list[LeafBox]:
    """Walk one tree from the root, narrowing the bounds at each split."""
    boxes = []
    stack: list[tuple[int, dict[int, tuple[int, int]]]] = [(0, {})]
    while stack:
        node, bounds = stack.pop()
        if tree.left[node] < 0:
            boxes.append(LeafBox.from_bounds(bounds, value=float(tree.value[node]), tree=index))
            continue
        column, threshold = int(tree.column[node]), int(tree.threshold[node])
        low, high = bounds.get(column, (0, N_CODES))
        if max(low, threshold) < high:
            stack.append((int(tree.right[node]), {**bounds, column: (max(low, threshold), high)}))
        if low < min(high, threshold):
            stack.append((int(tree.left[node]), {**bounds, column: (low, min(high, threshold))}))
    return boxes
