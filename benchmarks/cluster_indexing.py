"""Measure indexing on the workers of a local cluster against indexing without one.

Images: the drawings of the demo catalog, with the bundled encoder. Embeddings: random ones of 512
numbers, whose indexes alone are built. Every run is a process of its own; torch and BLAS have one
thread, and so has every worker. The runs of each mode take turns. ``rows_per_s`` is of the whole
call, the text tower and the column choice of the client included. A small build before it imports
torch everywhere. Only an idle machine with a core to spare for each worker shows how it scales:
``machine`` says how busy this one was.

    python benchmarks/cluster_indexing.py [--images 2000] [--embeddings 100000] [--repeats 3]

Writes key "indexing" of cluster.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).with_name("cluster.json")
MODES = {"serial": 0, "1 worker": 1, "2 workers": 2}
DIM = 512


def peak_mb() -> float:
    """Return the most memory this process had, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def build(kind: str, n_rows: int, path: Path, client: Any) -> float:
    """Build one catalog; returns the seconds it took."""
    import clipbranches_widget as cb
    from clipbranches_widget.demo_catalog import openmoji_items

    if kind == "images":
        table = openmoji_items()
        source = table.take(np.arange(n_rows) % len(table))
        options = {"model": "bundled", "device": "cpu", "with_map": False, "progress": False}
        start = time.perf_counter()
        cb.index(source, path, client=client, **options)
    else:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((1000, DIM), np.float32)
        vectors = centres[rng.integers(0, 1000, n_rows)]
        vectors += rng.standard_normal((n_rows, DIM), np.float32)
        start = time.perf_counter()
        cb.from_embeddings(vectors.astype(np.float16), path, client=client)
    return time.perf_counter() - start


def one(kind: str, n_rows: int, n_workers: int) -> dict[str, Any]:
    """Run one build in this process."""
    with tempfile.TemporaryDirectory() as folder:
        if not n_workers:
            build(kind, 64, Path(folder, "first"), None)
            seconds = build(kind, n_rows, Path(folder, "second"), None)
            return {"seconds": seconds, "client_mb": peak_mb(), "workers_mb": []}
        from distributed import Client, LocalCluster

        with (
            LocalCluster(
                n_workers=n_workers, threads_per_worker=1, dashboard_address="127.0.0.1:0"
            ) as cluster,
            Client(cluster) as client,
        ):
            build(kind, 64 * n_workers, Path(folder, "first"), client)
            seconds = build(kind, n_rows, Path(folder, "second"), client)
            peaks = sorted(client.run(peak_mb).values())
        return {"seconds": seconds, "client_mb": peak_mb(), "workers_mb": peaks}


def measured(kind: str, n_rows: int, repeats: int) -> dict[str, Any]:
    """Run every mode `repeats` times, in turns."""
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    for number in range(repeats):
        for mode, n_workers in MODES.items():
            command = [sys.executable, __file__, "--one", kind, str(n_rows), str(n_workers)]
            text = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            runs[mode].append(json.loads(text.splitlines()[-1]))
            print(kind, mode, number, runs[mode][-1], flush=True)
    return {
        "rows": n_rows,
        **{
            mode: {
                "rows_per_s": round(n_rows / statistics.median(r["seconds"] for r in done), 1),
                "seconds": [round(r["seconds"], 2) for r in done],
                "client_mb": max(r["client_mb"] for r in done),
                "workers_mb": max(r["workers_mb"] for r in done),
            }
            for mode, done in runs.items()
        },
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--embeddings", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        kind, n_rows, n_workers = arguments.one
        print(json.dumps(one(kind, int(n_rows), int(n_workers))))
        return
    load = os.getloadavg()[0]
    found = {
        "images": measured("images", arguments.images, arguments.repeats),
        "embeddings": measured("embeddings", arguments.embeddings, arguments.repeats),
        "machine": {
            "cpus": os.cpu_count(),
            "load_before": round(load, 2),
            "load_after": round(os.getloadavg()[0], 2),
            "python": platform.python_version(),
        },
    }
    known = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    OUT.write_text(json.dumps({**known, "indexing": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
