"""Kill append and compact at random moments, and look at what is left.

    python benchmarks/growth_kills.py [--kills 200]

One catalog lives through all of it. A child process appends 500 rows, then compacts, and is sent
SIGKILL after a random time. Then the catalog is opened, every byte is compared with its checksums,
and every row with the embedding it must have: rows of an append are there all or none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

import clipbranches_widget as cb

DIM, N_FIRST, N_EACH = 16, 1_000, 500

CHILD = f"""
import sys
import numpy as np
import clipbranches_widget as cb
path, seed = sys.argv[1], int(sys.argv[2])
rows = np.random.default_rng(seed).standard_normal(({N_EACH}, {DIM}))
n_rows = len(cb.open(path))
print("append", flush=True)
cb.append_embeddings(path, rows)
print("compact", flush=True)
cb.compact(path, rows_per_shard=1_000_000 if seed % 5 == 0 else n_rows // 2)
print("done", flush=True)
"""


def embeddings(seed: int, n_rows: int) -> np.ndarray:
    """Return the embeddings that a seed stands for, as a catalog stores them."""
    rows = np.random.default_rng(seed).standard_normal((n_rows, DIM))
    rows /= np.abs(rows).max(axis=1, keepdims=True)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def main() -> None:
    """Kill, look, say what was seen."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    n_kills = parser.parse_args().kills
    rng = np.random.default_rng(0)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.cbcat"
        first = embeddings(10**6, N_FIRST)
        cb.from_embeddings(np.random.default_rng(10**6).standard_normal((N_FIRST, DIM)), path)
        expected, full_s, n_done = first, [], 0
        while n_done < n_kills:
            seed = sum(counts.values())
            limit_s = float(rng.uniform(0, 1.1 * max(full_s[-5:], default=2.0)))
            said, took_s = run(path, seed, limit_s)
            counts[said] += 1
            if said == "done":
                full_s.append(took_s)
            else:
                n_done += 1
            catalog = cb.open(path)
            catalog.verify()
            appended = np.concatenate([expected, embeddings(seed, N_EACH)])
            if len(catalog) == len(appended):
                expected = appended
            assert np.array_equal(catalog.embeddings, expected), "rows were lost or half there"
            assert catalog.items.column("row").to_pylist() == list(range(len(catalog)))
            if len(expected) > 20_000:  # start again: not to grow for ever
                path = path.with_name(f"{seed}.cbcat")
                start = np.random.default_rng(10**6).standard_normal((N_FIRST, DIM))
                cb.from_embeddings(start, path)
                expected = first
        print(json.dumps({"kills": n_done, "killed_during": dict(counts), "problems": 0}))


def run(path: Path, seed: int, limit_s: float) -> tuple[str, float]:
    """Run the child and kill it after a time; return how far it said it was, and its seconds."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(seed)], stdout=subprocess.PIPE, text=True
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        started = time.perf_counter()
        try:
            child.wait(limit_s)
        except subprocess.TimeoutExpired:
            child.kill()
        lines = child.stdout.read().split()
    return (lines[-1] if lines else "append"), time.perf_counter() - started


if __name__ == "__main__":
    main()
