"""Compiled loops that sum trees over codes (layer 3); `kernels` calls them.

They walk blocks of rows, so that a block's codes stay in the processor's cache while every tree
is applied to it.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_BLOCK_ROWS = 4096
_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def _evaluate_unit(
    codes: NDArray[np.uint8],
    start: int,
    column: NDArray[np.int32],
    last: NDArray[np.uint8],
    value: NDArray[np.generic],
    out: NDArray[np.generic],
) -> None:
    """Write the leaf values of one complete tree of depth 3, as nested selects: no branches."""
    n = len(out)
    x0, x1 = codes[column[0], start : start + n], codes[column[1], start : start + n]
    x2, x3 = codes[column[2], start : start + n], codes[column[3], start : start + n]
    x4, x5 = codes[column[4], start : start + n], codes[column[5], start : start + n]
    x6 = codes[column[6], start : start + n]
    t0, t1, t2, t3, t4, t5, t6 = last[0], last[1], last[2], last[3], last[4], last[5], last[6]
    v0, v1, v2, v3 = value[0], value[1], value[2], value[3]
    v4, v5, v6, v7 = value[4], value[5], value[6], value[7]
    for i in range(n):  # loads first: then the loop becomes vector compares and blends
        a0, a1, a2, a3, a4, a5, a6 = x0[i], x1[i], x2[i], x3[i], x4[i], x5[i], x6[i]
        v01 = v0 if a3 <= t3 else v1
        v23 = v2 if a4 <= t4 else v3
        v45 = v4 if a5 <= t5 else v5
        v67 = v6 if a6 <= t6 else v7
        if_left = v01 if a1 <= t1 else v23
        if_right = v45 if a2 <= t2 else v67
        out[i] = if_left if a0 <= t0 else if_right


@_compiled
def _add_leaves(
    codes: NDArray[np.uint8],
    start: int,
    first_op: NDArray[np.int32],
    ops: NDArray[np.int32],
    columns: NDArray[np.int32],
    thresholds: NDArray[np.uint8],
    values: NDArray[np.generic],
    stack: NDArray[np.generic],
    total: NDArray[np.generic],
) -> None:
    """Add one leaf a tree to `total`, (n,), for the rows from `start` on, in tree order.

    Units push the values of their rows; a node above units keeps the left or the right one.
    """
    n = len(total)
    for tree in range(len(first_op) - 1):
        top = -1
        for op in range(first_op[tree], first_op[tree + 1]):
            unit = ops[op, 0]
            if unit >= 0:
                top += 1
                _evaluate_unit(
                    codes, start, columns[unit], thresholds[unit], values[unit], stack[top, :n]
                )
            else:
                top -= 1
                line, limit = codes[ops[op, 1], start : start + n], np.uint8(ops[op, 2])
                left, right = stack[top], stack[top + 1]
                for i in range(n):
                    code, if_left, if_right = line[i], left[i], right[i]
                    left[i] = if_left if code <= limit else if_right
        leaf = stack[0]
        for i in range(n):
            total[i] += leaf[i]


@_compiled
def fill_margins(
    codes: NDArray[np.uint8],
    first_op: NDArray[np.int32],
    ops: NDArray[np.int32],
    columns: NDArray[np.int32],
    thresholds: NDArray[np.uint8],
    values: NDArray[np.float32],
    base_margin: np.float32,
    stack_size: int,
    total: NDArray[np.float32],
) -> None:
    """Write the margin of every row to `total`, (n,) float32."""
    stack = np.empty((stack_size, _BLOCK_ROWS), np.float32)
    total[:] = base_margin
    for start in range(0, len(total), _BLOCK_ROWS):
        part = total[start : start + _BLOCK_ROWS]
        _add_leaves(codes, start, first_op, ops, columns, thresholds, values, stack, part)


@_compiled
def fill_rows_above(
    codes: NDArray[np.uint8],
    first_op: NDArray[np.int32],
    ops: NDArray[np.int32],
    columns: NDArray[np.int32],
    thresholds: NDArray[np.uint8],
    values: NDArray[np.float32],
    screen_values: NDArray[np.uint8],
    screen_limit: int,
    base_margin: np.float32,
    threshold: np.float32,
    used_columns: NDArray[np.int32],
    stack_size: int,
    start: int,
    stop: int,
    rows: NDArray[np.uint32],
    found_margins: NDArray[np.float32],
) -> int:
    """Fill `rows` and `found_margins`; return how many rows there are.

    Rows that pass the screen are gathered until a block is full, then summed together. A block
    where many pass is summed as a whole; after several of those the screen is given up.
    """
    stack = np.empty((stack_size, _BLOCK_ROWS), np.float32)
    small_stack = np.empty((stack_size, _BLOCK_ROWS), np.uint8)
    total = np.empty(_BLOCK_ROWS, np.float32)
    bound = np.empty(_BLOCK_ROWS, np.uint16)
    gathered = np.empty((codes.shape[0], _BLOCK_ROWS), np.uint8)
    gathered_rows = np.empty(_BLOCK_ROWS, np.uint32)
    passed = np.empty(_BLOCK_ROWS, np.int32)
    n_found = n_gathered = n_full = 0
    for first in range(start, stop, _BLOCK_ROWS):
        n = min(stop - first, _BLOCK_ROWS)
        n_passed = n
        is_screening = n_full < 8 or 2 * n_full * _BLOCK_ROWS < first - start
        if is_screening and screen_limit >= 0:
            bound[:n] = 0
            _add_leaves(
                codes, first, first_op, ops, columns, thresholds, screen_values, small_stack,
                bound[:n],
            )  # fmt: skip
            n_passed = 0
            for i in range(n):
                passed[n_passed] = i
                n_passed += bound[i] > screen_limit
        is_full = 4 * n_passed > n
        if is_full or n_gathered + n_passed > _BLOCK_ROWS:
            total[:n_gathered] = base_margin
            _add_leaves(
                gathered, 0, first_op, ops, columns, thresholds, values, stack, total[:n_gathered]
            )
            n_found = _keep_above(
                total[:n_gathered], gathered_rows, threshold, rows, found_margins, n_found
            )
            n_gathered = 0
        if is_full:
            n_full += 1
            for i in range(n):
                gathered_rows[i] = first + i
            total[:n] = base_margin
            _add_leaves(codes, first, first_op, ops, columns, thresholds, values, stack, total[:n])
            n_found = _keep_above(total[:n], gathered_rows, threshold, rows, found_margins, n_found)
        else:
            for column in used_columns:
                for i in range(n_passed):
                    gathered[column, n_gathered + i] = codes[column, first + passed[i]]
            for i in range(n_passed):
                gathered_rows[n_gathered + i] = first + passed[i]
            n_gathered += n_passed
    total[:n_gathered] = base_margin
    _add_leaves(gathered, 0, first_op, ops, columns, thresholds, values, stack, total[:n_gathered])
    return _keep_above(total[:n_gathered], gathered_rows, threshold, rows, found_margins, n_found)


@_compiled
def _keep_above(
    total: NDArray[np.float32],
    total_rows: NDArray[np.uint32],
    threshold: np.float32,
    rows: NDArray[np.uint32],
    margins: NDArray[np.float32],
    n_found: int,
) -> int:
    """Append the rows with a total above the threshold; return how many there are now."""
    for i in range(len(total)):
        if total[i] > threshold:
            rows[n_found], margins[n_found] = total_rows[i], total[i]
            n_found += 1
    return n_found
