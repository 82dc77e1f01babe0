"""Boxes as flat arrays, the form that the loops of the column index take (layer 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.boxes import N_CODES, LeafBox
from clipbranches_widget.sorted_columns import PREFIX_EDGES

MAX_BOXES = 2**16
"""Boxes of one query at most: a row's box is a 16-bit number."""

_SLOT = {edge: slot for slot, edge in enumerate(PREFIX_EDGES)}


@dataclass(frozen=True, slots=True)
class BoxProgram:
    """What must hold of a row's codes, box by box.

    Attributes
    ----------
    n_boxes : int
    bit_terms : (b, 3) int32
        Column, slot in `PREFIX_EDGES`, and 1 where the code must be below that edge, 0 where it
        must not.
    first_bit_term : (n_boxes + 1,) int32
        Where the terms of each box start.
    code_terms : (c, 3) int32
        Column, low, width: ``low <= code < low + width``, for ranges that end off the edges.
    first_code_term : (n_boxes + 1,) int32
    only_rows : bool
        Whether only the rows in any box are wanted, not which boxes they are in: less work.
    """

    n_boxes: int
    bit_terms: NDArray[np.int32]
    first_bit_term: NDArray[np.int32]
    code_terms: NDArray[np.int32]
    first_code_term: NDArray[np.int32]
    only_rows: bool = False

    @classmethod
    def of(cls, boxes: Sequence[LeafBox], *, use_bits: bool, only_rows: bool = False) -> BoxProgram:
        """Lay out boxes; without `use_bits` every range is compared with the codes.

        Raises ValueError for more than 65,536 boxes.
        """
        if len(boxes) > MAX_BOXES:
            raise ValueError(f"expected at most {MAX_BOXES:,} boxes, got {len(boxes):,}")
        bits: list[list[tuple[int, int, int]]] = []
        codes: list[list[tuple[int, int, int]]] = []
        for box in boxes:
            bits.append([])
            codes.append([])
            for column, low, high in box.ranges:
                if use_bits and on_edge(low) and on_edge(high):
                    bits[-1] += [(column, _SLOT[low], 0)] if low > 0 else []
                    bits[-1] += [(column, _SLOT[high], 1)] if high < N_CODES else []
                else:
                    codes[-1].append((column, low, high - low))
        return cls(len(boxes), *_flat(bits), *_flat(codes), only_rows)


def on_edge(code: int) -> bool:
    """Return whether a range bound has a bit vector, or needs none: 0 and 256 bound nothing."""
    return code in _SLOT or code in {0, N_CODES}


def _flat(terms: list[list[tuple[int, int, int]]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return all terms, (m, 3), and where those of each box start, (n_boxes + 1,)."""
    flat = [term for each in terms for term in each]
    first = np.concatenate(([0], np.cumsum([len(each) for each in terms])))
    return np.array(flat, dtype=np.int32).reshape(-1, 3), first.astype(np.int32)
