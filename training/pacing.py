"""The learning-rate schedule, bounded both in steps and in wall time."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator


class Pacer:
    """Yields (step, rate): linear warm-up, then half a cosine from 1 to 0.

    Progress is the larger of steps done / `n_steps` and time spent / `limit_s`, so a slow or
    busy machine ends in time with a finished schedule, after fewer steps.
    """

    def __init__(self, n_steps: int, limit_s: float, *, n_warmup: int = 200) -> None:
        self._n_steps = n_steps
        self._limit_s = limit_s
        self._n_warmup = n_warmup
        self._start = time.monotonic()
        self._step = 0

    def __iter__(self) -> Iterator[tuple[int, float]]:
        self._start = time.monotonic()
        for step in range(self._n_steps):
            self._step = step
            progress = max(step / self._n_steps, self.elapsed_s / self._limit_s)
            if progress >= 1:
                return
            warmup = min(1.0, (step + 1) / self._n_warmup)
            yield step, warmup * 0.5 * (1 + math.cos(math.pi * progress))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the iteration began."""
        return time.monotonic() - self._start

    def __str__(self) -> str:
        return f"step {self._step + 1}/{self._n_steps} {self.elapsed_s:.0f} s"
