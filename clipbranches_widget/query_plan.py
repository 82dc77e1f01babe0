"""How a query is answered: estimates from counts alone, and a choice (layer 3). Pure, no I/O.

Boxes can be answered in three ways, all exact:

- *bits*: AND the prefix bit vectors of every range: one bit a row and bound. A range that ends
  between `PREFIX_EDGES` is compared with its column's codes instead.
- *postings*: take the posting list of each box's most selective range, and verify the other
  ranges row by row.
- *scan*: compare the codes of every range's column.

The rows of an ensemble above a threshold can be found in two:

- *scan*: sum the trees over all rows, in blocks.
- *leaves*: choose leaves outside of which no row can reach the threshold, answer them as boxes,
  and sum the trees over these rows only.

The planner estimates what each would read from how many rows have which codes, and takes the
one that should be quickest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import numpy as np

from clipbranches_widget.box_program import on_edge
from clipbranches_widget.boxes import N_CODES, CodeRange, LeafBox
from clipbranches_widget.column_stats import Stats
from clipbranches_widget.errors import QueryError
from clipbranches_widget.tree_program import TreeProgram
from clipbranches_widget.trees import TreeEnsemble

BoxStrategy = Literal["bits", "postings", "scan"]
EnsembleStrategy = Literal["scan", "leaves"]

GATHER_BYTES = 64
"""A code at a random row costs a cache line."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Nanoseconds of one core, measured by ``benchmarks/boxes.py`` on x86-64 with AVX-512.

    Only their ratios matter: they decide between strategies, never what is answered.
    """

    bit_vector_byte: float = 0.045
    bit_term_word: float = 0.09
    box_word: float = 0.45
    code_range_row: float = 0.035
    posting_row: float = 1.0
    verified_row: float = 3.5
    sorted_row: float = 25.0
    posting_box: float = 40_000.0
    unit_row: float = 0.09
    gathered_code: float = 3.0
    query: float = 80_000.0
    call: float = 20_000.0


COSTS = {
    "numba": Costs(),
    "numpy": Costs(bit_term_word=0.4, box_word=1.6, code_range_row=0.16, unit_row=8.7),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one strategy would read.

    Attributes
    ----------
    strategy : str
    n_bytes : int
        Bytes of the index.
    ms : float
        Milliseconds of one core, warm.
    what : str
        In words.
    """

    strategy: str
    n_bytes: int
    ms: float
    what: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.strategy}: {self.what}, {_bytes(self.n_bytes)}, about {self.ms:.2g} ms"


@dataclass(frozen=True, slots=True)
class QueryPlan:
    """The choice, and what it was chosen from.

    Attributes
    ----------
    strategy : str
        How the query is answered.
    estimates : tuple of Estimate
        Every strategy that could, the quickest first.
    reason : str
        Why this one.
    engine : str
        Whose loops run: "numba" or "numpy".
    """

    strategy: str
    estimates: tuple[Estimate, ...]
    reason: str
    engine: str

    @property
    def chosen(self) -> Estimate:
        """The estimate of the chosen strategy."""
        return next(each for each in self.estimates if each.strategy == self.strategy)

    def __str__(self) -> str:
        """Return the choice on the first line, then every estimate on its own."""
        lines = [f"{self.strategy} ({self.engine} loops): {self.reason}"]
        return "\n  ".join([*lines, *map(str, self.estimates)])


def plan_boxes(
    boxes: Sequence[LeafBox],
    stats: Stats,
    *,
    strategy: BoxStrategy | None = None,
    engine: str = "numba",
) -> QueryPlan:
    """Choose how to answer boxes.

    Parameters
    ----------
    boxes : sequence of LeafBox
    stats : Stats
        Asked for counts only.
    strategy : "bits", "postings" or "scan", optional
        Force one.
    engine : "numba" or "numpy"
        Whose costs apply.

    Raises
    ------
    QueryError
        The forced strategy is unknown, or needs a part that is not stored.

    Examples
    --------
    >>> from clipbranches_widget.column_stats import ColumnStats
    >>> offsets = np.arange(257)[None, :].repeat(4, axis=0) * 10_000
    >>> stats = ColumnStats(offsets, 2_560_000, 1, has_bits=True, has_order=True)
    >>> box = LeafBox.from_bounds({0: (240, 256), 3: (0, 128)})
    >>> print(plan_boxes([box], stats))
    bits (numba loops): the quickest of 3
      bits: 2 bit vectors, 640 KB, about 0.15 ms
      scan: 2 code ranges of 2 columns, 5.12 MB, about 0.3 ms
      postings: 160,000 rows of posting lists, 160,000 codes to verify, 10.9 MB, about 2.8 ms
    """
    costs = COSTS[engine]
    estimates = [_scan(boxes, stats, costs)]
    if stats.has_bits:
        estimates.append(_bits(boxes, stats, costs))
    if stats.has_order:
        estimates.append(_postings(boxes, stats, costs))
    return _choose(estimates, strategy, engine, ("bits", "postings", "scan"))


def plan_ensemble(
    program: TreeProgram,
    leaves: Sequence[LeafBox] | None,
    stats: Stats,
    *,
    strategy: EnsembleStrategy | None = None,
    engine: str = "numba",
) -> QueryPlan:
    """Choose how to find the rows of an ensemble above a threshold.

    Parameters
    ----------
    program : TreeProgram
    leaves : sequence of LeafBox or None
        Leaves outside of which no row reaches the threshold (`candidate_leaves`); None where
        they would hold too many rows.
    stats, engine
        As for `plan_boxes`.
    strategy : "scan" or "leaves", optional
        Force one.
    """
    costs = COSTS[engine]
    n_columns = len(program.used_columns)
    scan = Estimate(
        "scan",
        stats.n_rows * n_columns,
        _scan_ns(program, stats, costs) * 1e-6,
        f"{program.n_trees} trees over all {stats.n_rows:,} rows of {n_columns} columns",
    )
    known = ("scan", "leaves")
    if leaves is None:
        return _choose([scan], strategy, engine, known)
    boxes = plan_boxes(leaves, stats, engine=engine).chosen
    n_candidates = int(min(stats.n_rows, sum(_expected(box, stats) for box in leaves)))
    by_leaves = Estimate(
        "leaves",
        boxes.n_bytes + n_candidates * n_columns,
        boxes.ms + n_candidates * _candidate_ns(program, costs) * 1e-6,
        f"{len(leaves)} leaves by {boxes.strategy}, then the trees over about "
        f"{n_candidates:,} candidates",
    )
    return _choose([scan, by_leaves], strategy, engine, known)


def worth_reading(program: TreeProgram, stats: Stats, engine: str) -> float:
    """Return how many candidate rows cost as much as a scan of all rows."""
    costs = COSTS[engine]
    return _scan_ns(program, stats, costs) / _candidate_ns(program, costs)


def candidate_leaves(
    ensemble: TreeEnsemble, limit: np.float32, stats: Stats, *, max_rows: float = np.inf
) -> list[LeafBox] | None:
    """Choose leaves so that no row outside all of them can have a margin above `limit`.

    Outside the chosen leaves a row gets at most the largest leaf left in each tree. Float32
    addition is monotone, so the sum of those, in tree order, bounds its margin exactly. Leaves
    are taken greedily: from the tree where that lowers the bound most per row it may hold.

    Returns None as soon as the chosen leaves may hold more than `max_rows` rows.
    """
    remaining = [
        sorted(boxes, key=lambda box: box.value, reverse=True) for boxes in ensemble.leaf_boxes()
    ]
    tops = np.array([ensemble.base_margin, *(leaves[0].value for leaves in remaining)], np.float32)
    gains = np.array([_gain(leaves, stats) for leaves in remaining])
    chosen: list[LeafBox] = []
    n_rows = 0.0
    while np.cumsum(tops, dtype=np.float32)[-1] > limit:  # cumsum adds one by one, in tree order
        best = int(gains.argmax())
        leaves = remaining[best]
        n_rows += _expected(leaves[0], stats)
        if n_rows > max_rows:
            return None
        chosen.append(leaves.pop(0))
        tops[best + 1] = leaves[0].value if leaves else -np.inf
        gains[best] = _gain(leaves, stats)
    return chosen


def _gain(leaves: list[LeafBox], stats: Stats) -> float:
    """Return how far taking a tree's best leaf lowers the bound, per row it may hold."""
    if not leaves:
        return -1.0
    if len(leaves) == 1:  # with the last leaf of a tree every row is a candidate
        return -0.5
    return (leaves[0].value - leaves[1].value) / (_expected(leaves[0], stats) + 1.0)


def by_selectivity(box: LeafBox, stats: Stats) -> list[CodeRange]:
    """Return the ranges of a box, those with the fewest rows first."""
    return sorted(box.ranges, key=stats.count)


def _bits(boxes: Sequence[LeafBox], stats: Stats, costs: Costs) -> Estimate:
    bounds, n_terms, code_ranges = set(), 0, []
    for column, low, high in (each for box in boxes for each in box.ranges):
        if on_edge(low) and on_edge(high):
            terms = [(column, code) for code in (low, high) if 0 < code < N_CODES]
            bounds.update(terms)
            n_terms += len(terms)
        else:
            code_ranges.append(column)
    n_words = -(-stats.n_rows // 64)
    ns = (
        len(bounds) * n_words * 8 * costs.bit_vector_byte
        + n_terms * n_words * costs.bit_term_word
        + len(boxes) * n_words * costs.box_word
        + len(code_ranges) * stats.n_rows * costs.code_range_row
        + stats.n_shards * costs.call
        + costs.query
    )
    n_bytes = len(bounds) * n_words * 8 + len(set(code_ranges)) * stats.n_rows
    extra = f" and {len(code_ranges)} code ranges that end off the edges" if code_ranges else ""
    return Estimate("bits", n_bytes, ns * 1e-6, f"{len(bounds)} bit vectors{extra}")


def _scan(boxes: Sequence[LeafBox], stats: Stats, costs: Costs) -> Estimate:
    columns = [each.column for box in boxes for each in box.ranges]
    ns = (
        len(columns) * stats.n_rows * costs.code_range_row
        + len(boxes) * -(-stats.n_rows // 64) * costs.box_word
        + stats.n_shards * costs.call
        + costs.query
    )
    what = f"{len(columns)} code ranges of {len(set(columns))} columns"
    return Estimate("scan", len(set(columns)) * stats.n_rows, ns * 1e-6, what)


def _postings(boxes: Sequence[LeafBox], stats: Stats, costs: Costs) -> Estimate:
    n_posted, n_verified, n_found = 0, 0.0, 0.0
    for box in boxes:
        counts = [stats.count(each) for each in by_selectivity(box, stats)]
        left = float(counts[0]) if counts else float(stats.n_rows)
        n_posted += int(left)
        for count in counts[1:]:  # what is left after each range, as if they were independent
            n_verified += left
            left *= count / stats.n_rows
        n_found += left
    ns = (
        n_posted * costs.posting_row
        + n_verified * costs.verified_row
        + n_found * costs.sorted_row
        + len(boxes) * stats.n_shards * costs.posting_box
    )
    n_bytes = n_posted * 4 + int(n_verified) * GATHER_BYTES
    what = f"{n_posted:,} rows of posting lists, {int(n_verified):,} codes to verify"
    return Estimate("postings", n_bytes, ns * 1e-6, what)


def _expected(box: LeafBox, stats: Stats) -> float:
    """Estimate the rows of a box, as if its ranges were independent."""
    return stats.n_rows * prod(stats.count(each) / stats.n_rows for each in box.ranges)


def _scan_ns(program: TreeProgram, stats: Stats, costs: Costs) -> float:
    """Return the cost of summing all trees over all rows."""
    return stats.n_rows * len(program.columns) * costs.unit_row + costs.query


def _candidate_ns(program: TreeProgram, costs: Costs) -> float:
    """Return the cost of gathering the codes of one candidate and summing its trees."""
    n_columns, n_units = len(program.used_columns), len(program.columns)
    return n_columns * costs.gathered_code + n_units * 4 * costs.unit_row


def _choose(
    estimates: list[Estimate], strategy: str | None, engine: str, known: tuple[str, ...]
) -> QueryPlan:
    """Take the forced strategy, or the quickest."""
    ranked = tuple(sorted(estimates, key=lambda each: each.ms))
    names = [each.strategy for each in ranked]
    if strategy is None:
        reason = f"the quickest of {len(ranked)}" if len(ranked) > 1 else "the only one here"
        return QueryPlan(names[0], ranked, reason, engine)
    if strategy not in known:
        raise QueryError(f"expected a strategy among {', '.join(known)}, got {strategy!r}")
    if strategy not in names:
        raise QueryError(
            f"expected an index with what {strategy!r} reads, got one without: force another, "
            "or add it to the catalog with: clipbranches columns CATALOG --parts full"
        )
    return QueryPlan(strategy, ranked, "as asked", engine)


def _bytes(n: float) -> str:
    for unit in ("bytes", "KB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError
