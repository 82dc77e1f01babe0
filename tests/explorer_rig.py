"""What the tests of the Explorer's parts share on the kernel side: a comm, and waiting."""

from __future__ import annotations

import threading
import time

from comm.base_comm import BaseComm


class SilentComm(BaseComm):
    """A comm to nowhere."""

    def publish_msg(self, *_args, **_keys):
        pass


def settle(explorer):
    """Wait until everything posted so far, and what it posted in turn, is done."""
    ui, work, *reading = explorer._lanes
    for lane in (ui, work, ui, *reading, ui):
        done = threading.Event()
        lane.post(done.set)
        assert done.wait(60)


def wait_for(condition):
    """Wait until a condition holds, a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
