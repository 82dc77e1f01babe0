"""Compare what the indexed columns can be, and how many: how good and how lean rounds are on each.

    python benchmarks/columns.py [--data demo large] [--concepts 12] [--counts 32 64 128 256]
                                 [--folder DIR] [--out benchmarks/columns.json]

The collections and users of `quality.py`. Users label 20 images a round of what our method shows
them on the catalog's own columns; every kind and number of columns then answers the first and the
third round with these same labels, the same teacher and the same vector index.

anchors
    Similarity to concepts of the package's vocabulary, embedded by the collection's text tower:
    what a catalog with a text tower has.
centroids
    Similarity to k-means centroids: what a catalog without one has.
pca
    Projections on the principal components (of these there are at most as many as dimensions).
mixture
    Half anchors, half centroids.

The figures, means over concepts:

ap, f1
    Of the answer: what the boxes and the vector index found together, rows that neither found
    ranked below by the text.
box_ap, box_f1
    The same with what the boxes found only.
boxed
    Share of the rows in boxes: what is scored one by one.
box_recall
    Share in the boxes of the unlabelled rows with a teacher's score of .2 or more that the trees
    were not trained on; of all concepts together. None in the demo: it is its own sample.
box_share
    Share of the answer that a box found, not only the vector index: what has a rule.
n_boxes, n_ranges
    Boxes of a round, and conditions of a box.
fit_s, code_s
    Seconds to make the column model of a sample (the vocabulary's embedding apart), and to code
    and index all rows, on whatever else the machine does.
bytes_per_row
    On disk, with every part of the column index stored (``columns="full"``).

Writes columns.json and columns.png beside this file, prints tables; about five minutes on
two cores, once the large collection is made.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import columns_report
import numpy as np
from box_measure import say
from columns_models import KINDS, Built, build
from quality_data import Collection, load
from quality_ours import LOOSE_SCORE
from quality_summary import machine, mean_known
from quality_users import Behaviour, Outcome, Task, User, simulate
from threadpoolctl import threadpool_limits

from clipbranches_widget import refine
from clipbranches_widget.labels import LabelSet

HERE = Path(__file__).parent
ROUNDS = (1, 3)
COUNTS = (32, 64, 128, 256)

BOXES_ALONE = "boxes alone"

Entry = dict[str, Any]


def gather(collection: Collection, n_concepts: int) -> list[list[LabelSet]]:
    """Return the labels of every concept's user before each of `ROUNDS`, on the own columns."""
    behaviour = Behaviour(max(ROUNDS))
    found = []
    for number, concept in enumerate(collection.test[:n_concepts]):
        user = User(collection, concept, behaviour, seed=number)
        rounds = [
            labels for _, who, labels, _ in simulate(user, "ours", answer_round) if who == "ours"
        ]
        found.append([rounds[n - 1] for n in ROUNDS])
    return found


def answer_round(task: Task) -> Outcome:
    """Answer a round with the product on the collection's columns; figures as in the module."""
    index = task.collection.index
    result = refine.refine(index, labels=task.labels, query=task.concept.vector, seed=task.seed)
    pool, model = result.pool, result.model
    if pool is None or model is None:
        raise RuntimeError(f"expected a complete result with pool and model, got {result}")
    n_rows = len(task.collection)
    scores = np.full(n_rows, -1.0, dtype=np.float32)
    scores[pool.rows] = pool.scores
    answer = np.zeros(n_rows, dtype=np.bool_)
    answer[result.rows] = True
    boxed = np.zeros(n_rows, dtype=np.bool_)
    boxed[index.columns.in_boxes(model.boxes).rows] = True
    unseen = model.teacher.scores(task.collection.embeddings) >= np.float32(LOOSE_SCORE)
    unseen[model.sample.rows] = False
    unseen[task.labels.rows] = False
    facts = {
        "boxed": float(boxed.mean()),
        "n_unseen": float(unseen.sum()),
        "n_unseen_boxed": float((unseen & boxed).sum()),
        "box_share": float(boxed[answer].mean()) if answer.any() else float("nan"),
        "n_boxes": float(len(model.boxes)),
        "n_ranges": mean_known([len(box.ranges) for box in model.boxes]),
    }
    box_scores = np.where(boxed, scores, np.float32(-1.0)).astype(np.float32)
    return Outcome(
        scores, answer, facts=facts, beside={BOXES_ALONE: Outcome(box_scores, answer & boxed)}
    )


def measure(
    collection: Collection, labels: Sequence[Sequence[LabelSet]], built: Built
) -> Iterator[Entry]:
    """Answer every concept's rounds on given columns."""
    on = replace(collection, index=built.index)
    for number, (concept, given) in enumerate(zip(collection.test, labels, strict=False)):
        user = User(on, concept, Behaviour(len(ROUNDS)), seed=number)
        entry: Entry = {}
        for at, who, _, figures in simulate(user, "columns", answer_round, given):
            if who != BOXES_ALONE:
                entry = {
                    "data": collection.name,
                    "kind": built.kind,
                    "asked": built.asked,
                    "concept": concept.name,
                    "round": ROUNDS[at - 1],
                } | figures
            else:
                yield entry | {f"box_{name}": figures[name] for name in ("ap", "f1")}


def cells(entries: Sequence[Entry]) -> list[Entry]:
    """Return means over concepts for each collection, kind, count and round."""
    about = ("data", "kind", "asked", "round")
    figures = ("ap", "f1", "box_ap", "box_f1", "boxed", "box_share", "n_boxes", "n_ranges")
    keys = dict.fromkeys(tuple(entry[name] for name in about) for entry in entries)
    found = []
    for key in keys:
        group = [entry for entry in entries if tuple(entry[name] for name in about) == key]
        cell: Entry = dict(zip(about, key, strict=True))
        for name in figures:
            cell[name] = mean_known([entry[name] for entry in group])
        unseen = sum(entry["n_unseen"] for entry in group)
        held = sum(entry["n_unseen_boxed"] for entry in group)
        cell["n_unseen"] = unseen / len(group)
        cell["box_recall"] = held / unseen if unseen else float("nan")
        cell["concepts"] = {
            entry["concept"]: [entry["ap"], entry["box_ap"], entry["boxed"]] for entry in group
        }
        found.append(cell)
    return found


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", nargs="+", choices=["demo", "large"], default=["demo", "large"])
    parser.add_argument("--concepts", type=int, default=12, help="only the first N")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS))
    parser.add_argument("--folder", type=Path, help="where the large collection is kept")
    parser.add_argument("--out", type=Path, default=HERE / "columns.json")
    return parser.parse_args()


def main() -> None:
    """Measure, write, draw, print."""
    options = arguments()
    start = time.perf_counter()
    facts = {"command": " ".join(sys.argv[1:])} | machine()
    entries: list[Entry] = []
    models: list[Entry] = []
    with threadpool_limits(1):
        for name in options.data:
            collection = load(name, options.folder)
            labels = gather(collection, options.concepts)
            say(f"{name}: {len(collection):,} rows, {len(labels)} concepts labelled")
            for kind in KINDS:
                for count in options.counts:
                    built = build(collection, kind, count, options.folder)
                    models.append(built.facts())
                    entries += measure(collection, labels, built)
                    facts["minutes"] = (time.perf_counter() - start) / 60
                    columns_report.write(options.out, facts, models, cells(entries))
                    say(f"{name} {kind} {count}: {models[-1]['fit_s']:.1f} s to fit")
    found = cells(entries)
    print(columns_report.tables(models, found))
    columns_report.draw(found, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
