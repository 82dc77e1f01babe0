"""Progress bars of a build that has stages (layer 0)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

StageProgress = Callable[[str, int, int], None]
"""Gets (what is being built, done, total)."""


class StageBars:
    """One progress bar per stage of a build; a context manager and a `StageProgress`."""

    def __init__(self, *, show: bool) -> None:
        self._show = show
        self._stage = ""
        self._bar: Any = None

    def __enter__(self) -> StageProgress:
        return self._advance

    def __exit__(self, *error: object) -> None:
        self._close()

    def _advance(self, stage: str, done: int, total: int) -> None:
        if not self._show:
            return
        if stage != self._stage:
            from tqdm.auto import tqdm

            self._close()
            self._bar = tqdm(total=total, desc=stage, unit_scale=True)
            self._stage = stage
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
