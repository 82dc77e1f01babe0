"""Measure what a user of the demo waits for: import, build, reopen, search, a round by stages.

    python benchmarks/demo.py [--repeats 15]

The catalog is built anew in a temporary folder. Medians after one warm-up call; beside each round
the same labels answered without indexes: the round's teacher over all embeddings, and the trees
by `Booster`-equal margins over all codes. Writes demo.json and demo.png beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import clipbranches_widget as cb
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.refine import learn

HERE = Path(__file__).parent
QUERY = "animals with wings"


def seconds(call: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_s(call: Callable[[], object], repeats: int) -> float:
    """Return the median of `repeats` calls, after one that is not counted."""
    call()
    return statistics.median(seconds(call) for _ in range(repeats))


def fresh_import_s(repeats: int) -> float:
    """Return the median time of the import in a new interpreter, its own start left out."""
    code = (
        "import time; t = time.perf_counter(); import clipbranches_widget; "
        "print(time.perf_counter() - t)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)]
    runs += [
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        for _ in range(repeats)
    ]
    return statistics.median(float(run.stdout) for run in runs[1:])


def measure(repeats: int) -> dict[str, Any]:
    """Run everything once and return the figures in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "demo.cbcat"
        figures: dict[str, Any] = {"import_s": fresh_import_s(5)}
        figures["build_s"] = seconds(lambda: cb.demo(path, progress=False))
        figures["reopen_s"] = median_s(lambda: cb.open(path), repeats)
        catalog = cb.open(path)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        figures |= {"images": len(catalog), "disk_mb": round(size / 1e6, 1)}
        session = cb.Session(catalog, path=Path(folder) / "demo.session.jsonl")
        session.warm_up()
        figures["search_s"] = median_s(lambda: session.search(QUERY), repeats)
        rows = session.search(QUERY, k=60).rows
        session.label(positive=rows[:5], negative=rows[-5:])
        figures["refine_s"] = median_s(session.refine, repeats)
        rounds = [session.refine().timings for _ in range(repeats)]
        figures["refine_stages_s"] = {
            stage: statistics.median(timings[stage] for timings in rounds)
            for stage in rounds[0]
            if stage != "total"
        }
        index = CatalogIndex(catalog)
        model = learn(index, labels=session.labels, query=None)
        embeddings = np.asarray(catalog.embeddings, dtype=np.float32)
        codes = np.concatenate([shard.columns.codes for shard in index.shards], axis=1)
        figures["full_scan_teacher_s"] = median_s(lambda: model.teacher.logits(embeddings), repeats)
        figures["full_scan_trees_s"] = median_s(lambda: model.forest.margins(codes), repeats)
        return figures


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw the waits of a user and the stages of a round, in milliseconds."""
    from matplotlib.figure import Figure

    waits = {name: figures[f"{name}_s"] for name in ("import", "reopen", "search", "refine")}
    bars = {**waits, **{f"round: {k}": v for k, v in figures["refine_stages_s"].items()}}
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    shown = axes.barh(list(bars), [1000 * value for value in bars.values()], color="#1f6fb5")
    axes.bar_label(shown, fmt="%.0f", padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds, median", title=f"Demo catalog, {figures['images']:,} images")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    figures = measure(parser.parse_args().repeats)
    figures["machine"] = (
        f"{platform.machine()}, {os.cpu_count()} cores, {platform.python_version()}"
    )
    rounded = json.loads(json.dumps(figures), parse_float=lambda text: round(float(text), 4))
    (HERE / "demo.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    draw(figures, HERE / "demo.png")
    print(json.dumps(rounded, indent=2))


if __name__ == "__main__":
    main()
