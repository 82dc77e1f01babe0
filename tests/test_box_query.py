"""The exactness contract: whatever the plan and the engine, the answer equals the full scan."""

import threading

import numpy as np
import pytest
import xgboost as xgb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clipbranches_widget import array_kernels, kernels
from clipbranches_widget.box_program import MAX_BOXES, BoxProgram
from clipbranches_widget.box_query import ColumnIndex
from clipbranches_widget.boxes import LeafBox, union_mask
from clipbranches_widget.errors import Cancelled, QueryError, RefineError
from clipbranches_widget.query_plan import candidate_leaves
from clipbranches_widget.sorted_columns import PREFIX_EDGES, SortedColumns, n_words
from clipbranches_widget.tree_program import TreeProgram
from clipbranches_widget.trees import TreeEnsemble, fit_forest, predict_margins

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ENGINES = pytest.mark.parametrize("engine", [kernels, array_kernels], ids=lambda each: each.NAME)


@st.composite
def catalogs(draw):
    """Codes of 1 to 999 rows: spread, few distinct values, constant columns, duplicate rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.sampled_from([1, 2, 17, 63, 64, 65, 300, 999]))
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


@st.composite
def any_boxes(draw, n_columns):
    """Up to 9 boxes; bounds on the edges with a bit vector, off them, and at both ends."""
    bound = st.one_of(st.sampled_from([0, *PREFIX_EDGES, 256]), st.integers(0, 256))

    def box():
        bounds = {}
        for column in draw(st.sets(st.integers(0, n_columns - 1), max_size=4)):
            low, high = sorted((draw(bound), draw(bound)))
            if low < high:
                bounds[column] = (low, high)
        return LeafBox.from_bounds(bounds)

    return [box() for _ in range(draw(st.integers(0, 9)))]


@SLOW
@given(st.data())
def test_margins_equal_booster_predict_bit_for_bit(data):
    codes = data.draw(catalogs())
    booster = data.draw(boosters(codes))
    expected = booster.predict(xgb.DMatrix(codes.T.astype(np.float32)), output_margin=True)
    ensemble = TreeEnsemble.from_booster(booster)
    assert np.array_equal(ensemble.margins(codes), expected)
    assert np.array_equal(predict_margins(booster, codes), expected)
    program = TreeProgram.of(ensemble)
    for engine in (kernels, array_kernels):
        assert np.array_equal(engine.margins(codes, program), expected)


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


@ENGINES
@SLOW
@given(st.data())
def test_rows_above_equal_the_full_scan(engine, data):
    codes = data.draw(catalogs())
    booster = data.draw(boosters(codes))
    scanned = predict_margins(booster, codes)
    thresholds = [*scanned[:3].tolist(), -np.inf, np.inf, 0.0, float(np.nextafter(scanned[0], -9))]
    threshold = data.draw(st.sampled_from(thresholds))
    ensemble = TreeEnsemble.from_booster(booster)
    columns = SortedColumns.from_codes(codes)
    expected = np.flatnonzero(scanned > np.float32(threshold))
    start = data.draw(st.integers(0, codes.shape[1] - 1))
    rows, margins = engine.rows_above(
        columns, TreeProgram.of(ensemble), np.float32(threshold), start, codes.shape[1]
    )
    assert np.array_equal(rows, expected[expected >= start])
    assert np.array_equal(margins, scanned[rows])
    for strategy in (None, "scan", "leaves"):
        answer = ColumnIndex([columns]).rows_above(ensemble, threshold, strategy=strategy)
        assert np.array_equal(answer.rows, expected)
        assert np.array_equal(answer.margins, scanned[expected])


@SLOW
@given(st.data())
def test_no_row_outside_the_candidate_leaves_is_above_the_threshold(data):
    codes = data.draw(catalogs())
    booster = data.draw(boosters(codes))
    scanned = predict_margins(booster, codes)
    limit = np.float32(data.draw(st.sampled_from([*scanned[:3].tolist(), 0.0])))
    ensemble = TreeEnsemble.from_booster(booster)
    index = ColumnIndex([SortedColumns.from_codes(codes)])
    leaves = candidate_leaves(ensemble, limit, index.stats)
    assert not np.any(scanned[~union_mask(leaves, codes)] > limit)


@pytest.mark.parametrize("n_trees", [1, 3, 300])
@pytest.mark.parametrize("n", [4_095, 4_096, 30_000])
def test_the_screen_drops_no_row_above_the_threshold(rng, n, n_trees):
    codes = rng.integers(0, 256, (8, n), dtype=np.uint8)
    target = (codes[0] > 250) & (codes[1] > 100)
    matrix = xgb.DMatrix(codes.T.astype(np.float32), target.astype(np.float32))
    params = {"objective": "binary:logistic", "max_depth": 4, "nthread": 1, "subsample": 0.6}
    booster = xgb.train({**params, "num_parallel_tree": n_trees}, matrix, 2)
    program = TreeProgram.of(TreeEnsemble.from_booster(booster))
    columns = SortedColumns.from_codes(codes)
    scanned = predict_margins(booster, codes)
    for threshold in np.quantile(scanned, [0.0, 0.3, 0.9, 0.99, 1.0]).astype(np.float32):
        rows, margins = kernels.rows_above(columns, program, threshold, 0, n)
        assert np.array_equal(rows, np.flatnonzero(scanned > threshold))
        assert np.array_equal(margins, scanned[rows])
        bounds = np.zeros(n, dtype=np.int64)
        screen = program.screen(threshold)
        if screen.limit >= 0:
            bounds = _screen_sums(program, screen.values, codes)
            assert np.all(bounds[rows] > screen.limit)


def _screen_sums(program, values, codes):
    """Sum a screen's steps with the loops for margins: whole numbers are exact in float32."""
    steps = TreeProgram(
        base_margin=np.float32(0),
        first_op=program.first_op,
        ops=program.ops,
        columns=program.columns,
        thresholds=program.thresholds,
        values=values.astype(np.float32),
        unit_trees=program.unit_trees,
        used_columns=program.used_columns,
        stack_size=program.stack_size,
    )
    return array_kernels.margins(codes, steps).astype(np.int64)


@ENGINES
@SLOW
@given(st.data())
def test_rows_in_boxes_equal_the_full_scan(engine, data):
    codes = data.draw(catalogs())
    boxes = data.draw(any_boxes(codes.shape[0]))
    columns = SortedColumns.from_codes(codes)
    for use_bits in (True, False):
        program = BoxProgram.of(boxes, use_bits=use_bits)
        found = engine.rows_in_boxes(columns, program, 0, n_words(codes.shape[1]))
        _check(boxes, codes, *found)
        bare = BoxProgram.of(boxes, use_bits=use_bits, only_rows=True)
        rows, box_ids, counts = engine.rows_in_boxes(columns, bare, 0, n_words(codes.shape[1]))
        assert np.array_equal(rows, found[0])
        assert not len(box_ids)
        assert not counts.any()


def _check(boxes, codes, rows, box_ids, counts):
    inside = np.zeros((len(boxes), codes.shape[1]), dtype=np.bool_)
    for number, box in enumerate(boxes):
        inside[number] = box.contains(codes)
    assert np.array_equal(rows, np.flatnonzero(inside.any(axis=0)))
    assert np.array_equal(counts, inside.sum(axis=1))
    if len(boxes):
        assert np.array_equal(box_ids, inside.argmax(axis=0)[rows])


@SLOW
@given(st.data())
def test_strategies_shards_and_parts_do_not_change_the_answer(data):
    codes = data.draw(catalogs())
    boxes = data.draw(any_boxes(codes.shape[0]))
    cut = data.draw(st.integers(0, codes.shape[1] - 1))
    halves = [codes[:, :cut], codes[:, cut:]] if cut else [codes]
    for columns in ("full", "bits", "codes"):
        shards = [SortedColumns.from_codes(half, columns=columns) for half in halves]
        index = ColumnIndex(shards, n_threads=2)
        usable = {"full": ("bits", "scan", "postings"), "bits": ("bits", "scan")}
        for strategy in (None, *usable.get(columns, ("scan",))):
            answer = index.in_boxes(boxes, strategy=strategy)
            _check(boxes, codes, answer.rows, answer.box_ids, answer.counts)
            assert strategy in {None, answer.plan.strategy}
            assert answer.rows.dtype == np.int64
            assert np.array_equal(index.rows_in(boxes, strategy=strategy), answer.rows)


@ENGINES
def test_long_shards_of_many_blocks(engine, rng):
    n = 2**17 * 3 + 77
    codes = rng.integers(0, 256, (5, n), dtype=np.uint8)
    columns = SortedColumns.from_codes(codes, columns="bits")
    on_edges = [
        LeafBox.from_bounds({0: (200, 256), 1: (0, 136)}),
        LeafBox.from_bounds({2: (254, 256)}),
        LeafBox.from_bounds({0: (32, 242), 1: (32, 242), 2: (64, 242), 3: (96, 242), 4: (0, 64)}),
    ]
    for boxes in (on_edges, [*on_edges, LeafBox.from_bounds({3: (17, 19)})]):
        program = BoxProgram.of(boxes, use_bits=True)
        found = engine.rows_in_boxes(columns, program, 0, n_words(n))
        _check(boxes, codes, *found)
        bare = BoxProgram.of(boxes, use_bits=True, only_rows=True)
        assert np.array_equal(engine.rows_in_boxes(columns, bare, 0, n_words(n))[0], found[0])


def test_many_boxes_keep_their_numbers(rng):
    codes = rng.integers(0, 256, (2, 5_000), dtype=np.uint8)
    boxes = [LeafBox.from_bounds({0: (c % 256, c % 256 + 1)}) for c in range(600)]
    index = ColumnIndex([SortedColumns.from_codes(codes)])
    for strategy in ("bits", "postings", "scan"):
        answer = index.in_boxes(boxes, strategy=strategy)
        _check(boxes, codes, answer.rows, answer.box_ids, answer.counts)
    with pytest.raises(ValueError, match="expected at most 65,536 boxes, got 65,537"):
        BoxProgram.of(boxes[:1] * (MAX_BOXES + 1), use_bits=True)


def test_the_index_equals_the_scan_before_and_after_the_loops_are_compiled(rng):
    codes = rng.integers(0, 256, (4, 9_000), dtype=np.uint8)
    boxes = [LeafBox.from_bounds({0: (240, 256), 3: (0, 128)})]
    index = ColumnIndex([SortedColumns.from_codes(codes)])
    early = index.in_boxes(boxes)
    assert early.plan.engine == "numpy"
    assert index.loader.wait().NAME == "numba"
    late = index.in_boxes(boxes)
    assert late.plan.engine == "numba"
    assert np.array_equal(early.rows, late.rows)


def test_without_numba_the_answers_are_the_same(rng, monkeypatch, caplog):
    def broken():
        raise ImportError("libLLVM is missing")

    monkeypatch.setattr(kernels, "warm_up", broken)
    codes = rng.integers(0, 256, (4, 9_000), dtype=np.uint8)
    boxes = [LeafBox.from_bounds({0: (240, 256), 3: (0, 128)})]
    index = ColumnIndex([SortedColumns.from_codes(codes)])
    assert index.loader.wait().NAME == "numpy"
    assert index.loader.problem == "ImportError: libLLVM is missing"
    assert "NumPy serves instead" in caplog.text
    answer = index.in_boxes(boxes)
    assert answer.plan.engine == "numpy"
    assert np.array_equal(answer.rows, np.flatnonzero(union_mask(boxes, codes)))


def test_loops_that_would_run_in_python_are_not_used(monkeypatch):
    monkeypatch.setattr(kernels.numba.config, "DISABLE_JIT", True)
    with pytest.raises(ImportError, match="unset NUMBA_DISABLE_JIT"):
        kernels.warm_up()


def test_a_forced_strategy_needs_its_part_of_the_index(rng):
    codes = rng.integers(0, 256, (4, 100), dtype=np.uint8)
    boxes = [LeafBox.from_bounds({0: (240, 256)})]
    bare = ColumnIndex([SortedColumns.from_codes(codes, columns="codes")])
    for strategy in ("bits", "postings"):
        with pytest.raises(QueryError, match="clipbranches columns CATALOG --parts full"):
            bare.in_boxes(boxes, strategy=strategy)
    with pytest.raises(QueryError, match="among bits, postings, scan, got 'magic'"):
        bare.in_boxes(boxes, strategy="magic")
    with pytest.raises(ValueError, match="its bit vectors, got one without"):
        bare.shards[0].bit_vector(0, 0)
    with pytest.raises(ValueError, match="sorted order, got one without"):
        bare.shards[0].posting_list(boxes[0].ranges[0])


def test_parts_come_in_row_order_and_a_cancelled_query_stops(rng):
    codes = rng.integers(0, 256, (4, 700_000), dtype=np.uint8)
    boxes = [LeafBox.from_bounds({0: (200, 256), 3: (0, 128)})]
    index = ColumnIndex([SortedColumns.from_codes(codes, columns="codes")] * 2, n_threads=2)
    _, parts = index.stream_boxes(boxes)
    rows = [part.rows for part in parts]
    assert len(rows) == 6
    assert np.array_equal(np.concatenate(rows), index.in_boxes(boxes).rows)
    cancel = threading.Event()
    _, parts = index.stream_boxes(boxes, cancel=cancel)
    next(parts)
    cancel.set()
    with pytest.raises(Cancelled, match="the query was cancelled"):
        next(parts)
    with pytest.raises(Cancelled, match="the query was cancelled"):
        index.in_boxes(boxes, cancel=cancel)


def test_queries_from_many_threads_at_once(rng):
    codes = rng.integers(0, 256, (6, 300_000), dtype=np.uint8)
    index = ColumnIndex([SortedColumns.from_codes(codes)], n_threads=2)
    index.loader.start()
    asked = [
        [LeafBox.from_bounds({column: (low, 256), (column + 1) % 6: (0, 128)})]
        for column in range(6)
        for low in (196, 240)
    ]
    expected = [np.flatnonzero(union_mask(boxes, codes)) for boxes in asked]
    right = []

    def ask(seed):
        for i in np.random.default_rng(seed).integers(0, len(asked), 12).tolist():
            right.append(np.array_equal(index.in_boxes(asked[i]).rows, expected[i]))  # noqa: PERF401

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 96


def test_a_selective_ensemble_reads_leaves_and_a_wide_one_scans(rng):
    codes = rng.integers(0, 256, (8, 200_000), dtype=np.uint8)
    target = (codes[0] > 250) & (codes[1] > 200)
    matrix = xgb.DMatrix(codes.T.astype(np.float32), target.astype(np.float32))
    booster = xgb.train({"objective": "binary:logistic", "max_depth": 3, "nthread": 1}, matrix, 5)
    ensemble = TreeEnsemble.from_booster(booster)
    index = ColumnIndex([SortedColumns.from_codes(codes)])
    narrow, wide = index.rows_above(ensemble, 0.0), index.rows_above(ensemble, -9.0)
    assert (narrow.plan.strategy, wide.plan.strategy) == ("leaves", "scan")
    assert np.array_equal(narrow.rows, np.flatnonzero(predict_margins(booster, codes) > 0))
    assert len(wide.rows) == 200_000


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
