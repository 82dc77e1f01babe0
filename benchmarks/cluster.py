"""Measure searches and rounds on a Dask cluster against one machine, and what moves.

    python benchmarks/cluster.py [--rows 200000 | --catalogs PATH ...] [--folder DIR]

The catalogs of `rounds`, or any others. Searches by the vector of a random row (k = 60) and rounds
of refinement with ten yes and ten no, each asked in turn of the indexes on this machine (all cores)
and of a LocalCluster of one and of two worker processes with one thread each: every answer is
checked to be the same. Warm: what is asked first of each user is not counted, as its sample moves
once. Bytes are those of requests and answers, as packed. Writes the part "rounds" of cluster.json
beside this file; the others are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from distributed import Client, LocalCluster
from rounds import build

import clipbranches_widget as cb
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.cluster import ClusterIndex
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import refine, warm_up
from clipbranches_widget.search import search

HERE = Path(__file__).parent
N_USERS, N_ROUNDS, N_SEARCHES, K = 3, 4, 7, 60
N_LABELS, FAR_RANKS = 10, (200, 400)

T = TypeVar("T")


def timed(work: Callable[[], T], seconds: list[float]) -> T:
    """Return what `work` does, and note how long it took."""
    start = time.perf_counter()
    done = work()
    seconds.append(time.perf_counter() - start)
    return done


def measure(path: Path, n_workers: int) -> dict[str, Any]:
    """Ask one machine and a cluster in turn; return medians."""
    with (
        LocalCluster(
            n_workers=n_workers, threads_per_worker=1, memory_limit=0, dashboard_address=":0"
        ) as workers,
        Client(workers) as client,
    ):
        near, far = cb.open(path), cb.open(path, client=client)
        here, there = CatalogIndex(near), ClusterIndex(far, client)
        far.opened("cluster index", lambda: there)
        here.columns.loader.wait()
        warm_up()
        rng = np.random.default_rng(1)
        times: dict[str, list[float]] = {name: [] for name in ("s", "S", "r", "R", "first")}
        moved: dict[str, list[float]] = {name: [] for name in ("search", "first", "round", "trips")}
        for _ in range(N_USERS):
            rows = rng.integers(len(near), size=N_SEARCHES)
            for n, vector in enumerate(near.embeddings_of(rows).astype(np.float32)):
                before = there.bytes_moved
                one = timed(partial(search, near, vector, K), times["s"])
                two = timed(partial(search, far, vector, K), times["S"])
                assert np.array_equal(one.rows, two.rows)
                moved["search"].append(there.bytes_moved - before)
                if n == 0:
                    del times["s"][-1], times["S"][-1]
            hits = search(near, vector, FAR_RANKS[1]).rows
            labels = LabelSet(hits[:N_LABELS], rng.choice(hits[FAR_RANKS[0] :], N_LABELS))
            for n in range(N_ROUNDS):
                before, trips = there.bytes_moved, there.n_round_trips
                asked = partial(refine, labels=labels, query=vector)
                one = timed(partial(asked, here), times["r"])
                two = timed(partial(asked, there), times["R"])
                for name in ("rows", "scores", "margins", "branch_ids"):
                    assert np.array_equal(getattr(one, name), getattr(two, name))
                moved["round" if n else "first"].append(there.bytes_moved - before)
                moved["trips"].append(there.n_round_trips - trips)
                if n == 0:
                    del times["r"][-1]
                    times["first"].append(times["R"].pop())
        n_codes = len(near) * here.model.n_columns
        names = {"s": "search_here", "S": "search", "r": "round_here", "R": "round"}
        return {
            "workers": n_workers,
            **{f"{name}_ms": 1000 * statistics.median(times[key]) for key, name in names.items()},
            "first_round_ms": 1000 * statistics.median(times["first"]),
            "round_trips": statistics.median(moved["trips"]),
            "search_bytes": statistics.median(moved["search"]),
            "first_round_bytes": moved["first"][0],
            "round_bytes": statistics.median(moved["round"]),
            "round_share_of_codes": statistics.median(moved["round"]) / n_codes,
            "first_round_share_of_codes": moved["first"][0] / n_codes,
        }


def main() -> None:
    """Measure each catalog with one and two workers, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[200_000])
    parser.add_argument("--catalogs", type=Path, nargs="+")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    paths = arguments.catalogs or [build(arguments.folder, n_rows) for n_rows in arguments.rows]
    sizes = []
    for path in paths:
        info = cb.open(path).info()
        about = {"rows": info["n_images"], "shards": info["n_shards"], "dim": info["dim"]}
        sizes.append({**about, "runs": [measure(path, n) for n in (1, 2)]})
        print(json.dumps(sizes[-1], indent=1), flush=True)
    file = HERE / "cluster.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    machine = {"cpu_count": os.cpu_count(), "machine": platform.machine()}
    report["rounds"] = {"machine": machine, "load": os.getloadavg()[0], "sizes": sizes}
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
