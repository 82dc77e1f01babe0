"""Measure growing catalogs: appending to a large one, and asking twenty shards instead of one.

    python benchmarks/growth.py [--rows 1000000] [--dim 512] [--folder DIR]

Random embeddings around 2,000 centres, with content hashes. *append*: 10,000 rows, three times, to
a catalog of ``--rows`` (the one that `ingest.py` left in the folder, or a new one in shards of
250,000), without the time of a model; no old file may be another one afterwards. *shards*: 200,000
rows of 384 dimensions, appended in twenty equal parts, and the same catalog after `compact`, asked
in turns: bare searches by vector (k = 60), `Session.search` by text with the bundled model (k = 60,
written to the session's file), each query twice, of which the second counts, and rounds of
refinement with ten yes and ten no. Medians of the clock and of the cores' time, which says more
where others use the machine. Writes growth.json and growth.png beside this file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import clipbranches_widget as cb
from clipbranches_widget.column_model import vocabulary
from clipbranches_widget.encoder import bundled_encoder
from clipbranches_widget.search import search

HERE = Path(__file__).parent
N_APPENDED, N_SHARDS, N_QUERIES, N_ROUNDS = 10_000, 20, 60, 12
SMALL_ROWS, SMALL_DIM = 200_000, 384

Times = list[tuple[float, float]]
"""Seconds of the clock and of the cores."""


def clustered(n_rows: int, dim: int, seed: int) -> np.ndarray:
    """Return (n, dim) float16 rows around the same 2,000 centres."""
    centres = np.random.default_rng(99).standard_normal((2_000, dim)).astype(np.float32)
    rng = np.random.default_rng(seed)
    out = np.empty((n_rows, dim), dtype=np.float16)
    for start in range(0, n_rows, 50_000):
        n = min(50_000, n_rows - start)
        rows = centres[rng.integers(0, len(centres), n)] + 0.3
        rows += 0.8 * rng.standard_normal((n, dim), dtype=np.float32)
        out[start : start + n] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return out


def items(first: int, n_rows: int) -> pa.Table:
    """Return lines with distinct hashes."""
    hashes = [f"{row * 0x9E3779B97F4A7C15 % 2**128:032x}" for row in range(first, first + n_rows)]
    return pa.table({"uri": [f"{row}.jpg" for row in range(n_rows)], "content_hash": hashes})


def append_to_large(folder: Path, n_rows: int, dim: int) -> dict[str, Any]:
    """Append three times to a large catalog."""
    path, ready = folder / f"large-{n_rows}-{dim}.cbcat", folder / f"ingest-{n_rows}-{dim}.cbcat"
    if not path.exists() and ready.exists():
        shutil.copytree(ready, path)
    if not path.exists():
        cb.from_embeddings(
            clustered(n_rows, dim, 0), path, items=items(0, n_rows), rows_per_shard=250_000
        )
    n_shards = len(cb.open(path).shards)
    seconds = []
    for number in range(3):
        n_before = len(cb.open(path))
        rows, lines = clustered(N_APPENDED, dim, number + 1), items(n_before, N_APPENDED)
        old = files_of(path)
        started = time.perf_counter()
        added = cb.append_embeddings(path, rows, items=lines)
        seconds.append(time.perf_counter() - started)
        assert added.n_added == N_APPENDED
        assert old.items() <= files_of(path).items(), "an old file changed"
    started = time.perf_counter()
    again = cb.append_embeddings(path, rows, items=lines)
    seconds_again = time.perf_counter() - started
    assert again.n_added == 0
    return {
        "rows": n_rows,
        "dim": dim,
        "shards_before": n_shards,
        "appended": N_APPENDED,
        "seconds": seconds,
        "seconds_of_nothing_new": seconds_again,
    }


def files_of(path: Path) -> dict[Path, tuple[int, int, int]]:
    """Return inode, length and time of change of every file of the shards."""
    files = [file for file in (path / "shards").rglob("*") if file.is_file()]
    found = ((file, file.stat()) for file in files)
    return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in found}


def twenty_and_one(folder: Path) -> tuple[Path, Path]:
    """Return the same catalog in twenty shards and in one."""
    twenty, one = folder / f"twenty-{SMALL_DIM}.cbcat", folder / f"one-{SMALL_DIM}.cbcat"
    if not one.exists():
        rows, n_each = clustered(SMALL_ROWS, SMALL_DIM, 5), SMALL_ROWS // N_SHARDS
        cb.from_embeddings(rows[:n_each], twenty, encoder=bundled_encoder("cpu"))
        for start in range(n_each, SMALL_ROWS, n_each):
            cb.append_embeddings(twenty, rows[start : start + n_each])
        shutil.copytree(twenty, one)
        cb.compact(one)
    return twenty, one


def timed(times: Times, work: Callable[[], Any]) -> Any:
    """Do it, and note how long it took."""
    started, core = time.perf_counter(), time.process_time()
    outcome = work()
    times.append((time.perf_counter() - started, time.process_time() - core))
    return outcome


def bare_searches(catalogs: list[cb.Catalog]) -> tuple[list[Times], list[float]]:
    """Search both by vector, in turns; return times and recall@60."""
    times: list[Times] = [[] for _ in catalogs]
    recall: list[list[float]] = [[] for _ in catalogs]
    everything = catalogs[-1].embeddings.astype(np.float32)
    everything /= np.linalg.norm(everything, axis=1, keepdims=True)
    queries = clustered(N_QUERIES, SMALL_DIM, 17).astype(np.float32)
    best = np.argsort(-(queries @ everything.T), axis=1)[:, :60]
    del everything
    for number, (query, nearest) in enumerate([*zip(queries, best, strict=True)] * 2):
        for which in (0, 1) if number % 2 else (1, 0):
            ask = functools.partial(search, catalogs[which], query, 60)
            recall[which].append(float(np.isin(nearest, timed(times[which], ask).rows).mean()))
    return times, [statistics.mean(each) for each in recall]


def text_searches(catalogs: list[cb.Catalog], folder: Path) -> list[Times]:
    """Search both by text as a user does, in turns."""
    sessions = [cb.Session(catalog, folder / f"text-{len(catalog.shards)}") for catalog in catalogs]
    times: list[Times] = [[] for _ in catalogs]
    phrases = vocabulary()[:N_QUERIES]
    for number, phrase in enumerate([*phrases, *phrases]):
        for which in (0, 1) if number % 2 else (1, 0):
            timed(times[which], functools.partial(sessions[which].search, f"a {phrase}"))
    return times


def rounds(catalogs: list[cb.Catalog], folder: Path) -> tuple[list[Times], float]:
    """Refine on both, in turns; return times and which share of the answers is in both."""
    rng = np.random.default_rng(3)
    times: list[Times] = [[] for _ in catalogs]
    common = []
    for number in range(N_ROUNDS):
        row, answers = int(rng.integers(0, SMALL_ROWS)), []
        for which, catalog in enumerate(catalogs):
            session = cb.Session(catalog, folder / f"{number}-{which}.jsonl")
            session.warm_up()
            hits = session.search(row=row, k=400).rows
            session.label(positive=hits[:10], negative=hits[200::20])
            answers.append(timed(times[which], session.refine))
        both = np.intersect1d(answers[0].rows, answers[1].rows)
        common.append(len(both) / max(len(np.union1d(answers[0].rows, answers[1].rows)), 1))
    return times, statistics.mean(common)


def compare(paths: tuple[Path, Path]) -> dict[str, Any]:
    """Search and refine on both."""
    catalogs = [cb.open(path) for path in paths]
    with tempfile.TemporaryDirectory() as name:
        vector, recall = bare_searches(catalogs)
        text = text_searches(catalogs, Path(name))
        round_times, common = rounds(catalogs, Path(name))
    report: dict[str, Any] = {"shards": [len(catalog.shards) for catalog in catalogs]}
    report |= {"recall_at_60": recall, "answers_in_common": common}
    for what, times, n_first in (
        ("search_by_vector", vector, N_QUERIES),
        ("session_search_by_text", text, N_QUERIES),
        ("refine", round_times, 1),
    ):
        for kind, unit in enumerate(("ms", "core_ms")):
            medians = [1000 * statistics.median(t[kind] for t in each[n_first:]) for each in times]
            ratio = medians[0] / medians[1]
            report[f"{what}_{unit}"] = {"twenty": medians[0], "one": medians[1], "ratio": ratio}
    return report


def picture(figures: dict[str, Any]) -> None:
    """Draw the ratios of twenty shards to one, and the appends."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    names = ("search_by_vector", "session_search_by_text", "refine")
    for offset, unit, label in ((-0.2, "ms", "clock"), (0.2, "core_ms", "cores")):
        ratios = [figures["shards"][f"{name}_{unit}"]["ratio"] for name in names]
        bars = left.barh(np.arange(len(names)) + offset, ratios, height=0.36, label=label)
        left.bar_label(bars, fmt="%.2f", label_type="center", color="white")
    left.axvline(1.5, color="black", linewidth=0.8, linestyle=":")
    left.set_yticks(range(len(names)), ["search by vector", "search by text", "refine"])
    left.invert_yaxis()
    left.set_xlabel("time of twenty shards, one shard = 1")
    left.legend(frameon=False)
    if "append" in figures:
        append = figures["append"]
        seconds = [*append["seconds"], append["seconds_of_nothing_new"]]
        labels = ["first", "second", "third", "nothing new"]
        bars = right.barh(labels, seconds, color="C2")
        right.bar_label(bars, [f"{each:.1f}" for each in seconds], padding=3)
        right.axvline(10, color="black", linewidth=0.8, linestyle=":")
        right.invert_yaxis()
        right.set_xlabel("seconds to append 10,000 rows")
        right.set_title(f"to {append['rows']:,} x {append['dim']}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(HERE / "growth.png", dpi=150)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures: dict[str, Any] = {"cpus": os.cpu_count(), "machine": platform.machine()}
        figures["load"] = os.getloadavg()[0]
        paths = twenty_and_one(folder)
        figures["shards"] = compare(paths)
        print(json.dumps(figures["shards"], indent=1), flush=True)
        if arguments.rows:
            figures["append"] = append_to_large(folder, arguments.rows, arguments.dim)
        picture(figures)
        text = json.dumps(figures, indent=1)
        print(text)
        Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
