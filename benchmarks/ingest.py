"""Measure what a catalog of ready embeddings costs beyond its vector index alone.

    python benchmarks/ingest.py [--rows 1000000] [--dim 512] [--runs 3] [--folder DIR]

Embeddings around 2,000 centres (`growth.clustered`) lie in a float16 ``.npy`` file, their lines
(uri, caption, content hash, a column of the user's) in a Parquet file. *USearch alone*: one
``Index.add`` of all rows of the memory map with the parameters of a catalog's index, on all cores,
then ``Index.save``. *Catalog*: `from_embeddings` on the two files: read, checked, scaled, written,
vector index, columns chosen, column index, checksums of every byte, flushed to the disk, opened.
Each run of either is a process of its own, and they take turns; its clock and the time of its cores
count from after the imports. The ratio is that of the two runs of a turn; where others use the
machine, that of the cores' time says more, and the catalog's time over that of its own vector
index, which the same load slowed. Whether the two graphs are as good: how many of the true 60
nearest are among their proposals for 152. Writes ingest.json and ingest.png beside this file, other
sizes in it are kept; catalogs stay in ``--folder``.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from growth import clustered, items
from usearch.index import Index

HERE = Path(__file__).parent
N_QUERIES, N_NEAREST, N_PROPOSED = 200, 60, 152
SAMPLED_EVERY_S = 0.05

STAGES = {
    "clipbranches_widget.source_arrays:embedding_source": "lines",
    "clipbranches_widget.catalog_writer:CatalogWriter.append": "written",
    "clipbranches_widget.catalog_writer:ShardWriter.finish": "lines",
    "clipbranches_widget.catalog_writer:_column_model": "column choice",
    "clipbranches_widget.vector_index:build_vector_index": "vector index",
    "clipbranches_widget.column_build:build_sorted_columns": "column index",
    "clipbranches_widget.catalog_writer:describe_files": "checksums",
    "clipbranches_widget.storage:sync_tree": "flush",
    "clipbranches_widget.catalog:Catalog.open": "open",
}
"""Function -> stage; a stage's time is that of its functions without those that they call."""


def write_input(folder: Path, n_rows: int, dim: int) -> None:
    """Write embeddings and lines, unless they are there."""
    array, table = input_files(folder, n_rows, dim)
    if array.exists() and table.exists():
        return
    lines = items(0, n_rows)
    numbers = range(n_rows)
    lines = lines.append_column(
        "caption", pa.array([f"thing {n % 997}, view {n}" for n in numbers])
    )
    lines = lines.append_column("year", pa.array([1970 + n % 50 for n in numbers], pa.int16()))
    pq.write_table(lines, table)
    np.save(array, clustered(n_rows, dim, 0))


def input_files(folder: Path, n_rows: int, dim: int) -> tuple[Path, Path]:
    """Return where embeddings and lines are."""
    return folder / f"input-{n_rows}-{dim}.npy", folder / f"input-{n_rows}-{dim}.parquet"


def catalog_path(folder: Path, n_rows: int, dim: int) -> Path:
    """Return where the catalog is; `growth.py` appends to a copy of the same name."""
    return folder / f"ingest-{n_rows}-{dim}.cbcat"


def usearch_alone(array: Path, out: Path) -> dict[str, float]:
    """Build and save USearch's index, as its own documentation does."""
    rows = np.load(array, mmap_mode="r")
    started = time.perf_counter()
    index = Index(ndim=rows.shape[1], metric="ip", dtype="i8", connectivity=16, expansion_add=128)
    index.add(np.arange(len(rows)), rows)
    added = time.perf_counter()
    index.save(str(out))
    return {"add": added - started, "save": time.perf_counter() - added}


def whole_catalog(array: Path, table: Path, out: Path) -> dict[str, float]:
    """Build the catalog; return the seconds of its stages."""
    import clipbranches_widget as cb

    seconds: dict[str, float] = {}
    running: list[str] = []
    last = [time.perf_counter()]

    def turn(change: Callable[[], object]) -> None:
        now = time.perf_counter()
        stage = running[-1] if running else "read and scaled"
        seconds[stage] = seconds.get(stage, 0.0) + now - last[0]
        last[0] = now
        change()

    for place, stage in STAGES.items():
        _time_calls(place, functools.partial(running.append, stage), running.pop, turn)
    cb.from_embeddings(str(array), out, items=table)
    turn(lambda: None)
    return seconds


def _time_calls(
    place: str,
    enter: Callable[[], object],
    leave: Callable[[], object],
    turn: Callable[[Callable[[], object]], None],
) -> None:
    """Make a function tell when it starts and ends, wherever the package has it by name."""
    module, _, name = place.partition(":")
    owner: Any = __import__(module, fromlist=["_"])
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, last)

    @functools.wraps(original)
    def timed(*arguments: Any, **named: Any) -> Any:
        turn(enter)
        try:
            return original(*arguments, **named)
        finally:
            turn(leave)

    if path:
        setattr(owner, last, timed)
        return
    for known in list(sys.modules.values()):
        if getattr(known, "__name__", "").startswith("clipbranches_widget") and (
            vars(known).get(last) is original
        ):
            setattr(known, last, timed)


@contextlib.contextmanager
def resident(figures: dict[str, Any]) -> Iterator[None]:
    """Note the peaks of this process's memory: all of it, and that which is not files' pages."""
    stop, own = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(SAMPLED_EVERY_S):
            own[0] = max(own[0], _status("RssAnon"))

    watcher = threading.Thread(target=watch)
    figures["resident_before_mb"] = _status("VmRSS") / 1e3
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()
        figures["peak_resident_mb"] = _status("VmHWM") / 1e3
        figures["peak_anonymous_mb"] = own[0] / 1e3


def _status(field: str) -> int:
    """Return a field of Linux's /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def child(kind: str, folder: Path, n_rows: int, dim: int) -> None:
    """Run one of the two and print its figures."""
    array, table = input_files(folder, n_rows, dim)
    figures: dict[str, Any] = {"kind": kind, "load": os.getloadavg()[0]}
    if kind == "catalog":
        import clipbranches_widget  # noqa: F401 - not timed

        shutil.rmtree(catalog_path(folder, n_rows, dim), ignore_errors=True)
    with resident(figures):
        core, started = time.process_time(), time.perf_counter()
        if kind == "catalog":
            figures["stages"] = whole_catalog(array, table, catalog_path(folder, n_rows, dim))
        else:
            figures["stages"] = usearch_alone(array, folder / "alone.usearch")
        figures["seconds"] = time.perf_counter() - started
        figures["core_seconds"] = time.process_time() - core
    print(json.dumps(figures))


def in_turns(folder: Path, n_rows: int, dim: int, n_runs: int) -> list[dict[str, Any]]:
    """Return the figures of `n_runs` turns: {"usearch": ..., "catalog": ...} each."""
    turns = []
    for number in range(n_runs):
        turn = {}
        for kind in ("usearch", "catalog") if number % 2 == 0 else ("catalog", "usearch"):
            command = [sys.executable, __file__, "--child", kind, "--folder", str(folder)]
            command += ["--rows", str(n_rows), "--dim", str(dim)]
            run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            turn[kind] = json.loads(run.stdout.splitlines()[-1])
            print(json.dumps(turn[kind]), flush=True)
        turns.append(turn)
    return turns


def recall(folder: Path, n_rows: int, dim: int) -> dict[str, float]:
    """Return which share of the true nearest both graphs propose."""
    rows = np.load(input_files(folder, n_rows, dim)[0], mmap_mode="r")
    queries = clustered(N_QUERIES, dim, 17).astype(np.float32)
    best = np.empty((N_QUERIES, 0), np.float32)
    ids = np.empty((N_QUERIES, 0), np.int64)
    for start in range(0, n_rows, 50_000):
        block = rows[start : start + 50_000].astype(np.float32)
        best = np.concatenate([best, queries @ block.T], axis=1)
        numbers = np.broadcast_to(np.arange(start, start + len(block)), (N_QUERIES, len(block)))
        ids = np.concatenate([ids, numbers], axis=1)
        kept = np.argsort(-best, axis=1)[:, :N_NEAREST]
        best, ids = np.take_along_axis(best, kept, 1), np.take_along_axis(ids, kept, 1)
    shares = {}
    catalog = catalog_path(folder, n_rows, dim) / "shards" / "0000" / "vectors.usearch"
    for kind, file in (("usearch", folder / "alone.usearch"), ("catalog", catalog)):
        graph = Index.restore(str(file), view=True)
        graph.expansion_search = 512
        found = graph.search(queries, N_PROPOSED).keys
        shares[kind] = float(
            np.mean([np.isin(a, b).mean() for a, b in zip(ids, found, strict=True)])
        )
    return shares


def summary(turns: list[dict[str, Any]], n_rows: int) -> dict[str, Any]:
    """Return medians over the turns."""

    def median(kind: str, *keys: str) -> float:
        return statistics.median(functools.reduce(dict.__getitem__, keys, t[kind]) for t in turns)

    report: dict[str, Any] = {"n_runs": len(turns)}
    for kind in ("usearch", "catalog"):
        names = ("seconds", "core_seconds", "peak_resident_mb", "peak_anonymous_mb")
        report[kind] = {name: median(kind, name) for name in names}
        report[kind]["rows_per_s"] = n_rows / report[kind]["seconds"]
        report[kind]["load"] = [turn[kind]["load"] for turn in turns]
        stages = turns[0][kind]["stages"]
        report[kind]["stage_s"] = {name: median(kind, "stages", name) for name in stages}
    for name in ("seconds", "core_seconds"):
        ratios = [turn["catalog"][name] / turn["usearch"][name] for turn in turns]
        report[f"ratio_of_{name}"] = statistics.median(ratios)
        report[f"ratios_of_{name}"] = ratios
    own = [t["catalog"]["seconds"] / t["catalog"]["stages"]["vector index"] for t in turns]
    report["ratio_to_its_own_vector_index"] = statistics.median(own)
    return report


def picture(sizes: list[dict[str, Any]]) -> None:
    """Draw the stages of both, in units of USearch alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.9 * len(sizes)))
    axes = figure.subplots()
    names = ["vector index", "column index", "column choice", "read and scaled"]
    names += ["lines", "written", "checksums", "flush"]
    labels = []
    for place, size in enumerate(sizes):
        whole = size["usearch"]["seconds"]
        axes.barh(2.4 * place, 1.0, color="#9aa0a6", label=None if place else "USearch alone")
        stages, left = dict(size["catalog"]["stage_s"]), 0.0
        shown = {name: stages.pop(name, 0.0) for name in names}
        shown["the rest"] = sum(stages.values())
        for number, (name, seconds) in enumerate(shown.items()):
            width = seconds / whole
            label = None if place else name
            axes.barh(2.4 * place + 1, width, left=left, color=f"C{number}", label=label)
            left += width
        labels += [(2.4 * place, f"{size['rows']:,} x {size['dim']}: alone")]
        labels += [(2.4 * place + 1, "catalog")]
    axes.axvline(1.3, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks([at for at, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlabel("time, USearch's build alone = 1 (medians of the runs)")
    figure.legend(frameon=False, ncols=5, loc="upper center", fontsize="small")
    figure.tight_layout(rect=(0, 0, 1, 0.84))
    figure.savefig(HERE / "ingest.png", dpi=150)


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", choices=("usearch", "catalog"))
    arguments = parser.parse_args()
    n_rows, dim, folder = arguments.rows, arguments.dim, arguments.folder
    if arguments.child:
        child(arguments.child, folder, n_rows, dim)
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_input(folder, n_rows, dim)
    size = {
        "rows": n_rows,
        "dim": dim,
        **summary(in_turns(folder, n_rows, dim, arguments.runs), n_rows),
    }
    size["proposed_of_60_nearest"] = recall(folder, n_rows, dim)
    file = Path(__file__).with_suffix(".json")
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"sizes": []}
    others = [old for old in report["sizes"] if (old["rows"], old["dim"]) != (n_rows, dim)]
    report["machine"] = {"cpu_count": os.cpu_count(), "machine": platform.machine()}
    report["sizes"] = sorted([*others, size], key=lambda each: (each["rows"], each["dim"]))
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(size, indent=1))
    picture(report["sizes"])


if __name__ == "__main__":
    main()
