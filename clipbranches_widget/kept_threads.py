"""Threads that are kept and used again (layer 0).

glibc gives a thread one of up to eight memory arenas a core, and an arena keeps what it once
needed. With a new thread for each search and each round, every arena grows to the size of a round's
arrays: some 300 MB in 80 rounds. A thread that is kept stays with its arena.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

MAX_AT_ONCE = 128
"""Threads of one name; more work than that waits."""

_executors: dict[str, ThreadPoolExecutor] = {}
_lock = threading.Lock()


def start(name: str, work: Callable[[], T]) -> Future[T]:
    """Run `work` on an idle thread of this name, on a new one where there is none.

    Parameters
    ----------
    name : str
        What the thread is for. Work that needs much memory should have a name of its own.
    work : callable
        Runs without the caller's context variables.

    Returns
    -------
    Future
        Its outcome. Leaving the interpreter waits for it.

    Examples
    --------
    >>> start("example", lambda: 6 * 7).result()
    42
    """
    with _lock:
        if name not in _executors:
            _executors[name] = ThreadPoolExecutor(MAX_AT_ONCE, name)
        return _executors[name].submit(work)
