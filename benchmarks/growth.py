"""Measure growing catalogs: appending to a large one, and asking twenty shards instead of one.

    python benchmarks/growth.py [--rows 1000000] [--dim 512] [--folder DIR]

Random embeddings around 2,000 centres, with content hashes. *append*: 10,000 rows to a catalog of
``--rows`` in shards of 250,000, without the time of a model. *shards*: 200,000 rows of 128
dimensions, appended in twenty equal parts, and the same catalog after `compact`: searches by
vector (k = 60) and rounds of refinement with ten yes and ten no, alternately on both; medians.
Writes growth.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

import clipbranches_widget as cb
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.search import search

N_APPENDED, N_SHARDS, N_QUERIES, N_ROUNDS = 10_000, 20, 60, 12
SMALL_ROWS, SMALL_DIM = 200_000, 128


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
    path = folder / f"large-{n_rows}-{dim}.cbcat"
    if not path.exists():
        cb.from_embeddings(
            clustered(n_rows, dim, 0), path, items=items(0, n_rows), rows_per_shard=250_000
        )
    seconds = []
    for number in range(3):
        n_before = len(cb.open(path))
        rows, lines = clustered(N_APPENDED, dim, number + 1), items(n_before, N_APPENDED)
        old = {file: file.stat().st_mtime_ns for file in path.rglob("*.npy")}
        started = time.perf_counter()
        added = cb.append_embeddings(path, rows, items=lines)
        seconds.append(time.perf_counter() - started)
        assert added.n_added == N_APPENDED
        assert old == {file: file.stat().st_mtime_ns for file in old}, "an old file changed"
    started = time.perf_counter()
    again = cb.append_embeddings(path, rows, items=lines)
    seconds_again = time.perf_counter() - started
    assert again.n_added == 0
    return {
        "rows": n_rows,
        "dim": dim,
        "appended": N_APPENDED,
        "seconds": seconds,
        "seconds_of_nothing_new": seconds_again,
    }


def twenty_and_one(folder: Path) -> tuple[Path, Path]:
    """Return the same catalog in twenty shards and in one."""
    twenty, one = folder / "twenty.cbcat", folder / "one.cbcat"
    if not one.exists():
        rows, n_each = clustered(SMALL_ROWS, SMALL_DIM, 5), SMALL_ROWS // N_SHARDS
        cb.from_embeddings(rows[:n_each], twenty)
        for start in range(n_each, SMALL_ROWS, n_each):
            cb.append_embeddings(twenty, rows[start : start + n_each])
        shutil.copytree(twenty, one)
        cb.compact(one)
    return twenty, one


def compare(paths: tuple[Path, Path]) -> dict[str, Any]:
    """Search and refine on both, alternately."""
    catalogs = [cb.open(path) for path in paths]
    rng = np.random.default_rng(3)
    queries = clustered(N_QUERIES, SMALL_DIM, 17).astype(np.float32)
    search_s: list[list[float]] = [[], []]
    refine_s: list[list[float]] = [[], []]
    recall: list[list[float]] = [[], []]
    overlap = []
    everything = catalogs[0].embeddings.astype(np.float32)
    norms = np.linalg.norm(everything, axis=1)
    for query in queries:
        best = set(np.argsort(-(everything @ query) / norms)[:60].tolist())
        for which, catalog in enumerate(catalogs):
            started = time.perf_counter()
            found = search(catalog, query, 60)
            search_s[which].append(time.perf_counter() - started)
            recall[which].append(len(best & set(found.rows.tolist())) / 60)
    with tempfile.TemporaryDirectory() as sessions:
        for number in range(N_ROUNDS):
            row = int(rng.integers(0, SMALL_ROWS))
            answers = []
            for which, catalog in enumerate(catalogs):
                session = cb.Session(catalog, Path(sessions) / f"{number}-{which}.jsonl")
                hits = session.search(row=row, k=400).rows
                session.label(positive=hits[:10], negative=hits[200::20])
                started = time.perf_counter()
                answers.append(session.refine())
                refine_s[which].append(time.perf_counter() - started)
            both = np.intersect1d(answers[0].rows, answers[1].rows)
            overlap.append(len(both) / max(len(np.union1d(answers[0].rows, answers[1].rows)), 1))
    return {
        "shards": [len(catalog.shards) for catalog in catalogs],
        "search_ms": [1000 * statistics.median(each[5:]) for each in search_s],
        "refine_ms": [1000 * statistics.median(each[1:]) for each in refine_s],
        "recall_at_60": [statistics.mean(each) for each in recall],
        "answers_in_common": statistics.mean(overlap),
    }


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
        for path in paths:  # load compiled loops first
            CatalogIndex(cb.open(path)).columns.loader.wait()
        figures["shards"] = compare(paths)
        print(json.dumps(figures["shards"], indent=1), flush=True)
        if arguments.rows:
            figures["append"] = append_to_large(folder, arguments.rows, arguments.dim)
        text = json.dumps(figures, indent=1)
        print(text)
        Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
