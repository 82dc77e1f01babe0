"""Audits: fair samples of every stratum, and intervals that hold the truth."""

import numpy as np
import pytest
from scipy import stats

from clipbranches_widget.audit import STRATA, propose, stratified
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.errors import QueryError, RefineError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import refine
from clipbranches_widget.search import search

N_CLUSTERS = 20


@pytest.fixture
def round_of(tmp_path, rng):
    """Return a function that makes a catalog and one round: (index, result, labels, truth)."""

    def _round_of(n, *, threshold=None, n_yes=8, n_no=8):
        centres = rng.normal(size=(N_CLUSTERS, 16))
        cluster = rng.integers(0, N_CLUSTERS, n)
        cluster[0] = 0
        embeddings = centres[cluster] + 0.8 * rng.normal(size=(n, 16))
        path = tmp_path / f"c{len(list(tmp_path.iterdir()))}.cbcat"
        index = CatalogIndex(from_embeddings(embeddings.astype(np.float32), path))
        truth = cluster == 0
        labels = LabelSet(np.flatnonzero(truth)[:n_yes], np.flatnonzero(~truth)[:n_no])
        return index, refine(index, labels=labels, threshold=threshold), labels, truth

    return _round_of


def labelled(labels, rows, truth):
    rows = np.asarray(rows, dtype=np.int64)
    return labels.with_labels(rows[truth[rows]], rows[~truth[rows]])


def shares(truth, rows):
    """Return the true precision and recall of an answer."""
    n_found = truth[rows].sum()
    return n_found / max(len(rows), 1), n_found / truth.sum() if truth.any() else 1.0


def members(audit):
    """Return the rows of each stratum, far ones listed."""
    listed = [stratum.rows for stratum in audit.strata[:-1]]
    taken = np.concatenate([*listed, audit.known.rows])
    return [*listed, np.setdiff1d(np.arange(audit.n_total), taken)]


def test_strata_split_the_catalog_and_rows_are_drawn_from_their_own(round_of):
    index, result, labels, _ = round_of(3_000)
    audit = propose(index, result, labels)
    assert [stratum.name for stratum in audit.strata] == list(STRATA)
    groups = members(audit)
    assert sum(map(len, groups)) + len(labels) == len(index.catalog)
    assert sorted(groups[0]) == sorted(set(result.rows.tolist()) - set(labels.rows.tolist()))
    assert len(set(audit)) == len(audit) == 60
    for number, (stratum, group) in enumerate(zip(audit.strata, groups, strict=True)):
        drawn = audit.rows[audit.stratum_ids == number]
        assert stratum.n_rows == len(group)
        assert len(drawn) > 5
        assert np.isin(drawn, group).all()
        assert (
            audit.stratum_of(int(np.flatnonzero(audit.stratum_ids == number)[0])) == STRATA[number]
        )
    assert not np.isin(audit.rows, labels.rows).any()
    assert LabelSet(positive=audit).positive.tolist() == sorted(audit)


def test_boundary_and_near_rows_are_the_next_best(round_of):
    index, result, labels, _ = round_of(3_000)
    audit = propose(index, result, labels)
    scores = result.model.teacher.scores(index.embeddings(np.arange(len(index.catalog))))
    _, boundary, near, far = (scores[group] for group in members(audit))
    assert boundary.min() >= near.max()
    assert near.min() >= far.max()


def test_same_seed_same_rows_and_a_larger_sample_holds_a_smaller_one(round_of):
    index, result, labels, _ = round_of(2_000)
    audit = propose(index, result, labels, n=30, seed=4)
    assert np.array_equal(audit.rows, propose(index, result, labels, n=30, seed=4).rows)
    assert set(audit) != set(propose(index, result, labels, n=30, seed=5))
    assert set(audit) <= set(propose(index, result, labels, n=90, seed=4))
    more = audit.more(60)
    assert np.array_equal(more.rows[:30], audit.rows)
    assert len(set(more)) == len(more) == 90


def test_more_rows_of_one_stratum(round_of):
    index, result, labels, _ = round_of(2_000)
    audit = propose(index, result, labels, n=30)
    more = audit.more(25, only="far")
    assert len(more) == 55
    assert {more.stratum_of(position) for position in range(30, 55)} == {"far"}
    with pytest.raises(QueryError, match="expected one of inside, boundary, near, far"):
        audit.more(5, only="sideways")


@pytest.mark.parametrize("n", [0, -3, 1.5])
def test_bad_sizes_are_refused(round_of, n):
    index, result, labels, _ = round_of(60)
    with pytest.raises(QueryError, match="expected n"):
        propose(index, result, labels, n=n)


def test_only_a_finished_round_is_audited(round_of):
    index, _, labels, _ = round_of(60)
    hits = search(index.catalog, index.embeddings(np.array([0]))[0], 10)
    with pytest.raises(RefineError, match="that of a search"):
        propose(index, hits, labels)
    parts = []
    refine(index, labels=labels, partial=parts.append)
    with pytest.raises(RefineError, match="that of a round that is still running"):
        propose(index, parts[0], labels)


@pytest.mark.parametrize("n", [1, 2, 40, 300])
@pytest.mark.parametrize("threshold", [0.001, 0.5, 0.999])
def test_labelling_everything_leaves_no_doubt(round_of, n, threshold):
    index, result, labels, truth = round_of(n, threshold=threshold, n_yes=1, n_no=1)
    audit = propose(index, result, labels, n=n + 10)
    assert sorted([*audit, *labels.rows]) == list(range(n))
    report = audit.report(labelled(labels, audit.rows, truth))
    precision, recall = shares(truth, result.rows)
    assert (report.recall.low, report.recall.high) == (recall, recall)
    assert (report.precision.low, report.precision.high) == (precision, precision)
    assert report.n_matches.low == report.n_matches.high == truth.sum()
    assert report.n_missing == 0


def test_an_empty_answer_has_recall_0_and_no_precision():
    truth = np.arange(500) < 50
    audit = stratified(500, np.empty(0, np.int64), np.arange(100), LabelSet()).more(60)
    report = audit.report(labelled(LabelSet(), audit.rows, truth))
    assert np.isnan(report.precision.value)
    assert (report.precision.low, report.precision.high) == (0.0, 1.0)
    assert (report.recall.low, report.recall.high) == (0.0, 0.0)
    assert "outside the answer" in report.advice


def test_an_answer_that_is_the_whole_catalog_misses_nothing():
    truth = np.arange(400) % 4 > 0
    audit = stratified(400, np.arange(400), np.empty(0, np.int64), LabelSet(), seed=2).more(60)
    report = audit.report(labelled(LabelSet(), audit.rows, truth))
    assert report.recall.low == report.recall.high == 1.0
    assert report.precision.low <= 0.75 <= report.precision.high
    assert report.advice.startswith("Keep going: at least")
    assert "of the answer is wrong" in report.advice


def test_far_rows_of_a_huge_catalog_are_drawn_without_listing_it():
    known = LabelSet(np.arange(5), np.arange(9_999_990, 10_000_000))
    answer, after = np.arange(5, 400), np.arange(1_000, 2_000)
    audit = stratified(10_000_000, answer, after, known, seed=1).more(400, only="far")
    assert audit.strata[-1].n_rows == 10_000_000 - 15 - 395 - 1_000
    assert not np.isin(audit.rows, [*answer, *after, *known.rows]).any()
    assert 4_000_000 < audit.rows.mean() < 6_000_000
    assert len(set(audit)) == 400


def test_every_far_row_is_as_likely(rng):
    answer, after = np.arange(10, 15), np.array([3, 7])
    base = stratified(40, answer, after, LabelSet([20], [39]))
    seen = np.zeros(40, np.int64)
    for seed in range(800):
        audit = stratified(40, answer, after, base.known, seed=seed).more(8, only="far")
        seen[audit.rows] += 1
    far = np.setdiff1d(np.arange(40), [*answer, *after, 20, 39])
    assert seen.sum() == seen[far].sum() == 6_400
    expected = 800 * 8 / len(far)
    assert stats.chi2(len(far) - 1).sf(((seen[far] - expected) ** 2 / expected).sum()) > 1e-6


def test_rows_not_reached_yet_count_as_not_drawn(round_of):
    index, result, labels, truth = round_of(2_000)
    audit = propose(index, result, labels)
    half = audit.report(labelled(labels, audit.rows[:30], truth))
    assert half.n_missing == 30
    assert half.n_labelled == 30
    assert half.to_pandas()["n_labelled"].sum() == 30
    whole = audit.report(labelled(labels, audit.rows, truth))
    assert whole.precision.width < half.precision.width
    assert "30 proposed rows" in half.advice or half.advice.startswith(("Stop", "Keep"))
    none = audit.report(labels)
    assert none.advice.startswith("Label the 60 proposed rows")
    assert np.isnan(none.recall.value)


def test_a_row_passed_over_counts_as_either():
    truth = np.ones(1_000, bool)
    audit = stratified(1_000, np.arange(100), np.arange(100, 200), LabelSet()).more(100)
    inside = audit.rows[audit.stratum_ids == 0]
    kept = audit.report(labelled(LabelSet(), np.delete(inside, 5), truth))
    all_ = audit.report(labelled(LabelSet(), inside, truth))
    assert kept.strata[0].draw.n_unsure == 1
    assert kept.precision.high == all_.precision.high == 1.0
    assert kept.precision.low < all_.precision.low


def test_a_label_far_down_the_list_only_bounds_what_is_possible():
    truth = np.ones(1_000, bool)
    audit = stratified(1_000, np.arange(100), np.arange(100, 200), LabelSet()).more(100)
    last = audit.rows[audit.stratum_ids == 0][-1]
    report = audit.report(labelled(LabelSet(), [last], truth))
    assert report.strata[0].draw.n_drawn == 0
    assert report.precision.low == 0.01


def test_other_labels_bound_what_is_possible():
    truth = np.arange(1_000) < 90
    audit = stratified(1_000, np.arange(100), np.arange(100, 200), LabelSet()).more(60)
    report = audit.report(labelled(LabelSet(), np.arange(100), truth))
    assert report.precision.low == report.precision.high == 0.9


def test_labels_known_before_count_exactly_and_may_be_taken_back():
    truth = np.arange(1_000) < 90
    known = labelled(LabelSet(), np.arange(99), truth)
    audit = stratified(1_000, np.arange(100), np.arange(100, 200), known).more(60)
    report = audit.report(labelled(known, audit.rows, truth))
    assert report.precision.low == report.precision.high == 0.9
    fewer = audit.report(labelled(known, audit.rows, truth).without([0, 1]))
    assert (fewer.precision.low, fewer.precision.high) == (0.88, 0.9)


def test_the_report_reads_as_a_few_lines(round_of):
    index, result, labels, truth = round_of(2_000)
    audit = propose(index, result, labels)
    report = audit.report(labelled(labels, audit.rows, truth))
    lines = str(report).splitlines()
    assert lines[0].startswith("precision: ")
    assert lines[1].startswith("recall: ")
    assert lines[-1] == report.advice
    frame = report.to_pandas()
    assert frame["stratum"].tolist() == list(STRATA)
    assert frame["n_proposed"].sum() == 60


ADVICE = {
    "complete": (np.arange(100), "Stop: at least 9"),
    "misses many": (np.arange(190), "mark those found outside yes"),
    "wrong": (np.arange(40), "of the answer is wrong"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_advice_to_stop_or_go_on(case):
    yes, said = ADVICE[case]
    truth = np.isin(np.arange(300), yes)
    audit = stratified(300, np.arange(100), np.arange(100, 300), LabelSet()).more(290)
    assert said in audit.report(labelled(LabelSet(), audit.rows, truth)).advice


def test_advice_says_how_many_more_labels_would_settle_recall():
    truth = np.arange(900) < 400
    audit = stratified(900, np.arange(400), np.arange(400, 900), LabelSet()).more(120)
    report = audit.report(labelled(LabelSet(), audit.rows, truth))
    assert "more boundary rows to narrow recall" in report.advice


def test_advice_admits_what_labels_cannot_tell():
    truth = np.arange(200_000) < 400
    after = np.arange(400, 2_400)
    audit = stratified(200_000, np.arange(400), after, LabelSet()).more(60)
    report = audit.report(labelled(LabelSet(), audit.rows, truth))
    assert report.advice.startswith("Recall cannot be known better than at least")
    assert "matches are rare among the 197,600 far rows" in report.advice
    assert report.recall.high == 1.0
    assert report.recall_nearby.low > report.recall.low


SCENARIOS = {
    "rare": (20_000, 300, 0.9, (20, 10, 30)),
    "none missed": (20_000, 300, 1.0, (0, 0, 0)),
    "many": (20_000, 300, 0.8, (150, 200, 900)),
    "small": (400, 40, 0.7, (10, 5, 3)),
    "none right": (5_000, 100, 0.0, (5, 5, 10)),
}
N_AUDITS = 150


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_intervals_hold_the_truth(rng, scenario):
    """150 audits of 40 rows each; each count fails by chance less than once in a million runs.

    If an interval holds the truth with probability .95, the number of audits where it does is at
    least Binomial(150, .95), whose 1e-6 quantile is 127: P(X <= 126) < 1e-6 < P(X <= 127).
    """
    n_total, n_answer, precision, missed = SCENARIOS[scenario]
    at_least = stats.binom(N_AUDITS, 0.95).ppf(1e-6)
    rows = rng.permutation(n_total)
    answer, rest = rows[:n_answer], rows[n_answer:]
    n_boundary = max(n_answer, 50)
    ends = np.cumsum([0, n_boundary, 4 * n_boundary])
    truth = np.zeros(n_total, bool)
    truth[answer[: round(precision * n_answer)]] = True
    for start, n_missed in zip(ends, missed, strict=True):
        truth[rest[start : start + n_missed]] = True
    known = labelled(LabelSet(), answer[:3], truth)
    held = np.zeros(2, int)
    for seed in range(N_AUDITS):
        audit = stratified(n_total, answer, rest[: ends[-1]], known, seed=seed).more(40)
        report = audit.report(labelled(known, audit.rows, truth))
        for number, value in enumerate(shares(truth, answer)):
            estimate = (report.precision, report.recall)[number]
            held[number] += estimate.low - 1e-9 <= value <= estimate.high + 1e-9
    assert (held >= at_least).all()
