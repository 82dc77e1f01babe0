"""Which loops answer queries (layer 3): compiled ones as soon as they are loaded, else NumPy's.

Loading Numba takes a quarter of a second, compiling in a new environment some seconds. Nothing
waits for it: until then, and where Numba is missing or fails, NumPy gives the same answers.
"""

from __future__ import annotations

import logging
import threading
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget import array_kernels
from clipbranches_widget.box_program import BoxProgram
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.tree_program import TreeProgram

_log = logging.getLogger(__name__)


class Engine(Protocol):
    """The loops: `kernels` and `array_kernels`, where they are documented."""

    NAME: str
    BOX_PIECE_ROWS: tuple[int, int]
    TREE_PIECE_ROWS: tuple[int, int]

    @staticmethod
    def rows_in_boxes(
        columns: SortedColumns, program: BoxProgram, first_word: int, stop_word: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.uint16], NDArray[np.int64]]:
        """Return the rows in any box, the first box of each, and the rows of each box."""

    @staticmethod
    def rows_above(
        columns: SortedColumns, program: TreeProgram, threshold: np.float32, start: int, stop: int
    ) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
        """Return the rows with a margin above the threshold, and the margins."""

    @staticmethod
    def margins(codes: NDArray[np.uint8], program: TreeProgram) -> NDArray[np.float32]:
        """Return the margin of each column of codes."""


ARRAYS: Engine = cast("Engine", array_kernels)


class EngineLoader:
    """Loads the compiled loops in the background. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._engine = ARRAYS
        self._problem = ""

    @property
    def engine(self) -> Engine:
        """The best loops there are at this moment; never waits."""
        return self._engine

    @property
    def problem(self) -> str:
        """Why the compiled loops cannot be used; empty while they can or are not yet loaded."""
        return self._problem

    def start(self) -> None:
        """Begin to load, once; returns at once. The interpreter waits for it before it exits."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._load, name="clipbranches-kernels")
                self._thread.start()

    def wait(self, timeout_s: float | None = None) -> Engine:
        """Load and wait until it is done or `timeout_s` has passed; return the best loops."""
        self.start()
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._engine

    def _load(self) -> None:
        try:
            self._engine = load_compiled()
        except Exception as error:  # whatever a broken Numba raises: NumPy serves instead
            self._problem = f"{type(error).__name__}: {error}"
            _log.warning("compiled loops cannot be used, NumPy serves instead: %s", self._problem)


def load_compiled() -> Engine:
    """Import and warm up the compiled loops; raises whatever Numba raises where it is broken."""
    from clipbranches_widget import kernels

    kernels.warm_up()
    return cast("Engine", kernels)
