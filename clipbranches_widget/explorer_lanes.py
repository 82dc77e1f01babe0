"""Where the Explorer's work runs (layer 6): lanes of jobs beside the kernel's own thread.

A comm message only drops a job into a lane and returns, so the kernel never waits for a search, a
round or a thumbnail. All state and all traits of an Explorer belong to one lane; the slow work
has others and hands its outcome over.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from clipbranches_widget.kept_threads import start

Job = Callable[[], object]
_log = logging.getLogger(__name__)


class Lane:
    """A queue whose jobs run one at a time, in the order they came, off the caller's thread.

    It has a thread while there are jobs, of those kept for its name, so that Explorers that nobody
    uses cost none. Jobs posted after `close` are dropped: a message may still arrive from a page
    that shows a closed widget. Jobs should handle their own errors; others are logged.

    Parameters
    ----------
    name : str
        Names the thread, for debuggers and logs.

    Examples
    --------
    >>> lane, ran = Lane("example"), threading.Event()
    >>> lane.post(ran.set)
    >>> ran.wait(10)
    True
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._jobs: deque[Job] = deque()
        self._is_running = False
        self._is_closed = False
        self._generation = 0

    def post(self, job: Job) -> None:
        """Append `job`."""
        with self._lock:
            if self._is_closed:
                return
            self._jobs.append(job)
            if self._is_running:
                return
            self._is_running = True
        start(self._name, self._run)

    def replace(self, job: Callable[[Callable[[], bool]], object]) -> None:
        """Append `job` and outdate every earlier one that was posted with `replace`.

        The job gets a function that says whether a later one has come: one that waited too long
        is skipped, and a long one should ask between steps and stop.
        """
        with self._lock:
            self._generation += 1
            mine = self._generation

        def is_stale() -> bool:
            return self._is_closed or mine != self._generation

        self.post(lambda: None if is_stale() else job(is_stale))

    def close(self) -> None:
        """Take no more jobs and drop the waiting ones; the running one ends by itself."""
        with self._lock:
            self._is_closed = True
            self._jobs.clear()

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                job()
            except Exception:
                _log.exception("a job of %s failed", self._name)

    def _next(self) -> Job | None:
        with self._lock:
            if self._jobs:
                return self._jobs.popleft()
            self._is_running = False
            return None
