"""Values of the Explorer's parts that take time, computed off its ui lane (layer 6)."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from clipbranches_widget.explorer_part import Host
from clipbranches_widget.kept_threads import start

Key = TypeVar("Key")
Value = TypeVar("Value")


class Computed(Generic[Key, Value]):
    """The latest value of a slow function, with the key that it belongs to.

    For what nobody waits for: it shows no progress and disturbs no round, unlike `Host.work`. One
    call of the function runs at a time, in a thread of its own. Use it on the ui lane only.

    Parameters
    ----------
    host : Host
        The Explorer; it shows what goes wrong.
    compute : callable
        Key to value; runs off the ui lane.
    arrived : callable
        Called on the ui lane after each computation, failed or not. It should lead to another
        `get`, in case that another key is wanted by now.
    """

    def __init__(
        self, host: Host, compute: Callable[[Key], Value], arrived: Callable[[], None]
    ) -> None:
        self._host, self._compute, self._arrived = host, compute, arrived
        self._kept: tuple[Key, Value | None] | None = None
        self.is_running = False
        self.latest: Value | None = None
        """The latest value, of whatever key."""

    def get(self, key: Key) -> Value | None:
        """Return the value of `key`; None while it is computed, or where that failed."""
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        if not self.is_running:
            self.is_running = True
            future = start("explorer-computed", lambda: self._compute(key))
            future.add_done_callback(lambda done: self._host.post(self._arrive, key, done))
        return None

    def _arrive(self, key: Key, done: Future[Value]) -> None:
        self.is_running = False
        self._kept = key, None
        try:
            self.latest = done.result()
            self._kept = key, self.latest
        finally:
            self._arrived()
