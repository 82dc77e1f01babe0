"""A round's answer at other thresholds: what the round itself would have said, exactly."""

import dataclasses
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.branch import Branch
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.errors import RefineError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.pool import LABELLED_TEXT, NEAR_TEXT, with_other_sources
from clipbranches_widget.ranking import ranked_at
from clipbranches_widget.refine import DEFAULT_THRESHOLD, refine
from clipbranches_widget.result import PREVIEW_THRESHOLDS
from clipbranches_widget.round_answer import Asked, answer, first_page
from clipbranches_widget.round_clock import RoundClock
from clipbranches_widget.search import search

N_CLUSTERS = 40
GRID = (0.01, 0.2, 0.45, 0.5, 0.55, 0.8, 0.99)


def labelled_round(folder, rng, n, **options):
    """Return index, labels and result; the labels hold a yes and a no that nothing else would."""
    centres = rng.normal(size=(N_CLUSTERS, 32))
    cluster = rng.integers(0, N_CLUSTERS, n)
    embeddings = centres[cluster] + 0.7 * rng.normal(size=(n, 32))
    index = CatalogIndex(from_embeddings(embeddings.astype(np.float32), folder / "c.cbcat"))
    members, others = np.flatnonzero(cluster == 0), np.flatnonzero(cluster != 0)
    labels = LabelSet([*members[:6], others[0]], [members[6], *others[1:7]])
    return index, labels, refine(index, labels=labels, **options)


@pytest.fixture
def made(tmp_path, rng):
    return labelled_round(tmp_path, rng, 2_000, query_text="firsts", seed=5)


def assert_same(one, other):
    assert np.array_equal(one.rows, other.rows)
    assert one.scores.tobytes() == other.scores.tobytes()
    assert one.margins.tobytes() == other.margins.tobytes()
    assert np.array_equal(one.branch_ids, other.branch_ids)
    assert one.branches == other.branches
    assert one.threshold == other.threshold


@pytest.mark.parametrize("n", [300, 2_000, 24_000])
@pytest.mark.parametrize("learned", [0.3, 0.5])
def test_at_is_what_the_same_model_answers_at_that_threshold(tmp_path, rng, n, learned):
    index, labels, result = labelled_round(tmp_path, rng, n, threshold=learned)
    assert_same(result.at(learned), result)
    assert result.at(learned).notes == result.notes
    for threshold in GRID:
        model = dataclasses.replace(result.model, threshold=threshold)
        asked = Asked(labels, "", threshold, 0)
        scored = first_page(index, model.teacher, asked)
        expected = answer(index, model, scored, asked, RoundClock())
        moved = result.at(threshold)
        assert_same(moved, expected)
        own = [note for note in moved.notes if "which the boxes were learned for" in note]
        assert len(own) == (threshold < learned)
        assert [note for note in moved.notes if note not in own] == list(expected.notes)


def test_higher_thresholds_give_parts_and_labels_stay(made):
    _, labels, result = made
    answers = [result.at(threshold) for threshold in GRID]
    for loose, strict in pairwise(answers):
        assert set(strict) <= set(loose)
    assert len(answers[0]) > len(result) > len(answers[-1])
    for each in answers:
        assert np.isin(labels.positive, each.rows).all()
        assert not np.isin(labels.negative, each.rows).any()
        assert np.all(each.scores >= np.float32(each.threshold))
        assert set(each) <= set(result.pool.rows.tolist())
        assert len(each.to_pandas()) == len(each)
    stray = labels.positive[result.pool.scores[np.isin(result.pool.rows, labels.positive)] < 0.99]
    assert len(stray) >= 1
    assert set(answers[-1].scores[np.isin(answers[-1].rows, stray)]) == {np.float32(0.99)}


def test_a_threshold_below_the_boxes_says_that_images_may_be_missing(made):
    result = made[2]
    assert any("so images may be missing: refine(threshold=0.2)" in n for n in result.at(0.2).notes)
    assert not any("may be missing" in note for note in result.at(0.6).notes)
    assert not any("may be missing" in note for note in result.at(0.2).at(0.6).notes)


def test_the_way_there_does_not_matter_and_other_notes_stay(made):
    result = dataclasses.replace(made[2], notes=(*made[2].notes, "seen twice"))
    there = result.at(0.2).at(0.9).at(0.55)
    assert_same(there, result.at(0.55))
    assert there.notes == result.at(0.55).notes
    assert there.notes[-1] == "seen twice"
    assert_same(result[:3].at(0.55), result.at(0.55))


def test_at_keeps_what_does_not_change(made):
    result = made[2]
    moved = result.at(0.7)
    for name in ("catalog", "kind", "n_touched", "n_total", "query_text", "seed", "plan"):
        assert getattr(moved, name) == getattr(result, name)
    assert moved.model is result.model
    assert moved.pool is result.pool
    assert moved.is_complete
    assert result.threshold == DEFAULT_THRESHOLD


def test_rows_without_a_box_are_counted_anew(made):
    result = made[2]
    for threshold in GRID:
        moved = result.at(threshold)
        for branch in moved.branches:
            if branch.box is None:
                assert branch.n_rows == (moved.branch_ids == branch.id).sum()
        assert [branch.id for branch in moved.branches] == list(range(len(moved.branches)))
        assert {moved.branch_text(i) for i in range(len(moved))} <= {
            branch.text for branch in moved.branches
        }
    assert any(branch.box is None for branch in result.at(0.01).branches)


def test_rows_in_no_box_are_said_to_be_near_or_labelled():
    rows, box_ids = np.array([7, 2, 9, 4]), np.array([0, -1, -1, -1], dtype=np.int32)
    is_yes = np.array([True, True, False, True])
    box = Branch(0, "every image", 4, 0, 0, box=LeafBox(()))
    branches, branch_ids = with_other_sources([box], rows, box_ids, is_yes)
    assert branch_ids.tolist() == [0, 2, 1, 2]
    assert [branch.text for branch in branches] == ["every image", NEAR_TEXT, LABELLED_TEXT]
    assert [branch.rows for branch in branches] == [(), (9,), (2, 4)]
    assert [branch.n_positive for branch in branches] == [0, 0, 2]


def test_rows_of_a_rule_that_is_off_stay_out_at_every_threshold(tmp_path, rng):
    index, labels, result = labelled_round(tmp_path, rng, 2_000)
    box = result.branches[0].box
    without = refine(index, labels=labels, off=[box])
    for threshold in GRID:
        moved = without.at(threshold)
        assert moved.branches[0].state == "off"
        assert not (moved.branch_ids == 0).any()
        assert set(moved) <= set(result.at(threshold))


def test_margins_are_read_once(made, monkeypatch):
    index, _, result = made
    calls, margins = [], index.columns.margins

    def counted(*arguments):
        calls.append(arguments)
        return margins(*arguments)

    monkeypatch.setattr(index.columns, "margins", counted)
    for threshold in GRID:
        result.at(threshold)
    assert len(calls) == 1


def test_preview_says_what_at_gives(made):
    _, labels, result = made
    frame = result.preview()
    assert frame["threshold"].tolist() == list(PREVIEW_THRESHOLDS)
    assert frame.dtypes.astype(str).to_dict() == {
        "threshold": "float64",
        "n_rows": "int64",
        "expected_precision": "float64",
        "expected_yes": "float64",
    }
    for line in frame.itertuples():
        moved = result.at(line.threshold)
        chances = np.where(np.isin(moved.rows, labels.positive), 1.0, moved.scores)
        assert line.n_rows == len(moved)
        assert line.expected_yes == pytest.approx(chances.sum(), rel=1e-6)
        assert line.expected_precision == pytest.approx(chances.mean(), rel=1e-6)
    assert frame["n_rows"].is_monotonic_decreasing
    assert frame["expected_precision"].is_monotonic_increasing


def test_preview_of_some_thresholds_keeps_their_order(made):
    result = made[2].at(0.625)
    assert 0.625 in result.preview()["threshold"].tolist()
    frame = result.preview(thresholds=(each for each in (0.9, 0.1)))
    assert frame["threshold"].tolist() == [0.9, 0.1]
    assert isinstance(result.preview([]), pd.DataFrame)
    assert len(result.preview([])) == 0


def test_preview_of_an_empty_answer_has_no_precision(tmp_path, rng):
    embeddings = rng.normal(size=(300, 16)).astype(np.float32)
    index = CatalogIndex(from_embeddings(embeddings, tmp_path / "c.cbcat"))
    query = embeddings[0] / np.linalg.norm(embeddings[0])
    frame = refine(index, labels=LabelSet([], [0]), query=query).preview([1 - 1e-9])
    assert frame["n_rows"].tolist() == [0]
    assert frame["expected_yes"].tolist() == [0.0]
    assert frame["expected_precision"].isna().all()


@pytest.mark.parametrize("threshold", [0.0, 1.0, -3, 2.5, float("nan"), float("inf")])
def test_thresholds_outside_0_and_1_are_refused(made, threshold):
    for act in (made[2].at, lambda each: made[2].preview([0.5, each])):
        with pytest.raises(RefineError, match="expected a threshold between 0 and 1, got"):
            act(threshold)


def test_searches_and_unfinished_rounds_have_no_other_thresholds(made, tmp_path):
    index, labels, _ = made
    hits = search(index.catalog, index.embeddings(np.array([0]))[0], 5)
    seen = []
    refine(index, labels=labels, partial=seen.append)
    for result, what in ((hits, "a search"), (seen[0], "a round that is still running")):
        for act in (lambda each=result: each.at(0.5), result.preview):
            with pytest.raises(RefineError, match=f"got that of {what}: use what session.refine"):
                act()


@given(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.sampled_from([-1, 0, 1])), max_size=30),
    st.floats(0.01, 0.99),
)
def test_ranking_equals_sorting_one_by_one(given_rows, threshold):
    rows = np.arange(0, 2 * len(given_rows), 2)
    scores = np.array([score for score, _ in given_rows], dtype=np.float32)
    signs = np.array([sign for _, sign in given_rows], dtype=np.int64)
    labels = LabelSet(rows[signs == 1], rows[signs == -1])
    expected = []
    for row, score in zip(rows.tolist(), scores, strict=True):
        if labels.get(row) == 1:
            expected.append((-max(score, np.float32(threshold)), row))
        elif labels.get(row) == 0 and score >= np.float32(threshold):
            expected.append((-score, row))
    positions, ranked = ranked_at(rows, scores, labels, threshold)
    assert rows[positions].tolist() == [row for _, row in sorted(expected)]
    assert ranked.dtype == np.float32
    assert ranked.tolist() == [float(-score) for score, _ in sorted(expected)]
