"""The planner: from counts alone, without a row being read."""

import numpy as np
import pytest

from clipbranches_widget.boxes import LeafBox
from clipbranches_widget.query_plan import (
    by_selectivity,
    candidate_leaves,
    plan_boxes,
    plan_ensemble,
)
from clipbranches_widget.tree_program import TreeProgram
from clipbranches_widget.trees import Tree, TreeEnsemble


class Counts:
    """An index that has nothing but counts, evenly spread, and keeps what it was asked."""

    def __init__(self, n_rows=10_000_000, *, has_bits=True, has_order=True, n_shards=1):
        self.n_rows, self.n_shards = n_rows, n_shards
        self.has_bits, self.has_order = has_bits, has_order
        self.asked = []

    def count(self, code_range):
        self.asked.append(code_range)
        return self.n_rows * (code_range.high - code_range.low) // 256


NARROW = LeafBox.from_bounds({0: (255, 256), 1: (0, 3), 2: (9, 256)})
ALIGNED = LeafBox.from_bounds({0: (200, 256), 1: (0, 64), 2: (136, 256)})


def test_boxes_on_the_edges_are_answered_from_bit_vectors():
    stats = Counts()
    plan = plan_boxes([ALIGNED, ALIGNED], stats)
    assert plan.strategy == "bits"
    assert plan.chosen.n_bytes == 3 * 10_000_000 // 8
    assert plan.chosen.what == "3 bit vectors"
    assert set(stats.asked) == set(ALIGNED.ranges)
    assert [each.strategy for each in plan.estimates] == ["bits", "scan", "postings"]
    assert str(plan).splitlines()[0] == "bits (numba loops): the quickest of 3"


def test_a_very_narrow_range_is_answered_from_its_posting_list():
    rare = LeafBox.from_bounds({0: (255, 256), 1: (7, 99)})
    stats = Counts(n_rows=100_000_000)
    stats.count = lambda each: 500 if each.column == 0 else 30_000_000
    plan = plan_boxes([rare], stats)
    assert plan.strategy == "postings"
    assert plan.chosen.what == "500 rows of posting lists, 500 codes to verify"
    assert plan.chosen.n_bytes == 500 * 4 + 500 * 64


def test_ranges_are_read_most_selective_first():
    assert [each.column for each in by_selectivity(NARROW, Counts())] == [0, 1, 2]


@pytest.mark.parametrize(
    ("has_bits", "has_order", "known"),
    [
        (False, False, {"scan"}),
        (True, False, {"scan", "bits"}),
        (False, True, {"scan", "postings"}),
    ],
)
def test_only_what_is_stored_is_planned(has_bits, has_order, known):
    plan = plan_boxes([NARROW], Counts(has_bits=has_bits, has_order=has_order))
    assert {each.strategy for each in plan.estimates} == known


def test_ranges_off_the_edges_cost_their_codes():
    plan = plan_boxes([NARROW], Counts(), strategy="bits")
    assert plan.reason == "as asked"
    assert plan.chosen.what == "0 bit vectors and 3 code ranges that end off the edges"
    assert plan.chosen.n_bytes == 3 * 10_000_000


def test_no_boxes_and_the_box_of_every_row_can_be_planned():
    assert plan_boxes([], Counts()).chosen.n_bytes == 0
    assert plan_boxes([LeafBox(())], Counts(), strategy="postings").chosen.n_bytes == 40_000_000


def test_an_ensemble_is_scanned_unless_its_leaves_hold_few_rows():
    tree = Tree(
        column=np.array([0, 0, 0], np.int32),
        threshold=np.array([250, 0, 0], np.int32),
        left=np.array([1, -1, -1], np.int32),
        right=np.array([2, -1, -1], np.int32),
        value=np.array([0, -1, 1], np.float32),
    )
    program = TreeProgram.of(TreeEnsemble(np.float32(0), (tree,) * 40, 1))
    few = [LeafBox.from_bounds({0: (254, 256), 1: (0, 64)})]
    many = [LeafBox.from_bounds({0: (64, 256)})]
    stats = Counts()
    assert plan_ensemble(program, few, stats).strategy == "leaves"
    plan = plan_ensemble(program, many, stats)
    assert plan.strategy == "scan"
    assert plan.chosen.what == "40 trees over all 10,000,000 rows of 1 columns"
    assert plan_ensemble(program, many, stats, strategy="leaves").strategy == "leaves"
    assert [each.strategy for each in plan_ensemble(program, None, stats).estimates] == ["scan"]


def test_leaves_are_given_up_when_they_may_hold_too_many_rows():
    tree = Tree(
        column=np.array([0, 0, 0], np.int32),
        threshold=np.array([250, 0, 0], np.int32),
        left=np.array([1, -1, -1], np.int32),
        right=np.array([2, -1, -1], np.int32),
        value=np.array([0, -1, 1], np.float32),
    )
    ensemble, stats = TreeEnsemble(np.float32(0), (tree,), 1), Counts(256_000)
    assert candidate_leaves(ensemble, np.float32(1), stats) == []
    (leaf,) = candidate_leaves(ensemble, np.float32(0), stats, max_rows=6_000)
    assert leaf.ranges == ((0, 250, 256),)
    assert candidate_leaves(ensemble, np.float32(0), stats, max_rows=5_999) is None
    assert len(candidate_leaves(ensemble, np.float32(-2), stats)) == 2
