"""Reading NumPy's files from any number of threads (layer 0).

NumPy parses the header of an array as Python, and CPython before 3.13 fails at that now and then in
two threads at once (``SystemError: AST constructor recursion depth mismatch``). So every header is
read under one lock, here. Pickled objects are refused. Errors are those of NumPy.

Pages of a memory map that were read count as memory of the process until something else needs the
memory; who reads a large map once, block by block, takes them off with `drop_pages`.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

_LOCK = threading.Lock()
_FAULT_BYTES = 2**21  # Linux maps up to so much around the byte that is read


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


def drop_pages(array: NDArray[Any]) -> None:
    """Take the pages of a part of a read-only memory map off the memory of this process.

    They stay in the system's page cache, and come back when they are read again. Nothing happens to
    other arrays; maps of other modes may hold changes.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not (isinstance(array, np.memmap) and array.mode == "r" and array.flags.c_contiguous):
        return
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        start = array.ctypes.data - np.frombuffer(base, np.uint8).ctypes.data
        first = start // _FAULT_BYTES * _FAULT_BYTES
        last = -(-(start + array.nbytes) // _FAULT_BYTES) * _FAULT_BYTES
        base.madvise(mmap.MADV_DONTNEED, first, last - first)
