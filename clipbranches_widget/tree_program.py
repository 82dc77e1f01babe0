"""Tree ensembles as flat arrays, the form that the loops of the column index take (layer 3).

A tree is cut into *units*: complete trees of depth 3, whose seven comparisons need no branches.
A tree of depth 3 or less is one unit, padded; a deeper one is units joined by the nodes above.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES
from clipbranches_widget.trees import Tree, TreeEnsemble

UNIT_DEPTH = 3
N_SPLITS, N_LEAVES = 7, 8
_JOIN = -1
_MAX_STEPS, _MAX_BOUND = 255, 65_535
_ROUNDING = 1e-9
"""Far above the relative error of the few float64 operations that lay out a screen."""


@dataclass(frozen=True, slots=True)
class Screen:
    """Upper bounds of margins in whole steps.

    Attributes
    ----------
    values : (n_units, 8) uint8
        Leaf values above the least of their tree, rounded up to steps.
    limit : int
        A row whose steps sum to at most this has no margin above the threshold; below 0 when
        every row may have.
    """

    values: NDArray[np.uint8]
    limit: int


@dataclass(frozen=True, slots=True)
class TreeProgram:
    """An ensemble, tree by tree, as operations on a stack of leaf values.

    Attributes
    ----------
    base_margin : float32
    first_op : (n_trees + 1,) int32
        Where the operations of each tree start.
    ops : (m, 3) int32
        ``unit, 0, 0`` pushes the values of a unit; ``-1, column, last`` pops right and left and
        keeps left where ``code <= last``.
    columns : (n_units, 7) int32
        Split columns of the units, node i with children 2 i + 1 and 2 i + 2.
    thresholds : (n_units, 7) uint8
        Go left when ``code <= threshold``.
    values : (n_units, 8) float32
        Leaf values, left to right.
    unit_trees : (n_units,) int32
        Which tree each unit belongs to.
    used_columns : (k,) int32
    stack_size : int
    """

    base_margin: np.float32
    first_op: NDArray[np.int32]
    ops: NDArray[np.int32]
    columns: NDArray[np.int32]
    thresholds: NDArray[np.uint8]
    values: NDArray[np.float32]
    unit_trees: NDArray[np.int32]
    used_columns: NDArray[np.int32]
    stack_size: int

    @classmethod
    def of(cls, ensemble: TreeEnsemble) -> TreeProgram:
        """Lay out an ensemble of trees of any depth."""
        layout = _Layout()
        for tree in ensemble.trees:
            layout.add(tree)
        n_units = len(layout.columns)
        return cls(
            base_margin=ensemble.base_margin,
            first_op=np.array(layout.first_op, dtype=np.int32),
            ops=np.array(layout.ops, dtype=np.int32).reshape(-1, 3),
            columns=np.array(layout.columns, dtype=np.int32).reshape(n_units, N_SPLITS),
            thresholds=np.array(layout.thresholds, dtype=np.uint8).reshape(n_units, N_SPLITS),
            values=np.array(layout.values, dtype=np.float32).reshape(n_units, N_LEAVES),
            unit_trees=np.array(layout.unit_trees, dtype=np.int32),
            used_columns=np.array(sorted(layout.used_columns), dtype=np.int32),
            stack_size=layout.stack_size,
        )

    @property
    def n_trees(self) -> int:
        """The number of trees."""
        return len(self.first_op) - 1

    def screen(self, threshold: np.float32) -> Screen:
        """Round leaf values up to 8-bit steps, so that their sums bound the margins from above.

        The sum in steps bounds the sum of the leaf values; a float32 sum of m terms exceeds the
        exact one by at most ``m * 2**-24`` times the sum of their magnitudes (Higham, *Accuracy
        and Stability of Numerical Algorithms*, 4.2), which the limit leaves room for.
        """
        if not len(self.values):
            return Screen(np.zeros((0, N_LEAVES), np.uint8), -1)
        values = self.values.astype(np.float64)
        least = np.full(self.n_trees, np.inf)
        most = np.full(self.n_trees, -np.inf)
        np.minimum.at(least, self.unit_trees, values.min(axis=1))
        np.maximum.at(most, self.unit_trees, values.max(axis=1))
        n_steps = min(_MAX_STEPS, _MAX_BOUND // self.n_trees)
        step = float((most - least).max()) / max(n_steps, 1) * (1 + _ROUNDING)
        magnitude = float(np.maximum(abs(least), abs(most)).sum()) + abs(float(self.base_margin))
        slack = (self.n_trees + 2) * 2.0**-24 * magnitude * 1.01
        slack += self.n_trees * step * _ROUNDING
        room = float(threshold) - float(self.base_margin) - float(least.sum()) - slack
        if not n_steps or not step > 0 or not math.isfinite(step) or not room > 0:
            return Screen(np.zeros(self.values.shape, np.uint8), -1)
        steps = np.ceil((values - least[self.unit_trees, None]) / step)
        limit = math.floor(min(room / step, _MAX_BOUND)) - 1
        return Screen(np.clip(steps, 0, n_steps).astype(np.uint8), limit)


@dataclass(slots=True)
class _Layout:
    """Collects the operations and units of trees."""

    first_op: list[int] = field(default_factory=lambda: [0])
    ops: list[tuple[int, int, int]] = field(default_factory=list)
    columns: list[list[int]] = field(default_factory=list)
    thresholds: list[list[int]] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)
    unit_trees: list[int] = field(default_factory=list)
    used_columns: set[int] = field(default_factory=lambda: {0})
    stack_size: int = 1

    def add(self, tree: Tree) -> None:
        """Append the operations of one tree."""
        self._add_node(tree, _pruned(tree, 0), n_below=0)
        self.first_op.append(len(self.ops))

    def _add_node(self, tree: Tree, node: int, *, n_below: int) -> None:
        if _height(tree, node) <= UNIT_DEPTH:
            self._add_unit(tree, node)
            self.stack_size = max(self.stack_size, n_below + 1)
            return
        self._add_node(tree, _pruned(tree, int(tree.left[node])), n_below=n_below)
        self._add_node(tree, _pruned(tree, int(tree.right[node])), n_below=n_below + 1)
        column = int(tree.column[node])
        self.used_columns.add(column)
        self.ops.append((_JOIN, column, int(tree.threshold[node]) - 1))

    def _add_unit(self, tree: Tree, root: int) -> None:
        columns, thresholds = [0] * N_SPLITS, [N_CODES - 1] * N_SPLITS
        nodes = [root]
        for position in range(N_SPLITS):
            node = nodes[position]
            if tree.left[node] < 0:
                nodes += [node, node]  # padded: both sides end in the same leaf
                continue
            columns[position] = int(tree.column[node])
            thresholds[position] = int(tree.threshold[node]) - 1
            self.used_columns.add(columns[position])
            nodes += [
                _pruned(tree, int(tree.left[node])),
                _pruned(tree, int(tree.right[node])),
            ]
        self.ops.append((len(self.columns), 0, 0))
        self.columns.append(columns)
        self.thresholds.append(thresholds)
        self.values.append([float(tree.value[node]) for node in nodes[N_SPLITS:]])
        self.unit_trees.append(len(self.first_op) - 1)


def _pruned(tree: Tree, node: int) -> int:
    """Step over splits that send every code one way, so that a threshold minus 1 fits a byte."""
    while tree.left[node] >= 0 and tree.threshold[node] in {0, N_CODES}:
        node = int(tree.right[node] if tree.threshold[node] == 0 else tree.left[node])
    return node


def _height(tree: Tree, node: int) -> int:
    """Return the number of splits on the longest way from a node to a leaf."""
    if tree.left[node] < 0:
        return 0
    below = (_pruned(tree, int(child)) for child in (tree.left[node], tree.right[node]))
    return 1 + max(_height(tree, child) for child in below)
