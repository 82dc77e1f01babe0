"""The compiled engine (layer 3): the loops of `box_loops` and `tree_loops`, in Numba.

`engine.EngineLoader` imports it off the critical path; `array_kernels` has the same functions
in NumPy, with the same answers. The first `warm_up` in an environment compiles (some seconds)
and caches the machine code on disk; later ones load it.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_loops import fill_rows_in_boxes
from clipbranches_widget.box_program import BoxProgram
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.sorted_columns import WORD_ROWS, SortedColumns
from clipbranches_widget.tree_loops import fill_margins, fill_rows_above
from clipbranches_widget.tree_program import TreeProgram
from clipbranches_widget.trees import Tree, TreeEnsemble

NAME = "numba"

Rows = tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int64]]
Margins = tuple[NDArray[np.uint32], NDArray[np.float32]]

BOX_PIECE_ROWS = TREE_PIECE_ROWS = (2**18, 2**20)
"""Fewest and most rows of one call: enough to outweigh a call, few enough to stop in between."""

_NO_PREFIX = np.zeros((1, 1, 1), dtype=np.uint64)
_NO_PREFIX.flags.writeable = False


def rows_in_boxes(
    columns: SortedColumns, program: BoxProgram, first_word: int, stop_word: int
) -> Rows:
    """Return the rows of a range of words that are inside any box.

    Returns
    -------
    rows : (m,) uint32
        Shard-local, ascending.
    box_ids : (m,) uint16
        The first box that holds each row.
    counts : (n_boxes,) int64
        Rows of each box.

    For a program of `only_rows`, `box_ids` is empty and `counts` are 0.
    """
    n_most = (stop_word - first_word) * WORD_ROWS
    rows, ids = np.empty(n_most, dtype=np.uint32), np.empty(n_most, dtype=np.uint16)
    counts = np.zeros(program.n_boxes, dtype=np.int64)
    prefix = _NO_PREFIX if columns.prefix is None else columns.prefix
    n_found = fill_rows_in_boxes(
        columns.codes,
        prefix,
        program.first_bit_term,
        program.bit_terms,
        program.first_code_term,
        program.code_terms,
        first_word,
        stop_word,
        rows,
        ids,
        counts,
        program.only_rows,
    )
    return rows[:n_found], ids[: 0 if program.only_rows else n_found], counts


def rows_above(
    columns: SortedColumns, program: TreeProgram, threshold: np.float32, start: int, stop: int
) -> Margins:
    """Return the rows ``start <= row < stop`` with a margin above `threshold`, and the margins.

    A first pass sums leaf values rounded up to 8-bit steps: an upper bound of each margin, four
    times as fast as float32. Only rows whose bound is above the threshold are summed exactly.
    """
    rows, margins = np.empty(stop - start, np.uint32), np.empty(stop - start, np.float32)
    screen = program.screen(threshold)
    n_found = fill_rows_above(
        columns.codes,
        program.first_op,
        program.ops,
        program.columns,
        program.thresholds,
        program.values,
        screen.values,
        screen.limit,
        program.base_margin,
        np.float32(threshold),
        program.used_columns,
        program.stack_size,
        start,
        stop,
        rows,
        margins,
    )
    return rows[:n_found], margins[:n_found]


def margins(codes: NDArray[np.uint8], program: TreeProgram) -> NDArray[np.float32]:
    """Return the margins of (D, n) codes: (n,) float32, bit for bit XGBoost's."""
    total = np.empty(codes.shape[1], dtype=np.float32)
    frozen = np.ascontiguousarray(codes).view()
    frozen.flags.writeable = False
    fill_margins(
        frozen,
        program.first_op,
        program.ops,
        program.columns,
        program.thresholds,
        program.values,
        program.base_margin,
        program.stack_size,
        total,
    )
    return total


def warm_up() -> None:
    """Compile, or load from the cache, every function for the types that an index has.

    Raises ImportError where Numba is told not to compile: its loops would run in Python.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        raise ImportError("Numba is told not to compile: unset NUMBA_DISABLE_JIT")
    columns = SortedColumns.from_codes(np.zeros((1, 1), dtype=np.uint8))
    split = {"column": [0, 0, 0], "threshold": [1, 0, 0], "left": [1, -1, -1]}
    nodes = {name: np.array(each, dtype=np.int32) for name, each in split.items()}
    right, value = np.array([2, -1, -1], np.int32), np.zeros(3, dtype=np.float32)
    tree = Tree(right=right, value=value, **nodes)
    program = TreeProgram.of(TreeEnsemble(np.float32(0), (tree,), 1))
    rows_in_boxes(columns, BoxProgram.of([LeafBox(())], use_bits=True), 0, 1)
    rows_above(columns, program, np.float32(0), 0, 1)
    margins(columns.codes, program)
