"""Answer one set of boxes and one ensemble from an index on disk, cold and warm, and print JSON.

    python benchmarks/box_answer.py asked.json

`box_large.py` runs it: a process that only opens an index, so that its peak memory is that of
answering. Before each cold run the index's files are dropped from the page cache by
``posix_fadvise(DONTNEED)``; what a disk or a hypervisor keeps is beyond its reach.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from box_measure import SLOW_RUNS, status_mb, timed

from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.concept_file import boxes_from_list, forest_from_dict
from clipbranches_widget.engine import load_compiled
from clipbranches_widget.query_answer import BoxAnswer, EnsembleAnswer
from clipbranches_widget.sorted_columns import SortedColumns

Answer = BoxAnswer | EnsembleAnswer


def drop_from_cache(files: list[Path]) -> None:
    """Ask the system to forget the pages of files that no one maps."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cached_bytes(files: list[Path]) -> int | None:
    """Return how many bytes of files the page cache holds; None where `fincore` is missing."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", *map(str, files)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return sum(map(int, said.split()))


def main() -> None:
    """Answer everything; rows go to a file a task."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    boxes = boxes_from_list(asked["boxes"], asked["columns"])
    trees = forest_from_dict(asked["trees"])
    folder = Path(asked["folder"])
    files = sorted((folder / "index").glob("*.npy"))
    load_compiled()
    report: dict[str, Any] = {"rss_before_mb": status_mb("VmRSS"), "answers": []}
    calls: dict[str, Callable[[ColumnIndex], Answer]] = {
        "boxes": lambda index: index.in_boxes(boxes),
        "trees": lambda index: index.rows_above(trees, 0.0),
    }

    def opened() -> ColumnIndex:
        shape = {"n_columns": asked["columns"], "n_rows": asked["rows"]}
        index = ColumnIndex([SortedColumns.open(folder / "index", **shape)])
        index.loader.wait()
        return index

    def keep(task: str, temperature: str, seconds: list[float], found: Answer) -> None:
        plan = found.plan
        report["answers"].append(
            {
                "task": task,
                "temperature": temperature,
                "seconds": seconds,
                "plan": f"{plan.strategy}: {plan.chosen.what}",
                "n_bytes": plan.chosen.n_bytes,
                "peak_rss_mb": status_mb("VmHWM"),
            }
        )
        np.save(folder / f"{task}.npy", found.rows)

    for task, call in calls.items():
        seconds = []
        for _ in range(SLOW_RUNS):
            drop_from_cache(files)
            report["cached_bytes_after_drop"] = cached_bytes(files)
            index = opened()
            start = time.perf_counter()
            found = call(index)
            seconds.append(time.perf_counter() - start)
            del index
        keep(task, "cold", seconds, found)
        index = opened()
        found, seconds = timed(lambda call=call, index=index: call(index))
        keep(task, "warm", seconds, found)
        del index, found
    print(json.dumps(report | {"peak_rss_mb": status_mb("VmHWM")}))


if __name__ == "__main__":
    main()
