"""Threads that are kept: the same one again, a second one only where the first is busy."""

import contextvars
import threading

import pytest

from clipbranches_widget.kept_threads import start

NUMBER = contextvars.ContextVar("NUMBER", default=0)


def test_work_after_work_shares_a_thread():
    """An executor may start a second thread while the first is about to become idle."""
    threads = {start("again", threading.get_ident).result() for _ in range(50)}
    assert len(threads) <= 3
    assert threading.get_ident() not in threads


def test_work_does_not_wait_for_other_work():
    free = threading.Event()
    busy = start("two", lambda: free.wait(30))
    assert start("two", lambda: 1).result(timeout=30) == 1
    free.set()
    assert busy.result()


def test_errors_arrive_and_the_context_does_not():
    """Jupyter tells by it which cell a message belongs to: a kept thread is of no cell."""
    NUMBER.set(7)
    assert start("context", NUMBER.get).result() == 0
    with pytest.raises(ZeroDivisionError):
        start("error", lambda: 1 // 0).result()
