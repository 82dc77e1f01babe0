"""Measure whole rounds, label to answer, on catalogs of growing size.

    python benchmarks/rounds.py [--rows 100000 1000000 10000000] [--folder DIR]

Real embeddings (the large collection of `quality_data`, 82,000 definitions) reduced to 128
dimensions, repeated with noise to each size, 128 columns, one vector index a shard of a million.
Each of eight users searches by a row, marks the nearest ten yes and ten of the ranks 200 to 400 no,
and refines four times with different seeds: the first call and the median of the others, by stage.
Building ten million rows takes half an hour on two cores and 20 GB of disk; what is in ``--folder``
is used again. Writes rounds.json and rounds.png beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from quality_data import load

import clipbranches_widget as cb

HERE = Path(__file__).parent
DIM = 128
NOISE = 0.6
N_USERS, N_ROUNDS, N_LABELS = 8, 4, 10
FAR_RANKS = (200, 400)


def reduced_embeddings() -> NDArray[np.float32]:
    """Return the large collection in `DIM` dimensions: its principal axes and a common part."""
    rows = np.asarray(load("large").embeddings, dtype=np.float32)
    centred = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh(np.cov(centred[::4].T))
    common = np.full((len(rows), 1), 0.1)
    joined = np.concatenate([centred @ axes[:, ::-1][:, : DIM - 1], common], axis=1)
    return _unit(joined.astype(np.float32))


def build(folder: Path, n_rows: int) -> Path:
    """Build the catalog of one size, unless it is there: its path."""
    path = folder / f"rounds-{n_rows}.cbcat"
    if path.exists():
        return path
    rows, rng = reduced_embeddings(), np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".npy") as scratch:
        array = np.lib.format.open_memmap(scratch.name, "w+", np.float16, (n_rows, DIM))
        for start in range(0, n_rows, len(rows)):
            part = rows[: n_rows - start]
            noise = rng.normal(0, NOISE / np.sqrt(DIM), part.shape).astype(np.float32)
            array[start : start + len(part)] = _unit(part + noise if start else part)
        cb.from_embeddings(array, path, progress=True)
    return path


def measure(path: Path) -> dict[str, Any]:
    """Let the users refine; return medians."""
    catalog = cb.open(path)
    rng = np.random.default_rng(1)
    first, warm, searches, stages, touched, found = [], [], [], [], [], []
    for _ in range(N_USERS):
        with tempfile.TemporaryDirectory() as scratch:
            session = cb.Session(catalog, Path(scratch) / "session.jsonl")
            session.warm_up()
            start = time.perf_counter()
            hits = session.search(row=int(rng.integers(len(catalog))), k=FAR_RANKS[1])
            searches.append(time.perf_counter() - start)
            far = rng.choice(np.arange(*FAR_RANKS), N_LABELS, replace=False)
            session.label(positive=hits.rows[:N_LABELS], negative=hits.rows[far])
            took = []
            for seed in range(N_ROUNDS):
                start = time.perf_counter()
                result = session.refine(seed=seed)
                took.append(time.perf_counter() - start)
                stages.append(dict(result.timings))
            first.append(took[0])
            warm += took[1:]
            touched.append(result.n_touched / len(catalog))
            found.append(len(result))
    return {
        "rows": len(catalog),
        "shards": len(catalog.shards),
        "columns": catalog.info()["n_columns"],
        "search_ms": 1000 * statistics.median(searches),
        "first_round_ms": 1000 * statistics.median(first),
        "round_ms": 1000 * statistics.median(warm),
        "slowest_round_ms": 1000 * max(warm),
        "stage_ms": {
            name: 1000 * statistics.median(each[name] for each in stages)
            for name in stages[0]
            if name != "total"
        },
        "share_scored": statistics.median(touched),
        "rows_found": statistics.median(found),
        "peak_resident_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def picture(sizes: list[dict[str, Any]]) -> None:
    """Draw the stages of a round at each size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.8 + 0.6 * len(sizes)))
    names = [f"{size['rows']:,} rows" for size in sizes]
    left = np.zeros(len(sizes))
    for stage in sizes[0]["stage_ms"]:
        widths = np.array([size["stage_ms"][stage] for size in sizes])
        axes.barh(names, widths, left=left, label=stage)
        left += widths
    axes.set_xlabel("milliseconds a round, warm, by stage")
    axes.invert_yaxis()
    axes.legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    figure.tight_layout()
    figure.savefig(HERE / "rounds.png", dpi=150)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    unit: NDArray[np.float32] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def main() -> None:
    """Build what is missing, measure, write the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    sizes = []
    for n_rows in arguments.rows:
        sizes.append(measure(build(arguments.folder, n_rows)))
        print(json.dumps(sizes[-1], indent=1), flush=True)
    machine = {"cpu_count": os.cpu_count(), "machine": platform.machine()}
    report = {"machine": machine, "dim": DIM, "sizes": sizes}
    (HERE / "rounds.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    picture(sizes)


if __name__ == "__main__":
    main()
