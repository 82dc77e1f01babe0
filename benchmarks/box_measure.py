"""Time calls, watch memory, and keep what was measured in a JSON file after every step."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget.box_query import n_cores

RUNS, SLOW_RUNS, SLOW_S = 7, 3, 1.0
BANDWIDTH_WORDS = 2**27
_PACKAGES = ("numpy", "numba", "xgboost", "scikit-learn", "polars", "duckdb", "usearch")

Rows = NDArray[np.integer]


def n_runs(seconds: float) -> int:
    """Return how often a call of this length is repeated."""
    return SLOW_RUNS if seconds > SLOW_S else RUNS


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def timed(call: Callable[[], Any]) -> tuple[Any, list[float]]:
    """Call once to warm up, then some times; return the first result and the later seconds."""
    start = time.perf_counter()
    result = call()
    warm = time.perf_counter() - start
    return result, [seconds_of(call) for _ in range(n_runs(warm))]


def ms(seconds: Sequence[float]) -> dict[str, float | int]:
    """Summarise seconds in milliseconds."""
    return {
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "runs": len(seconds),
    }


def status_mb(field: str) -> float:
    """Return a memory figure of this process: VmRSS is now, VmHWM its peak since `reset_peak`."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(match[1]) * 1024 / 1e6 if match else float("nan")


def reset_peak() -> float:
    """Let VmHWM start anew from what is resident now, and return that in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return status_mb("VmHWM")


def memory_bandwidth() -> float:
    """Return how many GB/s all threads together read: the XOR of 1 GB of words, best of 7."""
    import numba

    @numba.njit(nogil=True)
    def xor(words: NDArray[np.uint64]) -> np.uint64:
        total = np.uint64(0)
        for i in range(len(words)):
            total ^= words[i]
        return total

    words = np.ones(BANDWIDTH_WORDS, dtype=np.uint64)
    xor(words[:8])
    parts = np.array_split(words, n_cores())
    with ThreadPoolExecutor(len(parts)) as pool:
        best = min(seconds_of(lambda: list(pool.map(xor, parts))) for _ in range(RUNS))
    return words.nbytes / best / 1e9


class CpuClock:
    """Tells how many cores other processes used since it was made: what makes timings noisy."""

    def __init__(self) -> None:
        self._start = self._read()

    def others(self) -> float:
        """Return the mean number of cores that others kept busy."""
        wall, busy, own = (b - a for a, b in zip(self._start, self._read(), strict=True))
        return max(0.0, busy - own) / wall

    @staticmethod
    def _read() -> tuple[float, float, float]:
        fields = [int(each) for each in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        idle = fields[3] + fields[4]
        busy_s = (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
        times = os.times()
        return times.elapsed, busy_s, sum(times[:4])


def machine() -> dict[str, Any]:
    """Say where this runs."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", info.read_text()) if info.is_file() else None
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {
        "cpu": model[1] if model else platform.processor(),
        "threads": n_cores(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "system": f"{platform.system()} {platform.machine()}",
        "load_at_start": os.getloadavg()[0],
        "versions": {"python": platform.python_version(), **versions},
    }


def say(text: str) -> None:
    """Print progress, apart from the results."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


class Record:
    """The JSON file; written after every step, so that a crash loses none before it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.data: dict[str, Any] = {}

    def save(self) -> None:
        """Write atomically, with numbers rounded to four significant digits."""
        text = json.dumps(self.data, default=float)
        rounded = json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(rounded, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)


class Bench:
    """The figures of one catalog.

    Parameters
    ----------
    record : Record
    figures : dict
        A part of `record.data`; gets ``systems``, a list with one entry a system and task.
    bandwidth : float
        GB/s that memory can be read at.
    """

    def __init__(self, record: Record, figures: dict[str, Any], bandwidth: float) -> None:
        self.record, self.figures, self._bandwidth = record, figures, bandwidth
        self.systems: list[dict[str, Any]] = figures.setdefault("systems", [])

    def note(self, **facts: Any) -> None:
        """Keep facts that are not of one system."""
        self.figures.update(facts)
        self.record.save()

    def measure(
        self,
        task: str,
        system: str,
        call: Callable[[], Rows],
        *,
        expected: Rows | None = None,
        **facts: Any,
    ) -> Rows:
        """Time a call that returns rows, compare these with `expected`, and keep it all."""
        before = reset_peak()
        rows, seconds = timed(call)
        self.add(task, system, seconds, rows, expected=expected, rss_before_mb=before, **facts)
        return rows

    def add(
        self,
        task: str,
        system: str,
        seconds: Sequence[float],
        rows: Rows,
        *,
        expected: Rows | None = None,
        bytes_read: int | None = None,
        **facts: Any,
    ) -> None:
        """Keep what was timed elsewhere."""
        entry: dict[str, Any] = {"task": task, "system": system, **ms(seconds)}
        entry |= {"rows_returned": len(rows), "bytes_read": bytes_read, **facts}
        if bytes_read is not None:
            entry["gb_s"] = bytes_read / statistics.median(seconds) / 1e9
            entry["share_of_bandwidth"] = entry["gb_s"] / self._bandwidth
        if expected is not None:
            entry["equal"] = bool(np.array_equal(rows, expected))
        entry["peak_rss_mb"] = status_mb("VmHWM")
        self.systems.append(entry)
        self.record.save()
        wrong = "" if entry.get("equal", True) else "  ROWS DIFFER"
        say(f"  {task:15} {system:42} {entry['median_ms']:10.2f} ms{wrong}")

    def leave_out(self, task: str, system: str, reason: str) -> None:
        """Say why a system is not here."""
        self.systems.append({"task": task, "system": system, "left_out": reason})
        self.record.save()

    def find(self, task: str, system: str) -> dict[str, Any] | None:
        """Return the entry of a system, None where it was not measured."""
        return find(self.systems, task, system)

    def compare(self, task: str, baseline: dict[str, Any] | None) -> None:
        """Add to the systems of a task how many times faster than the baseline they are."""
        for entry in self.systems:
            if baseline and entry["task"] == task and "median_ms" in entry:
                entry["speed_up"] = baseline["median_ms"] / entry["median_ms"]
        self.record.save()


def find(systems: Iterable[dict[str, Any]], task: str, system: str) -> dict[str, Any] | None:
    """Return the measured entry of a system and task, or None."""
    found = (each for each in systems if each["task"] == task and each["system"] == system)
    return next((each for each in found if "median_ms" in each), None)
