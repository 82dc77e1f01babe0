"""Compiled loops over bit vectors and codes (layer 3); `kernels` calls them.

They walk blocks of rows, so that a block's bits stay in the processor's cache while every box is
applied to it: each bit vector is read from memory once.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.sorted_columns import WORD_ROWS

_BLOCK_WORDS = 2048
"""Bit vectors: long runs for the prefetcher; the block's vectors still fit the L2 cache."""
_CODE_BLOCK_WORDS = 256
"""Codes take 8 times the room."""
_MASK_WORDS = 64
_MASK_ROWS = _MASK_WORDS * WORD_ROWS
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)
_compiled = numba.njit(cache=True, nogil=True)


@_compiled
def fill_rows_in_boxes(
    codes: NDArray[np.uint8],
    prefix: NDArray[np.uint64],
    first_bit_term: NDArray[np.int32],
    bit_terms: NDArray[np.int32],
    first_code_term: NDArray[np.int32],
    code_terms: NDArray[np.int32],
    first_word: int,
    stop_word: int,
    rows: NDArray[np.uint32],
    ids: NDArray[np.uint16],
    counts: NDArray[np.int64],
    only_rows: bool,
) -> int:
    """Fill `rows`, and unless `only_rows` also `ids` and `counts`; return how many rows there are.

    The number of the first box that holds a row is kept as bit planes, so that it is found by
    word operations too, and read only for the rows that are returned.
    """
    n_rows = codes.shape[1]
    n_boxes = len(counts)
    n_planes = 0
    while not only_rows and n_boxes > 1 << n_planes:
        n_planes += 1
    n_block = _CODE_BLOCK_WORDS if len(code_terms) else _BLOCK_WORDS
    inside = np.empty(n_block, np.uint64)
    union = np.empty(n_block, np.uint64)
    planes = np.empty((n_planes, n_block), np.uint64)
    mask = np.empty(_MASK_ROWS, np.uint8)
    n_found = 0
    for start in range(first_word, stop_word, n_block):
        n = min(stop_word - start, n_block)
        union[:n] = 0
        planes[:, :n] = 0
        for box in range(n_boxes):
            codes_of = code_terms[first_code_term[box] : first_code_term[box + 1]]
            bits_of = bit_terms[first_bit_term[box] : first_bit_term[box + 1]]
            if only_rows and len(codes_of) == 0 and 0 < len(bits_of) <= 4:
                _or_bits(prefix, bits_of, start, union[:n])
                continue
            _start_box(codes, codes_of, start, inside[:n], mask)
            _and_bits(prefix, bits_of, start, inside[:n])
            if only_rows:
                for i in range(n):
                    union[i] |= inside[i]
                continue
            if (start + n) * WORD_ROWS > n_rows:
                inside[n - 1] &= _ALL >> np.uint64((start + n) * WORD_ROWS - n_rows)
            counts[box] += _add_box(box, inside[:n], union[:n], planes)
        if (start + n) * WORD_ROWS > n_rows:
            union[n - 1] &= _ALL >> np.uint64((start + n) * WORD_ROWS - n_rows)
        n_found = _write_rows(union[:n], planes, start * WORD_ROWS, rows, ids, n_found)
    return n_found


@_compiled
def _start_box(
    codes: NDArray[np.uint8],
    terms: NDArray[np.int32],
    first_word: int,
    inside: NDArray[np.uint64],
    mask: NDArray[np.uint8],
) -> None:
    """Set `inside` to the rows in all code ranges of a box, one bit a row; no ranges: all."""
    n_rows = codes.shape[1]
    if len(terms) == 0:
        inside[:] = _ALL
        return
    bytes_of_8 = mask.view(np.uint64)
    for start in range(0, len(inside), _MASK_WORDS):
        n_words = min(len(inside) - start, _MASK_WORDS)
        first = (first_word + start) * WORD_ROWS
        n = min(n_words * WORD_ROWS, n_rows - first)
        mask[:n] = 1
        mask[n:] = 0
        for term in range(len(terms)):
            line = codes[terms[term, 0], first : first + n]
            low_code, last = np.uint8(terms[term, 1]), np.uint8(terms[term, 2] - 1)
            for i in range(n):
                mask[i] &= np.uint8(np.uint8(line[i] - low_code) <= last)
        for word in range(n_words):
            bits = np.uint64(0)
            for part in range(8):  # gathers the lowest bit of 8 bytes
                eight = bytes_of_8[word * 8 + part] * np.uint64(0x0102040810204080)
                bits |= (eight >> np.uint64(56)) << np.uint64(8 * part)
            inside[start + word] = bits


@_compiled
def _and_bits(
    prefix: NDArray[np.uint64],
    terms: NDArray[np.int32],
    start: int,
    inside: NDArray[np.uint64],
) -> None:
    """Keep in `inside` the rows below, or not below, the edges that the terms name.

    Four terms at a time, so that `inside` is read and written once for them; the last is
    repeated where fewer are left.
    """
    n, n_terms = len(inside), len(terms)
    for first in range(0, n_terms, 4):
        k1, k2 = min(first + 1, n_terms - 1), min(first + 2, n_terms - 1)
        k3 = min(first + 3, n_terms - 1)
        a = prefix[terms[first, 0], terms[first, 1], start : start + n]
        b = prefix[terms[k1, 0], terms[k1, 1], start : start + n]
        c = prefix[terms[k2, 0], terms[k2, 1], start : start + n]
        d = prefix[terms[k3, 0], terms[k3, 1], start : start + n]
        flip_a = np.uint64(0) if terms[first, 2] else _ALL
        flip_b = np.uint64(0) if terms[k1, 2] else _ALL
        flip_c = np.uint64(0) if terms[k2, 2] else _ALL
        flip_d = np.uint64(0) if terms[k3, 2] else _ALL
        for i in range(n):
            inside[i] &= (a[i] ^ flip_a) & (b[i] ^ flip_b) & (c[i] ^ flip_c) & (d[i] ^ flip_d)


@_compiled
def _or_bits(
    prefix: NDArray[np.uint64],
    terms: NDArray[np.int32],
    start: int,
    union: NDArray[np.uint64],
) -> None:
    """Add to `union` the rows of a box of one to four terms, in one pass; see `_and_bits`."""
    n, last = len(union), len(terms) - 1
    k1, k2 = min(1, last), min(2, last)
    a = prefix[terms[0, 0], terms[0, 1], start : start + n]
    b = prefix[terms[k1, 0], terms[k1, 1], start : start + n]
    c = prefix[terms[k2, 0], terms[k2, 1], start : start + n]
    d = prefix[terms[last, 0], terms[last, 1], start : start + n]
    flip_a = np.uint64(0) if terms[0, 2] else _ALL
    flip_b = np.uint64(0) if terms[k1, 2] else _ALL
    flip_c = np.uint64(0) if terms[k2, 2] else _ALL
    flip_d = np.uint64(0) if terms[last, 2] else _ALL
    for i in range(n):
        union[i] |= (a[i] ^ flip_a) & (b[i] ^ flip_b) & (c[i] ^ flip_c) & (d[i] ^ flip_d)


@_compiled
def _add_box(
    box: int, inside: NDArray[np.uint64], union: NDArray[np.uint64], planes: NDArray[np.uint64]
) -> int:
    """Add the rows of a box to the union; return how many they are.

    Rows that are new in the union get the number of the box: one bit plane for each of its bits.
    """
    n_inside = np.uint64(0)
    for i in range(len(inside)):
        n_inside += _n_ones(inside[i])
        new = inside[i] & ~union[i]
        union[i] |= inside[i]
        inside[i] = new
    for bit in range(len(planes)):
        if (box >> bit) & 1:
            plane = planes[bit]
            for i in range(len(inside)):
                plane[i] |= inside[i]
    return int(n_inside)


@_compiled
def _write_rows(
    union: NDArray[np.uint64],
    planes: NDArray[np.uint64],
    first_row: int,
    rows: NDArray[np.uint32],
    ids: NDArray[np.uint16],
    n_found: int,
) -> int:
    """Append the rows of the union and the boxes they are in; return how many there are now."""
    first = n_found
    for i in range(len(union)):
        left = union[i]
        while left:
            rows[n_found] = first_row + i * WORD_ROWS + int(_n_ones(~left & (left - np.uint64(1))))
            n_found += 1
            left &= left - np.uint64(1)
    ids[first:n_found] = 0
    for bit in range(len(planes)):
        plane = planes[bit]
        for k in range(first, n_found):
            at = rows[k] - np.uint32(first_row)
            word = plane[at >> np.uint32(6)] >> np.uint64(at & np.uint32(63))
            ids[k] |= np.uint16(word & np.uint64(1)) << np.uint16(bit)
    return n_found


@_compiled
def _n_ones(word: np.uint64) -> np.uint64:
    """Return the number of set bits; LLVM knows this sum and emits one instruction."""
    word -= (word >> np.uint64(1)) & np.uint64(0x5555555555555555)
    word = (word & np.uint64(0x3333333333333333)) + (
        (word >> np.uint64(2)) & np.uint64(0x3333333333333333)
    )
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)
