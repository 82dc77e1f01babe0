"""Reading NumPy's files from any number of threads (layer 0).

NumPy parses the header of an array as Python, and CPython before 3.13 fails at that now and then in
two threads at once (``SystemError: AST constructor recursion depth mismatch``). So every header is
read under one lock, here. Pickled objects are refused. Errors are those of NumPy.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_LOCK = threading.Lock()


def read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it is in Fortran order, and dtype of the ``.npy`` array at hand."""
    with _LOCK:
        if np.lib.format.read_magic(file) == (1, 0):
            return np.lib.format.read_array_header_1_0(file)
        return np.lib.format.read_array_header_2_0(file)


def map_array(path: Path) -> NDArray[Any]:
    """Memory-map a ``.npy`` file read-only."""
    with _LOCK:
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def read_array(file: IO[bytes]) -> NDArray[Any]:
    """Read a ``.npy`` array into memory."""
    with _LOCK:
        array: NDArray[Any] = np.load(file, allow_pickle=False)
    return array


def read_arrays(path: Path, names: Sequence[str]) -> list[NDArray[Any]]:
    """Read some arrays of an ``.npz`` file into memory."""
    with _LOCK, np.load(path, allow_pickle=False) as arrays:
        return [arrays[name] for name in names]
