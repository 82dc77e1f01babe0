"""Rules switched off and pinned in a round, against the full scan; what a branch tells."""

from itertools import pairwise

import numpy as np
import pytest

from clipbranches_widget import array_kernels, round_answer
from clipbranches_widget.boxes import LeafBox, union_mask
from clipbranches_widget.catalog_index import CatalogIndex
from clipbranches_widget.errors import RefineError
from clipbranches_widget.ingest import from_embeddings
from clipbranches_widget.labels import LabelSet
from clipbranches_widget.refine import learn, refine

N_CLUSTERS = 12


@pytest.fixture(scope="module")
def cluster():
    return np.random.default_rng(4).integers(0, N_CLUSTERS, 2_000)


@pytest.fixture(scope="module")
def index(tmp_path_factory, cluster):
    """Wide clusters, so that a round needs several boxes; three shards."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(N_CLUSTERS, 24))
    embeddings = centres[cluster] + 0.9 * rng.normal(size=(len(cluster), 24))
    path = tmp_path_factory.mktemp("rules") / "c.cbcat"
    return CatalogIndex(from_embeddings(embeddings.astype(np.float32), path, rows_per_shard=700))


@pytest.fixture(scope="module")
def labels(cluster):
    return some_labels(cluster, 0)


@pytest.fixture(scope="module")
def plain(index, labels):
    """The round without any rule changed; it has several boxes."""
    result = refine(index, labels=labels)
    assert len(boxes_of(result)) > 2
    return result


def some_labels(cluster, wanted):
    return LabelSet(np.flatnonzero(cluster == wanted)[:8], np.flatnonzero(cluster != wanted)[:8])


def boxes_of(result, *states):
    return [
        branch.box
        for branch in result.branches
        if branch.box is not None and (not states or branch.state in states)
    ]


def all_codes(index):
    return index.columns.codes(np.arange(len(index.catalog)))


def full_scan(index, model, labels, off):
    """Rows and scores of the answer, and all candidates, without any index."""
    embeddings = index.embeddings(np.arange(len(index.catalog)))
    codes, scores = all_codes(index), model.teacher.scores(embeddings)
    in_boxes = union_mask(model.boxes, codes)
    similarity = embeddings.astype(np.float64) @ model.teacher.direction.astype(np.float64)
    near = np.zeros(len(embeddings), dtype=bool)
    near[np.argsort(-similarity, kind="stable")[: model.n_nearest]] = True
    candidates = in_boxes | (near & ~union_mask(off, codes))
    candidates[labels.positive] = True
    scores[labels.positive] = np.maximum(scores[labels.positive], np.float32(model.threshold))
    wanted = candidates & (scores >= np.float32(model.threshold))
    wanted[labels.negative] = False
    rows = np.flatnonzero(wanted)
    return rows[np.lexsort((rows, -scores[rows]))], np.flatnonzero(candidates)


@pytest.mark.parametrize("which", [[0], [1], [0, 2], "all"])
def test_without_some_rules_the_answer_equals_the_full_scan(index, labels, plain, which):
    boxes = boxes_of(plain)
    off = boxes if which == "all" else [boxes[n] for n in which]
    model = learn(index, labels=labels, off=off)
    result = refine(index, labels=labels, off=off)
    rows, candidates = full_scan(index, model, labels, off)
    assert np.array_equal(result.rows, rows)
    assert np.array_equal(result.pool.rows, candidates)
    assert result.n_touched == len(candidates)
    assert model.off == tuple(off)
    assert len(result) < len(plain)


def test_rows_leave_only_with_the_last_rule_that_holds_them(index, labels, plain):
    boxes, codes = boxes_of(plain), all_codes(index)
    result = refine(index, labels=labels, off=boxes[:1])
    gone = np.setdiff1d(plain.rows, result.rows)
    assert len(gone)
    assert boxes[0].contains(codes[:, gone]).all()
    assert not union_mask(boxes[1:], codes[:, gone]).any()
    assert not np.isin(gone, labels.positive).any()
    assert set(result.rows) <= set(plain.rows)
    yes_inside = labels.positive[boxes[0].contains(codes[:, labels.positive])]
    assert np.isin(yes_inside, result.rows).all()


def test_a_rule_switched_off_stays_listed_in_its_place(index, labels, plain):
    boxes = boxes_of(plain)
    result = refine(index, labels=labels, off=[boxes[1]])
    assert boxes_of(result) == boxes
    assert [b.id for b in result.branches] == list(range(len(result.branches)))
    states = [b.state for b in result.branches if b.box is not None]
    assert states == ["on", "off", *["on"] * (len(boxes) - 2)]
    for before, after in zip(plain.branches, result.branches[: len(boxes)], strict=False):
        assert (before.n_rows, before.n_positive) == (after.n_rows, after.n_positive)
        assert before.conditions == after.conditions
    off = result.branches[1]
    assert str(off) == f"{plain.branches[1]}, off"
    assert off.example_rows == ()
    assert not (result.branch_ids == 1).any()
    assert any("1 rule is switched off" in note for note in result.notes)
    again = refine(index, labels=labels)
    assert np.array_equal(again.rows, plain.rows)
    assert again.branches == plain.branches


def test_rules_of_other_rounds_can_be_off_and_come_last(index, labels, cluster, plain):
    other = boxes_of(refine(index, labels=some_labels(cluster, 1)))[0]
    assert other.ranges not in {box.ranges for box in boxes_of(plain)}
    result = refine(index, labels=labels, off=[other])
    n_boxes = len(boxes_of(plain))
    assert boxes_of(result, "off") == [other]
    assert result.branches[n_boxes].box == other
    assert result.branches[n_boxes].n_rows == len(index.columns.in_boxes([other]).rows)


def test_only_ranges_count(index, labels, plain):
    box = boxes_of(plain)[0]
    alike = LeafBox(box.ranges, value=99.0, tree=77)
    result = refine(index, labels=labels, off=[alike, box])
    assert np.array_equal(result.rows, refine(index, labels=labels, off=[box]).rows)
    assert len(boxes_of(result)) == len(boxes_of(plain))


def test_every_image_off_leaves_what_other_rules_hold(index, labels, plain):
    result = refine(index, labels=labels, off=[LeafBox.from_bounds({})])
    held = np.union1d(index.columns.in_boxes(boxes_of(plain)).rows, labels.positive)
    assert np.array_equal(result.pool.rows, held)
    nothing = refine(index, labels=labels, off=[LeafBox.from_bounds({}), *boxes_of(plain)])
    assert sorted(nothing) == labels.positive.tolist()
    assert nothing.branches[-1].rows == tuple(labels.positive.tolist())


def test_a_pinned_rule_is_read_and_listed_first(index, labels, cluster, plain):
    pinned = boxes_of(refine(index, labels=some_labels(cluster, 1)))[0]
    result = refine(index, labels=labels, pinned=[pinned], threshold=0.05)
    without = refine(index, labels=labels, threshold=0.05)
    first = result.branches[0]
    assert (first.box, first.state) == (pinned, "pinned")
    assert str(first).endswith(" no), pinned")
    assert boxes_of(result)[1:] == boxes_of(without)
    inside = index.columns.in_boxes([pinned]).rows
    assert first.n_rows == len(inside)
    assert np.isin(inside, result.pool.rows).all()
    assert set(without.rows) <= set(result.rows)
    main = result.rows[result.branch_ids == 0]
    assert np.array_equal(np.sort(main), np.intersect1d(inside, result.rows))


def test_a_pinned_rule_that_was_learned_stays_in_its_place(index, labels, plain):
    box = boxes_of(plain)[2]
    result = refine(index, labels=labels, pinned=[LeafBox(box.ranges)])
    assert np.array_equal(result.rows, plain.rows)
    assert np.array_equal(result.branch_ids, plain.branch_ids)
    assert boxes_of(result) == boxes_of(plain)
    assert [b.id for b in result.branches if b.state == "pinned"] == [2]


def test_with_rules_off_rows_are_still_only_added_while_it_runs(index, labels, plain, monkeypatch):
    monkeypatch.setattr(round_answer, "PARTIAL_EVERY_S", 0.0)
    monkeypatch.setattr(array_kernels, "BOX_PIECE_ROWS", (64, 64))
    seen = []
    final = refine(index, labels=labels, off=boxes_of(plain)[:2], partial=seen.append)
    rows = [set(result.rows.tolist()) for result in (*seen, final)]
    assert len(rows) > 2
    assert all(before <= after for before, after in pairwise(rows))


def test_another_threshold_keeps_rules_off(index, labels, plain):
    off = boxes_of(plain)[:1]
    result = refine(index, labels=labels, off=off)
    lower = result.at(0.3)
    assert set(lower.rows) <= set(result.pool.rows)
    assert boxes_of(lower, "off") == off
    same = lower.at(result.threshold)
    assert same.branches == result.branches
    assert np.array_equal(same.branch_ids, result.branch_ids)


def test_a_rule_cannot_be_off_and_pinned(index, labels, plain):
    boxes = boxes_of(plain)[:1]
    with pytest.raises(RefineError, match="off or pinned, got one that is both"):
        refine(index, labels=labels, off=boxes, pinned=boxes)


@pytest.mark.parametrize("option", ["off", "pinned"])
def test_rules_on_columns_that_are_not_there_are_refused(index, labels, option):
    boxes = [LeafBox.from_bounds({500: (3, 9)})]
    with pytest.raises(RefineError, match="got column 500: they are of another catalog"):
        refine(index, labels=labels, **{option: boxes})
    with pytest.raises(RefineError, match="got column 500: they are of another catalog"):
        learn(index, labels=labels, **{option: boxes})


def test_branches_show_their_best_rows(plain):
    for branch in plain.branches:
        main = plain.rows[plain.branch_ids == branch.id]
        assert branch.example_rows == tuple(main[:5].tolist())
        assert branch.state == "on"


def test_a_branch_reads_as_one_line(plain):
    first = plain.branches[0]
    assert str(first) == (
        f"{first.text} -> {first.n_rows:,} images ({first.n_positive} yes, {first.n_negative} no)"
    )
