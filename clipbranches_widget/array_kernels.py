"""The loops of the column index in NumPy (layer 3): the same answers as `kernels`, slower.

They serve while Numba loads, and where it is missing or fails.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_program import BoxProgram
from clipbranches_widget.boxes import in_range
from clipbranches_widget.sorted_columns import WORD_ROWS, SortedColumns
from clipbranches_widget.tree_program import N_SPLITS, TreeProgram

NAME = "numpy"

BOX_PIECE_ROWS = (2**18, 2**18)
TREE_PIECE_ROWS = (2**16, 2**16)
"""Fewest and most rows of one call; see `kernels`."""

_BLOCK_WORDS = 4096
_BLOCK_ROWS = 16_384
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


def rows_in_boxes(
    columns: SortedColumns, program: BoxProgram, first_word: int, stop_word: int
) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int64]]:
    """Return the rows of a range of words in any box; see `kernels.rows_in_boxes`."""
    counts = np.zeros(program.n_boxes, dtype=np.int64)
    rows, ids = [np.empty(0, np.uint32)], [np.empty(0, np.uint16)]
    for start in range(first_word, stop_word, _BLOCK_WORDS):
        words = slice(start, min(stop_word, start + _BLOCK_WORDS))
        union = np.zeros(words.stop - words.start, dtype=np.uint64)
        found, found_in = [np.empty(0, np.int64)], [np.empty(0, np.uint16)]
        for box in range(program.n_boxes):
            inside = _in_box(columns, program, box, words)
            if program.only_rows:
                union |= inside
                continue
            counts[box] += int(np.bitwise_count(inside).sum())
            new = _set_bits(inside & ~union)
            union |= inside
            found.append(new + words.start * WORD_ROWS)
            found_in.append(np.full(len(new), box, dtype=np.uint16))
        if program.only_rows:
            rows.append((_set_bits(union) + words.start * WORD_ROWS).astype(np.uint32))
            continue
        block_rows = np.concatenate(found)
        order = np.argsort(block_rows)
        rows.append(block_rows[order].astype(np.uint32))
        ids.append(np.concatenate(found_in)[order])
    return np.concatenate(rows), np.concatenate(ids), counts


def rows_above(
    columns: SortedColumns, program: TreeProgram, threshold: np.float32, start: int, stop: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return the rows ``start <= row < stop`` above `threshold`; see `kernels.rows_above`."""
    rows, found = [np.empty(0, np.uint32)], [np.empty(0, np.float32)]
    for first in range(start, stop, _BLOCK_ROWS):
        total = margins(columns.codes[:, first : min(stop, first + _BLOCK_ROWS)], program)
        above = np.flatnonzero(total > threshold)
        rows.append((above + first).astype(np.uint32))
        found.append(total[above])
    return np.concatenate(rows), np.concatenate(found)


def margins(codes: NDArray[np.uint8], program: TreeProgram) -> NDArray[np.float32]:
    """Return the margins of (D, n) codes: (n,) float32, bit for bit XGBoost's."""
    total = np.full(codes.shape[1], program.base_margin, dtype=np.float32)
    for start in range(0, codes.shape[1], _BLOCK_ROWS):
        block = codes[:, start : start + _BLOCK_ROWS]
        part = total[start : start + _BLOCK_ROWS]
        for first, stop in zip(program.first_op[:-1], program.first_op[1:], strict=True):
            part += _leaf_values(block, program, program.ops[first:stop])
    return total


def _leaf_values(
    codes: NDArray[np.uint8], program: TreeProgram, ops: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Return the leaf values of one tree, for the rows of (D, n) codes: (n,) float32."""
    stack: list[NDArray[np.float32]] = []
    for unit, column, last in ops.tolist():
        if unit >= 0:
            stack.append(_unit_values(codes, program, unit))
        else:
            right, left = stack.pop(), stack.pop()
            stack.append(np.where(codes[column] <= last, left, right))
    return stack[0]


def _unit_values(codes: NDArray[np.uint8], program: TreeProgram, unit: int) -> NDArray[np.float32]:
    """Return the leaf values of one unit, from its leaves up to its root: (n,) float32."""
    below: list[NDArray[np.float32]] = list(program.values[unit][:, None])
    for node in reversed(range(N_SPLITS)):
        right, left = below.pop(), below.pop()
        goes_left = codes[program.columns[unit, node]] <= program.thresholds[unit, node]
        below.insert(0, np.where(goes_left, left, right))
    return below[0]


def _in_box(
    columns: SortedColumns, program: BoxProgram, box: int, words: slice
) -> NDArray[np.uint64]:
    """Return which rows of a range of words are inside a box, one bit a row: (words,) uint64."""
    n_words = words.stop - words.start
    n_spare = max(0, words.stop * WORD_ROWS - columns.n_rows)
    first, stop = program.first_code_term[box], program.first_code_term[box + 1]
    inside = np.full(n_words, _ALL, dtype=np.uint64)
    if first < stop:
        rows = slice(words.start * WORD_ROWS, words.stop * WORD_ROWS - n_spare)
        mask = np.zeros(n_words * WORD_ROWS, dtype=np.bool_)
        mask[: rows.stop - rows.start] = True
        for column, low, width in program.code_terms[first:stop].tolist():
            line = columns.codes[column, rows]
            mask[: len(line)] &= in_range(line, low, low + width)
        inside = np.packbits(mask, bitorder="little").view("<u8").astype(np.uint64, copy=False)
    terms = program.bit_terms[program.first_bit_term[box] : program.first_bit_term[box + 1]]
    for column, slot, is_upper in terms.tolist():
        below = columns.bit_vector(column, slot)[words]
        inside &= below if is_upper else ~below
    if n_spare:
        inside[-1] &= _ALL >> np.uint64(n_spare)
    return inside


def _set_bits(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the positions of the set bits, ascending: (m,) int64. Empty words cost little."""
    filled = np.flatnonzero(words)
    bits = np.unpackbits(words[filled].astype("<u8").view(np.uint8), bitorder="little")
    at = np.flatnonzero(bits)
    return filled[at // WORD_ROWS] * WORD_ROWS + at % WORD_ROWS
