"""Compiled loops (layer 1): the only module that imports Numba, itself imported where needed.

The first call in an environment compiles (about 2 s); the machine code is cached on disk.
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_BLOCK_ROWS = 4096


@numba.njit(cache=True, nogil=True)
def sum_leaves(  # noqa: PLR0917 - compiled functions take positional arguments only
    codes: NDArray[np.uint8],
    first_node: NDArray[np.int32],
    column: NDArray[np.int32],
    threshold: NDArray[np.int32],
    left: NDArray[np.int32],
    right: NDArray[np.int32],
    value: NDArray[np.float32],
    total: NDArray[np.float32],
) -> None:
    """Add one leaf value a tree to `total`, in tree order and float32.

    Parameters
    ----------
    codes : (D, n) uint8
        One contiguous line a column; walked in blocks of 4,096 rows, so that the block's codes
        stay in cache for all trees.
    first_node : (n_trees,) int32
        Where each tree's root is in the node arrays.
    column, threshold, left, right : (m,) int32
        Nodes of all trees, children as positions in the same arrays; -1 at a leaf.
    value : (m,) float32
    total : (n,) float32
        Changed in place.
    """
    n_rows = codes.shape[1]
    for start in range(0, n_rows, _BLOCK_ROWS):
        stop = min(start + _BLOCK_ROWS, n_rows)
        for root in first_node:
            for row in range(start, stop):
                node = root
                while left[node] >= 0:
                    goes_left = codes[column[node], row] < threshold[node]
                    node = left[node] if goes_left else right[node]
                total[row] += value[node]
