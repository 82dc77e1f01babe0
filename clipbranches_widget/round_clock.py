"""Progress out, cancellation in, and how long each stage took (layer 1)."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from functools import partial
from threading import Event
from types import MappingProxyType
from typing import TypeVar

from clipbranches_widget.errors import Cancelled
from clipbranches_widget.kept_threads import start

Progress = Callable[[str, float], None]
T = TypeVar("T")

_LOOK_EVERY_S = 0.02


class RoundClock:
    """The stages of one round.

    Parameters
    ----------
    progress : callable, optional
        Gets (stage, fraction done) at the start of each stage.
    cancel : threading.Event, optional
        Set by whoever wants the round to stop.
    """

    def __init__(self, progress: Progress | None = None, cancel: Event | None = None) -> None:
        self._progress, self.cancel = progress, cancel
        self._started = time.perf_counter()
        self._marks: list[tuple[str, float]] = []

    def stage(self, name: str, fraction: float) -> None:
        """Begin a stage, `fraction` of the round done; raises Cancelled when asked to stop."""
        self.check()
        self._marks.append((name, time.perf_counter()))
        if self._progress is not None:
            self._progress(name, fraction)

    def check(self) -> None:
        """Raise Cancelled when asked to stop."""
        if self.cancel is not None and self.cancel.is_set():
            raise _cancelled()

    @contextlib.contextmanager
    def cancelled(self) -> Iterator[None]:
        """Say of a query that was cancelled what that means for the round."""
        try:
            yield
        except Cancelled:
            raise _cancelled() from None

    def seconds(self) -> float:
        """Return the seconds since the round began."""
        return time.perf_counter() - self._started

    def timings(self) -> MappingProxyType[str, float]:
        """Return the seconds of each stage and in total."""
        now = time.perf_counter()
        ends = [mark for _, mark in self._marks[1:]] + [now]
        seconds = {name: end - start for (name, start), end in zip(self._marks, ends, strict=True)}
        return MappingProxyType({**seconds, "total": now - self._started})


def run_until(cancel: Event | None, work: Callable[[], T]) -> T:
    """Return what `work` returns; when `cancel` is set, raise Cancelled without waiting for it.

    Training a forest cannot be interrupted, so with `cancel` the work runs on a thread of its
    own; after a cancellation it ends by itself, at the next stage.
    """
    if cancel is None:
        return work()
    done = start("clipbranches-round", partial(contextvars.copy_context().run, work))
    while not wait([done], timeout=_LOOK_EVERY_S).done:
        if cancel.is_set():
            raise _cancelled()
    return done.result()


def _cancelled() -> Cancelled:
    return Cancelled("the round was cancelled: labels and results are as before")
