"""Suggestions: unlabelled, distinct, diverse, with reasons that are true."""

import numpy as np
import pytest

from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.errors import QueryError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import refine
from clipbranches_widget.search import search
from clipbranches_widget.suggest import suggest

N_CLUSTERS = 20


@pytest.fixture
def build(tmp_path):
    def _build(embeddings):
        path = tmp_path / f"c{len(list(tmp_path.iterdir()))}.cbcat"
        return CatalogIndex(from_embeddings(embeddings.astype(np.float32), path))

    return _build


@pytest.fixture
def clustered(build, rng):
    def _clustered(n, *, n_yes=6, n_no=6):
        centres = rng.normal(size=(N_CLUSTERS, 16))
        cluster = rng.integers(0, N_CLUSTERS, n)
        cluster[0] = 0
        index = build(centres[cluster] + 0.8 * rng.normal(size=(n, 16)))
        labels = LabelSet(np.flatnonzero(cluster == 0)[:n_yes], np.flatnonzero(cluster != 0)[:n_no])
        return index, labels

    return _clustered


def check(suggestions, labels, n):
    rows = suggestions.rows.tolist()
    assert len(rows) == len(set(rows)) == len(suggestions.reasons) == n
    assert not set(rows) & set(labels.rows.tolist())
    assert all(suggestions.reasons)


def test_after_a_round_all_kinds_are_there_and_their_reasons_are_true(clustered):
    index, labels = clustered(3_000)
    result = refine(index, labels=labels)
    found = suggest(index, result, labels)
    check(found, labels, 12)
    scores = result.model.teacher.scores(index.embeddings(found.rows))
    for row, reason, score in zip(found.rows, found.reasons, scores, strict=True):
        if reason.startswith("rule"):
            branch = result.branches[int(result.branch_ids[result.rows == row][0])]
            assert reason == f"rule '{branch.text}' has no label yet"
            assert branch.n_positive == branch.n_negative == 0
        else:
            assert f"({score:.2f})" in reason
    assert sum("on the boundary" in reason for reason in found.reasons) >= 2
    assert sum("likely a match" in reason or "next best" in reason for reason in found.reasons) >= 3
    boundary = [s for s, r in zip(scores, found.reasons, strict=True) if "boundary" in r]
    assert np.abs(np.array(boundary) - result.threshold).max() < 0.4


def test_a_branch_without_labels_gets_its_best_row(clustered):
    index, labels = clustered(3_000, n_yes=1, n_no=1)
    result = refine(index, labels=labels, threshold=0.2)
    thin = [b for b in result.branches if b.box and not b.n_positive + b.n_negative]
    own = [b for b in thin if (result.branch_ids == b.id).any()]
    assert own
    found = suggest(index, result, labels, n=40)
    said = [r for r in found.reasons if r.startswith("rule")]
    assert len(said) == min(len(own), 6)
    for row, reason in zip(found.rows, found.reasons, strict=True):
        for branch in own:
            if f"'{branch.text}'" in reason:
                assert row == next(
                    row for row in result.rows[result.branch_ids == branch.id] if row not in labels
                )


def test_labels_newer_than_the_result_count(clustered):
    index, labels = clustered(3_000)
    result = refine(index, labels=labels)
    first = suggest(index, result, labels)
    newer = labels.with_labels(positive=first)
    second = suggest(index, result, newer)
    check(second, newer, 12)


def test_rows_that_were_passed_over_are_not_asked_again(clustered):
    index, labels = clustered(3_000)
    for result in (refine(index, labels=labels), search(index.catalog, np.ones(16), 200), None):
        first = suggest(index, result, labels)
        second = suggest(index, result, labels, skip=first)
        third = suggest(index, result, labels, skip=[*first, *second, *labels.rows.tolist()])
        check(second, labels, 12)
        check(third, labels, 12)
        assert len({*first, *second, *third}) == 36
        alike = index.embeddings(first.rows) @ index.embeddings(second.rows).T
        assert alike.max() < 0.98


def test_everything_passed_over_leaves_nothing(clustered):
    index, labels = clustered(30)
    assert not len(suggest(index, None, labels, skip=range(30)))


def test_near_duplicates_are_not_asked_twice(build, rng):
    distinct = rng.normal(size=(40, 16))
    index = build(np.repeat(distinct, 20, axis=0) + 1e-3 * rng.normal(size=(800, 16)))
    labels = LabelSet([0], [20])
    for result in (refine(index, labels=labels, threshold=0.3), None):
        found = suggest(index, result, labels, n=12)
        assert len({row // 20 for row in found}) == 12


def test_search_hits_are_spread(clustered):
    index, labels = clustered(1_000)
    hits = search(index.catalog, index.embeddings(np.array([0]))[0], 60)
    found = suggest(index, hits, labels, n=8)
    check(found, labels, 8)
    assert np.isin(found.rows, hits.rows).all()
    assert all("near the query" in reason for reason in found.reasons)


def test_an_answer_still_being_computed_will_do(clustered):
    index, labels = clustered(1_000)
    parts = []
    refine(index, labels=labels, partial=parts.append)
    check(suggest(index, parts[0], labels, n=5), labels, 5)


def test_without_a_result_rows_differ_and_follow_the_seed(clustered):
    index, labels = clustered(3_000)
    found = suggest(index, None, labels, n=10, seed=1)
    check(found, labels, 10)
    assert np.array_equal(found.rows, suggest(index, None, labels, n=10, seed=1).rows)
    assert not np.array_equal(found.rows, suggest(index, None, labels, n=10, seed=2).rows)
    vectors = index.embeddings(found.rows)
    drawn = index.embeddings(np.random.default_rng(0).choice(3_000, 10, replace=False))
    alike = [(v @ v.T - 2 * np.eye(10)).max() for v in (vectors, drawn)]
    assert alike[0] < alike[1]


@pytest.mark.parametrize("n_rows", [1, 2, 30])
@pytest.mark.parametrize("n", [1, 12, 100])
def test_no_more_than_there_are(clustered, n_rows, n):
    index, labels = clustered(n_rows, n_yes=1, n_no=0)
    result = refine(index, labels=labels)
    for each in (None, result):
        check(suggest(index, each, labels, n=n), labels, min(n, n_rows - 1))


def test_everything_labelled_leaves_nothing(clustered):
    index, _ = clustered(20)
    labels = LabelSet(np.arange(10), np.arange(10, 20))
    assert not len(suggest(index, refine(index, labels=labels), labels))


def test_an_empty_answer_still_gives_suggestions(clustered):
    index, labels = clustered(2_000)
    no = labels.with_labels(negative=labels.positive)
    query = index.embeddings(np.array([500]))[0]
    result = refine(index, labels=no, query=query, threshold=0.999)
    check(suggest(index, result, no), no, 12)


def test_same_arguments_same_rows(clustered):
    index, labels = clustered(2_000)
    result = refine(index, labels=labels)
    first, again = (suggest(index, result, labels, n=20, seed=3) for _ in range(2))
    assert np.array_equal(first.rows, again.rows)
    assert first.reasons == again.reasons


def test_as_a_table(clustered):
    index, labels = clustered(500)
    found = suggest(index, refine(index, labels=labels), labels, n=5)
    frame = found.to_pandas()
    assert frame["row"].tolist() == found.rows.tolist()
    assert frame["reason"].tolist() == list(found.reasons)
    assert "path" in frame


@pytest.mark.parametrize("n", [0, -1, "many"])
def test_bad_sizes_are_refused(clustered, n):
    index, labels = clustered(30)
    with pytest.raises(QueryError, match="expected n"):
        suggest(index, None, labels, n=n)
