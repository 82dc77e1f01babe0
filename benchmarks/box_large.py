"""A catalog larger than memory: built here, answered by `box_answer.py` in a process of its own."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import box_data
import numpy as np
from box_measure import Bench, Rows, say
from box_peers import INPLACE_ALL, RowMajor, inplace_predict, naive_rows
from numpy.typing import NDArray

from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.column_model import default_column_model
from clipbranches_widget.concept_file import boxes_to_list, forest_to_dict
from clipbranches_widget.trees import TreeEnsemble

N_COLUMNS = 32
MAIN_SHARE = 0.02
MEMORY_LIMIT = "6 GB"
LIMITER = "systemd-run --scope --quiet -p MemoryMax=6G -p MemorySwapMax=0"
BYTES_PER_ELEMENT = 2 + 9
REFERENCE_ROWS = 10_000_000


def measure_large(bench: Bench, n_rows: int, folder: Path, limiter: str) -> None:
    """Build, answer cold and warm in a new process, and again under a memory limit."""
    needed, free = n_rows * N_COLUMNS * BYTES_PER_ELEMENT + 10**9, shutil.disk_usage(folder).free
    bench.note(rows=n_rows, columns=N_COLUMNS, disk_needed_gb=needed / 1e9, disk_free_gb=free / 1e9)
    if free < needed:
        bench.note(left_out=f"needs {needed / 1e9:.0f} GB of disk, {free / 1e9:.0f} GB are free")
        return
    say(f"{n_rows:,} rows x {N_COLUMNS} columns: data")
    embeddings = box_data.write_embeddings(folder / "embeddings.npy", n_rows, N_COLUMNS)
    model = default_column_model(embeddings, encoder=None, n_columns=N_COLUMNS)
    say("build")
    columns, built = box_data.build(embeddings, model, folder / "index", "full")
    bench.note(build=built)
    index = ColumnIndex([columns])
    index.loader.wait()
    labels, background = box_data.label(embeddings)
    light = box_data.LightIndex(embeddings, index)
    distilled = box_data.distil(light, labels, "main", MAIN_SHARE)
    booster = box_data.plain_trees(index, labels, background)
    del embeddings, light
    (folder / "embeddings.npy").unlink()
    asked = {
        "folder": str(folder),
        "rows": n_rows,
        "columns": N_COLUMNS,
        "boxes": boxes_to_list(distilled.boxes),
        "trees": forest_to_dict(TreeEnsemble.from_booster(booster)),
    }
    (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
    codes = columns.codes
    del index, columns
    expected = {"boxes": _in_blocks(codes, distilled.boxes)}
    bench.note(main_task="boxes", baseline_task="distilled trees", plain_task="trees")
    bench.note(main_share=distilled.share, boxes=len(distilled.boxes))
    matrix = RowMajor(codes)
    for task, asked_booster in (("trees", booster), ("distilled trees", distilled.booster)):
        expected[task] = inplace_predict(
            bench, task, matrix, asked_booster, one_thread=False, runs=1
        )
    del matrix, codes
    _answer(bench, folder, expected, "no limit", [])
    _answer(bench, folder, expected, f"limit of {MEMORY_LIMIT}", shlex.split(limiter))
    for task, baseline in (("boxes", "distilled trees"), ("trees", "trees")):
        bench.compare(task, bench.find(baseline, INPLACE_ALL))


def _in_blocks(codes: NDArray[np.uint8], boxes: Sequence[LeafBox]) -> Rows:
    starts = range(0, codes.shape[1], REFERENCE_ROWS)
    parts = [naive_rows(codes[:, at : at + REFERENCE_ROWS], boxes) + at for at in starts]
    return np.concatenate(parts)


def _answer(
    bench: Bench, folder: Path, expected: dict[str, Rows], limit: str, prefix: list[str]
) -> None:
    """Run the process that only answers, and keep what it says."""
    say(f"answers, {limit}")
    script = Path(__file__).with_name("box_answer.py")
    command = [*prefix, sys.executable, str(script), str(folder / "asked.json")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        words = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        bench.note(
            **{limit: {"left_out": f"{shlex.join(prefix)}: {words[-1] if words else error}"}}
        )
        return
    said: dict[str, Any] = json.loads(done.stdout)
    for answer in said.pop("answers"):
        rows = np.load(folder / f"{answer['task']}.npy")
        bench.add(
            answer["task"],
            f"ours: planner, {answer['temperature']}, {limit}",
            answer["seconds"],
            rows,
            expected=expected[answer["task"]],
            bytes_read=answer["n_bytes"],
            plan=answer["plan"],
        )
        bench.systems[-1]["peak_rss_mb"] = answer["peak_rss_mb"]
    bench.note(**{limit: said})
