"""Measure how often an audit's 95 % intervals hold the truth, and how wide they are.

    python benchmarks/audit.py [--audits 300]

Three parts, written to audit.json beside this file:

- ``arrays``: simulated catalogs of known truth (rare, many or no matches outside, a perfect
  answer, one without any match, an empty one, a whole catalog), three sample sizes, 300 audits
  each. Counts are drawn as `audit.propose` draws rows, and reported by the same code.
- ``methods``: recall intervals of other methods on the same samples: Bonferroni over strata (each
  Clopper-Pearson), the same with confidence split by design, Jeffreys posteriors (Webber 2013;
  where a count is zero the limit is the end), the mid-p variant of melding, and, for two strata,
  exact test inversion (Buehler's limits, ordered by the estimate).
- ``demo``: real rounds of simulated users on the demo catalog, audited end to end, when the
  catalog is in the cache: 300 audits over its subgroups.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from clipbranches_widget import intervals
from clipbranches_widget.audit import SHARES, STRATA, propose, stratified
from clipbranches_widget.audit_report import AuditReport, Counted, report_on
from clipbranches_widget.catalog import Catalog
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.demo_catalog import demo_path
from clipbranches_widget.intervals import Draw
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import refine

HERE = Path(__file__).parent
SIZES = (20, 60, 200)
TOLERANCE = 1e-9
OURS = "melded (ours)"
Key = tuple[tuple[int, int, int], ...]
Limits = tuple[float, float]


class Scenario(NamedTuple):
    """A catalog: rows and matches of each stratum, and labels known before inside the answer."""

    rows: tuple[int, int, int, int]
    matches: tuple[int, int, int, int]
    known_yes: int = 0
    known_no: int = 0


SCENARIOS = {
    "100k, perfect answer": Scenario((500, 500, 2_000, 97_000), (500, 0, 0, 0)),
    "100k, few missed, nearby": Scenario((500, 500, 2_000, 97_000), (450, 40, 10, 0), 20, 10),
    "100k, few missed, far": Scenario((500, 500, 2_000, 97_000), (450, 10, 10, 50)),
    "100k, many missed, nearby": Scenario((500, 500, 2_000, 97_000), (400, 200, 200, 50)),
    "100k, many missed, everywhere": Scenario((500, 500, 2_000, 97_000), (450, 100, 400, 5_000)),
    "100k, large answer": Scenario((5_000, 2_000, 8_000, 85_000), (3_500, 600, 1_500, 400)),
    "demo's size, few missed": Scenario((60, 60, 240, 4_135), (48, 10, 5, 5), 15, 25),
    "demo's size, perfect": Scenario((60, 60, 240, 4_135), (60, 0, 0, 0), 15, 25),
    "200 rows": Scenario((30, 50, 100, 20), (25, 5, 2, 0)),
    "no match in the answer": Scenario((300, 300, 1_200, 50_000), (0, 10, 20, 70)),
    "empty answer": Scenario((0, 50, 200, 4_750), (0, 20, 10, 20)),
    "answer is the catalog": Scenario((3_000, 0, 0, 0), (900, 0, 0, 0)),
    "no match anywhere": Scenario((100, 100, 400, 9_400), (0, 0, 0, 0)),
}


def drawn_counts(scenario: Scenario, n: int) -> list[int]:
    """Return how many rows `propose` draws of each stratum."""
    ends = np.cumsum([0, *scenario.rows])
    answer, near = np.arange(ends[1]), np.arange(ends[1], ends[3])
    audit = stratified(int(ends[-1]), answer, near, LabelSet())
    sizes = tuple(stratum.n_rows for stratum in audit.strata)
    if sizes != scenario.rows:
        raise SystemExit(f"expected strata of {scenario.rows} rows, got {sizes}")
    return np.bincount(audit.more(n).stratum_ids, minlength=len(SHARES)).tolist()


@cache
def reported(scenario: Scenario, key: Key) -> AuditReport:
    """Report on counts (rows, drawn, yes) of each stratum."""
    counted = [Counted(name, k[1], Draw(*k)) for name, k in zip(STRATA, key, strict=True)]
    known = scenario.known_yes + scenario.known_no
    inside = Draw(scenario.known_yes, scenario.known_yes, scenario.known_yes)
    return report_on(
        counted,
        inside,
        Draw(known - scenario.known_yes, n_more_no=scenario.known_no),
        n_answer=scenario.rows[0] + scenario.known_yes,
        n_missing=0,
    )


def truths(scenario: Scenario) -> tuple[float, float]:
    """Return the true precision and recall."""
    found = scenario.matches[0] + scenario.known_yes
    total = found + sum(scenario.matches[1:])
    size = scenario.rows[0] + scenario.known_yes
    return found / size if size else float("nan"), found / total if total else 1.0


def samples(scenario: Scenario, n: int, n_audits: int, rng: np.random.Generator) -> list[Key]:
    """Return counts of simulated audits."""
    drawn = drawn_counts(scenario, n)
    yes = [
        rng.hypergeometric(k, size - k, count, n_audits) if count else np.zeros(n_audits, int)
        for size, k, count in zip(scenario.rows, scenario.matches, drawn, strict=True)
    ]
    sizes = list(zip(scenario.rows, drawn, strict=True))
    return [
        tuple((*size, int(x)) for size, x in zip(sizes, row, strict=True))
        for row in zip(*yes, strict=True)
    ]


def summary(limits: list[Limits], truth: float) -> dict[str, float]:
    """Return the share of intervals that hold the truth, and their mean width."""
    low, high = np.array(limits).T
    held = (low <= truth + TOLERANCE) & (truth <= high + TOLERANCE)
    return {"coverage": round(float(held.mean()), 4), "width": round(float((high - low).mean()), 4)}


def measure_arrays(n_audits: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Audit the simulated catalogs."""
    records = []
    for name, scenario in SCENARIOS.items():
        for n in SIZES:
            reports = [reported(scenario, key) for key in samples(scenario, n, n_audits, rng)]
            record: dict[str, Any] = {"scenario": name, "n": n, "audits": n_audits}
            for what, truth in zip(("precision", "recall"), truths(scenario), strict=True):
                found = [getattr(report, what) for report in reports]
                record[what] = {"truth": None}
                if not np.isnan(truth):
                    record[what] = {"truth": round(truth, 4)}
                    record[what] |= summary([(each.low, each.high) for each in found], truth)
            nearby = [report.recall_nearby.width for report in reports]
            record["recall_nearby_width"] = round(float(np.mean(nearby)), 4)
            records.append(record)
            print(record, flush=True)
    return records


def melded_limits(key: Key) -> Limits:
    """Return our interval of recall."""
    draws = [Draw(*k) for k in key]
    return intervals.ratio_interval(*intervals.melded(draws[:1], draws[1:]))


def other_melded_limits(key: Key, *, is_mid: bool) -> Limits:
    """Return the interval of recall melded throughout, cautiously or by mid-p."""
    parts = [
        intervals._melded(Draw(*k), number, is_mid=is_mid)  # noqa: SLF001 - what ours is made of
        for number, k in enumerate(key)
    ]
    return intervals.ratio_interval(parts[:1], parts[1:])


def jeffreys_limits(key: Key) -> Limits:
    """Return Webber's interval: beta-binomial posteriors with half a match and half a miss."""
    rng, n = np.random.default_rng(0), intervals.N_DRAWS
    counts = [
        x + rng.binomial(size - m, rng.beta(x + 0.5, m - x + 0.5, n)) if size > m else np.full(n, x)
        for size, m, x in key
    ]
    return _quantiles(counts[0], np.sum(counts[1:], axis=0), key)


def _quantiles(hits: NDArray[Any], missed: NDArray[Any], key: Key) -> Limits:
    total = hits + missed
    ratio = np.divide(hits, total, out=np.ones(len(total)), where=total > 0)
    low, high = np.quantile(ratio, [0.025, 0.975])
    none_missed = not sum(k[2] for k in key[1:])
    return (0.0 if not key[0][2] else float(low)), (1.0 if none_missed else float(high))


def bonferroni_limits(key: Key, *, by_design: bool = False) -> Limits:
    """Return limits from Clopper-Pearson intervals of each stratum at a share of the error.

    By design: nine tenths of it in proportion to rows per label outside, where doubt is largest.
    """
    shares = np.full(len(key), 1 / len(key))
    if by_design:
        doubt = np.array([0.0, *(k[0] / max(k[1], 1) for k in key[1:])])
        shares = 0.1 * shares + 0.9 * doubt / max(doubt.sum(), 1.0)
    low, high = np.array(
        [clopper_pearson(k, 0.05 * float(share)) for k, share in zip(key, shares, strict=True)]
    ).T
    return (
        low[0] / (low[0] + high[1:].sum()) if low[0] + high[1:].sum() else 1.0,
        high[0] / (high[0] + low[1:].sum()) if high[0] + low[1:].sum() else 1.0,
    )


@cache
def clopper_pearson(draw: tuple[int, int, int], error: float) -> Limits:
    """Return the least and greatest count that neither tail rejects."""
    counts = intervals._possible(*draw)  # noqa: SLF001 - the grid our own interval uses
    at_least, at_most = intervals._tails(*draw, counts)  # noqa: SLF001
    kept = counts[(at_least > error / 2) & (at_most > error / 2)]
    return float(kept[0]), float(kept[-1])


def exact_table(inside: tuple[int, int], outside: tuple[int, int]) -> NDArray[np.float64]:
    """Return Buehler's limits of recall for every outcome of two strata: (n + 1, m + 1, 2).

    The lower limit is the least recall at which, for some counts of that recall, an estimate as
    high as the one seen has probability above 2.5 %; the upper limit likewise.
    """
    (n_rows, n), (m_rows, m) = inside, outside
    x, y = np.meshgrid(np.arange(n + 1), np.arange(m + 1), indexing="ij")
    hit, miss = n_rows * (x + 0.5) / (n + 1), m_rows * (y + 0.5) / (m + 1)
    order = np.argsort((hit / (hit + miss)).ravel(), kind="stable")
    odds = np.geomspace(1e-6, 1e6, 240)
    hits = np.unique(np.linspace(0, n_rows, 60).round().astype(int))
    above, below = np.zeros((2, len(odds), len(order)))
    p_hits = intervals._pmf(n_rows, n, hits)  # noqa: SLF001 - the distribution ours uses
    for number, each in enumerate(odds):
        misses = np.minimum((hits / each).round().astype(int), m_rows)
        kept = hits / each <= m_rows
        p_misses = intervals._pmf(m_rows, m, misses[kept])  # noqa: SLF001
        joint = (p_hits[kept][:, :, None] * p_misses[:, None, :]).reshape(kept.sum(), -1)[:, order]
        below[number] = joint.cumsum(axis=1).max(axis=0)
        above[number] = joint[:, ::-1].cumsum(axis=1)[:, ::-1].max(axis=0)
    recall = odds / (1 + odds)
    limits = np.empty((len(order), 2))
    limits[order, 0] = recall[np.maximum((above > 0.025).argmax(axis=0) - 1, 0)]
    last = len(odds) - 1 - (below[::-1] > 0.025).argmax(axis=0)
    limits[order, 1] = recall[np.minimum(last + 1, len(odds) - 1)]
    limits[limits < 2e-6] = 0.0
    limits[limits > 1 - 2e-6] = 1.0
    return limits.reshape(n + 1, m + 1, 2)


METHODS: dict[str, Callable[[Key], Limits]] = {
    OURS: melded_limits,
    "melded throughout": lambda key: other_melded_limits(key, is_mid=False),
    "mid-p throughout": lambda key: other_melded_limits(key, is_mid=True),
    "Jeffreys posterior": jeffreys_limits,
    "Bonferroni": bonferroni_limits,
    "Bonferroni by design": lambda key: bonferroni_limits(key, by_design=True),
}


def compare_methods(n_audits: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Compare recall intervals on the same samples of 60 rows, in four strata and in two."""
    records = []
    for name, scenario in SCENARIOS.items():
        bare = scenario._replace(known_yes=0, known_no=0)
        truth = truths(bare)[1]
        keys = samples(bare, 60, n_audits, rng)
        record: dict[str, Any] = {"scenario": name, "n": 60, "truth": round(truth, 4)}
        for method, limits in METHODS.items():
            cached = cache(limits)
            record[method] = summary([cached(key) for key in keys], truth)
        if all(scenario.rows):
            record["two strata"] = _compare_exact(bare, n_audits, truth, rng)
        records.append(record)
        print(record, flush=True)
    return records


def _compare_exact(
    scenario: Scenario, n_audits: int, truth: float, rng: np.random.Generator
) -> dict[str, Any]:
    """Compare with exact inversion: one stratum inside (25 labels), one outside (35)."""
    sizes = (scenario.rows[0], sum(scenario.rows[1:]))
    matches = (scenario.matches[0], sum(scenario.matches[1:]))
    n = (min(25, sizes[0]), min(35, sizes[1]))
    yes = [
        rng.hypergeometric(k, size - k, count, n_audits)
        for size, k, count in zip(sizes, matches, n, strict=True)
    ]
    table = exact_table((sizes[0], n[0]), (sizes[1], n[1]))
    cached = cache(melded_limits)
    keys = [((sizes[0], n[0], int(x)), (sizes[1], n[1], int(y))) for x, y in zip(*yes, strict=True)]
    return {
        OURS: summary([cached(key) for key in keys], truth),
        "exact inversion": summary([tuple(table[x, y]) for x, y in zip(*yes, strict=True)], truth),
    }


def measure_demo(n_audits: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Audit real rounds: a user looks for a subgroup, labels 15 rows of two rounds, audits."""
    index = CatalogIndex(Catalog.open(demo_path()))
    subgroup = np.array(index.catalog.items.column("subgroup").to_pylist(), dtype=object)
    names, sizes = np.unique(subgroup.astype(str), return_counts=True)
    wanted = rng.permutation(names[(sizes >= 30) & (sizes <= 400) & (names != "None")])[:10]
    held: dict[str, list[Limits]] = {"precision": [], "recall": []}
    values: dict[str, list[float]] = {"precision": [], "recall": []}
    for name in wanted:
        truth = subgroup.astype(str) == name
        labels = labelled(LabelSet(), rng.choice(np.flatnonzero(truth), 3, replace=False), truth)
        result = refine(index, labels=labels)
        for _ in range(2):
            fresh = result.rows[~np.isin(result.rows, labels.rows)][:15]
            labels = labelled(labels, fresh, truth)
            result = refine(index, labels=labels)
        found = int(truth[result.rows].sum())
        value = {"precision": found / max(len(result), 1), "recall": found / int(truth.sum())}
        for seed in range(n_audits // len(wanted)):
            audit = propose(index, result, labels, n=60, seed=seed)
            report = audit.report(labelled(labels, audit.rows, truth))
            for what, limits in held.items():
                estimate = getattr(report, what)
                limits.append((estimate.low, estimate.high))
                values[what].append(value[what])
    return [_demo_record(what, held[what], values[what], len(wanted)) for what in held]


def _demo_record(what: str, limits: list[Limits], truth: list[float], n: int) -> dict[str, Any]:
    low, high = np.array(limits).T
    value = np.array(truth)
    is_held = (low <= value + TOLERANCE) & (value <= high + TOLERANCE)
    record = {
        "what": what,
        "n": 60,
        "concepts": n,
        "audits": len(limits),
        "coverage": round(float(is_held.mean()), 4),
        "width": round(float((high - low).mean()), 4),
        "mean_truth": round(float(value.mean()), 4),
    }
    print(record, flush=True)
    return record


def labelled(labels: LabelSet, rows: NDArray[np.int64], truth: NDArray[np.bool_]) -> LabelSet:
    """Add the true labels of rows."""
    return labels.with_labels(rows[truth[rows]], rows[~truth[rows]])


def _overall(records: list[dict[str, Any]]) -> dict[str, float]:
    coverage = [record["coverage"] for record in records if "coverage" in record]
    return {"lowest": min(coverage), "mean": round(float(np.mean(coverage)), 4)}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audits", type=int, default=300)
    n_audits = parser.parse_args().audits
    start, rng = time.perf_counter(), np.random.default_rng(0)
    figures: dict[str, Any] = {"arrays": measure_arrays(n_audits, rng)}
    figures["methods"] = compare_methods(n_audits, rng)
    if demo_path().is_dir():
        figures["demo"] = measure_demo(n_audits, rng)
    else:
        print("no demo catalog in the cache: clipbranches_widget.demo() builds it")
    figures["overall"] = {
        what: _overall([record[what] for record in figures["arrays"]])
        for what in ("precision", "recall")
    }
    print(figures["overall"], f"{time.perf_counter() - start:.0f} s")
    (HERE / "audit.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
