"""Measure the column index beside everything people would use instead, on the same data.

    python benchmarks/boxes.py [--rows 100000 1000000 10000000] [--columns 32 128] [--large]

For each catalog: the rows inside distilled boxes of three selectivities (``boxes few``, ``main``
and ``many``), the rows above 0 of the forests these come from (``distilled``), and of 50 plainly
boosted trees (``plain``). Every peer is warmed once, then timed 7 times (3 where a run takes over
a second); every answer is compared with plain NumPy comparisons or XGBoost's margins.

``bytes_read`` of ours are those of the plan; of a peer, each column that its boxes name once, or
its whole matrix. ``rows_touched`` are rows whose codes or posting lists are read: bit vectors read
a bit a row and bound instead. Small catalogs stay in the processor's cache, so their GB/s say
little about memory. Peak memory is that of the process, which holds the codes and what is
compared beside the system; what a system added is in brackets in the tables.

Writes boxes.json (after every step) and boxes.png beside this file, and prints tables.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import box_data
import box_large
import box_measure
import box_ours
import box_peers
import box_report
import numpy as np
from box_data import Distilled
from box_measure import Bench, Record, Rows, say
from numpy.typing import NDArray

from clipbranches_widget.column_model import default_column_model
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.trees import TreeEnsemble

HERE = Path(__file__).parent
SELECTIVITIES = (("main", 0.02, 0.006), ("few", 0.002, 0.0006), ("many", 0.1, 0.006))
"""Name, share of rows that the boxes should hold, share of nearest rows that positives are of."""

PLAIN = box_report.PLAIN_TASK
BYTES_PER_ELEMENT = 2 + 9 + 1 + 1
"""Embeddings, index, index of codes only, Parquet."""


@dataclass
class Rounds:
    """What is asked of one catalog, and the right answers."""

    labels: LabelSet
    background: NDArray[np.int64]
    plain: Any
    distilled: list[Distilled]
    expected: dict[str, Rows]


def boxes_task(distilled: Distilled) -> str:
    """Name the boxes of a selectivity."""
    return f"boxes {distilled.name}"


def trees_task(distilled: Distilled) -> str:
    """Name the forest of a selectivity."""
    return f"distilled {distilled.name}"


def train(
    bench: Bench, embeddings: NDArray[np.float16], codes: NDArray[np.uint8], full: SortedColumns
) -> Rounds:
    """Label, train, and answer the boxes by plain comparisons."""
    index = box_ours.Indexes.of(full, full).compiled
    light = box_data.LightIndex(embeddings, index)
    distilled = [
        box_data.distil(light, box_data.label(embeddings, near)[0], name, share)
        for name, share, near in SELECTIVITIES
    ]
    labels, background = box_data.label(embeddings)
    booster = box_data.plain_trees(index, labels, background)
    expected = {boxes_task(each): box_peers.naive_rows(codes, each.boxes) for each in distilled}
    bench.note(
        main_task=boxes_task(distilled[0]),
        baseline_task=trees_task(distilled[0]),
        plain_task=PLAIN,
        main_share=distilled[0].share,
        trees={
            boxes_task(each): {
                "target_share": each.target,
                "share_of_rows": each.share,
                "boxes": len(each.boxes),
                "boxes_of_the_model": len(each.model.boxes),
                "ranges": sum(len(box.ranges) for box in each.boxes),
                "threshold": each.model.threshold,
            }
            for each in distilled
        },
    )
    return Rounds(labels, background, booster, distilled, expected)


def scan_peers(bench: Bench, codes: NDArray[np.uint8], rounds: Rounds) -> None:
    """Run the models over all rows; XGBoost's answers are the reference of the trees."""
    matrix = box_peers.RowMajor(codes)
    expected = rounds.expected
    expected[PLAIN] = box_peers.inplace_predict(bench, PLAIN, matrix, rounds.plain)
    for number, each in enumerate(rounds.distilled):
        task = trees_task(each)
        expected[task] = box_peers.inplace_predict(
            bench, task, matrix, each.booster, one_thread=number == 0
        )
    labelled = {"labels": rounds.labels, "background": rounds.background}
    box_peers.random_forest(bench, PLAIN, matrix, codes, **labelled)


def ours(bench: Bench, full: SortedColumns, codes_only: SortedColumns, rounds: Rounds) -> None:
    """Answer everything with the column index."""
    indexes = box_ours.Indexes.of(full, codes_only)
    expected = rounds.expected
    for each in rounds.distilled:
        task = boxes_task(each)
        box_ours.answer_boxes(bench, indexes, task, each.boxes, expected[task])
    ensembles = {trees_task(each): each.model.forest for each in rounds.distilled[:1]}
    ensembles[PLAIN] = TreeEnsemble.from_booster(rounds.plain)
    for task, ensemble in ensembles.items():
        box_ours.answer_trees(bench, indexes, task, ensemble, expected[task])
    main = rounds.distilled[0]
    box_ours.anytime(bench, indexes.compiled, main.boxes)
    say("  eight threads")
    box_ours.concurrent(bench, indexes.compiled, main.boxes, expected[boxes_task(main)])
    say("  crossover")
    box_ours.crossover(bench, indexes.compiled)


def measure_catalog(bench: Bench, n_rows: int, n_columns: int, folder: Path) -> None:
    """Measure everything on one catalog, with one group of systems in memory at a time."""
    needed, free = n_rows * n_columns * BYTES_PER_ELEMENT + 10**9, shutil.disk_usage(folder).free
    if free < needed:
        bench.note(left_out=f"needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
        return
    say(f"{n_rows:,} rows x {n_columns} columns: data")
    clock = box_measure.CpuClock()
    embeddings = box_data.write_embeddings(folder / "embeddings.npy", n_rows, n_columns)
    model = default_column_model(embeddings, encoder=None, n_columns=n_columns)
    say("  build")
    full, built = box_data.build(embeddings, model, folder / "full", "full")
    codes_only, built_codes = box_data.build(embeddings, model, folder / "codes", "codes")
    bench.note(build=built, build_codes_only=built_codes, parts=box_ours.index_bytes(full))
    codes = np.array(full.codes)
    say("  trees")
    rounds = train(bench, embeddings, codes, full)
    scan_peers(bench, codes, rounds)
    gc.collect()
    ours(bench, full, codes_only, rounds)
    asked = [
        (boxes_task(each), each.boxes, rounds.expected[boxes_task(each)])
        for each in rounds.distilled
    ]
    for task, boxes, expected in asked:
        box_peers.numpy_masks(bench, codes, boxes, task, expected)
    box_peers.frames(bench, codes, asked, folder)
    del codes
    gc.collect()
    pairs = [
        (task, each, rows) for (task, _, rows), each in zip(asked, rounds.distilled, strict=True)
    ]
    box_peers.vector_top_k(bench, embeddings, pairs[:1], folder)
    for each in rounds.distilled:
        baseline = bench.find(trees_task(each), box_peers.INPLACE_ALL)
        bench.compare(boxes_task(each), baseline)
        bench.compare(trees_task(each), baseline)
    bench.compare(PLAIN, bench.find(PLAIN, box_peers.INPLACE_ALL))
    bench.note(cores_used_by_others=clock.others())


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--columns", type=int, nargs="+", default=[32, 128])
    parser.add_argument(
        "--large",
        type=int,
        nargs="?",
        const=100_000_000,
        metavar="ROWS",
        help="also a catalog of 100 million rows x 32 columns (or ROWS): 36 GB of disk",
    )
    parser.add_argument(
        "--limiter",
        default=box_large.LIMITER,
        help=f"runs a command under {box_large.MEMORY_LIMIT} of memory, for --large",
    )
    parser.add_argument("--folder", type=Path, help="where the data goes and is deleted again")
    parser.add_argument("--out", type=Path, default=HERE / "boxes.json")
    return parser.parse_args()


def main() -> None:
    """Measure, write, draw, print."""
    options = arguments()
    record = Record(options.out)
    bandwidth = box_measure.memory_bandwidth()
    asked = {"rows": options.rows, "columns": options.columns, "large": options.large}
    record.data |= {"asked": asked, "machine": box_measure.machine()}
    record.data |= {"memory_bandwidth_gb_s": bandwidth, "catalogs": []}
    for n_columns in options.columns:
        for n_rows in options.rows:
            figures: dict[str, Any] = {"rows": n_rows, "columns": n_columns}
            record.data["catalogs"].append(figures)
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                measure_catalog(Bench(record, figures, bandwidth), n_rows, n_columns, Path(folder))
            gc.collect()
    if options.large:
        record.data["large"] = {}
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            bench = Bench(record, record.data["large"], bandwidth)
            box_large.measure_large(bench, options.large, Path(folder), options.limiter)
    record.data["machine"]["load_at_end"] = os.getloadavg()[0]
    record.save()
    record.data["bars"] = box_report.bars(record.data)
    record.save()
    print(box_report.tables(record.data))
    if any("main_task" in catalog for catalog in record.data["catalogs"]):
        box_report.draw(record.data, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
