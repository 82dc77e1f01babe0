"""The exactness contract: whatever the plan, the answer equals the full scan, bit for bit."""

import numpy as np
import pytest
import xgboost as xgb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipbranches_widget.box_query import plan_box, rows_above, rows_in_boxes, run_plan
from clipbranches_widget.boxes import LeafBox, union_mask
from clipbranches_widget.errors import RefineError
from clipbranches_widget.sorted_columns import SortedColumns
from clipbranches_widget.trees import KERNEL_ROWS, TreeEnsemble, fit_forest, predict_margins

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def catalogs(draw):
    """Codes of 1 to 999 rows: spread, few distinct values, constant columns, duplicate rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.sampled_from([1, 2, 17, 300, 999]))
    n_columns = draw(st.integers(1, 6))
    top = draw(st.sampled_from([1, 2, 7, 256]))
    codes = rng.integers(0, top, (n_columns, n), dtype=np.uint8)
    if draw(st.booleans()):
        codes[draw(st.integers(0, n_columns - 1))] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        codes = codes[:, rng.integers(0, n, n)]
    return np.ascontiguousarray(codes)


@st.composite
def boosters(draw, codes):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    target = rng.random(codes.shape[1]) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    params = {
        "objective": draw(
            st.sampled_from(["binary:logistic", "reg:squarederror", "rank:pairwise"])
        ),
        "max_depth": draw(st.integers(1, 8)),
        "num_parallel_tree": draw(st.sampled_from([1, 5])),
        "learning_rate": draw(st.sampled_from([0.1, 1.0])),
        "min_child_weight": 0,
        "subsample": draw(st.sampled_from([0.7, 1.0])),
        "nthread": 1,
        "seed": 0,
    }
    if draw(st.booleans()):
        params["base_score"] = draw(st.sampled_from([0.5, 0.123, 0.9]))
    matrix = xgb.DMatrix(codes.T.astype(np.float32), target.astype(np.float32))
    return xgb.train(params, matrix, num_boost_round=draw(st.integers(1, 8)))


@SLOW
@given(st.data())
def test_margins_equal_booster_predict_bit_for_bit(data):
    codes = data.draw(catalogs())
    booster = data.draw(boosters(codes))
    expected = booster.predict(xgb.DMatrix(codes.T.astype(np.float32)), output_margin=True)
    ours = TreeEnsemble.from_booster(booster).margins(codes)
    assert np.array_equal(ours, expected)
    assert np.array_equal(predict_margins(booster, codes), expected)


@SLOW
@given(st.data())
def test_the_compiled_kernel_sums_the_same_bits(data):
    codes = data.draw(catalogs())
    booster = data.draw(boosters(codes))
    ensemble = TreeEnsemble.from_booster(booster)
    wide = np.tile(codes, KERNEL_ROWS // codes.shape[1] + 1)
    assert np.array_equal(ensemble.margins(wide)[: codes.shape[1]], predict_margins(booster, codes))


@SLOW
@given(st.data())
def test_every_row_is_in_one_leaf_box_a_tree_and_gets_its_value(data):
    codes = data.draw(catalogs())
    ensemble = TreeEnsemble.from_booster(data.draw(boosters(codes)))
    for tree, boxes in zip(ensemble.trees, ensemble.leaf_boxes(), strict=True):
        inside = np.stack([box.contains(codes) for box in boxes])
        assert np.all(inside.sum(axis=0) == 1)
        values = np.array([box.value for box in boxes], dtype=np.float32)
        assert np.array_equal(values[inside.argmax(axis=0)], tree.leaf_values(codes))


@SLOW
@given(st.data())
def test_rows_above_equal_the_full_scan(data):
    codes = data.draw(catalogs())
    booster = data.draw(boosters(codes))
    scanned = predict_margins(booster, codes)
    thresholds = [*scanned[:3].tolist(), -np.inf, np.inf, 0.0, float(np.nextafter(scanned[0], -9))]
    threshold = data.draw(st.sampled_from(thresholds))
    answer = rows_above(
        SortedColumns.from_codes(codes), TreeEnsemble.from_booster(booster), threshold
    )
    expected = np.flatnonzero(scanned > np.float32(threshold))
    assert np.array_equal(answer.rows, expected)
    assert np.array_equal(answer.margins, scanned[expected])


@SLOW
@given(st.data())
def test_rows_in_boxes_equal_the_full_scan_whatever_the_plan(data):
    codes = data.draw(catalogs())
    ensemble = TreeEnsemble.from_booster(data.draw(boosters(codes)))
    leaves = [box for boxes in ensemble.leaf_boxes() for box in boxes]
    boxes = data.draw(st.lists(st.sampled_from(leaves), max_size=5))
    columns = SortedColumns.from_codes(codes)
    answer = rows_in_boxes(columns, boxes)
    assert np.array_equal(answer.rows, np.flatnonzero(union_mask(boxes, codes)))
    for box, rows in zip(boxes, answer.by_box, strict=True):
        expected = np.flatnonzero(box.contains(codes))
        assert np.array_equal(rows, expected)
        if box.ranges:
            counts = [columns.count(each) for each in box.ranges]
            for forced in (plan_box(box, counts, 10**9), plan_box(box, counts, 0)):
                assert np.array_equal(run_plan(columns, forced), expected)


def test_the_planner_reads_the_narrowest_list_or_scans():
    box = LeafBox.from_bounds({0: (0, 100), 1: (0, 3), 2: (9, 256)})
    postings = plan_box(box, [5_000, 100, 9_000], 10_000)
    assert (postings.strategy, postings.n_read) == ("postings", 100)
    assert [each.column for each in postings.ranges] == [1, 0, 2]
    assert plan_box(box, [5_000, 4_000, 9_000], 10_000).strategy == "scan"
    assert plan_box(LeafBox.from_bounds({}), [], 10_000).n_read == 10_000


def test_a_selective_ensemble_is_answered_without_a_scan(rng):
    codes = rng.integers(0, 256, (8, 20_000), dtype=np.uint8)
    target = (codes[0] > 250) & (codes[1] > 200)
    matrix = xgb.DMatrix(codes.T.astype(np.float32), target.astype(np.float32))
    booster = xgb.train({"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, matrix, 5)
    ensemble = TreeEnsemble.from_booster(booster)
    answer = rows_above(SortedColumns.from_codes(codes), ensemble, 0.0)
    assert np.array_equal(answer.rows, np.flatnonzero(predict_margins(booster, codes) > 0))
    assert 0 < len(answer.rows) <= answer.n_read < 20_000


def test_the_same_seed_grows_the_same_forest(rng):
    codes = rng.integers(0, 256, (8, 2_000), dtype=np.uint8)
    target, weights = codes[0] > 200, np.ones(2_000, np.float32)
    first, again, other = (
        fit_forest(codes, target, weights, seed=seed).save_raw("json") for seed in (1, 1, 2)
    )
    assert first == again != other


def test_boosters_we_cannot_turn_into_boxes_are_refused(rng):
    codes = rng.integers(0, 256, (50, 3)).astype(np.float32)
    classes = xgb.DMatrix(codes, rng.integers(0, 3, 50))
    multi = xgb.train({"objective": "multi:softmax", "num_class": 3}, classes, 1)
    with pytest.raises(RefineError, match="expected a 'gbtree' booster with one output"):
        TreeEnsemble.from_booster(multi)
    linear = xgb.train({"booster": "gblinear"}, xgb.DMatrix(codes, codes[:, 0]), 1)
    with pytest.raises(RefineError, match="got 'gblinear'"):
        TreeEnsemble.from_booster(linear)
