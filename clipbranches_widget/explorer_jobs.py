"""What runs beside the Explorer's page, and how it says so (layer 6): its lanes of jobs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import traitlets

from clipbranches_widget.errors import Cancelled, ClipBranchesError
from clipbranches_widget.explorer_lanes import Lane
from clipbranches_widget.explorer_part import Progress

log = logging.getLogger(__name__)

IDLE: dict[str, Any] = {"name": "", "stage": "", "fraction": 0.0}


class ExplorerJobs(traitlets.HasTraits):
    """The half of an `Explorer` that runs jobs, and shows what runs and what goes wrong.

    It keeps two traits: `task` (what runs) and `notice` (an error or a remark).
    """

    _n_notices = 0

    task = traitlets.Dict(IDLE, help="What runs: name, stage, fraction in 0..1.").tag(sync=True)
    notice = traitlets.Dict(help="Latest error or remark: kind, text, and a number.").tag(sync=True)

    def _make_lanes(self) -> None:
        """Get ready for jobs; to be called before the widget is made."""
        self._ui = Lane("explorer-ui")
        self._work = Lane("explorer-work")
        self._images = Lane("explorer-images")
        self._aside = Lane("explorer-aside")
        self._cancel = threading.Event()

    def vue_cancel(self, _data: object = None) -> None:
        """Ask the running search or round to stop."""
        self._stop()
        self._post(self._stop)  # what was asked for before, and waits on the ui lane to start
        self._post(self.say, "Cancelled.")

    def _stop(self) -> None:
        self._cancel.set()
        self._work.replace(lambda _is_stale: None)

    def say(self, text: str, kind: str = "info") -> None:
        """Show a remark, or an error."""
        self._n_notices += 1
        self.notice = {"kind": kind, "text": text, "number": self._n_notices}

    def work(
        self, name: str, stage: str, job: Callable[[Progress, Callable[[], bool]], None]
    ) -> None:
        """Run a slow job on the work lane; a later one outdates it and cancels a running round."""
        self._cancel.set()
        cancel = self._cancel = threading.Event()

        def progress(stage: str, fraction: float) -> None:
            self._post(self._set_task, name, stage, fraction)

        def run(is_stale: Callable[[], bool]) -> None:
            progress(stage, 0.0)
            try:
                job(progress, lambda: is_stale() or cancel.is_set())
            finally:
                self._post(self._set_task)

        self._work.replace(lambda is_stale: self._guard(run, is_stale))

    def aside(self, job: Callable[[Callable[[], bool]], None]) -> None:
        """Run a quick reading job on a lane of its own; of several waiting, only the latest."""
        self._aside.replace(lambda is_stale: self._guard(job, is_stale))

    def post(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action` on the ui lane; what goes wrong is shown in the widget."""
        self._post(action, *args)

    def _post(self, action: Callable[..., None], *args: Any) -> None:
        self._ui.post(lambda: self._guard(action, *args))

    def _guard(self, action: Callable[..., None], *args: Any) -> None:
        """Run `action`; whatever goes wrong is shown in the widget, the unexpected also logged."""
        try:
            action(*args)
        except Cancelled:
            self._post(self.say, "Cancelled.")
        except ClipBranchesError as error:
            self._post(self.say, str(error), "error")
        except Exception as error:
            log.exception("the Explorer failed on %s", getattr(action, "__name__", action))
            text = f"Unexpected {type(error).__name__}: {error}. Try again; if it comes back, "
            self._post(self.say, text + "the traceback is in the kernel's log.", "error")

    def _set_task(self, name: str = "", stage: str = "", fraction: float = 0.0) -> None:
        self.task = {"name": name, "stage": stage, "fraction": round(fraction, 3)}
